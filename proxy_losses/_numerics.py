"""Arithmetic shared by all metrics: precision, masked means, quantiles by selection."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar

import torch
from torch import Tensor

from .distributed import all_reduce

F = TypeVar("F", bound=Callable[..., Any])

# float32 counts exactly up to here; torch.quantile refuses longer lists.
_EXACT_FLOAT32 = 1 << 24
# Rows that settle a spread to about 1 %.
_SPREAD_ROWS = 1 << 16


def size_known(size: int) -> bool:
    """Whether Python may branch on it: not on a size that compiled code learns from a gather."""
    if not torch.compiler.is_compiling():
        return True
    from torch.fx.experimental.symbolic_shapes import guard_or_false

    some = 1 << 20  # any bound that no size meets by its form alone
    return bool(guard_or_false(size < some) or guard_or_false(size >= some))


def lift(x: Tensor) -> Tensor:
    """float16 and bfloat16 to float32; other dtypes unchanged."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def full_precision(fn: F) -> F:
    """Run fn, whose first argument is the scores, outside autocast and with the scores lifted."""

    @wraps(fn)
    def run(scores: Tensor, *args: Any, **kwargs: Any) -> Any:
        if not isinstance(scores, Tensor):  # let fn's own checks name the argument
            return fn(scores, *args, **kwargs)
        if not torch.is_autocast_enabled(scores.device.type):
            return fn(lift(scores), *args, **kwargs)
        with torch.autocast(device_type=scores.device.type, enabled=False):
            return fn(lift(scores), *args, **kwargs)

    return run  # type: ignore[return-value]


def clean(scores: Tensor, valid_mask: Tensor | None) -> Tensor:
    """Scores with 0 in the rows that are not valid, so that a NaN there reaches no gradient."""
    return scores if valid_mask is None else torch.where(valid_mask, scores, 0.0)


def poison(scores: Tensor) -> Tensor:
    """[...]: 1 where all scores [..., M] of the list are finite, NaN elsewhere; no gradient."""
    return (scores.detach() * 0.0).sum(-1) + 1.0


def positive_weight(pos: Tensor, sample_weight: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Weight of each row in the mean over positives: 0 off pos, else 1 or its sample_weight."""
    if sample_weight is None:
        return pos.to(dtype)
    return torch.where(pos, sample_weight.to(dtype), 0.0)


def weighted_mean(values: Tensor, weight: Tensor) -> Tensor:
    """Sum of weight * values over the last axis divided by the sum of weight; 0 where that is 0."""
    total = weight.sum(-1)
    return (weight * values).sum(-1) / torch.where(total > 0, total, 1.0)


def positions(
    levels: Tensor, count: Tensor, interpolation: str, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Ranks from below between which a quantile lies, as `torch.quantile` rounds them.

    levels and count broadcast; dtype is what ranks are rounded in, see `rank_dtype`. Returns
    (below, above, mix): the quantile is ``lerp(below, above, mix)``, and mix None says that both
    are the same rank.
    """
    rank = levels.to(dtype) * (count - 1).clamp(min=0).to(dtype)
    if interpolation == "nearest":
        below = above = rank.round()
    else:
        below, above = rank.floor(), rank.ceil()
    if interpolation == "lower":
        above = below
    elif interpolation == "higher":
        below = above
    mix = {"linear": rank - below, "midpoint": torch.full_like(rank, 0.5)}.get(interpolation)
    return below.to(torch.int64), above.to(torch.int64), mix


def rank_dtype(rows: int, dtype: torch.dtype) -> torch.dtype:
    """What ranks in lists of so many rows are rounded in; long ones not in float32."""
    return torch.float64 if rows > _EXACT_FLOAT32 else dtype


def masked_quantile(
    scores: Tensor, q: float, interpolation: str, valid_mask: Tensor | None = None
) -> Tensor:
    """`masked_quantiles` at one level: [..., M] -> [...]."""
    dtype = rank_dtype(scores.shape[-1], scores.dtype)
    level = torch.full((1,), q, dtype=dtype, device=scores.device)
    return masked_quantiles(scores, level, (q, q), interpolation, valid_mask)[..., 0]


def masked_quantiles(
    scores: Tensor,
    levels: Tensor,
    reach: tuple[float, float],
    interpolation: str,
    valid_mask: Tensor | None = None,
) -> Tensor:
    """`torch.quantile(scores[valid], levels)` of every list [..., M] -> [..., K], detached.

    The same rank arithmetic as `torch.quantile`, hence the same value wherever that one works;
    found by sorting the shorter tail that holds all levels instead of everything, at any length.
    A list without valid rows gives 0. Non-finite valid scores give an unspecified value: see
    `poison`.

    Args:
        scores: [..., M].
        levels: [K] floating, in the dtype of scores.
        reach: the lowest and the highest level as Python numbers, which fix the tail.
        interpolation: as in `torch.quantile`.
        valid_mask: [..., M] bool or None.
    """
    s = scores.detach()
    m = s.shape[-1]
    if m == 0:
        return s.new_zeros((*s.shape[:-1], levels.numel()))
    if valid_mask is None:
        count = torch.full((1,) * s.dim(), m, dtype=torch.int64, device=s.device)
    else:
        count = valid_mask.sum(-1, keepdim=True)
        s, valid_mask = torch.broadcast_tensors(s, valid_mask)
    low, high = map(float, reach)
    top = 1.0 - low <= high
    if valid_mask is not None:
        s = s.masked_fill(~valid_mask, -math.inf if top else math.inf)
    share = 1.0 - low if top else high
    tail = min(m, math.ceil(share * (m - 1)) + 3)  # 3 covers the rounding of ranks
    ordered = s.topk(tail, dim=-1, largest=top).values
    below, above, mix = positions(levels, count, interpolation, rank_dtype(m, s.dtype))
    last = (count - 1).clamp(min=0)

    def at_rank(index: Tensor) -> Tensor:
        index = (last - index if top else index).clamp(0, tail - 1)
        return ordered.gather(-1, index.expand(*s.shape[:-1], index.shape[-1]))

    value = at_rank(below)
    if mix is not None:
        value = torch.lerp(value, at_rank(above), mix.to(s.dtype).expand(value.shape))
    return torch.where(count > 0, value, 0.0)


@full_precision
def score_spread(scores: Tensor, valid_mask: Tensor | None = None) -> Tensor:
    """Robust spread of the scores, for a temperature in units that grow with them; detached.

    ``(q75 - q25) / 1.349``, which is the standard deviation of normal scores; where more than half
    of the scores are tied and it is 0, their standard deviation; 1 where that is 0 too. A list
    with a non-finite score gives NaN. Lists above 65,536 rows are read at an even stride.

    Args:
        scores: [..., M] floating.
        valid_mask: [..., M] bool or None for all.

    Returns:
        [...] > 0 in the dtype of scores (float32 for half input).

    Example:
        >>> round(score_spread(torch.arange(101.0)).item(), 2)
        37.06
    """
    s = scores.detach()
    stride = -(-s.shape[-1] // _SPREAD_ROWS) or 1
    s = s[..., ::stride]
    valid_mask = None if valid_mask is None else valid_mask[..., ::stride]
    s = clean(s, valid_mask)
    upper, lower = (masked_quantile(s, q, "linear", valid_mask) for q in (0.75, 0.25))
    weight = torch.ones_like(s) if valid_mask is None else valid_mask.expand(s.shape).to(s.dtype)
    mean = weighted_mean(s, weight)
    deviation = weighted_mean((s - mean[..., None]).square(), weight).sqrt()
    return spread_of(upper, lower, deviation) * poison(s)


def spread_of(upper: Tensor, lower: Tensor, deviation: Tensor) -> Tensor:
    """From quartiles and standard deviation, as `score_spread` says."""
    spread = torch.where(upper > lower, (upper - lower) / 1.349, deviation)
    return torch.where(spread > 0, spread, 1.0)


def saturated_share(slopes: Tensor, pos: Tensor, group: str = "") -> Tensor:
    """Share of positives [..., M] whose slope is under 1e-4 of the 1/4 that sigmoid has at 0."""
    flat = pos & (slopes < 1e-4 * 0.25)
    counts = torch.stack([flat.sum(-1), pos.expand(flat.shape).sum(-1)])
    gone, total = all_reduce(counts, "sum", group)
    share: Tensor = gone / total.clamp(min=1)
    return share
