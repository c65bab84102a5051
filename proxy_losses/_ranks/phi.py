"""What a rank metric makes of a pair of soft ranks."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor


class Phi(NamedTuple):
    """An analytic function of the soft ranks (R, R+) of a positive: value and derivatives.

    Near-linear sums evaluate it between the rows, at complex-analytic interpolation points. That is
    right where it is analytic off the closed negative real axis, which R never meets there: R+ / R,
    1 / R and 1 / log2(1 + R) are such, a sigmoid of a rank is not.
    """

    name: str
    # Value, d / dR, d / dR+; a derivative that is the same everywhere is a number.
    at: Callable[[Tensor, Tensor | float], tuple[Tensor, Tensor | float, Tensor | float]]
    mates: bool = True  # False where it depends on R - R+ alone: positives do not feel each other
    needs_negative: bool = True  # a list without negatives does not count


def define(phi: Phi) -> Phi:
    """Make a phi known by its name, which is what the registered op takes."""
    if PHIS.setdefault(phi.name, phi) is not phi:
        raise ValueError(f"there is a phi named {phi.name!r} already")
    return phi


PHIS: dict[str, Phi] = {}


def _precision(rank: Tensor, rank_pos: Tensor | float) -> tuple[Tensor, Tensor, Tensor]:
    inverse = rank.reciprocal()
    value = rank_pos * inverse
    return value, -value * inverse, inverse


def _outranked(rank: Tensor, rank_pos: Tensor | float) -> tuple[Tensor, float, float]:
    return rank - rank_pos, 1.0, -1.0


def _discount(rank: Tensor, rank_pos: Tensor | float) -> tuple[Tensor, Tensor, float]:
    past = rank + 1.0
    value = math.log(2.0) / past.log()
    return value, value.square() / (past * -math.log(2.0)), 0.0


PRECISION = define(Phi("precision", _precision))
OUTRANKED = define(Phi("outranked", _outranked, mates=False))  # negatives above, softly counted
DISCOUNT = define(Phi("discount", _discount, needs_negative=False))  # 1 / log2(1 + R)
