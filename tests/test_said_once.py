"""What would pass in silence is said once: rows not stored, rows of a validation, no clock."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

import proxy_losses as P

from .makers import batch, every_loss, smooth, warned

pytestmark = pytest.mark.filterwarnings("ignore:.*dispersion")


def unseen(seed: int, value: float = -math.inf):
    """Logits of a third class that no target has yet."""
    g = torch.Generator().manual_seed(seed)
    logits = torch.randn(9, 3, generator=g)
    logits[:, 2] = value
    return logits, torch.arange(9) % 2


# -- rows that are never stored


@every_loss
@pytest.mark.parametrize("value", [-math.inf, math.inf, math.nan])
def test_batches_that_are_not_stored(make, value):
    module = make(num_classes=3, queue_size=20)
    (text,) = warned(lambda: [module(*unseen(k, value)) for k in range(4)])
    assert text.startswith(f"{type(module).__name__}: a batch was not stored")
    assert "label_mask=, [N, C=3] bool" in text
    assert module._queue.state.enqueued == 0
    assert module(*unseen(9, value)).isfinite()


@every_loss
def test_a_loss_that_is_no_number_speaks_for_itself(make):
    module = make(num_classes=3, queue_size=20)
    logits, targets = batch(0, 9, 3)
    logits = logits.detach().clone()
    logits[0, int(targets[0] == 0)] = math.nan
    assert warned(lambda: module(logits, targets)) == []
    assert module(logits, targets).isnan()


@every_loss
def test_what_is_stored_or_was_not_to_be_stored_is_no_news(make):
    module = make(num_classes=3, queue_size=20)
    pad = torch.full((9,), -100)

    def fine():
        module(*batch(0, 9, 3))
        module(torch.full((9, 3), -math.inf), pad)  # in rows that do not count
        module(*batch(0, 0, 3))
        module(*unseen(1), store=False)
        module.eval()(*unseen(1))
        make(num_classes=3, queue_size=0)(*unseen(1))
        make(num_classes=3)(*unseen(1), label_mask=torch.tensor([True, True, False]).expand(9, 3))

    assert warned(fine) == []


# -- rows of a validation


@every_loss
@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_rows_stored_without_gradient(make, context):
    module = make(queue_size=20)
    module(*batch(0, 9))

    def validate():
        with context():
            for k in range(3):
                module(*batch(k, 9))

    (text,) = warned(validate)
    assert text.startswith(f"{type(module).__name__}: rows are stored in the queue while")
    assert "eval()" in text
    assert "store=False" in text
    assert module._queue.state.enqueued > 9


@every_loss
def test_calls_that_may_be_without_gradient(make):
    def fine():
        module = make(queue_size=20)
        with torch.no_grad():
            module.eval()(*batch(0, 9))
            module.train()(*batch(0, 9), store=False)
            module(*batch(0, 0))
            module(torch.full((9, 1), math.nan), batch(0, 9)[1])  # not stored
            make(queue_size=0)(*batch(0, 9))
            make(queue_size=20, update_queue_in_eval=True)(*batch(0, 9))  # asked for
        logits, targets = batch(0, 9)
        module(logits.detach(), targets)
        torch.func.grad(lambda x: make(queue_size=0)(x, targets))(logits)

    assert warned(fine) == []


@every_loss
def test_a_warning_that_is_an_error_stores_none_of_them(make):
    module = make(queue_size=20)
    with torch.no_grad(), pytest.raises(UserWarning, match="while gradients are disabled"):
        module(*batch(0, 9))
    assert module._queue.state.enqueued == 0


@every_loss
def test_compiled_calls_stay_whole(make):
    module = make(num_classes=3, queue_size=20)
    module(*batch(0, 9, 3))
    torch.compiler.reset()
    call = torch.compile(module, fullgraph=True, backend="eager")

    def run():
        with torch.no_grad():
            call(*batch(0, 9, 3))

    assert warned(run) == []
    assert module._queue.state.enqueued == 18


# -- a schedule that is ignored


def wrapper(**kwargs):
    return P.LossWarmupWrapper(nn.CrossEntropyLoss(), smooth(num_classes=3), **kwargs)


@pytest.mark.parametrize(
    ("kwargs", "hook"),
    [
        ({"warmup_epochs": 2}, "on_train_epoch_start"),
        ({"warmup_epochs": 2, "blend_epochs": 2}, "on_train_epoch_start"),
        ({"warmup_steps": 3}, "on_train_batch_start"),
        ({"warmup_steps": 3, "blend_steps": 2}, "on_train_batch_start"),
    ],
)
def test_no_hook_at_all(kwargs, hook):
    loss_fn = wrapper(**kwargs)
    (text,) = warned(lambda: [loss_fn(*batch(k, 9, 3)).backward() for k in range(20)])
    assert text.startswith(f"LossWarmupWrapper: {hook}(")
    assert "stays at its start, with main_weight 0." in text


@pytest.mark.parametrize(
    ("kwargs", "weight"), [({"warmup_epochs": 1}, "0"), ({"blend_epochs": 3}, "0.25")]
)
def test_steps_without_epochs(kwargs, weight):
    loss_fn = wrapper(**kwargs)

    def run():
        for step in range(6):
            loss_fn.on_train_batch_start(step)
            loss_fn(*batch(step, 9, 3))

    (text,) = warned(run)
    assert "on_train_epoch_start(epoch) was never called" in text
    assert f"main_weight {weight}." in text


def test_a_blend_in_steps_of_a_loss_without_temperature():
    with pytest.warns(UserWarning, match="no attribute 'temperature'"):
        loss_fn = P.LossWarmupWrapper(
            nn.CrossEntropyLoss(), lambda x, y: x.mean(), warmup_steps=0, blend_steps=3
        )
    (text,) = warned(lambda: [loss_fn(*batch(k, 9, 3)) for k in range(6)])
    assert "on_train_batch_start(global_step) was never called" in text


def test_a_schedule_that_is_driven_or_not_needed_is_no_news():
    def fine():
        by_epoch = wrapper(warmup_epochs=2, blend_epochs=1)
        by_epoch(*batch(0, 9, 3))  # a first call may be a trial
        with torch.no_grad():
            for _ in range(3):
                by_epoch(*batch(0, 9, 3))  # a sanity check before training
        by_epoch.eval()(*batch(0, 9, 3))
        by_epoch.train()
        for step in range(12):
            if step % 3 == 0:
                by_epoch.on_train_epoch_start(step // 3)
            by_epoch.on_train_batch_start(step)
            by_epoch(*batch(step, 9, 3))
        resumed = wrapper(warmup_epochs=2, blend_epochs=1)
        resumed.load_state_dict(by_epoch.state_dict())
        resumed(*batch(0, 9, 3))
        resumed(*batch(0, 9, 3))
        by_step = wrapper(warmup_steps=2)
        for step in range(4):
            by_step.on_train_batch_start(step)
            by_step(*batch(step, 9, 3))

    assert warned(fine) == []
