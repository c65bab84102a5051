"""Rows and sums of all processes; the only file that names torch.distributed.

Every collective is an opaque op that takes its group by name, so compiled functions hold it whole.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, overload

import torch
import torch.distributed as dist
from torch import Tensor

from ._effects import LIBRARY, register
from ._functions import in_graph, takes_batches

if TYPE_CHECKING or dist.is_available():
    from torch.distributed import ProcessGroup as ProcessGroup
else:  # what annotations name is there
    ProcessGroup = Any

__all__ = ["all_gather_no_grad", "all_gather_with_grad", "world_size"]

LIBRARY.define("all_reduce(Tensor x, str how, str group) -> Tensor")
LIBRARY.define("gather_rows(Tensor[] x, str group) -> Tensor")
LIBRARY.define("unpack_rows(Tensor packed, Tensor[] like) -> Tensor[]")
LIBRARY.define("own_rows(Tensor x, SymInt rows, str group) -> Tensor")


def world_size(group: ProcessGroup | None = None) -> int:
    """Number of processes of the group, None for the default one; 1 without one."""
    return dist.get_world_size(group) if dist.is_available() and dist.is_initialized() else 1


def group_name(group: ProcessGroup | None) -> str:
    """What ops take for a group: its name, "" for None and for a group of one.

    Raises:
        ValueError: this process is not in the group.
    """
    if group is None:
        return ""
    size = world_size(group)
    if size < 1:
        raise ValueError("group: this process is not a member")
    return "" if size == 1 else str(group.group_name)


def default_group() -> ProcessGroup:
    """All processes."""
    return dist.group.WORLD  # type: ignore[return-value]


def default_rank() -> int:
    """Of this process among all; compiled code knows it."""
    return dist.get_rank()


def _group(name: str) -> ProcessGroup:
    return dist.distributed_c10d._resolve_process_group(name)  # type: ignore[attr-defined, arg-type]


def rank_and_size(name: str) -> tuple[int, int]:
    """Of this process in the group with this name; (0, 1) for ""."""
    return (dist.get_rank(_group(name)), dist.get_world_size(_group(name))) if name else (0, 1)


def _to_wire(x: Tensor) -> Tensor:
    return x.detach().to(torch.uint8 if x.dtype == torch.bool else x.dtype)  # bool is not carried


def reduce_now(x: Tensor, how: str, name: str) -> Tensor:
    """Over the ranks: "sum", "mean", "min" or "max"; for use inside ops."""
    out = _to_wire(x).clone(memory_format=torch.contiguous_format)
    operation = {"min": dist.ReduceOp.MIN, "max": dist.ReduceOp.MAX}.get(how, dist.ReduceOp.SUM)
    dist.all_reduce(out, operation, _group(name))
    return (out.div_(rank_and_size(name)[1]) if how == "mean" else out).to(x.dtype)


def gather_known(x: Tensor, rows: Sequence[int], name: str) -> Tensor:
    """Rows of all ranks in rank order, their numbers of rows known; for use inside ops."""
    wire = _to_wire(x)
    if wire.shape[0] < max(rows):
        wire = torch.cat([wire, wire.new_zeros(max(rows) - wire.shape[0], *wire.shape[1:])])
    parts = _of_all(wire.contiguous(), name)
    return torch.cat([p[:n] for p, n in zip(parts, rows, strict=True)]).to(x.dtype)


def gather_counts(count: int, device: torch.device, name: str) -> list[int]:
    """One number of every rank; for use inside ops."""
    return [int(n) for n in torch.cat(_of_all(torch.tensor([count], device=device), name)).tolist()]


def _of_all(own: Tensor, name: str) -> list[Tensor]:
    group = _group(name)
    parts = [torch.empty_like(own) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, own, *(() if group == default_group() else (group,)))
    return parts


def _row_bytes(x: Tensor) -> int:
    return math.prod(x.shape[1:]) * x.element_size()


def _as_bytes(x: Tensor) -> Tensor:
    rows, width = x.shape[0], math.prod(x.shape[1:])
    # A contiguous tensor may have any strides where it has no or one element; its bytes may not.
    return x.detach().contiguous().as_strided((rows, width), (width, 1)).view(torch.uint8)


def _gather(tensors: list[Tensor], name: str) -> Tensor:
    """[all rows, bytes of a row of all tensors], in rank order."""
    counts = gather_counts(tensors[0].shape[0], tensors[0].device, name)
    x = tensors[0]
    if len(tensors) > 1 or x.dtype not in (torch.float32, torch.float64, torch.int64):
        x = torch.cat([_as_bytes(x) for x in tensors], 1)  # not every backend carries all dtypes
    return _as_bytes(gather_known(x, counts, name))


def _unpack(packed: Tensor, like: list[Tensor]) -> list[Tensor]:
    columns = packed.split([_row_bytes(x) for x in like], 1)
    shapes = [(packed.shape[0], *x.shape[1:]) for x in like]
    return [c.clone(memory_format=torch.contiguous_format).view(x.dtype).view(shape)
            if c.numel() else x.new_empty(shape)
            for c, x, shape in zip(columns, like, shapes, strict=True)]  # fmt: skip


def _own_rows(x: Tensor, rows: int, name: str) -> Tensor:
    """The sum of x over the ranks, but for the rows of the other ranks."""
    start = sum(gather_counts(rows, x.device, name)[: rank_and_size(name)[0]])
    return reduce_now(x, "sum", name)[start : start + rows].clone()


def _gather_like(tensors: list[Tensor], name: str) -> Tensor:
    rows, width = torch.library.get_ctx().new_dynamic_size(), sum(map(_row_bytes, tensors))
    return tensors[0].new_empty(rows, width, dtype=torch.uint8)


_OPS: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    "all_reduce": (reduce_now, lambda x, how, name: torch.empty_like(x).contiguous()),
    "gather_rows": (_gather, _gather_like),
    "own_rows": (_own_rows, lambda x, rows, name: x.new_empty(rows, *x.shape[1:])),
    "unpack_rows": (
        _unpack, lambda packed, like: [x.new_empty(packed.shape[0], *x.shape[1:]) for x in like]
    ),
}  # fmt: skip
for _name, (_function, _fake) in _OPS.items():
    _sends, _fixed = _name != "unpack_rows", _name != "gather_rows"
    register(_name, _function, _fake, collective=_sends, effect=_fixed)


def _op(name: str) -> Callable[..., Any]:
    return getattr(torch.ops.proxy_losses, name)  # type: ignore[no-any-return]


class _AllGather(torch.autograd.Function):
    @staticmethod
    def forward(name: str, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(_op("unpack_rows")(_op("gather_rows")(tensors, name), tensors))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.name, ctx.rows = inputs[0], inputs[1].shape[0]
        ctx.mark_non_differentiable(*(x for x in output if not x.is_floating_point()))
        ctx.set_materialize_grads(False)

    @staticmethod
    def vmap(info: Any, dims: tuple[Any, ...], name: str, *tensors: Tensor) -> Any:
        moved = (
            x if d is None else x.movedim(d, -1) for x, d in zip(tensors, dims[1:], strict=True)
        )
        out = _AllGather.apply(name, *moved)  # type: ignore[no-untyped-call]
        there = tuple(None if d is None else 0 for d in dims[1:])
        pairs = zip(out, there, strict=True)
        return tuple(x if d is None else x.movedim(-1, 0) for x, d in pairs), there

    @staticmethod
    @takes_batches
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        # The adjoint of a gather: every rank's loss depends on these rows.
        def back(grad: Tensor | None, need: bool) -> Tensor | None:
            if grad is None or not need:
                return None
            own: Tensor = _OwnRows.apply(grad, ctx.rows, ctx.name)  # type: ignore[no-untyped-call]
            return own

        return None, *map(back, grads, ctx.needs_input_grad[1:])


class _OwnRows(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor, rows: int, name: str) -> Any:
        return _op("own_rows")(x, rows, name)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.name = inputs[2]

    @staticmethod
    def vmap(info: Any, dims: tuple[Any, ...], x: Tensor, *args: Any) -> tuple[Tensor, int]:
        own: Tensor = _OwnRows.apply(x.movedim(dims[0], -1), *args)  # type: ignore[no-untyped-call]
        return own.movedim(-1, 0), 0

    @staticmethod
    @takes_batches
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return _AllGather.apply(ctx.name, grad)[0], None, None  # type: ignore[no-untyped-call]


class _Reduce(torch.autograd.Function):
    """x reduced over the ranks in one way (or left, for ""), its gradient in another."""

    @staticmethod
    def forward(x: Tensor, name: str, how: str, back: str) -> Any:
        return _op("all_reduce")(x, how, name) if how else x.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, ctx.name, _, ctx.back = inputs

    @staticmethod
    def vmap(info: Any, dims: tuple[Any, ...], *args: Any) -> tuple[Any, Any]:
        return _Reduce.apply(*args), dims[0]  # type: ignore[no-untyped-call]

    @staticmethod
    @takes_batches
    def backward(ctx: Any, grad: Tensor) -> Any:
        # Sum and mean are their own adjoints.
        args = grad, ctx.name, ctx.back, ctx.back
        return _Reduce.apply(*args), None, None, None  # type: ignore[no-untyped-call]


_gather_in_graph, _reduce_in_graph = in_graph(_AllGather), in_graph(_Reduce)


def all_reduce(x: Tensor, how: str, name: str) -> Tensor:
    """Over the group with this name (`group_name`): "sum", "mean", "min" or "max"; no gradient."""
    return _op("all_reduce")(x.detach(), how, name) if name else x.detach()


def all_reduce_with_grad(x: Tensor, name: str) -> Tensor:
    """Sum over the group with this name; the backward sums over the ranks, its true adjoint."""
    return _reduce_in_graph(x, name, "sum", "sum") if name else x


def average_grad(x: Tensor, name: str) -> Tensor:
    """x, alike on all ranks, when each rank derives only its part of the gradient.

    The parts of a loss that all ranks share add up to size times its gradient, as every rank
    back-propagates its own copy; so their mean is the whole gradient, alike on all ranks.
    """
    return _reduce_in_graph(x, name, "", "mean") if name else x


def _checked_name(tensors: tuple[Tensor, ...], group: ProcessGroup | None) -> str:
    if not (dist.is_available() and dist.is_initialized()):
        raise RuntimeError(
            "the default process group is not initialized; call "
            "torch.distributed.init_process_group first"
        )
    if any(x.dim() == 0 for x in tensors):
        raise ValueError("expected rows on dim 0, got a 0-d tensor")
    if len({x.shape[0] for x in tensors}) > 1:
        rows = [x.shape[0] for x in tensors]
        raise ValueError(f"tensors gathered together must share dim 0, got {rows}")
    return group_name(dist.group.WORLD if group is None else group)


@overload
def all_gather_with_grad(tensor: Tensor, *, group: ProcessGroup | None = None) -> Tensor: ...
@overload
def all_gather_with_grad(
    tensor: Tensor, *tensors: Tensor, group: ProcessGroup | None = None
) -> tuple[Tensor, ...]: ...
def all_gather_with_grad(
    tensor: Tensor, *tensors: Tensor, group: ProcessGroup | None = None
) -> Tensor | tuple[Tensor, ...]:
    """Rows of all processes, in rank order; ranks may hold different numbers of rows, or none.

    The backward is the true adjoint: it sums the incoming gradients over the ranks and keeps the
    local rows. So when every rank back-propagates the same loss of the gathered rows, the
    gradient that DistributedDataParallel averages is the single-process gradient.

    What belongs together goes in one call: in a compiled function the results then share one size,
    and the order of collectives cannot differ between ranks. The numbers of rows are exchanged
    first, and waited for.

    Args:
        tensor: [n_rank, ...], alike on all ranks but for dim 0.
        *tensors: more of that length; targets, masks and weights come along without gradient.
        group: processes to gather from; None for the default group.

    Returns:
        [sum of n_rank, ...] for one tensor, else one for each; the same tensors in a group of one.

    Raises:
        RuntimeError: no process group.
        ValueError: a 0-d tensor, tensors of different lengths, or a group without this process.
    """
    every = (tensor, *tensors)
    name = _checked_name(every, group)
    out: tuple[Tensor, ...] = _gather_in_graph(name, *every) if name else every
    return out if tensors else out[0]


@overload
def all_gather_no_grad(tensor: Tensor, *, group: ProcessGroup | None = None) -> Tensor: ...
@overload
def all_gather_no_grad(
    tensor: Tensor, *tensors: Tensor, group: ProcessGroup | None = None
) -> tuple[Tensor, ...]: ...
def all_gather_no_grad(
    tensor: Tensor, *tensors: Tensor, group: ProcessGroup | None = None
) -> Tensor | tuple[Tensor, ...]:
    """Rows of all processes, without gradient: for targets, masks and weights.

    Args, Returns, Raises: as `all_gather_with_grad`, of any dtype.
    """
    every = (tensor, *tensors)
    name = _checked_name(every, group)
    if name:
        every = _gather_in_graph(name, *(x.detach() for x in every))
    return every if tensors else every[0]
