"""Exact pairwise sigmoid sums, in tiles: sources x targets time, O(pool) memory.

All functions work on flat batches: L lists of M scores, G groups of weights.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

_TILE = 1 << 17  # pairs alive at once; 0.5 MB of float32 stays in cache
_COLUMNS = 1 << 12  # float32 products add at most this many terms before the float64 sum
_ALONE = 64  # rows in one list from which a tile of that list alone beats a mixed tile


def _kernels(z: Tensor, value: bool, slope: bool) -> list[Tensor]:
    """sigmoid(z) and sigmoid'(z), as asked; overwrites z.

    The slope is sigmoid(z) sigmoid(-z): sigma - sigma^2 would lose it where sigma is near 1.
    """
    if not slope:
        return [z.sigmoid_()]
    below = torch.neg(z).sigmoid_()
    above = z.sigmoid_()
    return [above, above * below] if value else [above.mul_(below)]


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
    scores: Tensor, pos: Tensor, valid: Tensor | None, share: Tensor, tau: Tensor, *, grad: bool
) -> tuple[Tensor, Tensor | None]:
    """Precision at the positives of one list, and the gradient of sum(share * precision).

    One pass over the pairs for both, which `pair_sums` twice would visit twice.

    Args:
        scores: [M] float32 or float64.
        pos: [P] int64, the positives.
        valid: [M] bool or None for all.
        share: [P] float64, weight of each positive in the mean.
        tau: [] > 0.
        grad: whether the gradient is wanted.

    Returns:
        (R+ / R [P] float64, gradient [M] in the dtype of scores or None).
    """
    m = scores.shape[0]
    groups = scores.new_zeros(2, m)
    groups[0] = 1.0 if valid is None else valid
    groups[1].index_fill_(0, pos, 1.0)
    own = scores.index_select(0, pos)
    precision, pulls, gradient = [], [], scores.new_zeros(2, m, dtype=torch.float64)
    for r in range(0, pos.numel(), step := max(1, _TILE // m)):
        z = torch.sub(scores, own[r : r + step, None]).div_(tau)
        ks = _kernels(z, True, grad)
        ranks = _wide_product(ks[0], groups) + 0.5  # the row's own sigmoid(0) is in the sum
        precision.append(ranks[:, 1] / ranks[:, 0])
        if grad:
            a = share[r : r + step] / ranks[:, 0]
            c = torch.stack([-a * precision[-1], a], 1)
            pulls.append((c * _wide_product(ks[1], groups)).sum(1))
            gradient += c.to(scores.dtype).T @ ks[1]
    phi = torch.cat(precision)
    if not grad:
        return phi, None
    total = (groups * gradient).sum(0)
    total.index_add_(0, pos, torch.cat(pulls), alpha=-1)
    return phi, (total / tau).to(scores.dtype)


def _wide_product(k: Tensor, groups: Tensor) -> Tensor:
    """Product of k [R, M] and groups [G, M], added up in float64 a block of columns at a time."""
    total = (k[:, :_COLUMNS] @ groups[:, :_COLUMNS].T).double()
    for c in range(_COLUMNS, k.shape[1], _COLUMNS):
        total += k[:, c : c + _COLUMNS] @ groups[:, c : c + _COLUMNS].T
    return total
