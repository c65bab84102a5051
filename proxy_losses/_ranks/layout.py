"""Cells and bins: where every row of a pool sits on the score axis.

A list is cut into cells of K tau and each cell into B bins. Cells are numbered in score order over
all lists, with at least one empty number between lists, so that neighbours differ by one and lists
never touch.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

from .plan import Plan

CHUNK = {"cpu": 1 << 15, "cuda": 1 << 24}  # rows per pass: temporaries stay in cache
MAX_NUMBERS = 1 << 62


class Block(NamedTuple):
    """Some rows of a [L, M] tensor, as one index ``tensor[lists, rows]``."""

    lists: slice | Tensor | int
    rows: slice | Tensor


class Ranges(NamedTuple):
    """Range and scale of every list, on the host."""

    low: list[float]
    high: list[float]
    middle: list[float]  # a typical score: cells are measured from here, so outliers cost no digits
    tau: list[float]


class Axis(NamedTuple):
    """Affine map from scores to coordinates: ``floor((score - origin) * scale) + base``."""

    origin: Tensor  # [L, 1] float64
    scale: Tensor  # [L, 1] float64, cells (or bins) per unit of score
    base: Tensor  # [L, 1] int64
    first: Tensor  # [L] int64, lowest number of each list
    size: int  # numbers in use, gaps included
    longest: int  # most numbers in one list


class Shape(NamedTuple):
    """Lists, nodes per bin, bins per cell and the width of a bin in units of tau."""

    lists: int
    nodes: int
    bins: int
    bin_width: float


class Layout(NamedTuple):
    """Numbering of the bins: B for each crowded cell, then one entry for each sparse cell."""

    axis: Axis
    shape: Shape
    start: Tensor | None  # [addresses] first bin of a cell; None: bins are read off the axis
    ids: Tensor | None  # sorted cell ids when the axis is too long for a table
    crowded: int  # cells with moments
    sparse: int  # cells without
    left: Tensor | None  # [crowded] neighbour below or ``crowded``; None: a single cell per list
    right: Tensor | None
    # [crowded + sparse] place of each cell in a [L, seats] table, score order inside a list
    seat: Tensor
    seats: int


def blocks(shape: tuple[int, int], device: torch.device, index: Tensor | None) -> Iterator[Block]:
    """Chunks of all rows (index None) or of the flat row numbers in ``index``."""
    lists, rows = shape
    chunk = CHUNK.get(device.type, 1 << 15)
    if not lists * rows:
        return
    if index is not None:
        for part in torch.split(index, chunk):
            where = part.div(rows, rounding_mode="floor") if lists > 1 else 0
            yield Block(where, part - where * rows if lists > 1 else part)
    elif rows >= chunk:
        for first in range(lists):
            for row in range(0, rows, chunk):
                yield Block(slice(first, first + 1), slice(row, row + chunk))
    else:
        for first in range(0, lists, chunk // rows):
            yield Block(slice(first, first + chunk // rows), slice(0, rows))


def take(values: Tensor, block: Block) -> Tensor:
    """Entries of a [L, M] tensor in a block, flattened."""
    if isinstance(block.lists, int) and isinstance(block.rows, Tensor):
        return values[block.lists].index_select(0, block.rows)
    return values[block.lists, block.rows].reshape(-1)


def put(values: Tensor, block: Block, new: Tensor) -> None:
    """Overwrite the entries of a block."""
    if isinstance(block.lists, int) and isinstance(block.rows, Tensor):
        values[block.lists].index_copy_(0, block.rows, new)
    else:
        where = values[block.lists, block.rows]
        if isinstance(block.rows, slice):
            where.copy_(new.view(where.shape))
        else:
            values[block.lists, block.rows] = new


def members(block: Block, keep: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    """Lists and rows of the kept positions of a flattened block."""
    if isinstance(block.rows, Tensor):
        row = block.rows[keep]
        return (block.lists[keep] if isinstance(block.lists, Tensor) else row * 0), row
    assert isinstance(block.lists, slice)
    width = min(block.rows.stop, rows) - block.rows.start
    if block.lists.stop - block.lists.start == 1:
        return torch.full_like(keep, block.lists.start), keep + block.rows.start
    lists = keep.div(width, rounding_mode="floor")
    return lists + block.lists.start, keep - lists * width + block.rows.start


def per_list(values: Tensor, block: Block) -> Tensor:
    """[L, 1] values lined up with the rows of a block."""
    return values[block.lists] if isinstance(block.rows, slice) else values[block.lists, 0]


def coordinate(axis: Axis, scores: Tensor, block: Block) -> Tensor:
    """(score - origin) * scale in float64; scaling before the subtraction would lose digits."""
    if isinstance(block.rows, slice):
        u = scores[block.lists, block.rows].to(torch.float64, copy=True)
    else:
        u = take(scores, block).to(torch.float64, copy=True)
    return u.sub_(per_list(axis.origin, block)).mul_(per_list(axis.scale, block))


def cell_axis(ranges: Ranges, width: float, device: torch.device) -> Axis:
    """Axis in units of cells, measured from the middle of each list."""
    scale = [1.0 / (tau * width) for tau in ranges.tau]
    base, starts, size, longest = [], [], 1, 1
    for low, high, middle, unit in zip(ranges.low, ranges.high, ranges.middle, scale, strict=True):
        first, last = math.floor((low - middle) * unit), math.floor((high - middle) * unit)
        base.append(size - first)
        starts.append(size)
        size += last - first + 2
        longest = max(longest, last - first + 1)
    if size > MAX_NUMBERS:
        raise OverflowError("score range / tau is too large for the grid; use the dense method")
    origin, unit_column = _column(ranges.middle, device), _column(scale, device)
    first_column = _column(starts, device)[:, 0]
    return Axis(origin, unit_column, _column(base, device), first_column, size, longest)


def direct_layout(ranges: Ranges, chosen: Plan, device: torch.device) -> Layout:
    """Every cell between the extremes of a list exists; bins are read off the axis."""
    scale = [1.0 / (tau * chosen.bin_width) for tau in ranges.tau]
    counts = [
        int((high - low) * unit) // chosen.bins + 1
        for low, high, unit in zip(ranges.low, ranges.high, scale, strict=True)
    ]
    first = [0, *accumulate(counts[:-1])]
    total, seats = sum(counts), max(counts)
    base = _column([cell * chosen.bins for cell in first], device)
    origin, size = _column(ranges.low, device), total * chosen.bins
    axis = Axis(origin, _column(scale, device), base, base[:, 0], size, size)
    cell = torch.arange(total, device=device)
    if len(counts) == 1:
        seat, edge_low, edge_high = cell, cell == 0, cell == total - 1
    else:
        starts, sizes = _column(first, device)[:, 0], _column(counts, device)[:, 0]
        which = torch.repeat_interleave(sizes, output_size=total)
        inside = cell - starts[which]
        seat = which * seats + inside
        edge_low, edge_high = inside == 0, inside == sizes[which] - 1
    left = torch.where(edge_low, total, cell - 1) if seats > 1 else None
    right = torch.where(edge_high, total, cell + 1) if seats > 1 else None
    shape = Shape(len(counts), chosen.nodes, chosen.bins, chosen.bin_width)
    return Layout(axis, shape, None, None, total, 0, left, right, seat, seats)


def _column(values: list[float] | list[int], device: torch.device) -> Tensor:
    kind = torch.float64 if isinstance(values[0], float) else torch.int64
    return torch.tensor(values, dtype=kind, device=device)[:, None]


class Place(NamedTuple):
    """Where the rows of a block sit."""

    twice: Tensor  # 2t, t in [-1, 1] inside the bin, float64
    bin: Tensor  # bin of the higher moments; the spare last bin for rows of sparse cells
    entry: Tensor  # bin of the zeroth moment: the bin, or the entry of the sparse cell


def address(axis: Axis, ids: Tensor | None, floor: Tensor, block: Block) -> Tensor:
    """Table address of the cells with these coordinates (rounded down)."""
    found = floor.long().add_(per_list(axis.base, block))
    return found if ids is None else torch.searchsorted(ids, found)


def place(layout: Layout, scores: Tensor, block: Block) -> Place:
    """Bins and local coordinates of the rows of a block, flattened."""
    u = coordinate(layout.axis, scores, block)
    if layout.start is None:  # u >= 0, so truncation rounds down
        where = u.int().long()  # in two steps: faster, and bins are few
        u.frac_()
        if scores.shape[0] > 1:
            where.add_(per_list(layout.axis.base, block))
        where = where.view(-1)
        return Place(u.mul_(4.0).sub_(2.0).view(-1), where, where)
    floor = u.floor()
    inside = u.sub_(floor).mul_(float(layout.shape.bins))  # < bins even after rounding
    step = inside.floor()
    twice = inside.sub_(step).mul_(4.0).sub_(2.0).view(-1)
    cell = address(layout.axis, layout.ids, floor, block).view(-1)
    entry = layout.start.index_select(0, cell)
    spare = layout.crowded * layout.shape.bins
    if layout.sparse == 0:
        entry = entry + step.view(-1).int()
        return Place(twice, entry, entry)
    entry = entry + step.view(-1).int().mul_((entry < spare).int())
    return Place(twice, entry.clamp(max=spare), entry)
