"""Moments of the bins, products between cells, and evaluation at the rows.

Rows are replaced by Chebyshev moments of their bin (second kind, U_k), bins interact through one
banded Toeplitz matrix per pair of neighbouring cells, everything further above counts as a step,
and the sums are read off per target by Clenshaw's recurrence.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from ..distributed import reduce_now
from .cells import CHUNK, Block, Layout, Place, Rows, places, put, take
from .dense import entropy
from .lists import Lists, Pairs
from .phi import Phi

SINGLE_RTOL = 1e-6  # slopes are read off in float32 from here on; values always in float64
KEPT_BLOCKS = 4  # so many blocks of rows are placed once for both passes


class Table(NamedTuple):
    """Moments, or coefficients, of U_0 .. U_{p-1} per group and bin."""

    first: Tensor  # [G, entries] of U_0; the entries of sparse cells follow those of the bins
    higher: Tensor  # [G, p - 1, bins] of U_1 ..; one spare bin where there are sparse cells

    def narrow(self) -> Table:
        """In float32."""
        return Table(self.first.float(), self.higher.float())


# --- sums -----------------------------------------------------------------------------------------


def pair_sums(
    layout: Layout, pairs: Pairs, kinds: Sequence[str], visits: tuple[list[Rows], list[Rows]],
    rtol: float, name: str = "",
) -> list[Tensor]:  # fmt: skip
    """The sums of `dense.pair_sums` in numbered bins, each [L, G, M] in the dtype of scores.

    visits: the rows that give, and those that take. name: of the group of processes, "" for one.
    Rows in sparse cells feel the steps of others only; `grid` adds their exact pairs.
    """
    scores, weights, at, _ = pairs
    moments = _all_moments(layout, scores, weights, visits[0])
    if name:
        flat = reduce_now(torch.cat([part.flatten() for part in moments]), "sum", name)
        parts = flat.split([part.numel() for part in moments])
        moments = Table(*(p.view_as(m) for p, m in zip(parts, moments, strict=True)))
    tables = _products(layout, moments, kinds)
    if scores.dtype == torch.float32 and rtol >= SINGLE_RTOL:
        tables = [t.narrow() if k == "slope" else t for t, k in zip(tables, kinds, strict=True)]
    outs = [scores.new_zeros(weights.shape) for _ in kinds]
    for part in visits[1]:
        for block, where in places(layout, scores, part.listed):
            masks = [take(at[:, g], block).to(scores.dtype) for g in range(at.shape[1])]
            for out, table in zip(outs, tables, strict=True):
                for group in part.groups:
                    sums = _clenshaw(table, group, where).to(out.dtype)
                    put(out[:, group], block, sums.mul_(masks[group % at.shape[1]]))
    return outs


def _all_moments(layout: Layout, scores: Tensor, weights: Tensor, sources: list[Rows]) -> Table:
    """sum_j w_j U_k(t_j) of every bin, with the opposite sign where k mod 4 is 2 or 3."""
    spots = layout.crowded * layout.shape.bins + (layout.sparse > 0)
    first = scores.new_zeros(weights.shape[1], spots + layout.sparse, dtype=torch.float64)
    higher = first.new_zeros(weights.shape[1], layout.shape.nodes - 1, spots)
    for part in sources:
        for block, where in places(layout, scores, part.listed):
            for group in part.groups:
                weight = take(weights[:, group], block).to(torch.float64, copy=True)
                _add_moments(first[group], higher[group], weight, where)
    return Table(first, higher)


def _add_moments(first: Tensor, higher: Tensor, weight: Tensor, where: Place) -> None:
    """Add the rows of a block to the moments of one group; overwrites weight [rows] float64."""
    twice, spot, entry = where
    first.scatter_add_(0, entry, weight)
    before, now, sign = weight, weight * twice, -1.0
    for k, row in enumerate(higher):
        if k:  # in place, hence the signs: + + - - + + - - ...
            before, now = now, before.addcmul_(twice, now, value=sign)
            sign = -sign
        row.scatter_add_(0, spot, now)


def _clenshaw(table: Table, group: int, where: Place) -> Tensor:
    """sum_k c_k U_k(t) at every row, in the dtype of the table."""
    twice, spot, entry = where
    twice = twice.to(table.first.dtype)
    higher = table.higher[group]
    after, now = None, higher[-1].index_select(0, spot)
    for row in reversed(higher[:-1].unbind()):
        new = row.index_select(0, spot).addcmul_(twice, now)
        after, now = now, new if after is None else new.sub_(after)
    new = table.first[group].index_select(0, entry).addcmul_(twice, now)
    return new if after is None else new.sub_(after)


# --- means ----------------------------------------------------------------------------------------


def rank_mean(
    layout: Layout, pool: Lists, tau: Tensor, phi: Phi, rtol: float, name: str = "", *,
    grad: bool,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """The mean of `dense.rank_mean` and its gradient without a visit per positive.

    R and R+ are sums of sigmoids with positive weights: for 0 < |Im z| < pi all terms have
    imaginary parts of one sign, so neither has a zero there. Hence phi and its derivatives are
    analytic in the strip of the sigmoid itself and may be interpolated at the same nodes. What
    would be done per positive is done per node, and the sources of the gradient are node weights.
    """
    scores, pos, *_ = pool
    few = scores.numel() <= KEPT_BLOCKS * CHUNK["cpu"]
    kept = list(_placed(layout, scores, pos)) if few else None
    walk = kept or _placed(layout, scores, pos)
    moments = _moments(layout, pool, walk)
    moments = reduce_now(moments, "sum", name) if name else moments
    mean, coefficients = _in_bins(layout, moments, tau, phi, grad=grad)
    del moments
    if coefficients is None:
        return mean, None
    single = scores.dtype == torch.float32 and rtol >= SINGLE_RTOL
    walk = kept or _placed(layout, scores, pos)
    return mean, _read_off(pool, coefficients, walk, torch.float32 if single else torch.float64)


Placed: TypeAlias = tuple[Block, Place, Place]


def _placed(layout: Layout, scores: Tensor, pos: Tensor) -> Iterator[Placed]:
    """Where the rows of each block sit, and the same with the positives moved to a second group."""
    bins = layout.crowded * layout.shape.bins
    for block, where in places(layout, scores, None):
        index = where.bin + take(pos, block).long().mul_(bins)
        yield block, where, Place(where.twice, index, index)


def _moments(layout: Layout, pool: Lists, placed: Iterable[Placed]) -> Tensor:
    """[p, G, bins] of the negatives, the positives and, where they differ, weighted positives."""
    scores, _, valid, weight, *_ = pool
    nodes, bins = layout.shape.nodes, layout.crowded * layout.shape.bins
    out = scores.new_zeros(nodes, 2 + (weight is not None), bins, dtype=torch.float64)
    both = out.view(nodes, -1) if weight is None else out[:, :2].reshape(nodes, -1)
    for block, where, index in placed:
        one = torch.ones_like(where.twice) if valid is None else take(valid, block).double()
        _add_moments(both[0], both[1:], one, index)
        if weight is not None:
            mass = take(weight, block).to(torch.float64, copy=True)
            _add_moments(out[0, 2], out[1:, 2], mass, where)
    if weight is not None:
        out[:, :2] = both.view(nodes, 2, bins)
    return out


def _in_bins(
    layout: Layout, moments: Tensor, tau: Tensor, phi: Phi, *, grad: bool
) -> tuple[Tensor, Tensor | None]:
    """The mean [L] and the coefficients of the gradient [p, G, bins].

    The groups of coefficients: what negatives and positives read off and, for weighted positives,
    what they take away times their weight.
    """
    _, at, of, sign = (part.to(moments.device) for part in chebyshev(layout.shape.nodes))
    weighted = moments.shape[1] == 3
    groups = moments.transpose(0, 1)  # [G, p, bins]
    lists = layout.seat.div(layout.seats, rounding_mode="floor")

    def per_list(values: Tensor) -> Tensor:
        cells = values.view(layout.crowded, layout.shape.bins).sum(1)
        return values.new_zeros(layout.shape.lists).index_add_(0, lists, cells)

    def per_bin(values: Tensor) -> Tensor:
        return values[lists].repeat_interleave(layout.shape.bins)

    both = Table(groups[:2, 0], groups[:2, 1:])
    tables = _products(layout, both, ["value", "slope"] if grad else ["value"])
    negative, hits = at.T @ _joined(tables[0])
    hits += 0.5  # the row's own sigmoid(0) is in the sum
    value, b, a = phi.at(negative.add_(hits), hits)
    total = per_list(groups[-1, 0])
    unit = torch.where(total > 0, 1.0 / total, 0.0)
    mass = (of * sign).T @ groups[-1]
    mean = per_list((mass * value).sum(0)) * unit
    if not grad:
        return mean, None
    share = per_bin(unit)
    b = b * share
    e = b + a * share
    weights = (sign * at) @ torch.stack([mass * b, mass * e])
    pull = _joined(_products(layout, Table(weights[:, 0], weights[:, 1:]), ["slope"])[0])
    slope = at.T @ _joined(tables[1])
    own = of @ (slope[1].mul_(e).addcmul_(slope[0], b))
    pull = torch.cat([pull, own[None]]) if weighted else pull
    if not weighted:
        pull[1] -= own
    pull *= per_bin(1.0 / tau)
    return mean, pull.transpose(0, 1).contiguous()


def _joined(table: Table) -> Tensor:
    """[G, p, bins]."""
    return torch.cat([table.first[:, None], table.higher], 1)


def _read_off(
    pool: Lists, coefficients: Tensor, placed: Iterable[Placed], dtype: torch.dtype
) -> Tensor:
    """The gradient at every row, read off in this dtype."""
    scores, _, valid, weight, *_ = pool
    out = scores.new_empty(scores.shape)
    nodes = coefficients.shape[0]
    both = coefficients[:, :2].reshape(1, nodes, -1).to(dtype)
    table = Table(both[:, 0], both[:, 1:])
    own = coefficients[None, :, -1]  # times weights of any scale: in float64
    own_table = Table(own[:, 0], own[:, 1:])
    for block, where, index in placed:
        sums = _clenshaw(table, 0, index)
        if weight is not None:
            sums -= _clenshaw(own_table, 0, where).mul_(take(weight, block))
        if valid is not None:
            sums *= take(valid, block)
        put(out, block, sums)
    return out


# --- between bins ---------------------------------------------------------------------------------


def _products(layout: Layout, moments: Table, kinds: Sequence[str]) -> list[Table]:
    """Coefficients of the sums in every bin, for each kind."""
    cells, bins, nodes = layout.crowded, layout.shape.bins, layout.shape.nodes
    used, size = cells * bins, bins * nodes
    tables = [Table(*(torch.zeros_like(part) for part in moments)) for _ in kinds]
    width, linked = layout.shape.bin_width, layout.left is not None
    device = moments.first.device
    between = [_kernel(nodes, bins, width, linked, kind).to(device) for kind in kinds]
    step = max(1, (1 << 20) // size)
    for group, (first, higher) in enumerate(zip(*moments, strict=True)):
        stacked = torch.cat([first[None, :used], higher[:, :used]]).view(nodes, cells, bins)
        x = torch.nn.functional.pad(stacked.transpose(0, 1).reshape(cells, size), (0, 0, 0, 1))
        for begin in range(0, cells, step):
            end = min(begin + step, cells)
            near = [x[begin:end]]
            if layout.left is not None and layout.right is not None:
                near += [x[layout.left[begin:end]], x[layout.right[begin:end]]]
            for table, kernel in zip(tables, between, strict=True):
                y = near[0] @ kernel[0]
                for side, block in zip(near[1:], kernel[1:], strict=True):
                    y.addmm_(side, block)
                c = y.view(end - begin, nodes, bins).transpose(0, 1).reshape(nodes, -1)
                table.first[group, begin * bins : end * bins] = c[0]
                table.higher[group, :, begin * bins : end * bins] = c[1:]
    for table, kind in zip(tables, kinds, strict=True):
        if kind == "value":
            table.first.add_(_weight_above(layout, moments.first))
    return tables


def _weight_above(layout: Layout, first: Tensor) -> Tensor:
    """Weight of all bins above, per entry; rows of the same sparse cell do not count."""
    groups, used = first.shape[0], layout.crowded * layout.shape.bins
    inside = first[:, :used].view(groups, layout.crowded, layout.shape.bins)
    cell = torch.cat([inside.sum(-1), first[:, used + 1 :]], dim=1)
    seats = first.new_zeros(groups, layout.shape.lists * layout.seats)
    seats.index_copy_(1, layout.seat, cell)
    seats = _suffix(seats.view(groups, layout.shape.lists, layout.seats)).view(groups, -1)
    higher = seats.index_select(1, layout.seat)
    out = torch.zeros_like(first)
    out[:, :used] = (_suffix(inside) + higher[:, : layout.crowded, None]).view(groups, used)
    out[:, used + 1 :] = higher[:, layout.crowded :]
    return out


def _suffix(x: Tensor) -> Tensor:
    """Sums over all later positions of the last dimension."""
    return torch.nn.functional.pad(x.flip(-1).cumsum(-1).flip(-1)[..., 1:], (0, 1))


class Nodes(NamedTuple):
    """Chebyshev points of a bin, and the way between them and U_0 .. U_{p-1}."""

    x: Tensor  # [p] points in (-1, 1)
    at: Tensor  # [k, l] U_k(x_l): coefficients to values; moments of weights at the points
    of: Tensor  # [k, l] L_l(t) = sum_k of[k, l] U_k(t): its inverse, transposed
    sign: Tensor  # [k, 1] sign with which the moments are kept


@functools.lru_cache(maxsize=32)
def chebyshev(nodes: int) -> Nodes:
    """The points and matrices for p nodes, on the host."""
    angle = (2.0 * torch.arange(nodes, dtype=torch.float64) + 1.0) * (math.pi / (2 * nodes))
    k = torch.arange(nodes, dtype=torch.float64)[:, None]
    v = torch.cos(k * angle) * (2.0 / nodes)  # L_l(t) = sum_k v[k, l] T_k(t)
    v[0] *= 0.5
    e = v * 0.5  # and in U_k: T_k = (U_k - U_{k-2}) / 2
    e[0] = v[0]
    e[:-2] -= 0.5 * v[2:]
    at = torch.sin((k + 1.0) * angle) / angle.sin()
    return Nodes(angle.cos(), at, e, 1.0 - 2.0 * (k % 4 >= 2))


@functools.lru_cache(maxsize=8)
def _kernel(nodes: int, bins: int, width: float, linked: bool, kind: str) -> Tensor:
    """Moments of a cell to coefficients in a cell, both ordered (k, bin): [3 or 1, p B, p B].

    The blocks are for sources in the same cell, in the cell below and above. ``value`` is sigmoid
    less the step between bins; all functions depend on the distance of the bins only.
    """
    x, _, e, sign = chebyshev(nodes)
    reach = 2 * bins if linked else bins
    apart = torch.arange(1 - reach, reach, dtype=torch.float64)  # source bin - target bin
    d = apart[:, None, None]
    z = d * width + (x[:, None] - x) * (0.5 * width)
    if kind == "value":
        f = torch.where(d > 0, -torch.sigmoid(-z), torch.sigmoid(z))
    elif kind == "entropy":
        f, _ = entropy(z)
    else:
        f = torch.sigmoid(z) * torch.sigmoid(-z)
        f = z * f if kind == "stretch" else f
    f = torch.einsum("kl,dlm,nm->knd", e * sign, f, e).contiguous()
    span = 2 * reach - 1
    near = (3 if linked else 1, nodes, bins, nodes, bins)
    # the last axis is the target bin in reverse
    full = f.as_strided(near, (bins, nodes * span, 1, span, 1)).flip(-1)
    full = full.reshape(near[0], nodes * bins, nodes * bins)
    return full[[1, 0, 2]] if linked else full
