"""From a training batch to a loss: pooling with the queue, one-vs-rest masks, reduction."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ._checks import REDUCTIONS, check_batch, check_choice, check_rows, is_labels
from ._queue import QueueState, enqueue, match_targets, queue_rows
from ._recall import recall_and_counts
from ._smooth_ap import smooth_ap_and_counts


class Pool(NamedTuple):
    """The rows a loss ranks: the live batch, then the stored rows; one list per class."""

    scores: Tensor  # [C, M] floating
    pos_mask: Tensor  # [C, M] bool
    valid_mask: Tensor  # [M] bool
    sample_weight: Tensor | None  # [M] floating, None for equal weights
    iid_mask: Tensor | None  # [M] bool, None for all


class ClassLosses(NamedTuple):
    """The losses of all classes, before reduction."""

    per_class: Tensor  # [C] floating, NaN where the class does not count
    counts: Tensor  # [C] bool
    some_valid: Tensor  # [] bool, False when the pool holds padding alone


def _positives(targets: Tensor, num_classes: int) -> Tensor:
    """[C, M] bool. Binary: every class id but 0, so that a stray label is not lost."""
    if is_labels(targets):
        return targets.T
    if num_classes == 1:
        return (targets != 0)[None]
    return targets == torch.arange(num_classes, device=targets.device)[:, None]


def make_pool(
    logits: Tensor,
    targets: Tensor,
    queue: QueueState | None,
    *,
    ignore_index: int = -100,
    sample_weight: Tensor | None = None,
    iid_mask: Tensor | None = None,
) -> Pool:
    """Live rows, then stored rows (in the live dtype, without gradient), as one list per class."""
    check_batch(logits, targets, None if queue is None else queue.logits.shape[1])
    check_rows("sample_weight", sample_weight, logits.shape[0])
    check_rows("iid_mask", iid_mask, logits.shape[0])
    valid = torch.ones_like(targets[:, 0]) if is_labels(targets) else targets != ignore_index
    if queue is not None:
        queue = match_targets(queue, targets)
        old_logits, old_targets, old_valid = queue_rows(queue)
        if sample_weight is None:
            sample_weight = torch.ones_like(valid, dtype=torch.float32)
        if iid_mask is None:
            iid_mask = torch.ones_like(valid)
        logits = torch.cat([logits, old_logits.detach().to(logits)])
        targets = torch.cat([targets, old_targets.to(targets)])
        valid = torch.cat([valid, old_valid.to(valid)])
        sample_weight = torch.cat([sample_weight, queue.sample_weight.to(sample_weight)])
        iid_mask = torch.cat([iid_mask, queue.iid_mask.to(iid_mask)])
    return Pool(logits.T, _positives(targets, logits.shape[1]), valid, sample_weight, iid_mask)


def subsample_pool(pool: Pool, cap: int, *, seed: int) -> Pool:
    """At most cap valid rows: max(1, cap // (2 * classes)) of each class, the rest uniform.

    Deterministic in the seed, on every device and process.
    """
    keys = torch.rand(pool.valid_mask.numel(), generator=torch.Generator().manual_seed(seed))
    keys = torch.where(pool.valid_mask, keys.to(pool.scores.device), -1.0)
    classes = (
        pool.pos_mask if pool.pos_mask.shape[0] > 1 else torch.cat([pool.pos_mask, ~pool.pos_mask])
    )
    quota = max(1, cap // (2 * classes.shape[0]))
    first = torch.where(classes, keys, -1.0).topk(min(quota, keys.numel()), dim=-1)
    chosen = torch.zeros_like(keys).scatter_reduce(
        0, first.indices.flatten(), (first.values >= 0).to(keys.dtype).flatten(), "amax"
    )
    rows = (keys + 2.0 * chosen).topk(cap).indices
    return Pool(
        pool.scores[:, rows],
        pool.pos_mask[:, rows],
        pool.valid_mask[rows],
        None if pool.sample_weight is None else pool.sample_weight[rows],
        None if pool.iid_mask is None else pool.iid_mask[rows],
    )


def reduce_classes(losses: ClassLosses, reduction: str) -> Tensor:
    """'mean' or 'sum' over the classes that count (exact 0 if none does), or 'none' [C].

    'none' keeps NaN for classes that do not count, but gives zeros for a pool of padding alone.
    """
    check_choice("reduction", reduction, REDUCTIONS)
    per_class, counts, some_valid = losses
    if reduction == "none":
        return torch.where(some_valid, per_class, 0.0)
    if counts.numel() == 1:
        return torch.where(counts, per_class, 0.0).reshape(())
    total = torch.where(counts, per_class, 0.0).sum()
    return total / counts.sum().clamp(min=1) if reduction == "mean" else total


def _class_losses(value: Tensor, counts: Tensor, pool: Pool) -> ClassLosses:
    # The value of a class that does not count is 0 with zero gradient: a graph, not a NaN.
    return ClassLosses(torch.where(counts, 1.0 - value, torch.nan), counts, pool.valid_mask.any())


def _by_class(pool: Pool) -> tuple[Tensor, Tensor | None]:
    """The validity and weight of the rows, in the shape of the scores."""
    valid, weight = pool.valid_mask, pool.sample_weight
    shape = pool.pos_mask.shape
    return valid.expand(shape), None if weight is None else weight.expand(shape)


def smooth_ap_classes(pool: Pool, tau: float | Tensor) -> ClassLosses:
    """1 - smooth_ap of every class of the pool."""
    value, counts = smooth_ap_and_counts(pool.scores, pool.pos_mask, tau, *_by_class(pool))
    return _class_losses(value, counts, pool)


def recall_classes(
    pool: Pool, tau: float | Tensor, *, quantile: float = 0.005, interpolation: str = "higher"
) -> ClassLosses:
    """1 - recall_at_quantile of every class of the pool."""
    value, counts = recall_and_counts(
        pool.scores, pool.pos_mask, tau, quantile, interpolation, *_by_class(pool)
    )
    return _class_losses(value, counts, pool)


def step(
    classes: Callable[[Pool], ClassLosses],
    logits: Tensor,
    targets: Tensor,
    queue: QueueState | None,
    *,
    ignore_index: int,
    sample_weight: Tensor | None = None,
    iid_mask: Tensor | None = None,
    store: bool = True,
) -> tuple[ClassLosses, QueueState | None]:
    """Losses of the pool, then the queue with the live rows stored."""
    pool = make_pool(
        logits, targets, queue, ignore_index=ignore_index, sample_weight=sample_weight,
        iid_mask=iid_mask,
    )  # fmt: skip
    losses = classes(pool)
    if queue is None or not store:
        return losses, queue
    new_queue = enqueue(
        queue, logits, targets, sample_weight=sample_weight, iid_mask=iid_mask,
        where=losses.some_valid,
    )  # fmt: skip
    return losses, new_queue


def smooth_ap_loss(
    logits: Tensor,
    targets: Tensor,
    queue: QueueState | None,
    tau: float | Tensor,
    *,
    reduction: str = "mean",
    ignore_index: int = -100,
    sample_weight: Tensor | None = None,
) -> tuple[Tensor, QueueState | None]:
    """1 - `smooth_ap` of every class over the batch and the queue, and the new queue.

    Args:
        logits: [N, C] floating.
        targets: [N] class ids (C > 1: one-vs-rest; C = 1: {0, 1}, any other id counts as
            positive), or [N, C] bool labels when C > 1.
        queue: `QueueState` of rows seen before, or None. It has its own ignore_index.
        tau: temperature > 0; a 0-d tensor when it varies inside a compiled function.
        reduction: "mean" or "sum" over the classes that count, or "none" for [C] with NaN where
            a class has no positives, no negatives or no weight.
        ignore_index: class id of rows that do not count; they take slots in the queue.
        sample_weight: [N] floating >= 0, or None for 1; see `smooth_ap`.

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
    check_choice("reduction", reduction, REDUCTIONS)
    losses, queue = step(
        lambda pool: smooth_ap_classes(pool, tau), logits, targets, queue,
        ignore_index=ignore_index, sample_weight=sample_weight,
    )  # fmt: skip
    return reduce_classes(losses, reduction), queue


def recall_at_quantile_loss(
    logits: Tensor,
    targets: Tensor,
    queue: QueueState | None,
    tau: float | Tensor,
    *,
    quantile: float = 0.005,
    interpolation: str = "higher",
    reduction: str = "mean",
    ignore_index: int = -100,
    sample_weight: Tensor | None = None,
) -> tuple[Tensor, QueueState | None]:
    """1 - `recall_at_quantile` of every class over the batch and the queue, and the new queue.

    Args:
        logits: [N, C] floating.
        targets: [N] class ids or [N, C] bool labels, as in `smooth_ap_loss`.
        queue: `QueueState` of rows seen before, or None.
        tau: temperature > 0; a 0-d tensor when it varies inside a compiled function.
        quantile: the top fraction, in (0, 1); 0.005 is the top 0.5 %.
        interpolation: as in `torch.quantile`.
        reduction: "mean", "sum" or "none"; a class without positives does not count.
        ignore_index: class id of rows that do not count.
        sample_weight: [N] floating >= 0, or None for 1.

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
    check_choice("reduction", reduction, REDUCTIONS)
    losses, queue = step(
        lambda pool: recall_classes(pool, tau, quantile=quantile, interpolation=interpolation),
        logits, targets, queue, ignore_index=ignore_index, sample_weight=sample_weight,
    )  # fmt: skip
    return reduce_classes(losses, reduction), queue
