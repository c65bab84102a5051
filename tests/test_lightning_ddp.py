"""The Lightning callback with two processes: gathered and sharded queues in the wrapped module."""

import re

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

import proxy_losses as P

from . import processes
from .quiet import LIGHTNING

pytest.importorskip("lightning", reason="needs proxy-losses[lightning]")
import lightning.pytorch as pl
from lightning.pytorch.callbacks import ModelCheckpoint

from proxy_losses.integrations.lightning import LossScheduleCallback

pytestmark = [pytest.mark.slow, *LIGHTNING]  # they start two processes
STEPS, STOP, WORLD = 12, 7, 2
CHECKPOINT = f"step={STOP}.ckpt"


def bce(logits, targets):
    return nn.functional.binary_cross_entropy_with_logits(logits[:, 0], targets.double())


def new_loss(how, world):
    size = 24 // world if how == "shard" else 24  # the queues of all hold 24 rows
    return P.LossWarmupWrapper(
        bce, P.SmoothAPLoss(1, queue_size=size, temperature=0.3, distributed=how),
        temp_start=0.5, temp_end=0.05, temp_decay_steps=6, warmup_steps=2, blend_steps=3,
    )  # fmt: skip


class Module(pl.LightningModule):
    """Each process takes its share of a batch that is alike on all of them."""

    def __init__(self, world=WORLD):
        super().__init__()
        torch.manual_seed(0)
        self.model = nn.Linear(4, 1).double()
        self.losses = nn.ModuleDict({how: new_loss(how, world) for how in ("gather", "shard")})
        self.seen = []

    def train_dataloader(self):
        return DataLoader(range(STEPS * WORLD))  # dealt out to the processes

    def training_step(self, batch, batch_idx):
        g = torch.Generator().manual_seed(self.global_step)
        x = torch.randn(8, 4, generator=g, dtype=torch.float64)
        y = (x[:, 0] > 0.4).long()
        rows = slice(self.trainer.global_rank, None, self.trainer.world_size)
        values = [f(self.model(x[rows]), y[rows]) for f in self.losses.values()]
        self.seen.append([v.item() for v in values])
        return sum(values)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


class LateModule(Module):
    def __init__(self):
        super().__init__()
        del self.losses

    def configure_model(self):
        self.losses = nn.ModuleDict({"shard": new_loss("shard", WORLD)})


def fit(module, world, ckpt_path=None, save_to=None):
    """How this process ends."""
    callbacks = [LossScheduleCallback()]
    if save_to is not None:
        callbacks.append(
            ModelCheckpoint(save_to, filename="{step}", every_n_train_steps=STOP, save_top_k=-1)
        )
    trainer = pl.Trainer(
        accelerator="cpu", devices=world, strategy="ddp" if world > 1 else "auto",
        max_steps=STEPS, callbacks=callbacks, logger=False,
        enable_checkpointing=save_to is not None,
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(module, ckpt_path=ckpt_path)
    ignored = getattr(module, "_ddp_params_and_buffers_to_ignore", set())
    return {
        "seen": module.seen,
        "weights": module.model.state_dict(),
        "queues": {how: f.main_loss._queue.state_dict() for how, f in module.losses.items()},
        "left_out": {n for n, _ in module.named_buffers()} <= ignored,
    }


def worker(rank, folder):
    """A whole run, one that goes on from its checkpoint, and the error of a loss that is late."""
    whole = fit(Module(WORLD), WORLD, save_to=folder)
    resumed = fit(Module(WORLD), WORLD, ckpt_path=folder / CHECKPOINT)
    try:
        fit(LateModule(), WORLD)
    except RuntimeError as error:
        return whole, resumed, str(error)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("whole")


@pytest.fixture(scope="module")
def ranks(folder):
    return processes.run(WORLD, worker, folder)


def equal(one, two):
    if isinstance(one, torch.Tensor):
        return torch.equal(one, two)
    if isinstance(one, dict):
        return one.keys() == two.keys() and all(equal(one[k], two[k]) for k in one)
    return one == two


def test_two_processes_train_as_one(ranks):
    first, second = (whole for whole, *_ in ranks)
    alone = fit(Module(1), 1)
    # In float64 the ranks of shards agree to 1e-12; the weights feed that back over the steps.
    for name, x in alone["weights"].items():
        torch.testing.assert_close(first["weights"][name], x, rtol=1e-9, atol=1e-9)
    assert equal(first["weights"], second["weights"])
    assert first["left_out"]
    assert equal(first["queues"]["gather"], second["queues"]["gather"])
    rows = [q["queues"]["shard"]["_q_logits"] for q in (first, second)]
    assert rows[0].any()
    assert not torch.isclose(rows[0], rows[1]).any()  # no row of the other process


def test_resumes_bit_for_bit(ranks, folder):
    for whole, again, _ in ranks:
        assert again["seen"] == whole["seen"][STOP:]
        assert equal(again["weights"], whole["weights"])
        assert equal(again["queues"], whole["queues"])

    with pytest.warns(UserWarning, match=r"losses.shard.main_loss: .* of 2 processes, not 1"):
        fit(Module(WORLD), 1, ckpt_path=folder / CHECKPOINT)


def test_a_sharded_loss_that_comes_too_late_is_named(ranks):
    for *_, told in ranks:
        assert re.search(r"losses.shard.main_loss: .* create it in __init__", told)
