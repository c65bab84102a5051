"""A Lightning run that is killed, and resumed from its checkpoint, ends as one that was not."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("lightning", reason="needs proxy-losses[lightning]")
from lightning.pytorch.callbacks import Callback, ModelCheckpoint

from .test_lightning import BATCHES, Module, every_state, fit, new_loss, pytestmark

pytestmark = [*pytestmark, pytest.mark.slow]
ROOT = Path(__file__).parents[1]
EPOCHS, EVERY = 5, 3


class Death(Callback):
    """Notes each loss, to the bit; at one step, ends the process as a power cut would."""

    def __init__(self, folder: Path, step: int) -> None:
        self.file, self.step = folder / "log", step

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        step, loss, _ = module.seen[-1]
        with self.file.open("a") as file:
            file.write(f"{step} {loss.hex()}\n")
        if trainer.global_step == self.step:
            os.kill(os.getpid(), signal.SIGKILL)


def run(folder: Path, unit: str, die: int = -1) -> None:
    """Train from the newest checkpoint of the folder, if there is one, and save the end."""
    saved = sorted(folder.glob("step=*.ckpt"), key=lambda p: int(p.stem.partition("=")[2]))
    module = Module(new_loss(unit))
    save = ModelCheckpoint(folder, filename="{step}", every_n_train_steps=EVERY, save_top_k=-1)
    fit(module, folder, Death(folder, die), save, epochs=EPOCHS,
        ckpt_path=saved[-1] if saved else None)  # fmt: skip
    torch.save(every_state(module), folder / "end")


def losses(folder: Path) -> dict[str, set[str]]:
    """By step: steps after a checkpoint are taken more than once."""
    found: dict[str, set[str]] = {}
    for line in (folder / "log").read_text().splitlines():
        step, loss = line.split()
        found.setdefault(step, set()).add(loss)
    return found


# In warmup, blend and decay; just after a checkpoint, and before the next.
@pytest.mark.parametrize(("unit", "deaths"), [("epochs", (2, 10)), ("steps", (7, 11))])
def test_killed_runs_end_as_if_they_had_not_been(tmp_path, unit, deaths):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    whole.mkdir()
    killed.mkdir()
    run(whole, unit)
    for step in (*deaths, -1):
        command = [sys.executable, "-m", "tests.test_lightning_kill", str(killed), unit, str(step)]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
        assert done.returncode == (0 if step < 0 else -signal.SIGKILL), done.stderr
    assert len(losses(whole)) == EPOCHS * BATCHES
    assert losses(killed) == losses(whole)
    one, two = (torch.load(f / "end", weights_only=True) for f in (whole, killed))
    assert one.keys() == two.keys()
    for name, x in one.items():
        assert torch.equal(x, two[name]) if isinstance(x, torch.Tensor) else x == two[name], name


if __name__ == "__main__":
    run(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]))
