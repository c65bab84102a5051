"""A batch into the slots of a queue, in place, if a flag that Python may not ask says so.

Ops, so that a GPU does with a kernel for each field, one for the counter and one for the
question whether to, what takes torch two dozen. They are for plain eager code.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _losses
from .._effects import LIBRARY
from .._lists import Batch, Pool
from .._numerics import plainly_eager
from .._queue import counter_after, next_slots
from .._ranks import Lists
from .._ranks.op import on_gpu
from ._seal import SEAL, seal_of

SMALL = 1 << 16  # numbers that one program looks through

LIBRARY.define(
    "put_rows(Tensor(a!) buffer, Tensor? rows, int value, int n, Tensor count, Tensor where) -> ()"
)
LIBRARY.define(
    "count_rows(Tensor(a!) count, Tensor(b!) seal, Tensor(c!) mark, Tensor before, Tensor where,"
    " int n, int capacity, int[] constants) -> ()"
)
LIBRARY.define(
    "keeps(Tensor logits, Tensor targets, Tensor? weight, Tensor? gains, Tensor valid,"
    " ScalarType dtype, int ignore_index) -> Tensor"
)


def _put_rows(
    buffer: Tensor, rows: Tensor | None, value: int, n: int, count: Tensor, where: Tensor
) -> None:
    drop, slots = next_slots(count, n, buffer.shape[0])
    if rows is None:
        rows = buffer.new_full((slots.numel(), *buffer.shape[1:]), value)
    else:
        rows = rows[drop:].to(buffer.dtype)
    buffer.index_copy_(0, slots, torch.where(where, rows, buffer.index_select(0, slots)))


def _count_rows(
    count: Tensor, seal: Tensor, mark: Tensor, before: Tensor, where: Tensor, n: int,
    capacity: int, constants: list[int],
) -> None:  # fmt: skip
    count.copy_(torch.where(where, counter_after(before, n, capacity), count))
    seal.copy_(seal_of(count))
    mark.copy_(seal)


def _keeps(
    logits: Tensor, targets: Tensor, weight: Tensor | None, gains: Tensor | None, valid: Tensor,
    dtype: torch.dtype, ignore_index: int,
) -> Tensor:  # fmt: skip
    pool = Pool(Lists(logits.T, logits.T, valid))
    batch = Batch(logits, targets, weight, gains=gains)
    return _losses.keeps(batch, pool, dtype, ignore_index=ignore_index)


for _name, _op, _fake in (
    ("put_rows", _put_rows, lambda *_: None),
    ("count_rows", _count_rows, lambda *_: None),
    ("keeps", _keeps, lambda x, *_: x.new_empty((), dtype=torch.bool)),
):
    LIBRARY.impl(_name, _op, "CompositeExplicitAutograd")
    LIBRARY.impl(_name, on_gpu(_name, _op), "CUDA")
    LIBRARY.impl(_name, _fake, "Meta")


def keeps(batch: Batch, pool: Pool, dtype: torch.dtype, *, ignore_index: int, name: str) -> Tensor:
    """`_losses.keeps`; of what is not large in one kernel."""
    valid, elements = pool.lists.valid, batch.logits.numel()
    plain = not batch.logits.is_cpu and not name and plainly_eager()
    plain = plain and batch.label_mask is None
    if not plain or valid is None or valid.dim() > 1 or max(elements, valid.numel()) > SMALL:
        return _losses.keeps(batch, pool, dtype, ignore_index=ignore_index, name=name)
    found: Tensor = torch.ops.proxy_losses.keeps(
        batch.logits.detach(), batch.targets, batch.sample_weight, batch.gains, valid, dtype,
        ignore_index,
    )  # fmt: skip
    return found


def apart(rows: Tensor, buffer: Tensor) -> Tensor:
    """Rows without gradient and tangent, in memory that they do not share with the buffer."""
    rows = rows.detach()
    return rows.clone() if torch._C._is_alias_of(rows, buffer) else rows  # type: ignore[attr-defined]


def put_rows(
    buffer: Tensor, rows: Tensor | None, value: int, n: int, count: Tensor, where: Tensor
) -> None:
    """Write n rows, or the value for None, over the oldest slots, if where [] says so."""
    if rows is not None:
        rows = apart(rows.to(buffer.device), buffer)
    torch.ops.proxy_losses.put_rows(buffer, rows, value, n, count, where)
    torch.autograd.graph.increment_version(buffer)  # what is known of it is known no more


def count_rows(
    count: Tensor, seal: Tensor, mark: Tensor, before: Tensor, where: Tensor, n: int, capacity: int
) -> None:
    """The counter n rows after `before`, if where [] says so, and its seal anyway."""
    torch.ops.proxy_losses.count_rows(count, seal, mark, before, where, n, capacity, SEAL)
    torch.autograd.graph.increment_version([count, seal, mark])
