"""Smooth average precision."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _numerics as num
from .._checks import check_defined, check_lists
from .._ranks import PRECISION, How, Lists, rank_mean, rank_slopes
from ..distributed import ProcessGroup, group_name
from ._record import Found, Metric, Settings, has_both, of_arguments


def smooth_ap_defined(
    pos_mask: Tensor, valid_mask: Tensor | None = None, sample_weight: Tensor | None = None
) -> Tensor:
    """Which lists `smooth_ap` is defined for: some positive (of weight > 0) and some negative.

    Args:
        pos_mask: [..., M] bool.
        valid_mask: [..., M] bool or None.
        sample_weight: [..., M] floating or None.

    Returns:
        [...] bool.

    Raises:
        TypeError: wrong dtypes.
        ValueError: shapes that do not fit.

    Example:
        >>> smooth_ap_defined(torch.tensor([[True, False], [True, True]]))
        tensor([ True, False])
    """
    check_defined(pos_mask, valid_mask, sample_weight)
    return has_both(pos_mask, valid_mask, sample_weight)


def smooth_ap(
    scores: Tensor,
    pos_mask: Tensor,
    tau: float | Tensor,
    *,
    valid_mask: Tensor | None = None,
    sample_weight: Tensor | None = None,
    rtol: float | None = None,
    group: ProcessGroup | None = None,
) -> Tensor:
    r"""Smooth average precision, a differentiable proxy of AP in [0, 1]; larger is better.

    ``AP = mean over positives i of R+_i / R_i`` with the soft ranks
    ``R_i = 1 + sum_{j != i} sigmoid((s_j - s_i) / tau)`` over all valid rows and R+ over the
    positives. As tau -> 0 it becomes the average precision of tie-free scores.

    Args:
        scores: [..., M] floating; lists on the last axis, leading axes are a batch. Half
            precision is computed in, and returned as, float32.
        pos_mask: [..., M] bool, the positives.
        tau: temperature in units of the scores, > 0: a number, a 0-d tensor, or one value per
            list [...]. Pass a tensor when it varies inside a compiled function.
        valid_mask: [..., M] bool, rows that count; None means all. Rows that do not may hold
            anything, NaN included.
        sample_weight: [..., M] floating >= 0, weights of the mean over positives. Weights of
            negatives and the overall scale have no effect; ranks are never weighted.
        rtol: accuracy asked of the value, in (0, 1); the gradient is within 3 rtol of
            max(|gradient|, |a|_2 / (4 tau)), a_i = 1 / (P R_i). (A vanishing gradient has no
            relative accuracy in any method.) None is 1e-6 for float32, 1e-12 for float64 and
            1e-4 for half-precision scores.
        group: processes that hold the lists together, each its own rows [..., M], where M may
            differ or be 0; None for this one alone. All call alike, with equal leading axes and
            tau; the value is that of the whole lists on every rank, and the gradient the one that
            DistributedDataParallel averages (see `all_gather_with_grad`). No second derivatives.

    Returns:
        [...] in the dtype of scores (float32 for half input). A list without positives, without
        negatives or with zero weight on all positives gives 0 with zero gradient
        (`smooth_ap_defined` tells which); a non-finite valid score gives NaN, and so does a tensor
        tau that is not > 0.

    Raises:
        TypeError: wrong dtypes.
        ValueError: shapes that do not fit, tau or rtol out of range, tau that differs between the
            processes, a group without this one.

    Example:
        >>> scores = torch.tensor([0.9, 0.8, 0.3, 0.1])
        >>> pos = torch.tensor([True, False, True, False])
        >>> smooth_ap(scores, pos, 0.01)
        tensor(0.8333)

    Reference: Brown et al., "Smooth-AP: Smoothing the Path Towards Large-Scale Image Retrieval",
    ECCV 2020, arXiv:2007.12163.
    """
    lists = Lists(scores, pos_mask, valid_mask, sample_weight)
    return of_arguments(SMOOTH_AP, lists, tau, {}, How(rtol, group=group)).value


def smooth_ap_saturation(
    scores: Tensor,
    pos_mask: Tensor,
    tau: float | Tensor,
    *,
    valid_mask: Tensor | None = None,
    group: ProcessGroup | None = None,
) -> Tensor:
    """Share of positives whose rank has numerically no gradient: a symptom of too small a tau.

    A positive counts as saturated when ``sum_{j != i} sigmoid'((s_j - s_i) / tau)`` over the valid
    rows is under 1e-4 of what one row at its own score would add, which takes every other row to
    be more than about 10 tau away.

    Args:
        scores: [..., M] floating.
        pos_mask: [..., M] bool, the positives.
        tau: temperature as in `smooth_ap`.
        valid_mask: [..., M] bool, rows that count; None means all.
        group: as in `smooth_ap`.

    Returns:
        [...] in [0, 1], detached; 0 for a list without positives.

    Raises:
        TypeError: wrong dtypes.
        ValueError: shapes that do not fit, tau out of range.

    Example:
        >>> scores, pos = torch.tensor([3.0, 0.0, 0.1]), torch.tensor([True, True, False])
        >>> smooth_ap_saturation(scores, pos, 0.05)
        tensor(0.5000)
    """
    check_lists(scores, pos_mask, valid_mask)
    tau = tau.detach() if isinstance(tau, Tensor) else tau
    lists = Lists(scores.detach(), pos_mask, valid_mask)
    stats: dict[str, Tensor] = num.full_precision(_stats)(lists, tau, How(group=group))
    return stats["saturation"]


def _evaluate(
    lists: Lists, tau: float | Tensor, settings: Settings, how: How, *, stats: bool
) -> Found:
    name, weight = group_name(how.group), lists.weight
    if name and weight is not None:  # of one scale on all processes
        pos = lists.pos if lists.valid is None else lists.pos & lists.valid
        wide = torch.promote_types(weight.dtype, lists.scores.dtype)
        lists = lists._replace(weight=num.positive_weight(pos, weight, wide, name)[0])
    value, defined = rank_mean(lists, tau, PRECISION, how)
    return Found(value, defined, _stats(lists, tau, how, defined) if stats else {})


def _stats(
    lists: Lists, tau: float | Tensor, how: How, defined: Tensor | None = None
) -> dict[str, Tensor]:
    """Diagnostics, NaN where not defined; None for all lists."""
    scores, pos, valid = lists[:3]
    pos, scores = pos if valid is None else pos & valid, num.clean(scores, valid)
    slopes = rank_slopes(scores, pos, tau, valid_mask=valid, group=how.group)
    if isinstance(tau, Tensor):
        tau = num.beside(tau, slopes, slopes.dtype)[..., None]
    every = torch.ones_like(slopes.sum(-1), dtype=torch.bool) if defined is None else defined
    return num.rank_stats(slopes, pos, tau, every[..., None], group_name(how.group))


SMOOTH_AP = Metric(
    name="smooth_ap",
    module="SmoothAPLoss",
    title="Smooth-AP (Brown et al., ECCV 2020)",
    function=smooth_ap,
    evaluate=_evaluate,
    defined=smooth_ap_defined,
    table="average precision",
    counts="have positives and negatives",
    diagnostics=(
        "saturation, the share of positives whose rank has numerically no gradient "
        "(`smooth_ap_saturation`); tau_eff, the temperature in units of the logits; pos_count, "
        "the positives ranked"
    ),
    loss_example="""
    >>> logits = torch.tensor([[2.0], [1.0], [0.0]], requires_grad=True)
    >>> queue = init_queue(8, 1)
    >>> loss, queue = smooth_ap_loss(logits, torch.tensor([0, 1, 0]), queue, 0.01)
    >>> loss.item(), queue.enqueued.item()
    (0.5, 3)
    """,
    module_example="""
    >>> loss_fn = SmoothAPLoss(num_classes=1, queue_size=256, temperature=0.05)
    >>> logits = torch.tensor([[2.0], [1.0], [0.0]], requires_grad=True)
    >>> loss = loss_fn(logits, torch.tensor([0, 1, 0]))
    >>> round(loss.item(), 3)
    0.5
    """,
)
