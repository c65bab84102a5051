"""Quantiles, places and thresholds of a precision, of one process and of several; spreads.

By selection where few rows are looked at, else by a sort, and over shards digit by digit.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from ._checks import check_scores
from ._effects import LIBRARY, register
from ._numerics import (
    clean,
    full_precision,
    largest,
    largest_over_group,
    mean_of,
    number,
    plainly_eager,
    poison,
    positive_weight,
    size_known,
)
from .distributed import all_reduce, gather_counts, gather_known, reduce_now

EXACT_FLOAT32 = 1 << 24  # float32 counts exactly up to here; torch.quantile refuses longer lists
SHORT_ROWS, LONG_TAIL = 4096, 0.125  # of lists that a device sorts whole, see `_better_sorted`
SPREAD_ROWS = 1 << 16  # rows that settle a spread to about 1 %
# Selection over shards:
TABLE_BYTES = 1 << 20  # of one round, where digits can be made small enough
MIN_BITS, MAX_BITS = 4, 11
CHUNK = 1 << 16  # rows of a list per pass: temporaries stay in cache
SELECTED = 0.25  # of the rows of a list on the CPU: more are sorted than selected

LIBRARY.define(
    "sharded_quantiles(Tensor scores, Tensor? valid, Tensor levels, str interpolation, bool exact,"
    " str group) -> Tensor"
)
LIBRARY.define(
    "sharded_positives_at(Tensor scores, Tensor pos, Tensor? valid, Tensor precision, str group)"
    " -> Tensor"
)


def rank_dtype(rows: int, dtype: torch.dtype, exact: bool) -> torch.dtype:
    """What ranks in lists of so many rows are rounded in; long ones not in float32."""
    return torch.float64 if exact or rows > EXACT_FLOAT32 else dtype


def positions(rank: Tensor, interpolation: str) -> tuple[Tensor, Tensor, Tensor | None]:
    """Whole ranks from below between which a quantile lies: (below, above, mix).

    The quantile is ``lerp(below, above, mix)``; mix None says that both are the same rank.
    """
    if interpolation == "nearest":
        below = above = rank.round()
    elif interpolation == "lower":
        below = above = rank.floor()
    elif interpolation == "higher":
        below = above = rank.ceil()
    else:
        below, above = rank.floor(), rank.ceil()
    mix = None
    if interpolation == "linear":
        mix = rank - below
    elif interpolation == "midpoint":
        mix = torch.full_like(rank, 0.5)
    whole = below.to(torch.int64)
    return whole, whole if above is below else above.to(torch.int64), mix


def quantiles(
    scores: Tensor,
    levels: Sequence[float],
    interpolation: str,
    valid_mask: Tensor | None = None,
    name: str = "",
    *,
    exact: bool = False,
) -> Tensor:
    """`torch.quantile(scores[valid], levels)` of every list [..., M] -> [..., K], detached.

    Found by sorting tails instead of everything, at any length, and exactly over the rows of all
    processes of a group. A list without valid rows and one with a non-finite valid score give an
    unspecified value: see `poison`.

    Args:
        scores: [..., M] float32 or float64.
        levels: K numbers in [0, 1].
        interpolation: as in `torch.quantile`.
        valid_mask: [..., M] bool or None for all.
        name: of the group of processes that hold the rows together, "" for this one.
        exact: ranks in float64, as `torch.quantile` has them in double precision; False for ranks
            that round as the scores do, hence the very value of `torch.quantile` where that works.
    """
    s, m = scores.detach(), scores.shape[-1]
    if name or not size_known(m):
        return sharded_quantiles(s, levels, interpolation, valid_mask, name, exact=exact)
    if m == 0:
        return s.new_zeros((*s.shape[:-1], len(levels)))
    if not s.is_cpu and _better_sorted(levels, m):
        return sorted_quantiles(s, levels, interpolation, valid_mask, exact=exact)
    last: int | Tensor = m - 1
    if valid_mask is not None:
        last = valid_mask.sum(-1, keepdim=True) - 1
        if s.shape != valid_mask.shape:
            s, valid_mask = torch.broadcast_tensors(s, valid_mask)
    upper = [k for k, level in enumerate(levels) if level >= 0.5]
    order = upper + [k for k, level in enumerate(levels) if level < 0.5]
    ranks = _ranks([levels[k] for k in order], last, s, rank_dtype(m, s.dtype, exact))
    below, above, mix = positions(ranks, interpolation)
    found = []
    for side, top in (slice(0, len(upper)), True), (slice(len(upper), None), False):
        asked = [levels[k] for k in order[side]]
        if asked:
            share = 1.0 - min(asked) if top else max(asked)
            rows = min(m, math.ceil(share * (m - 1)) + 3)  # 3 covers the rounding of ranks
            filled = s
            if valid_mask is not None:
                filled = torch.where(valid_mask, s, -math.inf if top else math.inf)
            ordered = filled.topk(rows, dim=-1, largest=top).values
            start = last if top else None
            value = _at_rank(ordered, below[..., side], start)
            if mix is not None:
                other = _at_rank(ordered, above[..., side], start)
                value = torch.lerp(value, other, mix[..., side].to(s.dtype).expand(value.shape))
            found.append(value)
    out = found[0] if len(found) == 1 else torch.cat(found, -1)
    if order != sorted(order):
        out = torch.stack([out[..., order.index(k)] for k in sorted(order)], -1)
    return out


def between_places(
    scores: Tensor, places: Sequence[int], valid_mask: Tensor | None = None, name: str = ""
) -> tuple[Tensor, Tensor]:
    """Halfway between the scores at places k and k + 1 from the top, of the rows that count.

    Args, but for places, K numbers >= 1: as in `quantiles`.

    Returns:
        ([..., K], without gradient, 0 where there is no place k + 1; [..., K] bool, where there is
        one).
    """
    s, m = scores.detach(), scores.shape[-1]
    if valid_mask is not None:
        s, valid_mask = torch.broadcast_tensors(s, valid_mask)
        count = valid_mask.sum(-1, keepdim=True)
    else:
        count = torch.full((*s.shape[:-1], 1), m, dtype=torch.int64, device=s.device)
    count = all_reduce(count, "sum", name)
    enough = torch.cat([count > k for k in places], -1)
    if name or not size_known(m):
        each = [(count - p).double() for k in places for p in (k, k + 1)]
        levels = (torch.cat(each, -1) / (count - 1).clamp(min=1)).clamp(0.0, 1.0)
        pairs = sharded_quantiles(s, levels, "nearest", valid_mask, name, exact=True)
        upper, lower = pairs.unflatten(-1, (-1, 2)).unbind(-1)
    else:
        filled = s if valid_mask is None else torch.where(valid_mask, s, -math.inf)
        top = filled.topk(min(max(places) + 1, m), -1).values
        if not top.shape[-1]:
            top = torch.nn.functional.pad(top, (0, 1))
        last = top.shape[-1] - 1  # beyond it whatever is there

        def at(places: Sequence[int]) -> Tensor:
            inside = [min(k, last) for k in places]
            return torch.cat([top[..., k : k + 1] for k in inside], -1)

        upper, lower = at([k - 1 for k in places]), at(places)
    return torch.where(enough, 0.5 * upper + 0.5 * lower, 0.0), enough


def in_order(filled: Tensor, most: Tensor, *, largest: bool) -> tuple[Tensor, Tensor]:
    """The rows of lists [..., M] in order, the first `most` of them at least, and their places.

    Few are selected where their number may be read at once; else lists are sorted as a whole.

    Args:
        filled: [..., M].
        most: how many rows of every list are looked at.
        largest: whether the largest come first.
    """
    m = filled.shape[-1]
    fake = isinstance(most, FakeTensor)  # it has no values
    if filled.is_cpu and plainly_eager() and most.numel() and not fake:
        rows = max(int(min(most.max().item(), m)), 1)
        if rows <= SELECTED * m:
            value, place = filled.topk(rows, -1, largest)
            return value, place
    value, place = filled.sort(-1, descending=largest)
    return value, place


def order_statistics(scores: Tensor, ranks: Tensor, among: Tensor | None, name: str = "") -> Tensor:
    """[..., K]: the scores at these ranks from below, of the rows that count; no gradient.

    Args:
        scores: [..., M], none NaN.
        ranks: [..., K] int64, counted from 0; out of range they give an unspecified value.
        among: [..., M] bool, rows that count; None for all.
        name: of the group of processes that hold the rows together, "" for this one.
    """
    s = scores.detach()
    if among is not None:
        s, among = torch.broadcast_tensors(s, among)
    if name:
        ones = torch.ones_like(s, dtype=torch.bool) if among is None else among
        last = (all_reduce(ones.sum(-1, keepdim=True), "sum", name) - 1).clamp(min=1)
        levels = (ranks.double() / last).clamp(0.0, 1.0)
        return sharded_quantiles(s, levels, "nearest", among, name, exact=True)
    filled = s if among is None else torch.where(among, s, math.inf)
    ordered, _ = in_order(filled, ranks + 1, largest=False)
    return _at_rank(torch.nn.functional.pad(ordered, (0, 1)), ranks, None)


def at_precision(
    scores: Tensor, pos: Tensor, valid_mask: Tensor | None, precision: float, name: str = ""
) -> tuple[Tensor, Tensor]:
    """Where the last of the places is whose rows have this share of positives, or more.

    Places are counted from the top, between scores that differ: tied rows are in together. The
    threshold is halfway between the rows at the place and below it; where no place reaches the
    precision, it is the largest score, and where all rows are above, 0.

    Args:
        scores: [..., M].
        pos: [..., M] bool, among the rows that count.
        valid_mask: [..., M] bool, rows that count; None for all.
        precision: in (0, 1].
        name: of the group of processes that hold the lists, "" for this one.

    Returns:
        ([..., 1], without gradient; [..., 1] bool, where there is a row below).
    """
    s, pos = torch.broadcast_tensors(scores.detach(), pos)
    if valid_mask is None:
        count = torch.full((*s.shape[:-1], 1), s.shape[-1], dtype=torch.int64, device=s.device)
    else:
        s, pos, valid_mask = torch.broadcast_tensors(s, pos, valid_mask)
        count = valid_mask.sum(-1, keepdim=True)
    if name:
        return _sharded_at_precision(s, pos, valid_mask, precision, count, name)
    filled = s if valid_mask is None else torch.where(valid_mask, s, -math.inf)
    # No place beyond the positives over the precision reaches it; 2 covers rounding.
    most = pos.sum(-1, keepdim=True).double() / precision + 2.0
    ordered, row = in_order(filled, most, largest=True)
    ordered = torch.nn.functional.pad(ordered, (0, 1), value=-math.inf)
    hits = pos.gather(-1, row).cumsum(-1)
    place = torch.arange(1, row.shape[-1] + 1, device=s.device)
    reached = (
        (hits.double() / place >= precision)
        & (ordered[..., :-1] > ordered[..., 1:])
        & (place <= count)
    )
    last = largest(torch.where(reached, place, 0))
    upper, lower = ordered.gather(-1, (last - 1).clamp(min=0)), ordered.gather(-1, last)
    return _between(upper, lower, last, count)


def _between(upper: Tensor, lower: Tensor, place: Tensor, count: Tensor) -> tuple[Tensor, Tensor]:
    """`at_precision` from the scores at a place and below it; at place 0, both are the largest."""
    cut = place < count
    middle = torch.where(place > 0, 0.5 * upper + 0.5 * lower, upper)
    return torch.where(cut, middle, 0.0), cut


def _sharded_at_precision(
    s: Tensor, pos: Tensor, valid: Tensor | None, precision: float, count: Tensor, name: str
) -> tuple[Tensor, Tensor]:
    """`at_precision` over the rows of all processes; the scores of positives alone are gathered."""
    shape, m = s.shape[:-1], s.shape[-1]
    flat = number(shape)
    wanted = torch.full((), precision, dtype=torch.float64, device=s.device)
    hits = torch.ops.proxy_losses.sharded_positives_at(
        s.reshape(flat, m), pos.reshape(flat, m),
        None if valid is None else valid.reshape(flat, m), wanted, name,
    ).reshape(*shape, 1)  # fmt: skip
    count = all_reduce(count, "sum", name)
    # The last place that this many positives suffice for, and rows tied with the next one off it.
    found = hits.double()
    place = (found / precision).floor().long() + 1
    for _ in range(2):
        place = torch.where(found / place.clamp(min=1) < precision, place - 1, place)
    place = place.clamp(min=0).minimum(count)
    lower = order_statistics(s, (count - 1 - place).clamp(min=0), valid, name)
    above = s > lower
    above = above if valid is None else above & valid
    tied = all_reduce(above.sum(-1, keepdim=True), "sum", name)
    place = torch.where(place < count, tied, count)
    upper = order_statistics(s, (count - place.clamp(min=1)).clamp(min=0), valid, name)
    return _between(upper, lower, place, count)


def sorted_quantiles(
    s: Tensor, levels: Sequence[float], interpolation: str, valid_mask: Tensor | None, *,
    exact: bool,
) -> Tensor:  # fmt: skip
    """`quantiles` of lists that are sorted as a whole."""
    m, filled = s.shape[-1], s
    last: int | Tensor = m - 1
    dtype = rank_dtype(m, s.dtype, exact)
    if valid_mask is not None:
        # What does not count comes last, so a rank from below is a place.
        last = valid_mask.sum(-1, keepdim=True, dtype=dtype) - 1
        filled = torch.where(valid_mask, s, math.inf)
    ordered = filled.sort(-1).values  # in the shape of scores and mask together
    below, above, mix = positions(_ranks(levels, last, s, dtype), interpolation)
    value = _at_rank(ordered, below, None)
    if mix is None:
        return value
    return torch.lerp(value, _at_rank(ordered, above, None), mix.to(s.dtype).expand(value.shape))


def _better_sorted(levels: Sequence[float], rows: int) -> bool:
    """Whether a device should sort lists for these quantiles rather than select from their tails.

    A short list is sorted by one kernel, and `topk` sorts what it selects: so long tails, or two,
    cost more than a sort.
    """
    low, high = min(levels), max(levels)
    share = 1.0 - low if low >= 0.5 else high
    return rows <= SHORT_ROWS or low < 0.5 <= high or share > LONG_TAIL


def _ranks(levels: Sequence[float], last: int | Tensor, like: Tensor, dtype: torch.dtype) -> Tensor:
    """[..., K]: ranks from below, as `torch.quantile` rounds them, of lists that end at rank last.

    Numbers meet tensors before any arithmetic among them, lest a compiler bake one in.
    """
    if isinstance(last, Tensor):
        last = last.to(dtype)
    else:
        last = torch.full((1,) * like.dim(), last, dtype=dtype, device=like.device)
    if len(levels) == 1:
        return last * levels[0]
    if not plainly_eager():
        return torch.cat([last * level for level in levels], -1)
    if like.is_cpu:
        return last * torch.tensor(levels, dtype=dtype, device=like.device)
    return torch.cat(torch._foreach_mul([last] * len(levels), list(levels)), -1)


def _at_rank(ordered: Tensor, rank: Tensor, last: int | Tensor | None) -> Tensor:
    """[..., K] from a tail [..., T] in order, counted from below or from rank last downwards."""
    index = (rank if last is None else last - rank).clamp(0, ordered.shape[-1] - 1)
    return ordered.gather(-1, index.expand(*ordered.shape[:-1], index.shape[-1]))


def sharded_quantiles(
    scores: Tensor,
    levels: Sequence[float] | Tensor,
    interpolation: str,
    valid_mask: Tensor | None,
    name: str,
    *,
    exact: bool = False,
) -> Tensor:
    """`quantiles` over the rows of all processes, without gathering scores.

    Levels may be those of each list, [..., K] float64.

    Floats are ordered like integers of their bits. Digit by digit from the top, every rank counts
    its rows per value of the digit, the counts are summed, and each wanted rank descends into the
    digit that holds it: a few sums of small tables, whatever the number of rows.
    """
    s = scores.detach()
    if valid_mask is not None:
        s, valid_mask = torch.broadcast_tensors(s, valid_mask)
    lists, m = s.shape[:-1], s.shape[-1]
    flat = number(lists)
    valid = None if valid_mask is None else valid_mask.reshape(flat, m)
    if isinstance(levels, Tensor):
        wanted = levels.reshape(flat, -1)
    else:
        each = [torch.full((), x, dtype=torch.float64, device=s.device) for x in levels]
        wanted = torch.stack(each)
    out: Tensor = torch.ops.proxy_losses.sharded_quantiles(
        s.reshape(flat, m), valid, wanted, interpolation, exact, name
    )
    return out.reshape(*lists, -1)


def digits(wanted: int, width: int) -> list[tuple[int, int]]:
    """(shift, bits) of each round, for so many ranks wanted in all lists and keys of width bits."""
    bits = MAX_BITS
    while bits > MIN_BITS and (8 * wanted << bits) > TABLE_BYTES:
        bits -= 1
    rounds = -(-width // bits)
    bits = -(-width // rounds)
    return [(max(width - bits * (k + 1), 0), min(bits, width - bits * k)) for k in range(rounds)]


def payload(lists: int, wanted: int, width: int) -> int:
    """Bytes that a rank hands to the sums: wanted ranks per list, keys of width bits."""
    first, *others = (8 * lists << bits for _, bits in digits(lists * wanted, width))
    return first + 8 + wanted * sum(others)


def _keys(scores: Tensor) -> Tensor:
    """Signed integers in the order of the scores; -0.0 counts as 0.0."""
    kind = torch.int32 if scores.dtype == torch.float32 else torch.int64
    return _flip((scores + 0.0).view(kind))


def _flip(bits: Tensor) -> Tensor:
    """Bits of floats to ordered integers, and back."""
    info = torch.iinfo(bits.dtype)
    return bits ^ ((bits >> (info.bits - 1)) & info.max)


def radix_quantiles(
    scores: Tensor,
    valid: Tensor | None,
    levels: Tensor,
    interpolation: str,
    exact: bool,
    group: str,
) -> Tensor:
    """[L, K] of scores [L, M], valid [L, M] and levels [K] or [L, K]."""
    lists, rows = scores.shape
    info = torch.iinfo(torch.int32 if scores.dtype == torch.float32 else torch.int64)
    levels = levels.to(scores.device)
    among = 1 if interpolation in ("lower", "higher", "nearest") else 2
    (shift, bits), *others = digits(lists * levels.shape[-1] * among, info.bits)
    half = 1 << (bits - 1)  # the first digit is signed
    own = scores.new_zeros((lists << bits) + 1, dtype=torch.int64)
    own[-1] = rows
    table, where = own[:-1], torch.arange(lists, device=scores.device)[:, None] << bits
    for begin in range(0, rows, CHUNK):
        part = slice(begin, begin + CHUNK)
        digit = (_keys(scores[:, part]) >> shift).long() + half + where
        one = torch.ones_like(digit) if valid is None else valid[:, part].long()
        table.scatter_add_(0, digit.flatten(), one.flatten())
    total = reduce_now(own, "sum", group) if group else own
    histogram = total[:-1].view(lists, 1, -1)
    count = histogram.sum(-1)
    dtype = rank_dtype(int(total[-1]), scores.dtype, exact)
    ranks = levels.to(dtype) * (count - 1).clamp(min=0).to(dtype)
    below, above, mix = positions(ranks, interpolation)
    rank = torch.cat([below, above], 1) if among == 2 else below  # [L, T]
    prefix, rank = _descend(histogram.expand(-1, rank.shape[1], -1), rank)
    prefix -= half
    keys, place = _candidates(scores, valid, prefix, shift)
    for shift, bits in others:
        before, width = shift + bits, rank.shape[1]
        table = rank.new_zeros(width, lists << bits)
        for t in range(width):
            kept = (keys >> before == prefix[:, t][place]).nonzero()[:, 0]
            digit = (keys[kept] >> shift) & ((1 << bits) - 1)
            index = (place[kept] << bits) + digit
            table[t].scatter_add_(0, index, torch.ones_like(index))
        table = reduce_now(table, "sum", group) if group else table
        digit, rank = _descend(table.view(width, lists, -1).transpose(0, 1), rank)
        prefix = (prefix << bits) + digit
    found = _flip(prefix.to(torch.int32 if info.bits == 32 else torch.int64)).view(scores.dtype)
    if mix is not None:
        low, high = found.chunk(2, 1)
        found = torch.lerp(low, high, mix.to(scores.dtype).expand(low.shape))
    return torch.where(count > 0, found, 0.0)


def _descend(histogram: Tensor, rank: Tensor) -> tuple[Tensor, Tensor]:
    """Digit [L, T] that holds the row of this rank, and the row's rank inside; counts [L, T, D]."""
    upto = histogram.cumsum(-1)
    digit = (upto <= rank[..., None]).sum(-1).clamp(max=histogram.shape[-1] - 1)
    before = (upto - histogram).gather(-1, digit[..., None])[..., 0]
    return digit, rank - before


def _candidates(
    scores: Tensor, valid: Tensor | None, prefix: Tensor, shift: int
) -> tuple[Tensor, Tensor]:
    """Keys of the rows that begin with a wanted prefix of their list, and their lists."""
    found = [(prefix.new_zeros(0), prefix.new_zeros(0))]
    for begin in range(0, scores.shape[1], CHUNK):
        part = slice(begin, begin + CHUNK)
        keys = _keys(scores[:, part])
        top = keys >> shift
        kept = (top[..., None] == prefix[:, None]).any(-1)
        if valid is not None:
            kept &= valid[:, part]
        lists, row = kept.nonzero(as_tuple=True)
        found.append((keys[lists, row].long(), lists))
    keys, lists = (torch.cat(column) for column in zip(*found, strict=True))
    return keys, lists


register(
    "sharded_quantiles", radix_quantiles,
    lambda scores, valid, levels, *how: scores.new_empty(scores.shape[0], levels.shape[-1]),
)  # fmt: skip


def positives_at(
    scores: Tensor, pos: Tensor, valid: Tensor | None, precision: Tensor, group: str
) -> Tensor:
    """[L] int64: most positives above a threshold on one of them whose precision is reached.

    Of scores, pos and valid [L, M]. Every process counts its own rows below each positive of all.
    """
    lists, here = scores.shape[0], torch.arange(scores.shape[0], device=scores.device)
    own, column = pos.nonzero(as_tuple=True)
    keys = scores[own, column]
    if group:
        rows = gather_counts(own.numel(), scores.device, group)
        own, keys = gather_known(own, rows, group), gather_known(keys, rows, group)
    keys, order = keys.sort()
    own, order = own[order].sort(stable=True)
    start = torch.searchsorted(own, torch.stack([here, here + 1]))
    count = start[1] - start[0]
    # The positives of every list from below, infinite where it has no more.
    at = scores.new_full((lists, int(count.max()) if lists else 0), math.inf)
    slot = torch.arange(own.numel(), device=own.device) - start[0][own]
    at[own, slot] = keys[order]
    table = torch.zeros(lists, at.shape[1] + 1, dtype=torch.int64, device=scores.device)
    negative = ~pos if valid is None else valid & ~pos
    for begin in range(0, scores.shape[1], CHUNK):
        part = slice(begin, begin + CHUNK)
        below = torch.searchsorted(at, scores[:, part].contiguous(), right=True)
        table.scatter_add_(1, below, negative[:, part].long())
    table = reduce_now(table, "sum", group) if group else table
    first = torch.searchsorted(at, at)  # of the positives tied with each
    hits = count[:, None] - first
    others = table.flip(1).cumsum(1).flip(1).gather(1, (first + 1).clamp(max=at.shape[1]))
    reached = (hits > 0) & (hits.double() / (hits + others) >= precision)
    return largest(torch.where(reached, hits, 0))[:, 0]


register(
    "sharded_positives_at", positives_at,
    lambda scores, *how: scores.new_empty(scores.shape[0], dtype=torch.int64),
)  # fmt: skip


def spread_floor(upper: Tensor, lower: Tensor, dtype: torch.dtype) -> Tensor:
    """The largest difference upper - lower of two scores of a dtype that may be rounding alone.

    A score is known to half a unit in its last place, so two that are one unit apart may stand for
    the same number. A unit is at most eps times the score, or times the least normal number, and
    two units are more than that.
    """
    info = torch.finfo(dtype)
    return torch.maximum(upper, -lower).clamp(min=info.tiny) * info.eps


def score_spread(scores: Tensor, valid_mask: Tensor | None = None) -> Tensor:
    """Robust spread of the scores, for a temperature in units that grow with them; detached.

    ``(q75 - q25) / 1.349``, which is the standard deviation of normal scores; where more than half
    of the scores are tied and it is 0, their standard deviation; 1 where that is 0 too. A spread
    below the rounding of the scores, one unit in the last place, is none. A list with a non-finite
    score gives NaN. Lists above 65,536 rows are read at an even stride.

    Args:
        scores: [..., M] floating.
        valid_mask: [..., M] bool or None for all.

    Returns:
        [...] > 0 in the dtype of scores (float32 for half input).

    Raises:
        TypeError: wrong dtypes.
        ValueError: shapes that do not fit.

    Example:
        >>> round(score_spread(torch.arange(101.0)).item(), 2)
        37.06
    """
    check_scores(scores, valid_mask=valid_mask)
    return spread_over_group(scores, valid_mask, "")


def spread_over_group(scores: Tensor, valid_mask: Tensor | None, name: str) -> Tensor:
    """`score_spread`; of lists whose rows are on several processes every row is read."""
    rows = scores.shape[-1]
    if not name and size_known(rows) and rows > SPREAD_ROWS:
        stride = -(-rows // SPREAD_ROWS)
        scores = scores[..., ::stride]
        valid_mask = None if valid_mask is None else valid_mask[..., ::stride]
    given: torch.dtype = scores.dtype
    return _spread(scores, valid_mask, given, name)


@full_precision
def _spread(scores: Tensor, valid_mask: Tensor | None, given: torch.dtype, name: str) -> Tensor:
    s = clean(scores.detach(), valid_mask)
    upper, lower = quantiles(s, (0.75, 0.25), "linear", valid_mask, name).split(1, -1)
    # Where it matters half of the scores are at `lower`: then there is nothing to cancel.
    away = s.double() - lower
    here = (
        torch.ones_like(s, dtype=torch.bool) if valid_mask is None else valid_mask.expand(s.shape)
    )
    weight, _ = positive_weight(here, None, torch.float64, name)
    mean = mean_of(away, weight, name)[..., None]
    deviation = mean_of((away - mean).square(), weight, name).sqrt()[..., None].to(s.dtype)
    floor = spread_floor(upper, lower, given)
    width = upper - lower
    narrow = torch.where(deviation > floor, deviation, 1.0)
    found = torch.where(width > floor, width / 1.349, narrow) + poison(s)
    if name:
        broken = largest_over_group(name, found.isnan())[0] > 0
        found = torch.where(broken, math.nan, found)
    return found[..., 0]
