"""Rows into the slots of a ring, in place, if a flag on the device says so: `nn/_ring.py`."""

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024


@triton.jit
def _after(count, n, capacity, FRESH: tl.constexpr):
    """The counter after n rows; FRESH: they are as many as the slots, or more."""
    after = count + n
    if FRESH:
        after += capacity - 1
        after -= after % capacity
    return after


@triton.jit
def place_rows(
    rows_ptr, buffer_ptr, count_ptr, where_ptr, value, first, n, width, capacity,
    GIVEN: tl.constexpr, FRESH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The n rows from `first` on, or the value, into the slots after the counter; or nothing."""
    k = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    m = k < tl.where(tl.load(where_ptr) != 0, n, 0) * width
    slot = k // width
    if FRESH == 0:
        slot = (tl.load(count_ptr) + slot) % capacity
    if GIVEN:
        x = tl.load(rows_ptr + first * width + k, mask=m)
    else:
        x = tl.zeros((BLOCK,), tl.int64) + value
    tl.store(buffer_ptr + slot * width + k % width, x.to(buffer_ptr.dtype.element_ty), mask=m)


@triton.jit
def seal_count(
    count_ptr, seal_ptr, mark_ptr, before_ptr, where_ptr, n, capacity,
    FRESH: tl.constexpr, TURN: tl.constexpr, FACTOR: tl.constexpr, BITS: tl.constexpr,
):  # fmt: skip
    """The counter after n rows, or as it is, and its seal, [] and as a float."""
    after = _after(tl.load(before_ptr), n, capacity, FRESH)
    count = tl.where(tl.load(where_ptr) != 0, after, tl.load(count_ptr))
    rest = count % TURN
    seal = tl.where(rest < 0, rest + TURN, rest) * FACTOR ^ BITS
    tl.store(count_ptr, count)
    tl.store(seal_ptr, seal)
    tl.store(mark_ptr, seal.to(tl.float64))


def put_rows(
    buffer: Tensor, rows: Tensor | None, value: int, n: int, count: Tensor, where: Tensor
) -> None:
    """Launch `place_rows`."""
    capacity = buffer.shape[0]
    width, kept = buffer[0].numel(), min(n, capacity)
    given = buffer if rows is None else rows.contiguous()
    place_rows[(triton.cdiv(kept * width, BLOCK),)](
        _bytes(given), _bytes(buffer), count, _bytes(where), value, n - kept, kept, width, capacity,
        GIVEN=rows is not None, FRESH=n >= capacity, BLOCK=BLOCK,
    )  # fmt: skip


def count_rows(
    count: Tensor, seal: Tensor, mark: Tensor, before: Tensor, where: Tensor, n: int,
    capacity: int, constants: list[int],
) -> None:  # fmt: skip
    """Launch `seal_count`."""
    turn, factor, bits = constants
    seal_count[(1,)](
        count, seal, mark, before, _bytes(where), n, capacity, FRESH=n >= capacity, TURN=turn,
        FACTOR=factor, BITS=bits,
    )  # fmt: skip


def _bytes(x: Tensor) -> Tensor:
    """Bools as bytes."""
    return x.view(torch.uint8) if x.dtype == torch.bool else x
