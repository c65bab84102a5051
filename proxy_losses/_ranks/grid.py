"""Pairwise sigmoid sums in near-linear time.

Rows are replaced by Chebyshev moments of their bin (second kind, U_k), bins interact through one
banded Toeplitz matrix per pair of neighbouring cells, everything further above counts as a step,
and the sums are read off per target by Clenshaw's recurrence. Rows in sparse cells interact by
exact pairs instead.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .bins import Table, clenshaw, moments_of, products
from .cells import Cells, Rows, number, survey
from .exact import add_exact_pairs
from .layout import Layout, Ranges, blocks, cell_axis, direct_layout, members, place, put, take
from .plan import Work, cell_width, crowd, exact_cost, grid_plan

SPARSE_SHARE = 0.4  # below this share of rows a set of rows is listed instead of masked
SINGLE_RTOL = 1e-6  # slopes are read off in float32 from here on; values always in float64
EPS = 2.0**-52


def pair_sums(
    scores: Tensor,
    weights: Tensor,
    at: Tensor,
    tau: Tensor,
    *,
    rtol: float,
    value: bool = True,
    slope: bool = False,
) -> tuple[Tensor | None, Tensor | None]:
    """Weighted sums of sigmoid and of its derivative over all pairs of each list.

    ``value[l, g, i] = sum_j weights[l, g, j] * sigmoid((s_lj - s_li) / tau_l)`` where ``at``, 0
    elsewhere;
    ``slope`` is the same with ``sigmoid'``. The term j = i is included.

    scores [L, M] finite; weights [L, G, M]; at [L, 1 or G, M] bool; tau [L] float64 > 0.
    Returns two [L, G, M] tensors in the dtype of scores, None where not asked for.
    Error: at most about ``rtol * (max|w| / 2 + sum_j |w_j| kernel_ij)``, three times that for the
    slope.
    """
    kinds = [name for name, asked in (("value", value), ("slope", slope)) if asked]
    outs = [(kind, scores.new_zeros(weights.shape)) for kind in kinds]
    if scores.numel() and outs:
        _run(outs, scores.contiguous(), weights, at, tau, rtol)
    by_name = dict(outs)
    return by_name.get("value"), by_name.get("slope")


def _run(
    outs: list[tuple[str, Tensor]],
    scores: Tensor,
    weights: Tensor,
    at: Tensor,
    tau: Tensor,
    rtol: float,
) -> None:
    rows, work = rows_to_visit(weights, at, len(outs))
    if not work.sources or not work.targets:
        return
    layout, cells = lay_out(scores, ranges_of(scores, tau), lambda: rows, work, rtol)
    tables = products(layout, moments_of(layout, scores, weights, rows), [k for k, _ in outs])
    evaluate(outs, layout, tables, scores, at, rows, rtol)
    if cells is not None:
        add_exact_pairs(outs, scores, weights, at, tau, rows, cells)


def evaluate(
    outs: list[tuple[str, Tensor]],
    layout: Layout,
    tables: list[Table],
    scores: Tensor,
    at: Tensor,
    rows: list[Rows],
    rtol: float,
) -> None:
    """Fill the outputs at the targets from their coefficients in the bins."""
    if scores.dtype == torch.float32 and rtol >= SINGLE_RTOL:
        for i, (kind, _) in enumerate(outs):
            if kind == "slope":
                tables[i] = Table(*(part.float() for part in tables[i]))
    shape = (scores.shape[0], scores.shape[1])
    for part in rows:
        for block in blocks(shape, scores.device, part.listed) if part.targets else ():
            where = place(layout, scores, block)
            masks = [take(at[:, g], block).to(scores.dtype) for g in range(at.shape[1])]
            for (_, out), table in zip(outs, tables, strict=True):
                for group in part.targets:
                    sums = clenshaw(table, group, where).to(out.dtype)
                    put(out[:, group], block, sums.mul_(masks[group % at.shape[1]]))


def ranges_of(scores: Tensor, tau: Tensor) -> Ranges:
    """Range of every list and a typical score. One host sync."""
    return Ranges(*torch.stack([*extremes_of(scores), tau]).tolist())


def extremes_of(scores: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Lowest, highest and a typical score of every list, float64."""
    if scores.shape[0] == 1:  # much faster than along a dimension
        low, high = (x[None] for x in torch.aminmax(scores))
    else:
        low, high = scores.amin(1), scores.amax(1)
    middle = scores[:, :: max(1, scores.shape[1] // 32)].median(dim=1).values
    return low.double(), high.double(), middle.double()


def rows_to_visit(weights: Tensor, at: Tensor, columns: int) -> tuple[list[Rows], Work]:
    """Which rows to visit: all for the dense groups, a list of rows for the sparse ones."""
    lists, groups, count = weights.shape
    every = tuple(range(groups))
    compact = not weights.is_cuda  # listing rows costs a sync
    sources = tuple(g for g in every if compact and thin(weights[:, g]))
    shared = [compact and thin(at[:, g]) for g in range(at.shape[1])]
    targets = tuple(g for g in every if shared[g % at.shape[1]])
    dense = Rows(
        None,
        tuple(g for g in every if g not in sources),
        tuple(g for g in every if g not in targets),
    )
    rows = [dense] if dense.sources or dense.targets else []
    listed = 0
    if sources or targets:
        masks = [weights[:, g] for g in sources] + [at[:, g] for g in targets if g < at.shape[1]]
        index = rows_of(masks)
        listed = index.numel()
        if listed:
            rows.append(Rows(index, sources, targets))
    total = lists * count
    giving, taking = total if dense.sources else listed, total if dense.targets else listed
    return rows, Work(lists, count, giving, taking, groups * columns, columns)


def thin(mask: Tensor) -> bool:
    """Whether few entries of [L, M] are nonzero, from an even sample."""
    lists, rows = mask.shape
    sample = mask[:: max(1, lists // 32), :: max(1, rows // 1024)]
    return int(sample.count_nonzero()) <= SPARSE_SHARE * sample.numel()


def rows_of(masks: list[Tensor]) -> Tensor:
    """Flat numbers of the rows that are nonzero in any of the [L, M] masks."""
    lists, rows = masks[0].shape
    found = []
    for block in blocks((lists, rows), masks[0].device, None):
        parts = [take(mask, block) for mask in masks]
        parts = [part if part.dtype == torch.bool else part.bool() for part in parts]
        kept = functools.reduce(torch.logical_or, parts).nonzero()[:, 0]
        where, row = members(block, kept, rows)
        found.append(row.add_(where, alpha=rows))
    return torch.cat(found)


def lay_out(
    scores: Tensor,
    ranges: Ranges,
    rows: Callable[[], list[Rows]],
    work: Work,
    rtol: float,
    mixed: Sequence[Work] | None = None,
) -> tuple[Layout, Cells | None]:
    """Number the bins; the cells too, where some of them interact by exact pairs.

    rows: the rows to count, asked for where the axis is long. mixed: the calls it takes when some
    cells are sparse; None for the same call.
    """
    width = cell_width(work.rows, rtol)
    each = zip(ranges.low, ranges.high, ranges.tau, strict=True)
    spans = [(high - low) / tau for low, high, tau in each]
    span = max(spans)
    if not math.isfinite(span):
        raise OverflowError("score range / tau is too large for the grid; use the dense method")
    raw = sum(int(s / width) + 1 for s in spans)
    direct = grid_plan(work, span, rtol, cells=raw)
    precise = 8.0 * EPS * span < rtol  # bins read off the lower end lose no digits
    worth = direct.cost > 1.5 * grid_plan(work, span, rtol, cells=work.lists, looked_up=True).cost
    if precise and not worth:
        return direct_layout(ranges, direct, scores.device), None
    axis = cell_axis(ranges, width, scores.device)
    table = 2 * scores.numel() + (1 << 16)
    split = [work] if mixed is None else mixed
    cells, census = survey(scores, rows(), axis, table, crowd(split[0]))
    full = grid_plan(work, span, rtol, cells=census.occupied, looked_up=True)
    parts = [grid_plan(w, span, rtol, cells=census.crowded, looked_up=True) for w in split]
    exact = sum(exact_cost(census.pairs, census.rows, w) for w in split)
    if sum(part.cost for part in parts) + exact < full.cost:
        return number(cells, census, work, parts[0]), cells
    if precise and census.occupied > 0.7 * raw:
        return direct_layout(ranges, direct, scores.device), None
    cells = cells._replace(crowded=cells.occupied)
    census = census._replace(crowded=census.occupied)
    return number(cells, census, work, full), None
