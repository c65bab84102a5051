"""Gathering rows from all processes; the only file that names torch.distributed."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

__all__ = ["all_gather_no_grad", "all_gather_with_grad", "world_size"]


def world_size() -> int:
    """Number of processes of the default group, 1 without one.

    Example:
        >>> world_size()
        1
    """
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def _gather(x: Tensor) -> tuple[Tensor, int]:
    """Rows of all ranks in rank order, and where this rank's begin. Ranks may differ in rows."""
    # Not every backend carries bool.
    wire = x.detach().to(torch.uint8) if x.dtype == torch.bool else x.detach()
    size = torch.tensor([x.shape[0]], device=x.device)
    sizes = [torch.zeros_like(size) for _ in range(world_size())]
    dist.all_gather(sizes, size)
    rows = [int(s) for s in sizes]
    padded = wire.new_zeros(max(rows), *wire.shape[1:])
    padded[: x.shape[0]] = wire
    parts = [torch.empty_like(padded) for _ in rows]
    dist.all_gather(parts, padded)
    out = torch.cat([p[:n] for p, n in zip(parts, rows, strict=True)])
    return out.to(x.dtype), sum(rows[: dist.get_rank()])


class _AllGather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        out, ctx.start = _gather(x)
        ctx.rows = x.shape[0]
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        # The adjoint of a gather: every rank's loss depends on these rows.
        total = grad.contiguous().clone()
        dist.all_reduce(total)
        return total[ctx.start : ctx.start + ctx.rows]


def _check(x: Tensor) -> None:
    if not (dist.is_available() and dist.is_initialized()):
        raise RuntimeError(
            "the default process group is not initialized; call "
            "torch.distributed.init_process_group first"
        )
    if x.dim() == 0:
        raise ValueError("expected rows on dim 0, got a 0-d tensor")


def all_gather_with_grad(tensor: Tensor) -> Tensor:
    """Rows of all processes, in rank order; ranks may hold different numbers of rows, or none.

    The backward is the true adjoint: it sums the incoming gradients over the ranks and keeps the
    local rows. So when every rank back-propagates the same loss of the gathered rows, the
    gradient that DistributedDataParallel averages is the single-process gradient.

    Args:
        tensor: [n_rank, ...], alike on all ranks but for dim 0.

    Returns:
        [sum of n_rank, ...]; the same tensor in a group of one.

    Raises:
        RuntimeError: no process group.
        ValueError: a 0-d tensor.
    """
    _check(tensor)
    if world_size() == 1:
        return tensor
    out: Tensor = _AllGather.apply(tensor)  # type: ignore[no-untyped-call]
    return out


def all_gather_no_grad(tensor: Tensor) -> Tensor:
    """Rows of all processes, without gradient: for targets, masks and weights.

    Args:
        tensor: [n_rank, ...], any dtype.

    Returns:
        [sum of n_rank, ...]; the same tensor in a group of one.

    Raises:
        RuntimeError: no process group.
        ValueError: a 0-d tensor.
    """
    _check(tensor)
    return tensor if world_size() == 1 else _gather(tensor)[0]
