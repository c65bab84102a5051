"""What the differences of paired seeds say: their mean, its interval and a word for it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from scipy import stats

OVERLAP = 0.2 / 0.6  # test rows over training rows of a split


def resampled(differences: Sequence[float], overlap: float = OVERLAP) -> tuple[float, float, float]:
    """(mean, half of its 95 % interval, p) of paired differences over random splits.

    The corrected resampled t-test: splits of one table overlap, so that its variance of the mean
    is larger than that of independent runs by the share of test to training rows (Nadeau and
    Bengio, "Inference for the generalization error", Machine Learning 2003). With overlap 0 it is
    the plain paired t-test.
    """
    n = len(differences)
    mean = sum(differences) / n
    variance = sum((d - mean) ** 2 for d in differences) / (n - 1)
    error = math.sqrt((1 / n + overlap) * variance)
    if error == 0:
        return mean, 0.0, 1.0 if mean == 0 else 0.0
    p = 2 * float(stats.t.sf(abs(mean) / error, n - 1))
    return mean, float(stats.t.ppf(0.975, n - 1)) * error, p


class Gain(NamedTuple):
    """A mean of paired differences with its 95 % interval."""

    mean: float
    half: float  # of the interval; NaN of one seed
    verdict: str

    def __str__(self) -> str:
        low, high = self.mean - self.half, self.mean + self.half
        return f"{self.mean:+.2f}" + f" [{low:+.2f}, {high:+.2f}]" * math.isfinite(low)


def gain_of(differences: Sequence[float], overlap: float) -> Gain:
    """The verdict: a tie where the interval holds 0."""
    if len(differences) == 1:
        return Gain(differences[0], math.nan, "one seed says nothing")
    mean, half, _ = resampled(differences, overlap)
    return Gain(mean, half, "tie" if abs(mean) <= half else "win" if mean > 0 else "loss")
