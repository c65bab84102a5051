"""From a training batch to what is ranked: the queue's rows beside it, one list per class."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ._checks import check_batch, check_row_extras, is_labels
from ._queue import NO_QUERY, QueueState, check_queue, match_queue, queue_rows


class Batch(NamedTuple):
    """The rows of one training step, as the user gives them."""

    logits: Tensor  # [N, C] floating
    targets: Tensor  # [N] class ids or [N, C] bool labels
    sample_weight: Tensor | None = None  # [N] floating, None for 1
    iid_mask: Tensor | None = None  # [N] bool, None for True
    query_ids: Tensor | None = None  # [N] int64 query ids, None for one list of all


class Pool(NamedTuple):
    """The rows a loss ranks: the live batch, then the stored rows; one list per class."""

    scores: Tensor  # [C, M] floating
    pos_mask: Tensor  # [C, M] bool
    valid_mask: Tensor  # [M] bool
    sample_weight: Tensor | None  # [M] floating, None for equal weights
    iid_mask: Tensor | None  # [M] bool, None for all
    live_mask: Tensor | None  # [M] bool, rows of the batch; None for all
    query_ids: Tensor | None  # [M] int64 query ids, None for one list of all


def _wide(targets: Tensor) -> Tensor:
    """Class ids in int64, which holds any ignore_index; bools as they are."""
    return targets if targets.dtype == torch.bool else targets.to(torch.int64)


def positives(targets: Tensor, num_classes: int) -> Tensor:
    """[C, M] bool. Binary: every class id but 0, so that a stray label is not lost."""
    if is_labels(targets):
        return targets.T
    if num_classes == 1:
        return (targets != 0)[None]
    return _wide(targets) == torch.arange(num_classes, device=targets.device)[:, None]


def valid_rows(targets: Tensor, ignore_index: int) -> Tensor:
    """[N] bool. Labels have no padding."""
    return torch.ones_like(targets[:, 0]) if is_labels(targets) else _wide(targets) != ignore_index


def make_pool(batch: Batch, queue: QueueState | None, *, ignore_index: int = -100) -> Pool:
    """Live rows, then stored rows (in the live dtype, without gradient), as one list per class."""
    logits, targets, sample_weight, iid_mask, query_ids = batch
    if queue is not None:
        check_queue(queue)
    check_batch(logits, targets, None if queue is None else queue.logits.shape[1])
    n, num_classes = logits.shape
    check_row_extras(n, sample_weight, iid_mask, query_ids)
    targets = _wide(targets)
    valid, live = valid_rows(targets, ignore_index), None
    if query_ids is not None:
        query_ids = query_ids.to(torch.int64)  # a narrower id could not tell NO_QUERY
    if queue is not None:
        queue = match_queue(queue, targets, query_ids)
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
        if query_ids is not None:
            query_ids = torch.cat([query_ids, queue.query_ids.to(query_ids)])
        live = torch.arange(valid.numel(), device=valid.device) < n
    if query_ids is not None:
        valid = valid & (query_ids != NO_QUERY)
    return Pool(
        logits.T, positives(targets, num_classes), valid, sample_weight, iid_mask, live, query_ids
    )


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
    return take_rows(pool, (keys + 2.0 * chosen).topk(cap).indices)


def take_rows(pool: Pool, rows: Tensor) -> Pool:
    """The pool of these rows; rows [Q, L] makes lists, [C, Q, L] and [Q, L]."""
    return Pool(*(None if x is None else x[..., rows] for x in pool))  # type: ignore[arg-type]
