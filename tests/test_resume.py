"""A run that is killed and resumed is the run that was not, to the bit."""

from __future__ import annotations

import pickle
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

import proxy_losses as P

from . import resume_program as program

ROOT = Path(__file__).parents[1]
STEPS = 52  # warmup to step 9 or 12, blend to 19 or 24, decay to 32, 34, 37 or 49, and the rest
PLACES = ("before", "between", "saving")

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


def start(folder: Path, *more: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "tests.resume_program", str(folder), str(STEPS), *more]
    return subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)


def ended(process: subprocess.Popen) -> int:
    _, errors = process.communicate(timeout=300)
    assert process.returncode in (0, -signal.SIGKILL), errors
    return process.returncode


def lines(folder: Path) -> list[list[str]]:
    file = folder / "log"
    found = [line.split("\t") for line in file.read_text().splitlines()] if file.exists() else []
    return [fields for fields in found if fields[-1] == program.END]


def losses(folder: Path) -> dict[tuple[str, str], set[str]]:
    """Losses by step and variant; steps after a checkpoint are taken more than once."""
    found: dict[tuple[str, str], set[str]] = {}
    for step, name, loss, _ in lines(folder):
        found.setdefault((step, name), set()).add(loss)
    return found


def equal(a: Any, b: Any) -> bool:
    if type(a) is not type(b):
        return False
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(equal, a, b))
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    return a == b


def end(folder: Path) -> Any:
    return torch.load(folder / "end", weights_only=True)


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """The run that nobody disturbs, in this process."""
    folder = tmp_path_factory.mktemp("whole")
    program.run(folder, STEPS)
    return folder


def check(folder: Path, whole: Path) -> None:
    once, again = losses(whole), losses(folder)
    assert len(once) == STEPS * len(program.VARIANTS)
    assert again == once  # every step, and the same bits as often as it was taken
    assert equal(end(folder), end(whole))


def test_the_runs_go_through_all_phases(whole):
    """Guard: a run that does nothing would resume well."""
    step, saved = end(whole)
    assert step == STEPS
    wrapped = {k: x[2] for k, x in saved.items() if k.partition(" ")[0] not in ("functions,", "no")}
    assert len(wrapped) == 8
    for loss in wrapped.values():
        switch = loss["_progress"][2]
        assert switch in (9, 12)
        assert loss["main_loss._tau"] == program.RAMP["temp_end"]
        assert loss["main_loss._queue._q_enqueued"] >= program.ROWS
        assert loss.get("main_loss._draws", STEPS - switch) == STEPS - switch
    assert saved["no wrapper"][2]["_tau"].item() == pytest.approx(0.4 * 0.8**7)
    assert {len(values) for values in losses(whole).values()} == {1}
    assert not any("nan" in value for values in losses(whole).values() for value in values)


@pytest.mark.parametrize(
    "deaths",
    [
        pytest.param([(13, "between"), (33, "saving")], id="two kills"),
        pytest.param(
            [(k, random.Random(k).choice(PLACES)) for k in range(1, STEPS - 1, 4)],
            id="a kill every few steps", marks=pytest.mark.slow,
        ),
    ],
)  # fmt: skip
def test_killed_runs_end_as_if_they_had_not_been(deaths, whole, tmp_path, record_property):
    kills = 0
    for step, where in deaths:
        kills += ended(start(tmp_path, "--die", f"{step}:{where}")) == -signal.SIGKILL
    assert ended(start(tmp_path)) == 0
    assert kills == len(deaths)
    record_property("kills", kills)
    assert len(lines(tmp_path)) > len(lines(whole))  # steps were taken again
    check(tmp_path, whole)


@pytest.mark.slow
def test_kills_from_outside(whole, tmp_path, record_property):
    rng, kills = random.Random(0), 0
    while True:
        process = start(tmp_path)
        goal = len(lines(tmp_path)) + rng.randrange(1, 30 * len(program.VARIANTS))
        while process.poll() is None and len(lines(tmp_path)) < goal:
            time.sleep(0.001 * rng.random())
        process.kill()
        if ended(process) == 0:
            break
        kills += 1
        assert kills < 100
    record_property("kills", kills)
    assert kills >= 1  # how many depends on how fast the machine is
    check(tmp_path, whole)


# -- how the states of the functional form are saved


STATES = [
    P.enqueue(P.init_queue(3, 2), torch.ones(2, 2), torch.tensor([1, 0])),
    P.init_schedule(P.Schedule(warmup_steps=2)),
]


@pytest.mark.parametrize("state", STATES, ids=lambda s: type(s).__name__)
def test_a_state_is_saved_as_a_dict_or_a_tuple(state, tmp_path):
    cls, file = type(state), tmp_path / "state"
    torch.save(state._asdict(), file)
    assert equal(cls(**torch.load(file, weights_only=True)), state)
    torch.save(tuple(state), file)
    assert equal(cls(*torch.load(file, weights_only=True)), state)


@pytest.mark.parametrize("state", STATES, ids=lambda s: type(s).__name__)
def test_a_state_itself_needs_its_class_to_be_allowed(state, tmp_path):
    torch.save(state, tmp_path / "state")
    with pytest.raises(pickle.UnpicklingError, match=type(state).__name__):
        torch.load(tmp_path / "state", weights_only=True)
    with torch.serialization.safe_globals([type(state)]):
        assert equal(torch.load(tmp_path / "state", weights_only=True), state)
