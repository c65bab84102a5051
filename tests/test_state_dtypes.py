"""Losses under casts, default dtypes and devices, inference mode and compilation."""

from __future__ import annotations

import contextlib
import copy

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

import proxy_losses as P

from .makers import every_loss
from .states import KINDS, Net, assert_alike, rows, says, step, trained, warm

pytestmark = pytest.mark.filterwarnings("ignore:.*while gradients are disabled")
every_kind = pytest.mark.parametrize("kind", KINDS)
either = pytest.mark.parametrize("wrapped", [True, False], ids=["wrapper", "loss"])
CASTS = {
    "half": lambda m: m.half(),
    "bfloat16": lambda m: m.bfloat16(),
    "to(float16)": lambda m: m.to(torch.float16),
    "type(half)": lambda m: m.type(torch.float16),
    "half and back": lambda m: m.half().float(),
    "float": lambda m: m.float(),
}


class Scaled(P.SmoothAPLoss):
    """A loss of one's own that has parameters."""

    def __init__(self, *args):
        super().__init__(*args)
        self.scale = nn.Linear(3, 3)

    def forward(self, logits, targets, **more):
        return super().forward(self.scale(logits), targets, **more)


@every_kind
@either
@pytest.mark.parametrize("cast", CASTS)
def test_a_cast_is_for_the_model(kind, wrapped, cast):
    net, whole = trained(kind, wrapped), trained(kind, wrapped)
    dtypes = [b.dtype for b in net.buffers()]
    CASTS[cast](net.loss)
    assert [b.dtype for b in net.buffers()] == dtypes
    assert_alike(net, whole)


@pytest.mark.parametrize("cast", ["half", "bfloat16", "double"])
def test_what_is_no_state_is_cast(cast):
    warmup, main = nn.CrossEntropyLoss(weight=torch.tensor([1.0, 2.0, 3.0])), Scaled(3)
    wrapper = P.LossWarmupWrapper(warmup, main, warmup_steps=2, blend_steps=2)
    getattr(wrapper, cast)()
    dtype = getattr(torch.zeros(1), cast)().dtype
    assert main.scale.weight.dtype == warmup.weight.dtype == dtype
    assert main._tau.dtype == torch.float64
    logits, targets = torch.zeros(6, 3, dtype=dtype), torch.arange(6) % 3
    for k in range(5):
        wrapper.on_train_batch_start(k)
        assert wrapper(logits, targets).isfinite()


@every_kind
@pytest.mark.parametrize("cast", [lambda m: m.double(), lambda m: m.type(torch.float64)])
def test_a_wider_type_is_for_scores_and_weights(kind, cast):
    net, whole = trained(kind), trained(kind)
    cast(net.loss)
    assert net.main._queue.dtype == torch.float64
    assert all(b.dtype != torch.int64 or "float" not in str(b.dtype) for b in net.buffers())
    kept = {n: b.dtype for n, b in whole.named_buffers() if not b.is_floating_point()}
    assert {n: b.dtype for n, b in net.named_buffers() if n in kept} == kept
    assert_alike(net, whole)


@every_kind
@either
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_the_default_dtype_is_not_that_of_a_state(kind, wrapped, dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        net = trained(kind, wrapped)
    finally:
        torch.set_default_dtype(before)
    whole = trained(kind, wrapped)
    assert [b.dtype for b in net.buffers()] == [b.dtype for b in whole.buffers()]
    assert_alike(net, whole)


def test_a_default_device_does_not_reach_the_schedule():
    whole, net = Net("ids"), Net("ids")
    with torch.device("meta"):  # any device that is not the loss's
        for k in range(4):
            net.loss.on_train_epoch_start(k)
            net.loss.on_train_batch_start(k)
    for k in range(4):
        whole.loss.on_train_epoch_start(k)
        whole.loss.on_train_batch_start(k)
    assert says(net) == says(whole)


@either
def test_built_among_tensors_without_values(wrapped):
    """As tools do that build a model to plan for it."""
    with FakeTensorMode():
        net = Net("labels", wrapped)
    assert type(net.main._tau).__name__ == "FakeTensor"


@every_loss
@pytest.mark.parametrize("labels", [False, True])
def test_runs_among_tensors_without_values(make, labels):
    with FakeTensorMode():
        module = make(num_classes=3, query_shape=(2, 18))
        for _ in range(2):
            x = torch.randn(10, 3, requires_grad=True)
            y = torch.rand(10, 3) < 0.4 if labels else torch.randint(0, 3, (10,))
            module(x, y, sample_weight=torch.rand(10), query_ids=torch.arange(10) % 2).backward()
            assert x.grad.shape == (10, 3)
            assert module(x, y).shape == ()


@pytest.mark.parametrize("clock", ["epochs", "steps"])
def test_hooks_run_among_tensors_without_values(clock):
    """They count numbers of Python, and say what they say elsewhere."""

    def run():
        main = P.SmoothAPLoss(3, queue_size=8)
        loss = P.LossWarmupWrapper(
            torch.nn.CrossEntropyLoss(), main, reset_queue_each_epoch=True,
            **{f"warmup_{clock}": 1, f"blend_{clock}": 1},
        )  # fmt: skip
        for k in range(4):
            loss.on_train_epoch_start(k)
            loss.on_train_batch_start(k)
            loss(torch.randn(6, 3, requires_grad=True), torch.randint(0, 3, (6,))).backward()
            yield loss.in_warmup, loss.in_blend, loss.main_weight
        loss.reset()
        yield loss.in_warmup, loss.in_blend, loss.main_weight
        assert loss.current_temperature > 0

    wanted = list(run())
    with FakeTensorMode():
        assert list(run()) == wanted
    assert wanted == [(True, False, 0.0), (False, True, 0.5), *2 * [(False, False, 1.0)], wanted[0]]


@every_kind
@either
@pytest.mark.parametrize("what", ["built", "copied", "moved", "loaded", "assigned", "ran", "reset"])
def test_inference_mode_before_training(kind, wrapped, what):
    whole = net = Net(kind, wrapped)
    torch.manual_seed(0)
    saved = Net(kind, wrapped).state_dict()
    with torch.inference_mode():
        if what == "built":
            net = Net(kind, wrapped)
        elif what == "copied":
            net = copy.deepcopy(net)
        elif what == "moved":
            net.double().float()
        elif what == "loaded":
            net.load_state_dict(saved)
        elif what == "assigned":
            net.load_state_dict({k: x.clone() for k, x in saved.items()}, assign=True)
        elif what == "ran":
            net.eval()
            x, y, more = rows(kind, 3)
            net(x, y, **more)
            net.train()
        else:
            net.loss.reset()
    assert not any(b.is_inference() for b in net.buffers())
    torch.manual_seed(0)
    whole = Net(kind, wrapped)
    net.head = copy.deepcopy(whole.head)
    for k in range(3):
        assert torch.equal(step(net, k), step(whole, k))
    assert_alike(net, whole)


@every_kind
def test_no_step_replaces_a_buffer(kind):
    """Whatever comes first or later: labels after ids, query ids, a load, a reset, a cast back."""
    net = trained(kind, steps=0)
    held = dict(net.named_buffers())
    shapes = {n: (b.shape, b.dtype) for n, b in held.items()}
    addresses = {n: b.data_ptr() for n, b in held.items()}
    saved = trained(kind).state_dict()
    for k in range(4):
        step(net, k)
    net.load_state_dict(saved)
    net.loss.reset()
    step(net, 4)
    with torch.inference_mode(), contextlib.suppress(RuntimeError):
        step(net, 5)
    for name, buffer in net.named_buffers():
        assert buffer is held[name]
        assert (buffer.shape, buffer.dtype, buffer.data_ptr()) == (*shapes[name], addresses[name])
    assert all(name in net.state_dict() for name in held)  # nothing of it is hidden


@every_kind
@pytest.mark.parametrize("compiled", ["warmup loss", "main loss", "wrapper"])
def test_compiled_parts(kind, compiled):
    """A compiled loss hides its signature and its attributes in the module that it was."""

    class Warm(nn.Module):
        def forward(self, logits, targets):
            return warm(logits, targets)

    def built(do: bool) -> Net:
        torch.manual_seed(0)
        net = Net(kind)
        first, main = Warm(), P.SmoothAPLoss(net.main.num_classes, queue_size=16, temperature=0.5)
        main(*(torch.zeros(2, net.main.num_classes), torch.zeros(2, dtype=torch.int64)))
        main.reset()  # whether to gather is decided at the first call
        main.query_shape = (2, 26)
        if do and compiled == "warmup loss":
            first = torch.compile(first, backend="eager", fullgraph=True)
        if do and compiled == "main loss":
            main = torch.compile(main, backend="eager", fullgraph=True)
        net.loss = P.LossWarmupWrapper(
            first, main, warmup_steps=2, blend_steps=2, temp_start=0.5, temp_end=0.1,
        )  # fmt: skip
        if do and compiled == "wrapper":
            net.loss.compile(backend="eager", fullgraph=True)
        return net

    torch.compiler.reset()
    net, whole = built(True), built(False)
    for k in range(6):
        for one in (net, whole):
            one.loss.on_train_batch_start(k)
        x, y, more = rows(kind, k)
        more["sample_weight"] = torch.rand(10)
        logits = net.head(x).detach()
        assert torch.equal(net.loss(logits, y, **more), whole.loss(logits, y, **more))
        for name in ("main_weight", "in_warmup", "in_blend", "current_temperature"):
            assert getattr(net.loss, name) == getattr(whole.loss, name)


@pytest.mark.parametrize("wraps", ["compile", "compile function", "parallel"])
def test_the_signature_behind_a_wrapper(wraps):
    y, logits, weight = torch.arange(12) % 3, torch.randn(12, 3), torch.ones(12)
    plain = nn.functional.cross_entropy(logits, y)
    warmups = {
        "compile": lambda: torch.compile(nn.CrossEntropyLoss(), backend="eager"),
        "compile function": lambda: torch.compile(
            lambda a, b: nn.functional.cross_entropy(a, b), backend="eager"
        ),
        "parallel": lambda: nn.DataParallel(nn.CrossEntropyLoss()),
    }
    wrapper = P.LossWarmupWrapper(warmups[wraps](), P.SmoothAPLoss(3), warmup_steps=2)
    wrapper.on_train_batch_start(0)
    assert torch.equal(wrapper(logits, y, sample_weight=weight), plain)
    takes = P.LossWarmupWrapper(
        torch.compile(P.SoftmaxFocalLoss(), backend="eager"), P.SmoothAPLoss(3), warmup_steps=2
    )
    takes.on_train_batch_start(0)
    half = torch.where(torch.arange(12) < 6, 1.0, 0.0)
    assert not torch.equal(
        takes(logits, y, sample_weight=half), takes(logits, y, sample_weight=weight)
    )
