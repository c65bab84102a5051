"""The queue as a value: against `collections.deque(maxlen)`, under transforms, and its rules."""

from collections import deque

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from proxy_losses import QueueState, enqueue, init_memory, init_queue, queue_rows, reset_queue
from proxy_losses._queue import NO_QUERY

IGNORE = -7


class Batch:
    """Rows with distinct logits: numbered from `first`, hence exact in float32."""

    def __init__(
        self, n: int, classes: int, first: int = 0, *, weight=True, flag=True, group=True,
        labels=False,
    ):  # fmt: skip
        g = torch.Generator().manual_seed(first)
        self.logits = torch.arange(first, first + n * classes, dtype=torch.float32).view(n, classes)
        ids = torch.randint(-1, classes, (n,), generator=g)
        self.targets = torch.where(ids < 0, IGNORE, ids)  # some rows are padding
        if labels:
            self.targets = torch.rand(n, classes, generator=g) < 0.5
        self.extras = {
            "sample_weight": torch.rand(n, generator=g) if weight else None,
            "iid_mask": torch.rand(n, generator=g) < 0.5 if flag else None,
            "query_ids": torch.randint(-9, 9, (n,), generator=g) if group else None,
        }

    def into(self, queue: QueueState, **kwargs) -> QueueState:
        return enqueue(queue, self.logits, self.targets, **self.extras, **kwargs)

    def rows(self) -> list[tuple]:
        """What a queue must remember of each row."""
        n = len(self.logits)
        weight, flag, group = self.extras.values()
        return list(
            zip(
                self.logits.tolist(),
                self.targets.tolist(),
                [1.0] * n if weight is None else weight.tolist(),
                [True] * n if flag is None else flag.tolist(),
                [NO_QUERY] * n if group is None else group.tolist(),
                strict=True,
            )
        )


def remembered(queue: QueueState) -> list[tuple]:
    """The filled slots, oldest first."""
    capacity, count = len(queue.logits), int(queue.enqueued)
    slots = [k % capacity for k in range(max(count - capacity, 0), count)]
    query_ids = queue.query_ids if queue.query_ids.numel() else torch.full((capacity,), NO_QUERY)
    fields = (queue.logits, queue.targets, queue.sample_weight, queue.iid_mask, query_ids)
    return list(zip(*(f[slots].tolist() for f in fields), strict=True))


def snapshot(*tensors: torch.Tensor | None) -> list[torch.Tensor | None]:
    return [None if t is None else t.clone() for t in tensors]


def same(a, b) -> bool:
    return all(x is y or torch.equal(x, y) for x, y in zip(a, b, strict=True))


def with_room(queue: QueueState) -> QueueState:
    """An empty queue that stores query ids."""
    return Batch(0, queue.logits.shape[1], labels=queue.targets.dim() == 2).into(queue)


def sizes(capacity: int) -> st.SearchStrategy[int]:
    edges = [0, 1, capacity - 1, capacity, capacity + 1, 2 * capacity + 1]
    return st.one_of(st.sampled_from(edges), st.integers(0, 3 * capacity))


@given(st.data(), st.integers(1, 6), st.integers(1, 3))
@settings(max_examples=120, deadline=None)  # the first call of a torch op is slow
def test_remembers_what_a_deque_remembers(data, capacity, classes):
    labels = classes > 1 and data.draw(st.booleans(), "multi-label")
    queue = init_queue(capacity, classes, ignore_index=IGNORE, multi_label=labels)
    model, first = deque(maxlen=capacity), 0
    for n in data.draw(st.lists(sizes(capacity), max_size=8), "batch sizes"):
        batch = Batch(
            n, classes, first, labels=labels,
            weight=data.draw(st.booleans()), flag=data.draw(st.booleans()),
            group=data.draw(st.booleans()),
        )  # fmt: skip
        given_tensors = [*queue, batch.logits, batch.targets, *batch.extras.values()]
        before = snapshot(*given_tensors)
        action = data.draw(st.sampled_from(["store"] * 6 + ["reset", "where=False"]))
        if action == "reset":
            new = reset_queue(queue)
            model.clear()
        elif action == "where=False":
            new = batch.into(queue, where=torch.tensor(False))
        else:
            new = batch.into(queue, where=data.draw(st.sampled_from([None, torch.tensor(True)])))
            model.extend(batch.rows())
            assert n < capacity or new.enqueued % capacity == 0  # the next slot is the first
        queue_rows(new)
        assert same(given_tensors, before), "an argument was changed"
        queue, first = new, first + n * classes

        assert remembered(queue) == list(model)
        logits, _, valid = queue_rows(queue)
        assert (logits.shape, valid.shape) == ((capacity, classes), (capacity,))
        counted = [row[0] for row in model if row[1] != IGNORE]
        assert sorted(logits[valid].tolist()) == sorted(counted)


@pytest.mark.parametrize("n", [0, 1, 3, 4])
def test_a_new_state_shares_no_memory_that_changes(n):
    queue = Batch(2, 2).into(init_queue(3, 2))
    new = Batch(n, 2, 100).into(queue)
    changing = [f for f in QueueState._fields if f != "ignore_index"]
    for old_field, new_field in ((getattr(q, f) for q in (queue, new)) for f in changing):
        assert not old_field.numel() or old_field.data_ptr() != new_field.data_ptr()


def test_an_unfilled_slot_never_counts():
    queue = init_queue(3, 1)
    assert queue_rows(queue)[2].tolist() == [False, False, False]
    # The id of padding may be a class id as well: a slot that was never filled is still empty.
    queue = init_queue(3, 2, ignore_index=1)
    queue = enqueue(queue, torch.ones(2, 2), torch.tensor([0, 1]))
    assert queue_rows(queue)[2].tolist() == [True, False, False]


def test_reset_is_a_fresh_queue():
    for labels in (False, True):
        fresh = init_queue(4, 2, ignore_index=IGNORE, dtype=torch.float64, multi_label=labels)
        fresh = with_room(fresh)
        used = Batch(7, 2, labels=labels).into(fresh)
        assert used.enqueued.item() == 8  # two turns
        assert same(reset_queue(used), fresh)
        assert [x.dtype for x in reset_queue(used)] == [x.dtype for x in fresh]


def test_where_is_an_if_on_every_field():
    queue = Batch(3, 2).into(init_queue(4, 2))
    batch = Batch(6, 2, 50)
    assert same(batch.into(queue, where=torch.tensor(False)), queue)
    first = batch.into(init_queue(4, 2), where=torch.tensor(False))
    assert same(first, with_room(init_queue(4, 2)))  # room alone
    assert same(batch.into(queue, where=torch.tensor(True)), batch.into(queue))


@pytest.mark.parametrize("stored", [torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("live", [torch.bfloat16, torch.float32, torch.float64])
def test_rows_are_stored_in_the_dtype_of_the_queue(stored, live):
    x = torch.randn(2, 3, dtype=torch.float64).to(live)
    weight = torch.rand(2, dtype=torch.float64)
    for ids in (torch.int32, torch.uint8, torch.int64):
        targets = torch.tensor([2, 1], dtype=ids)
        queue = enqueue(init_queue(3, 3, dtype=stored), x, targets, sample_weight=weight.to(live))
        assert queue.logits.dtype == stored
        assert torch.equal(queue.logits[:2], x.to(stored))
        assert torch.equal(queue.sample_weight[:2], weight.to(live).float())
        assert (queue.targets.dtype, queue.targets[:2].tolist()) == (torch.int64, [2, 1])


def test_lives_on_the_device_it_was_made_for():
    queue = init_queue(3, 2, device="meta")
    for state in (queue, Batch(2, 2).into(queue), reset_queue(queue)):
        assert {field.device.type for field in state} == {"meta"}


def test_a_queue_of_ids_turns_into_one_of_labels():
    queue, batch = Batch(3, 2).into(init_queue(4, 2)), Batch(3, 2, 50, labels=True)
    turned = batch.into(queue)
    assert turned.targets.dtype == torch.bool
    assert same(turned, batch.into(init_queue(4, 2, multi_label=True)))
    assert queue_rows(turned)[2].tolist() == [True, True, True, False]
    with pytest.raises(ValueError, match="multi-label"):
        Batch(3, 2).into(turned)
    with pytest.raises(ValueError, match="multi_label"):  # one class is binary: ids
        init_queue(3, 1, multi_label=True)


def test_rows_of_labels_have_no_padding():
    batch = Batch(5, 3, labels=True)
    assert queue_rows(batch.into(init_queue(4, 3, ignore_index=0)))[2].all()


@pytest.mark.parametrize(
    ("args", "error", "name"),
    [
        ((0, 1), ValueError, "capacity"),
        ((-1, 1), ValueError, "capacity"),
        ((2.0, 1), TypeError, "capacity"),
        ((True, 1), TypeError, "capacity"),
        ((1, 0), ValueError, "num_classes"),
        ((1, "2"), TypeError, "num_classes"),
    ],
)
def test_init_raises(args, error, name):
    with pytest.raises(error, match=name):
        init_queue(*args)


@pytest.mark.parametrize("make", [init_queue, init_memory])
def test_what_is_stored_is_floating(make):
    for dtype in torch.int64, torch.bool, torch.complex64, torch.float8_e5m2, "float32":
        with pytest.raises(TypeError, match=r"dtype must be a floating-point .*got"):
            make(2, 2, dtype=dtype)
    with pytest.raises(TypeError, match="multi_label must be True or False, got str"):
        init_queue(2, 2, multi_label="no")


def test_a_tuple_is_no_queue():
    for fn in reset_queue, queue_rows:
        with pytest.raises(TypeError, match="queue must be a QueueState, got tuple"):
            fn(tuple(init_queue(2, 2)))


@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        ({"logits": torch.zeros(3)}, ValueError, "logits must be"),
        ({"logits": torch.zeros(3, 4)}, ValueError, "num_classes=2"),
        ({"logits": [[0.0, 1.0]]}, ValueError, "logits must be"),
        ({"logits": torch.zeros(3, 2, dtype=torch.int64)}, TypeError, "logits must be"),
        ({"targets": torch.zeros(2, dtype=torch.int64)}, ValueError, "targets must be"),
        ({"targets": torch.zeros(3, 2, dtype=torch.int64)}, ValueError, "targets must be"),
        ({"targets": torch.zeros(3)}, TypeError, "targets must be"),
        ({"targets": [0, 1, 0]}, TypeError, "targets must be"),
        ({"sample_weight": torch.ones(2)}, ValueError, "sample_weight must match logits dim-0"),
        ({"sample_weight": torch.ones(3, 1)}, ValueError, "sample_weight must match logits dim-0"),
        ({"sample_weight": 1.0}, TypeError, "sample_weight must be"),
        ({"iid_mask": torch.ones(2, dtype=torch.bool)}, ValueError, "iid_mask must match"),
        ({"iid_mask": torch.ones(3)}, TypeError, "iid_mask must be a bool tensor"),
        ({"query_ids": torch.zeros(2, dtype=torch.int64)}, ValueError, "query_ids must match"),
        ({"query_ids": torch.zeros(3)}, TypeError, "query_ids must be integer query ids"),
        ({"query_ids": torch.zeros(3, dtype=torch.bool)}, TypeError, "query_ids must be integer"),
        (
            {"query_ids": torch.zeros(3, dtype=torch.complex64)},
            TypeError,
            "query_ids must be integer",
        ),
        ({"query_ids": [0, 0, 0]}, TypeError, "query_ids must be a tensor, got list"),
        ({"where": torch.tensor([True, False])}, ValueError, "where must be"),
        ({"where": torch.tensor(1.0)}, TypeError, "where must be"),
        ({"where": False}, TypeError, "where must be"),
    ],
)
def test_enqueue_raises(change, error, says):
    rows = 2 if "where" in change else 3  # as many as classes, where a mask of rows would broadcast
    good = {"logits": torch.zeros(rows, 2), "targets": torch.zeros(rows, dtype=torch.int64)}
    with pytest.raises(error, match=says):
        enqueue(init_queue(4, 2), **{**good, **change})
