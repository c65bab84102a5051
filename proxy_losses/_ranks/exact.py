"""Exact pairs between rows of neighbouring sparse cells."""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from .cells import Cells, Rows, row_addresses
from .layout import blocks, members

PAIRS = 1 << 14  # pairs per pass


class Picked(NamedTuple):
    """Rows of sparse cells."""

    lists: Tensor  # [n] int64
    rows: Tensor  # [n] int64
    cell: Tensor  # [n] address of the cell
    values: Tensor  # [G, n] float64: weights, or 1 where the row is a target


def pick(
    scores: Tensor,
    parts: list[tuple[Tensor | None, tuple[int, ...]]],
    cells: Cells,
    wanted: Tensor,
    values: Tensor,
) -> Picked:
    """Rows in the cells marked in ``wanted``; ``parts`` are (flat rows or None, groups)."""
    shape = (scores.shape[0], scores.shape[1])
    found: list[Picked] = []
    for index, groups in parts:
        near: list[tuple[Tensor, Tensor, Tensor]] = []
        for block in blocks(shape, scores.device, index) if groups else ():
            where = row_addresses(cells.axis, cells.ids, scores, block)
            keep = wanted.index_select(0, where).nonzero()[:, 0]
            near.append((*members(block, keep, shape[1]), where.index_select(0, keep)))
        if near:
            lists, rows, cell = (torch.cat(column) for column in zip(*near, strict=True))
            table = scores.new_zeros(values.shape[1], rows.numel(), dtype=torch.float64)
            for group in groups:
                table[group] = values[lists, group, rows]
            found.append(Picked(lists, rows, cell, table))
    return Picked(*(torch.cat(column, dim=-1) for column in zip(*found, strict=True)))


class Windows(NamedTuple):
    """For every target a run of sources, sorted by cell."""

    which: Tensor  # [m] target
    low: Tensor  # [m] first source
    size: Tensor  # [m] sources
    above: Tensor  # [m] first source of a higher cell


def windows(source_cell: Tensor, target_cell: Tensor, cells: Cells) -> Windows:
    """Sources in the cell of each target and beside it, but for pairs of crowded cells."""
    one = torch.ones_like(source_cell)
    start = one.new_zeros(cells.near.numel() + 2).scatter_add_(0, source_cell + 1, one).cumsum_(0)
    both = cells.near & cells.crowded & cells.crowded.roll(1)
    joined = torch.nn.functional.pad(cells.near & ~both, (0, 1))  # pairs with the cell below
    crowded = cells.crowded.index_select(0, target_cell)
    low = start[target_cell - joined[target_cell].long()]
    own, after = start[target_cell], start[target_cell + 1]
    upper = start[target_cell + 1 + joined[target_cell + 1].long()]
    # a crowded target skips its own cell: below and above are two runs
    twice = crowded.nonzero()[:, 0]
    which = torch.cat([torch.arange(low.numel(), device=low.device), twice])
    high = torch.cat([torch.where(crowded, own, upper), upper[twice]])
    low = torch.cat([low, after[twice]])
    return Windows(which, low, high - low, after[which])


def add_exact_pairs(
    outs: list[tuple[str, Tensor]],
    scores: Tensor,
    weights: Tensor,
    at: Tensor,
    tau: Tensor,
    rows: list[Rows],
    cells: Cells,
) -> None:
    """Add to every output what the cell products leave out; sources above count as steps there."""
    at = at.expand_as(weights)
    source = pick(scores, [(r.listed, r.sources) for r in rows], cells, cells.gives, weights)
    target = pick(scores, [(r.listed, r.targets) for r in rows], cells, cells.wants, at)
    order = source.cell.argsort(stable=True)
    source = Picked(*(column.index_select(-1, order) for column in source))
    x, w = scores[source.lists, source.rows].double(), source.values
    y, unit = scores[target.lists, target.rows].double(), 1.0 / tau[target.lists]
    window = windows(source.cell, target.cell, cells)
    sums = w.new_zeros(len(outs), w.shape[0], y.numel())
    for first, last in pairwise(_cuts(window.size)):
        part = Windows(*(column[first:last] for column in window))
        i = torch.repeat_interleave(part.which, part.size)
        base = part.low - (part.size.cumsum(0) - part.size)
        j = torch.repeat_interleave(base, part.size) + torch.arange(i.numel(), device=i.device)
        z = x.index_select(0, j).sub_(y.index_select(0, i)).mul_(unit.index_select(0, i))
        sigmoid = z.sigmoid_()
        pairs = [
            torch.addcmul(sigmoid, sigmoid, sigmoid, value=-1.0)
            if kind == "slope"
            else sigmoid - (j >= torch.repeat_interleave(part.above, part.size)).double()
            for kind, _ in outs
        ]
        for group, weight in enumerate(w):
            here = weight.index_select(0, j)
            for out, pair in zip(sums, pairs, strict=True):
                out[group].index_add_(0, i, here * pair)
    for group in range(w.shape[0]):
        flat = (target.lists * w.shape[0] + group) * scores.shape[1] + target.rows
        for out, (_, full) in zip(sums, outs, strict=True):
            full.view(-1).index_add_(0, flat, (out[group] * target.values[group]).to(full.dtype))


def _cuts(count: Tensor) -> list[int]:
    """Bounds of passes over about PAIRS pairs each."""
    done = count.cumsum(0)
    total = int(done[-1]) if done.numel() else 0
    marks = torch.arange(1, 1 + total // PAIRS, device=done.device) * PAIRS
    inner = torch.unique(torch.searchsorted(done, marks)).tolist()
    return [0, *(cut for cut in inner if cut > 0), done.numel()]
