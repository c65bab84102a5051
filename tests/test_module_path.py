"""What a module does beside its rank op: one look at the values, and rows written in place."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad

import proxy_losses as P
from proxy_losses import _losses
from proxy_losses._lists import Batch
from proxy_losses.nn import MemoryQueue

from .makers import FUNCTIONS, PAD, batch, every_loss, pauc, recall, same_rows, smooth, warned

pytestmark = pytest.mark.filterwarnings("ignore:.*dispersion")


@pytest.fixture
def reads(monkeypatch):
    """A list that grows with every read of a value that is not of the metric itself.

    A number that the module keeps is there and not waited for.
    """
    found, inside, over_classes = [], [], _losses.over_classes
    kept: set[int] = set()
    for name in ("item", "tolist", "__bool__", "__int__", "__float__", "__index__", "numpy"):
        plain = getattr(Tensor, name)

        def read(self, *args, plain=plain, name=name):
            out = plain(self, *args)  # raises for a wrapped tensor
            if not inside and id(self) not in kept:
                found.append(name)
            return out

        monkeypatch.setattr(Tensor, name, read)

    def metric(*args):
        inside.append(True)
        out = over_classes(*args)
        inside.clear()
        return out

    monkeypatch.setattr(_losses, "over_classes", metric)
    return found, kept


@every_loss
@pytest.mark.parametrize("classes", [1, 3])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("options", [{}, {"queue_size": 0}])
def test_few_values_are_read(make, classes, weighted, options, reads):
    module = make(num_classes=classes, **options)
    reads, kept = reads
    kept |= {id(x) for x in module.buffers()}
    for k in range(3):
        logits, targets = batch(k, 9, classes)  # with padding
        weight = torch.rand(9) + 0.1 if weighted else None
        module(logits, targets, sample_weight=weight)
        # Ends of ids, twice where rows may be padding, of logits, weights and gains; any row at
        # all; whether stored gains are 1.
        assert set(reads) <= {"item"}
        assert len(reads) <= 10
        reads.clear()


@every_loss
def test_rows_are_written_as_enqueue_does(make):
    queue, state = MemoryQueue(7, 3, PAD), P.init_queue(7, 3)
    g = torch.Generator().manual_seed(0)
    addresses = [x.data_ptr() for x in queue.buffers()]
    for n in (3, 0, 5, 7, 2, 16, 1, 6):
        logits, targets = torch.randn(n, 3, generator=g).double(), torch.randint(3, (n,))
        weight = torch.rand(n).double() if n % 2 else None
        iid = torch.rand(n) < 0.5 if n % 3 else None
        ids = torch.randint(4, (n,)).int() if n > 4 else None
        queue.write(Batch(logits, targets, weight, iid, ids))
        state = P.enqueue(
            state, logits, targets, sample_weight=weight, iid_mask=iid, query_ids=ids
        ) if n else state  # fmt: skip
        assert same_rows(queue, state)
    labels = torch.rand(4, 3) < 0.5
    queue.write(Batch(logits[:4], labels))
    state = P.enqueue(state, logits[:4], labels)
    assert same_rows(queue, state)
    assert [x.data_ptr() for x in queue.buffers()] == addresses


@pytest.mark.parametrize("flag", [None, True])
@pytest.mark.parametrize("rows", [slice(2, 8), slice(0, 5), slice(0, 8)], ids=str)
def test_rows_of_a_queue_may_come_again(rows, flag):
    queue, old = MemoryQueue(8, 1, PAD), torch.arange(13.0)[:, None]
    queue.write(Batch(old, torch.arange(13) % 2))
    queue.write(Batch(old[:3], torch.arange(3) % 2, old[:3, 0]))
    state = queue.state
    kept = P.QueueState(*(x.clone() for x in state))
    again = {name: getattr(kept, name)[rows] for name in ("sample_weight", "iid_mask")}
    wanted = P.enqueue(kept, kept.logits[rows], kept.targets[rows], **again)
    again = {name: getattr(state, name)[rows] for name in again}
    where = None if flag is None else torch.tensor(flag)
    queue.write(Batch(state.logits[rows], state.targets[rows], **again), where)
    assert same_rows(queue, wanted)


def test_rows_are_stored_without_their_tangents():
    module, (logits, targets) = P.RecallAtQuantileLoss(3, 0.3, queue_size=8), batch(0, 6, 3)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(logits.detach(), torch.ones_like(logits))
        assert forward_ad.unpack_dual(module(dual, targets)).tangent is not None
        assert forward_ad.unpack_dual(module(logits.detach(), targets)).tangent is None


@every_loss
@pytest.mark.parametrize("n", [5, 12])
def test_a_step_may_be_backpropagated_after_the_next(make, n):
    """Rows that are written in place are in no graph."""
    module, queue = make(num_classes=3, queue_size=8), P.init_queue(8, 3)
    total = want = 0.0
    x, y = [], []
    for k in range(3):
        (a, targets), (b, _) = batch(k, n, 3), batch(k, n, 3)
        loss, queue = FUNCTIONS[make](b, targets, queue, 0.25)
        total, want = total + module(a, targets), want + loss
        x.append(a)
        y.append(b)
    total.backward()
    want.backward()
    assert all(torch.equal(a.grad, b.grad) for a, b in zip(x, y, strict=True))


@every_loss
def test_weights_get_no_gradient_in_modules_alone(make):
    logits, targets = batch(0, 12, 3)
    weight = (torch.rand(12) + 0.1).requires_grad_()
    module = make(num_classes=3)
    module(logits, targets, sample_weight=weight).backward()
    assert weight.grad is None
    assert logits.grad.any()
    loss, _ = FUNCTIONS[make](*batch(0, 12, 3), None, 0.25, sample_weight=weight)
    loss.backward()
    assert weight.grad.any()
    assert not module._queue.state.sample_weight.requires_grad


@every_loss
def test_a_warning_that_is_an_error_stores_nothing(make):
    module = make()
    before = copy.deepcopy(module)
    logits, targets = batch(0, 8)
    stray = torch.where(targets == 1, 7, targets)  # a grade, where targets are grades
    given = [(torch.zeros(8), targets), (None, stray)]
    for weight, ids in given[: 1 if make.__name__ == "smooth_ndcg" else 2]:
        with pytest.raises(UserWarning):
            module(logits, ids, sample_weight=weight)
        assert all(map(torch.equal, module.buffers(), before.buffers()))


def test_what_is_raised_comes_in_this_order():
    logits = torch.zeros(4, 3)
    module = recall(num_classes=3)
    stray, negative = torch.tensor([0, 1, 9, 2]), torch.tensor([1.0, -1.0, 1.0, 1.0])
    with pytest.raises(ValueError, match="non-negative"):
        module(logits, stray, sample_weight=negative)
    with pytest.raises(ValueError, match="finite"):
        module(logits, stray, sample_weight=negative * torch.inf)
    with pytest.raises(ValueError, match="outside"):
        module(logits, stray)
    texts = warned(lambda: smooth()(logits[:, :1], stray, sample_weight=torch.zeros(4)))
    assert ["expects" in texts[0], "zero" in texts[1]] == [True, True]


@every_loss
def test_under_transforms_nothing_is_read(make, reads):
    (reads, _), module = reads, make(queue_size=0)
    logits, targets = torch.randn(3, 8, 1), torch.arange(8) % 2
    want = torch.stack([module(x, targets) for x in logits])
    reads.clear()
    found = torch.vmap(lambda x: module(x, targets))(logits)
    torch.func.grad(lambda x: module(x, targets))(logits[0])
    assert reads == []
    torch.testing.assert_close(found, want)


@every_loss
@pytest.mark.filterwarnings("ignore:.*was not stored")
@pytest.mark.parametrize("bad", [torch.inf, -torch.inf, torch.nan])
def test_a_class_that_does_not_count_has_no_gradient(make, bad):
    logits, targets = torch.randn(8, 3), torch.arange(8) % 2  # class 2 has no positive
    logits[3, 2] = bad
    for module in (make(num_classes=3), make(num_classes=3, queue_size=0)):
        x = logits.clone().requires_grad_()
        module(x, targets).backward()
        assert x.grad.isfinite().all()
        assert not x.grad[:, 2].any()


@every_loss
def test_weights_of_a_wider_dtype_keep_their_meaning(make):
    """Scales that float32 does not hold: what counts, counts in value and flag."""
    (logits, targets), weight = batch(0, 12, 3), torch.rand(12, dtype=torch.float64) + 0.1
    for scale in (1e-60, 1e-44, 1.0, 2.0**99):
        loss, _ = FUNCTIONS[make](logits, targets, None, 0.25, sample_weight=weight * scale)
        want, _ = FUNCTIONS[make](logits, targets, None, 0.25, sample_weight=weight)
        torch.testing.assert_close(loss, want)


@every_loss
def test_checkpoints_of_0_4_load_strictly(make):
    """Query ids lay in a buffer of another name."""
    module, fresh, flat = (make(num_classes=3, queue_size=6) for _ in "abc")
    for k in range(2):
        module(*batch(k, 5, 3), query_ids=torch.arange(5) % 2)
    saved = module.state_dict()
    saved["_queue._q_groups"] = saved.pop("_queue._q_query_ids")
    fresh.load_state_dict(copy.deepcopy(saved), strict=True)
    assert all(map(torch.equal, fresh._queue.state, module._queue.state))
    flat._queue.load_state_dict({k.removeprefix("_queue."): x for k, x in saved.items()
                                 if k.startswith("_queue.")}, strict=True)  # fmt: skip
    assert all(map(torch.equal, flat._queue.state, module._queue.state))
    wrapper = P.LossWarmupWrapper(torch.nn.CrossEntropyLoss(), make(num_classes=3, queue_size=6))
    outer = {f"main_loss.{k}": x for k, x in saved.items()}
    wrapper.load_state_dict(copy.deepcopy(outer), strict=True)
    assert all(map(torch.equal, wrapper.main_loss._queue.state, module._queue.state))


def test_slots_that_are_not_filled_hold_no_row_of_another_padding():
    module, other = smooth(queue_size=6), smooth(queue_size=6, ignore_index=-1)
    logits, targets = batch(0, 3)
    other(logits, targets.abs() % 2)
    module.load_state_dict(other.state_dict())
    assert P.queue_rows(module._queue.state)[2].sum() == 3
    alone = smooth(queue_size=6)
    alone(logits, targets.abs() % 2)
    assert torch.equal(module.eval()(*batch(1, 5)), alone.eval()(*batch(1, 5)))


def test_a_padding_that_was_changed_later_is_that_of_the_batch_alone():
    module, twin = pauc(queue_size=6), pauc(queue_size=6)
    for m in (module, twin):
        m(*batch(0, 3))
    module.ignore_index = 5
    logits, targets = batch(1, 8)
    torch.testing.assert_close(
        module(logits, torch.where(targets == PAD, 5, targets)), twin(logits, targets)
    )
