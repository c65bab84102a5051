"""Counts rows per cell and numbers the occupied cells when a list is long in units of tau.

A cell with many rows is crowded, and so are its neighbours: those interact by cell products. The
other occupied cells are sparse. Two neighbouring cells, not both crowded, then are both thin, and
their rows interact by exact pairs.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .layout import Axis, Block, Layout, Shape, address, blocks, coordinate
from .plan import Plan, Work


class Rows(NamedTuple):
    """Rows to visit, and the groups for which they may be sources (w != 0) and targets."""

    listed: Tensor | None  # flat row numbers, None for all rows
    sources: tuple[int, ...]
    targets: tuple[int, ...]


class Cells(NamedTuple):
    """Occupied cells in a table of addresses (cell numbers, or ranks in ``ids``)."""

    axis: Axis
    ids: Tensor | None
    near: Tensor  # [addresses] bool: the address below belongs to the cell just below
    occupied: Tensor  # [addresses] bool
    crowded: Tensor  # [addresses] bool
    wants: Tensor  # [addresses] bool: its targets need exact pairs
    gives: Tensor  # [addresses] bool: its sources take part in exact pairs


class Census(NamedTuple):
    """Sizes of ``Cells`` on the host."""

    occupied: int
    crowded: int
    pairs: int  # exact pairs, at most
    rows: int  # rows that take part in them, at most


def below(x: Tensor, near: Tensor) -> Tensor:
    """Value of the cell below, zero where that is not occupied."""
    return torch.nn.functional.pad(x[:-1], (1, 0)) * near


def above(x: Tensor, near: Tensor) -> Tensor:
    """Value of the cell above."""
    return torch.nn.functional.pad((x * 1)[1:] * near[1:], (0, 1))


def row_addresses(axis: Axis, ids: Tensor | None, scores: Tensor, block: Block) -> Tensor:
    """Addresses of the cells of a block of rows."""
    return address(axis, ids, coordinate(axis, scores, block).floor_(), block).view(-1)


def survey(
    scores: Tensor, rows: list[Rows], axis: Axis, table: int, crowd: int
) -> tuple[Cells, Census]:
    """One pass over the rows, one host sync; more than ``crowd`` rows make a cell crowded."""
    shape = (scores.shape[0], scores.shape[1])
    ids = None if axis.size <= table else _distinct(scores, rows, axis)
    size = axis.size if ids is None else ids.numel()
    sources = torch.zeros(size, dtype=torch.int32, device=scores.device)
    targets = torch.zeros_like(sources)
    for part in rows:
        for block in blocks(shape, scores.device, part.listed):
            where = row_addresses(axis, ids, scores, block)
            one = torch.ones((), dtype=torch.int32, device=scores.device).expand_as(where)
            if part.sources:
                sources.scatter_add_(0, where, one)
            if part.targets:
                targets.scatter_add_(0, where, one)
    near = torch.ones(size, dtype=torch.bool, device=scores.device)
    if ids is not None:
        near[1:] = ids[1:] - ids[:-1] == 1
    near[:1] = False
    return _classify(axis, ids, near, sources, targets, crowd)


def _distinct(scores: Tensor, rows: list[Rows], axis: Axis) -> Tensor:
    """Sorted numbers of the occupied cells, for axes too long for a table."""
    shape = (scores.shape[0], scores.shape[1])
    found = [
        torch.unique(row_addresses(axis, None, scores, block))
        for part in rows
        for block in blocks(shape, scores.device, part.listed)
    ]
    distinct: Tensor = torch.unique(torch.cat(found))
    return distinct


def _classify(
    axis: Axis, ids: Tensor | None, near: Tensor, sources: Tensor, targets: Tensor, crowd: int
) -> tuple[Cells, Census]:
    occupied = (sources + targets) > 0
    many = (sources > crowd) | (targets > crowd)
    crowded = (many | below(many, near) | (above(many, near) > 0)) & occupied

    def around(x: Tensor) -> Tensor:  # rows of x a row meets in exact pairs
        thin = x * ~crowded
        own, beside = thin, below(x, near) + above(x, near)
        beside_thin = below(thin, near) + above(thin, near)
        return torch.where(crowded, beside_thin, own + beside)

    met, meets = around(sources), around(targets)
    wants, gives = (targets > 0) & (met > 0), (sources > 0) & (meets > 0)
    pairs = (targets * met.long()).sum()
    used = (targets * wants).sum() + (sources * gives).sum()
    sizes = torch.stack([occupied.sum(), crowded.sum(), pairs, used]).tolist()
    return Cells(axis, ids, near, occupied, crowded, wants, gives), Census(*sizes)


def number(cells: Cells, census: Census, work: Work, chosen: Plan) -> Layout:
    """Number the bins of the crowded cells, then the sparse cells."""
    bins = chosen.bins
    crowded, sparse = census.crowded, census.occupied - census.crowded
    thin = cells.occupied & ~cells.crowded
    rank = cells.crowded.cumsum(0) - 1
    start = torch.where(cells.crowded, rank * bins, thin.cumsum(0) + crowded * bins)
    where = cells.crowded.nonzero()[:, 0]
    linked = cells.crowded[where - 1] & cells.near[where]
    slot = torch.arange(crowded, device=start.device)
    left = torch.where(linked, slot - 1, crowded)
    follows = torch.nn.functional.pad(linked[1:], (0, 1))
    right = torch.where(follows, slot + 1, crowded)
    seats = min(work.rows, cells.axis.longest, census.occupied)
    order = cells.occupied.cumsum(0) - 1
    if work.lists > 1:  # seats are counted from the first occupied cell of each list
        first_id = cells.axis.first
        edge = first_id if cells.ids is None else torch.searchsorted(cells.ids, first_id)
        before = torch.nn.functional.pad(cells.occupied.cumsum(0), (1, 0))[edge]
        every = torch.arange(order.numel(), device=start.device)
        which = torch.searchsorted(edge, every, right=True) - 1
        order = order - before[which] + which * seats
    seat = torch.cat([order[where], order[thin.nonzero()[:, 0]]])
    shape = Shape(work.lists, chosen.nodes, bins, chosen.bin_width)
    return Layout(cells.axis, shape, start, cells.ids, crowded, sparse, left, right, seat, seats)


def occupied_cells(scores: Tensor, rows: list[Rows], axis: Axis, table: int) -> Tensor:
    """Sorted numbers of the cells that hold rows."""
    shape = (scores.shape[0], scores.shape[1])
    if axis.size > table and rows and scores.numel():
        return _distinct(scores, rows, axis)
    seen = torch.zeros(min(axis.size, table), dtype=torch.bool, device=scores.device)
    for part in rows:
        for block in blocks(shape, scores.device, part.listed):
            seen.index_fill_(0, row_addresses(axis, None, scores, block), True)
    return seen.nonzero()[:, 0]


def only_occupied(axis: Axis, ids: Tensor, table: int, work: Work, chosen: Plan) -> Layout:
    """Numbering in which every occupied cell has bins; ``ids`` are their sorted numbers."""
    if axis.size <= table:
        occupied = torch.zeros(axis.size, dtype=torch.bool, device=ids.device)
        occupied[ids] = True
        near = torch.ones_like(occupied)
        kept = None
    else:
        occupied = torch.ones_like(ids, dtype=torch.bool)
        near = torch.nn.functional.pad(ids[1:] - ids[:-1] == 1, (1, 0))
        kept = ids
    near[:1] = False
    nowhere = torch.zeros_like(occupied)
    cells = Cells(axis, kept, near, occupied, occupied, nowhere, nowhere)
    return number(cells, Census(ids.numel(), ids.numel(), 0, 0), work, chosen)
