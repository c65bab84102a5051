"""Exact pairs, in tiles: sources x targets time, O(pool) memory.

All functions work on flat batches: L lists of M scores, G groups of weights.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from .lists import Lists, Pairs
from .phi import Phi

_TILE = 1 << 17  # pairs alive at once; 0.5 MB of float32 stays in cache
_COLUMNS = 1 << 12
_ROWS = 128  # float32 products add at most so many terms before the float64 sum
_FAR = 50.0  # e**-50 is nothing beside a rank; further out denormal numbers take 3x the time
_ALONE = 64  # rows in one list from which a tile of that list alone beats a mixed tile
_TINY = torch.finfo(torch.float64).tiny


def kernels(z: Tensor, kinds: Sequence[str]) -> list[Tensor]:
    """sigmoid(z) ("value"), sigmoid'(z) ("slope"), z sigmoid'(z) ("stretch"); overwrites z.

    And softplus(z) - z sigmoid(z) ("entropy"), which comes with the first alone. The slope is
    sigmoid(z) sigmoid(-z): sigma - sigma^2 would lose it where sigma is near 1.
    """
    if z.dtype == torch.float32:
        z.clamp_(-_FAR, _FAR)
    if list(kinds) == ["value"]:
        return [z.sigmoid_()]
    if list(kinds) == ["value", "entropy"]:
        above = z > 0
        coin, rare = entropy(z)
        return [torch.where(above, 1.0 - rare, rare), coin]
    below = torch.neg(z).sigmoid_()
    found = {"value": torch.sigmoid(z)}
    if "slope" in kinds or "stretch" in kinds:
        found["slope"] = below.mul_(found["value"])
    if "stretch" in kinds:
        found["stretch"] = z.mul_(found["slope"])
    return [found[kind] for kind in kinds]


def entropy(z: Tensor) -> tuple[Tensor, Tensor]:
    """softplus(z) - z sigmoid(z), that of a coin in nats, and sigmoid(-|z|); overwrites z.

    It is even, and nothing where z is far.
    """
    away = z.abs_()
    rare = torch.neg(away).sigmoid_()
    return away.mul_(rare).sub_(torch.neg(rare).log1p_()), rare


def rows_of(mask: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Lists and rows of the True entries of [L, M], in order; their number is known."""
    if mask.shape[0] == 1:
        row = torch.nonzero_static(mask[0], size=count)[:, 0]
        return torch.zeros_like(row), row
    lists, row = torch.nonzero_static(mask, size=count).unbind(1)
    return lists, row


def _runs(counts: Sequence[int]) -> Iterator[tuple[int, slice]]:
    """List and place of its rows, for the lists with enough of them to be tiled alone."""
    start = 0
    for one, count in enumerate(counts):
        if count >= _ALONE or len(counts) == 1:
            yield one, slice(start, start + count)
        start += count


def _mixed(counts: Sequence[int], lists: Tensor) -> Tensor | None:
    """Places of the rows of all other lists; None if there are none."""
    few = [0 < n < _ALONE for n in counts]
    if not any(few):
        return None
    if all(n < _ALONE for n in counts):
        return torch.arange(lists.numel(), device=lists.device)
    size = sum(n for n, some in zip(counts, few, strict=True) if some)
    mask = torch.tensor(few, device=lists.device)[lists]
    return torch.nonzero_static(mask, size=size)[:, 0]


# --- sums -----------------------------------------------------------------------------------------


def pair_sums(
    pairs: Pairs, kinds: Sequence[str], sides: tuple[Tensor, Tensor],
    counts: Sequence[Sequence[int]],
) -> list[Tensor]:  # fmt: skip
    """Sums over sources j of weights[l, g, j] * k((s_j - s_i) / tau_l) at the targets i.

    Args:
        pairs: scores, weights, targets and tau; the result is 0 off the targets.
        kinds: see `kernels`; slopes are not divided by tau.
        sides: [L, M] bool each, the sources and the targets of any group.
        counts: how many of both in each list.

    Returns:
        The sums, each [L, G, M] float64.
    """
    scores, weights, at, tau = pairs
    sources, targets = (rows_of(side, sum(n)) for side, n in zip(sides, counts, strict=True))
    by_target = targets[0].numel() <= sources[0].numel()
    wide = [scores.new_zeros(weights.shape, dtype=torch.float64) for _ in kinds]
    places = dict(_runs(counts[0])), dict(_runs(counts[1]))
    for one in range(scores.shape[0]):
        if one in places[0] and one in places[1]:
            give, take = sources[1][places[0][one]], targets[1][places[1][one]]
            w = weights[one][:, give].double()
            sums = _tiles(scores[one][give], scores[one][take], w, tau[one], kinds)
            for out, found in zip(wide, sums, strict=True):
                out[one].index_copy_(1, take, found)
    few = [
        min(a, b) > 0 and not (one in places[0] and one in places[1])
        for one, (a, b) in enumerate(zip(*counts, strict=True))
    ]
    lists, rows = targets if by_target else sources
    if any(few):
        size = sum(n for n, some in zip(counts[by_target], few, strict=True) if some)
        keep = torch.nonzero_static(torch.tensor(few, device=lists.device)[lists], size=size)[:, 0]
        _add_mixed(wide, pairs, (lists[keep], rows[keep]), kinds, by_target=by_target)
    return [torch.where(at, out, 0.0) for out in wide]


def _tiles(
    x: Tensor, y: Tensor, weights: Tensor, tau: Tensor, kinds: Sequence[str]
) -> list[Tensor]:
    """[G, T] of one list: targets y [T] against sources x [S] with weights [G, S] float64."""
    unit = tau.reciprocal().to(x.dtype)
    outs = [weights.new_zeros(weights.shape[0], y.numel()) for _ in kinds]
    columns = max(1, min(x.numel(), _COLUMNS))
    step = max(1, _TILE // columns)
    for r in range(0, y.numel(), step):
        for c in range(0, x.numel(), columns):
            z = torch.sub(x[c : c + columns], y[r : r + step, None]).mul_(unit)
            for out, k in zip(outs, kernels(z, kinds), strict=True):
                out[:, r : r + step] += weights[:, c : c + columns] @ k.double().T
    return outs


def _add_mixed(
    wide: list[Tensor], pairs: Pairs, rows: tuple[Tensor, Tensor], kinds: Sequence[str], *,
    by_target: bool,
) -> None:  # fmt: skip
    """Add the pairs of a few rows of many lists with all of their lists."""
    scores, weights, _, tau = pairs
    m = scores.shape[-1]
    unit = tau.reciprocal().to(scores.dtype)
    step = max(1, _TILE // m)
    for r in range(0, rows[0].numel(), step):
        ls, ix = rows[0][r : r + step], rows[1][r : r + step]
        # sigmoid(s_source - s_target): rows are the subtrahend only when they are targets.
        z = scores.index_select(0, ls).sub_(scores[ls, ix][:, None])
        z.mul_((unit[ls] if by_target else -unit[ls])[:, None])
        ks = kernels(z, kinds)
        for g in range(weights.shape[1]):
            w = weights[:, g].index_select(0, ls) if by_target else weights[ls, g, ix][:, None]
            for out, k in zip(wide, ks, strict=True):
                each = k.double() * w
                if by_target:
                    out[ls, g, ix] += each.sum(1)
                else:
                    out[:, g].index_add_(0, ls, each)


# --- means ----------------------------------------------------------------------------------------


def rank_mean(
    pool: Lists, tau: Sequence[float], phi: Phi, counts: tuple[Sequence[int], Sequence[int]], *,
    grad: bool,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """Weighted mean of phi(R, R+) over the positives of every list, and its gradient.

    One visit to the pairs gives both. With e = dphi/dR + dphi/dR+ and b = dphi/dR at a positive, a
    pair of positives pulls by e, one with a negative by b. What positives give and take among
    themselves may cancel to the last digit, so it is summed in float64.

    Args:
        pool: lists [L, M]; finite scores, positives that are valid, weights that are 0 elsewhere.
        tau: of every list, > 0.
        phi: the function.
        counts: positives of each list, and all its rows that count.
        grad: whether the gradient is wanted.

    Returns:
        (mean [L] float64, gradient [L, M] in the dtype of scores or None).
    """
    positives = counts[0]
    if len(positives) == 1:
        row = _row(pool, 0)
        index = torch.nonzero_static(row.pos, size=positives[0]).view(-1)
        value, pull = _one_list(row, index, counts[1][0], tau[0], phi, grad=grad)
        return value.view(1), None if pull is None else pull.view(1, -1)
    scores, pos, valid, weight, *_ = pool
    lists, rows = rows_of(pos, sum(positives))
    mean = scores.new_zeros(scores.shape[0], dtype=torch.float64)
    g = scores.new_zeros(scores.shape) if grad else None
    few = _mixed(positives, lists)  # lists with few positives are tiled together
    if few is not None:
        ls, ix = lists[few], rows[few]
        share = shares(ls, None if weight is None else weight[ls, ix], scores.shape[0])
        units = torch.tensor(tau, dtype=torch.float64, device=scores.device).reciprocal_()
        mates = [n for n in positives if 0 < n < _ALONE for _ in range(n)]
        # Rows that do not count are infinitely far below.
        counted = scores if valid is None else torch.where(valid, scores, -torch.inf)
        found = _mixed_lists(counted, (ls, ix), share, units, phi, mates=mates, g=g)
        mean.index_add_(0, ls, found)
        if g is not None and valid is not None:
            g = torch.where(valid, g, 0.0).contiguous()
    for one, run in _runs(positives):
        index = rows[run]
        mean[one], pull = _one_list(
            _row(pool, one), index, counts[1][one], tau[one], phi, grad=grad
        )
        if g is not None and pull is not None:
            g[one] = pull
    return mean, g


def _row(pool: Lists, one: int) -> Lists:
    return Lists(*(None if x is None else x.select(0, one) for x in pool[:4]))  # type: ignore[arg-type]


def _share(weight: Tensor) -> Tensor:
    """Weights [P] of one list in its mean."""
    wide = weight.double()
    return wide / wide.sum().clamp_(min=_TINY)


def shares(lists: Tensor, weight: Tensor | None, num_lists: int) -> Tensor:
    """Weights [P] of the positives of many lists in their means."""
    wide = torch.ones_like(lists, dtype=torch.float64) if weight is None else weight.double()
    total = wide.new_zeros(num_lists).index_add_(0, lists, wide)
    return wide / total.clamp_(min=_TINY).index_select(0, lists)


def _one_list(
    row: Lists, index: Tensor, everyone: int, tau: float, phi: Phi, *, grad: bool
) -> tuple[Tensor, Tensor | None]:
    """Mean [] and gradient [M] of one list [M] with the positives in ``index`` [P]."""
    scores, pos, valid, weight, *_ = row
    m, count, unit = scores.numel(), index.numel(), 1.0 / tau
    share = None if weight is None else _share(weight.index_select(0, index))
    own = scores.index_select(0, index)
    others = None  # negatives, where leaving the other rows out pays
    if valid is not None or 4 * count > m:
        negative = ~pos if valid is None else valid ^ pos  # positives are valid
        others = torch.nonzero_static(negative, size=everyone - count).view(-1)
        x = scores.index_select(0, others)
    else:
        x = scores.index_fill(0, index, -torch.inf)
    mates = count * phi.mates
    x = torch.cat([own, x]) if mates else x
    kinds = ("value", "slope")[: 1 + grad]
    step = max(1, min(_ROWS, _TILE // max(x.numel(), 1)))
    blocks = _stretches(own.unsqueeze(1), step)
    parts: Sequence[Tensor | None] = [None] * len(blocks)
    if share is not None:
        parts = _stretches(share, step)
    values, pulls = [], []
    for block, part in zip(blocks, parts, strict=True):
        tile = kernels(torch.sub(x, block).mul_(unit), kinds)
        above = _row_sums(tile[0][:, mates:] if mates else tile[0])
        hits: Tensor | float = 0.0
        if mates:  # sigmoid(0) is in
            hits = tile[0][:, :mates].sum(1, dtype=torch.float64).add_(0.5)
            above.add_(hits)
        value, b, a = phi.at(above, hits)
        values.append(value)
        if not grad:
            continue
        if part is not None:
            b = b * part
        far = tile[1][:, mates:] if mates else tile[1]
        gone, near = _row_sums(far).mul_(b), None
        if mates:
            e, slope = (a if part is None else a * part) + b, tile[1][:, :mates].double()
            gone.add_(slope.sum(1).mul_(e))
            near = _weighted(e, slope)
        pulls.append((near, gone, _weighted(b, far)))
    phis = values[0] if len(values) == 1 else torch.cat(values)
    mean = phis.mean() if share is None else share @ phis
    if not grad:
        return mean, None
    first, gone, second = pulls[0]
    if len(pulls) > 1:
        second = second.double()
        for near, _, far in pulls[1:]:
            first = near if first is None or near is None else first.add_(near)
            second += far
        gone = torch.cat([part for _, part, _ in pulls])
    first = gone.neg_() if first is None else first.sub_(gone)
    if share is None:
        unit /= count
    first = first.mul_(unit).to(scores.dtype)
    second = second.mul_(unit).to(scores.dtype)
    if others is None:
        return mean, second.index_copy_(0, index, first)
    g = scores.new_zeros(m).index_copy_(0, others, second)
    return mean, g.index_copy_(0, index, first)


def _stretches(x: Tensor, step: int) -> Sequence[Tensor]:
    """So many rows of x at a time."""
    return (x,) if x.shape[0] <= step else x.split(step)


def _weighted(weight: Tensor | float, rows: Tensor) -> Tensor:
    """[S]: sum of rows [R, S] by weights [R], or all by one number."""
    if isinstance(weight, Tensor):
        return torch.mv(rows.T, weight.to(rows.dtype))
    return rows.sum(0).mul_(weight)


def _mixed_lists(
    scores: Tensor, found: tuple[Tensor, Tensor], share: Tensor, unit: Tensor, phi: Phi, *,
    mates: Sequence[int], g: Tensor | None,
) -> Tensor:  # fmt: skip
    """The same for lists with few positives each, in tiles across lists.

    mates: of each positive, the number of positives in its list. Returns the terms [P] of the
    means, and adds to the gradient g [L, M].
    """
    lists, index = found
    kinds = ("value", "slope")[: 1 + (g is not None)]
    narrow = unit.to(scores.dtype)
    own = scores[lists, index]
    one, two = _mates(lists, mates, scores.shape[0])
    near = kernels((own[two] - own[one]).mul_(narrow[lists[one]]), kinds)
    zero = share.new_zeros(lists.numel())
    hits = zero.index_add(0, one, near[0].double()).add_(0.5)  # sigmoid(0) of its own is in
    values, slopes, factors = [], [], []
    begin = 0
    for r in range(0, lists.numel(), step := max(1, _TILE // scores.shape[1])):
        rows = slice(r, r + step)
        ls, end = lists[rows], begin + sum(mates[rows])
        z = scores.index_select(0, ls)
        z.index_put_((one[begin:end] - r, index[two[begin:end]]), z.new_full((), -torch.inf))
        begin = end
        tile = kernels(z.sub_(own[rows, None]).mul_(narrow[ls][:, None]), kinds)
        value, b, a = phi.at(hits[rows] + tile[0].sum(1).double(), hits[rows])
        values.append(value)
        if g is not None:
            b, e = (x * share[rows] * unit[ls] for x in (b, a + b))
            factors.append(e)
            slopes.append(b * tile[1].sum(1))
            g.index_add_(0, ls, tile[1].mul_(b.to(g.dtype)[:, None]))
    if g is not None:
        pull = torch.cat(factors)[one] * near[1]
        pulls = zero.index_add(0, two, pull).index_add_(0, one, pull, alpha=-1)
        g.index_put_((lists, index), (pulls - torch.cat(slopes)).to(g.dtype))
    return share * torch.cat(values)


def _mates(lists: Tensor, mates: Sequence[int], num_lists: int) -> tuple[Tensor, Tensor]:
    """All pairs (i, j) of rows of the same list, j = i included; rows are ordered by list."""
    count = torch.bincount(lists, minlength=num_lists)
    size, start = count[lists], (count.cumsum(0) - count)[lists]
    every = torch.arange(lists.numel(), device=lists.device)
    first = every.repeat_interleave(size, output_size=sum(mates))
    offset = torch.arange(first.numel(), device=lists.device) - (size.cumsum(0) - size)[first]
    return first, start[first] + offset


def _row_sums(k: Tensor) -> Tensor:
    """[R] float64 of k [R, M], short stretches of which add up in its own dtype."""
    whole = k.shape[1] // _COLUMNS
    if not whole:
        return k.sum(1).double()
    head: Tensor = k[:, : whole * _COLUMNS].unflatten(1, (whole, _COLUMNS)).sum(2).double().sum(1)
    head += k[:, whole * _COLUMNS :].sum(1)
    return head
