"""Counts what calls read on the host: each read waits for the device where there is one.

``python -m benchmarks.reads [--quick] [--out FILE] [--against FOLDER]``

A read is an `item` of a tensor (`bool`, `int` and `float` take one), a `nonzero`, since the size of
its result must be known, an `equal` or a `tolist`. The profiler sees them inside our operators too,
where a dispatch mode sees nothing; a `tolist` it does not see, so that is counted beside it.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from . import harness, report
from .smooth_ap import TAU, make_list

READS = {"aten::_local_scalar_dense": "item", "aten::nonzero": "nonzero", "aten::equal": "equal"}
BATCH, QUEUE = 512, 1024

Metric = Callable[[Tensor], Tensor]
Found = dict[str, Any]  # kind of read -> how many


def reads(run: Callable[[], Any]) -> tuple[Any, Found]:
    """What it returns, and how often it reads."""
    plain = Tensor.tolist
    tolist = mock.Mock(side_effect=plain)
    with (
        mock.patch.object(Tensor, "tolist", lambda tensor: tolist(tensor)),
        profile(activities=[ProfilerActivity.CPU], acc_events=True) as seen,
    ):
        out = run()
    names = [READS[event.name] for event in seen.events() or () if event.name in READS]
    return out, {**Counter(names), **({"tolist": n} if (n := tolist.call_count) else {})}


def of_call(metric: Metric, scores: Tensor) -> dict[str, Found]:
    """Reads of the value and of the gradient, after a call that warms up."""
    leaf = scores.detach().requires_grad_()
    torch.autograd.grad(metric(leaf), leaf)
    value, forward = reads(lambda: metric(leaf))
    return {"forward": forward, "backward": reads(lambda: torch.autograd.grad(value, leaf))[1]}


def functions(package: Any, small: int, large: int) -> dict[str, dict[str, Found]]:
    """Of one list; the small one is ranked by exact pairs, the large one on the grid."""
    scores, pos = make_list(large, 0.05)
    draw = torch.Generator().manual_seed(0)
    some, weight = (torch.rand(large, generator=draw) for _ in range(2))

    def ranks(s: Tensor) -> Tensor:
        rank, rank_pos = package.soft_ranks(s, pos, TAU)[:2]
        return (rank + rank_pos).sum()

    of_list = partial(package.smooth_ap, pos_mask=pos, tau=TAU)
    calls: dict[str, Metric] = {
        "smooth_ap": of_list,
        "smooth_ap, mask and weight": partial(of_list, valid_mask=some < 0.9, sample_weight=weight),
        "soft_ranks": ranks,
        "recall_at_quantile": partial(package.recall_at_quantile, pos_mask=pos, tau=TAU),
        "partial_auc, trapezoid": partial(package.partial_auc, pos_mask=pos, tau=TAU),
        "partial_auc, pairwise": partial(
            package.partial_auc, pos_mask=pos, tau=TAU, surrogate="pairwise"
        ),
    }
    found = {f"{name}, {large:,} rows": of_call(call, scores) for name, call in calls.items()}
    scores, pos = make_list(small, 0.05)
    dense = of_call(partial(package.smooth_ap, pos_mask=pos, tau=TAU), scores)
    return {f"smooth_ap, {small:,} rows": dense, **found}


def modules(package: Any) -> dict[str, dict[str, Found]]:
    """Forward of every module with a full queue, and of its metric on as many rows."""
    scores, pos = make_list(BATCH + QUEUE, 0.05)
    logits, targets = scores[:BATCH, None], pos[:BATCH].long()
    pairwise: dict[str, Any] = {"surrogate": "pairwise"}
    found = {}
    for name, metric, more in (
        ("SmoothAPLoss", "smooth_ap", {}),
        ("RecallAtQuantileLoss", "recall_at_quantile", {}),
        ("PAUCAtBudgetLoss", "partial_auc", {}),
        ("PAUCAtBudgetLoss", "partial_auc", pairwise),
    ):
        module = getattr(package, name)(1, queue_size=QUEUE, temperature=TAU, **more)
        for _ in range(QUEUE // BATCH + 1):
            module(logits, targets)
        leaf = logits.clone().requires_grad_()
        alone = of_call(partial(getattr(package, metric), pos_mask=pos, tau=TAU, **more), scores)
        found[", ".join([name, *more.values()])] = {
            "forward": reads(lambda module=module, leaf=leaf: module(leaf, targets))[1],
            "its metric alone": alone["forward"],
        }
    for name, labels in (("SigmoidFocalLoss", targets[:, None].float()),
                         ("SoftmaxFocalLoss", targets * 0)):  # fmt: skip
        module = getattr(package, name)()
        found[name] = {"forward": reads(lambda module=module, y=labels: module(logits, y))[1]}
    return found


def show(written: report.Written) -> str:
    """How many of each call, and of which kinds."""
    rows = [["reads on the host", *written["reads"]]]
    for case, parts in next(iter(written["reads"].values())).items():
        for part in parts:
            of_all = [found[case][part] for found in written["reads"].values()]
            kinds = (", ".join(f"{n} {kind}" for kind, n in sorted(f.items())) for f in of_all)
            cells = [f"{sum(f.values())} ({k})" if k else "0" for f, k in zip(of_all, kinds)]  # noqa: B905
            rows.append([f"{case}: {part}", *cells])
    return "\n".join(report.align(rows))


def main(argv: Sequence[str] | None = None) -> int:
    options = argparse.ArgumentParser(prog="python -m benchmarks.reads")
    options.add_argument("--quick", action="store_true", help="a shorter list")
    options.add_argument("--out", type=Path, help="JSON file; without it, --quick writes none")
    options.add_argument("--against", type=Path, help=harness.AGAINST)
    args = options.parse_args(argv)
    torch.set_num_threads(1)
    rows = (1_000, 16_000 if args.quick else 64_000)
    packages = harness.packages(args)
    peers = {name: package.__version__ for name, package in packages.items()}
    written = report.heading("reads", __doc__.splitlines()[0], peers) | {
        "quick": args.quick, "rows": rows, "batch": BATCH, "queue": QUEUE, "tau": TAU,
        "reads": {n: functions(p, *rows) | modules(p) for n, p in packages.items()},
    }  # fmt: skip
    print(show(written))
    report.save(written, args, "reads")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
