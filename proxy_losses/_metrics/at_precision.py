"""Recall at the lowest threshold that reaches a precision."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .. import _numerics as num
from .._checks import check_precision
from .._quantiles import at_precision
from .._ranks import How, Lists
from .._ranks.steps import lowest_at
from ..distributed import ProcessGroup, all_reduce
from ._record import THRESHOLD_GRAD, Found, Metric, Option, Settings, of_arguments
from ._steps import Steps
from .recall import recall_defined


def recall_at_precision(
    scores: Tensor, pos_mask: Tensor, tau: float | Tensor, *, precision: float = 0.5,
    threshold_grad: str = "implicit", valid_mask: Tensor | None = None,
    sample_weight: Tensor | None = None, group: ProcessGroup | None = None,
) -> Tensor:  # fmt: skip
    r"""Smooth recall at the lowest threshold of a precision, in [0, 1]; larger is better.

    ``recall = mean over positives i of sigmoid((s_i - theta) / tau)``. Of the places k, counted
    from the top of the valid rows, the last one counts at which ``positives among the first k / k
    >= precision``; theta is halfway between the scores at places k and k + 1. Where no place
    reaches the precision theta is the largest score, so that the value is near 0 and still has a
    gradient. Where all rows together reach it the value is 1, without a gradient: nothing is left
    to gain.

    In the gradient theta moves with the scores, as if it held ``sum_j (y_j - precision)
    sigmoid((s_j - theta) / tau)`` over the valid rows, y_j 1 for a positive and else 0: negatives
    near theta push it up, positives near it pull it down. So the gradient pulls positives up and
    pushes the negatives at the threshold down, and sums to zero over the rows. Where the rows
    around theta alone are nearly as precise as is asked for, that threshold would run away; the
    pull of positives on theta is limited so that it doubles the gradient at most.

    As tau -> 0 it becomes the largest recall among thresholds with this precision, and 0 where
    there is none, unless a positive is tied with the largest score then.

    Args:
        scores: [..., M] floating; lists on the last axis, leading axes are a batch. Half
            precision is computed in, and returned as, float32.
        pos_mask: [..., M] bool, the positives.
        tau: temperature in units of the scores, > 0: a number, a 0-d tensor, or one value per
            list [...].
        precision: the share of positives among the rows above the threshold, in (0, 1]. It is
            that of the list: with more positives than in the data to come, it promises too much.
        threshold_grad: "implicit" for the gradient above; "none" for a theta that is a constant of
            the gradient, see `recall_at_quantile`.
        valid_mask: [..., M] bool, rows that count; None means all.
        sample_weight: [..., M] floating >= 0, weights of the mean over positives; the precision is
            never weighted.
        group: as in `smooth_ap`; the threshold is that of the whole lists. The scores of the
            positives are gathered, and nothing else.

    Returns:
        [...] in the dtype of scores (float32 for half input). A list without positives, or with
        zero weight on all of them, gives 0 with zero gradient (`recall_defined` tells which); one
        without negatives gives 1. A non-finite valid score gives NaN, and so does a tensor tau
        that is not > 0. A second derivative takes the slopes of the threshold as constants.

    Raises:
        TypeError: wrong dtypes.
        ValueError: shapes that do not fit, tau, precision or threshold_grad out of range, a group
            without this process.

    Example:
        >>> scores = torch.tensor([5.0, 4.0, 3.0, 2.0, 1.0, 0.0])
        >>> pos = torch.tensor([True, False, True, False, False, True])
        >>> recall_at_precision(scores, pos, 0.01, precision=0.6)  # two of three rows above 2.5
        tensor(0.6667)
        >>> recall_at_precision(scores, pos, 0.01, precision=0.9)  # the first row alone
        tensor(0.3333)

    Reference: Eban et al., "Scalable Learning of Non-Decomposable Objectives", AISTATS 2017, for
    the objective; for the gradient of the threshold Kumar et al., "Implicit Rate-Constrained
    Optimization of Non-decomposable Objectives", ICML 2021.
    """
    lists = Lists(scores, pos_mask, valid_mask, sample_weight)
    settings = {"precision": precision, "threshold_grad": threshold_grad}
    return of_arguments(RECALL_AT_PRECISION, lists, tau, settings, How(group=group)).value


def _evaluate(
    lists: Lists, tau: float | Tensor, settings: Settings, how: How, *, stats: bool
) -> Found:
    """The formula, over checked lists in full precision."""
    steps, precision = Steps(lists, tau, how), settings["precision"]
    pos, valid, name = steps.lists.pos, lists.valid, steps.name
    if steps.fused:
        theta, cut = lowest_at(steps.lists, precision)
    else:
        theta, cut = at_precision(steps.cleaned, pos, valid, precision, name)
    moves = "precision" if settings["threshold_grad"] == "implicit" else ""
    found = Found(*steps.mean(theta, moves, cut, precision), {})
    if not stats:
        return found
    steps = steps.plain()
    cleaned, broken, some, shown = steps.cleaned, steps.broken, steps.some, steps.shown(cut)
    report = steps.stats(steps.slopes(theta, cut))
    above = (cleaned > theta) | ~shown
    above = above if valid is None else above & valid
    sums = torch.stack([x.sum(-1, keepdim=True) for x in (above, above & pos)])
    rows, hits = all_reduce(sums, "sum", name).unbind()
    share = (hits / rows.clamp(min=1)).to(cleaned.dtype) + broken
    lowered = -cleaned if valid is None else torch.where(valid, -cleaned, -math.inf)
    least = -all_reduce(num.largest(lowered, -math.inf), "max", name)
    at = torch.where(shown, theta + broken, least)
    report["threshold"] = torch.where(some, at, math.nan)[..., 0]
    report["precision"] = torch.where(some, share, math.nan)[..., 0]
    return found._replace(stats=report)


RECALL_AT_PRECISION = Metric(
    name="recall_at_precision",
    module="RecallAtPrecisionLoss",
    title="smooth recall at a precision",
    function=recall_at_precision,
    evaluate=_evaluate,
    defined=recall_defined,
    options=(
        Option(
            "precision", 0.5, "float",
            "the share of positives above the threshold, in (0, 1], in the pool. A pool with more "
            "positives than the data to come reaches it with less.",
        ),
        THRESHOLD_GRAD,
    ),
    check=lambda settings: check_precision(settings["precision"]),
    needs_negative=False,
    examples=({"precision": 0.75},),
    checks_ids=True,
    table="recall at a precision",
    shown="precision",
    counts="have positives",
    note=(
        "A class that no threshold separates to this precision is ranked at its largest score: "
        "begin with a large temperature, or with cross-entropy (`LossWarmupWrapper`)."
    ),
    diagnostics=(
        "precision, the share of positives above the threshold, 0 where none reaches the one asked "
        "for; threshold, the smallest score where all rows are above; saturation, the share of "
        "positives that numerically have no gradient; tau_eff, the temperature in units of the "
        "logits; pos_count, the positives ranked"
    ),
    loss_example="""
    >>> logits = torch.arange(20.0)[:, None]
    >>> targets = (torch.arange(20) >= 16).long()
    >>> targets[19] = 0  # the largest: no threshold is more precise than 3 of 4
    >>> loss, _ = recall_at_precision_loss(logits, targets, None, 0.01, precision=0.75)
    >>> loss.item()
    0.0
    """,
    module_example="""
    >>> loss_fn = RecallAtPrecisionLoss(num_classes=1, precision=0.9, queue_size=0)
    >>> logits = torch.tensor([[2.0], [1.0], [0.0], [-1.0]])
    >>> loss_fn(logits, torch.tensor([1, 0, 1, 0])).item()
    0.5
    """,
)  # fmt: skip
