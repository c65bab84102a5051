"""Exact pairwise sigmoid sums, in tiles: sources x targets time, O(pool) memory.

All functions work on flat batches: L lists of M scores, G groups of weights.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

_TILE = 1 << 17  # pairs alive at once; 0.5 MB of float32 stays in cache
_COLUMNS = 1 << 12  # float32 products add at most this many terms before the float64 sum
_FAR = 50.0  # e**-50 is nothing beside a rank; further out denormal numbers take 3x the time
_ALONE = 64  # rows in one list from which a tile of that list alone beats a mixed tile


def _kernels(z: Tensor, value: bool, slope: bool) -> list[Tensor]:
    """sigmoid(z) and sigmoid'(z), as asked; overwrites z.

    The slope is sigmoid(z) sigmoid(-z): sigma - sigma^2 would lose it where sigma is near 1.
    """
    if z.dtype == torch.float32:
        z.clamp_(-_FAR, _FAR)
    if not slope:
        return [z.sigmoid_()]
    below = torch.neg(z).sigmoid_()
    above = z.sigmoid_()
    both = below.mul_(above)
    return [above, both] if value else [both]


def _tiles(lists: Tensor, num_lists: int) -> Iterator[tuple[int | None, slice | Tensor]]:
    """Group rows, ordered by list: (list, rows of that list alone), or (None, rows of many)."""
    if num_lists == 1:
        yield 0, slice(0, lists.numel())
        return
    count = torch.bincount(lists, minlength=num_lists)
    start = (count.cumsum(0) - count).tolist()
    big = count >= _ALONE
    for i in big.nonzero()[:, 0].tolist():
        yield i, slice(start[i], start[i] + int(count[i]))
    mixed = (~big)[lists].nonzero()[:, 0]
    if mixed.numel():
        yield None, mixed


def pair_sums(
    scores: Tensor, weights: Tensor, at: Tensor, tau: Tensor, *, value: bool, slope: bool
) -> list[Tensor]:
    """Sums over sources j of weights[l, g, j] * k((s_j - s_i) / tau_l) at the targets i.

    Args:
        scores: [L, M] float32 or float64.
        weights: [L, G, M] floating or bool.
        at: [L, 1 or G, M] bool, the targets of each group; the result is 0 elsewhere.
        tau: [L] > 0.
        value: whether to return the sums with k = sigmoid.
        slope: whether to return the sums with k = sigmoid' (not divided by tau).

    Returns:
        The sums asked for, value first, each [L, G, M] in the dtype of scores.
    """
    weights = weights.to(scores.dtype)
    tau = tau.to(scores.dtype)
    sources = (weights != 0).any(1).nonzero(as_tuple=True)
    targets = at.any(1).nonzero(as_tuple=True)
    by_target = targets[0].numel() <= sources[0].numel()
    wide = [
        torch.zeros(weights.shape, dtype=torch.float64, device=scores.device)
        for _ in range(value + slope)
    ]
    lists, index = targets if by_target else sources
    for one, group in _tiles(lists, scores.shape[0]):
        _add_tiles(wide, scores, weights, tau, (lists[group], index[group]), one, by_target, value)
    return [torch.where(at, w, 0.0).to(scores.dtype) for w in wide]


def _add_tiles(
    wide: list[Tensor],
    scores: Tensor,
    weights: Tensor,
    tau: Tensor,
    rows: tuple[Tensor, Tensor],
    one: int | None,
    by_target: bool,
    value: bool,
) -> None:
    """Add the pairs of rows with every column to `wide`, a tile at a time."""
    slope = len(wide) > value
    m = scores.shape[-1]
    columns = min(m, _COLUMNS)
    step = max(1, _TILE // columns)
    for r in range(0, rows[0].numel(), step):
        ls, ix = rows[0][r : r + step], rows[1][r : r + step]
        own = scores[ls, ix][:, None]
        for c in range(0, m, columns):
            cols = slice(c, c + columns)
            if one is None:
                block, t = scores[ls, cols], tau[ls][:, None]
            else:
                block, t = scores[one, cols], tau[one]
            # sigmoid(s_source - s_target): rows are the subtrahend only when they are targets.
            ks = _kernels((block - own).div_(t if by_target else -t), value, slope)
            for out, k in zip(wide, ks, strict=True):
                if by_target and one is None:
                    out[ls, :, ix] += torch.einsum("rc,rgc->rg", k, weights[ls, :, cols])
                elif by_target:
                    out[one, :, ix] += weights[one, :, cols] @ k.T
                elif one is None:
                    w = weights[ls, :, ix]
                    for g in range(w.shape[1]):
                        out[:, g, cols].index_add_(0, ls, (w[:, g, None] * k).double())
                else:
                    out[one, :, cols] += weights[one][:, ix] @ k


def average_precision(
    scores: Tensor,
    found: tuple[Tensor, Tensor],
    valid: Tensor | None,
    weight: Tensor | None,
    tau: Tensor,
    *,
    grad: bool,
) -> tuple[Tensor, Tensor | None]:
    """Weighted mean of R+ / R over the positives of every list, and its gradient.

    One pass over the pairs for both, which `pair_sums` twice would visit twice.

    Args:
        scores: [L, M] float32 or float64.
        found: lists and rows of the positives, in order; all of them valid.
        valid: [L, M] bool or None for all.
        weight: [L, M] floating, read at the positives, or None for 1.
        tau: [L] > 0.
        grad: whether the gradient is wanted.

    Returns:
        (mean [L] float64, gradient [L, M] in the dtype of scores or None).
    """
    lists, index = found
    if scores.shape[0] == 1:
        only = None if valid is None else valid[0]
        share = _share(None if weight is None else weight[0].index_select(0, index))
        one, g = _one_list(scores[0], index, only, share, tau[0], grad)
        return one[None], None if g is None else g[None]
    mean = torch.zeros(scores.shape[0], dtype=torch.float64, device=scores.device)
    gradient = torch.zeros_like(scores) if grad else None
    for alone, group in _tiles(lists, scores.shape[0]):
        ls, ix = lists[group], index[group]
        w = None if weight is None else weight[ls, ix]
        if alone is None:
            shares = _shares(ls, w, scores.shape[0])
            _mixed_lists(mean, gradient, scores, (ls, ix), valid, shares, tau)
            continue
        only = None if valid is None else valid[alone]
        mean[alone], g = _one_list(scores[alone], ix, only, _share(w), tau[alone], grad)
        if gradient is not None and g is not None:
            gradient[alone] = g
    return mean, gradient


def _share(weight: Tensor | None) -> Tensor | None:
    """Weights [P] of one list in its mean, None where all are equal."""
    if weight is None:
        return None
    wide = weight.double()
    return wide / wide.sum().clamp_(min=torch.finfo(torch.float64).tiny)


def _shares(lists: Tensor, weight: Tensor | None, num_lists: int) -> Tensor:
    """Weights [P] of the positives of many lists in their means."""
    wide = torch.ones_like(lists, dtype=torch.float64) if weight is None else weight.double()
    total = torch.bincount(lists, wide, num_lists)
    return wide / total.clamp_(min=torch.finfo(torch.float64).tiny).index_select(0, lists)


def _one_list(
    scores: Tensor,
    pos: Tensor,
    valid: Tensor | None,
    share: Tensor | None,
    tau: Tensor,
    grad: bool,
) -> tuple[Tensor, Tensor | None]:
    """Mean [] and gradient [M] of one list with the positives pos [P]."""
    m, count = scores.shape[0], pos.numel()
    groups = scores.new_ones(2, m)
    if valid is not None:
        groups[0] = valid
    groups[1].zero_().index_fill_(0, pos, 1.0)
    own = scores.index_select(0, pos)[:, None]
    precision, pulls, gradient = [], [], None
    for r in range(0, count, step := max(1, _TILE // m)):
        z = torch.sub(scores, own[r : r + step]).div_(tau)
        ks = _kernels(z, True, grad)
        ranks = _wide_product(groups, ks[0]).add_(0.5)  # the row's own sigmoid(0) is in the sum
        phi = ranks[1] / ranks[0]
        precision.append(phi)
        if grad:
            a = ranks[0].reciprocal_().mul_(1.0 / count if share is None else share[r : r + step])
            c = torch.stack([-a * phi, a])
            pulls.append((c * _wide_product(groups, ks[1])).sum(0))
            pulled = (c.to(scores.dtype) @ ks[1]).double()
            gradient = pulled if gradient is None else gradient.add_(pulled)
    phi = precision[0] if len(precision) == 1 else torch.cat(precision)
    mean = phi.mean() if share is None else share @ phi
    if gradient is None:
        return mean, None
    total = gradient.mul_(groups).sum(0)
    total.index_add_(0, pos, pulls[0] if len(pulls) == 1 else torch.cat(pulls), alpha=-1)
    return mean, total.div_(tau).to(scores.dtype)


def _mixed_lists(
    mean: Tensor,
    gradient: Tensor | None,
    scores: Tensor,
    found: tuple[Tensor, Tensor],
    valid: Tensor | None,
    share: Tensor,
    tau: Tensor,
) -> None:
    """The same for lists with few positives each, in tiles across lists."""
    lists, index = found
    tau = tau.to(scores.dtype)
    first, second = _mates(lists, scores.shape[0])
    at = scores[lists, index]
    z = (at[second] - at[first]).div_(tau[lists[first]])
    ks = _kernels(z, True, gradient is not None)
    zero = share.new_zeros(lists.numel())
    hits = zero.index_add(0, first, ks[0].double()).add_(0.5)  # sigmoid(0) of its own is in
    above = []
    for r in range(0, lists.numel(), step := max(1, _TILE // scores.shape[1])):
        ls, ix = lists[r : r + step], index[r : r + step]
        rows, unit = scores.index_select(0, ls), tau.index_select(0, ls)[:, None]
        tile = _kernels(rows.sub_(at[r : r + step, None]).div_(unit), True, gradient is not None)
        if valid is not None:
            counted = valid.index_select(0, ls)
            tile = [k.mul_(counted) for k in tile]
        above.append(tile[0].sum(1).double().add_(0.5))
        if gradient is not None:
            a = share[r : r + step] / above[-1] / unit[:, 0]
            b = (a * hits[r : r + step] / above[-1]).to(rows.dtype)
            gradient.index_put_((ls, ix), b * tile[1].sum(1), accumulate=True)
            gradient.index_add_(0, ls, tile[1].mul_(b[:, None]), alpha=-1)
    ranks = torch.cat(above)
    mean.index_add_(0, lists, share * hits / ranks)
    if gradient is not None:
        pull = (share / ranks)[first] * ks[1] / tau[lists[first]]
        own = zero.index_add(0, second, pull).index_add_(0, first, pull, alpha=-1)
        gradient.index_put_((lists, index), own.to(gradient.dtype), accumulate=True)


def _mates(lists: Tensor, num_lists: int) -> tuple[Tensor, Tensor]:
    """All pairs (i, j) of rows of the same list, j = i included; rows are ordered by list."""
    count = torch.bincount(lists, minlength=num_lists)
    size, start = count[lists], (count.cumsum(0) - count)[lists]
    first = torch.arange(lists.numel(), device=lists.device).repeat_interleave(size)
    offset = torch.arange(first.numel(), device=lists.device) - (size.cumsum(0) - size)[first]
    return first, start[first] + offset


def _wide_product(groups: Tensor, k: Tensor) -> Tensor:
    """Product of groups [G, M] and k [R, M], added up in float64 a block of columns at a time."""
    total = (groups[:, :_COLUMNS] @ k[:, :_COLUMNS].T).double()
    for c in range(_COLUMNS, k.shape[1], _COLUMNS):
        total += groups[:, c : c + _COLUMNS] @ k[:, c : c + _COLUMNS].T
    return total
