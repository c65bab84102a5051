"""Registration of the primitive: eager, autograd, vmap, torch.func, compile and export.

Two opaque ops hold what depends on the data; an autograd.Function per direction gives the
derivative; `allow_in_graph` keeps that derivative when a gradient is taken inside a compiled
function (without it, 2.13 silently differentiates the forward instead).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..distributed import all_reduce
from .method import broken_lists, by_method

LIBRARY = torch.library.Library("proxy_losses", "FRAGMENT")
LIBRARY.define(
    "pair_sums(Tensor scores, Tensor weights, Tensor at, Tensor tau, bool value, bool slope,"
    " float rtol, str method) -> Tensor[]"
)


def pair_sums(
    scores: Tensor,
    weights: Tensor,
    at: Tensor,
    tau: Tensor,
    value: bool,
    slope: bool,
    rtol: float,
    method: str,
) -> list[Tensor]:
    """The op itself, see `dense.pair_sums` for its arguments."""
    if scores.numel() == 0 or weights.shape[1] == 0:
        return like(scores, weights, at, tau, value, slope, rtol, method)
    broken = broken_lists(scores)
    if broken is not None:
        scores = torch.where(broken[:, None], 0.0, scores)
    sums = by_method(scores, weights, at, tau, value, slope, rtol, method)
    if broken is None:
        return sums
    return [s.masked_fill_(broken[:, None, None] & at, torch.nan) for s in sums]


def like(
    scores: Tensor,
    weights: Tensor,
    at: Tensor,
    tau: Tensor,
    value: bool,
    slope: bool,
    rtol: float,
    method: str,
) -> list[Tensor]:
    """Tensors of the shapes that the op returns."""
    return [scores.new_empty(weights.shape) for _ in range(value + slope)]


def fold(
    batch_size: int, dims: tuple[int | None, ...], args: tuple[Any, ...], count: int
) -> tuple[list[Tensor | None], torch.Size]:
    """Fold the mapped axis of the first `count` arguments into their list axis."""
    tensors = [
        None if t is None else t.movedim(d, 0) if d is not None else t.expand(batch_size, *t.shape)
        for t, d in zip(args[:count], dims[:count], strict=True)
    ]
    assert tensors[0] is not None
    lists = tensors[0].shape[:2]
    return [None if t is None else t.reshape(-1, *t.shape[2:]) for t in tensors], lists


def _vmap(
    info: Any, dims: tuple[int | None, ...], *args: Any
) -> tuple[list[Tensor], list[int | None]]:
    flat, lists = fold(info.batch_size, dims, args, 4)
    sums = torch.ops.proxy_losses.pair_sums(*flat, *args[4:])
    return [s.unflatten(0, lists) for s in sums], [0] * len(sums)


for _device in ("CPU", "CUDA"):
    LIBRARY.impl("pair_sums", pair_sums, _device)
torch.library.register_fake("proxy_losses::pair_sums", like, lib=LIBRARY)
torch.library.register_vmap("proxy_losses::pair_sums", _vmap, lib=LIBRARY)


def sums_over(group: str) -> Callable[..., list[Tensor]]:
    """The op for one process, or the one for a pool sharded over a group."""
    if not group:
        return torch.ops.proxy_losses.pair_sums
    return lambda *args: list(torch.ops.proxy_losses.sharded_pair_sums(*args, group).unbind(0))


def centred(scores: Tensor, group: str) -> Tensor:
    """Scores less their mean in the list, over all processes."""
    if not group:
        return scores - scores.mean(-1, keepdim=True)
    total = scores.sum(-1, dtype=torch.float64)
    both = torch.stack([total, torch.full_like(total, scores.shape[-1])])
    both = all_reduce(both, "sum", group)
    return scores - (both[0] / both[1].clamp(min=1.0))[..., None].to(scores.dtype)


class _SigmoidSums(torch.autograd.Function):
    """(scores, weights, at, tau) -> (sums, slopes); slopes are kept for the backward."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        scores: Tensor,
        weights: Tensor,
        at: Tensor,
        tau: Tensor,
        slope: bool,
        rtol: float,
        method: str,
        group: str,
    ) -> tuple[Tensor, Tensor]:
        out = sums_over(group)(scores, weights, at, tau, True, slope, rtol, method)
        return out[0], out[1] if slope else scores.new_empty(0)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        scores, weights, at, tau, _, *ctx.how = inputs
        ctx.mark_non_differentiable(output[1])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(scores, weights, at, tau, output[1])

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, _: Any) -> tuple[Tensor | None, ...]:
        if grad is None:
            return (None,) * 8
        scores, weights, at, tau, slope = ctx.saved_tensors
        need_scores, need_weights, _, need_tau = ctx.needs_input_grad[:4]
        # Off the targets the sums are the constant 0.
        grad = torch.where(at, grad, 0.0)
        g_scores, g_weights = _SigmoidSumsBackward.apply(  # type: ignore[no-untyped-call]
            grad, scores, weights, at, tau, slope, need_weights, *ctx.how
        )
        g_tau = None
        if need_tau:  # sums depend on scores / tau alone
            g_tau = -((centred(scores, ctx.how[-1]) * g_scores).sum(-1) / tau).to(tau.dtype)
        return (g_scores if need_scores else None, g_weights if need_weights else None, None,
                g_tau, None, None, None, None)  # fmt: skip


class _SigmoidSumsBackward(torch.autograd.Function):
    """The derivative of the sums: the same sums with sources and targets exchanged."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        grad: Tensor,
        scores: Tensor,
        weights: Tensor,
        at: Tensor,
        tau: Tensor,
        slope: Tensor,
        need_weights: bool,
        rtol: float,
        method: str,
        group: str,
    ) -> tuple[Tensor, Tensor]:
        op = sums_over(group)
        how = (rtol, method)
        pull = op(scores, grad, weights != 0, tau, False, True, *how)[0]
        g_scores = (weights * pull - grad * slope).sum(-2) / tau[:, None]
        if not need_weights:
            return g_scores.to(scores.dtype), scores.new_empty(0)
        everywhere = torch.ones_like(at[:, :1])
        mass = grad.sum(-1, keepdim=True)
        if group:
            mass = all_reduce(mass, "sum", group)
        # sigma(s_k - s_i) = 1 - sigma(s_i - s_k)
        below = op(scores, grad, everywhere, tau, True, False, *how)[0]
        return g_scores.to(scores.dtype), mass - below

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        grad, scores, weights, at, tau, _, ctx.need_weights = inputs[:7]
        ctx.group = inputs[9]
        ctx.save_for_backward(grad, scores, weights, at, tau)

    @staticmethod
    def backward(ctx: Any, v_scores: Tensor, v_weights: Tensor) -> tuple[Tensor | None, ...]:
        one_process_only(ctx.group)
        grad, scores, weights, at, tau = ctx.saved_tensors
        if not ctx.need_weights:
            v_weights = torch.zeros_like(grad)

        def plain(c: Tensor, s: Tensor, w: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
            return _plain_backward(torch.where(at, c, 0.0), s, w, t)

        vjp = torch.func.vjp(plain, grad, scores, weights.to(scores.dtype), tau)[1]
        g, s, w, t = vjp((v_scores, v_weights))
        g_weights = w if weights.is_floating_point() else None
        return g, s, g_weights, None, t, *(None,) * 5


def one_process_only(group: str) -> None:
    """Raise where a pool sharded over a group is differentiated twice."""
    if group:
        raise NotImplementedError("second derivatives of a pool sharded over a group")


def _plain_backward(
    grad: Tensor, scores: Tensor, weights: Tensor, tau: Tensor
) -> tuple[Tensor, Tensor]:
    """What `_SigmoidSumsBackward` computes, in differentiable torch with all [M, M] pairs."""
    z = (scores[:, None, :] - scores[:, :, None]) / tau.to(scores.dtype)[:, None, None]
    k = torch.sigmoid(z)
    d = k * torch.sigmoid(-z)
    pull, slope = grad @ d, weights @ d.mT
    g_scores = (weights * pull - grad * slope).sum(-2) / tau.to(scores.dtype)[:, None]
    return g_scores, grad @ k


def store_signature(function: Callable[..., Any]) -> None:
    """Autograd binds the arguments of forward at every call; a stored signature halves that."""
    function.__signature__ = inspect.signature(function)  # type: ignore[attr-defined]


store_signature(_SigmoidSums.forward)
store_signature(_SigmoidSumsBackward.forward)


def _apply(*args: Any) -> Tensor:
    sums: Tensor = _SigmoidSums.apply(*args)[0]  # type: ignore[no-untyped-call]
    return sums


_apply_in_graph: Callable[..., Tensor] = torch.compiler.allow_in_graph(_apply)


def sigmoid_sums(
    scores: Tensor,
    weights: Tensor,
    at: Tensor,
    tau: Tensor,
    rtol: float,
    method: str,
    group: str = "",
) -> Tensor:
    """Flat form: scores [L, M], weights [L, G, M] (floating or bool), at [L, 1 or G, M], tau [L].

    group: name of the processes that share the lists, "" for this one alone. Returns [L, G, M].
    """
    slope = torch.is_grad_enabled()  # no_grad needs none
    return _apply_in_graph(scores, weights, at, tau, slope, rtol, method, group)
