"""Recall in the top fraction of the scores."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _numerics as num
from .._checks import INTERPOLATIONS, check_defined, check_floating, check_quantile
from .._quantiles import quantiles
from .._ranks import How, Lists
from ..distributed import ProcessGroup
from ._record import (
    THRESHOLD_GRAD,
    Found,
    Metric,
    Option,
    Settings,
    of_arguments,
)
from ._steps import Steps


def recall_defined(
    pos_mask: Tensor, valid_mask: Tensor | None = None, sample_weight: Tensor | None = None
) -> Tensor:
    """Which lists `recall_at_quantile` is defined for: those with a positive of weight > 0.

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
        >>> recall_defined(torch.tensor([[True, False], [False, False]]))
        tensor([ True, False])
    """
    check_defined(pos_mask, valid_mask, sample_weight)
    pos = pos_mask if valid_mask is None else pos_mask & valid_mask
    return num.positive_weight(pos, sample_weight, torch.float32)[1][..., 0]


def recall_at_quantile(
    scores: Tensor, pos_mask: Tensor, tau: float | Tensor, *, quantile: float = 0.005,
    interpolation: str = "higher", threshold_grad: str = "implicit",
    valid_mask: Tensor | None = None, sample_weight: Tensor | None = None,
    group: ProcessGroup | None = None,
) -> Tensor:  # fmt: skip
    r"""Smooth recall among the top fraction `quantile` of the scores, in [0, 1]; larger is better.

    ``theta`` is the (1 - quantile) quantile of all valid scores, and
    ``recall = mean over positives i of sigmoid((s_i - theta) / tau)``. In the gradient theta moves
    with the scores around it, as if it held ``sum_j sigmoid((s_j - theta) / tau)`` over the valid
    rows: ``d theta / d s_j`` is the slope of step j over the sum of slopes. So whatever pulls
    positives up pushes the rows at the threshold down, and shifting all scores changes nothing.

    Args:
        scores: [..., M] floating; lists on the last axis, leading axes are a batch. Half
            precision is computed in, and returned as, float32.
        pos_mask: [..., M] bool, the positives.
        tau: temperature in units of the scores, > 0: a number, a 0-d tensor, or one value per
            list [...].
        quantile: the top fraction, in (0, 1): 0.005 is the top 0.5 % of the scores (the q of
            `torch.quantile` is 1 - quantile).
        interpolation: "linear", "lower", "higher", "midpoint" or "nearest", as in
            `torch.quantile`, whose value this equals wherever that function works; there is no
            limit on M here.
        threshold_grad: "implicit" for the gradient above; "none" for a theta that is a constant of
            the gradient: then only positives get one, nothing holds the other scores down, and
            training needs a share of cross-entropy. The value is the same.
        valid_mask: [..., M] bool, rows that count; None means all.
        sample_weight: [..., M] floating >= 0, weights of the mean over positives; the threshold
            is never weighted.
        group: as in `smooth_ap`; the threshold is that of the whole lists, to the bit.

    Returns:
        [...] in the dtype of scores (float32 for half input). A list without positives, or with
        zero weight on all of them, gives 0 with zero gradient (`recall_defined` tells which); one
        without negatives counts. A non-finite valid score gives NaN, and so does a tensor tau that
        is not > 0. A second derivative takes the slopes as constants.

    Raises:
        TypeError: wrong dtypes.
        ValueError: shapes that do not fit, tau, quantile, interpolation or threshold_grad out of
            range, a group without this process.

    Example:
        >>> scores = torch.arange(100.0)
        >>> pos = scores >= 90  # ten positives, two of them in the top 2 %
        >>> recall_at_quantile(scores, pos, 0.01, quantile=0.02)
        tensor(0.1500)

        The row on the threshold counts half.

    Reference: the surrogate of Boyd et al., "Accuracy at the Top", NeurIPS 2012, with a sigmoid in
    place of the hinge; the gradient of the threshold: Kumar et al., "Implicit Rate-Constrained
    Optimization of Non-decomposable Objectives", ICML 2021.
    """
    lists = Lists(scores, pos_mask, valid_mask, sample_weight)
    return _checked(lists, tau, quantile, interpolation, group, threshold_grad).value


def recall_saturation(
    scores: Tensor, pos_mask: Tensor, tau: float | Tensor, *, quantile: float = 0.005,
    interpolation: str = "higher", valid_mask: Tensor | None = None,
    group: ProcessGroup | None = None,
) -> Tensor:  # fmt: skip
    """Share of positives more than about 10 tau from the threshold: numerically no gradient.

    A positive counts as saturated when ``p_i * (1 - p_i)``, with ``p_i = sigmoid((s_i - theta) /
    tau)`` as in `recall_at_quantile`, is under 1e-4 of the 1/4 that it is at the threshold.

    Args:
        scores: [..., M] floating.
        pos_mask: [..., M] bool, the positives.
        tau: temperature as in `recall_at_quantile`.
        quantile: as in `recall_at_quantile`.
        interpolation: as in `recall_at_quantile`.
        valid_mask: [..., M] bool, rows that count; None means all.
        group: as in `smooth_ap`.

    Returns:
        [...] in [0, 1], detached; 0 for a list without positives.

    Raises:
        TypeError: wrong dtypes.
        ValueError: shapes that do not fit, tau, quantile or interpolation out of range.

    Example:
        >>> scores, pos = torch.tensor([3.0, 1.0, 0.0]), torch.tensor([True, True, False])
        >>> recall_saturation(scores, pos, 0.05, quantile=0.5)  # the threshold is 1
        tensor(0.5000)
    """
    check_floating("scores", scores)
    tau = tau.detach() if isinstance(tau, Tensor) else tau
    lists = Lists(scores.detach(), pos_mask, valid_mask)
    found = _checked(lists, tau, quantile, interpolation, group, stats=True)
    return found.stats["saturation"].nan_to_num(nan=0.0)


def _checked(
    lists: Lists, tau: float | Tensor, quantile: float, interpolation: str,
    group: ProcessGroup | None, threshold_grad: str = "none", *, stats: bool = False,
) -> Found:  # fmt: skip
    settings = {
        "quantile": quantile, "interpolation": interpolation, "threshold_grad": threshold_grad
    }  # fmt: skip
    return of_arguments(RECALL, lists, tau, settings, How(group=group), stats=stats)


def _evaluate(
    lists: Lists, tau: float | Tensor, settings: Settings, how: How, *, stats: bool
) -> Found:
    """The formula, over checked lists in full precision."""
    steps = Steps(lists, tau, how)
    levels = (1.0 - settings["quantile"],)
    theta = quantiles(lists.scores, levels, settings["interpolation"], lists.valid, steps.name)
    moves = "quantile" if settings["threshold_grad"] == "implicit" else ""
    found = Found(*steps.mean(theta, moves), {})
    if not stats:
        return found
    steps = steps.plain()
    return found._replace(stats=steps.stats(steps.slopes(theta)))


RECALL = Metric(
    name="recall_at_quantile",
    module="RecallAtQuantileLoss",
    title="smooth recall in the top fraction of the scores",
    function=recall_at_quantile,
    evaluate=_evaluate,
    defined=recall_defined,
    options=(
        Option(
            "quantile", 0.005, "float",
            "the top fraction, in (0, 1): 0.005 is the top 0.5 % of the pool. Below about "
            "1 / quantile rows in the pool the threshold is its largest score.",
        ),
        Option(
            "interpolation", "higher", "str", "as in `torch.quantile`.",
            published="quantile_interpolation", late=True, choices=INTERPOLATIONS,
        ),
        THRESHOLD_GRAD._replace(kept="none"),
    ),
    check=lambda settings: check_quantile(settings["quantile"]),
    needs_negative=False,
    examples=(
        {"quantile": 0.3, "threshold_grad": "implicit"},
        {"quantile": 0.3, "threshold_grad": "none"},
    ),
    checks_ids=True,
    table="recall in the top fraction",
    shown="quantile",
    counts="have positives",
    note=(
        'Give it threshold_grad="implicit" in new code. The default is "none", as published: only '
        "positives get a gradient then, nothing holds the other scores down, logits run away, and "
        "without a share of cross-entropy the loss does worse than cross-entropy alone, where the "
        "moving threshold was ahead by 5 to 8 points of recall. At final_main_weight=0.75 of "
        "`LossWarmupWrapper`, which suits both, they were about alike."
    ),
    diagnostics=(
        "saturation, the share of positives whose rank has numerically no gradient "
        "(`recall_saturation`); tau_eff, the temperature in units of the logits; pos_count, "
        "the positives ranked"
    ),
    loss_example="""
    >>> logits = torch.arange(200.0)[:, None]
    >>> targets = (torch.arange(200) >= 199).long()
    >>> loss, _ = recall_at_quantile_loss(logits, targets, None, 0.01)
    >>> loss.item()
    0.5
    """,
    module_example="""
    >>> loss_fn = RecallAtQuantileLoss(num_classes=1, quantile=0.5, queue_size=0)
    >>> logits = torch.tensor([[2.0], [1.0], [0.0], [-1.0]])
    >>> loss_fn(logits, torch.tensor([1, 0, 0, 0])).item()
    0.0
    """,
)  # fmt: skip
