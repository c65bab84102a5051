"""Sums over a pool that stays sharded over processes: each rank holds, and gets, its own rows.

Moments are additive, so ranks that number their bins alike need to sum nothing else. One reduction
of ranges and sizes makes them agree on the numbering, one adds the moments; then every rank reads
off its own targets. No exact pairs between ranks: where they would be needed the rows are gathered.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .._numerics import clean
from ..distributed import gather_counts, gather_known, rank_and_size, reduce_known
from . import average, bin_ap, fused, op
from .bins import Table, moments_of, products
from .cells import Rows, occupied_cells, only_occupied
from .grid import evaluate, extremes_of, rows_to_visit
from .layout import Layout, Ranges, cell_axis, direct_layout
from .op import LIBRARY, broken_lists
from .plan import Work, cell_width, fused_work
from .shard_plan import Pool, share, spans_of

RANGE_ENTRIES = 5  # low, high, typical score, and tau twice


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
    least = reduce_known(torch.cat([*columns, numbers]), "min", group)
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
) -> list[Tensor]:
    """`op.pair_sums` with the sources of all ranks, at the targets of this one."""
    lists, groups, count = weights.shape
    kinds = [kind for kind, asked in (("value", value), ("slope", slope)) if asked]
    sums = [scores.new_zeros(weights.shape) for _ in kinds]
    if not lists * groups * len(kinds):
        return sums
    scores, broken = _finite(scores.contiguous())
    rows: list[Rows] = []
    work = Work(lists, 0, 0, 0)
    if count:
        rows, work = rows_to_visit(weights, at, len(kinds))
    agreed = agree(scores, tau, [broken], [work.sources, work.targets], group)
    total, world = sum(agreed.rows), len(agreed.rows)
    if all(agreed.most):
        sources, targets = agreed.most
        work = Work(lists, total, sources, targets, groups * len(kinds), len(kinds))
        every = min(world * sources, lists * total)
        row_bytes = (scores.element_size(), groups * weights.element_size())
        pool = Pool(agreed.rows, work, work._replace(sources=every), min(every, targets) * total,
                    groups, row_bytes, RANGE_ENTRIES + 1, 2)  # fmt: skip
        layout = lay_out(scores, rows, agreed, pool, rtol, method, group)
        if layout is None:
            scores, weights = (gathered(x, agreed, group) for x in (scores, weights))
            here = own(agreed, group)
            targets_here = at.new_zeros(*at.shape[:2], total)
            targets_here[..., here] = at
            args = scores, weights, targets_here, tau, value, slope, rtol, method
            sums = [s[..., here].contiguous() for s in op.pair_sums(*args)]
        else:
            moments = moments_of(layout, scores, weights, rows)
            flat = reduce_known(torch.cat([part.flatten() for part in moments]), "sum", group)
            parts = flat.split([part.numel() for part in moments])
            moments = Table(*(p.view_as(m) for p, m in zip(parts, moments, strict=True)))
            outs = list(zip(kinds, sums, strict=True))
            evaluate(outs, layout, products(layout, moments, kinds), scores, at, rows, rtol)
    return [s.masked_fill_(agreed.flags[0, :, None, None] & at, torch.nan) for s in sums]


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
) -> tuple[Tensor, Tensor, Tensor]:
    """`average.mean_precision` over the rows of all ranks, its gradient at those of this one."""
    lists = scores.shape[0]
    g = scores.new_zeros(scores.shape if grad else 0)
    mean = scores.new_zeros(lists)
    if not lists:
        return mean, pos.new_zeros(0), g
    scores, broken = _finite(clean(scores.contiguous(), valid))
    heavy = pos if weight is None else pos & (weight > 0)
    negative = ~pos if valid is None else valid & ~pos
    flags = [broken, heavy.any(1), negative.any(1)]
    agreed = agree(scores, tau, flags, [int(heavy.sum())], group)
    broken, counts = agreed.flags[0], agreed.flags[1] & agreed.flags[2]
    if agreed.most[0]:
        total, most = sum(agreed.rows), max(agreed.rows)
        whole = fused_work(lists, total, grad)
        work = whole._replace(sources=lists * most, targets=lists * most * grad)
        pairs = min(len(agreed.rows) * agreed.most[0], lists * total) * total
        every = [x for x in (scores, pos, valid, weight) if x is not None]
        pool = Pool(agreed.rows, work, whole, pairs, 2 + (weight is not None),
                    tuple(x.element_size() for x in every), RANGE_ENTRIES + 3, 1)  # fmt: skip
        rows = [Rows(None, (0,), (0,))]
        layout = lay_out(scores, rows, agreed, pool, rtol, method, group)
        if layout is None:
            scores, pos = gathered(scores, agreed, group), gathered(pos, agreed, group)
            valid = None if valid is None else gathered(valid, agreed, group)
            weight = None if weight is None else gathered(weight, agreed, group)
            mean, _, g = average.mean_precision(scores, pos, valid, weight, tau, grad, rtol, method)
            g = g[:, own(agreed, group)].contiguous() if grad else g
        else:
            found = bin_ap.in_layout(
                layout, scores, pos, valid, weight, tau, rtol=rtol, grad=grad,
                total=lambda moments: reduce_known(moments, "sum", group),
            )  # fmt: skip
            mean, g = found[0].to(scores.dtype), g if found[1] is None else found[1]
    # NaN for lists with a non-finite score, on every rank, and 0 for lists that do not count.
    mean = mean.masked_fill(broken, torch.nan).masked_fill(~counts, 0.0)
    if grad:
        g = g.masked_fill_(broken[:, None], torch.nan).masked_fill_(~counts[:, None], 0.0)
    return mean, counts, g


LIBRARY.define(
    "sharded_pair_sums(Tensor scores, Tensor weights, Tensor at, Tensor tau, bool value,"
    " bool slope, float rtol, str method, str group) -> Tensor[]"
)
LIBRARY.define(
    "sharded_mean_precision(Tensor scores, Tensor pos, Tensor? valid, Tensor? weight, Tensor tau,"
    " bool grad, float rtol, str method, str group) -> (Tensor, Tensor, Tensor)"
)
for _name, _function, _like in (
    ("sharded_pair_sums", pair_sums, op.like),
    ("sharded_mean_precision", mean_precision, fused.like),
):
    for _device in ("CPU", "CUDA"):
        LIBRARY.impl(_name, _function, _device)

    def _fake(*args: Any, like: Any = _like) -> Any:
        return like(*args[:-1])

    torch.library.register_fake(f"proxy_losses::{_name}", _fake, lib=LIBRARY)
