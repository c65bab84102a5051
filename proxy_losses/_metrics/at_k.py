"""Precision and recall among the first k rows."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from .._checks import check_places
from .._quantiles import between_places
from .._ranks import How, Lists
from ..distributed import ProcessGroup, all_reduce
from ._record import THRESHOLD_GRAD, Found, Metric, Option, Settings, of_arguments
from ._steps import Steps
from .recall import recall_defined


def precision_at_k(
    scores: Tensor, pos_mask: Tensor, tau: float | Tensor, *, k: int | Sequence[int] = 10,
    normalize: str = "k", threshold_grad: str = "implicit", valid_mask: Tensor | None = None,
    sample_weight: Tensor | None = None, group: ProcessGroup | None = None,
) -> Tensor:  # fmt: skip
    r"""Smooth precision among the k largest scores; larger is better.

    ``precision = 1 / k * sum over positives i of sigmoid((s_i - theta) / tau)`` with theta halfway
    between the scores at places k and k + 1 of the valid rows. In the gradient theta moves with
    the scores around it, as in `recall_at_quantile`. As tau -> 0 it becomes the precision at k of
    scores that are not tied there. At a tau that is wide against the scores, more than k positives
    may be in, softly, and the value exceed 1.

    Args:
        scores: [..., M] floating; lists on the last axis, leading axes are a batch. Half
            precision is computed in, and returned as, float32.
        pos_mask: [..., M] bool, the positives.
        tau: temperature in units of the scores, > 0: a number, a 0-d tensor, or one value per
            list [...].
        k: places, >= 1; of several the mean. In a list of k rows or fewer all are in.
        normalize: "k", or "min" to divide by min(k, P) for P positives, so that 1 can be reached.
        threshold_grad: "implicit", or "none" for a theta that is a constant of the gradient; see
            `recall_at_quantile`.
        valid_mask: [..., M] bool, rows that count; None means all.
        sample_weight: [..., M] floating >= 0; the sum over positives is P times their weighted
            mean. The threshold is never weighted.
        group: as in `smooth_ap`; the places are those of the whole lists.

    Returns:
        [...] in the dtype of scores (float32 for half input). A list without positives, or with
        zero weight on all of them, gives 0 with zero gradient (`recall_defined` tells which). A
        non-finite valid score gives NaN, and so does a tensor tau that is not > 0. A second
        derivative takes the slopes of the threshold as constants.

    Raises:
        TypeError: wrong dtypes, a k that is no integer.
        ValueError: shapes that do not fit, tau, k, normalize or threshold_grad out of range, a
            group without this process.

    Example:
        >>> scores = torch.tensor([4.0, 3.0, 2.0, 1.0])
        >>> pos = torch.tensor([True, False, True, False])
        >>> precision_at_k(scores, pos, 0.01, k=1), precision_at_k(scores, pos, 0.01, k=[1, 2])
        (tensor(1.), tensor(0.7500))
    """
    lists = Lists(scores, pos_mask, valid_mask, sample_weight)
    settings = {"k": k, "normalize": normalize, "threshold_grad": threshold_grad}
    return of_arguments(PRECISION_AT_K, lists, tau, settings, How(group=group)).value


def recall_at_k(
    scores: Tensor, pos_mask: Tensor, tau: float | Tensor, *, k: int | Sequence[int] = 10,
    normalize: str = "positives", threshold_grad: str = "implicit",
    valid_mask: Tensor | None = None, sample_weight: Tensor | None = None,
    group: ProcessGroup | None = None,
) -> Tensor:  # fmt: skip
    r"""Smooth recall among the k largest scores; larger is better.

    ``recall = mean over positives i of sigmoid((s_i - theta) / tau)`` with theta halfway between
    the scores at places k and k + 1 of the valid rows. In the gradient theta moves with the scores
    around it, as in `recall_at_quantile`. As tau -> 0 it becomes the recall at k of scores that
    are not tied there.

    Args:
        scores: [..., M] floating; lists on the last axis, leading axes are a batch. Half
            precision is computed in, and returned as, float32.
        pos_mask: [..., M] bool, the positives.
        tau: temperature in units of the scores, > 0: a number, a 0-d tensor, or one value per
            list [...].
        k: places, >= 1; of several the mean. In a list of k rows or fewer all are in.
        normalize: "positives", in [0, 1]; or "min" to divide by min(k, P) for P positives instead
            of P, so that 1 can be reached where P > k; at a wide tau that may exceed 1.
        threshold_grad: "implicit", or "none" for a theta that is a constant of the gradient; see
            `recall_at_quantile`.
        valid_mask: [..., M] bool, rows that count; None means all.
        sample_weight: [..., M] floating >= 0, weights of the mean over positives; the threshold is
            never weighted.
        group: as in `smooth_ap`; the places are those of the whole lists.

    Returns:
        [...] as `precision_at_k`.

    Raises:
        TypeError, ValueError: as `precision_at_k`.

    Example:
        >>> scores = torch.tensor([4.0, 3.0, 2.0, 1.0])
        >>> pos = torch.tensor([True, False, True, False])
        >>> recall_at_k(scores, pos, 0.01, k=2), recall_at_k(scores, pos, 0.01, k=3)
        (tensor(0.5000), tensor(1.))

    Reference: the idea of Patel, Tolias and Matas, "Recall@k Surrogate Loss with Large Batches and
    Similarity Mixup", CVPR 2022, arXiv:2108.11179; a threshold on scores in place of their step on
    soft ranks.
    """
    lists = Lists(scores, pos_mask, valid_mask, sample_weight)
    settings = {"k": k, "normalize": normalize, "threshold_grad": threshold_grad}
    return of_arguments(RECALL_AT_K, lists, tau, settings, How(group=group)).value


def _evaluate(
    lists: Lists, tau: float | Tensor, settings: Settings, how: How, *, stats: bool
) -> Found:
    """The formula, over checked lists in full precision."""
    steps = Steps(lists, tau, how)
    ks, normalize = _places(settings["k"]), settings["normalize"]
    thresholds, cut = between_places(lists.scores, ks, lists.valid, steps.name)
    moves = "quantile" if settings["threshold_grad"] == "implicit" else ""
    number = None
    if normalize != "positives":
        number = all_reduce(steps.lists.pos.sum(-1, keepdim=True), "sum", steps.name)
        number = number.to(lists.scores.dtype)[..., 0]
    each = list(zip(thresholds.split(1, -1), cut.split(1, -1), strict=True))
    means = [steps.mean(theta, moves, cuts) for theta, cuts in each]
    values = [mean for mean, _ in means]
    if number is not None:
        values = [x * _share(number, k, normalize) for x, k in zip(values, ks, strict=True)]
    value = values[0] if len(ks) == 1 else torch.stack(values).mean(0)
    found = Found(value, means[0][1], {})
    if not stats:
        return found
    steps = steps.plain()
    slopes = torch.stack([steps.slopes(theta, cuts) for theta, cuts in each])
    return found._replace(stats=steps.stats(slopes.amax(0)))


def _places(k: int | Sequence[int]) -> list[int]:
    return [int(x) for x in k] if isinstance(k, Sequence) else [int(k)]


def _share(number: Tensor, k: int, normalize: str) -> Tensor:
    """What makes the sum over this number of positives, from their mean, the value."""
    return number / (k if normalize == "k" else number.clamp(min=1, max=k))


def _options(normalize: str, text: str) -> tuple[Option, ...]:
    return (
        Option(
            "k", 10, "int | list[int] | tuple[int, ...]",
            "places, >= 1; of several the mean. In a list of k rows or fewer all are in.",
        ),
        Option("normalize", normalize, "str", text, choices=(normalize, "min"), keyword=True),
        THRESHOLD_GRAD,
    )  # fmt: skip


_RECORD = functools.partial(
    Metric,
    evaluate=_evaluate,
    defined=recall_defined,
    check=lambda settings: check_places("k", settings["k"]),
    needs_negative=False,
    examples=({"k": 3}, {"k": (2, 7), "normalize": "min"}),
    checks_ids=True,
    shown="k",
    counts="have positives",
    note="Mostly for lists of their own, by query_ids.",
    diagnostics=(
        "saturation, the share of positives that numerically have no gradient at any k; tau_eff, "
        "the temperature in units of the logits; pos_count, the positives ranked"
    ),
)

PRECISION_AT_K = _RECORD(
    name="precision_at_k",
    module="PrecisionAtKLoss",
    title="smooth precision among the first k",
    function=precision_at_k,
    options=_options("k", '"k", or "min" to divide by min(k, P) for P positives.'),
    table="precision among the first k",
    loss_example="""
    >>> logits = torch.arange(20.0)[:, None]
    >>> targets = (torch.arange(20) >= 18).long()
    >>> loss, _ = precision_at_k_loss(logits, targets, None, 0.01, k=4)
    >>> loss.item()
    0.5
    """,
    module_example="""
    >>> loss_fn = PrecisionAtKLoss(num_classes=1, k=2, queue_size=0)
    >>> logits = torch.tensor([[2.0], [1.0], [0.0], [-1.0]])
    >>> loss_fn(logits, torch.tensor([1, 0, 0, 0])).item()
    0.5
    """,
)

RECALL_AT_K = _RECORD(
    name="recall_at_k",
    module="RecallAtKLoss",
    title="smooth recall among the first k",
    function=recall_at_k,
    options=_options(
        "positives", '"positives", or "min" to divide by min(k, P) for P positives instead of P.'
    ),
    table="recall among the first k",
    loss_example="""
    >>> logits = torch.arange(20.0)[:, None]
    >>> targets = (torch.arange(20) >= 16).long()
    >>> loss, _ = recall_at_k_loss(logits, targets, None, 0.01, k=1)
    >>> loss.item()
    0.75
    """,
    module_example="""
    >>> loss_fn = RecallAtKLoss(num_classes=1, k=1, queue_size=0)
    >>> logits = torch.tensor([[2.0], [1.0], [0.0], [-1.0]])
    >>> loss_fn(logits, torch.tensor([1, 0, 0, 1])).item()
    0.5
    """,
)
