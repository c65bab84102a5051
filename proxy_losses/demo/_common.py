"""What both commands share: flags, errors of one line, intervals, the look of a picture."""

from __future__ import annotations

import argparse
import math
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, NoReturn, TypeAlias

EPOCHS_VARIABLE = "PROXY_LOSSES_DEMO_EPOCHS"
OURS, THEIRS, GREY = "#0b6e99", "#d9730d", "#888888"
# Name, metavar, type, default and help, to which a default that is not None is added.
Flag: TypeAlias = tuple[str, str, Any, Any, str]


class DemoError(Exception):
    """Something the user can mend: a path, a column, a flag, a label."""


class Parser(argparse.ArgumentParser):
    """Flags of a table; errors are one line, without the usage."""

    def __init__(self, prog: str, description: str, epilog: str, flags: Sequence[Flag]) -> None:
        kind = argparse.RawDescriptionHelpFormatter
        super().__init__(prog, None, description, epilog, formatter_class=kind, allow_abbrev=False)
        for flag, name, parse, default, note in flags:
            if parse is bool:
                self.add_argument(flag, action="store_true", help=note)
                continue
            note += " (default: %(default)s)" * (default is not None)
            self.add_argument(flag, metavar=name, type=parse, default=default, help=note)

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {' '.join(message.split())}\n")


def number(kind: Callable[[str], float], low: float, high: float = 1e6) -> Callable[[str], float]:
    """A flag's type: a number of this kind from low to high."""

    def parse(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not low <= value <= high:
            wanted = f"must be a {'whole ' * (kind is int)}number from {low:g} to {high:g}"
            raise argparse.ArgumentTypeError(f"{wanted}, got {text!r}")
        return value

    return parse


def shortened() -> int | None:
    """The most epochs that the environment allows."""
    text = os.environ.get(EPOCHS_VARIABLE, "")
    if text and not (text.isdecimal() and int(text)):
        raise DemoError(f"{EPOCHS_VARIABLE} must be a whole number, 1 or more, got {text!r}")
    return int(text) if text else None


class Gain(NamedTuple):
    """A mean of paired differences with its 95 % interval."""

    mean: float
    half: float  # of the interval; NaN of one seed
    verdict: str

    def __str__(self) -> str:
        low, high = self.mean - self.half, self.mean + self.half
        return f"{self.mean:+.2f}" + f" [{low:+.2f}, {high:+.2f}]" * (low == low)


def gain_of(apart: Any, overlap: float) -> Gain:
    """Student's t over the differences of the seeds.

    Splits of one table overlap, which t does not know: `overlap`, test over training rows, enlarges
    its variance (Nadeau and Bengio, Machine Learning 2003). It is 0 where each seed has own rows.
    """
    from scipy import stats

    n, mean = len(apart), float(apart.mean())
    if n == 1:
        return Gain(mean, math.nan, "one seed")
    half = stats.t.ppf(0.975, n - 1) * apart.std(ddof=1) * (1 / n + overlap) ** 0.5
    return Gain(mean, float(half), "tie" if abs(mean) <= half else "win" if mean > 0 else "loss")


@contextmanager
def picture(path: Path) -> Iterator[Any]:
    """Two axes, written to the path at the end; that it can be written is found out at once."""
    import matplotlib
    from matplotlib.figure import Figure

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.open("ab").close()
    except OSError as error:
        raise DemoError(f"--out {path} cannot be written: {error.strerror}") from error
    style: dict[Any, Any] = {"axes.axisbelow": True, "axes.titlesize": 10.5}
    style |= dict.fromkeys(["axes.spines.top", "axes.spines.right", "legend.frameon"], False)
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(11, 4.4), dpi=130, layout="constrained")
        yield figure.subplots(1, 2)
        figure.savefig(path, format="png")
    print(f"picture: {path}", flush=True)
