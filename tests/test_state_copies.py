"""Copies of a loss, and averages over copies: each says and computes what its buffers hold."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from torch import nn
from torch.func import functional_call, grad_and_value, stack_module_state, vmap
from torch.optim.swa_utils import (
    AveragedModel,
    get_ema_avg_fn,
    get_ema_multi_avg_fn,
    get_swa_avg_fn,
)

import proxy_losses as P

from .states import KINDS, Net, assert_alike, going_on, rows, says, step, trained

every_kind = pytest.mark.parametrize("kind", KINDS)
either = pytest.mark.parametrize("wrapped", [True, False], ids=["wrapper", "loss"])
AVERAGES = {
    "swa": {},
    "swa one by one": {"avg_fn": get_swa_avg_fn()},
    "ema": {"multi_avg_fn": get_ema_multi_avg_fn(0.9)},
    "ema one by one": {"avg_fn": get_ema_avg_fn(0.9)},
}
every_average = pytest.mark.parametrize("average", AVERAGES)


def through_file(net: Net) -> Net:
    file = io.BytesIO()
    torch.save(net, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda net: pickle.loads(pickle.dumps(net)),
    "torch.save": through_file,
}


@every_kind
@either
@pytest.mark.parametrize("how", COPIES)
def test_a_copy_goes_on_as_its_model(kind, wrapped, how):
    net = trained(kind, wrapped)
    twin = COPIES[how](net)
    step(net, 50)  # it has buffers of its own
    assert says(twin) == says(trained(kind, wrapped))
    assert_alike(twin, trained(kind, wrapped))


@every_kind
@either
@every_average
def test_an_average_of_parameters_follows_the_loss(kind, wrapped, average):
    """Made before training, and before it is known what the batches are."""
    torch.manual_seed(0)
    net = Net(kind, wrapped)
    averaged = AveragedModel(net, **AVERAGES[average])
    for k in range(4):
        step(net, k)
        averaged.update_parameters(net)
        assert says(averaged.module) == says(net)
    assert_alike(averaged.module, net)


@every_kind
@every_average
def test_an_average_of_buffers_is_told(kind, average):
    """Averaged class ids are those of other classes, and an averaged step is no step."""
    torch.manual_seed(0)
    net = Net(kind, False)
    averaged = AveragedModel(net, use_buffers=True, **AVERAGES[average])
    for k in range(4):
        step(net, k)
        averaged.update_parameters(net)
    loss = averaged.module
    with pytest.raises(RuntimeError, match=r"memory queue.*averaged.*use_buffers=False"):
        step(loss, 4)
    loss.main.reset()
    fresh = Net(kind, False)
    fresh.load_state_dict(loss.state_dict())
    assert_alike(loss, fresh)


@every_average
def test_an_averaged_schedule_is_told(average):
    torch.manual_seed(0)
    net = Net("ids")
    averaged = AveragedModel(net, use_buffers=True, **AVERAGES[average])
    for k in range(4):
        step(net, k)
        averaged.update_parameters(net)
    wrapper = averaged.module.loss
    for ask in (lambda: wrapper.main_weight, lambda: wrapper.in_warmup, lambda: wrapper.in_blend):
        with pytest.raises(RuntimeError, match=r"schedule.*averaged.*use_buffers=False"):
            ask()
    with pytest.raises(RuntimeError, match=r"schedule.*averaged"):
        wrapper(torch.zeros(2, 3), torch.zeros(2, dtype=torch.int64))
    wrapper.reset()
    assert says(averaged.module) == says(Net("ids"))


@pytest.mark.parametrize("decay", [0.5, 0.9, 0.999, 0.9999])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("integers", ["averaged", "copied", "left"])
def test_no_average_by_hand_passes(decay, dtype, integers):
    """Of all values, or of floating ones with integers from the model or from the first one."""
    before = torch.get_default_dtype()
    for changed in (True, False) if integers == "averaged" else (True,):
        net = trained("ids", False)
        ema = copy.deepcopy(net)
        if changed:
            step(net, 4)
        torch.set_default_dtype(dtype)
        try:
            for old, new in zip(ema.state_dict().values(), net.state_dict().values(), strict=True):
                if integers == "averaged" or new.is_floating_point():
                    old.copy_(decay * old + (1 - decay) * new)
                elif integers == "copied":
                    old.copy_(new)
        finally:
            torch.set_default_dtype(before)
        with pytest.raises(RuntimeError, match="memory queue"):
            going_on(ema)


def test_compiled_code_tells_of_an_average_too():
    net = trained("ids", False)
    compiled = torch.compile(net.loss, backend="aot_eager", fullgraph=True)
    x, y = torch.randn(10, 3), torch.arange(10) % 3
    compiled(x, y)
    net.main._queue._q_enqueued.add_(1)
    with pytest.raises(RuntimeError, match="memory queue"):
        compiled(x, y)


def test_a_compiled_wrapper_tells_of_a_schedule_that_it_was_not_told():
    net = trained("ids", steps=3)
    x, y = torch.randn(10, 3), torch.arange(10) % 3
    ema = AveragedModel(net)
    compiled = torch.compile(ema.module.loss, backend="aot_eager", fullgraph=True)
    compiled(x, y)
    for k in range(3, 6):
        step(net, k)
    ema.update_parameters(net)
    with pytest.raises(RuntimeError, match="read its main_weight before the call"):
        compiled(x, y)
    assert ema.module.loss.main_weight == net.loss.main_weight == 1.0
    ema.module.eval(), net.eval()
    assert torch.equal(compiled(x, y), net.loss(x, y))


def test_a_foreign_loss_in_an_average_has_the_temperature_of_the_schedule():
    class Foreign(torch.nn.Module):
        temperature = 0.5

        def forward(self, logits, targets):
            return logits.mean() * self.temperature

    net = torch.nn.Sequential(torch.nn.Linear(2, 2))
    net.loss = P.LossWarmupWrapper(torch.nn.CrossEntropyLoss(), Foreign(), warmup_steps=1)
    averaged = AveragedModel(net)
    for k in range(4):
        net.loss.on_train_batch_start(k)
        averaged.update_parameters(net)
    copied = averaged.module.loss
    x, y = torch.ones(2, 3), torch.zeros(2, dtype=torch.int64)
    assert torch.equal(copied(x, y), net.loss(x, y))
    assert copied.current_temperature == net.loss.current_temperature < 0.05


@either
def test_stacked_copies_train_as_each_by_itself(wrapped):
    nets = [trained("ids", wrapped) for _ in range(3)]
    for k, net in enumerate(nets):
        nn.init.normal_(net.head.weight, generator=torch.Generator().manual_seed(k))
        step(net, 4)
    x, targets, _ = rows("ids", 7)
    params, buffers = stack_module_state(nets)
    base = copy.deepcopy(nets[0])

    def loss(params, buffers):
        return functional_call(base, (params, buffers), (x, targets))

    grads, losses = vmap(grad_and_value(loss))(params, buffers)
    for k, net in enumerate(nets):
        own = net(x, targets)
        own.backward()
        torch.testing.assert_close(losses[k], own)
        torch.testing.assert_close(grads["head.weight"][k], net.head.weight.grad)
        assert all(torch.equal(buffers[name][k], mine) for name, mine in net.named_buffers())


def test_a_stacked_copy_that_is_an_average_is_nan():
    nets = [trained("ids", wrapped=False).eval() for _ in range(2)]
    x, targets, _ = rows("ids", 7)
    params, buffers = stack_module_state(nets)
    buffers["loss._queue._q_enqueued"][1] -= 3

    def loss(params, buffers):
        return functional_call(nets[0], (params, buffers), (x, targets))

    assert vmap(loss)(params, buffers).isnan().tolist() == [False, True]
