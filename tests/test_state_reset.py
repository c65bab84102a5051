"""`reset()`: a run of its own with the same loss."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from torch import nn

import proxy_losses as P

from .makers import batch, every_loss, warned
from .states import KINDS, Net, assert_alike, says, step

pytestmark = pytest.mark.filterwarnings("ignore:.*(dispersion|max_pool_size)")


@every_loss
def test_a_loss_starts_anew(make):
    module = make(num_classes=3, max_pool_size=6)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        first = [module(*batch(k, 9, 3)).detach() for k in range(3)]
    module.temperature, module.reduction = 0.7, "sum"
    module.reset()
    assert module.temperature == make().temperature == 0.25
    assert module._draws == 0
    assert module.reduction == "sum"  # a setting, not a state
    module.reduction = "mean"
    assert [text for text in warned(lambda: module(*batch(0, 9, 3))) if "max_pool_size" in text]
    module.reset()
    assert [module(*batch(k, 9, 3)).detach() for k in range(3)] == first


@pytest.mark.parametrize("kind", KINDS)
def test_a_wrapper_starts_anew_with_both_losses(kind):
    torch.manual_seed(0)
    net = Net(kind)
    start, first = says(net), [step(net, k) for k in range(6)]
    assert says(net) != start
    net.loss.reset()
    assert says(net) == start
    assert [step(net, k) for k in range(6)] == first
    net.loss.reset()
    fresh = Net(kind)
    fresh.head = copy.deepcopy(net.head)
    assert_alike(net, fresh)


def test_a_warmup_loss_is_reset_too_and_one_without_a_reset_is_left():
    ranking = P.SmoothAPLoss(3, queue_size=8)
    wrapper = P.LossWarmupWrapper(ranking, P.SmoothAPLoss(3), warmup_steps=3)
    ranking(*batch(0, classes=3))
    wrapper.reset()
    assert ranking._queue.state.enqueued == 0
    foreign = nn.CrossEntropyLoss()
    foreign.reset = "a number of resets, say"
    P.LossWarmupWrapper(foreign, P.SmoothAPLoss(3)).reset()


def test_a_wrapper_warns_again_and_is_strict_again():
    wrapper = P.LossWarmupWrapper(nn.CrossEntropyLoss(), P.SmoothAPLoss(3))
    rows = batch(0, classes=3)
    assert "never called" in warned(lambda: wrapper(*rows))[0]
    assert not warned(lambda: wrapper(*rows))
    wrapper.reset()
    assert "never called" in warned(lambda: wrapper(*rows))[0]
    strict = P.LossWarmupWrapper(nn.CrossEntropyLoss(), P.SmoothAPLoss(3), strict=True)
    strict.on_train_batch_start(0)
    strict(*rows)
    strict.reset()
    with pytest.raises(RuntimeError, match="not driven"):
        strict(*rows)
    assert strict.current_temperature == 0.05  # without a warmup the schedule starts at once
