"""What both commands share: errors of one line, flags, where figures go, colours."""

from __future__ import annotations

import argparse
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, NoReturn
from zipfile import BadZipFile

import numpy as np
import numpy.typing as npt

EPOCHS_VARIABLE = "PROXY_LOSSES_DEMO_EPOCHS"
OURS, THEIRS, TIE, INK = "#0b6e99", "#d9730d", "#888888", "#333333"


class DemoError(Exception):
    """Something the user can mend: a path, a column, a flag, a label."""


class Parser(argparse.ArgumentParser):
    """Errors are one line, without the usage."""

    def __init__(self, prog: str, description: str, epilog: str) -> None:
        kind = argparse.RawDescriptionHelpFormatter
        super().__init__(
            prog, description=description, epilog=epilog, formatter_class=kind, allow_abbrev=False
        )

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {' '.join(message.split())}\n")

    def add_out(self, name: str) -> None:
        note = "where to draw the picture (default: %(default)s)"
        self.add_argument("--out", type=Path, default=Path(name), metavar="PNG", help=note)


def number(kind: Callable[[str], float], low: float, high: float) -> Callable[[str], float]:
    """A flag's type: a number of this kind from low to high."""

    def parse(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not low <= value <= high:
            whole = "whole " * (kind is int)
            raise argparse.ArgumentTypeError(
                f"must be a {whole}number from {low:g} to {high:g}, got {text!r}"
            )
        return value

    return parse


COUNT, SEVERAL = number(int, 0, 1e6), number(int, 1, 1e6)  # more is a slip
SEED, POSITIVE = number(int, 0, 2**31), number(float, 1e-9, 1e9)


def shortened() -> int | None:
    """The most epochs that the environment allows."""
    text = os.environ.get(EPOCHS_VARIABLE, "")
    if not text:
        return None
    if not text.isdecimal() or int(text) < 1:
        raise DemoError(f"{EPOCHS_VARIABLE} must be a whole number, 1 or more, got {text!r}")
    return int(text)


def writable(path: Path) -> Path:
    """Find out before the training, not after it, that the picture cannot be written."""
    path = path.expanduser()
    path = path / "demo.png" if path.is_dir() else path
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    except OSError as error:
        raise DemoError(f"--out {path} cannot be written: {error.strerror}") from error
    return path


def file_of(data: str, suffixes: tuple[str, ...]) -> Path:
    """The file that ``--data`` names."""
    path = Path(data).expanduser()
    if not path.exists():
        raise DemoError(f"no such file: {path}")
    if not path.is_file() or path.suffix.lower() not in suffixes:
        raise DemoError(f"{path} is not a file that ends in {' or '.join(suffixes)}")
    return path


def read_npz(path: Path, names: str) -> list[npt.NDArray[Any]]:
    """Two arrays of a file, by their names in small letters."""
    try:
        with path.open("rb") as file:
            archive = np.load(file)
            found = {name.lower(): archive[name] for name in archive.files}
    except (OSError, ValueError, AttributeError, EOFError, BadZipFile) as error:
        text = "Object arrays" in str(error)
        instead = "; save text labels with y.astype(str)" * text
        raise DemoError(f"cannot read {path}: {error}{instead}") from error
    if not {*names} <= {*found}:
        raise DemoError(f"{path} must hold arrays {' and '.join(names)}, it holds: {[*found]}")
    return [found[name] for name in names]


class Interval(NamedTuple):
    """A mean of paired differences with its 95 % interval."""

    mean: float
    half: float  # of the interval; NaN of one seed

    @property
    def verdict(self) -> str:
        if np.isnan(self.half):
            return "one seed"
        return "tie" if abs(self.mean) <= self.half else "win" if self.mean > 0 else "loss"

    def __str__(self) -> str:
        low, high = self.mean - self.half, self.mean + self.half
        return f"{self.mean:+.2f}" + f" [{low:+.2f}, {high:+.2f}]" * (low == low)


def interval(apart: npt.NDArray[Any], overlap: float) -> Interval:
    """Student's t over seeds.

    Splits of one table overlap, which t does not know: `overlap`, test over training rows, enlarges
    its variance (Nadeau and Bengio, Machine Learning 2003). It is 0 where each seed has own rows.
    """
    from scipy import stats

    n, half = len(apart), math.nan
    if n > 1:
        half = float(stats.t.ppf(0.975, n - 1) * apart.std(ddof=1) * (1 / n + overlap) ** 0.5)
    return Interval(float(apart.mean()), half)


def tidy(ax: Any) -> None:
    """Axes without a box."""
    ax.spines[["top", "right"]].set_visible(False)
    ax.tick_params(labelsize=9, colors=INK)
    ax.set_axisbelow(True)
