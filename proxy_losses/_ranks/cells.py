"""Where every row of a pool sits on the score axis.

A list is cut into cells of K tau and each cell into B bins. Cells are numbered in score order over
all lists, with at least one empty number between lists, so that neighbours differ by one and lists
never touch. Where many cells would be empty, rows are counted per cell and only occupied cells are
numbered. A cell with many rows is crowded, and so are its neighbours: those interact by cell
products. The other occupied cells are sparse. Two neighbouring cells, not both crowded, are then
both thin, and their rows interact by exact pairs.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

from .census import Census
from .plan import Plan, Work

CHUNK = {"cpu": 1 << 15, "cuda": 1 << 24}  # rows per pass: temporaries stay in cache
MAX_NUMBERS = 1 << 62


class Rows(NamedTuple):
    """Rows to visit for some groups of weights."""

    listed: Tensor | None  # flat row numbers, None for all rows
    groups: tuple[int, ...]


class Block(NamedTuple):
    """Some rows of a [L, M] tensor, as one index ``tensor[lists, rows]``."""

    lists: slice | Tensor | int
    rows: slice | Tensor


class Place(NamedTuple):
    """Where the rows of a block sit."""

    twice: Tensor  # 2t, t in [-1, 1] inside the bin, float64
    bin: Tensor  # bin of the higher moments; the spare last bin for rows of sparse cells
    entry: Tensor  # bin of the zeroth moment: the bin, or the entry of the sparse cell


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


class Cells(NamedTuple):
    """Occupied cells in a table of addresses (cell numbers, or ranks in ``ids``)."""

    axis: Axis
    ids: Tensor | None
    near: Tensor  # [addresses] bool: the address below belongs to the cell just below
    occupied: Tensor  # [addresses] bool
    crowded: Tensor  # [addresses] bool
    gives: Tensor  # [addresses] bool: its sources take part in exact pairs
    wants: Tensor  # [addresses] bool: its targets need exact pairs


class Sizes(NamedTuple):
    """Sizes of ``Cells`` on the host."""

    occupied: int
    crowded: int
    pairs: int  # exact pairs, at most
    gives: int  # sources that take part in them
    wants: int  # targets
    gives_crowded: int  # those of the sources in crowded cells
    wants_crowded: int


# --- rows -----------------------------------------------------------------------------------------


def blocks(shape: Sequence[int], device: torch.device, index: Tensor | None) -> Iterator[Block]:
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
    elif isinstance(block.rows, slice):
        where = values[block.lists, block.rows]
        where.copy_(new.view(where.shape))
    else:
        values[block.lists, block.rows] = new


def per_list(values: Tensor, block: Block) -> Tensor:
    """[L, 1] values lined up with the rows of a block."""
    return values[block.lists] if isinstance(block.rows, slice) else values[block.lists, 0]


def places(layout: Layout, scores: Tensor, index: Tensor | None) -> Iterator[tuple[Block, Place]]:
    """The rows of [L, M] scores, or the flat row numbers in ``index``, block by block."""
    for block in blocks(scores.shape, scores.device, index):
        yield block, _place(layout, scores, block)


def _coordinate(axis: Axis, scores: Tensor, block: Block) -> Tensor:
    """(score - origin) * scale in float64; scaling before the subtraction would lose digits."""
    whole = isinstance(block.rows, slice)
    part = scores[block.lists, block.rows] if whole else take(scores, block)
    u = part.to(torch.float64, copy=True)
    return u.sub_(per_list(axis.origin, block)).mul_(per_list(axis.scale, block))


def _address(axis: Axis, ids: Tensor | None, floor: Tensor, block: Block) -> Tensor:
    """Table address of the cells with these coordinates (rounded down)."""
    found = floor.long().add_(per_list(axis.base, block))
    return found if ids is None else torch.searchsorted(ids, found)


def row_addresses(axis: Axis, ids: Tensor | None, scores: Tensor, block: Block) -> Tensor:
    """Addresses of the cells of a block of rows."""
    return _address(axis, ids, _coordinate(axis, scores, block).floor_(), block).view(-1)


def _place(layout: Layout, scores: Tensor, block: Block) -> Place:
    """Bins and local coordinates of the rows of a block, flattened."""
    u = _coordinate(layout.axis, scores, block)
    if layout.start is None:  # u >= 0, so truncation rounds down
        where = u.int().long()  # in two steps: faster, and bins are few
        u.frac_()
        if scores.shape[0] > 1:
            where.add_(per_list(layout.axis.base, block))
        where = where.view(-1)
        return Place(u.mul_(4.0).sub_(2.0).view(-1), where, where)
    floor = u.floor()
    bins = layout.shape.bins
    inside = u.sub_(floor).mul_(float(bins))
    # What rounds up to the end of its cell stays in it, at the end of the last bin.
    step = inside.floor().clamp_(max=float(bins - 1))
    twice = inside.sub_(step).mul_(4.0).sub_(2.0).view(-1)
    cell = _address(layout.axis, layout.ids, floor, block).view(-1)
    entry = layout.start.index_select(0, cell)
    spare = layout.crowded * bins
    if layout.sparse == 0:
        entry = entry + step.view(-1).int()
        return Place(twice, entry, entry)
    entry = entry + step.view(-1).int().mul_((entry < spare).int())
    return Place(twice, entry.clamp(max=spare), entry)


# --- numbering ------------------------------------------------------------------------------------


def cell_axis(census: Census, width: float, device: torch.device) -> Axis:
    """Axis in units of cells, measured from the middle of each list."""
    scale = [1.0 / (tau * width) for tau in census.tau]
    base, starts, size, longest = [], [], 1, 1
    for low, high, middle, unit in zip(census.low, census.high, census.middle, scale, strict=True):
        first, last = math.floor((low - middle) * unit), math.floor((high - middle) * unit)
        base.append(size - first)
        starts.append(size)
        size += last - first + 2
        longest = max(longest, last - first + 1)
    if size > MAX_NUMBERS:
        raise OverflowError("score range / tau is too large for the grid; use the dense method")
    origin, unit_column = _column(census.middle, device), _column(scale, device)
    first_column = _column(starts, device)[:, 0]
    return Axis(origin, unit_column, _column(base, device), first_column, size, longest)


def direct_layout(census: Census, chosen: Plan, device: torch.device) -> Layout:
    """Every cell between the extremes of a list exists; bins are read off the axis."""
    scale = [1.0 / (tau * chosen.bin_width) for tau in census.tau]
    counts = [
        int((high - low) * unit) // chosen.bins + 1
        for low, high, unit in zip(census.low, census.high, scale, strict=True)
    ]
    first = [0, *accumulate(counts[:-1])]
    total, seats = sum(counts), max(counts)
    base = _column([cell * chosen.bins for cell in first], device)
    origin, size = _column(census.low, device), total * chosen.bins
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


def _column(values: Sequence[float] | Sequence[int], device: torch.device) -> Tensor:
    kind = torch.float64 if isinstance(values[0], float) else torch.int64
    return torch.tensor(values, dtype=kind, device=device)[:, None]


# --- occupied cells -------------------------------------------------------------------------------


def table_size(lists: int, rows: int) -> int:
    """Cells up to which a table of all of them is kept instead of a sorted list."""
    return 2 * lists * rows + (1 << 16)


def _below(x: Tensor, near: Tensor) -> Tensor:
    """Value of the cell below, zero where that is not occupied."""
    return torch.nn.functional.pad(x[:-1], (1, 0)) * near


def _above(x: Tensor, near: Tensor) -> Tensor:
    """Value of the cell above."""
    return torch.nn.functional.pad((x * 1)[1:] * near[1:], (0, 1))


def survey(
    scores: Tensor, sources: list[Rows], targets: list[Rows], axis: Axis, crowd: int
) -> tuple[Cells, Sizes]:
    """One pass over the rows, one read; more than ``crowd`` rows make a cell crowded."""
    ids = None
    if axis.size > table_size(*scores.shape):
        ids = occupied_cells(scores, [*sources, *targets], axis, 0)
    size = axis.size if ids is None else ids.numel()
    counts = []
    for side in (sources, targets):
        count = torch.zeros(size, dtype=torch.int32, device=scores.device)
        for part in side:
            for block in blocks(scores.shape, scores.device, part.listed):
                where = row_addresses(axis, ids, scores, block)
                count.scatter_add_(0, where, count.new_ones(()).expand_as(where))
        counts.append(count)
    near = torch.ones(size, dtype=torch.bool, device=scores.device)
    if ids is not None:
        near[1:] = ids[1:] - ids[:-1] == 1
    near[:1] = False
    return _classify(axis, ids, near, counts[0], counts[1], crowd)


def _classify(
    axis: Axis, ids: Tensor | None, near: Tensor, sources: Tensor, targets: Tensor, crowd: int
) -> tuple[Cells, Sizes]:
    occupied = (sources + targets) > 0
    many = (sources > crowd) | (targets > crowd)
    crowded = (many | _below(many, near) | (_above(many, near) > 0)) & occupied

    def around(x: Tensor) -> Tensor:  # rows of x a row meets in exact pairs
        thin = x * ~crowded
        beside = _below(x, near) + _above(x, near)
        beside_thin = _below(thin, near) + _above(thin, near)
        return torch.where(crowded, beside_thin, thin + beside)

    met, meets = around(sources), around(targets)
    wants, gives = (targets > 0) & (met > 0), (sources > 0) & (meets > 0)
    giving, wanting = sources * gives, targets * wants
    sizes = torch.stack([
        occupied.sum(), crowded.sum(), (targets * met.long()).sum(), giving.sum(), wanting.sum(),
        (giving * crowded).sum(), (wanting * crowded).sum(),
    ]).tolist()  # fmt: skip
    return Cells(axis, ids, near, occupied, crowded, gives, wants), Sizes(*sizes)


def turned(cells: Cells, sizes: Sizes) -> tuple[Cells, Sizes]:
    """The same with sources and targets exchanged."""
    return (
        cells._replace(gives=cells.wants, wants=cells.gives),
        sizes._replace(
            gives=sizes.wants, wants=sizes.gives,
            gives_crowded=sizes.wants_crowded, wants_crowded=sizes.gives_crowded,
        ),
    )  # fmt: skip


def number(cells: Cells, sizes: Sizes, work: Work, chosen: Plan) -> Layout:
    """Number the bins of the crowded cells, then the sparse cells."""
    bins = chosen.bins
    crowded, sparse = sizes.crowded, sizes.occupied - sizes.crowded
    thin = cells.occupied & ~cells.crowded
    rank = cells.crowded.cumsum(0) - 1
    start = torch.where(cells.crowded, rank * bins, thin.cumsum(0) + crowded * bins)
    where = torch.nonzero_static(cells.crowded, size=crowded)[:, 0]
    linked = cells.crowded[where - 1] & cells.near[where]
    slot = torch.arange(crowded, device=start.device)
    left = torch.where(linked, slot - 1, crowded)
    follows = torch.nn.functional.pad(linked[1:], (0, 1))
    right = torch.where(follows, slot + 1, crowded)
    seats = min(work.rows, cells.axis.longest, sizes.occupied)
    order = cells.occupied.cumsum(0) - 1
    if work.lists > 1:  # seats are counted from the first occupied cell of each list
        first_id = cells.axis.first
        edge = first_id if cells.ids is None else torch.searchsorted(cells.ids, first_id)
        before = torch.nn.functional.pad(cells.occupied.cumsum(0), (1, 0))[edge]
        every = torch.arange(order.numel(), device=start.device)
        which = torch.searchsorted(edge, every, right=True) - 1
        order = order - before[which] + which * seats
    seat = torch.cat([order[where], order[torch.nonzero_static(thin, size=sparse)[:, 0]]])
    shape = Shape(work.lists, chosen.nodes, bins, chosen.bin_width)
    return Layout(cells.axis, shape, start, cells.ids, crowded, sparse, left, right, seat, seats)


def occupied_cells(scores: Tensor, rows: list[Rows], axis: Axis, table: int) -> Tensor:
    """Sorted numbers of the cells that hold rows."""
    every = [
        (part, block) for part in rows for block in blocks(scores.shape, scores.device, part.listed)
    ]
    if axis.size > table and every:
        found = [torch.unique(row_addresses(axis, None, scores, block)) for _, block in every]
        distinct: Tensor = torch.unique(torch.cat(found))
        return distinct
    seen = torch.zeros(min(axis.size, table), dtype=torch.bool, device=scores.device)
    for _, block in every:
        seen.index_fill_(0, row_addresses(axis, None, scores, block), True)
    return seen.nonzero()[:, 0]


def only_occupied(axis: Axis, ids: Tensor, table: int, work: Work, chosen: Plan) -> Layout:
    """Numbering in which every occupied cell has bins; ``ids`` are their sorted numbers."""
    kept = None
    if axis.size <= table:
        occupied = torch.zeros(axis.size, dtype=torch.bool, device=ids.device)
        occupied[ids] = True
        near = torch.ones_like(occupied)
    else:
        occupied = torch.ones_like(ids, dtype=torch.bool)
        near = torch.nn.functional.pad(ids[1:] - ids[:-1] == 1, (1, 0))
        kept = ids
    near[:1] = False
    nowhere = torch.zeros_like(occupied)
    cells = Cells(axis, kept, near, occupied, occupied, nowhere, nowhere)
    return number(cells, Sizes(ids.numel(), ids.numel(), 0, 0, 0, 0, 0), work, chosen)
