"""Mean precision at the positives, value and gradient in one op.

A second entry into the same sums: where `sigmoid_sums` must wait for a cotangent, the gradient of
a mean of R+ / R is known as soon as the ranks are, so one visit to the data gives both.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .._numerics import clean
from ..distributed import all_reduce
from . import average
from .op import LIBRARY, centred, fold, one_process_only, store_signature, sums_over

LIBRARY.define(
    "mean_precision(Tensor scores, Tensor pos, Tensor? valid, Tensor? weight, Tensor tau,"
    " bool grad, float rtol, str method) -> (Tensor, Tensor, Tensor)"
)
_Out = tuple[Tensor, Tensor, Tensor]


def _like(
    scores: Tensor,
    pos: Tensor,
    valid: Tensor | None,
    weight: Tensor | None,
    tau: Tensor,
    grad: bool,
    rtol: float,
    method: str,
) -> _Out:
    g = scores.new_empty(scores.shape if grad else 0)
    return scores.new_empty(scores.shape[0]), pos.new_empty(scores.shape[0]), g


def _vmap(info: Any, dims: tuple[int | None, ...], *args: Any) -> tuple[_Out, tuple[int, int, int]]:
    flat, lists = fold(info.batch_size, dims, args, 5)
    mean, counts, g = torch.ops.proxy_losses.mean_precision(*flat, *args[5:])
    g = g.unflatten(0, lists) if args[5] else g.expand(info.batch_size, 0)
    return (mean.unflatten(0, lists), counts.unflatten(0, lists), g), (0, 0, 0)


for _device in ("CPU", "CUDA"):
    LIBRARY.impl("mean_precision", average.mean_precision, _device)
torch.library.register_fake("proxy_losses::mean_precision", _like, lib=LIBRARY)
torch.library.register_vmap("proxy_losses::mean_precision", _vmap, lib=LIBRARY)


class _MeanPrecision(torch.autograd.Function):
    """(scores, weight, tau) -> mean precision [L]; the gradient is computed on the way."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        scores: Tensor,
        pos: Tensor,
        valid: Tensor | None,
        weight: Tensor | None,
        tau: Tensor,
        grad: bool,
        rtol: float,
        method: str,
        group: str,
    ) -> _Out:
        args = (scores, pos, valid, weight, tau, grad, rtol, method)
        out: _Out
        if group:
            mean, counts, *g = torch.ops.proxy_losses.sharded_mean_precision(*args, group).split(
                [scores.shape[0]] * 2 + [scores.numel()] * grad
            )
            out = mean, counts > 0, g[0].view(scores.shape) if grad else scores.new_empty(0)
        else:
            out = torch.ops.proxy_losses.mean_precision(*args)
        return out

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.how = inputs[6:]
        ctx.mark_non_differentiable(*output[1:])
        ctx.save_for_backward(*inputs[:5], *output)

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        need = ctx.needs_input_grad
        args = (grad, *ctx.saved_tensors, need[3], need[4], *ctx.how)
        if torch.is_grad_enabled():  # someone will differentiate again
            g = _MeanPrecisionBackward.apply(*args)  # type: ignore[no-untyped-call]
        else:
            g = _MeanPrecisionBackward.forward(*args)
        return (g[0] if need[0] else None, None, None, g[1] if need[3] else None,
                g[2] if need[4] else None, None, None, None, None)  # fmt: skip


class _MeanPrecisionBackward(torch.autograd.Function):
    """The derivative from what the forward left behind; differentiable again in plain torch."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        grad: Tensor,
        scores: Tensor,
        pos: Tensor,
        valid: Tensor | None,
        weight: Tensor | None,
        tau: Tensor,
        mean: Tensor,
        counts: Tensor,
        g: Tensor,
        need_weight: bool,
        need_tau: bool,
        rtol: float,
        method: str,
        group: str,
    ) -> _Out:
        if group:  # every rank back-propagates its own copy of the mean
            grad = all_reduce(grad, "sum", group)
        g_scores = grad[:, None] * g
        g_weight, g_tau = scores.new_empty(0), scores.new_empty(0)
        if need_weight or need_tau:
            scores = clean(scores, valid)
        if need_weight:
            assert weight is not None
            groups = torch.stack([torch.ones_like(pos) if valid is None else valid, pos], 1)
            sums = sums_over(group)(scores, groups, pos[:, None], tau, True, False, rtol, method)[0]
            ranks = sums + 0.5
            total = torch.where(pos, weight, 0.0).sum(-1, keepdim=True)
            if group:
                total = all_reduce(total, "sum", group)
            lift = torch.where(
                pos & counts[:, None], ranks[:, 1] / ranks[:, 0] - mean[:, None], 0.0
            )
            g_weight = grad[:, None] * lift / torch.where(total > 0, total, 1.0)
        if need_tau:
            # The value depends on scores / tau alone, and shifting all scores changes nothing.
            g_tau = -(centred(scores, group) * g_scores).sum(-1).to(tau.dtype) / tau
        return g_scores, g_weight, g_tau

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.save_for_backward(*inputs[:6], inputs[7])
        ctx.need, ctx.group = (True, *inputs[9:11]), inputs[13]

    @staticmethod
    def backward(ctx: Any, *v: Tensor) -> tuple[Tensor | None, ...]:
        one_process_only(ctx.group)
        grad, scores, pos, valid, weight, tau, counts = ctx.saved_tensors
        even = weight is None
        weight = pos.to(scores.dtype) if even else weight

        def first(c: Tensor, s: Tensor, w: Tensor, t: Tensor) -> tuple[Tensor, ...]:
            pulled: tuple[Tensor, ...] = torch.func.vjp(
                lambda *x: _plain(*x, pos=pos, valid=valid, counts=counts), s, w, t
            )[1](c)
            return tuple(p for p, need in zip(pulled, ctx.need, strict=True) if need)

        cotangents = tuple(x for x, need in zip(v, ctx.need, strict=True) if need)
        c, s, w, t = torch.func.vjp(first, grad, scores, weight, tau)[1](cotangents)
        return c, s, None, None, None if even else w, t, *(None,) * 8


def _plain(
    scores: Tensor,
    weight: Tensor,
    tau: Tensor,
    *,
    pos: Tensor,
    valid: Tensor | None,
    counts: Tensor,
) -> Tensor:
    """The value in differentiable torch, with all [M, M] pairs."""
    scores = clean(scores, valid)
    k = torch.sigmoid(
        (scores[:, None, :] - scores[:, :, None]) / tau.to(scores.dtype)[:, None, None]
    )
    rank = (k if valid is None else torch.where(valid[:, None], k, 0.0)).sum(-1) + 0.5
    rank_pos = torch.where(pos[:, None], k, 0.0).sum(-1) + 0.5
    weight = torch.where(pos, weight, 0.0)
    total = weight.sum(-1)
    mean = (weight * rank_pos / rank).sum(-1) / torch.where(total > 0, total, 1.0)
    return torch.where(counts, mean, 0.0)


def _apply(*args: Any) -> tuple[Tensor, Tensor]:
    out: _Out = _MeanPrecision.apply(*args)  # type: ignore[no-untyped-call]
    return out[0], out[1]


_apply_in_graph: Callable[..., tuple[Tensor, Tensor]] = torch.compiler.allow_in_graph(_apply)


def mean_precision(
    scores: Tensor,
    pos: Tensor,
    valid: Tensor | None,
    weight: Tensor | None,
    tau: Tensor,
    rtol: float,
    method: str,
    group: str = "",
) -> tuple[Tensor, Tensor]:
    """Weighted mean of R+ / R over the positives of every list, and which lists count.

    Args:
        scores: [L, M] float32 or float64; where not valid, anything.
        pos: [L, M] bool, valid positives.
        valid: [L, M] bool or None for all.
        weight: [L, M] in the dtype of scores, read at the positives, or None for 1.
        tau: [L] float64.
        rtol: accuracy asked for.
        method: "auto", "dense" or "grid".
        group: name of the processes that share the lists, "" for this one alone.

    Returns:
        (mean [L], counts [L] bool). A list counts if it has a positive of weight > 0 and a
        negative; otherwise its mean is 0.
    """
    grad = torch.is_grad_enabled()
    return _apply_in_graph(scores, pos, valid, weight, tau, grad, rtol, method, group)


store_signature(_MeanPrecision.forward)
store_signature(_MeanPrecisionBackward.forward)
