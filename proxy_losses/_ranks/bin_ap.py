"""Mean precision and its gradient without a visit per positive.

R and R+ are sums of sigmoids with positive weights: for 0 < |Im z| < pi all terms have imaginary
parts of one sign, so neither has a zero there. Hence R+ / R and the derivatives are analytic in the
strip of the sigmoid itself and may be interpolated at the same nodes. What would be done per
positive is done per node, and the sources of the gradient are node weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import TypeAlias

import torch
from torch import Tensor

from .bins import Table, add_moments, chebyshev, clenshaw, products
from .cells import Rows
from .grid import SINGLE_RTOL, lay_out, rows_of, thin
from .layout import Block, Layout, Place, Ranges, blocks, place, put, take
from .plan import fused_work, split_work

KEPT_ROWS = 1 << 17  # up to here the places of the first pass are kept for the second
Placed: TypeAlias = tuple[Block, Place, Place]


def average_precision(
    scores: Tensor,
    pos: Tensor,
    valid: Tensor | None,
    weight: Tensor | None,
    tau: Tensor,
    ranges: Ranges,
    positives: int,
    *,
    rtol: float,
    grad: bool,
) -> tuple[Tensor, Tensor | None] | None:
    """Weighted mean of R+ / R over the positives of every list, and its gradient.

    Args:
        scores: [L, M] float32 or float64, finite.
        pos: [L, M] bool, positives; all of them valid.
        valid: [L, M] bool or None for all.
        weight: [L, M] floating, read at the positives, or None for 1.
        tau: [L] float64 > 0.
        ranges: of the scores.
        positives: how many there are.
        rtol: accuracy asked for.
        grad: whether the gradient is wanted.

    Returns:
        (mean [L] float64, gradient [L, M] in the dtype of scores or None), or None where exact
        pairs are worth their cost in sparse cells, which only `grid.pair_sums` offers.
    """
    lists, count = scores.shape

    def rows() -> list[Rows]:
        if scores.is_cuda or not thin(pos):
            return [Rows(None, (0,), (0,))]
        return [Rows(None, (0,), ()), Rows(rows_of([pos]), (), (0,))]

    work = fused_work(lists, count, grad)
    split = split_work(lists, count, positives, grad)
    layout, cells = lay_out(scores, ranges, rows, work, rtol, split)
    if cells is not None:
        return None
    return in_layout(layout, scores, pos, valid, weight, tau, rtol=rtol, grad=grad)


def in_layout(
    layout: Layout,
    scores: Tensor,
    pos: Tensor,
    valid: Tensor | None,
    weight: Tensor | None,
    tau: Tensor,
    *,
    rtol: float,
    grad: bool,
    total: Callable[[Tensor], Tensor] = lambda moments: moments,
) -> tuple[Tensor, Tensor | None]:
    """`average_precision` in bins that are numbered; ``total`` adds the moments of other pools."""
    walk = _placed(layout, scores, pos)
    placed = list(walk) if scores.numel() <= KEPT_ROWS else None
    moments = total(_moments(layout, scores, pos, valid, weight, placed or walk))
    mean, coefficients = _in_bins(layout, moments, tau, grad)
    del moments
    if coefficients is None:
        return mean, None
    if scores.dtype == torch.float32 and rtol >= SINGLE_RTOL:
        coefficients = coefficients.float()
    walk = _placed(layout, scores, pos)
    return mean, _read_off(scores, pos, valid, weight, coefficients, placed or walk)


def _placed(layout: Layout, scores: Tensor, pos: Tensor) -> Iterator[Placed]:
    """Where the rows of each block sit, and the same with the positives moved to a second group."""
    bins = layout.crowded * layout.shape.bins
    for block in blocks((scores.shape[0], scores.shape[1]), scores.device, None):
        where = place(layout, scores, block)
        index = where.bin + take(pos, block).long().mul_(bins)
        yield block, where, Place(where.twice, index, index)


def _moments(
    layout: Layout,
    scores: Tensor,
    pos: Tensor,
    valid: Tensor | None,
    weight: Tensor | None,
    placed: Iterable[Placed],
) -> Tensor:
    """[p, G, bins] of the negatives, the positives and, where they differ, weighted positives."""
    nodes, bins = layout.shape.nodes, layout.crowded * layout.shape.bins
    out = scores.new_zeros(nodes, 2 + (weight is not None), bins, dtype=torch.float64)
    both = out.view(nodes, -1) if weight is None else out[:, :2].reshape(nodes, -1)
    for block, where, index in placed:
        one = torch.ones_like(where.twice) if valid is None else take(valid, block).double()
        add_moments(both[0], both[1:], one, index)
        if weight is not None:
            mass = take(weight, block).double() * take(pos, block).double()
            add_moments(out[0, 2], out[1:, 2], mass, where)
    if weight is not None:
        out[:, :2] = both.view(nodes, 2, bins)
    return out


def _in_bins(
    layout: Layout, moments: Tensor, tau: Tensor, grad: bool
) -> tuple[Tensor, Tensor | None]:
    """Mean precision [L] and the coefficients of the gradient [p, G, bins].

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
    tables = products(layout, both, ["value", "slope"] if grad else ["value"])
    negative, hits = at.T @ _joined(tables[0])
    hits += 0.5  # the row's own sigmoid(0) is in the sum
    phi = negative.add_(hits).reciprocal_()  # 1 / R so far
    total = per_list(groups[-1, 0])
    unit = torch.where(total > 0, 1.0 / total, 0.0)
    a = phi * per_bin(unit)
    phi *= hits
    mass = (of * sign).T @ groups[-1]
    mean = per_list((mass * phi).sum(0)) * unit
    if not grad:
        return mean, None
    b = phi.mul_(a).neg_()
    weights = (sign * at) @ torch.stack([mass * b, mass * (a + b)])
    pull = _joined(products(layout, Table(weights[:, 0], weights[:, 1:]), ["slope"])[0])
    slope = at.T @ _joined(tables[1])
    own = of @ (slope[1].mul_(a + b).addcmul_(slope[0], b))
    pull = torch.cat([pull, own[None]]) if weighted else pull
    if not weighted:
        pull[1] -= own
    pull *= per_bin(1.0 / tau)
    return mean, pull.transpose(0, 1).contiguous()


def _joined(table: Table) -> Tensor:
    """[G, p, bins]."""
    return torch.cat([table.first[:, None], table.higher], 1)


def _read_off(
    scores: Tensor,
    pos: Tensor,
    valid: Tensor | None,
    weight: Tensor | None,
    coefficients: Tensor,
    placed: Iterable[Placed],
) -> Tensor:
    """The gradient at every row."""
    out = torch.empty_like(scores)
    nodes = coefficients.shape[0]
    both = coefficients[:, :2].reshape(1, nodes, -1)
    table = Table(both[:, 0], both[:, 1:])
    own = coefficients[None, :, -1]
    own_table = Table(own[:, 0], own[:, 1:])
    for block, where, index in placed:
        sums = clenshaw(table, 0, index)
        if weight is not None:
            mass = take(weight, block).to(sums) * take(pos, block).to(sums)
            sums.addcmul_(clenshaw(own_table, 0, where), mass, value=-1.0)
        if valid is not None:
            sums *= take(valid, block)
        put(out, block, sums)
    return out
