"""What a rank metric makes of a pair of soft ranks."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor


class Phi(NamedTuple):
    """An analytic function of the soft ranks (R, R+) of a positive: value and derivatives.

    Near-linear sums evaluate it between the rows, at complex-analytic interpolation points. That is
    right where it is analytic off the closed negative real axis, which R never meets there: R+ / R,
    1 / R and 1 / log2(1 + R) are such, a sigmoid of a rank is not.
    """

    name: str
    at: Callable[[Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]  # value, d / dR, d / dR+
    mates: bool = True  # False where it depends on R - R+ alone: positives do not feel each other


def define(phi: Phi) -> Phi:
    """Make a phi known by its name, which is what the registered op takes."""
    if PHIS.setdefault(phi.name, phi) is not phi:
        raise ValueError(f"there is a phi named {phi.name!r} already")
    return phi


PHIS: dict[str, Phi] = {}


def _precision(rank: Tensor, rank_pos: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    inverse = rank.reciprocal()
    value = rank_pos * inverse
    return value, -value * inverse, inverse


def _outranked(rank: Tensor, rank_pos: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    one = torch.ones_like(rank)
    return rank - rank_pos, one, -one


PRECISION = define(Phi("precision", _precision))
OUTRANKED = define(Phi("outranked", _outranked, mates=False))  # negatives above, softly counted
