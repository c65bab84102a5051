"""Mean precision at the positives and its gradient, computed by either method."""

from __future__ import annotations

import torch
from torch import Tensor

from . import dense, grid
from .op import SURELY_DENSE, broken_lists, pair_sums, span
from .plan import Work, plan

Out = tuple[Tensor, Tensor, Tensor]  # mean [L], precision [L, M], gradient [L, M] or empty


def mean_precision(
    scores: Tensor,
    pos: Tensor,
    valid: Tensor | None,
    weight: Tensor,
    tau: Tensor,
    grad: bool,
    rtol: float,
    method: str,
) -> Out:
    """The op itself, see `fused.mean_precision` for its arguments."""
    scores = scores.contiguous()  # what comes out has the strides promised to the compiler
    if scores.numel() == 0:
        g = scores.new_zeros(scores.shape if grad else 0)
        return scores.new_zeros(scores.shape[0]), torch.zeros_like(scores), g
    broken = broken_lists(scores)
    if broken is not None:
        scores = torch.where(broken[:, None], 0.0, scores)
    index = pos.nonzero(as_tuple=True)
    if index[0].numel() == 0:
        g = scores.new_zeros(scores.shape if grad else 0)
        return scores.new_zeros(scores.shape[0]), torch.zeros_like(scores), g
    if scores.shape[0] == 1:
        out = _one_list(scores, index[1], valid, weight, tau, grad, rtol, method)
    else:
        out = _many_lists(scores, pos, valid, weight, tau, grad, rtol, method)
    if broken is not None:
        broken &= weight.sum(-1) > 0  # a list that does not count stays 0
        for t in out[: 2 + grad]:
            t[broken] = torch.nan
    return out


def _method(scores: Tensor, positives: int, tau: Tensor, grad: bool, rtol: float, how: str) -> str:
    lists, rows = scores.shape
    pairs = positives * rows
    if how != "auto" or pairs <= SURELY_DENSE:
        return "dense" if how == "auto" else how
    calls = [Work(lists, rows, lists * rows, positives, 2 + 2 * grad, 1 + grad)]
    if grad:
        calls.append(Work(lists, rows, positives, lists * rows, 2, 1))
    return plan(calls, span(scores, tau), rtol, pairs=pairs).method


def _one_list(
    scores: Tensor,
    index: Tensor,
    valid: Tensor | None,
    weight: Tensor,
    tau: Tensor,
    grad: bool,
    rtol: float,
    method: str,
) -> Out:
    share = weight[0].index_select(0, index).double()
    share /= share.sum().clamp_(min=torch.finfo(torch.float64).tiny)
    if _method(scores, index.numel(), tau, grad, rtol, method) == "dense":
        only = None if valid is None else valid[0]
        phi, g = dense.average_precision(scores[0], index, only, share, tau[0], grad=grad)
    else:
        phi, g = _on_grid(scores, index, valid, share, tau, grad, rtol)
    precision = torch.zeros_like(scores)
    precision[0].index_copy_(0, index, phi.to(scores.dtype))
    mean = (share @ phi).to(scores.dtype)[None]
    return mean, precision, scores.new_empty(0) if g is None else g[None]


def _on_grid(
    scores: Tensor,
    index: Tensor,
    valid: Tensor | None,
    share: Tensor,
    tau: Tensor,
    grad: bool,
    rtol: float,
) -> tuple[Tensor, Tensor | None]:
    """What `dense.average_precision` returns, by two calls of the grid."""
    rows = scores.shape[1]
    groups = torch.zeros(1, 2, rows, dtype=torch.bool, device=scores.device)
    groups[0, 0] = True if valid is None else valid[0]
    groups[0, 1].index_fill_(0, index, True)
    at = groups[:, 1:]
    sums = grid.pair_sums(scores, groups, at, tau, rtol=rtol, value=True, slope=grad)
    value, slope = (None if s is None else s[0].index_select(1, index).double() for s in sums)
    del sums  # [2, M] each: free before the next two come
    assert value is not None
    ranks = value + 0.5  # the row's own sigmoid(0) is in the sum
    phi = ranks[1] / ranks[0]
    if slope is None:
        return phi, None
    a = share / ranks[0]
    c = torch.stack([-a * phi, a])
    sources = scores.new_zeros(1, 2, rows)
    sources[0].index_copy_(1, index, c.to(scores.dtype))
    pull = grid.pair_sums(scores, sources, groups, tau, rtol=rtol, value=False, slope=True)[1]
    assert pull is not None
    g = pull[0].sum(0)
    g.index_add_(0, index, (c * slope).sum(0).to(scores.dtype), alpha=-1)
    return phi, g.div_(tau[0].to(scores.dtype))


def _many_lists(
    scores: Tensor,
    pos: Tensor,
    valid: Tensor | None,
    weight: Tensor,
    tau: Tensor,
    grad: bool,
    rtol: float,
    method: str,
) -> Out:
    how = (rtol, _method(scores, int(pos.sum()), tau, grad, rtol, method))
    groups = torch.stack([torch.ones_like(pos) if valid is None else valid, pos], 1)
    sums = pair_sums(scores, groups, pos[:, None], tau, True, grad, *how)
    ranks = torch.where(pos[:, None], sums[0] + 0.5, 1.0)
    phi = ranks[:, 1] / ranks[:, 0]
    total = weight.sum(-1, keepdim=True)
    share = weight / torch.where(total > 0, total, 1.0)
    mean, precision = (share * phi).sum(-1), torch.where(pos, phi, 0.0)
    if not grad:
        return mean, precision, scores.new_empty(0)
    a = share / ranks[:, 0]
    c = torch.stack([-a * phi, a], 1)
    pull = pair_sums(scores, c, groups, tau, False, True, *how)[0]
    return mean, precision, (pull - c * sums[1]).sum(1) / tau.to(scores.dtype)[:, None]
