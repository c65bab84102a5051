"""A `Trainer.train` that starts at step 0 is a run of its own; one that resumes is not."""

import pytest
import torch

import proxy_losses as P

from .test_huggingface import (
    LossScheduleCallback,
    TrainerCallback,
    TrainingArguments,
    assert_equal_states,
    bce,
    data,
    losses,
    new_loss,
    new_model,
    new_trainer,
    pytestmark,
)

transformers = pytest.importorskip("transformers", reason="needs proxy-losses[huggingface]")
from proxy_losses.integrations.huggingface import make_compute_loss  # noqa: E402

pytestmark = [*pytestmark]


def searching(loss_fn, folder, *callbacks, **kwargs):
    """A trainer that makes its model anew for each run."""
    args = TrainingArguments(
        output_dir=str(folder), use_cpu=True, report_to="none", learning_rate=0.01,
        disable_tqdm=True, num_train_epochs=3, logging_steps=1, per_device_train_batch_size=8,
        **{"save_strategy": "no", **kwargs},
    )  # fmt: skip
    return transformers.Trainer(
        model_init=lambda: new_model(), args=args, train_dataset=data(), eval_dataset=data(),
        compute_loss_func=make_compute_loss(loss_fn),
        callbacks=[LossScheduleCallback(loss_fn), *callbacks],
    )  # fmt: skip


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """Losses and loss of a run that is the first of its loss."""
    loss_fn = new_loss()
    trainer = searching(loss_fn, tmp_path_factory.mktemp("alone"))
    trainer.train()
    assert loss_fn.main_loss._queue.state.enqueued > 0
    return losses(trainer), loss_fn


def test_train_again_is_the_first_run_again(tmp_path, alone):
    loss_fn = new_loss()
    trainer = searching(loss_fn, tmp_path)
    for _ in range(3):
        trainer.train()
        assert losses(trainer) == alone[0]
        assert_equal_states(loss_fn, alone[1])
        trainer.evaluate()


def test_the_loss_of_another_trainer(tmp_path, alone):
    loss_fn = new_loss()
    new_trainer(loss_fn, tmp_path, rows=data(16)).train()
    trainer = searching(loss_fn, tmp_path)
    trainer.train()
    assert losses(trainer) == alone[0]


def test_trials_of_a_search(tmp_path, alone):
    """Other settings in between, and checkpoints, as a search writes them."""
    loss_fn = new_loss()
    trainer = searching(loss_fn, tmp_path, eval_strategy="epoch", save_strategy="epoch")
    for rate, epochs in ((0.1, 2), (0.01, 3), (0.3, 1), (0.01, 3)):
        trainer.args.learning_rate, trainer.args.num_train_epochs = rate, epochs
        trainer.train()
        assert (losses(trainer) == alone[0]) == (rate == 0.01)


class OutOfMemory(TrainerCallback):
    """Once, in the main phase; notes with what each attempt begins."""

    def __init__(self, loss_fn):
        self.loss_fn, self.began = loss_fn, []

    def on_train_begin(self, args, state, control, **kwargs):
        rows = int(self.loss_fn.main_loss._queue.state.enqueued)
        self.began.append((rows, self.loss_fn.main_weight, self.loss_fn.current_temperature))

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 7 and len(self.began) == 1:
            raise RuntimeError("CUDA out of memory.")


def test_a_run_that_starts_over_with_smaller_batches(tmp_path):
    """`auto_find_batch_size` begins again from step 0, in one call of `train`."""
    loss_fn = new_loss()
    attempts = OutOfMemory(loss_fn)
    new_trainer(loss_fn, tmp_path, attempts, auto_find_batch_size=True).train()
    assert attempts.began == [(0, 0.0, 0.3)] * 2


def test_it_can_be_left_as_it_is(tmp_path):
    def run(**options):
        loss_fn = P.LossWarmupWrapper(bce, P.SmoothAPLoss(1, queue_size=24))
        loss_fn.main_loss._queue.enqueue(torch.randn(24, 1), torch.arange(24) % 2)
        schedule = LossScheduleCallback(loss_fn, **options)
        new_trainer(loss_fn, tmp_path, schedule=schedule, max_steps=1).train()
        return int(loss_fn.main_loss._queue.state.enqueued)

    assert run() == 8
    assert run(reset_at_start=False) == 24 + 8
    with pytest.raises(TypeError, match="reset_at_start must be True or False, got str"):
        LossScheduleCallback(new_loss(), reset_at_start="no")


@pytest.mark.parametrize("stop", [2, 6, 8, 13])
def test_resuming_with_a_used_loss_is_no_start(tmp_path, alone, stop):
    loss_fn = new_loss()
    saves = {"save_strategy": "steps", "save_steps": stop}
    trainer = searching(loss_fn, tmp_path, **saves)
    trainer.train()
    assert losses(trainer) == alone[0]
    trainer.train(resume_from_checkpoint=f"{tmp_path}/checkpoint-{stop}")
    assert losses(trainer) == alone[0]
    assert_equal_states(loss_fn, alone[1])
