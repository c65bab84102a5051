"""Counts what a call reads on the host: each read waits for the device where there is one.

``python -m benchmarks.reads [--quick] [--out FILE] [--against FOLDER]``

A read is an `item`, `bool` or `int` of a tensor (also where torch calls it itself), a `nonzero`,
whose size must be known, an `equal`, or a `tolist`. The profiler tells them, inside our operators
too, where a dispatch mode sees nothing; it does not see `tolist`, which is counted beside.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

import proxy_losses

from . import harness, report
from .smooth_ap import TAU, make_list

MODULE = "benchmarks.reads"
READS = ("aten::_local_scalar_dense", "aten::nonzero", "aten::equal")
BATCH, QUEUE = 512, 1024

Run = Callable[[], Any]
Calls = dict[str, Callable[[], tuple[Run, ...]]]  # name -> what makes the runs; counted: the last


def reads(run: Run) -> Counter[str]:
    """How often each kind of read happens in a call."""
    lists = 0
    tolist = Tensor.tolist

    def counted(tensor: Tensor) -> Any:
        nonlocal lists
        lists += 1
        return tolist(tensor)

    with (
        mock.patch.object(Tensor, "tolist", counted),
        profile(activities=[ProfilerActivity.CPU], acc_events=True) as found,
    ):
        run()
    names = Counter(event.name.removeprefix("aten::") for event in found.events() or ()
                    if event.name in READS)  # fmt: skip
    return names + Counter(tolist=lists)


def forward_backward(make: Callable[[Tensor], Tensor], scores: Tensor) -> dict[str, Counter[str]]:
    """Reads of the value and of its gradient; the first call warms up."""
    found: dict[str, Counter[str]] = {}
    for _ in range(2):
        leaf, out = scores.detach().requires_grad_(), []
        found["forward"] = reads(lambda leaf=leaf, out=out: out.append(make(leaf)))
        (value,) = out
        found["backward"] = reads(lambda value=value, leaf=leaf: torch.autograd.grad(value, leaf))
    return found


def functions(package: Any, small: int, large: int) -> dict[str, dict[str, Counter[str]]]:
    """The rank functions on one list."""
    found = {}
    scores, pos = make_list(small, 0.05)
    found[f"smooth_ap, {small:,}"] = forward_backward(
        lambda s: package.smooth_ap(s, pos, TAU), scores
    )
    scores, pos = make_list(large, 0.05)
    some = torch.rand(large, generator=torch.Generator().manual_seed(0)) < 0.9
    weight = torch.rand(large, generator=torch.Generator().manual_seed(1))
    calls = {
        "smooth_ap": lambda s: package.smooth_ap(s, pos, TAU),
        "smooth_ap with mask and weight": lambda s: package.smooth_ap(
            s, pos, TAU, valid_mask=some, sample_weight=weight
        ),
        "soft_ranks": lambda s: torch.stack(tuple(package.soft_ranks(s, pos, TAU))[:2]).sum(),
        "recall_at_quantile": lambda s: package.recall_at_quantile(s, pos, TAU),
        "partial_auc": lambda s: package.partial_auc(s, pos, TAU),
        "partial_auc, pairwise": lambda s: package.partial_auc(s, pos, TAU, surrogate="pairwise"),
    }
    for name, call in calls.items():
        found[f"{name}, {large:,}"] = forward_backward(call, scores)
    return found


def main() -> None:
    import sys

    for package in sys.argv[1:]:
        mod = __import__(package)
        for name, parts in functions(mod, 1000, 64000).items():
            print(package, name, {k: (sum(v.values()), dict(v)) for k, v in parts.items()})


if __name__ == "__main__":
    main()
