"""Arithmetic shared by all metrics: precision, masked means, soft steps, moving thresholds."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar

import torch
from torch import Tensor

from .distributed import all_reduce, all_reduce_with_grad, average_grad

F = TypeVar("F", bound=Callable[..., Any])
T = TypeVar("T", float, Tensor, "float | Tensor")

MOST_PULL = 0.5  # of positives on a threshold that holds a precision
FLAT = 1000.0  # where a sigmoid is 0 or 1, and its slope 0, to the last digit


def size_known(size: int) -> bool:
    """Whether Python may branch on it.

    Not on a size that compiled code learns from a gather, nor on one that is open in an export.
    """
    if not torch.compiler.is_compiling():
        return True
    from torch.fx.experimental.symbolic_shapes import guard_or_false, has_static_value

    if torch.compiler.is_exporting():  # a guard would be a limit of the exported program
        return bool(has_static_value(size))
    some = 1 << 20  # any bound that no size meets by its form alone
    return bool(guard_or_false(size < some) or guard_or_false(size >= some))


def number(shape: torch.Size) -> int:
    """How many entries; ``shape.numel()`` makes constants of sizes that a tracer leaves open."""
    count = 1
    for size in shape:
        count = count * size
    return count


def plainly_eager() -> bool:
    """Whether neither a compiler nor a transform of torch.func looks on."""
    if torch.compiler.is_compiling():
        return False
    return not torch._C._are_functorch_transforms_active()


def beside(x: Tensor, like: Tensor, dtype: torch.dtype) -> Tensor:
    """A tensor in this dtype on the device of like.

    One number that lies on the host goes along as an argument of a kernel: a copy would wait for
    the device, and no CUDA graph could hold it.
    """
    if x.device == like.device or x.dim() or not x.is_cpu:
        return x.to(like.device, dtype)
    return (torch.ones((), dtype=dtype, device=like.device) * x).to(dtype)


def lift(x: Tensor) -> Tensor:
    """float16 and bfloat16 to float32; other dtypes unchanged."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def _scores_of(first: Any) -> Any:
    """A first argument that is scores, or the scores in a tuple of lists."""
    return first if isinstance(first, Tensor) else getattr(first, "scores", None)


def _in_autocast(device: str) -> bool:
    """Whether autocast is on; a device that has none, such as meta, raises when asked."""
    available = device == "cpu" or torch.amp.is_autocast_available(device)
    return available and torch.is_autocast_enabled(device)


def outside_autocast(fn: F) -> F:
    """Run fn, whose first argument is a tensor or a tuple of lists, outside autocast."""

    @wraps(fn)
    def run(first: Any, *args: Any, **kwargs: Any) -> Any:
        device = _scores_of(first).device.type
        if not _in_autocast(device):
            return fn(first, *args, **kwargs)
        with torch.autocast(device_type=device, enabled=False):
            return fn(first, *args, **kwargs)

    return run  # type: ignore[return-value]


def full_precision(fn: F) -> F:
    """Run fn outside autocast, the scores lifted: its first argument, or in a tuple of lists."""
    inner = outside_autocast(fn)

    @wraps(fn)
    def run(first: Any, *args: Any, **kwargs: Any) -> Any:
        scores = _scores_of(first)
        if scores is None:  # let fn's own checks name the argument
            return fn(first, *args, **kwargs)
        lifted = lift(scores) if first is scores else first._replace(scores=lift(scores))
        return inner(lifted, *args, **kwargs)

    return run  # type: ignore[return-value]


def clean(scores: Tensor, valid_mask: Tensor | None) -> Tensor:
    """Scores with 0 in the rows that are not valid, so that a NaN there reaches no gradient."""
    return scores if valid_mask is None else torch.where(valid_mask, scores, 0.0)


def sides(pos: Tensor, valid: Tensor | None) -> tuple[Tensor, Tensor]:
    """Positives and negatives [..., M] among the rows that count."""
    if valid is None:
        return pos, ~pos
    pos = pos & valid
    return pos, valid ^ pos


def poison(scores: Tensor) -> Tensor:
    """[..., 1]: 0 where all scores [..., M] of the list are finite, NaN elsewhere; no gradient."""
    return (scores.detach() * 0.0).sum(-1, keepdim=True)


def largest_over_group(name: str, *flags: Tensor) -> tuple[Tensor, ...]:
    """float64: the largest of each [...] over the processes, NaN counted as infinite."""
    wide = torch.stack(torch.broadcast_tensors(*(x.detach().double() for x in flags)))
    return all_reduce(wide.nan_to_num(nan=math.inf), "max", name).unbind()


def clean_lists(
    scores: Tensor, valid_mask: Tensor | None, some: Tensor, name: str = ""
) -> tuple[Tensor, Tensor]:
    """Scores with 0 in rows and in lists that do not count, and what poisons those that do.

    Args:
        scores: [..., M].
        valid_mask: [..., M] bool or None for all.
        some: [..., 1] bool, lists that count.
        name: of the group of processes that hold the lists, "" for this one.

    Returns:
        ([..., M]; [..., 1], NaN where a list that counts has a score that is not finite, else 0).
    """
    cleaned = torch.where(some if valid_mask is None else valid_mask & some, scores, 0.0)
    broken = poison(cleaned)
    if name:
        broken = torch.where(largest_over_group(name, broken)[0] > 0, math.nan, broken)
    return cleaned, broken


def lift_tau(tau: float | Tensor, like: Tensor, name: str = "") -> float | Tensor:
    """A tau of lists as [..., 1] in the dtype of the scores, NaN unless > 0.

    One number as it is: [] for a tensor, in any dtype, which promotes nothing.
    """
    if not isinstance(tau, Tensor):
        return tau
    if tau.dim() or tau.device != like.device:
        tau = beside(tau, like, like.dtype)
    tau = torch.nn.functional.threshold(average_grad(tau, name), 0.0, math.nan)
    return tau[..., None] if tau.dim() else tau


def in_all_lists(tau: T, some: Tensor) -> T:
    """A tau for sums that see all lists, also those that do not count: 1 there."""
    return torch.where(some, tau, 1.0) if isinstance(tau, Tensor) else tau


def largest(values: Tensor, least: float = 0.0) -> Tensor:
    """[..., 1]: the largest over the last axis, `least` of no values; no gradient."""
    values = values.detach()
    if not size_known(values.shape[-1]) or not values.shape[-1]:
        values = torch.nn.functional.pad(values, (0, 1), value=least)
    return values.amax(-1, keepdim=True)


def positive_weight(
    pos: Tensor, sample_weight: Tensor | None, dtype: torch.dtype, name: str = ""
) -> tuple[Tensor, Tensor]:
    """Weights of rows in a mean over positives, and whether a list has any.

    Args:
        pos: [..., M] bool.
        sample_weight: [..., M] floating, read at pos; None for 1.
        dtype: of the weights.
        name: of the group of processes that hold the list, "" for this one.

    Returns:
        (weights [..., M], 0 off pos and at most 1: as large as that they fit in dtype whatever
        their scale, and pos itself for weights of 1; [..., 1] bool, False where they are all 0).
    """
    if sample_weight is None:
        some = pos.any(-1, keepdim=True)
        return pos, all_reduce(some, "max", name) if name else some
    wide = torch.promote_types(sample_weight.dtype, dtype)
    weight = torch.where(pos, sample_weight.to(wide), 0.0)
    top = largest(weight)
    if name:
        top = largest_over_group(name, top)[0].to(top.dtype)
    none = top <= 0  # a NaN is one, and shows
    return (weight / torch.where(none, math.inf, top)).to(dtype), ~none


def mean_of(values: Tensor, weight: Tensor, name: str = "") -> Tensor:
    """[...]: mean of values [..., M] by weights of `positive_weight`; 0 where they are all 0."""
    if not name:
        total = weight.sum(-1, dtype=values.dtype).clamp(min=1.0)
        return (weight * values).sum(-1) / total
    parts = torch.broadcast_tensors(weight * values, weight)
    sums = torch.stack([part.sum(-1, dtype=torch.float64) for part in parts])
    hit, total = all_reduce_with_grad(sums, name).unbind()
    return (hit / total.clamp(min=1.0)).to(values.dtype)


# -- soft steps


def in_widths(away: Tensor, width: float | Tensor) -> Tensor:
    """``away / width`` for a sigmoid: where that is flat the gradient of the width is 0.

    That of the division is 0 times ``away / width ** 2`` there, which may overflow.
    """
    if not isinstance(width, Tensor) or (plainly_eager() and not _is_derived(width)):
        return away / width
    fixed = width.detach()
    far = away / fixed
    # Not a clamp, which gives a NaN the gradient 0.
    far = torch.where(far.abs() > FLAT, far.detach().clamp(-FLAT, FLAT), far)
    return far * (fixed.clamp(max=torch.finfo(far.dtype).max) / width)  # 0 of an infinite one


def step_means(
    scores: Tensor, knots: Tensor, width: float | Tensor, weight: Tensor, some: Tensor,
    name: str = "",
) -> Tensor:  # fmt: skip
    """Mean over rows of the soft steps above knots, ``sigmoid((s_i - knot) / width)``.

    Args:
        scores: [..., M] by `clean_lists`.
        knots: [..., K]; NaN poisons a list that counts.
        width: a number, or [] or [..., 1].
        weight: [..., M], of `positive_weight`.
        some: [..., 1] bool, lists that count; others give 0 with zero gradient, whatever they hold.
        name: of the group of processes that hold the lists, "" for this one.

    Returns:
        [...], their `trapezoid` over the knots.
    """
    knots = torch.where(some, knots, 0.0)
    if weight.dtype == torch.bool:
        weight = (weight & some).to(scores.dtype)
    else:
        weight = torch.where(some, weight, 0.0)
    if isinstance(width, Tensor):
        width = torch.where(some, width.to(scores.dtype), 1.0)
    if knots.shape[-1] == 1:
        return mean_of(torch.sigmoid(in_widths(scores - knots, width)), weight, name)
    if isinstance(width, Tensor):
        width = width[..., None]
    above = torch.sigmoid(in_widths(scores[..., None, :] - knots[..., None], width))
    return trapezoid(mean_of(above, weight[..., None, :], name))


def trapezoid(heights: Tensor) -> Tensor:
    """[...]: mean over evenly spaced knots [..., K], the ends counted half; one is its own mean."""
    knots = heights.shape[-1]
    if knots == 1:
        return heights.squeeze(-1)
    if knots == 2:
        return heights.mean(-1)
    ends = 0.5 * (heights[..., 0] + heights[..., -1])
    return (ends + heights[..., 1:-1].sum(-1)) / (knots - 1)


# -- thresholds that follow the scores


def with_implicit_grad(
    thresholds: Tensor, cleaned: Tensor, among: Tensor | None, width: float | Tensor, some: Tensor,
    name: str = "",
) -> Tensor:  # fmt: skip
    """Thresholds as they are, to the bit, with the gradient of soft quantiles.

    A soft quantile holds ``sum_j sigmoid((s_j - theta) / width)`` over the rows that set it, so
    ``d theta / d s_j`` is the slope of the step of row j over the sum of all slopes (implicit
    function theorem; Kumar et al., "Implicit Rate-Constrained Optimization", ICML 2021). These
    weights sum to one; they are constants of further derivatives.

    Args:
        thresholds: [..., K], without gradient.
        cleaned: scores [..., M] by `clean_lists`.
        among: [..., M] bool, rows that set the thresholds; None for all.
        width: of the soft steps: a number, or [] or [..., 1]; a constant here.
        some: [..., 1] bool, lists that count; others get no gradient, whatever they hold.
        name: of the group of processes that hold the lists, "" for this one.

    Returns:
        [..., K].
    """
    if not name and plainly_eager() and not _is_derived(cleaned):
        return thresholds
    counted = (some if among is None else among & some)[..., None, :]
    rows = cleaned[..., None, :]
    if isinstance(width, Tensor):
        width = width.detach()[..., None] if width.dim() else width.detach()
    far = ((rows.detach() - thresholds.detach()[..., None]) / width).abs()
    # Logarithms: slopes themselves vanish where no row is near.
    slopes = (2.0 * torch.nn.functional.logsigmoid(far) - far).clamp(min=torch.finfo(far.dtype).min)
    slopes = torch.where(counted, slopes, -math.inf)
    if name:
        top = largest_over_group(name, largest(slopes, -math.inf))[0].nan_to_num(neginf=0.0)
        each = (slopes - top.to(slopes.dtype)).exp()
        total = all_reduce(each.sum(-1, keepdim=True, dtype=torch.float64), "sum", name)
        share = torch.where(counted, (each / total).to(each.dtype), 0.0)
        moved = all_reduce_with_grad((share * rows).sum(-1, dtype=torch.float64), name)
        moved = moved.to(cleaned.dtype)
    else:
        moved = (torch.where(counted, slopes.softmax(-1), 0.0) * rows).sum(-1)
    return thresholds + (moved - moved.detach())


def with_precision_grad(
    thresholds: Tensor, cleaned: Tensor, pos: Tensor, among: Tensor | None, precision: float,
    width: float | Tensor, some: Tensor, name: str = "",
) -> Tensor:  # fmt: skip
    """Thresholds as they are, to the bit, with the gradient of those that hold a soft precision.

    Such a threshold holds ``sum_j (y_j - precision) sigmoid((s_j - theta) / width)``, y_j 1 for a
    positive and else 0. With N and P the sums of slopes over negatives and positives, and
    ``x = (1 - precision) P / (precision N)``, its derivative is ``1 / (1 - x)`` times the share of
    N of a negative, and ``-x / (1 - x)`` times the share of P of a positive: negatives push it up,
    positives pull it down. It is stable where x < 1, where the rows at the threshold alone are less
    precise than asked for, as they are below the lowest threshold that reaches it; softly they may
    not be. So x counts as 1/2 at most: what positives pull then at most doubles the gradient of a
    threshold by negatives alone.

    Args:
        thresholds: [..., 1] of `at_precision`, hence no nearer to a positive than to a negative.
        cleaned: scores [..., M] by `clean_lists`.
        pos: [..., M] bool, among the rows that count.
        among: [..., M] bool, rows that count; None for all.
        precision: in (0, 1].
        width: as in `with_implicit_grad`; this and the derivatives are constants here.
        some: [..., 1] bool, lists that count, which have positives and negatives.
        name: of the group of processes that hold the lists, "" for this one.

    Returns:
        [..., 1].
    """
    if not name and plainly_eager() and not _is_derived(cleaned):
        return thresholds
    width = width.detach() if isinstance(width, Tensor) else width
    steps = torch.sigmoid((cleaned.detach() - thresholds) / width)
    slopes = torch.where(some if among is None else among & some, steps * (1.0 - steps), 0.0)
    sums = [x.sum(-1, keepdim=True, dtype=torch.float64) for x in (slopes, slopes * pos)]
    total, pull = all_reduce(torch.stack(sums), "sum", name).unbind() if name else sums
    tiny = torch.finfo(total.dtype).tiny
    # Where N vanishes P does, and no positive has a gradient to share.
    push, pull = (total - pull).clamp(min=tiny), pull.clamp(min=tiny)
    x = ((pull - pull * precision) / (push * precision)).clamp(max=MOST_PULL)
    each = torch.where(pos, x / pull, -1.0 / push) / (x - 1.0)
    moved = slopes.double() * each * cleaned
    moved = all_reduce_with_grad(moved.sum(-1, keepdim=True), name)
    return thresholds + (moved - moved.detach()).to(cleaned.dtype)


def _is_derived(x: Tensor) -> bool:
    """Whether a derivative may be asked of it, in plain eager code."""
    forward = torch.autograd.forward_ad._current_level >= 0
    return forward or (torch.is_grad_enabled() and x.requires_grad)


# -- diagnostics


def rank_stats(
    slopes: Tensor, pos: Tensor, tau: float | Tensor, counts: Tensor, name: str = ""
) -> dict[str, Tensor]:
    """What recall and Smooth-AP report of lists, [...] each: saturation, tau_eff, pos_count.

    Args:
        slopes: [..., M], 1/4 for a positive with the steepest sigmoid.
        pos: [..., M] bool.
        tau: a number or [..., 1].
        counts: [..., 1] bool; NaN where it is False, but for pos_count.
        name: of the group of processes that hold the lists, "" for this one.
    """
    flat = pos & (slopes < 1e-4 * 0.25)
    sums = torch.stack([flat.sum(-1, keepdim=True), pos.expand(flat.shape).sum(-1, keepdim=True)])
    gone, total = all_reduce(sums, "sum", name).unbind()
    share = (gone / total.clamp(min=1)).to(slopes.dtype)
    if isinstance(tau, Tensor):
        used = tau.detach().to(slopes.dtype).expand(share.shape)
    else:
        used = torch.full_like(share, tau)
    floats = {"saturation": share, "tau_eff": used}
    stats = {key: torch.where(counts, x, math.nan)[..., 0] for key, x in floats.items()}
    return {**stats, "pos_count": total[..., 0]}
