"""The Lightning callback, with a real Trainer."""

import csv

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

import proxy_losses as P

from .absent import import_without
from .quiet import LIGHTNING

pytest.importorskip("lightning", reason="needs proxy-losses[lightning]")
import lightning.pytorch as pl
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger

from proxy_losses.integrations.lightning import LossScheduleCallback

pytestmark = [*LIGHTNING, pytest.mark.filterwarnings("ignore:.*litlogger")]
BATCHES = 4  # in an epoch


def bce(logits, targets):
    return nn.functional.binary_cross_entropy_with_logits(logits[:, 0], targets.float())


def new_loss(unit="steps", **kwargs):
    size = 1 if unit == "epochs" else 4
    mode = {f"warmup_{unit}": size, f"blend_{unit}": size}
    return P.LossWarmupWrapper(
        bce, P.SmoothAPLoss(1, queue_size=24, temperature=0.3, **kwargs), temp_start=0.5,
        temp_end=0.05, temp_decay_steps=9, **mode,
    )  # fmt: skip


class Body:
    """A linear model whose batches depend on their number alone, however a run was resumed."""

    def __init__(self, loss):
        super().__init__()
        torch.manual_seed(0)
        self.model, self.loss, self.seen = nn.Linear(4, 1), loss, []

    def train_dataloader(self):
        return DataLoader(range(BATCHES))

    val_dataloader = train_dataloader

    def rows(self):
        g = torch.Generator().manual_seed(self.trainer.fit_loop.total_batch_idx)
        x = torch.randn(8, 4, generator=g)
        return x, (x[:, 0] > 0.4).long()

    def training_step(self, batch, batch_idx):
        x, y = self.rows()
        loss = self.loss(self.model(x), y)
        self.seen.append((self.global_step, loss.item(), self.loss.main_weight))
        return loss

    def validation_step(self, batch, batch_idx):
        x, y = self.rows()
        return self.loss(self.model(x), y)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.3)


class Module(Body, pl.LightningModule):
    pass


def fit(module, tmp_path, *callbacks, epochs=5, ckpt_path=None, cls=pl.Trainer, **kwargs):
    trainer = cls(
        accelerator="cpu", max_epochs=epochs, callbacks=[LossScheduleCallback(), *callbacks],
        default_root_dir=tmp_path, enable_progress_bar=False, enable_model_summary=False,
        log_every_n_steps=1, **{"logger": False, "enable_checkpointing": bool(callbacks), **kwargs},
    )  # fmt: skip
    trainer.fit(module, ckpt_path=ckpt_path)
    return trainer


def every_state(module):
    flat = dict(module.state_dict())
    return {**flat, **{f"{k}/{n}": v for k, d in flat.items() if isinstance(d, dict)
                       for n, v in d.items()}}  # fmt: skip


def assert_equal_states(one, two):
    one, two = every_state(one), every_state(two)
    assert one.keys() == two.keys()
    assert any("_q_logits" in k for k in one)
    for name, x in one.items():
        assert torch.equal(x, two[name]) if isinstance(x, torch.Tensor) else x == two[name], name


def driven_by_hand(loss):
    """The same training as `Module` in a plain loop."""
    torch.manual_seed(0)
    model = nn.Linear(4, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
    seen = []
    for step in range(5 * BATCHES):
        if step % BATCHES == 0:
            loss.on_train_epoch_start(step // BATCHES)
        loss.on_train_batch_start(step)
        x = torch.randn(8, 4, generator=torch.Generator().manual_seed(step))
        value = loss(model(x), (x[:, 0] > 0.4).long())
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        seen.append((step, value.item(), loss.main_weight))
    return seen


@pytest.mark.parametrize("unit", ["epochs", "steps"])
def test_it_drives_as_a_plain_loop_does(tmp_path, unit):
    module = Module(new_loss(unit))
    fit(module, tmp_path)
    by_hand = new_loss(unit)
    assert module.seen == driven_by_hand(by_hand)
    assert module.loss.current_temperature == by_hand.current_temperature == pytest.approx(0.05)


@pytest.mark.parametrize("unit", ["epochs", "steps"])
# Mid-warmup, at the switch, mid-blend, mid-decay; at the end of an epoch and within one.
@pytest.mark.parametrize("stop", [2, 4, 6, 8, 11])
def test_resume_equals_the_uninterrupted_run_bit_for_bit(tmp_path, unit, stop):
    save = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    whole = Module(new_loss(unit))
    whole.loss.reset_queue_each_epoch = True
    fit(whole, tmp_path, save)
    resumed = Module(new_loss(unit))
    resumed.loss.reset_queue_each_epoch = True
    fit(resumed, tmp_path, ckpt_path=tmp_path / f"step={stop}.ckpt")
    assert len(resumed.seen) == 5 * BATCHES - stop
    assert resumed.seen == whole.seen[stop:]
    assert_equal_states(resumed, whole)


def test_the_clock_counts_optimizer_steps(tmp_path):
    module = Module(new_loss())
    fit(module, tmp_path, accumulate_grad_batches=2)
    assert [s for s, _, _ in module.seen] == [n // 2 for n in range(5 * BATCHES)]
    weights = [w for _, _, w in module.seen]
    sched = P.Schedule(4, 4)
    assert weights == [float(P.blend_weight(n // 2, sched)) for n in range(5 * BATCHES)]


class Several(Module):
    def __init__(self):
        super().__init__(new_loss())
        shared = new_loss()
        self.heads = nn.ModuleDict({"a": shared, "b": nn.ModuleList([new_loss("epochs")])})
        self.again = shared

    def training_step(self, batch, batch_idx):
        x, y = self.rows()
        return sum(f(self.model(x), y) for f in (self.loss, self.again, self.heads["b"][0]))


def test_several_wrappers_are_driven_and_logged_under_their_names(tmp_path):
    module, logger = Several(), CSVLogger(tmp_path)
    trainer = fit(module, tmp_path, logger=logger, epochs=3)
    names = {
        f"{path}/{value}"
        for path in ("loss", "heads.a", "heads.b.0")
        for value in ("main_weight", "phase", "temperature")
    }
    assert set(trainer.logged_metrics) == names
    for wrapper in (module.loss, module.again, module.heads["b"][0]):
        assert wrapper.main_weight == 1.0
    with open(f"{logger.log_dir}/metrics.csv") as file:
        rows = [{k: float(v) for k, v in row.items()} for row in csv.DictReader(file)]
    assert [r["loss/phase"] for r in rows] == [0] * 4 + [1] * 4 + [2] * 4
    assert [r["heads.b.0/phase"] for r in rows] == [0] * 4 + [1] * 4 + [2] * 4
    want = [float(P.blend_weight(n, P.Schedule(4, 4))) for n in range(12)]
    assert [r["loss/main_weight"] for r in rows] == pytest.approx(want, rel=1e-6)  # float32 logs
    assert rows[8]["loss/temperature"] < rows[4]["loss/temperature"] == 0.5


def test_logging_is_configurable(tmp_path):
    trainer = pl.Trainer(
        accelerator="cpu", max_epochs=1, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False,
        callbacks=[LossScheduleCallback(log=False)],
    )  # fmt: skip
    trainer.fit(Module(new_loss()))
    assert not trainer.logged_metrics
    trainer.callbacks[:] = [LossScheduleCallback(prefix="schedule/")]
    trainer.fit_loop.max_epochs = 2
    trainer.fit(Module(new_loss()))
    assert "schedule/loss/main_weight" in trainer.callback_metrics


def test_a_module_without_wrapper_is_refused(tmp_path):
    hidden = Module(P.SmoothAPLoss(1))
    hidden.losses = [new_loss()]
    with pytest.raises(ValueError, match=r"no LossWarmupWrapper in Module.*ModuleList"):
        fit(hidden, tmp_path)


def test_bfloat16_mixed(tmp_path):
    module = Module(new_loss())
    fit(module, tmp_path, precision="bf16-mixed")
    assert all(torch.isfinite(torch.tensor(x)) for _, x, _ in module.seen)
    # The queue holds what bfloat16 logits were, in its own float32.
    queue = module.loss.main_loss._q_logits
    assert queue.dtype == torch.float32
    assert torch.equal(queue, queue.bfloat16().float())
    assert queue.any()


def test_a_trainer_of_pytorch_lightning(tmp_path, monkeypatch):
    other = pytest.importorskip("pytorch_lightning")

    class Other(Body, other.LightningModule):
        pass

    module = Other(new_loss())
    fit(module, tmp_path, cls=other.Trainer)
    assert module.seen == driven_by_hand(new_loss())
    alone = import_without(monkeypatch, "lightning", "lightning", "lightning.pytorch")
    assert issubclass(alone.LossScheduleCallback, other.Callback)


def test_without_lightning_the_extra_is_named(monkeypatch):
    absent = "lightning", "lightning.pytorch", "pytorch_lightning"
    with pytest.raises(ImportError, match=r"\.\[lightning\]"):
        import_without(monkeypatch, "lightning", *absent)
