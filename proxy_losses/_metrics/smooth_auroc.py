"""Smooth area under the ROC curve."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .. import _numerics as num
from .._checks import check_defined
from .._ranks import How, Lists, pairs_won, rank_slopes, sigmoid_sums, softplus_sums
from ..distributed import ProcessGroup, all_reduce, group_name
from ._record import Found, Metric, Option, Settings, has_both, of_arguments


def smooth_auroc_defined(
    pos_mask: Tensor, valid_mask: Tensor | None = None, sample_weight: Tensor | None = None
) -> Tensor:
    """Which lists `smooth_auroc` is defined for: some positive (of weight > 0) and some negative.

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
        >>> smooth_auroc_defined(torch.tensor([[True, False], [True, True]]))
        tensor([ True, False])
    """
    check_defined(pos_mask, valid_mask, sample_weight)
    return has_both(pos_mask, valid_mask, sample_weight)


def smooth_auroc(
    scores: Tensor,
    pos_mask: Tensor,
    tau: float | Tensor,
    *,
    surrogate: str = "sigmoid",
    valid_mask: Tensor | None = None,
    sample_weight: Tensor | None = None,
    rtol: float | None = None,
    group: ProcessGroup | None = None,
) -> Tensor:
    r"""Smooth area under the ROC curve; larger is better, 1 if all pairs are far apart and right.

    With s_i a positive, s_j a negative and N negatives,

    - "sigmoid": ``AUROC = mean over i of sum_j sigmoid((s_i - s_j) / tau) / N``, in [0, 1]. As
      tau -> 0 it becomes the area under the ROC curve, a tied pair counted half. Wrong pairs far
      apart have no gradient.
    - "logistic": ``1 - mean over i of sum_j log2(1 + exp((s_j - s_i) / tau)) / N``, 1 minus the
      pairwise logistic loss in units of its value at a tie. It is a lower bound of the exact area
      (ties counted as 0), 0 for scores that are all equal, at most 1, and **below 0 without bound**
      where wrong pairs are far apart, so that the loss exceeds 1. As tau -> 0 it is 1 if all pairs
      are right and falls like 1 / tau otherwise. Concave in the scores, with a gradient from every
      wrong pair; its maximiser is consistent for the area (Gao and Zhou).

    Both take time near-linear in M, not positives x negatives.

    Args:
        scores: [..., M] floating; lists on the last axis, leading axes are a batch. Half
            precision is computed in, and returned as, float32.
        pos_mask: [..., M] bool, the positives.
        tau: temperature in units of the scores, > 0: a number, a 0-d tensor, or one value per
            list [...]; 1 is the usual one of "logistic".
        surrogate: "sigmoid" or "logistic".
        valid_mask: [..., M] bool, rows that count; None means all. Rows that do not may hold
            anything, NaN included.
        sample_weight: [..., M] floating >= 0, weights of the mean over positives. Weights of
            negatives and the overall scale have no effect.
        rtol: accuracy asked for, in (0, 1): the sum over j of each i is within about
            rtol * (1 + sum), and the gradient as in `smooth_ap`. None is 1e-6 for float32, 1e-12
            for float64 and 1e-4 for half-precision scores.
        group: as in `smooth_ap`.

    Returns:
        [...] in the dtype of scores (float32 for half input). A list without positives, without
        negatives or with zero weight on all positives gives 0 with zero gradient
        (`smooth_auroc_defined` tells which); a non-finite valid score gives NaN, and so does a
        tensor tau that is not > 0.

    Raises:
        TypeError: wrong dtypes.
        ValueError: shapes that do not fit; tau, surrogate or rtol out of range; tau that differs
            between the processes; a group without this one.

    Example:
        >>> scores = torch.tensor([0.9, 0.8, 0.3, 0.1])
        >>> pos = torch.tensor([True, False, True, False])
        >>> smooth_auroc(scores, pos, 0.01)
        tensor(0.7500)
        >>> smooth_auroc(0 * scores, pos, 1.0, surrogate="logistic")
        tensor(0.)

    Reference: Hanley and McNeil, "The Meaning and Use of the Area under a ROC Curve", Radiology
    1982; Yan et al., "Optimizing Classifier Performance via an Approximation to the
    Wilcoxon-Mann-Whitney Statistic", ICML 2003; Gao and Zhou, "On the Consistency of AUC Pairwise
    Optimization", IJCAI 2015.
    """
    lists = Lists(scores, pos_mask, valid_mask, sample_weight)
    how = How(rtol, group=group)
    return of_arguments(AUROC, lists, tau, {"surrogate": surrogate}, how).value


def _evaluate(
    lists: Lists, tau: float | Tensor, settings: Settings, how: How, *, stats: bool
) -> Found:
    """The formula, over checked lists in full precision."""
    scores, pos, valid, given = lists[:4]
    name, smooth = group_name(how.group), settings["surrogate"] == "sigmoid"
    pos, negative = num.sides(pos, valid)
    count = all_reduce(negative.sum(-1), "sum", name)
    found = None
    if smooth:
        if name and given is not None:  # of one scale on all processes
            given = num.positive_weight(pos, given, scores.dtype, name)[0]
        won, defined = pairs_won(Lists(scores, pos, valid, given), tau, how)
        found = Found(won / count.clamp(min=1), defined, {})
        if not stats:
            return found
    weight, some = num.positive_weight(pos, given, scores.dtype, name)
    some = some & (count > 0)[..., None]
    cleaned, _ = num.clean_lists(scores, valid, some, name)
    width = num.in_all_lists(num.lift_tau(tau, some.double(), name), some)  # unrounded
    units = width[..., 0] if isinstance(width, Tensor) else width
    if found is None:
        each = softplus_sums(cleaned, negative, pos, units, how)
        value = 1.0 - num.mean_of(each, weight, name) / count.clamp(min=1) / math.log(2.0)
        found = Found(torch.where(some[..., 0], value, 0.0), some[..., 0], {})
        if not stats:
            return found
    if smooth:
        slopes = rank_slopes(cleaned, pos, units, valid_mask=valid, group=how.group, mates=False)
    else:  # softplus' = sigmoid
        slopes = sigmoid_sums(
            cleaned.detach(), negative[..., None, :], pos, units, rtol=how.rtol, group=how.group
        )[..., 0, :]  # fmt: skip
    return found._replace(stats=num.rank_stats(slopes, pos, width, some, name))


AUROC = Metric(
    name="smooth_auroc",
    module="AUROCLoss",
    title="smooth area under the ROC curve",
    function=smooth_auroc,
    evaluate=_evaluate,
    defined=smooth_auroc_defined,
    options=(
        Option(
            "surrogate", "sigmoid", "str",
            '"sigmoid", in [0, 1], or "logistic", the pairwise logistic loss in units of its value '
            "at a tie, where the loss may exceed 1; see `smooth_auroc`.",
            choices=("sigmoid", "logistic"),
        ),
    ),
    examples=({}, {"surrogate": "logistic"}),
    table="area under the ROC curve",
    counts="have positives and negatives",
    note=(
        'With surrogate="logistic" a temperature near 1 is usual. Where few rows are positive, a '
        "high area says little of the top of the list: average precision does."
    ),
    diagnostics=(
        "saturation, the share of positives whose pairs with negatives have numerically no "
        "gradient (slopes of the surrogate that sum to less than 1e-4 of the steepest sigmoid's); "
        "tau_eff, the temperature in units of the logits; pos_count, the positives ranked"
    ),
    loss_example="""
    >>> logits = torch.tensor([[2.0], [1.0], [0.0], [-1.0]])
    >>> loss, _ = smooth_auroc_loss(logits, torch.tensor([0, 1, 0, 0]), None, 0.01)
    >>> round(loss.item(), 3)
    0.333
    """,
    module_example="""
    >>> loss_fn = AUROCLoss(num_classes=1, queue_size=256, temperature=0.05)
    >>> logits = torch.tensor([[2.0], [1.0], [0.0]], requires_grad=True)
    >>> loss = loss_fn(logits, torch.tensor([0, 1, 0]))
    >>> round(loss.item(), 3)
    0.5
    """,
)  # fmt: skip
