"""Checks of values that do not wait: heard at a later forward, with the forward they are about.

A device is played on the CPU: `Played` answers carry real numbers and arrive when told to.
"""

from __future__ import annotations

import copy
import io
import math
import os
import pickle
import subprocess
import sys

import pytest
import torch

import proxy_losses as P
from proxy_losses.nn import _late

from .makers import MAKERS, PAD, every_loss, pauc, recall, smooth, warned

GPU = torch.cuda.is_available()


class Played:
    """Numbers of a device that arrive when told to."""

    made: list[Played]

    def __init__(self, numbers):
        self._numbers = [x.clone() for x in numbers]
        self.there = False
        Played.made.append(self)

    def arrived(self):
        return self.there

    def wait(self):
        self.there = True

    def numbers(self):
        assert self.there, "read before it arrived"
        return [x.item() for x in self._numbers]


@pytest.fixture
def device(monkeypatch):
    """CPU tensors are treated as those of a device; the answers on their way, in order."""
    monkeypatch.setattr(_late, "at_once", lambda x: _late._debug)
    monkeypatch.setattr(_late, "carrier", lambda x: Played)
    Played.made = []
    return Played.made


def arrive(answers) -> None:
    for answer in answers:
        answer.there = True


def rows(n: int = 6, classes: int = 3):
    torch.manual_seed(n)
    return torch.randn(n, classes, requires_grad=True), torch.arange(n) % classes


# -- what is said, and when


def test_a_fault_is_raised_at_the_first_forward_after_it_arrived(device):
    loss_fn, (logits, ids) = recall(num_classes=3), rows()
    stray = torch.where(ids == 1, 7, ids)
    loss_fn(logits, ids)
    loss_fn(logits, stray)  # forward 2
    loss_fn(logits, ids)
    device[0].there = True  # the first is fine, the second still on its way
    loss_fn(logits, ids)
    arrive(device)
    before = {name: x.clone() for name, x in loss_fn.state_dict().items()}
    with pytest.raises(ValueError, match=r"at forward 2: targets .*outside \[0, 3\).* from 0 to 7"):
        loss_fn(logits, ids)
    after = loss_fn.state_dict()
    assert all(torch.equal(x, after[name]) for name, x in before.items()), "nothing was stored"
    loss_fn(logits, ids)  # said once


def test_faults_come_in_order_one_at_a_time(device):
    loss_fn, (logits, ids) = recall(num_classes=3), rows()
    loss_fn(logits, ids - 1)
    loss_fn(logits, ids, sample_weight=torch.full((6,), -2.0))
    loss_fn(logits, ids, sample_weight=torch.full((6,), math.nan))
    arrive(device)
    first, second, third = "1: .* from -1 to 1", "2: .*non-negative, got -2", "3: .*finite"
    for text in (first, second, third):
        with pytest.raises(ValueError, match=f"at forward {text}"):
            loss_fn(logits, ids)
    loss_fn(logits, ids)


def test_bad_grades(device):
    loss_fn, (logits, _) = P.NDCGLoss(1, queue_size=8), rows(5, 1)
    loss_fn(logits, torch.tensor([0.0, 2.0, 1.0, -3.0, 3.0]))
    with pytest.raises(ValueError, match=r"^at forward 1: targets.*must be finite.*got -3"):
        loss_fn.check_values()
    assert loss_fn._queue.state.enqueued == 0


def test_padding_is_no_fault(device):
    for make in MAKERS:
        loss_fn, (logits, ids) = make(num_classes=3), rows()
        loss_fn(logits, torch.where(ids == 2, PAD, ids))
        loss_fn.check_values()


def test_check_values_waits(device):
    loss_fn, (logits, ids) = recall(num_classes=3), rows()
    loss_fn.check_values()  # before any forward
    for targets in (ids, ids + 5, ids - 5):
        loss_fn(logits, targets)
    with pytest.raises(ValueError, match=r"at forward 2: .* from 5 to 7"):
        loss_fn.check_values()
    with pytest.raises(ValueError, match=r"at forward 3: .* from -5 to -3"):
        loss_fn.check_values()
    loss_fn.check_values()


def test_on_the_cpu_everything_has_been_said():
    loss_fn, (logits, ids) = recall(num_classes=3), rows()
    with pytest.raises(ValueError, match=r"^targets contain class ids .*: \[7, 7\]"):
        loss_fn(logits, torch.where(ids == 1, 7, ids))
    loss_fn.check_values()
    assert loss_fn._pending is None


@every_loss
def test_warnings_say_their_forward(make, device):
    loss_fn, (logits, _) = make(), rows(8, 1)
    ids = torch.arange(8) % 2
    assert warned(lambda: loss_fn(logits, torch.where(ids == 1, 7, ids))) == []
    assert warned(lambda: loss_fn(logits, ids, sample_weight=torch.zeros(8))) == []
    name = type(loss_fn).__name__
    *values, weights = warned(lambda: loss_fn.check_values())
    assert len(values) == (not loss_fn._graded)  # 7 is a grade
    for text in values:
        assert text.startswith(f"at forward 1: {name} with num_classes=1 expects targets in")
        assert "values from 0 to 7; all but 0 count as positive" in text
    assert weights.startswith(f"at forward 2: {name}: sample_weight is entirely zero")
    loss_fn(logits, ids, sample_weight=torch.zeros(8))
    assert warned(lambda: loss_fn.check_values()) == []  # once


def test_scores_without_spread(device):
    loss_fn, ids = pauc(queue_size=0), torch.arange(8) % 2
    assert warned(lambda: [loss_fn(torch.zeros(8, 1), ids) for _ in range(3)]) == []
    (text,) = warned(lambda: loss_fn.check_values())
    assert text.startswith("at forward 1: PAUCAtBudgetLoss: the reference scores")


def test_a_capped_pool(device):
    loss_fn, ids = smooth(max_pool_size=5, queue_size=0), torch.arange(8) % 2
    padded = torch.where(torch.arange(8) < 3, PAD, ids)
    loss_fn(torch.randn(8, 1), padded)  # five rows count
    loss_fn(torch.randn(8, 1), ids)
    (text,) = warned(lambda: loss_fn.check_values())
    said = "at forward 2: SmoothAPLoss: the pool of 8 rows is above max_pool_size=5"
    assert text.startswith(said)


def test_focal_losses(device):
    softmax, (logits, ids) = P.SoftmaxFocalLoss(), rows()
    softmax(logits, torch.where(ids == 0, PAD, ids), sample_weight=torch.ones(6))
    softmax(logits, ids + 2)
    softmax(logits, ids, sample_weight=-torch.ones(6))
    with pytest.raises(ValueError, match=r"at forward 2: targets .*\[0, 3\).* from 2 to 4"):
        softmax.check_values()
    with pytest.raises(ValueError, match=r"at forward 3: sample_weight .*, got -1"):
        softmax.check_values()
    sigmoid = P.SigmoidFocalLoss()
    sigmoid(logits, torch.zeros(6, 3), sample_weight=torch.full((6, 1), math.inf))
    sigmoid(logits, torch.zeros(6, 3), sample_weight=torch.zeros(6, 1))
    arrive(device)
    with pytest.raises(ValueError, match="at forward 1: sample_weight must be finite"):
        sigmoid(logits, torch.zeros(6, 3))
    (text,) = warned(lambda: sigmoid(logits, torch.zeros(6, 3)))
    assert text.startswith("at forward 2: SigmoidFocalLoss: sample_weight is entirely zero")


def test_the_wrapper_asks_both(device):
    wrapper = P.LossWarmupWrapper(
        P.SoftmaxFocalLoss(), recall(num_classes=3), warmup_steps=1, blend_steps=9
    )
    logits, ids = rows()
    for step in range(2):
        wrapper.on_train_batch_start(step)
        wrapper(logits, ids + 1)  # warmup_loss twice, main_loss once
    for loss, forward in ((wrapper.warmup_loss, 1), (wrapper.warmup_loss, 2), (None, 1)):
        with pytest.raises(ValueError, match=f"at forward {forward}: targets"):
            wrapper.check_values()
        assert loss is None or loss._pending.forwards == 2
    wrapper.check_values()
    P.LossWarmupWrapper(torch.nn.CrossEntropyLoss(), smooth(), warmup_steps=1).check_values()


# -- the ring, several modules, copies


def test_while_answers_are_out_nothing_more_is_asked(device):
    loss_fn, (logits, ids) = recall(num_classes=3), rows()
    for k in range(10):
        loss_fn(logits, ids + k)
    assert len(device) == _late.RING
    with pytest.raises(ValueError, match=r"at forward 2: .* from 1 to 3"):
        loss_fn.check_values()
    loss_fn(logits, ids + 100)  # there is room again
    arrive(device)
    for forward in (3, 4, 11):
        with pytest.raises(ValueError, match=f"at forward {forward}:"):
            loss_fn.check_values()


def test_modules_do_not_hear_of_each_other(device):
    one, two, (logits, ids) = recall(num_classes=3), recall(num_classes=3), rows()
    two(logits, ids)
    one(logits, ids + 4)
    arrive(device)
    two(logits, ids)
    two.check_values()
    with pytest.raises(ValueError, match="at forward 1"):
        one.check_values()


@pytest.mark.parametrize(
    "clone",
    [
        copy.deepcopy,
        lambda x: pickle.loads(pickle.dumps(x)),
        lambda x: torch.load(saved(x), weights_only=False),
    ],
)
def test_copies_leave_answers_behind(device, clone):
    loss_fn, (logits, ids) = recall(num_classes=3), rows()
    loss_fn(logits, ids + 4)
    twin = clone(loss_fn)
    twin.check_values()
    twin(logits, ids)
    twin.check_values()
    with pytest.raises(ValueError, match="at forward 1"):
        loss_fn.check_values()


def saved(module) -> io.BytesIO:
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return file


def test_nothing_of_it_is_saved(device):
    loss_fn, (logits, ids) = recall(num_classes=3), rows()
    keys = set(loss_fn.state_dict())
    loss_fn(logits, ids)
    assert set(loss_fn.state_dict()) == keys


# -- where nothing is asked


def test_transforms_and_compilers_are_left_alone(device):
    loss_fn, (logits, ids) = recall(num_classes=3, queue_size=0), rows()
    torch.func.grad(lambda x: loss_fn(x, ids + 4))(logits.detach())
    torch.func.vmap(lambda t: loss_fn(logits.detach(), t))(torch.stack([ids, ids + 4]))
    torch.compile(loss_fn, backend="eager", fullgraph=True)(logits, ids + 4)
    assert device == []
    loss_fn.check_values()


def test_a_device_without_events_is_not_asked():
    x = torch.empty(2, device="meta")
    assert _late.carrier(x) is None
    assert not _late.silent(x)
    loss_fn = recall(num_classes=3).to("meta")
    loss_fn(torch.empty(6, 3, device="meta"), torch.empty(6, dtype=torch.int64, device="meta"))
    loss_fn.check_values()


def test_without_rows_there_is_nothing_to_ask(device):
    for make in MAKERS:
        make(num_classes=3)(torch.zeros(0, 3), torch.zeros(0, dtype=torch.int64))
    P.SoftmaxFocalLoss()(torch.zeros(0, 3), torch.zeros(0, dtype=torch.int64))
    # Whether a band has no spread, and whether a batch was not stored.
    assert all(len(answer._numbers) <= 2 for answer in device)


# -- at once


def test_debug_checks_at_once_on_every_device(device):
    (logits, ids), loss_fn = rows(), recall(num_classes=3)
    with P.set_debug(True):
        with pytest.raises(ValueError, match=r"^targets contain class ids .*\[5, 5\]"):
            loss_fn(logits, torch.where(ids == 0, 5, ids))
        with P.set_debug(False):
            loss_fn(logits, ids + 1)
        assert loss_fn._queue.state.enqueued == 6
        arrive(device)
        with pytest.raises(ValueError, match="at forward 1:"):  # what is pending is heard too
            loss_fn(logits, ids)
    assert not _late._debug
    switch = P.set_debug()
    assert _late._debug
    switch.__exit__()
    assert not _late._debug


def test_debug_is_a_flag():
    with pytest.raises(TypeError, match="mode must be True or False, got str"):
        P.set_debug("on")
    assert not _late._debug


@pytest.mark.parametrize(("value", "said"), [("", "False"), ("0", "False"), ("1", "True")])
def test_debug_from_the_environment(value, said):
    assert str(_late._environment(value)) == said


def test_an_unclear_environment():
    with pytest.raises(ValueError, match="PROXY_LOSSES_DEBUG must be 0 or 1, got 'yes'"):
        _late._environment("yes")
    code = "from proxy_losses.nn import _late; print(_late._debug)"
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "PROXY_LOSSES_DEBUG": "1"},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout.strip() == "True"


# -- on a device


@pytest.mark.skipif(not GPU, reason="needs a CUDA device")
@every_loss
def test_on_a_device_no_step_waits(make):
    loss_fn, (logits, ids) = make(num_classes=3).cuda(), rows(512)
    logits, ids = logits.detach().cuda().requires_grad_(), ids.cuda()
    loss_fn(logits, ids, sample_weight=torch.ones(512, device="cuda")).backward()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(8):
            loss_fn(logits, ids, sample_weight=torch.ones(512, device="cuda")).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    loss_fn.check_values()


@pytest.mark.skipif(not GPU, reason="needs a CUDA device")
def test_on_a_device_a_fault_is_heard_later():
    loss_fn, (logits, ids) = recall(num_classes=3).cuda(), rows()
    logits, ids = logits.detach().cuda(), ids.cuda()
    loss_fn(logits, ids + 4)
    torch.cuda.synchronize()
    with pytest.raises(ValueError, match=r"at forward 1: targets .* from 4 to 6"):
        loss_fn(logits, ids)
    loss_fn(logits, ids, sample_weight=-torch.ones(6, device="cuda"))
    with pytest.raises(ValueError, match="at forward 3: sample_weight"):
        loss_fn.check_values()
    with P.set_debug(), pytest.raises(ValueError, match=r"^targets"):
        loss_fn(logits, ids + 4)


@pytest.mark.skipif(not GPU, reason="needs a CUDA device")
def test_on_a_device_nothing_is_asked_while_a_graph_is_captured():
    loss_fn = P.SoftmaxFocalLoss()
    logits, ids = torch.randn(6, 3, device="cuda"), torch.arange(6, device="cuda") % 3 + 4
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        loss_fn(logits, ids - 4)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss_fn(logits, ids)
    loss_fn.check_values()
