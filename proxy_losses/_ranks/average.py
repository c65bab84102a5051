"""Mean precision at the positives with its gradient: which method, and what is common to all."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .._numerics import clean
from . import bin_ap, dense, grid
from .layout import Ranges
from .method import SURELY_DENSE, broken_lists, span
from .plan import fused_work, plan

COUNT_FROM = 1 << 17  # rows of one list from which exact pairs are out of the question, mostly
WORDS_FROM = 1 << 15  # rows from which two steps to list the positives pay


def mean_precision(
    scores: Tensor,
    pos: Tensor,
    valid: Tensor | None,
    weight: Tensor | None,
    tau: Tensor,
    grad: bool,
    rtol: float,
    method: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Mean precision [L], which lists count [L], and, if asked for, the gradient [L, M].

    See `fused.mean_precision`. Lists that do not count give 0.
    """
    scores = scores.contiguous()  # what comes out has the strides promised to the compiler
    if scores.numel() == 0:
        none = pos.new_zeros(scores.shape[0])
        return none.to(scores.dtype), none, scores.new_zeros(scores.shape if grad else 0)
    if valid is not None:
        if _once(valid).all():
            valid = None
        else:
            scores = clean(scores, valid)
    low, high = _extremes(scores)
    broken = None
    if not (math.isfinite(low) and math.isfinite(high)):  # one such score: NaN for the whole list
        broken = broken_lists(scores)
        assert broken is not None
        scores = torch.where(broken[:, None], 0.0, scores)
        low, high = _extremes(scores)
    lists, rows = scores.shape
    few = lists > 1 or rows < COUNT_FROM
    found = _listed(pos) if few else None
    positives = found[0].numel() if found else int(pos.sum())
    counts, dead = _counts(found, positives, pos, valid, weight)
    if not positives:
        return scores.new_zeros(lists), counts, scores.new_zeros(scores.shape if grad else 0)
    method = _method(scores, tau, positives, (low, high), grad, rtol, method)
    if method == "dense":
        found = found or _listed(pos)
        mean, g = dense.average_precision(scores, found, valid, weight, tau, grad=grad)
    else:
        even = weight is None or _even(_once(weight))
        args = scores, pos, valid, None if even else weight, tau
        mean, g = bin_ap.average_precision(
            *args, _ranges(scores, tau, (low, high)), positives, rtol=rtol, grad=grad
        ) or by_sums(*args, rtol=rtol, grad=grad)
    mean = mean.to(scores.dtype)
    g = scores.new_empty(0) if g is None else g
    if broken is not None:  # a list that does not count stays 0
        broken &= counts
        mean[broken] = torch.nan
        if grad:
            g[broken] = torch.nan
    if dead is not None:
        mean[dead] = 0.0
        if grad:
            g[dead] = 0.0
    return mean, counts, g


def _once(values: Tensor) -> Tensor:
    """[1, M] of values [L, M] that are the same row expanded, else the values."""
    return values[:1] if values.stride(0) == 0 else values


def _listed(pos: Tensor) -> tuple[Tensor, Tensor]:
    """Lists and rows of the positives, in order; few of many are found eight rows at a time."""
    size = pos.numel()
    if size < WORDS_FROM or size % 8 or pos.is_cuda or not pos.is_contiguous():
        lists, index = pos.nonzero(as_tuple=True)
        return lists, index
    rows = pos.view(-1, 8)
    words = rows.view(torch.int64)[:, 0].nonzero()[:, 0]
    if 2 * words.numel() > rows.shape[0]:
        flat = pos.view(-1).nonzero()[:, 0]
    else:
        word, byte = rows.index_select(0, words).nonzero(as_tuple=True)
        flat = words.index_select(0, word).mul_(8).add_(byte)
    if pos.shape[0] == 1:
        return torch.zeros_like(flat), flat
    lists = flat.div(pos.shape[1], rounding_mode="floor")
    return lists, flat - lists * pos.shape[1]


def _counts(
    found: tuple[Tensor, Tensor] | None,
    positives: int,
    pos: Tensor,
    valid: Tensor | None,
    weight: Tensor | None,
) -> tuple[Tensor, Tensor | None]:
    """Lists [L] that count: some positive (of weight > 0), some negative.

    And those with positives that do not count, None where there are none.
    """
    lists, rows = pos.shape
    if lists == 1 and valid is None and weight is None:
        some = 0 < positives < rows
        counts = pos.new_full((1,), some)
        return counts, None if some or not positives else ~counts
    found = found or _listed(pos)
    hits = torch.bincount(found[0], minlength=lists)
    everyone = rows if valid is None else _once(valid).sum(-1)
    counts = (hits > 0).logical_and_(hits < everyone)
    if weight is not None:
        heavy = (weight[found] > 0).to(torch.float64)
        counts.logical_and_(torch.bincount(found[0], heavy, lists) > 0)
    dead = (hits > 0).logical_and_(~counts)
    return counts, dead if dead.any() else None


def _method(
    scores: Tensor,
    tau: Tensor,
    positives: int,
    extremes: tuple[float, float],
    grad: bool,
    rtol: float,
    method: str,
) -> str:
    lists, rows = scores.shape
    pairs = positives * rows
    if method != "auto" or pairs <= SURELY_DENSE:
        return "dense" if method == "auto" else method
    work = [fused_work(lists, rows, grad)]
    if lists > 1 and plan(work, 0.0, rtol, pairs=pairs).method == "dense":
        return "dense"  # even if no range cost anything
    wide = (extremes[1] - extremes[0]) / float(tau) if lists == 1 else span(scores, tau)
    return plan(work, wide, rtol, pairs=pairs).method


def _extremes(scores: Tensor) -> tuple[float, float]:
    """Smallest and largest of all scores; NaN where one is NaN."""
    low, high = torch.aminmax(scores)
    if scores.is_cuda:
        low, high = torch.stack([low, high]).tolist()
    return float(low), float(high)


def _ranges(scores: Tensor, tau: Tensor, extremes: tuple[float, float]) -> Ranges:
    if scores.shape[0] > 1:
        return grid.ranges_of(scores, tau)
    middle = scores[0, :: max(1, scores.shape[1] // 32)].median()
    low, high = extremes
    return Ranges([low], [high], [float(middle)], tau.tolist())


def _even(weight: Tensor) -> bool:
    """Whether all weights are equal and positive, which is the same as none."""
    low, high = torch.aminmax(weight)
    return bool((low == high) & (low > 0))


def by_sums(
    scores: Tensor,
    pos: Tensor,
    valid: Tensor | None,
    weight: Tensor | None,
    tau: Tensor,
    *,
    rtol: float,
    grad: bool,
) -> tuple[Tensor, Tensor | None]:
    """`bin_ap.average_precision` by one or two calls of the grid, for sparse cells."""
    groups = torch.stack([torch.ones_like(pos) if valid is None else valid, pos], 1)
    found = pos.nonzero(as_tuple=True)
    sums = grid.pair_sums(scores, groups, pos[:, None], tau, rtol=rtol, value=True, slope=grad)
    value, slope = (None if s is None else s[found[0], :, found[1]].T.double() for s in sums)
    del sums  # [L, 2, M] each: free before the next two come
    assert value is not None
    ranks = value + 0.5  # the row's own sigmoid(0) is in the sum
    phi = ranks[1] / ranks[0]
    share = torch.ones_like(phi) if weight is None else weight[found].double()
    total = torch.bincount(found[0], share, scores.shape[0])
    share = share / total.clamp(min=torch.finfo(torch.float64).tiny).index_select(0, found[0])
    mean = torch.bincount(found[0], share * phi, scores.shape[0])
    if slope is None:
        return mean, None
    a = share / ranks[0]
    c = torch.stack([-a * phi, a])
    sources = scores.new_zeros(groups.shape)
    sources[found[0], :, found[1]] = c.to(scores.dtype).T
    pull = grid.pair_sums(scores, sources, groups, tau, rtol=rtol, value=False, slope=True)[1]
    assert pull is not None
    g = pull.sum(1)
    g[found] -= (c * slope).sum(0).to(scores.dtype)
    return mean, g.div_(tau.to(scores.dtype)[:, None])
