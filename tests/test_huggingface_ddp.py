"""The Hugging Face loss and callback with two processes of a real Trainer."""

import pytest
import torch

import proxy_losses as P

pytest.importorskip("transformers", reason="needs proxy-losses[huggingface]")
pytest.importorskip("accelerate", reason="needs proxy-losses[huggingface]")

from proxy_losses.integrations.huggingface import LossScheduleCallback

from . import processes
from .test_huggingface import bce, data, new_model, new_trainer

pytestmark = [
    pytest.mark.slow,  # each run starts two processes
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]
STEPS, STOP, BATCH = 8, 5, 12


def train(folder, how, world, stop=None):
    size = 24 // world if how == "shard" else 24  # the queues of all hold 24 rows
    loss_fn = P.LossWarmupWrapper(
        bce, P.SmoothAPLoss(1, queue_size=size, temperature=0.3, distributed=how),
        temp_start=0.5, temp_end=0.05, temp_decay_steps=6, warmup_steps=2, blend_steps=3,
    )  # fmt: skip
    checkpoint = None if stop is None else f"{folder}/{how}{world}/checkpoint-{stop}"
    trainer = new_trainer(
        loss_fn, f"{folder}/{how}{world}" + ("" if stop is None else "again"),
        schedule=LossScheduleCallback(loss_fn, resume_from=checkpoint), model=new_model(1).double(),
        rows=data(BATCH * STEPS), per_device_train_batch_size=BATCH // world,
        max_steps=STEPS, save_strategy="steps", save_steps=STOP,
        ddp_backend="gloo" if world > 1 else None,
        train_sampling_strategy="sequential",
    )  # fmt: skip
    trainer.train(resume_from_checkpoint=checkpoint)
    out = {"model": trainer.accelerator.unwrap_model(trainer.model).state_dict()}
    return {**out, "queue": loss_fn.main_loss._queue.state_dict()}


def worker(rank, folder):
    out = {how: train(folder, how, 2) for how in ("gather", "shard")}
    return {**out, "resumed": train(folder, "shard", 2, stop=STOP)}


def equal(one, two):
    return one.keys() == two.keys() and all(torch.equal(one[k], two[k]) for k in one)


def test_two_processes_train_as_one_and_resume_bit_for_bit(tmp_path):
    ranks = processes.run(2, worker, tmp_path)
    alone = train(tmp_path, "gather", 1)
    for how in ("gather", "shard"):
        assert equal(ranks[0][how]["model"], ranks[1][how]["model"])
        for name, x in alone["model"].items():
            # float64; Adam divides by the root of squared gradients, its eps is 1e-8.
            torch.testing.assert_close(ranks[0][how]["model"][name], x, rtol=1e-6, atol=1e-6)
    assert equal(ranks[0]["gather"]["queue"], ranks[1]["gather"]["queue"])
    assert not equal(ranks[0]["shard"]["queue"], ranks[1]["shard"]["queue"])
    for rank in ranks:
        assert equal(rank["resumed"]["model"], rank["shard"]["model"])
        assert equal(rank["resumed"]["queue"], rank["shard"]["queue"])
