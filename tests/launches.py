"""What a device has to do, watched on the meta device: launches, reads, copies from the host.

On meta every read of a value raises by itself. What it lets pass, and a CUDA device waits for or a
CUDA graph cannot hold, raises here: a copy between the host and the device, a tensor made of Python
numbers on the device, an index or a choice that lies on the host.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

VIEWS = {
    "_reshape_alias", "_unsafe_view", "alias", "as_strided", "detach", "diagonal", "empty",
    "empty_like", "empty_strided", "expand", "is_same_size", "lift_fresh", "new_empty",
    "new_empty_strided", "permute", "select", "slice", "split", "split_with_sizes", "squeeze", "t",
    "transpose", "unbind", "unfold", "unsafe_split", "unsqueeze", "view",
}  # fmt: skip
# Kernels of an op where it is not one. Our own ops have a backend each, whose kernels are counted
# with it; that of a sort depends on the size; the others are made of a copy and a fill.
COSTS = {"sort": 4, "topk": 4, "masked_fill": 2, "index_copy": 2, "index_fill": 2, "scatter": 2}
OWN = {"pair_sums": 8, "rank_mean": 8, "put_rows": 1, "count_rows": 1, "keeps": 1}
OWN |= {"mean_above": 1, "precision_place": 1, "first_rank": 1, "relative_gains": 1}
OWN |= {"ideal_share": 1}
MOVES = {"_to_copy", "copy_", "fill_"}
# These take a number that lies on the host as an argument of the kernel; all other ops copy it.
TAKES_NUMBERS = {
    "add", "sub", "rsub", "mul", "div", "pow", "maximum", "minimum", "eq", "ne", "lt", "le", "gt",
    "ge", "bitwise_and", "bitwise_or", "bitwise_xor", "add_", "sub_", "mul_", "div_",
}  # fmt: skip


class _Ops(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, int]] = []

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = op(*args, **(kwargs or {}))
        space, name = op._schema.name.split("::")
        given, made = list(_tensors(args)), list(_tensors((out,)))
        away = [x for x in (*given, *made) if not x.is_cpu]
        here = [x for x in (*given, *made) if x.is_cpu]
        numbers = name in TAKES_NUMBERS and not any(x.dim() for x in here)
        if away and here and not numbers and not (kwargs or {}).get("non_blocking"):
            raise AssertionError(f"{space}::{name} copies between the host and the device")
        if away and space != "aten":
            self.seen.append((name, OWN[name]))
        elif away and name not in VIEWS:
            self.seen.append((name, COSTS.get(name, 1)))
        return out


class _Makers(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        makes = func in (torch.tensor, torch.as_tensor, torch.asarray, Tensor.new_tensor)
        if makes and not out.is_cpu and not isinstance(args[0 if len(args) == 1 else -1], Tensor):
            raise AssertionError(f"{func.__name__} copies numbers of the host to the device")
        return out


def _tensors(tree: Any) -> Iterator[Tensor]:
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, list | tuple):
        for branch in tree:
            yield from _tensors(branch)


@contextmanager
def watched() -> Iterator[list[tuple[str, int]]]:
    """The ops that ran on a device, each with its number of kernels; raises at a copy or a read."""
    with _Makers(), _Ops() as ops:
        yield ops.seen


def launches(seen: list[tuple[str, int]]) -> int:
    return sum(count for _, count in seen)
