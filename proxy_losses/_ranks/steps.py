"""Means of soft steps, the first positive and gains: on a GPU in a kernel each.

What takes torch four dozen kernels of lists that are short. The gradient is computed on the way.
For plain eager code in one process; what is not `served` is for torch, as on the CPU.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from torch import Tensor

from .._effects import LIBRARY
from .._functions import takes_batches
from .._numerics import plainly_eager
from . import op
from .lists import Lists

LONGEST = 1 << 16  # rows that one program may look through, a few times
MOST_KNOTS = 64  # that it holds side by side
MOST_STEPS = 1 << 18  # of rows times knots that it may look through

LIBRARY.define(
    "mean_above(Tensor scores, Tensor pos, Tensor? valid, Tensor? weight, Tensor tau, Tensor knots,"
    " Tensor? cut, Tensor? among, Tensor? needs, Tensor? precision, int count, int[] spread,"
    " str moves, bool grad) -> (Tensor, Tensor, Tensor, Tensor)"
)
LIBRARY.define(
    "precision_place(Tensor ordered, Tensor order, Tensor pos, Tensor? valid, Tensor precision)"
    " -> (Tensor, Tensor)"
)
LIBRARY.define(
    "first_rank(Tensor scores, Tensor pos, Tensor? valid, Tensor? weight, Tensor tau, bool grad)"
    " -> (Tensor, Tensor, Tensor)"
)
LIBRARY.define(
    "relative_gains(Tensor pos, Tensor? valid, Tensor? gains, Tensor? weight, ScalarType dtype)"
    " -> (Tensor, Tensor, Tensor, Tensor)"
)
LIBRARY.define("ideal_share(Tensor ordered, Tensor total) -> Tensor")


def _kernel(name: str) -> Callable[..., Any]:
    def run(first: Tensor, *args: Any) -> Any:
        kernels = op.kernels_of(first.device)
        assert kernels is not None  # `served` asked
        with torch.cuda.device(first.device):
            return getattr(kernels, name)(first, *args)

    return run


def _mean_like(scores: Tensor, pos: Tensor, *args: Any) -> tuple[Tensor, ...]:
    lists, flag = scores.shape[0], scores.new_empty(scores.shape[0], dtype=torch.bool)
    g = scores.new_empty(scores.shape if args[-1] else (0,))
    return scores.new_empty(lists), g, flag, torch.empty_like(flag)


def _place_like(ordered: Tensor, *args: Any) -> tuple[Tensor, ...]:
    theta = ordered.new_empty(ordered.shape[0], 1)
    return theta, torch.empty_like(theta, dtype=torch.bool)


def _gains_like(pos: Tensor, *args: Any) -> tuple[Tensor, ...]:
    some = pos.new_empty(pos.shape[0])
    total = torch.empty_like(some, dtype=torch.float64)
    return pos.new_empty(pos.shape, dtype=args[-1]), pos.new_empty(pos.shape), some, total


for _name, _fake in (
    ("mean_above", _mean_like),
    ("precision_place", _place_like),
    ("first_rank", lambda *args: _mean_like(*args)[:3]),
    ("relative_gains", _gains_like),
    ("ideal_share", lambda ordered, total: ordered.new_empty(total.shape)),
):
    LIBRARY.impl(_name, _kernel(_name), "CUDA")
    LIBRARY.impl(_name, _fake, "Meta")


# -- calls


def served(lists: Lists, tau: object = None, name: str = "", *, knots: int = 1) -> bool:
    """Whether the kernels compute what these lists ask for: nothing but scores has a gradient."""
    if name or not plainly_eager() or not _runs(lists.scores.device):
        return False
    rows = lists.scores.shape[-1]
    if not 0 < rows <= LONGEST or knots > MOST_KNOTS or rows * knots > MOST_STEPS:
        return False
    if any(isinstance(x, Tensor) and x.requires_grad for x in (tau, *lists[1:])):
        return False
    if any(x is not None and x.device != lists.scores.device for x in lists[1:]):
        return False  # torch says so
    empty = 0 in lists.scores.shape or 0 in lists.pos.shape
    return not empty and torch.autograd.forward_ad._current_level < 0


def _runs(device: torch.device) -> bool:
    """Whether there are kernels, or what counts them."""
    if device.type == "cuda":
        return op.kernels_of(device) is not None
    return device.type == "meta"


def _flat(x: Tensor | None, shape: torch.Size) -> Tensor | None:
    return None if x is None else x.expand(shape).reshape(-1, shape[-1])


class _WithGradient(torch.autograd.Function):
    """Values [...] of scores [..., M] and their gradient, from an op; flags go along.

    To be differentiated twice, the value is computed again by `plain`, from what was kept.
    """

    @staticmethod
    def forward(
        ctx: Any, scores: Tensor, grad: bool, run: Any, plain: Any, *kept: Tensor | None
    ) -> tuple[Tensor, ...]:
        shape = scores.shape
        value, g, *flags = run(scores.reshape(-1, shape[-1]), grad)
        ctx.plain = plain
        ctx.save_for_backward(scores, g, *kept)
        flags = [x.view(shape[:-1]) for x in flags]
        ctx.mark_non_differentiable(*flags)
        ctx.set_materialize_grads(False)
        return value.view(shape[:-1]), *flags

    @staticmethod
    @takes_batches
    def backward(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        none = (None,) * (len(ctx.needs_input_grad) - 1)
        if grad is None:
            return None, *none
        scores, g, *kept = ctx.saved_tensors
        if torch.is_grad_enabled():
            return torch.func.vjp(lambda s: ctx.plain(s, *kept), scores)[1](grad)[0], *none
        return grad.unsqueeze(-1) * g.view(scores.shape), *none


Plain: TypeAlias = Callable[..., Tensor]  # (lists, tau, *more) -> values


def _with_gradient(
    shape: torch.Size, run: Callable[..., Any], plain: Plain, lists: Lists, tau: float | Tensor,
    more: tuple[Tensor | None, ...] = (),
) -> Any:  # fmt: skip
    """What `run` gives of flat scores; lists, tau and more are kept for `plain`."""
    size, number = len(lists) - 1, None if isinstance(tau, Tensor) else tau

    def again(scores: Tensor, *kept: Any) -> Tensor:
        unit = kept[size] if number is None else number
        return plain(Lists(scores, *kept[:size]), unit, *kept[size + 1 :])

    kept = *lists[1:], tau if number is None else None, *more
    scores, grad = (
        lists.scores.expand(shape),
        torch.is_grad_enabled() and lists.scores.requires_grad,
    )
    return _WithGradient.apply(scores, grad, run, again, *kept)  # type: ignore[no-untyped-call]


def mean_above(
    lists: Lists, tau: float | Tensor, knots: Tensor, plain: Plain, whole: Lists | None = None, *,
    count: int = 1, cut: Tensor | None = None, among: Tensor | None = None,
    needs: Tensor | None = None, precision: Tensor | None = None, spread: tuple[int, ...] = (),
    moves: str = "",
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Mean over the positives of the soft steps above knots, their trapezoid.

    Args:
        lists: scores [..., M] and what goes with them, positives among the valid rows.
        tau: as in the metrics.
        knots: [..., T] without gradient, of which the first `count` are knots.
        plain: ``(lists, tau, knots, cut) -> mean`` by torch, for second derivatives; it may not
            hold tensors of its own.
        whole: the lists that it takes, if they are others; the scores are the same.
        count: K.
        cut: [..., 1] bool, lists that have a knot; others have the mean 1. None for all.
        among: [..., M] bool, rows that set the knots; None for the valid ones.
        needs: [..., M] bool: a list without any such row does not count. None: all may.
        precision: [] float64, of moves "precision".
        spread: (upper, lower) of the T, between which is what tau multiplies; () for none. A list
            where that is rounding alone does not count.
        moves: "" for knots that are constants, "quantile" as `with_implicit_grad` and "precision"
            as `with_precision_grad` for knots that have a gradient.

    Returns:
        [...] each: the mean, 0 in lists that do not count, lists that count, lists without spread.
    """
    shape = _shape(lists, among, needs)
    rows = [_flat(x, shape) for x in (*lists[1:4], among, needs)]
    units = op.flat_tau(tau, lists.scores, shape[:-1], "")
    places = knots.expand(*shape[:-1], knots.shape[-1]).reshape(-1, knots.shape[-1])
    cuts = None if cut is None else cut.expand(*shape[:-1], 1).reshape(-1)

    def run(scores: Tensor, grad: bool) -> tuple[Tensor, ...]:
        out: tuple[Tensor, ...] = torch.ops.proxy_losses.mean_above(
            scores, *rows[:3], units, places, cuts, *rows[3:], precision, count, list(spread),
            moves, grad,
        )  # fmt: skip
        return out

    out: tuple[Tensor, Tensor, Tensor] = _with_gradient(
        shape, run, plain, whole or lists, tau, (knots, cut)
    )
    return out


def lowest_at(lists: Lists, precision: float) -> tuple[Tensor, Tensor]:
    """`at_precision` of these lists, positives among the valid rows."""
    shape = _shape(lists._replace(weight=None))
    scores, pos, valid = (_flat(x, shape) for x in (lists.scores.detach(), *lists[1:3]))
    assert scores is not None
    filled = scores if valid is None else torch.where(valid, scores, -math.inf)
    wanted = torch.full((), precision, dtype=torch.float64, device=scores.device)
    ordered = filled.contiguous().sort(-1, descending=True)  # which keeps strides
    theta, cut = torch.ops.proxy_losses.precision_place(*ordered, pos, valid, wanted)
    return theta.view(*shape[:-1], 1), cut.view(*shape[:-1], 1)


def first_rank(lists: Lists, tau: float | Tensor, plain: Plain) -> tuple[Tensor, Tensor]:
    """`smooth_mrr` [...] of lists and which of them count; plain: ``(lists, tau) -> values``."""
    shape = _shape(lists)
    rows = [_flat(x, shape) for x in lists[1:4]]
    units = op.flat_tau(tau, lists.scores, shape[:-1], "")

    def run(scores: Tensor, grad: bool) -> tuple[Tensor, ...]:
        out: tuple[Tensor, ...] = torch.ops.proxy_losses.first_rank(scores, *rows, units, grad)
        return out

    out: tuple[Tensor, Tensor] = _with_gradient(shape, run, plain, lists, tau)
    return out


def relative_gains(lists: Lists, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gains of lists, by weight, in units of the list's largest.

    Returns:
        ([..., M] in dtype, 0 in rows and in lists that do not count; [..., M] bool, where they are
        not; [...] bool, lists that count; [...], the sum of gains over their discounted sum in
        their own order.)
    """
    shape = _shape(lists)
    _, pos, valid, weight, *_, gains = (_flat(x, shape) for x in lists)
    gain, at, some, total = torch.ops.proxy_losses.relative_gains(pos, valid, gains, weight, dtype)
    ordered = gain.sort(-1, descending=True).values
    share = torch.ops.proxy_losses.ideal_share(ordered, total)
    leading = shape[:-1]
    return gain.view(shape), at.view(shape), some.view(leading), share.view(leading)


def _shape(lists: Lists, *masks: Tensor | None) -> torch.Size:
    given = *lists[:4], lists.gains, *masks
    shape: torch.Size = torch.broadcast_shapes(*(x.shape for x in given if x is not None))
    return shape
