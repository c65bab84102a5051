"""What a check reports."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple


class Outcome(NamedTuple):
    """One line of the table."""

    name: str
    passed: bool | None  # None: could not run here
    figure: str  # what was measured, and the bound


def bounded(name: str, value: float, bound: float, what: str) -> Outcome:
    """Passed if value <= bound; NaN fails."""
    return Outcome(name, bool(value <= bound), f"{what} {value:.1e} (at most {bound:.0e})")


def attempt(name: str, check: Callable[[], Outcome]) -> Outcome:
    """The check's outcome; an exception is a failure that says what was raised."""
    try:
        return check()
    except Exception as error:
        text = str(error).strip().splitlines() or [""]
        return Outcome(name, False, f"{type(error).__name__}: {text[0][:100]}")
