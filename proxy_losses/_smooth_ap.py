"""Smooth average precision."""

from __future__ import annotations

import torch
from torch import Tensor

from . import _numerics as num
from ._checks import check_lists
from ._ranks import soft_ranks


def smooth_ap_counts(
    pos_mask: Tensor, valid_mask: Tensor | None = None, sample_weight: Tensor | None = None
) -> Tensor:
    """Which lists `smooth_ap` is defined for: some positive (of weight > 0) and some negative.

    Args:
        pos_mask: [..., M] bool.
        valid_mask: [..., M] bool or None.
        sample_weight: [..., M] floating or None.

    Returns:
        [...] bool.

    Example:
        >>> smooth_ap_counts(torch.tensor([[True, False], [True, True]]))
        tensor([ True, False])
    """
    valid = torch.ones_like(pos_mask) if valid_mask is None else valid_mask
    pos = pos_mask & valid
    some_negative = (valid & ~pos_mask).any(-1)
    if sample_weight is not None:
        pos = pos & (sample_weight > 0)
    return pos.any(-1) & some_negative


@num.full_precision
def smooth_ap(
    scores: Tensor,
    pos_mask: Tensor,
    tau: float | Tensor,
    *,
    valid_mask: Tensor | None = None,
    sample_weight: Tensor | None = None,
    rtol: float | None = None,
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
        rtol: accuracy asked of the soft ranks, in (0, 1); None takes the dtype's default.

    Returns:
        [...] in the dtype of scores (float32 for half input). A list without positives, without
        negatives or with zero weight on all positives gives 0 with zero gradient
        (`smooth_ap_counts` tells which); a non-finite valid score gives NaN.

    Raises:
        TypeError: wrong dtypes.
        ValueError: shapes that do not fit, tau or rtol out of range.

    Example:
        >>> scores = torch.tensor([0.9, 0.8, 0.3, 0.1])
        >>> pos = torch.tensor([True, False, True, False])
        >>> smooth_ap(scores, pos, 0.01)
        tensor(0.8333)

    Reference: Brown et al., "Smooth-AP: Smoothing the Path Towards Large-Scale Image Retrieval",
    ECCV 2020, arXiv:2007.12163.
    """
    check_lists(scores, pos_mask, valid_mask, sample_weight)
    scores = num.clean(scores, valid_mask)
    ranks = soft_ranks(scores, pos_mask, tau, valid_mask=valid_mask, rtol=rtol)
    pos = pos_mask if valid_mask is None else pos_mask & valid_mask
    precision = ranks.pos / torch.where(pos, ranks.all, 1.0)
    ap = num.weighted_mean(precision, num.positive_weight(pos, sample_weight, precision.dtype))
    return torch.where(smooth_ap_counts(pos_mask, valid_mask, sample_weight), ap, 0.0)
