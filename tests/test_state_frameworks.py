"""A model that holds its loss, in the hands of transformers, Lightning, accelerate and FSDP2."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    set_model_state_dict,
)
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader

from . import processes
from .quiet import LIGHTNING
from .states import KINDS, Net, assert_alike, going_on, rows, says, step, trained

pytest.importorskip("lightning", reason="needs proxy-losses[lightning]")
pytest.importorskip("transformers", reason="needs proxy-losses[huggingface]")
import accelerate
import lightning.pytorch as pl
import transformers
from lightning.pytorch.callbacks import (
    EMAWeightAveraging,
    StochasticWeightAveraging,
    WeightAveraging,
)

pytestmark = [*LIGHTNING, pytest.mark.filterwarnings("ignore:.*litlogger")]
every_kind = pytest.mark.parametrize("kind", KINDS)
either = pytest.mark.parametrize("wrapped", [True, False], ids=["wrapper", "loss"])


# -- transformers


class Config(transformers.PretrainedConfig):
    model_type = "with_a_loss"

    def __init__(self, kind: str = "ids", wrapped: bool = True, **more):
        super().__init__(**more)
        self.kind, self.wrapped = kind, wrapped


class Model(transformers.PreTrainedModel):
    config_class = Config

    def __init__(self, config):
        super().__init__(config)
        self.body, self.net = nn.Linear(2, 2), Net(config.kind, config.wrapped)
        self.post_init()


def pretrained(kind: str, wrapped: bool, steps: int = 4) -> Model:
    torch.manual_seed(0)
    model = Model(Config(kind, wrapped))
    for k in range(steps):
        step(model.net, k)
    return model


@every_kind
@either
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_from_pretrained(kind, wrapped, dtype, tmp_path):
    whole = pretrained(kind, wrapped)
    whole.save_pretrained(tmp_path)
    model = Model.from_pretrained(tmp_path, dtype=dtype)
    kept = {n: (b.dtype, b.shape) for n, b in whole.named_buffers()}
    assert {n: (b.dtype, b.shape) for n, b in model.named_buffers()} == kept
    assert model.body.weight.dtype == (dtype or torch.float32)
    model.net.head = copy.deepcopy(whole.net.head)
    assert_alike(model.net.train(), whole.net)


@every_kind
@either
def test_from_a_checkpoint_without_the_loss(kind, wrapped, tmp_path):
    """As a pretrained backbone is: transformers fills the state with memory as it is."""
    whole = pretrained(kind, wrapped)
    whole.net.loss = nn.Identity()
    whole.save_pretrained(tmp_path)
    for _ in range(3):
        gone = [trained(k, w) for k in KINDS for w in (True, False)]
        del gone
        model = Model.from_pretrained(tmp_path)
        want = Net(kind, wrapped)
        want.head = copy.deepcopy(whole.net.head)
        assert_alike(model.net.train(), want)


def test_a_model_made_from_a_configuration_starts_at_the_start():
    model = pretrained("ids", True, steps=0)
    assert says(model.net) == says(Net("ids"))


# -- Lightning


class Module(pl.LightningModule):
    def __init__(self, kind: str, wrapped: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net, self.validated = Net(kind, wrapped), []

    def train_dataloader(self):
        return DataLoader(range(4))

    val_dataloader = train_dataloader

    def training_step(self, batch, batch_idx):
        if self.net.wrapped:
            self.net.loss.on_train_batch_start(self.global_step)
        x, y, more = rows(self.net.kind, int(batch))
        return self.net(x, y, **more)

    def validation_step(self, batch, batch_idx):
        x, y, more = rows(self.net.kind, 50 + int(batch))
        self.validated.append((float(self.net(x, y, **more)), says(self.net)))

    def configure_optimizers(self):
        return torch.optim.SGD(self.net.head.parameters(), lr=0.1)


def fit(module: Module, folder: Path, callback: pl.Callback | None, epochs: int = 2) -> pl.Trainer:
    trainer = pl.Trainer(
        accelerator="cpu", max_epochs=epochs, callbacks=callback, default_root_dir=folder,
        enable_progress_bar=False, enable_model_summary=False, logger=False,
        enable_checkpointing=False, num_sanity_val_steps=0,
    )  # fmt: skip
    trainer.fit(module)
    return trainer


class Still(Module):
    """The parameters stay, so a run with an average is one without."""

    def configure_optimizers(self):
        return torch.optim.SGD(self.net.head.parameters(), lr=0.0)


@every_kind
@either
@pytest.mark.parametrize("average", [WeightAveraging, EMAWeightAveraging])
def test_lightning_averages_parameters(kind, wrapped, average, tmp_path):
    module, alone = Still(kind, wrapped), Still(kind, wrapped)
    trainer = fit(module, tmp_path, average(use_buffers=False))
    fit(alone, tmp_path, None)
    assert [said for _, said in module.validated] == [said for _, said in alone.validated]
    # An average of a parameter with itself may round.
    want = pytest.approx([loss for loss, _ in alone.validated], rel=1e-5)
    assert [loss for loss, _ in module.validated] == want
    trainer.save_checkpoint(tmp_path / "after.ckpt")
    resumed = Still(kind, wrapped)
    resumed.load_state_dict(torch.load(tmp_path / "after.ckpt", weights_only=True)["state_dict"])
    assert_alike(copy.deepcopy(resumed.net), copy.deepcopy(module.net))
    # The last averages were those after the last step, whose batch is stored by then.
    resumed.net.head = copy.deepcopy(alone.net.head)
    assert_alike(resumed.net, alone.net)


@pytest.mark.parametrize("average", [WeightAveraging, EMAWeightAveraging])
@pytest.mark.parametrize("wrapped", [True, False], ids=["wrapper", "loss"])
def test_lightning_that_averages_buffers_is_told_at_validation(average, wrapped, tmp_path):
    with pytest.raises(RuntimeError, match=r"averaged.*use_buffers=False"):
        fit(Module("ids", wrapped), tmp_path, average())


@pytest.mark.parametrize("kind", KINDS)
def test_lightning_that_averages_weights_stochastically(kind, tmp_path):
    """It averages parameters alone, in a copy of the whole module."""
    module, alone = Still(kind, True), Still(kind, True)
    swa = StochasticWeightAveraging(swa_lrs=1e-9, swa_epoch_start=1)
    fit(module, tmp_path, swa, epochs=3)
    fit(alone, tmp_path, None, epochs=3)
    assert_alike(module.net, alone.net)


# -- accelerate


@every_kind
@either
def test_accelerate_prepares_and_saves_a_model_with_its_loss(kind, wrapped, tmp_path):
    def train(steps, load=None):
        torch.manual_seed(0)
        accelerator = accelerate.Accelerator(cpu=True)
        net = accelerator.prepare(Net(kind, wrapped))
        if load:
            accelerator.load_state(str(load))
        seen = [float(step(net, k)) for k in steps]
        return seen, net, accelerator

    first, whole, accelerator = train(range(4))
    accelerator.save_state(str(tmp_path))
    second, resumed, _ = train(range(4, 6), tmp_path)
    assert second == [float(step(whole, k)) for k in (4, 5)]
    assert first[0] != second[0]
    assert_alike(resumed, whole)


@pytest.mark.parametrize("buffers", [False, True])
def test_accelerate_builds_on_meta_and_loads(buffers, tmp_path):
    whole = trained("ids")
    torch.save(whole.state_dict(), tmp_path / "pytorch_model.bin")
    with accelerate.init_empty_weights(include_buffers=buffers):
        net = Net("ids")
    net = accelerate.load_checkpoint_and_dispatch(
        net, str(tmp_path / "pytorch_model.bin"), device_map={"": "cpu"}
    )
    assert_alike(net, whole)


# -- FSDP2


def fsdp2(kind: str) -> tuple:
    """Two processes gather: each has the rows of both, and so has the model that is not sharded."""
    with torch.device("meta"):
        sharded, resumed = Net(kind), Net(kind)
    torch.manual_seed(0)
    alone = Net(kind)
    for net in (sharded, resumed):
        fully_shard(net.head)
        fully_shard(net)
        net.to_empty(device="cpu")
    options = StateDictOptions(full_state_dict=True)
    set_model_state_dict(sharded, alone.state_dict(), options=options)
    for net in (alone, sharded):
        for k in range(4):
            step(net, k)
    saved = get_model_state_dict(sharded, options=options)
    set_model_state_dict(resumed, saved, options=options)
    goes_on = [going_on(net) for net in (resumed, sharded, alone)]
    return says(alone), says(sharded), goes_on


def worker(rank: int, kinds: list[str]) -> dict[str, tuple]:
    warnings.simplefilter("error", UserWarning)
    return {kind: fsdp2(kind) for kind in kinds}


@pytest.fixture(scope="module", params=[1, pytest.param(2, marks=pytest.mark.slow)])
def ranks(request) -> list[dict[str, tuple]]:
    return processes.run(request.param, worker, list(KINDS))


@every_kind
def test_fsdp2_of_a_model_with_its_loss(kind, ranks):
    for found in ranks:
        said, sharded, (resumed, going, alone) = found[kind]
        assert said == sharded
        assert resumed == going == alone
        assert len(set(going)) == len(going)
