"""What the sums are over, and how they are to be computed."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from ..distributed import ProcessGroup

METHODS = ("auto", "dense", "grid")


class Lists(NamedTuple):
    """Lists to rank, on the last axis; masks and weights broadcast to the scores."""

    scores: Tensor  # [..., M] floating; where not valid, anything
    pos: Tensor  # [..., M] bool
    valid: Tensor | None = None  # [..., M] bool, rows that count; None for all
    weight: Tensor | None = None  # [..., M] floating >= 0, read at valid positives; None for 1
    iid: Tensor | None = None  # [..., M] bool, rows that may set a band; None for all
    live: Tensor | None = None  # [..., M] bool, rows of the present batch; None for all
    gains: Tensor | None = None  # [..., M] real >= 0, of the positives; None for 1


class How(NamedTuple):
    """How sums over pairs are to be computed."""

    rtol: float | None = None  # accuracy, None for that of the dtype
    method: str = "auto"
    group: ProcessGroup | None = None  # processes that hold the lists together


class Pairs(NamedTuple):
    """Sources and targets of sums over pairs, inside the ops."""

    scores: Tensor  # [L, M] float32 or float64
    weights: Tensor  # [L, G, M] floating or bool, of the sources
    at: Tensor  # [L, 1 or G, M] bool, the targets of each group
    tau: Tensor  # [L] float64 > 0
