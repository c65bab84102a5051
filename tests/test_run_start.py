"""A Lightning fit that starts at step 0 is a run of its own; one that resumes is not."""

import copy

import pytest
import torch

import proxy_losses as P

pytest.importorskip("lightning", reason="needs proxy-losses[lightning]")
import lightning.pytorch as pl
from lightning.pytorch.callbacks import BatchSizeFinder, LearningRateFinder, ModelCheckpoint
from lightning.pytorch.tuner import Tuner

from proxy_losses.integrations.lightning import LossScheduleCallback

from .test_lightning import BATCHES, Module, assert_equal_states, bce, fit, new_loss, pytestmark

pytestmark = [*pytestmark, pytest.mark.filterwarnings("ignore:.*lr_find|.*batch_size_finder")]


def new_module(loss=None, cls=Module):
    module = cls(loss or new_loss(max_pool_size=40))
    module.first = copy.deepcopy(module.model.state_dict())
    return module


def again(module):
    """The module with the weights that it began with, and nothing noted."""
    module.model.load_state_dict(module.first)
    module.seen = []
    return module


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """What a run is whose module was never in another."""
    module = new_module()
    fit(module, tmp_path_factory.mktemp("alone"))
    assert module.seen[-1][2] == 1.0
    assert module.loss.main_loss._queue.state.enqueued > 0
    return module


def assert_same_run(module, other):
    assert module.seen == other.seen
    assert_equal_states(module, other)


def test_a_second_fit_is_the_first_again(tmp_path, alone):
    module = new_module()
    fit(module, tmp_path, epochs=3)
    fit(again(module), tmp_path)
    assert_same_run(module, alone)


def test_folds_of_one_module_and_of_copies(tmp_path, alone):
    module = new_module()
    for _ in range(2):
        fold = copy.deepcopy(again(module))
        fit(fold, tmp_path)
        assert_same_run(fold, alone)
        fit(again(module), tmp_path, epochs=2)


def test_validation_in_between_changes_nothing(tmp_path, alone):
    module = new_module()
    trainer = fit(module, tmp_path, epochs=2)
    trainer.validate(module, verbose=False)
    fit(again(module), tmp_path)
    assert_same_run(module, alone)


def test_a_module_loaded_from_a_checkpoint_starts_anew(tmp_path, alone):
    save = ModelCheckpoint(tmp_path, filename="end")
    fit(new_module(), tmp_path, save)
    state = torch.load(tmp_path / "end.ckpt", weights_only=True)["state_dict"]
    module = new_module()
    module.load_state_dict(state)
    assert module.loss.main_weight == 1.0
    fit(again(module), tmp_path)
    assert_same_run(module, alone)


def test_what_hooks_of_the_module_load_is_reset_too(tmp_path, alone):
    class Loading(Module):
        def on_fit_start(self):
            self.loss.load_state_dict(alone.loss.state_dict())

    module = new_module(cls=Loading)
    fit(module, tmp_path)
    assert_same_run(module, alone)


def test_it_can_be_left_as_it_is(tmp_path, alone):
    def run(**options):
        module = new_module(P.LossWarmupWrapper(bce, P.SmoothAPLoss(1, queue_size=24)))
        module.loss.main_loss._queue.enqueue(torch.randn(24, 1), torch.arange(24) % 2)
        trainer = pl.Trainer(
            accelerator="cpu", max_steps=1, logger=False, enable_checkpointing=False,
            enable_progress_bar=False, enable_model_summary=False,
            callbacks=[LossScheduleCallback(**options)],
        )  # fmt: skip
        trainer.fit(module)
        return int(module.loss.main_loss._queue.state.enqueued)

    assert run() == 8
    assert run(reset_at_start=False) == 24 + 8
    with pytest.raises(TypeError, match="reset_at_start must be True or False, got str"):
        LossScheduleCallback(reset_at_start="no")


def test_rows_of_the_sanity_check_do_not_stay(tmp_path):
    def run(steps):
        loss = P.SmoothAPLoss(1, queue_size=24, update_queue_in_eval=True)
        module = new_module(P.LossWarmupWrapper(bce, loss))
        fit(module, tmp_path, num_sanity_val_steps=steps)
        return module

    assert_same_run(run(2), run(0))


@pytest.mark.parametrize("stop", [2, 7, 11])
def test_resuming_with_a_used_module_is_no_start(tmp_path, alone, stop):
    save = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    module = new_module()
    fit(module, tmp_path, save)
    fit(again(module), tmp_path, ckpt_path=tmp_path / f"step={stop}.ckpt")
    assert module.seen == alone.seen[stop:]
    assert_equal_states(module, alone)


def test_a_checkpoint_of_step_0_is_resumed_as_it_is(tmp_path):
    module = new_module()

    class Save(pl.Callback):
        def on_train_batch_start(self, trainer, module, batch, number):
            if trainer.global_step == 0:
                module.loss.main_loss._queue.enqueue(torch.ones(3, 1), torch.ones(3).long())
                trainer.save_checkpoint(tmp_path / "0.ckpt")

    module.loss = P.LossWarmupWrapper(bce, P.SmoothAPLoss(1, queue_size=200))
    fit(module, tmp_path, Save(), epochs=2)
    fit(again(module), tmp_path, ckpt_path=tmp_path / "0.ckpt", epochs=2)
    assert module.loss.main_loss._queue.state.enqueued == 3 + 2 * BATCHES * 8


def test_the_same_trainer_fits_on(tmp_path, alone):
    module = new_module()
    trainer = fit(module, tmp_path, epochs=2)
    trainer.fit_loop.max_epochs = 5
    trainer.fit(module)
    assert [step for step, *_ in module.seen] == list(range(5 * BATCHES))
    assert [w for *_, w in module.seen] == [w for *_, w in alone.seen]
    assert module.loss.main_loss._queue.state.enqueued == alone.loss.main_loss._queue.state.enqueued


def test_a_loss_beside_the_wrapper_keeps_the_temperature_that_was_set(tmp_path):
    class Beside(Module):
        def training_step(self, batch, batch_idx):
            return super().training_step(batch, batch_idx) + self.beside(*self.scored())

        def scored(self):
            x, y = self.rows()
            return self.model(x), y

    def run(module):
        fit(module, tmp_path, epochs=1)
        return int(module.beside._queue.state.enqueued), module.beside.temperature

    module = new_module(cls=Beside)
    module.beside = P.SmoothAPLoss(1, queue_size=100, temperature=0.5)
    module.beside.temperature = 0.2
    assert run(module) == run(module) == (BATCHES * 8, 0.2)


def test_a_queue_of_ones_own_is_emptied_too():
    class Own(torch.nn.Module):
        temperature, rows = 1.0, 5

        def reset_queue(self):
            self.rows = 0

    wrapper = P.LossWarmupWrapper(bce, Own())
    wrapper.reset()
    assert wrapper.main_loss.rows == 0


class Tuned(Module):
    """A module as Lightning's finders want it, whose queue fills from the first step."""

    lr, batch_size = 0.3, 1

    def __init__(self, loss):
        super().__init__(loss)
        self.found = []

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=self.lr)

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        self.found.append(loss.item())
        return loss


@pytest.mark.parametrize("used", [False, True])
@pytest.mark.parametrize("finder", ["rate", "rate first", "rate last", "size"])
def test_finders_leave_no_trace(tmp_path, finder, used):
    def strict():
        wrapper = P.LossWarmupWrapper(bce, P.SmoothAPLoss(1, queue_size=24), strict=True)
        return new_module(wrapper, Tuned)

    plain, module = strict(), strict()
    fit(plain, tmp_path, epochs=3)
    if used:
        fit(module, tmp_path, epochs=2)
        again(module).found = []
    rate = LearningRateFinder(num_training_steps=6, update_attr=False)
    callbacks = {
        "rate": [LossScheduleCallback()],
        "rate first": [rate, LossScheduleCallback()],
        "rate last": [LossScheduleCallback(), rate],
        "size": [BatchSizeFinder(max_trials=1, batch_arg_name="batch_size"),
                 LossScheduleCallback()],
    }[finder]  # fmt: skip
    trainer = pl.Trainer(
        accelerator="cpu", max_epochs=3, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, callbacks=callbacks,
        default_root_dir=tmp_path, num_sanity_val_steps=0,
    )  # fmt: skip
    if finder == "rate":
        Tuner(trainer).lr_find(module, num_training=6, update_attr=False)
    trainer.fit(module)
    steps = 3 * BATCHES
    assert len(module.found) > steps
    assert module.found[:1] == plain.found[:1]  # the finder itself begins with an empty queue
    assert module.seen[-steps:] == plain.seen
    assert_equal_states(module, plain)
