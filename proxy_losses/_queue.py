"""A memory queue of past rows: an immutable state, taken in and returned new."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, TypeAlias, TypeVar

import torch
from torch import Tensor

from ._checks import (
    check_batch,
    check_bool,
    check_flag,
    check_int,
    check_row_extras,
    check_stored_dtype,
    is_labels,
)
from ._numerics import size_known
from ._old_names import takes_old_names

_NO_GAINS = torch.ones(0, dtype=torch.float32, device="cpu")  # of states saved before there were
T = TypeVar("T", int, Tensor)
NO_QUERY = torch.iinfo(torch.int64).min  # query id of rows stored without one


class QueueState(NamedTuple):
    """The last rows, as many as its capacity. Every field is a tensor, so states stack under vmap.

    One running counter gives both the next slot, enqueued % capacity, and the fill,
    min(enqueued, capacity).

    Save it with ``torch.save(queue._asdict(), file)`` and load it with
    ``QueueState(**torch.load(file))``: `torch.load` refuses classes that it does not know.

    Example:
        >>> init_queue(4, 1).enqueued
        tensor(0)
    """

    logits: Tensor  # [capacity, C] floating
    targets: Tensor  # [capacity] int64 class ids, or [capacity, C] bool labels (multi-label)
    sample_weight: Tensor  # [capacity] float32, 1 when none was given
    iid_mask: Tensor  # [capacity] bool, True when none was given
    enqueued: Tensor  # [] int64, rows ever enqueued; rounded up to a turn by a batch >= capacity
    ignore_index: Tensor  # [] int64, class id of rows that do not count
    query_ids: Tensor  # [capacity] int64 query ids, or [0] until a batch brings some
    label_mask: Tensor  # [capacity, C] bool, known labels; or [0, C] until a batch brings a mask
    gains: Tensor = _NO_GAINS  # [capacity, C] float32, of the positives; or [0] until some come


def init_queue(
    capacity: int, num_classes: int, *, ignore_index: int = -100,
    dtype: torch.dtype = torch.float32, device: torch.device | str | None = None,
    multi_label: bool = False,
) -> QueueState:  # fmt: skip
    """An empty queue.

    Args:
        capacity: rows kept, >= 1.
        num_classes: C >= 1.
        ignore_index: class id of rows that are stored but never count.
        dtype: of the stored logits; float32 keeps half-precision training exact.
        device: where to keep it.
        multi_label: store [C] bool labels instead of a class id. A queue made without turns into
            an empty one that does at the first multi-label batch it stores; inside compiled code
            and vmap, and off the CPU, at the first it is given (one more compile).

    Returns:
        `QueueState`.

    Raises:
        TypeError, ValueError: capacity or num_classes is not a positive integer; a dtype that is
            not floating; multi_label with one class.

    Example:
        >>> queue = enqueue(init_queue(4, 1), torch.ones(3, 1), torch.tensor([0, 1, -100]))
        >>> queue_rows(queue)[2]
        tensor([ True,  True, False, False])
    """
    check_int("capacity", capacity, 1)
    check_int("num_classes", num_classes, 1)
    check_int("ignore_index", ignore_index)
    check_flag("multi_label", multi_label)
    check_stored_dtype(dtype)
    if multi_label and num_classes == 1:
        raise ValueError("multi_label needs num_classes > 1: one class is binary, with class ids")
    if multi_label:
        targets = torch.zeros(capacity, num_classes, dtype=torch.bool, device=device)
    else:
        targets = torch.full((capacity,), ignore_index, dtype=torch.int64, device=device)
    return QueueState(
        logits=torch.zeros(capacity, num_classes, dtype=dtype, device=device),
        targets=targets,
        sample_weight=torch.ones(capacity, dtype=torch.float32, device=device),
        iid_mask=torch.ones(capacity, dtype=torch.bool, device=device),
        enqueued=torch.zeros((), dtype=torch.int64, device=device),
        ignore_index=torch.full((), ignore_index, dtype=torch.int64, device=device),
        query_ids=torch.zeros(0, dtype=torch.int64, device=device),
        label_mask=torch.ones(0, num_classes, dtype=torch.bool, device=device),
        gains=torch.ones(0, dtype=torch.float32, device=device),
    )


def reset_queue(queue: QueueState) -> QueueState:
    """The same queue, empty.

    Args:
        queue: the queue, left unchanged.

    Returns:
        A `QueueState` of the same shapes, dtypes and device.

    Raises:
        TypeError: queue is no `QueueState`.

    Example:
        >>> queue = enqueue(init_queue(4, 1), torch.ones(3, 1), torch.zeros(3, dtype=torch.int64))
        >>> reset_queue(queue).enqueued
        tensor(0)
    """
    check_queue(queue)
    targets = torch.zeros_like(queue.targets)
    return queue._replace(
        logits=torch.zeros_like(queue.logits),
        targets=targets if is_labels(targets) else targets + queue.ignore_index[..., None],
        sample_weight=torch.ones_like(queue.sample_weight),
        iid_mask=torch.ones_like(queue.iid_mask),
        enqueued=torch.zeros_like(queue.enqueued),
        query_ids=torch.full_like(queue.query_ids, NO_QUERY),
        label_mask=torch.ones_like(queue.label_mask),
        gains=torch.ones_like(queue.gains),
    )


@takes_old_names
def enqueue(
    queue: QueueState, logits: Tensor, targets: Tensor, *, sample_weight: Tensor | None = None,
    iid_mask: Tensor | None = None, query_ids: Tensor | None = None,
    label_mask: Tensor | None = None, gains: Tensor | None = None, where: Tensor | None = None,
) -> QueueState:  # fmt: skip
    """Store a batch over the oldest rows; of a batch above capacity the last rows remain.

    Args:
        queue: the queue so far, left unchanged.
        logits: [N, C] floating, stored detached in the queue's dtype.
        targets: [N] class ids, or [N, C] bool labels when C > 1.
        sample_weight: [N] floating or None for 1.
        iid_mask: [N] bool or None for True.
        query_ids: [N] integer query ids or None; rows stored without one are in no query.
        label_mask: [N, C] bool, labels that are known, or None for all; a row does not count for
            a class whose label is unknown.
        gains: [N, C] floating >= 0, gains of the positives, or None for 1; `smooth_ndcg_loss`
            makes targets and gains from relevance grades.
        where: [] bool or None; False stores nothing, as does a batch of 0 rows.

    Returns:
        The new `QueueState`.

    Raises:
        TypeError, ValueError: wrong dtypes or shapes, or class ids given to a multi-label queue.

    Example:
        >>> queue, ids = init_queue(2, 1), torch.tensor([0, 1, 0])
        >>> queue = enqueue(queue, torch.tensor([[1.0], [2.0], [3.0]]), ids)
        >>> queue.logits[:, 0], queue.targets
        (tensor([2., 3.]), tensor([1, 0]))
    """
    check_queue(queue)
    num_classes = queue.logits.shape[1]
    check_batch(logits, targets, num_classes)
    n = logits.shape[0]
    check_row_extras(logits.shape, sample_weight, iid_mask, query_ids, label_mask, gains)
    if where is not None:
        check_bool("where", where)
        if where.dim():
            raise ValueError(f"where must be one bool for the whole batch, got {list(where.shape)}")
    known, turns = size_known(n), is_labels(targets) and not is_labels(queue.targets)
    if known and turns and (not n or _is_false(where)):
        room = _with_room(queue, query_ids, label_mask, gains)
        return QueueState(*(field.clone() for field in room))
    queue = match_queue(queue, targets, query_ids, label_mask, gains)
    with_ids = queue.query_ids.numel() > 0
    if with_ids and query_ids is None:
        query_ids = torch.full_like(logits[:, 0], NO_QUERY, dtype=torch.int64)
    if where is None:
        where = torch.ones_like(queue.enqueued, dtype=torch.bool)
    into = into_slots if plain_slots(n) else into_all_slots
    put, enqueued = into(queue.enqueued, n, queue.logits.shape[0], where)
    return queue._replace(
        logits=put(queue.logits, logits),
        targets=put(queue.targets, targets),
        sample_weight=put(queue.sample_weight, sample_weight),
        iid_mask=put(queue.iid_mask, iid_mask),
        query_ids=put(queue.query_ids, query_ids) if with_ids else queue.query_ids,
        label_mask=(
            put(queue.label_mask, label_mask) if queue.label_mask.numel() else queue.label_mask
        ),
        gains=put(queue.gains, gains) if queue.gains.numel() else queue.gains,
        enqueued=torch.where(where, enqueued, queue.enqueued),
    )


def next_slots(enqueued: Tensor, n: int, capacity: int) -> tuple[int, Tensor]:
    """Of n rows how many to drop, and the slots of the others."""
    if n >= capacity:  # only the last rows survive; they start a new turn at slot 0
        return n - capacity, torch.arange(capacity, device=enqueued.device)
    return 0, (enqueued + torch.arange(n, device=enqueued.device)) % capacity


def counter_after(enqueued: T, n: int, capacity: int) -> T:
    """The counter after n rows in the slots of `next_slots`."""
    if n < capacity:
        return enqueued + n
    last = enqueued + n + capacity - 1
    return last - last % capacity


def plain_slots(n: int) -> bool:
    """Whether to write n rows by `into_slots`.

    Not in compiled code: Inductor (2.13) writes a copy of the queue in place where a caller's
    operation made it, as a reset by `torch.where` does, and the loss of the step then reads it.
    """
    return size_known(n) and not torch.compiler.is_compiling()


Put: TypeAlias = Callable[[Tensor, Tensor | None], Tensor]  # a field and its new rows, None for 1


def into_slots(enqueued: Tensor, n: int, capacity: int, where: Tensor) -> tuple[Put, Tensor]:
    """How to write n rows over the oldest, and the counter after them."""
    drop, slots = next_slots(enqueued, n, capacity)

    def put(field: Tensor, rows: Tensor | None) -> Tensor:
        old = field.index_select(0, slots)
        if rows is None:
            new = torch.ones_like(old)
        else:
            new = rows.detach()[drop:].to(field.device, field.dtype)
        return field.index_copy(0, slots, torch.where(where, new, old))

    return put, counter_after(enqueued, n, capacity)


def into_all_slots(enqueued: Tensor, n: int, capacity: int, where: Tensor) -> tuple[Put, Tensor]:
    """`into_slots` by gathering, for any number of rows; see `plain_slots`.

    Every slot looks up its row, so all slots are written: `into_slots` is cheaper.
    """
    end = enqueued + n
    turn = end + (capacity - 1) - (end + capacity - 1) % capacity
    end = torch.where(torch.zeros_like(end) + n >= capacity, turn, end)
    # The last of the rows that belong to the slot, below 0 if none does.
    row = n - 1 - (end - 1 - torch.arange(capacity, device=end.device)) % capacity
    new = (row >= 0) & where

    def put(field: Tensor, rows: Tensor | None) -> Tensor:
        keep = new.reshape(-1, *[1] * (field.dim() - 1))
        if rows is None:
            return torch.where(keep, torch.ones_like(field), field)
        rows = rows.detach().to(field.device, field.dtype)
        rows = torch.cat([rows, field[:1]])  # a batch may be empty
        return torch.where(keep, rows.index_select(0, row.clamp(min=0)), field)

    return put, end


def check_queue(queue: object) -> None:
    """Raise `TypeError` unless it is a `QueueState`, and not a tuple that was loaded as one."""
    if not isinstance(queue, QueueState):
        raise TypeError(f"queue must be a QueueState, got {type(queue).__name__}")


def _is_false(where: Tensor | None) -> bool:
    """Whether it is known to be False, which it is not while a function is traced.

    Nor off the CPU, where the answer would have to be waited for.
    """
    if where is None or not where.is_cpu or torch.compiler.is_compiling():
        return False
    try:
        return not where
    except RuntimeError:  # inside vmap
        return False


def match_queue(
    queue: QueueState, targets: Tensor, query_ids: Tensor | None, label_mask: Tensor | None,
    gains: Tensor | None,
) -> QueueState:  # fmt: skip
    """The queue with room for what a batch brings; rows with other targets are dropped."""
    queue = _with_room(queue, query_ids, label_mask, gains)
    if is_labels(targets) == is_labels(queue.targets):
        return queue
    if is_labels(queue.targets):
        raise ValueError(
            "this queue stores multi-label targets: expected [N, C] bool, "
            f"got {list(targets.shape)} of {targets.dtype}"
        )
    empty = reset_queue(queue)
    return empty._replace(targets=torch.zeros_like(queue.logits, dtype=torch.bool))


def _with_room(
    queue: QueueState, query_ids: Tensor | None, label_mask: Tensor | None, gains: Tensor | None
) -> QueueState:
    """The queue with room for query_ids, label_mask and gains, if there are any."""
    if query_ids is not None and not queue.query_ids.numel():
        ids = torch.full_like(queue.iid_mask, NO_QUERY, dtype=torch.int64)
        queue = queue._replace(query_ids=ids)
    if label_mask is not None and not queue.label_mask.numel():
        queue = queue._replace(label_mask=torch.ones_like(queue.logits, dtype=torch.bool))
    if gains is not None and not queue.gains.numel():
        queue = queue._replace(gains=torch.ones_like(queue.logits, dtype=torch.float32))
    return queue


def queue_rows(queue: QueueState) -> tuple[Tensor, Tensor, Tensor]:
    """All slots and which of them count.

    Args:
        queue: the queue.

    Returns:
        (logits [capacity, C], targets [capacity] or [capacity, C], valid_mask [capacity] bool);
        slots not yet filled and rows of ignore_index are not valid.

    Raises:
        TypeError: queue is no `QueueState`.

    Example:
        >>> queue = enqueue(init_queue(3, 1), torch.ones(2, 1), torch.tensor([0, 1]))
        >>> logits, targets, valid_mask = queue_rows(queue)
        >>> logits[valid_mask, 0], targets[valid_mask]
        (tensor([1., 1.]), tensor([0, 1]))
    """
    check_queue(queue)
    slots = torch.arange(queue.logits.shape[0], device=queue.enqueued.device)
    valid = slots < queue.enqueued
    if not is_labels(queue.targets):
        valid = valid & (queue.targets != queue.ignore_index)
    return queue.logits, queue.targets, valid
