"""Which method serves a call of the primitive, and the call."""

from __future__ import annotations

import torch
from torch import Tensor

from . import compact, dense, grid
from .plan import Work, plan

SURELY_DENSE = 100_000  # pairs that cost less than the grid's first operation


def by_method(
    scores: Tensor,
    weights: Tensor,
    at: Tensor,
    tau: Tensor,
    value: bool,
    slope: bool,
    rtol: float,
    method: str,
) -> list[Tensor]:
    """The sums, see `dense.pair_sums`, by the method asked for or, for "auto", the cheaper one."""
    if method == "auto" and scores.numel() * scores.shape[1] > SURELY_DENSE:
        rows = compact.busy_rows(weights, at)
        if rows is not None:
            few = [compact.take(x, rows) for x in (scores, weights, at)]
            parts = _sums(few[0], few[1], few[2], tau, value, slope, rtol, method)
            return [compact.put(x, rows, scores.shape[1]) for x in parts]
    return _sums(scores, weights, at, tau, value, slope, rtol, method)


def _sums(
    scores: Tensor,
    weights: Tensor,
    at: Tensor,
    tau: Tensor,
    value: bool,
    slope: bool,
    rtol: float,
    method: str,
) -> list[Tensor]:
    if choose(scores, weights, at, tau, value + slope, rtol, method) == "grid":
        pair = grid.pair_sums(scores, weights, at, tau, rtol=rtol, value=value, slope=slope)
        return [s for s in pair if s is not None]
    return dense.pair_sums(scores, weights, at, tau, value=value, slope=slope)


def choose(
    scores: Tensor, weights: Tensor, at: Tensor, tau: Tensor, kinds: int, rtol: float, method: str
) -> str:
    """Which method serves this call; counts rows only where the choice is open."""
    lists, rows = scores.shape
    if method != "auto":
        return method
    if lists * rows * rows <= SURELY_DENSE:
        return "dense"
    counts = [x.any(1).sum(1) for x in (weights != 0, at)]
    sources, targets, pairs = torch.stack(
        [counts[0].sum(), counts[1].sum(), torch.minimum(*counts).sum() * rows]
    ).tolist()
    work = Work(lists, rows, sources, targets, weights.shape[1] * kinds, kinds)
    return plan([work], span(scores, tau), rtol, pairs=pairs).method


def span(scores: Tensor, tau: Tensor) -> float:
    """Range of the widest list in units of tau."""
    if scores.shape[0] == 1:  # much faster than along an axis
        low, high = torch.aminmax(scores)
    else:
        low, high = scores.amin(1), scores.amax(1)
    return float(((high.double() - low.double()) / tau).max())


def broken_lists(scores: Tensor) -> Tensor | None:
    """[L] bool, lists with a non-finite score, or None: in every method they become NaN whole."""
    broken = (scores * 0.0).sum(-1).isnan()
    return broken if broken.any() else None
