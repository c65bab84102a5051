"""The losses of a training step as pure functions: ``(loss, new queue)``."""

from __future__ import annotations

from torch import Tensor

from . import _step
from ._checks import REDUCTIONS, check_choice
from ._pool import Batch
from ._queue import QueueState
from ._step import Options


def smooth_ap_loss(
    logits: Tensor,
    targets: Tensor,
    queue: QueueState | None,
    tau: float | Tensor,
    *,
    tau_unit: str = "score",
    reduction: str = "mean",
    ignore_index: int = -100,
    sample_weight: Tensor | None = None,
    query_ids: Tensor | None = None,
    query_shape: tuple[int, int] | None = None,
) -> tuple[Tensor, QueueState | None]:
    """1 - `smooth_ap` of every class over the batch and the queue, and the new queue.

    ``loss = mean over classes c that count of 1 - smooth_ap(scores_c, pos_c)``, each class
    against the rest, over the rows of the batch and of the queue.

    Args:
        logits: [N, C] floating.
        targets: [N] class ids (C > 1: one-vs-rest; C = 1: {0, 1}, any other id counts as
            positive), or [N, C] bool labels when C > 1.
        queue: `QueueState` of rows seen before, or None. It has its own ignore_index.
        tau: temperature > 0; a 0-d tensor when it varies inside a compiled function.
        tau_unit: "score" for tau in units of the logits, "spread" to multiply it by the detached
            `score_spread` of the pool, class by class, so that it keeps its meaning as logits grow.
        reduction: "mean" or "sum" over the classes that count, or "none" for [C] with NaN where
            a class has no positives, no negatives or no weight.
        ignore_index: class id of rows that do not count; they take slots in the queue.
        sample_weight: [N] floating >= 0, or None for 1; see `smooth_ap`.
        query_ids: [N] integer query ids, or None. Each query is a list of its own, and the value
            of a class is the mean over the queries that count. With a queue ids must mean the same
            query from step to step; stored rows without one are left out.
        query_shape: (queries, longest query), at least what the pool holds: needed with query_ids
            inside `torch.compile` and `torch.vmap`; the loss is NaN if it does not suffice. None
            reads it off the data.

    Returns:
        (loss, new queue). The loss is exactly 0 with zero gradient when no class counts; a pool
        of padding alone leaves the queue as it was.

    Raises:
        TypeError, ValueError: wrong dtypes, shapes or ranges.

    Example:
        >>> logits = torch.tensor([[2.0], [1.0], [0.0]], requires_grad=True)
        >>> queue = init_queue(8, 1)
        >>> loss, queue = smooth_ap_loss(logits, torch.tensor([0, 1, 0]), queue, 0.01)
        >>> loss.item(), queue.enqueued.item()
        (0.5, 3)
    """
    options = _checked(reduction, tau_unit, query_shape)
    losses, queue = _step.step(
        lambda pool: _step.smooth_ap_classes(pool, tau, options),
        Batch(logits, targets, sample_weight, None, query_ids),
        queue,
        ignore_index=ignore_index,
    )
    return _step.reduce_classes(losses, reduction), queue


def recall_at_quantile_loss(
    logits: Tensor,
    targets: Tensor,
    queue: QueueState | None,
    tau: float | Tensor,
    *,
    quantile: float = 0.005,
    interpolation: str = "higher",
    tau_unit: str = "score",
    reduction: str = "mean",
    ignore_index: int = -100,
    sample_weight: Tensor | None = None,
    query_ids: Tensor | None = None,
    query_shape: tuple[int, int] | None = None,
) -> tuple[Tensor, QueueState | None]:
    """1 - `recall_at_quantile` of every class over the batch and the queue, and the new queue.

    ``loss = mean over classes c that count of 1 - recall_at_quantile(scores_c, pos_c)``, each class
    against the rest, over the rows of the batch and of the queue.

    Args:
        logits: [N, C] floating.
        targets: [N] class ids or [N, C] bool labels, as in `smooth_ap_loss`.
        queue: `QueueState` of rows seen before, or None.
        tau: temperature > 0; a 0-d tensor when it varies inside a compiled function.
        quantile: the top fraction, in (0, 1); 0.005 is the top 0.5 %.
        interpolation: as in `torch.quantile`.
        tau_unit: as in `smooth_ap_loss`.
        reduction: "mean", "sum" or "none"; a class without positives does not count.
        ignore_index: class id of rows that do not count.
        sample_weight: [N] floating >= 0, or None for 1.
        query_ids: as in `smooth_ap_loss`; the threshold is that of the query.
        query_shape: as in `smooth_ap_loss`.

    Returns:
        (loss, new queue), as `smooth_ap_loss`.

    Raises:
        TypeError, ValueError: wrong dtypes, shapes or ranges.

    Example:
        >>> logits = torch.arange(200.0)[:, None]
        >>> targets = (torch.arange(200) >= 199).long()
        >>> loss, _ = recall_at_quantile_loss(logits, targets, None, 0.01)
        >>> loss.item()
        0.5
    """
    options = _checked(reduction, tau_unit, query_shape)
    losses, queue = _step.step(
        lambda pool: _step.recall_classes(
            pool, tau, options, quantile=quantile, interpolation=interpolation
        ),
        Batch(logits, targets, sample_weight, None, query_ids),
        queue,
        ignore_index=ignore_index,
    )
    return _step.reduce_classes(losses, reduction), queue


def partial_auc_loss(
    logits: Tensor,
    targets: Tensor,
    queue: QueueState | None,
    tau: float | Tensor,
    *,
    alpha: float = 0.0,
    beta: float = 0.005,
    surrogate: str = "trapezoid",
    n_knots: int = 2,
    tau_scale: str = "iqr",
    pos_numerator: str = "pool",
    budget_basis: str = "fpr",
    interpolation: str = "higher",
    reduction: str = "mean",
    ignore_index: int = -100,
    sample_weight: Tensor | None = None,
    iid_mask: Tensor | None = None,
    query_ids: Tensor | None = None,
    query_shape: tuple[int, int] | None = None,
) -> tuple[Tensor, QueueState | None]:
    """1 - `partial_auc` of every class over the batch and the queue, and the new queue.

    ``loss = mean over classes c that count of 1 - partial_auc(scores_c, pos_c)``, each class
    against the rest, over the rows of the batch and of the queue.

    Args:
        logits: [N, C] floating.
        targets: [N] class ids or [N, C] bool labels, as in `smooth_ap_loss`.
        queue: `QueueState` of rows seen before, or None.
        tau: temperature > 0 in units of the reference's spread; a 0-d tensor when it varies inside
            a compiled function.
        alpha: lower false-positive rate of the band.
        beta: upper false-positive rate of the band, the budget; 0.005 is 0.5 % of the negatives.
        surrogate: "trapezoid" or "pairwise", see `partial_auc`.
        n_knots: false-positive rates of the trapezoid.
        tau_scale: "iqr" or "band", see `partial_auc`.
        pos_numerator: "pool", or "live" for the positives of the batch alone.
        budget_basis: "fpr" or "population", see `partial_auc`.
        interpolation: as in `torch.quantile`.
        reduction: "mean", "sum" or "none"; `partial_auc_defined` says which classes count.
        ignore_index: class id of rows that do not count.
        sample_weight: [N] floating >= 0, or None for 1.
        iid_mask: [N] bool, rows that may set the band, or None for all; stored with the rows.
        query_ids: as in `smooth_ap_loss`; the band is that of the query.
        query_shape: as in `smooth_ap_loss`.

    Returns:
        (loss, new queue), as `smooth_ap_loss`.

    Raises:
        TypeError, ValueError: wrong dtypes, shapes or ranges.

    Example:
        >>> logits = torch.arange(1000.0)[:, None]
        >>> targets = (torch.arange(1000) >= 999).long()
        >>> loss, _ = partial_auc_loss(logits, targets, None, 1e-4, surrogate="pairwise")
        >>> loss.item()
        0.0
    """
    options = _checked(reduction, "score", query_shape)
    settings = {
        "alpha": alpha, "beta": beta, "surrogate": surrogate, "n_knots": n_knots,
        "tau_scale": tau_scale, "pos_numerator": pos_numerator, "budget_basis": budget_basis,
        "interpolation": interpolation,
    }  # fmt: skip
    losses, queue = _step.step(
        lambda pool: _step.partial_auc_classes(pool, tau, options, settings=settings),
        Batch(logits, targets, sample_weight, iid_mask, query_ids),
        queue,
        ignore_index=ignore_index,
    )
    return _step.reduce_classes(losses, reduction), queue


def _checked(reduction: str, tau_unit: str, query_shape: tuple[int, int] | None) -> Options:
    check_choice("reduction", reduction, REDUCTIONS)
    options = Options(False, query_shape, tau_unit)
    _step.check_options(options)
    return options
