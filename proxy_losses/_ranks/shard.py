"""Sums over a pool that stays sharded over processes: each rank holds, and gets, its own rows.

Moments are additive, so ranks that number their bins alike need to sum nothing else. One reduction
of ranges and sizes makes them agree on the numbering, one adds the moments; then every rank reads
off its own targets. No exact pairs between ranks: where they would be needed the rows are gathered.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .._effects import LIBRARY, register
from .._numerics import clean, outside_autocast, poison
from ..distributed import gather_counts, gather_known, rank_and_size
from . import bins, op
from .cells import Layout, Rows, cell_axis, direct_layout, occupied_cells, only_occupied, table_size
from .census import Census, look
from .grid import visited
from .lists import Lists, Pairs
from .phi import PHIS
from .plan import Pool, cell_width, mean_pool, share, sums_pool


def _lay_out(
    scores: Tensor, rows: list[Rows], census: Census, pool: Pool, rtol: float, *,
    how: tuple[str, str],
) -> Layout | None:  # fmt: skip
    """Bins alike on all ranks, or None where gathering the rows is the better way.

    how: method and group.
    """
    (method, group), device, spans = how, scores.device, census.spans
    chosen = share(pool, spans, rtol, method=method)
    if chosen.how == "count":
        axis = cell_axis(census, cell_width(pool.work.rows, rtol), device)
        table = table_size(pool.work.lists, max(pool.ranks))
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
    return direct_layout(census, chosen.plan, device) if chosen.how == "direct" else None


def _gathered(x: Tensor, census: Census, group: str) -> Tensor:
    """[..., all rows] of [..., own rows]."""
    return gather_known(x.movedim(-1, 0), census.rows, group).movedim(0, -1).contiguous()


def _own(census: Census, group: str) -> slice:
    """This rank's rows among all."""
    rank = rank_and_size(group)[0]
    start = sum(census.rows[:rank])
    return slice(start, start + census.rows[rank])


def _sound(scores: Tensor, tau: Tensor) -> tuple[Tensor, Tensor]:
    """The lists that are not broken on this rank; 0 and tau 1 in the others."""
    broken = ~(tau > 0.0) | poison(scores)[:, 0].isnan()
    return torch.where(broken[:, None], 0.0, scores), torch.where(broken, 1.0, tau)


@outside_autocast
def pair_sums(
    scores: Tensor, weights: Tensor, at: Tensor, tau: Tensor, kinds: str, rtol: float, method: str,
    group: str,
) -> Tensor:  # fmt: skip
    """`op.pair_sums` with the sources of all ranks, at the targets of this one; stacked."""
    lists, groups, _ = weights.shape
    names = kinds.split(",")
    sums = scores.new_zeros(len(names), *weights.shape)
    if not lists * groups:
        return sums
    gives = weights if weights.dtype == torch.bool else weights != 0
    census = look(scores, tau, [gives.any(1).sum(1), at.any(1).sum(1)], group)
    scores, tau = _sound(scores.contiguous(), tau)
    sources, targets = (sum(n) for n in census.counts)
    if sources and targets:
        pool = sums_pool(
            census.rows, lists, sources, targets, groups=groups, kinds=len(names),
            row_bytes=(scores.element_size(), groups * weights.element_size()),
        )  # fmt: skip
        own = torch.cat([gives.sum((0, 2)), at.sum((0, 2))]).tolist()
        pairs = Pairs(scores, weights, at, tau)
        visits, _ = visited(pairs, own, len(names))
        rows = [*visits[0], *visits[1]]
        layout = _lay_out(scores, rows, census, pool, rtol, how=(method, group))
        if layout is None:
            scores, weights = (_gathered(x, census, group) for x in (scores, weights))
            here = _own(census, group)
            at_all = at.new_zeros(*at.shape[:2], sum(census.rows))
            at_all[..., here] = at
            every = op.pair_sums(scores, weights, at_all, tau, kinds, rtol, method)
            sums = torch.stack([s[..., here] for s in every])
        else:
            sums = torch.stack(bins.pair_sums(layout, pairs, names, visits, rtol, group))
    broken = torch.tensor(census.broken, device=scores.device)
    return sums.masked_fill_(broken[:, None, None] & at, torch.nan)


@outside_autocast
def rank_mean(
    scores: Tensor, pos: Tensor, valid: Tensor | None, weight: Tensor | None, tau: Tensor,
    grad: bool, phi: str, rtol: float, method: str, group: str,
) -> Tensor:  # fmt: skip
    """`op.rank_mean` over the rows of all ranks, its gradient at those of this one.

    One flat tensor: mean [L], whether lists count [L] as 0 or 1 and, if asked for, the gradient
    [L, M].
    """
    lists = scores.shape[0]
    mean, g = scores.new_zeros(lists), None
    if not lists:
        return mean
    scores = clean(scores, valid)
    if weight is not None:
        weight = torch.where(pos, weight, 0.0)
    heavy = pos if weight is None else weight > 0
    negative = ~pos if valid is None else valid & ~pos
    census = look(scores, tau, [heavy.sum(1), negative.sum(1)], group)
    scores, tau = _sound(scores.contiguous(), tau)
    broken = torch.tensor(census.broken, device=scores.device)
    alone = not PHIS[phi].needs_negative
    defined = [a > 0 and (b > 0 or alone) for a, b in zip(*census.counts, strict=True)]
    counting = torch.tensor(defined, device=scores.device)
    if any(defined):
        every = [x for x in (scores, pos, valid, weight) if x is not None]
        pool = mean_pool(
            census.rows, lists, sum(census.counts[0]), grad=grad, weighted=weight is not None,
            row_bytes=tuple(x.element_size() for x in every),
        )  # fmt: skip
        layout = _lay_out(scores, [Rows(None, (0,))], census, pool, rtol, how=(method, group))
        if layout is None:
            scores, pos = _gathered(scores, census, group), _gathered(pos, census, group)
            valid = None if valid is None else _gathered(valid, census, group)
            weight = None if weight is None else _gathered(weight, census, group)
            args = scores, pos, valid, weight, tau, grad, phi, rtol, method
            mean, _, g = op.rank_mean(*args)
            g = g[:, _own(census, group)].contiguous() if grad else None
        else:
            here = Lists(scores, pos, valid, weight)
            mean, g = bins.rank_mean(layout, here, tau, PHIS[phi], rtol, group, grad=grad)
    # NaN for broken lists, on every rank, and 0 for lists that do not count.
    mean = mean.to(scores.dtype).masked_fill(broken, torch.nan).masked_fill(~counting, 0.0)
    if not grad:
        return torch.cat([mean, counting.to(mean)])
    if g is None:
        g = scores.new_zeros(scores.shape)
    g = g.masked_fill_(broken[:, None], torch.nan).masked_fill_(~counting[:, None], 0.0)
    return torch.cat([mean, counting.to(mean), g.flatten()])


LIBRARY.define(
    "sharded_pair_sums(Tensor scores, Tensor weights, Tensor at, Tensor tau, str kinds,"
    " float rtol, str method, str group) -> Tensor"
)
LIBRARY.define(
    "sharded_rank_mean(Tensor scores, Tensor pos, Tensor? valid, Tensor? weight, Tensor tau,"
    " bool grad, str phi, float rtol, str method, str group) -> Tensor"
)
register(
    "sharded_pair_sums", pair_sums,
    lambda scores, weights, at, tau, kinds, *how: scores.new_empty(
        len(kinds.split(",")), *weights.shape
    ),
)  # fmt: skip
register(
    "sharded_rank_mean", rank_mean,
    lambda scores, pos, valid, weight, tau, grad, *how: scores.new_empty(
        2 * scores.shape[0] + grad * scores.numel()
    ),
)  # fmt: skip
