"""Launches of the kernels of thresholds, of the first positive and of gains.

`_ranks/steps.py` says what they compute.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from ..._numerics import MOST_PULL
from . import step_kernels as kernels
from .launch import TYPES, plain

BLOCK = 2048  # numbers that a program holds at a time


def _mask(x: Tensor | None, like: Tensor) -> tuple[Tensor, int]:
    """A mask or numbers [L, M] and their stride from list to list, or what stands for none."""
    if x is None:
        return like, 0
    x = plain(x)
    return x, x.stride(0)


def _block(rows: int, columns: int = 1) -> int:
    block: int = min(BLOCK // columns, triton.next_power_of_2(rows))
    return block


def _flags(count: int, lists: int, like: Tensor) -> list[Tensor]:
    return list(torch.empty(count, lists, dtype=torch.bool, device=like.device).unbind())


def mean_above(
    scores: Tensor, pos: Tensor, valid: Tensor | None, weight: Tensor | None, tau: Tensor,
    knots: Tensor, cut: Tensor | None, among: Tensor | None, needs: Tensor | None,
    precision: Tensor | None, count: int, spread: list[int], moves: str, grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Launch `step_means`: mean, gradient, which lists count, which do not spread."""
    lists, rows = scores.shape
    mean, (counts, flat) = scores.new_empty(lists), _flags(2, lists, scores)
    g = scores.new_empty(scores.shape if grad else (0,))
    columns, info = triton.next_power_of_2(count), torch.finfo(scores.dtype)
    upper, lower = spread or (0, 0)
    kernels.step_means[(lists,)](
        scores, *scores.stride(), *_mask(pos, scores), *_mask(valid, scores),
        *_mask(weight, scores), *_mask(among, scores), *_mask(needs, scores), tau, tau.stride(0),
        knots.contiguous(), knots if cut is None else cut.contiguous().view(torch.int8),
        knots if precision is None else precision, mean, counts.view(torch.int8),
        flat.view(torch.int8), g, rows, knots.shape[-1], upper, lower, K=count,
        MASKED=valid is not None, WEIGHTED=weight is not None, AMONG=among is not None,
        NEEDS=needs is not None, SPREAD=bool(spread), CUT=cut is not None, MOVES=moves, GRAD=grad,
        EPS=info.eps, TINY=info.tiny, MOST=MOST_PULL, LIMIT=info.max, DT=TYPES[scores.dtype],
        KB=columns, BLOCK=_block(rows, columns), num_warps=8,
    )  # fmt: skip
    return mean, g, counts, flat


def precision_place(
    ordered: Tensor, order: Tensor, pos: Tensor, valid: Tensor | None, precision: Tensor
) -> tuple[Tensor, Tensor]:
    """Launch `precision_places`: thresholds [L, 1], and whether a row is below [L, 1]."""
    lists, rows = ordered.shape
    theta, (cut,) = ordered.new_empty(lists, 1), _flags(1, lists, ordered)
    kernels.precision_places[(lists,)](
        ordered, order, *_mask(pos, ordered), *_mask(valid, ordered), precision, theta,
        cut.view(torch.int8), rows, MASKED=valid is not None, BLOCK=_block(rows), num_warps=8,
    )  # fmt: skip
    return theta, cut[:, None]


def first_rank(
    scores: Tensor, pos: Tensor, valid: Tensor | None, weight: Tensor | None, tau: Tensor,
    grad: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Launch `first_ranks`: values, gradient, which lists count."""
    lists, rows = scores.shape
    value, (counts,) = scores.new_empty(lists), _flags(1, lists, scores)
    g = scores.new_empty(scores.shape if grad else (0,))
    kernels.first_ranks[(lists,)](
        scores, *scores.stride(), *_mask(pos, scores), *_mask(valid, scores),
        *_mask(weight, scores), tau, tau.stride(0), value, counts.view(torch.int8), g, rows,
        MASKED=valid is not None, WEIGHTED=weight is not None, GRAD=grad, DT=TYPES[scores.dtype],
        BLOCK=_block(rows), num_warps=8,
    )  # fmt: skip
    return value, g, counts


def relative_gains(
    pos: Tensor, valid: Tensor | None, given: Tensor | None, weight: Tensor | None,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Launch `divide_gains`: gains and where they are, which lists count, sums [L] float64."""
    lists, rows = pos.shape
    gain = torch.empty(pos.shape, dtype=dtype, device=pos.device)
    label, (some,) = torch.empty_like(gain, dtype=torch.bool), _flags(1, lists, pos)
    total = torch.empty(lists, dtype=torch.float64, device=pos.device)
    wide = dtype if given is None else torch.promote_types(given.dtype, dtype)
    kernels.divide_gains[(lists,)](
        *_mask(pos, gain), *_mask(valid, gain), *_mask(given, gain), *_mask(weight, gain), gain,
        label.view(torch.int8), some.view(torch.int8), total, rows, MASKED=valid is not None,
        GRADED=given is not None, WEIGHTED=weight is not None, LEAST=-torch.finfo(wide).tiny,
        DT=TYPES[dtype], BLOCK=_block(rows), num_warps=8,
    )  # fmt: skip
    return gain, label, some, total


def ideal_share(ordered: Tensor, total: Tensor) -> Tensor:
    """Launch `ideal_shares`."""
    lists, rows = ordered.shape
    share = ordered.new_empty(lists)
    kernels.ideal_shares[(lists,)](ordered, total, share, rows, BLOCK=_block(rows), num_warps=8)
    return share
