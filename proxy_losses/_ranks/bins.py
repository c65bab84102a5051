"""Moments of the bins, products between cells, and evaluation at the rows."""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import torch
from torch import Tensor

from .cells import Rows
from .layout import Layout, Place, blocks, place, take


class Table(NamedTuple):
    """Moments, or coefficients, of U_0 .. U_{p-1} per group and bin."""

    first: Tensor  # [G, entries] of U_0; the entries of sparse cells follow those of the bins
    higher: Tensor  # [G, p - 1, bins] of U_1 ..; one spare bin where there are sparse cells


def moments_of(layout: Layout, scores: Tensor, weights: Tensor, rows: list[Rows]) -> Table:
    """sum_j w_j U_k(t_j) of every bin, with the opposite sign where k mod 4 is 2 or 3."""
    spots = layout.crowded * layout.shape.bins + (layout.sparse > 0)
    first = scores.new_zeros(weights.shape[1], spots + layout.sparse, dtype=torch.float64)
    higher = first.new_zeros(weights.shape[1], layout.shape.nodes - 1, spots)
    shape = (scores.shape[0], scores.shape[1])
    for part in rows:
        for block in blocks(shape, scores.device, part.listed) if part.sources else ():
            twice, spot, entry = place(layout, scores, block)
            for group in part.sources:
                weight = take(weights[:, group], block).to(torch.float64, copy=True)
                add_moments(first[group], higher[group], weight, Place(twice, spot, entry))
    return Table(first, higher)


def add_moments(first: Tensor, higher: Tensor, weight: Tensor, where: Place) -> None:
    """Add the rows of a block to the moments of one group; overwrites weight [rows] float64."""
    twice, spot, entry = where
    first.scatter_add_(0, entry, weight)
    before, now, sign = weight, weight * twice, -1.0
    for k, row in enumerate(higher):
        if k:  # in place, hence the signs: + + - - + + - - ...
            before, now = now, before.addcmul_(twice, now, value=sign)
            sign = -sign
        row.scatter_add_(0, spot, now)


def clenshaw(table: Table, group: int, where: Place) -> Tensor:
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


def products(layout: Layout, moments: Table, kinds: list[str]) -> list[Table]:
    """Coefficients of the sums in every bin, for each kind."""
    cells, bins, nodes = layout.crowded, layout.shape.bins, layout.shape.nodes
    used, size = cells * bins, bins * nodes
    tables = [Table(*(torch.zeros_like(part) for part in moments)) for _ in kinds]
    width, linked = layout.shape.bin_width, layout.left is not None
    device = moments.first.device
    kernels = [_kernel(nodes, bins, width, linked, kind).to(device) for kind in kinds]
    step = max(1, (1 << 20) // size)
    for group, (first, higher) in enumerate(zip(*moments, strict=True)):
        stacked = torch.cat([first[None, :used], higher[:, :used]]).view(nodes, cells, bins)
        x = torch.nn.functional.pad(stacked.transpose(0, 1).reshape(cells, size), (0, 0, 0, 1))
        for begin in range(0, cells, step):
            end = min(begin + step, cells)
            near = [x[begin:end]]
            if layout.left is not None and layout.right is not None:
                near += [x[layout.left[begin:end]], x[layout.right[begin:end]]]
            for table, kernel in zip(tables, kernels, strict=True):
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
    less the step between bins; both functions depend on the distance of the bins only.
    """
    x, _, e, sign = chebyshev(nodes)
    reach = 2 * bins if linked else bins
    apart = torch.arange(1 - reach, reach, dtype=torch.float64)  # source bin - target bin
    d = apart[:, None, None]
    z = d * width + (x[:, None] - x) * (0.5 * width)
    if kind == "value":
        f = torch.where(d > 0, -torch.sigmoid(-z), torch.sigmoid(z))
    else:
        f = torch.sigmoid(z) * torch.sigmoid(-z)
    f = torch.einsum("kl,dlm,nm->knd", e * sign, f, e).contiguous()
    span = 2 * reach - 1
    near = (3 if linked else 1, nodes, bins, nodes, bins)
    # the last axis is the target bin in reverse
    full = f.as_strided(near, (bins, nodes * span, 1, span, 1)).flip(-1)
    full = full.reshape(near[0], nodes * bins, nodes * bins)
    return full[[1, 0, 2]] if linked else full
