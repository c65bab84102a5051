"""Rows and sums of all processes; the only file that names torch.distributed.

Every collective is an opaque op that takes its group by name, so compiled functions hold it whole.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, overload

import torch
import torch.distributed as dist
from torch import Tensor

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup as ProcessGroup

__all__ = ["all_gather_no_grad", "all_gather_with_grad", "world_size"]

LIBRARY = torch.library.Library("proxy_losses", "FRAGMENT")
LIBRARY.define("all_reduce(Tensor x, str how, str group) -> Tensor")
LIBRARY.define("gather_rows(Tensor[] x, str group) -> Tensor[]")
LIBRARY.define("follow(Tensor x, Tensor first) -> Tensor")
LIBRARY.define("own_rows(Tensor x, Tensor start, SymInt rows, str group) -> Tensor")


def world_size(group: ProcessGroup | None = None) -> int:
    """Number of processes of the group, None for the default one; 1 without one.

    Example:
        >>> world_size()
        1
    """
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


def _group(name: str) -> ProcessGroup:
    resolve: Callable[[str], ProcessGroup] = vars(dist.distributed_c10d)["_resolve_process_group"]
    return resolve(name)


def rank_and_size(name: str) -> tuple[int, int]:
    """Of this process in the group with this name; (0, 1) for ""."""
    if not name:
        return 0, 1
    group = _group(name)
    return group.rank(), group.size()


def _to_wire(x: Tensor) -> Tensor:
    # Not every backend carries bool.
    x = x.detach()
    return x.to(torch.uint8) if x.dtype == torch.bool else x


def reduce_known(x: Tensor, how: str, name: str) -> Tensor:
    """Over the ranks: "sum", "min" or "max"; for use inside ops."""
    out = _to_wire(x).clone(memory_format=torch.contiguous_format)
    operation = {"sum": dist.ReduceOp.SUM, "min": dist.ReduceOp.MIN, "max": dist.ReduceOp.MAX}[how]
    dist.all_reduce(out, operation, _group(name))
    return out.to(x.dtype)


def gather_known(x: Tensor, rows: Sequence[int], name: str) -> Tensor:
    """Rows of all ranks in rank order, their numbers of rows known; for use inside ops."""
    wire = _to_wire(x)
    if wire.shape[0] < max(rows):
        wire = torch.cat([wire, wire.new_zeros(max(rows) - wire.shape[0], *wire.shape[1:])])
    wire = wire.contiguous()
    parts = [torch.empty_like(wire) for _ in rows]
    dist.all_gather(parts, wire, _group(name))
    return torch.cat([p[:n] for p, n in zip(parts, rows, strict=True)]).to(x.dtype)


def gather_counts(count: int, device: torch.device, name: str) -> list[int]:
    """One number of every rank; for use inside ops."""
    own = torch.tensor([count], device=device)
    counts = [torch.empty_like(own) for _ in range(rank_and_size(name)[1])]
    dist.all_gather(counts, own, _group(name))
    return [int(n) for n in torch.cat(counts).tolist()]


def _gather(tensors: list[Tensor], name: str) -> list[Tensor]:
    """Rows of all ranks, tensor by tensor, and the number of this rank's first row."""
    rows = gather_counts(tensors[0].shape[0], tensors[0].device, name)
    start = torch.tensor(sum(rows[: rank_and_size(name)[0]]))
    return [*(gather_known(x, rows, name) for x in tensors), start]


def _own_rows(x: Tensor, start: Tensor, rows: int, name: str) -> Tensor:
    """The sum of x over the ranks, but for the rows of the other ranks."""
    total = reduce_known(x, "sum", name)
    return total[int(start) : int(start) + rows].clone()


def _gather_like(tensors: list[Tensor], name: str) -> list[Tensor]:
    rows = torch.library.get_ctx().new_dynamic_size()
    out = [x.new_empty(rows, *x.shape[1:]) for x in tensors]
    return [*out, torch.empty((), dtype=torch.int64)]


for _device in ("CPU", "CUDA"):
    LIBRARY.impl("all_reduce", reduce_known, _device)
    LIBRARY.impl("follow", lambda x, first: x.clone(), _device)
    LIBRARY.impl("gather_rows", _gather, _device)
    LIBRARY.impl("own_rows", _own_rows, _device)
_FAKES: dict[str, Callable[..., Any]] = {
    "all_reduce": lambda x, how, name: torch.empty_like(x, memory_format=torch.contiguous_format),
    "follow": lambda x, first: torch.empty_like(x),
    "gather_rows": _gather_like,
    "own_rows": lambda x, start, rows, name: x.new_empty(rows, *x.shape[1:]),
}
for _name, _fake in _FAKES.items():
    torch.library.register_fake(f"proxy_losses::{_name}", _fake, lib=LIBRARY)


def _op(name: str) -> Callable[..., Any]:
    found: Callable[..., Any] = getattr(torch.ops.proxy_losses, name)
    return found


def _in_graph(function: type[torch.autograd.Function]) -> Callable[..., Any]:
    # A gradient taken inside a compiled function would otherwise be that of the forward's ops.
    def apply(*args: Any) -> Any:
        return function.apply(*args)

    found: Callable[..., Any] = torch.compiler.allow_in_graph(apply)
    return found


class _AllGather(torch.autograd.Function):
    @staticmethod
    def forward(name: str, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(_op("gather_rows")(tensors, name))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.name, ctx.rows = inputs[0], inputs[1].shape[0]
        ctx.mark_non_differentiable(*(x for x in output if not x.is_floating_point()))
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(output[-1])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        # The adjoint of a gather: every rank's loss depends on these rows.
        def back(grad: Tensor | None, need: bool) -> Tensor | None:
            if grad is None or not need:
                return None
            args = grad, ctx.saved_tensors[0], ctx.rows, ctx.name
            own: Tensor = _OwnRows.apply(*args)  # type: ignore[no-untyped-call]
            return own

        return None, *map(back, grads[:-1], ctx.needs_input_grad[1:])


class _OwnRows(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor, start: Tensor, rows: int, name: str) -> Any:
        return _op("own_rows")(x, start, rows, name)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.name = inputs[3]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return _AllGather.apply(ctx.name, grad)[0], None, None, None  # type: ignore[no-untyped-call]


class _Sum(torch.autograd.Function):
    """Sum over the ranks (if not forward, x) whose gradient is scale times a sum over the ranks."""

    @staticmethod
    def forward(x: Tensor, name: str, forward: bool, scale: float) -> Any:
        return _op("all_reduce")(x, "sum", name) if forward else x.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.name, ctx.scale = inputs[1], inputs[3]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        total = _Sum.apply(grad, ctx.name, True, 1.0)  # type: ignore[no-untyped-call]
        return total * ctx.scale, None, None, None


_gather_in_graph, _sum_in_graph = _in_graph(_AllGather), _in_graph(_Sum)


def all_reduce(x: Tensor, how: str, name: str) -> Tensor:
    """Over the group with this name (`group_name`): "sum", "min" or "max"; no gradient."""
    out: Tensor = _op("all_reduce")(x.detach(), how, name) if name else x.detach()
    return out


def follow(x: Tensor, first: Tensor) -> Tensor:
    """x, for a collective that must come after the one that gave ``first``.

    A compiler may exchange ops that share no data, on one rank and not on the other.
    """
    out: Tensor = _op("follow")(x, first)
    return out


def all_reduce_with_grad(x: Tensor, name: str) -> Tensor:
    """Sum over the group with this name; the backward sums over the ranks, its true adjoint."""
    out: Tensor = _sum_in_graph(x, name, True, 1.0) if name else x
    return out


def average_grad(x: Tensor, name: str) -> Tensor:
    """x, alike on all ranks, when each rank derives only its part of the gradient.

    The parts of a loss that all ranks share add up to size times its gradient, as every rank
    back-propagates its own copy; so their mean is the whole gradient, alike on all ranks.
    """
    out: Tensor = _sum_in_graph(x, name, False, 1.0 / rank_and_size(name)[1]) if name else x
    return out


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

    In a compiled function gather what belongs together in one call: the results then share one
    size, and no rank can be compiled to another order of collectives.

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
    out: tuple[Tensor, ...] = _gather_in_graph(name, *every)[:-1] if name else every
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
        every = torch.ops.proxy_losses.gather_rows([x.detach() for x in every], name)[:-1]
    return tuple(every) if tensors else every[0]
