"""Which method computes the sums, and with which parameters. No tensors here.

Error law of the bins: a function analytic in |Im z| < pi, interpolated at p Chebyshev points on a
bin of width h (units of tau), errs by at most about ``C * rho**-p``, ``rho = y + sqrt(y*y + 1)``,
``y = 2*pi/h``. Solved for the width: ``h = 4*pi / (rho - 1/rho)`` with
``rho = (C / rtol)**(1/p)``. C is empirical.
Cut-off: rows further than ``K = log(rows / rtol)`` apart see only the step function.

How processes share one pool is decided here too, from numbers that all of them know. Three ways,
all exact to rtol. ``direct``: one sum of the moments of all bins between the extremes.
``occupied``: the same for occupied cells only, whose numbers are exchanged first. ``gather``: all
rows go everywhere and the methods of one process take over.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

INTERPOLATION_CONSTANT = 16.0
MIN_NODES, MAX_NODES = 3, 14
MAX_BIN_WIDTH = 4.5  # below MAX_NODES: the kernel falls by e**h across a bin
DIRECT_CELLS = 64  # shorter lists are not searched for empty cells
MAX_SPAN = 2.0**50  # in units of tau; beyond it cell numbers lose digits
MAX_CELL_NODES = 512  # largest kernel block: 3 * 512 * 1024 doubles = 12 MiB
EPS = 2.0**-52
THIN_SHARE = 0.4  # below this share of rows a set of rows is listed instead of masked

# Nanoseconds, one thread of an Intel Xeon with AVX-512 (Sapphire Rapids class), float32,
# torch 2.13. They decide between methods that are both right.
NS_DENSE_CALL, NS_DENSE_PAIR = 1.0e5, 6.0  # per call; per (row, target) pair
NS_GRID_CALL = 8.0e5  # operator overhead
NS_FUSED_CALL = 1.9e6  # the same for a mean in the bins
NS_ROW, NS_ROW_NODE = 6.0, 1.9  # per row visited, plus per node
NS_LOOKUP = 6.0  # per row visited: find cells through a table; and once more to count them
NS_MAC = 0.05  # per float64 multiply-add of the cell products
NS_KERNEL = 4.0  # per entry of a kernel block
NS_EXACT_PAIR, NS_EXACT_ROW = 30.0, 150.0  # per pair in sparse cells and two kernels; per row
NS_SCATTERED_ROW = 50.0  # per row of a list with far outliers, cells still uncounted
NS_BYTE = 1.0  # per byte that a rank sends; about what gloo does between processes of one machine
NS_MESSAGE = 1.0e5  # per collective


class Plan(NamedTuple):
    """How to run one call."""

    method: Literal["dense", "grid"]
    nodes: int  # p, Chebyshev nodes per bin
    bins: int  # B, bins per cell
    cell_width: float  # K in units of tau; cells further apart than neighbours see the step only
    bin_width: float  # h = K / B in units of tau
    error: float  # bound C * rho**-p of the interpolation, relative
    cost: float  # predicted nanoseconds


class Work(NamedTuple):
    """Sizes of one call; ``sources`` and ``targets`` are rows visited, summed over the lists."""

    lists: int
    rows: int  # M, rows per list
    sources: int
    targets: int
    kernels: int = 1  # (group, output) products over the cells
    columns: int = 1  # outputs: value, slope or both
    overhead: float = NS_GRID_CALL


def fused_work(lists: int, rows: int, grad: bool) -> Work:
    """A mean in the bins: every row gives, and takes the gradient."""
    every = lists * rows
    return Work(lists, rows, every, every * grad, 6 if grad else 2, 1 + grad, NS_FUSED_CALL)


def split_work(lists: int, rows: int, positives: int, grad: bool) -> list[Work]:
    """A mean as sums at the positives, then for the gradient sums over them."""
    every = lists * rows
    calls = [Work(lists, rows, every, positives, 2 + 2 * grad, 1 + grad)]
    return [*calls, Work(lists, rows, positives, every, 2, 1)] if grad else calls


def is_thin(count: int, total: int) -> bool:
    """Whether so few of all rows are worth a list of them."""
    return count <= THIN_SHARE * total


def reads_directly(span: float, rtol: float) -> bool:
    """Whether bins may be read off the lower end of a list without losing digits."""
    return 8.0 * EPS * span < rtol


def bin_width(nodes: int, rtol: float) -> float:
    """Largest h whose interpolation error stays below rtol."""
    rho = math.pow(INTERPOLATION_CONSTANT / rtol, 1.0 / nodes)
    return 4.0 * math.pi / (rho - 1.0 / rho)


def interpolation_error(nodes: int, width: float) -> float:
    """C * rho**-p for bins of this width."""
    y = 2.0 * math.pi / width
    return INTERPOLATION_CONSTANT / float((y + math.sqrt(y * y + 1.0)) ** nodes)


def cell_width(rows: int, rtol: float) -> float:
    """K with rows * exp(-K) <= rtol."""
    return math.log(max(rows, 2) / rtol)


def dense_cost(pairs: int) -> float:
    """Exact pairs."""
    return NS_DENSE_CALL + NS_DENSE_PAIR * pairs


def surely_dense(lists: int, rows: int) -> bool:
    """Whether even all pairs cost less than the overhead of the grid."""
    return dense_cost(lists * rows * rows) <= NS_GRID_CALL


def grid_plan(
    work: Work, span: float, rtol: float, *, cells: int | None = None, looked_up: bool = False
) -> Plan:
    """Cheapest (p, B) of the grid.

    span: widest list in units of tau. cells: cells that carry moments, over all lists (None: span
    / K each).
    looked_up: cells are numbered through a table because only some are occupied.
    """
    width = cell_width(work.rows, rtol)
    per_list = int(span / width) + 1
    count = work.lists * per_list if cells is None else cells
    single = per_list == 1
    visited = work.sources + work.targets
    best: Plan | None = None
    for nodes in range(MIN_NODES, MAX_NODES + 1):
        h = bin_width(nodes, rtol)
        bins = max(1, math.ceil(width / h))
        h = width / bins
        if single:
            bins = min(bins, int(span / h) + 1)
        size = bins * nodes
        if (h > MAX_BIN_WIDTH or size > MAX_CELL_NODES) and nodes < MAX_NODES:
            continue
        blocks = (1 if single else 3) * size * size
        cost = work.overhead + visited * (NS_ROW + NS_ROW_NODE * nodes + NS_LOOKUP * 2 * looked_up)
        cost += blocks * (NS_MAC * count * work.kernels + NS_KERNEL * work.columns)
        if best is None or cost < best.cost:
            error = interpolation_error(nodes, h)
            best = Plan("grid", nodes, bins, bins * h if single else width, h, error, cost)
    assert best is not None
    return best


def crowd(work: Work) -> int:
    """Rows above which a cell is worth a cell product instead of exact pairs."""
    share = max(min(work.sources, work.targets), 1) / (work.lists * work.rows)
    product = NS_MAC * 3.0 * 100.0**2 * work.kernels  # about 100 nodes per cell when cells are many
    return min(64, max(4, int(math.sqrt(product / (3.0 * share * NS_EXACT_PAIR)))))


def exact_cost(pairs: int, rows: int, work: Work) -> float:
    """Extra nanoseconds when the sparse cells interact by exact pairs."""
    search = NS_LOOKUP * (work.sources + work.targets)
    return NS_GRID_CALL + NS_EXACT_PAIR * pairs * work.kernels / 2 + NS_EXACT_ROW * rows + search


def plan(
    calls: Sequence[Work], span: float, rtol: float, *, pairs: int, method: str = "auto"
) -> Plan:
    """Cheaper method for one or more calls over the same rows.

    Args:
        calls: the sums wanted.
        span: widest list in units of tau.
        rtol: accuracy asked for.
        pairs: what the dense method would visit.
        method: "auto", or "dense" or "grid" to have that one.

    Returns:
        The dense plan, or the grid's for the first call with the cost of all of them.
    """
    dense = Plan("dense", 0, 0, math.inf, 0.0, 0.0, dense_cost(pairs))
    if method == "dense" or (method == "auto" and not span <= MAX_SPAN):
        return dense
    if method == "auto" and dense.cost <= sum(work.overhead for work in calls):
        return dense
    plans = [_estimate(work, span, rtol) for work in calls]
    grid = plans[0]._replace(cost=sum(p.cost for p in plans))
    return dense if method == "auto" and dense.cost <= grid.cost else grid


def _estimate(work: Work, span: float, rtol: float) -> Plan:
    """The grid before its cells are counted: at worst all are occupied, or many rows are alone."""
    every = grid_plan(work, span, rtol)
    if span / cell_width(work.rows, rtol) <= DIRECT_CELLS:
        return every
    few = grid_plan(work, span, rtol, cells=work.lists * DIRECT_CELLS, looked_up=True)
    mixed = few.cost + NS_SCATTERED_ROW * work.lists * work.rows
    return every if every.cost <= mixed else few._replace(cost=mixed)


# --- shards ---------------------------------------------------------------------------------------

AGREED = 6  # numbers per list that processes agree on first, beside two counts: `census.look`
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


def sums_pool(
    ranks: Sequence[int], lists: int, sources: int, targets: int, *, groups: int, kinds: int,
    row_bytes: tuple[int, ...],
) -> Pool:  # fmt: skip
    """One call of the sums; sources and targets of the busiest rank, rows over all lists."""
    total = sum(ranks)
    work = Work(lists, total, sources, targets, groups * kinds, kinds)
    every = min(len(ranks) * sources, lists * total)
    pairs = min(every, targets) * total
    whole = work._replace(sources=every)
    return Pool(tuple(ranks), work, whole, pairs, groups, row_bytes)


def mean_pool(
    ranks: Sequence[int], lists: int, positives: int, *, grad: bool, weighted: bool,
    row_bytes: tuple[int, ...],
) -> Pool:  # fmt: skip
    """One call of a mean; positives of the busiest rank, over all lists."""
    total, most = sum(ranks), max(ranks)
    whole = fused_work(lists, total, grad)
    work = whole._replace(sources=lists * most, targets=lists * most * grad)
    pairs = min(len(ranks) * positives, lists * total) * total
    return Pool(tuple(ranks), work, whole, pairs, 2 + weighted, row_bytes)


def payload(pool: Pool, share: Share, *, most_cells: int | None = None) -> Wire:
    """What one call sends; its agreement on ranges and sizes included.

    most_cells: occupied cells of the rank that has most, if the ranks exchange them; 0 if they only
    counted them, None if not even that.
    """
    world, lists = len(pool.ranks), pool.work.lists
    agreed = SIZE * ((AGREED + 2) * lists + world)
    wire = Wire(agreed, 0, 1)
    if most_cells is not None:  # their number, then the cells
        wire = Wire(agreed, SIZE * (1 + most_cells), 2 + (most_cells > 0))
    if share.how == "gather":
        gathered = wire.gathered + max(pool.ranks) * lists * sum(pool.row_bytes)
        return Wire(wire.reduced, gathered, wire.messages + len(pool.row_bytes))
    moments = SIZE * pool.groups * share.cells * share.plan.bins * share.plan.nodes
    return Wire(wire.reduced + moments, wire.gathered, wire.messages + 1)


def share(
    pool: Pool, spans: Sequence[float], rtol: float, *, method: str = "auto",
    occupied: int | None = None, most_cells: int = 0,
) -> Share:  # fmt: skip
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
    if reads_directly(span, rtol):
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
