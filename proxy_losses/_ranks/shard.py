"""Sums over a pool that stays sharded over processes: each rank holds, and gets, its own rows.

Moments are additive, so ranks that number their bins alike need to sum nothing else. One reduction
of ranges and sizes makes them agree on the numbering, one adds the moments; then every rank reads
off its own targets. No exact pairs between ranks: where they would be needed the rows are gathered.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .._effects import LIBRARY, register
from .._numerics import clean
from ..distributed import gather_counts, gather_known, rank_and_size, reduce_now
from . import average, bin_ap, op
from .bins import Table, moments_of, products
from .cells import Rows, occupied_cells, only_occupied
from .grid import evaluate, extremes_of, rows_to_visit
from .layout import Layout, Ranges, cell_axis, direct_layout
from .method import broken_lists
from .plan import Work, cell_width
from .shard_plan import RANGE_ENTRIES, Pool, precision_pool, share, spans_of, sums_pool


class Agreed(NamedTuple):
    """What all ranks know after one reduction."""

    ranges: Ranges
    flags: Tensor  # [F, L] bool, raised on any rank
    most: list[int]  # largest of each size
    rows: tuple[int, ...]  # rows per list of each rank


def agree(
    scores: Tensor, tau: Tensor, flags: Sequence[Tensor], sizes: Sequence[int], group: str
) -> Agreed:
    """Range of the lists over all ranks, with flags [L] and sizes that ride along."""
    lists, count = scores.shape
    if count:
        low, high, middle = extremes_of(scores)
    else:
        low = middle = scores.new_full((lists,), torch.inf, dtype=torch.float64)
        high = -low
    rank, world = rank_and_size(group)
    rows = [0.0] * world
    rows[rank] = -float(count)
    numbers = torch.tensor([*(-float(s) for s in sizes), *rows]).to(low)
    columns = [low, -high, middle, tau, -tau, *(-f.double() for f in flags)]
    least = reduce_now(torch.cat([*columns, numbers]), "min", group)
    table = least[: len(columns) * lists].view(len(columns), lists)
    first, last, typical, unit, negative = table[:RANGE_ENTRIES].tolist()
    tail = least[len(columns) * lists :].tolist()
    if any(a != -b for a, b in zip(unit, negative, strict=True)):
        raise ValueError("tau differs between the processes of the group")
    ranges = Ranges(first, [-x for x in last], typical, unit)
    most, rows = tail[: len(sizes)], tail[len(sizes) :]
    counts = [tuple(int(-x) for x in part) for part in (most, rows)]
    return Agreed(ranges, table[RANGE_ENTRIES:] < 0, list(counts[0]), counts[1])


def lay_out(
    scores: Tensor,
    rows: list[Rows],
    agreed: Agreed,
    pool: Pool,
    rtol: float,
    method: str,
    group: str,
) -> Layout | None:
    """Bins alike on all ranks, or None where gathering the rows is the better way."""
    ranges, device = agreed.ranges, scores.device
    spans = spans_of(ranges.low, ranges.high, ranges.tau)
    chosen = share(pool, spans, rtol, method=method)
    if chosen.how == "count":
        axis = cell_axis(ranges, cell_width(pool.work.rows, rtol), device)
        table = 2 * pool.work.lists * max(pool.ranks) + (1 << 16)
        ids = occupied_cells(scores, rows, axis, table)
        counts = gather_counts(ids.numel(), device, group)
        most = max(counts)
        chosen = share(pool, spans, rtol, method=method, occupied=most, most_cells=most)
        if chosen.how == "occupied":  # if the ranks hold the same cells
            ids = gather_known(ids, counts, group).unique()
            found = ids.numel()
            chosen = share(pool, spans, rtol, method=method, occupied=found, most_cells=most)
            if chosen.how == "occupied":
                return only_occupied(axis, ids, table, pool.work, chosen.plan)
    return direct_layout(ranges, chosen.plan, device) if chosen.how == "direct" else None


def gathered(x: Tensor, agreed: Agreed, group: str) -> Tensor:
    """[..., all rows] of [..., own rows]."""
    return gather_known(x.movedim(-1, 0), agreed.rows, group).movedim(0, -1).contiguous()


def own(agreed: Agreed, group: str) -> slice:
    """This rank's rows among all."""
    rank = rank_and_size(group)[0]
    start = sum(agreed.rows[:rank])
    return slice(start, start + agreed.rows[rank])


def _finite(scores: Tensor) -> tuple[Tensor, Tensor]:
    """Scores with 0 in lists that hold a non-finite one, and which lists [L] those are."""
    broken = broken_lists(scores)
    if broken is None:
        return scores, torch.zeros(scores.shape[0], dtype=torch.bool, device=scores.device)
    return torch.where(broken[:, None], 0.0, scores), broken


def pair_sums(
    scores: Tensor,
    weights: Tensor,
    at: Tensor,
    tau: Tensor,
    value: bool,
    slope: bool,
    rtol: float,
    method: str,
    group: str,
) -> Tensor:
    """`op.pair_sums` with the sources of all ranks, at the targets of this one; stacked."""
    lists, groups, count = weights.shape
    kinds = [kind for kind, asked in (("value", value), ("slope", slope)) if asked]
    sums = scores.new_zeros(len(kinds), *weights.shape)
    if not lists * groups * len(kinds):
        return sums
    scores, broken = _finite(scores.contiguous())
    rows: list[Rows] = []
    work = Work(lists, 0, 0, 0)
    if count:
        rows, work = rows_to_visit(weights, at, len(kinds))
    agreed = agree(scores, tau, [broken], [work.sources, work.targets], group)
    if all(agreed.most):
        pool = sums_pool(
            agreed.rows, lists, *agreed.most, groups=groups, kinds=len(kinds),
            row_bytes=(scores.element_size(), groups * weights.element_size()),
        )  # fmt: skip
        layout = lay_out(scores, rows, agreed, pool, rtol, method, group)
        if layout is None:
            scores, weights = (gathered(x, agreed, group) for x in (scores, weights))
            here = own(agreed, group)
            targets_here = at.new_zeros(*at.shape[:2], sum(agreed.rows))
            targets_here[..., here] = at
            args = scores, weights, targets_here, tau, value, slope, rtol, method
            sums = torch.stack([s[..., here] for s in op.pair_sums(*args)])
        else:
            moments = moments_of(layout, scores, weights, rows)
            flat = reduce_now(torch.cat([part.flatten() for part in moments]), "sum", group)
            parts = flat.split([part.numel() for part in moments])
            moments = Table(*(p.view_as(m) for p, m in zip(parts, moments, strict=True)))
            outs = list(zip(kinds, sums, strict=True))
            evaluate(outs, layout, products(layout, moments, kinds), scores, at, rows, rtol)
    return sums.masked_fill_(agreed.flags[0, :, None, None] & at, torch.nan)


def mean_precision(
    scores: Tensor,
    pos: Tensor,
    valid: Tensor | None,
    weight: Tensor | None,
    tau: Tensor,
    grad: bool,
    rtol: float,
    method: str,
    group: str,
) -> Tensor:
    """`average.mean_precision` over the rows of all ranks, its gradient at those of this one.

    One flat tensor: mean [L], counts [L] as 0 or 1 and, if asked for, the gradient [L, M].
    """
    lists = scores.shape[0]
    mean, g = scores.new_zeros(lists), None
    if not lists:
        return mean
    scores, broken = _finite(clean(scores.contiguous(), valid))
    heavy = pos if weight is None else pos & (weight > 0)
    negative = ~pos if valid is None else valid & ~pos
    flags = [broken, heavy.any(1), negative.any(1)]
    agreed = agree(scores, tau, flags, [int(heavy.sum())], group)
    broken, counts = agreed.flags[0], agreed.flags[1] & agreed.flags[2]
    if agreed.most[0]:
        every = [x for x in (scores, pos, valid, weight) if x is not None]
        pool = precision_pool(
            agreed.rows, lists, agreed.most[0], grad=grad, weighted=weight is not None,
            row_bytes=tuple(x.element_size() for x in every),
        )  # fmt: skip
        rows = [Rows(None, (0,), (0,))]
        layout = lay_out(scores, rows, agreed, pool, rtol, method, group)
        if layout is None:
            scores, pos = gathered(scores, agreed, group), gathered(pos, agreed, group)
            valid = None if valid is None else gathered(valid, agreed, group)
            weight = None if weight is None else gathered(weight, agreed, group)
            mean, _, g = average.mean_precision(scores, pos, valid, weight, tau, grad, rtol, method)
            g = g[:, own(agreed, group)].contiguous() if grad else None
        else:
            mean, g = bin_ap.in_layout(
                layout, scores, pos, valid, weight, tau, rtol=rtol, grad=grad,
                total=lambda moments: reduce_now(moments, "sum", group),
            )  # fmt: skip
    # NaN for lists with a non-finite score, on every rank, and 0 for lists that do not count.
    mean = mean.to(scores.dtype).masked_fill(broken, torch.nan).masked_fill(~counts, 0.0)
    if not grad:
        return torch.cat([mean, counts.to(mean)])
    if g is None:
        g = torch.zeros_like(scores)
    g = g.masked_fill_(broken[:, None], torch.nan).masked_fill_(~counts[:, None], 0.0)
    return torch.cat([mean, counts.to(mean), g.flatten()])


LIBRARY.define(
    "sharded_pair_sums(Tensor scores, Tensor weights, Tensor at, Tensor tau, bool value,"
    " bool slope, float rtol, str method, str group) -> Tensor"
)
LIBRARY.define(
    "sharded_mean_precision(Tensor scores, Tensor pos, Tensor? valid, Tensor? weight, Tensor tau,"
    " bool grad, float rtol, str method, str group) -> Tensor"
)
register(
    "sharded_pair_sums", pair_sums,
    lambda scores, weights, at, tau, value, slope, *how: scores.new_empty(
        value + slope, *weights.shape
    ),
)  # fmt: skip
register(
    "sharded_mean_precision", mean_precision,
    lambda scores, pos, valid, weight, tau, grad, *how: scores.new_empty(
        2 * scores.shape[0] + grad * scores.numel()
    ),
)  # fmt: skip
