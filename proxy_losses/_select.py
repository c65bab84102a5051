"""Quantiles of lists that are sharded over processes, exact, without gathering scores.

Floats are ordered like integers of their bits. Digit by digit from the top, every rank counts its
rows per value of the digit, the counts are summed, and each wanted rank descends into the digit
that holds it: a few sums of small tables, whatever the number of rows.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import _numerics as num
from ._effects import LIBRARY, register
from .distributed import all_reduce_with_grad, reduce_now

TABLE_BYTES = 1 << 20  # of one round, where digits can be made small enough
MIN_BITS, MAX_BITS = 4, 11
CHUNK = 1 << 16  # rows of a list per pass: temporaries stay in cache

LIBRARY.define(
    "sharded_quantiles(Tensor scores, Tensor? valid, Tensor levels, str interpolation, str group)"
    " -> Tensor"
)


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


def _quantiles(
    scores: Tensor, valid: Tensor | None, levels: Tensor, interpolation: str, group: str
) -> Tensor:
    """[L, K] of scores [L, M], valid [L, M] and levels [K]."""
    lists, rows = scores.shape
    info = torch.iinfo(torch.int32 if scores.dtype == torch.float32 else torch.int64)
    levels = levels.to(scores.device)
    among = 1 if interpolation in ("lower", "higher", "nearest") else 2
    (shift, bits), *others = digits(lists * levels.numel() * among, info.bits)
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
    dtype = num.rank_dtype(int(total[-1]), scores.dtype)
    below, above, mix = num.positions(levels, count, interpolation, dtype)
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
    "sharded_quantiles", _quantiles,
    lambda scores, valid, levels, *how: scores.new_empty(scores.shape[0], levels.shape[0]),
)  # fmt: skip


def sharded_quantiles(
    scores: Tensor,
    levels: Tensor,
    interpolation: str,
    valid_mask: Tensor | None,
    group: str,
) -> Tensor:
    """`torch.quantile` of every list [..., M] over the rows of all processes, detached.

    The same rank arithmetic, hence the same value. A list without valid rows gives 0. Non-finite
    valid scores give an unspecified value.

    Args:
        scores: [..., M] float32 or float64, M rows of this process.
        levels: [K] floating in [0, 1], the same on all ranks.
        interpolation: as in `torch.quantile`.
        valid_mask: [..., M] bool or None for all.
        group: name of the group (`distributed.group_name`).

    Returns:
        [..., K], alike on all ranks.
    """
    s = scores.detach()
    if valid_mask is not None:
        s, valid_mask = torch.broadcast_tensors(s, valid_mask)
    lists, m = s.shape[:-1], s.shape[-1]
    flat = lists.numel()
    valid = None if valid_mask is None else valid_mask.reshape(flat, m)
    out: Tensor = torch.ops.proxy_losses.sharded_quantiles(
        s.reshape(flat, m), valid, levels.double(), interpolation, group
    )
    return out.reshape(*lists, -1)


def mean_over_group(
    above: Tensor, weight: Tensor, counts: Tensor, poison: Tensor, name: str
) -> tuple[Tensor, Tensor]:
    """The mean over the rows of all ranks, NaN where some rank's poison is, and who counts."""
    parts = ((weight * above).sum(-1, dtype=torch.float64), weight.sum(-1, dtype=torch.float64),
             counts, poison)  # fmt: skip
    parts = torch.broadcast_tensors(*(part.double() for part in parts))
    hit, total, counted, finite = all_reduce_with_grad(torch.stack(parts), name)
    recall = hit / torch.where(total > 0, total, 1.0) * (finite * 0.0 + 1.0)
    return recall.to(above.dtype), counted > 0


def spread_over_group(scores: Tensor, valid_mask: Tensor, name: str) -> Tensor:
    """`score_spread` of lists [..., M] whose rows are on all ranks; every row is read."""
    s = num.clean(num.lift(scores.detach()), valid_mask)
    levels = torch.tensor([0.75, 0.25], dtype=torch.float64, device=s.device)
    upper, lower = sharded_quantiles(s, levels, "linear", valid_mask, name).unbind(-1)
    weight = valid_mask.expand(s.shape).to(s.dtype)
    here = torch.ones_like(weight[..., 0], dtype=torch.bool)

    def mean(values: Tensor) -> Tensor:
        return mean_over_group(values, weight, here, num.poison(s), name)[0]

    deviation = mean((s - mean(s)[..., None]).square()).sqrt()
    return num.spread_of(upper, lower, deviation)
