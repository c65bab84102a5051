"""Batches that must leave no trace: with numbers that are not finite, without rows, refused."""

import copy
import math

import pytest
import torch

import proxy_losses as P
from proxy_losses import enqueue, init_queue

from .makers import FUNCTIONS, PAD, batch, every_loss, warned

pytestmark = pytest.mark.filterwarnings("ignore:.*max_pool_size")
TAU = 0.3


def spoilt(dtype: torch.dtype, at: tuple, value: float):
    """A batch of three classes in which one place holds the value."""
    logits, targets = batch(1, 9, 3)
    logits = logits.detach().to(dtype)
    logits[at] = value
    return logits, targets


# Row 3 is padding; row 0 counts. A class of its own: the others stay finite.
NOT_FINITE = [
    *((torch.float32, (0, 1), x) for x in (math.nan, math.inf, -math.inf)),
    (torch.float32, (slice(None), 2), math.nan),
    (torch.float32, (slice(None),), math.inf),
    (torch.float16, (0, 0), 70000.0),  # inf, as an overflow in half precision gives
    (torch.bfloat16, (0, 0), math.nan),
    (torch.float64, (0, 0), math.nan),
]

PLACES = [case for case in NOT_FINITE if case[0] == torch.float32]


@every_loss
@pytest.mark.parametrize(("dtype", "at", "value"), NOT_FINITE)
def test_a_batch_that_is_not_finite_is_forgotten(make, dtype, at, value):
    module, bad = make(num_classes=3, queue_size=12), spoilt(dtype, at, value)
    _, queue = FUNCTIONS[make](*batch(0, 9, 3), init_queue(12, 3), TAU)
    module(*batch(0, 9, 3))
    twin = copy.deepcopy(module)
    loss, after = FUNCTIONS[make](*bad, queue, TAU)
    assert loss.isnan()
    assert module(*bad).isnan()
    assert all(map(torch.equal, after, queue))
    assert all(map(torch.equal, module.buffers(), twin.buffers()))
    for k in (2, 3):  # as if it had never come
        assert torch.equal(module(*batch(k, 9, 3)), twin(*batch(k, 9, 3)))
    assert all(map(torch.equal, module.buffers(), twin.buffers()))


@every_loss
def test_a_compiled_module_forgets_it(make):
    module = make(num_classes=3, queue_size=12)
    module(*batch(0, 9, 3))  # whether to gather is decided at the first call
    twin = copy.deepcopy(module)
    torch.compiler.reset()
    call = torch.compile(module, backend="aot_eager", fullgraph=True)
    for k, (dtype, at, value) in enumerate(PLACES):
        assert call(*spoilt(dtype, at, value)).isnan()
        assert all(map(torch.equal, module.buffers(), twin.buffers()))
        torch.testing.assert_close(call(*batch(k, 9, 3)), twin(*batch(k, 9, 3)))


@every_loss
def test_a_compiled_function_of_half_logits_forgets_it(make):
    function, tau = FUNCTIONS[make], torch.tensor(TAU)
    torch.compiler.reset()
    call = torch.compile(lambda *rows: function(*rows), backend="aot_eager", fullgraph=True)
    queue = init_queue(12, 3)
    for k in range(3):
        logits, targets = batch(k, 9, 3)
        loss, queue = call(logits.detach().half(), targets, queue, tau)
        assert loss.isfinite()
        loss, after = call(*spoilt(torch.float16, (0, k), 70000.0), queue, tau)
        assert loss.isnan()
        assert all(map(torch.equal, after, queue))


@every_loss
def test_the_classes_of_finite_columns_are_told(make):
    logits, targets = spoilt(torch.float32, (slice(None), 2), math.nan)
    module, clean = make(num_classes=3, queue_size=0), batch(1, 9, 3)
    loss, per_class, valid = module(logits, targets, True)
    assert loss.isnan()
    assert valid.all()
    assert per_class.isnan().tolist() == [False, False, True]
    assert torch.equal(per_class[:2], module(*clean, True)[1][:2])


@every_loss
def test_what_is_too_large_for_the_queue_alone_has_a_loss(make):
    module, twin = (make(num_classes=3, queue_size=12) for _ in "ab")
    large = spoilt(torch.float64, (0, 0), 1e300)
    with pytest.warns(UserWarning, match=r"not finite in torch\.float32"):
        loss = module(*large)
    assert loss.isfinite()
    assert loss.dtype == torch.float64
    assert all(map(torch.equal, module.buffers(), twin.buffers()))
    wide = init_queue(12, 3, dtype=torch.float64)
    _, wide = FUNCTIONS[make](*large, wide, TAU)
    assert wide.enqueued == 9  # it fits in there
    _, narrow = FUNCTIONS[make](*batch(1, 9, 3), init_queue(12, 3, dtype=torch.float16), TAU)
    assert narrow.enqueued == 9
    row = spoilt(torch.float32, (0, 0), 1e5)  # no float16 number
    assert all(map(torch.equal, FUNCTIONS[make](*row, narrow, TAU)[1], narrow))


@every_loss
@pytest.mark.parametrize("bad", [math.nan, math.inf, 1e35, 1e300])
def test_weights_that_are_not_finite(make, bad):
    (logits, targets), weight = batch(1, 9, 3), torch.ones(9, dtype=torch.float64)
    _, queue = FUNCTIONS[make](*batch(0, 9, 3), init_queue(12, 3), TAU)
    padding = weight.clone()
    padding[3], weight[0] = bad, bad
    loss, after = FUNCTIONS[make](logits, targets, queue, TAU, sample_weight=weight)
    assert all(map(torch.equal, after, queue))
    if not math.isfinite(bad):
        assert loss.isnan()
    loss, after = FUNCTIONS[make](logits, targets, queue, TAU, sample_weight=padding)
    assert loss.isfinite()  # in a row that does not count
    assert (after.enqueued - queue.enqueued).item() == 9
    module = make(num_classes=3)
    before = copy.deepcopy(module)
    with pytest.raises(ValueError, match="sample_weight must be finite"):
        module(logits, targets, sample_weight=weight)
    assert all(map(torch.equal, module.buffers(), before.buffers()))


@every_loss
def test_a_large_sum_of_weights_is_finite(make):
    module, weight = make(num_classes=3, queue_size=12), torch.full((9,), 1e30)
    for k in range(3):
        want = (
            copy.deepcopy(module)(*batch(k, 9, 3), sample_weight=torch.ones(9)) if not k else None
        )
        loss = module(*batch(k, 9, 3), sample_weight=weight)
        assert loss.isfinite()
        if want is not None:  # the scale has no effect
            torch.testing.assert_close(loss, want)


@every_loss
@pytest.mark.filterwarnings("ignore:.*was not stored")  # where the NaN is not drawn
def test_a_forgotten_batch_spends_no_draw(make):
    module, twin = (make(num_classes=3, queue_size=12, max_pool_size=10) for _ in "ab")
    plain = [batch(k, 9, 3) for k in range(6)]
    for k, rows in enumerate(plain):
        module(*spoilt(torch.float32, (0, 1), math.nan))
        module(rows[0][:0], rows[1][:0])
        module.eval()(*batch(9 + k, 9, 3))  # nor does evaluating
        assert torch.equal(module.train()(*rows), twin(*rows))
    assert all(map(torch.equal, module.buffers(), twin.buffers()))
    assert module._draws == 6


# -- no rows


@every_loss
@pytest.mark.parametrize("labels", [False, True])
def test_no_rows_change_nothing(make, labels):
    module = make(num_classes=3)
    module(*batch(0, 9, 3))
    before = copy.deepcopy(module)
    targets = torch.zeros(0, 3, dtype=torch.bool) if labels else torch.zeros(0, dtype=torch.int64)
    loss = module(torch.zeros(0, 3, requires_grad=True), targets, sample_weight=torch.ones(0))
    loss.backward()
    assert loss.isfinite()
    assert (loss == 0) == labels  # of ids: the loss of the stored rows
    assert [x.shape for x in module.buffers()] == [x.shape for x in before.buffers()]
    assert all(map(torch.equal, module.buffers(), before.buffers()))


ROWS, LABELS = torch.arange(6.0).view(2, 3), torch.tensor([[True, False, True], [False] * 3])


def test_labels_that_are_not_stored_leave_a_queue_of_ids():
    queue = enqueue(init_queue(4, 3), ROWS, torch.tensor([0, 2]))
    for rows, labels, where in (
        (ROWS, LABELS, torch.tensor(False)),
        (ROWS[:0], LABELS[:0], None),
        (ROWS[:0], LABELS[:0], torch.tensor(True)),
    ):
        kept = enqueue(queue, rows, labels, where=where)
        assert [x.shape for x in kept] == [x.shape for x in queue]
        assert all(map(torch.equal, kept, queue))
        assert all(a.data_ptr() != b.data_ptr() for a, b in zip(kept[:5], queue[:5], strict=True))
    kept = enqueue(queue, ROWS, LABELS, where=torch.tensor(True))
    assert kept.targets.dtype == torch.bool
    assert kept.enqueued == 2
    with pytest.raises(ValueError, match="multi-label"):  # also where there is no row
        enqueue(kept, ROWS[:0], torch.zeros(0, dtype=torch.int64))


def test_under_vmap_a_queue_of_ids_gives_way_to_labels():
    """Its shape cannot depend on a number there: all are of labels, the one not stored is empty."""
    queue, keep = enqueue(init_queue(4, 3), ROWS, torch.tensor([0, 2])), torch.tensor([True, False])
    states = torch.vmap(lambda where: enqueue(queue, ROWS, LABELS, where=where))(keep)
    assert states.targets.shape == (2, 4, 3)
    assert states.enqueued.tolist() == [2, 0]


@every_loss
def test_labels_that_are_not_finite_leave_a_queue_of_ids(make):
    module = make(num_classes=3)
    module(*batch(0, 9, 3))
    before = copy.deepcopy(module)
    assert module(torch.full((3, 3), math.nan), torch.eye(3, dtype=torch.bool)).isnan()
    assert all(map(torch.equal, module.buffers(), before.buffers()))


# -- refused


@every_loss
def test_a_reduction_that_was_overwritten_is_named_before_anything_is_stored(make):
    module = make(num_classes=3)
    module.reduction = "median"
    before = copy.deepcopy(module)
    with pytest.raises(ValueError, match="reduction"):
        module(*batch(0, 9, 3))
    assert all(map(torch.equal, module.buffers(), before.buffers()))


@pytest.mark.parametrize("queue", [tuple(init_queue(4, 1)), init_queue(4, 1)._asdict(), 4])
def test_a_queue_that_was_saved_and_not_rebuilt_is_named(queue):
    with pytest.raises(TypeError, match="queue must be a QueueState, got"):
        P.smooth_ap_loss(torch.zeros(3, 1), torch.tensor([0, 1, 0]), queue, TAU)
    with pytest.raises(TypeError, match="queue must be a QueueState, got"):
        enqueue(queue, torch.zeros(3, 1), torch.tensor([0, 1, 0]))


# -- ids of every integer type, and floats that are none


@every_loss
def test_narrow_class_ids_meet_a_wide_ignore_index(make):
    # In uint8 -100 is 156, in int8 1000 is -24: those ids would have been taken for padding.
    for dtype, stray, ignore in ((torch.uint8, 156, PAD), (torch.int8, -24, 1000)):
        targets = torch.tensor([0, 0, 0, 1, 1, 1, stray, stray], dtype=dtype)
        logits = torch.randn(8, 1, generator=torch.Generator().manual_seed(0))
        wide = make(queue_size=0, ignore_index=ignore)
        if wide._graded and stray < 0:  # no grade
            continue
        losses = []
        texts = warned(lambda: losses.extend(wide(logits, t) for t in (targets, targets.long())))  # noqa: B023
        assert all("expects targets in" in text for text in texts)
        assert torch.equal(*losses)
        got, want = (
            FUNCTIONS[make](logits, t, None, TAU, ignore_index=ignore)[0]
            for t in (targets, targets.long())
        )
        assert torch.equal(got, want)


@every_loss
@pytest.mark.parametrize("dtype", [torch.uint16, torch.uint32, torch.uint64, torch.int16])
def test_class_ids_of_any_integer_type(make, dtype):
    logits, targets = batch(0, 9, 3)
    targets = targets.clamp(min=0)
    for module in (make(num_classes=3), make(num_classes=3, queue_size=0)):
        twin = copy.deepcopy(module)
        for _ in range(2):
            assert torch.equal(module(logits, targets.to(dtype)), twin(logits, targets))


@every_loss
@pytest.mark.parametrize("stray", [0.9, 0.1, math.nan, math.inf, 1e300])
def test_float_ids_between_the_classes_do_not_become_one(make, stray):
    logits, module = torch.randn(8, 1), make()
    targets = torch.tensor([0.0, 1.0, 0.0, 1.0, 0.0, 1.0, 0.0, stray], dtype=torch.float64)
    losses = []
    if not module._graded:  # where it is a grade, or none
        (text,) = warned(lambda: losses.append(module(logits, targets)))
        assert "expects targets in" in text
        positive = torch.tensor([0, 1, 0, 1, 0, 1, 0, 1])  # as any stray label
        assert torch.equal(losses[0], make()(logits, positive))
    known = torch.arange(8) < 7  # a row without a label may hold anything
    assert warned(lambda: make()(logits, targets, label_mask=known)) == []


@every_loss
@pytest.mark.parametrize("stray", [0.9, 0.1, math.nan, math.inf, 1e300])
def test_float_ids_of_several_classes_are_whole(make, stray):
    logits, module = torch.randn(8, 3), make(num_classes=3)
    targets = torch.tensor([0.0, 1.0, 0.0, 1.0, 0.0, 1.0, 0.0, stray], dtype=torch.float64)
    before = copy.deepcopy(module)
    with pytest.raises(ValueError, match=r"class ids, which are whole numbers, got \["):
        module(logits, targets)
    assert all(map(torch.equal, module.buffers(), before.buffers()))
    with pytest.raises(ValueError, match="whole numbers"):
        module(logits, targets[:, None])
    known = torch.arange(8)[:, None].expand(8, 3) < 7
    module(logits, targets, label_mask=known)  # a row without a label may hold anything
