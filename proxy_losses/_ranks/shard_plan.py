"""How processes share one pool: what they send, and which way is cheaper. No tensors here.

Three ways, all exact to rtol. ``direct``: one sum of the moments of all bins between the extremes.
``occupied``: the same for occupied cells only, whose numbers are exchanged first. ``gather``: all
rows go everywhere and the local methods take over. Every rank decides from the same numbers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

from .plan import MAX_SPAN, Plan, Work, cell_width, fused_work, grid_plan, plan

NS_BYTE = 1.0  # per byte that a rank sends; about what gloo does between processes of one machine
NS_MESSAGE = 1.0e5  # per collective
EPS = 2.0**-52
RANGE_ENTRIES = 5  # of a list: low, high, typical score, and tau twice
SIZE = 8  # bytes of a float64, and of a cell number


class Wire(NamedTuple):
    """Bytes that one rank hands to the collectives of one call, and how many those are."""

    reduced: int  # buffers of all_reduce
    gathered: int  # own part in all_gather, padded to the largest
    messages: int

    def sent(self, world: int) -> float:
        """Bytes that leave each rank when both go round a ring."""
        return 2.0 * (world - 1) / world * self.reduced + (world - 1) * self.gathered


class Share(NamedTuple):
    """How to run one call over the shards."""

    how: Literal["direct", "occupied", "gather", "count"]  # count: count the occupied cells first
    plan: Plan
    cells: int  # with moments, over all lists
    cost: float  # nanoseconds, exchange included


class Pool(NamedTuple):
    """What every rank knows of a call."""

    ranks: tuple[int, ...]  # rows per list of each rank
    work: Work  # of the busiest rank, when each visits its own rows
    whole: Work  # the same after gathering
    pairs: int  # that the dense method would visit after gathering
    groups: int  # of moments
    row_bytes: tuple[int, ...]  # per row and list, of each tensor that would be gathered
    list_entries: int  # numbers per list in the agreement on the range
    entries: int  # numbers besides


def sums_pool(
    ranks: Sequence[int],
    lists: int,
    sources: int,
    targets: int,
    *,
    groups: int,
    kinds: int,
    row_bytes: tuple[int, ...],
) -> Pool:
    """One call of the sums; sources and targets of the busiest rank, rows over all lists."""
    total = sum(ranks)
    work = Work(lists, total, sources, targets, groups * kinds, kinds)
    every = min(len(ranks) * sources, lists * total)
    pairs = min(every, targets) * total
    whole = work._replace(sources=every)
    return Pool(tuple(ranks), work, whole, pairs, groups, row_bytes, RANGE_ENTRIES + 1, 2)


def precision_pool(
    ranks: Sequence[int],
    lists: int,
    positives: int,
    *,
    grad: bool,
    weighted: bool,
    row_bytes: tuple[int, ...],
) -> Pool:
    """One call of mean precision; positives of the busiest rank, over all lists."""
    total, most = sum(ranks), max(ranks)
    whole = fused_work(lists, total, grad)
    work = whole._replace(sources=lists * most, targets=lists * most * grad)
    pairs = min(len(ranks) * positives, lists * total) * total
    return Pool(tuple(ranks), work, whole, pairs, 2 + weighted, row_bytes, RANGE_ENTRIES + 3, 1)


def payload(pool: Pool, share: Share, *, most_cells: int | None = None) -> Wire:
    """What one call sends; its agreement on ranges and sizes included.

    most_cells: occupied cells of the rank that has most, if the ranks exchange them; 0 if they only
    counted them, None if not even that.
    """
    world, lists = len(pool.ranks), pool.work.lists
    agreed = SIZE * (pool.list_entries * lists + pool.entries + world)
    wire = Wire(agreed, 0, 1)
    if most_cells is not None:  # their number, then the cells
        wire = Wire(agreed, SIZE * (1 + most_cells), 2 + (most_cells > 0))
    if share.how == "gather":
        gathered = wire.gathered + max(pool.ranks) * lists * sum(pool.row_bytes)
        return Wire(wire.reduced, gathered, wire.messages + len(pool.row_bytes))
    moments = SIZE * pool.groups * share.cells * share.plan.bins * share.plan.nodes
    return Wire(wire.reduced + moments, wire.gathered, wire.messages + 1)


def share(
    pool: Pool,
    spans: Sequence[float],
    rtol: float,
    *,
    method: str = "auto",
    occupied: int | None = None,
    most_cells: int = 0,
) -> Share:
    """The cheapest way for one call.

    Args:
        pool: sizes.
        spans: range of each list in units of tau.
        rtol: accuracy asked for.
        method: "auto", or "dense" or "grid" to have that one.
        occupied: cells with rows, over all lists; None if they are not counted.
        most_cells: see `payload`; 0 if they are not counted.

    Returns:
        A `Share`; "count" asks to call again with the occupied cells counted.
    """
    span, work = max(spans), pool.work
    far = not span <= MAX_SPAN
    if far and method == "grid":
        raise OverflowError("score range / tau is too large for the grid; use the dense method")
    local = plan([pool.whole], span, rtol, pairs=pool.pairs, method=method)
    gather = _priced(pool, Share("gather", local, 0, local.cost))
    if far or method == "dense":
        return gather
    width = cell_width(work.rows, rtol)
    raw = sum(int(s / width) + 1 for s in spans)
    best = [gather] if method == "auto" else []
    if 8.0 * EPS * span < rtol:  # bins read off the lower end lose no digits
        chosen = grid_plan(work, span, rtol, cells=raw)
        best.append(_priced(pool, Share("direct", chosen, raw, chosen.cost)))
    counted = occupied is not None
    cells = work.lists if occupied is None else occupied
    chosen = grid_plan(work, span, rtol, cells=cells, looked_up=True)
    found = Share("occupied" if counted else "count", chosen, cells, chosen.cost)
    # Uncounted it is a lower bound: worth a try only where it may save much.
    found = _priced(pool, found, most_cells or 1)
    best.append(found if counted else found._replace(cost=1.5 * found.cost))
    return min(best, key=lambda one: one.cost)


def _priced(pool: Pool, share: Share, most_cells: int | None = None) -> Share:
    wire = payload(pool, share, most_cells=most_cells)
    cost = share.cost + NS_MESSAGE * wire.messages + NS_BYTE * wire.sent(len(pool.ranks))
    return share._replace(cost=cost)


def spans_of(low: Sequence[float], high: Sequence[float], tau: Sequence[float]) -> list[float]:
    """Range of each list in units of tau; infinite where it overflows."""
    each = zip(low, high, tau, strict=True)
    return [(b - a) / t if math.isfinite(b - a) else math.inf for a, b, t in each]
