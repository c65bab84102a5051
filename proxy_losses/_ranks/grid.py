"""Near-linear sums: which numbering of cells serves a call, and exact pairs where they are sparse.

The work in crowded cells is that of `bins`. Rows in sparse cells interact by exact pairs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from . import bins, plan
from .cells import (
    Cells,
    Layout,
    Rows,
    Sizes,
    blocks,
    cell_axis,
    direct_layout,
    number,
    row_addresses,
    survey,
    turned,
)
from .census import Census
from .dense import kernels, rows_of, shares
from .lists import Lists, Pairs
from .phi import Phi
from .plan import Work

PAIRS = 1 << 14  # exact pairs per pass
Visits: TypeAlias = tuple[list[Rows], list[Rows]]  # rows that give, rows that take


def pair_sums(
    pairs: Pairs, kinds: Sequence[str], census: Census, counts: Sequence[int], rtol: float
) -> list[Tensor]:
    """The sums of `dense.pair_sums`, each [L, G, M] in the dtype of scores.

    counts: sources of each group, then targets of each row of ``at``, over all lists.

    Error: at most about ``rtol * (max|w| / 2 + sum_j |w_j| kernel_ij)``, three times that for
    slopes.
    """
    visits, work = visited(pairs, counts, len(kinds))
    if not work.sources or not work.targets:
        return [pairs.scores.new_zeros(pairs.weights.shape) for _ in kinds]
    layout, sparse = lay_out(pairs.scores, census, lambda: visits, [work], rtol)
    outs = bins.pair_sums(layout, pairs, kinds, visits, rtol)
    if sparse is not None:
        _add_exact_pairs(outs, pairs, kinds, visits, *sparse)
    return outs


def visited(pairs: Pairs, counts: Sequence[int], kinds: int) -> tuple[Visits, Work]:
    """Rows that give, rows that take: all of them for dense groups, a list for sparse ones."""
    _, weights, at, _ = pairs
    lists, groups, rows = weights.shape
    sources = _split([weights[:, g] for g in range(groups)], counts[:groups], groups)
    targets = _split([at[:, g] for g in range(at.shape[1])], counts[groups:], groups)
    giving, taking = (
        max((lists * rows if p.listed is None else p.listed.numel() for p in side), default=0)
        for side in (sources, targets)
    )
    return (sources, targets), Work(lists, rows, giving, taking, groups * kinds, kinds)


def _split(masks: list[Tensor], counts: Sequence[int], groups: int) -> list[Rows]:
    """Rows for the groups, group g having the mask g modulo their number."""
    found: list[Rows] = []
    every: list[int] = []
    for k, (mask, count) in enumerate(zip(masks, counts, strict=True)):
        mine = tuple(range(k, groups, len(masks)))
        if not plan.is_thin(count, mask.numel()):
            every += mine
        elif count:
            lists, rows = rows_of(mask if mask.dtype == torch.bool else mask != 0, count)
            found.append(Rows(rows.add(lists, alpha=mask.shape[1]), mine))
    return [Rows(None, tuple(sorted(every))), *found] if every else found


def rank_mean(
    pool: Lists, tau: Tensor, phi: Phi, census: Census, rtol: float, *, grad: bool
) -> tuple[Tensor, Tensor | None]:
    """The mean of `dense.rank_mean` and its gradient; the first counts are those of positives."""
    scores, pos, valid, weight, *_ = pool
    lists, rows = scores.shape
    positives = sum(census.counts[0])
    everyone = [Rows(None, (0, 1))]

    def visits() -> Visits:
        return everyone, _split([pos], [positives], 2)

    works = [plan.fused_work(lists, rows, grad), *plan.split_work(lists, rows, positives, grad)]
    layout, sparse = lay_out(scores, census, visits, works, rtol)
    if sparse is None:
        return bins.rank_mean(layout, pool, tau, phi, rtol, grad=grad)
    # The same by sums at the positives, then over them: bins do not know exact pairs.
    valid = torch.ones_like(pos) if valid is None else valid.expand(pos.shape)
    pairs = Pairs(scores, torch.stack([valid, pos], 1), pos[:, None], tau)
    kinds, ways = ("value", "slope")[: 1 + grad], visits()
    sums = bins.pair_sums(layout, pairs, kinds, ways, rtol)
    _add_exact_pairs(sums, pairs, kinds, ways, *sparse)
    found = rows_of(pos, positives)
    value, *slope = (s[found[0], :, found[1]].T.double() for s in sums)
    del sums  # [L, 2, M] each: free before the next two come
    ranks = value + 0.5  # the row's own sigmoid(0) is in the sum
    share = shares(found[0], None if weight is None else weight[found], lists)
    phis, b, a = phi.at(ranks[0], ranks[1])
    mean = share.new_zeros(lists).index_add_(0, found[0], share * phis)
    if not grad:
        return mean, None
    c = torch.stack([b * share, a * share])
    pulls = scores.new_zeros(pairs.weights.shape)
    pulls[found[0], :, found[1]] = c.to(scores.dtype).T
    back, ways = Pairs(scores, pulls, pairs.weights, tau), (ways[1], everyone)
    (pull,) = bins.pair_sums(layout, back, ["slope"], ways, rtol)
    _add_exact_pairs([pull], back, ["slope"], ways, *turned(*sparse))
    g = pull.sum(1)
    g[found] -= (c * slope[0]).sum(0).to(scores.dtype)
    return mean, g.div_(tau.to(scores.dtype)[:, None])


def lay_out(
    scores: Tensor, census: Census, rows: Callable[[], Visits], works: Sequence[Work], rtol: float,
) -> tuple[Layout, tuple[Cells, Sizes] | None]:  # fmt: skip
    """Number the bins; the cells too, where some of them interact by exact pairs.

    rows: those that give and take, asked for where the axis is long. works: the call, and the calls
    that it takes instead when some cells are sparse, if they are others.
    """
    work, *split = works
    split = split or [work]
    width, spans = plan.cell_width(work.rows, rtol), census.spans
    span = max(spans)
    if not math.isfinite(span):
        raise OverflowError("score range / tau is too large for the grid; use the dense method")
    raw = sum(int(s / width) + 1 for s in spans)
    direct = plan.grid_plan(work, span, rtol, cells=raw)
    precise = plan.reads_directly(span, rtol)
    least = plan.grid_plan(work, span, rtol, cells=work.lists, looked_up=True)
    if precise and direct.cost <= 1.5 * least.cost:
        return direct_layout(census, direct, scores.device), None
    axis = cell_axis(census, width, scores.device)
    cells, sizes = survey(scores, *rows(), axis, plan.crowd(split[0]))
    full = plan.grid_plan(work, span, rtol, cells=sizes.occupied, looked_up=True)
    parts = [plan.grid_plan(w, span, rtol, cells=sizes.crowded, looked_up=True) for w in split]
    used = sizes.gives + sizes.wants
    exact = sum(plan.exact_cost(sizes.pairs, used, w) for w in split)
    if sum(part.cost for part in parts) + exact < full.cost:
        return number(cells, sizes, work, parts[0]), (cells, sizes)
    if precise and sizes.occupied > 0.7 * raw:
        return direct_layout(census, direct, scores.device), None
    cells = cells._replace(crowded=cells.occupied)
    sizes = sizes._replace(crowded=sizes.occupied)
    return number(cells, sizes, work, full), None


# --- exact pairs ----------------------------------------------------------------------------------


class Picked(NamedTuple):
    """Rows of sparse cells."""

    lists: Tensor  # [n] int64
    rows: Tensor  # [n] int64
    cell: Tensor  # [n] address of the cell
    values: Tensor  # [G, n] float64: weights, or 1 where the row is a target


def _pick(scores: Tensor, side: list[Rows], cells: Cells, wanted: Tensor, values: Tensor) -> Picked:
    """Rows in the cells marked in ``wanted``."""
    shape = scores.shape
    found: list[Picked] = []
    for part in side:
        near: list[tuple[Tensor, Tensor]] = []
        start = 0
        for block in blocks(shape, scores.device, part.listed):
            where = row_addresses(cells.axis, cells.ids, scores, block)
            keep = wanted.index_select(0, where).nonzero()[:, 0]
            near.append((keep + start, where.index_select(0, keep)))
            start += where.numel()
        flat, cell = (torch.cat(column) for column in zip(*near, strict=True))
        flat = flat if part.listed is None else part.listed[flat]
        lists = flat.div(shape[1], rounding_mode="floor")
        rows = flat - lists * shape[1]
        table = scores.new_zeros(values.shape[1], rows.numel(), dtype=torch.float64)
        for group in part.groups:
            table[group] = values[lists, group, rows]
        found.append(Picked(lists, rows, cell, table))
    return Picked(*(torch.cat(column, dim=-1) for column in zip(*found, strict=True)))


class Windows(NamedTuple):
    """For every target a run of sources, sorted by cell."""

    which: Tensor  # [m] target
    low: Tensor  # [m] first source
    size: Tensor  # [m] sources
    above: Tensor  # [m] first source of a higher cell


def _windows(source_cell: Tensor, target_cell: Tensor, cells: Cells, twice: int) -> Windows:
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
    again = torch.nonzero_static(crowded, size=twice)[:, 0]
    which = torch.cat([torch.arange(low.numel(), device=low.device), again])
    high = torch.cat([torch.where(crowded, own, upper), upper[again]])
    low = torch.cat([low, after[again]])
    return Windows(which, low, high - low, after[which])


def _add_exact_pairs(
    outs: list[Tensor], pairs: Pairs, kinds: Sequence[str], visits: Visits, cells: Cells,
    sizes: Sizes,
) -> None:  # fmt: skip
    """Add to every output what the cell products leave out; sources above count as steps there."""
    scores, weights, at, tau = pairs
    source = _pick(scores, visits[0], cells, cells.gives, weights)
    target = _pick(scores, visits[1], cells, cells.wants, at.expand_as(weights))
    order = source.cell.argsort(stable=True)
    source = Picked(*(column.index_select(-1, order) for column in source))
    x, w = scores[source.lists, source.rows].double(), source.values
    y, unit = scores[target.lists, target.rows].double(), 1.0 / tau[target.lists]
    window = _windows(source.cell, target.cell, cells, sizes.wants_crowded)
    sums = w.new_zeros(len(outs), w.shape[0], y.numel())
    step = max(1, window.which.numel() * PAIRS // max(sizes.pairs, 1))
    for first in range(0, window.which.numel(), step):
        part = Windows(*(column[first : first + step] for column in window))
        i = torch.repeat_interleave(part.which, part.size)
        base = part.low - (part.size.cumsum(0) - part.size)
        j = torch.repeat_interleave(base, part.size) + torch.arange(i.numel(), device=i.device)
        z = x.index_select(0, j).sub_(y.index_select(0, i)).mul_(unit.index_select(0, i))
        step_below = (j >= torch.repeat_interleave(part.above, part.size)).double()
        ks = kernels(z, kinds)
        for group, weight in enumerate(w):
            here = weight.index_select(0, j)
            for out, pair, kind in zip(sums, ks, kinds, strict=True):
                k = pair - step_below if kind == "value" else pair
                out[group].index_add_(0, i, here * k)
    for group in range(w.shape[0]):
        flat = (target.lists * w.shape[0] + group) * scores.shape[1] + target.rows
        for out, full in zip(sums, outs, strict=True):
            new = (out[group] * target.values[group]).to(full.dtype)
            full.view(-1).index_add_(0, flat, new)
