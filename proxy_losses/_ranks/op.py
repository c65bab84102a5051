"""Registration of the sums and means: eager, autograd, vmap, torch.func, compile and export.

Opaque ops hold what depends on the data; an autograd.Function per direction gives the derivative;
`allow_in_graph` keeps that derivative when a gradient is taken inside a compiled function (without
it, 2.13 silently differentiates the forward instead).
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from types import ModuleType
from typing import Any, TypeAlias

import torch
from torch import Tensor

from .._checks import warn_user
from .._effects import LIBRARY
from .._functions import in_graph, takes_batches
from .._numerics import (
    beside,
    clean,
    in_widths,
    number,
    outside_autocast,
    plainly_eager,
    positive_weight,
)
from ..distributed import all_reduce, all_reduce_with_grad, average_grad
from . import dense, grid
from .census import look
from .lists import Lists, Pairs
from .phi import PHIS
from .plan import Work, fused_work, is_thin, plan, surely_dense

LIBRARY.define(
    "pair_sums(Tensor scores, Tensor weights, Tensor at, Tensor tau, str kinds, float rtol,"
    " str method) -> Tensor[]"
)
LIBRARY.define(
    "rank_mean(Tensor scores, Tensor pos, Tensor? valid, Tensor? weight, Tensor tau, bool grad,"
    " str phi, float rtol, str method) -> (Tensor, Tensor, Tensor)"
)
Mean: TypeAlias = tuple[Tensor, Tensor, Tensor]  # mean [L], defined [L], gradient [L, M] or [0]


# --- the ops --------------------------------------------------------------------------------------


@outside_autocast
def pair_sums(
    scores: Tensor, weights: Tensor, at: Tensor, tau: Tensor, kinds: str, rtol: float, method: str
) -> list[Tensor]:
    """`dense.pair_sums` by the method asked for or, for "auto", the cheaper one.

    A list with a non-finite score or a tau that is not > 0 is NaN at its targets.
    """
    lists, groups, rows = weights.shape
    names = kinds.split(",")
    if not weights.numel():
        return [scores.new_zeros(weights.shape) for _ in names]
    scores = scores.contiguous()
    gives = weights if weights.dtype == torch.bool else weights != 0
    # Of any group, then of each.
    sides = gives.any(1), at.any(1)
    counts = [side.sum(1, dtype=torch.int32) for side in sides]
    counts += [x.sum(2, dtype=torch.int32).T.reshape(-1) for x in (gives, at)]
    census = look(scores, tau, counts, typical=not surely_dense(lists, rows))
    broken = census.broken_lists(scores.device)
    if broken is not None:
        scores = torch.where(broken[:, None], 0.0, scores)
        tau = torch.where(broken, 1.0, tau)
    pairs = Pairs(scores, weights, at, tau)
    visits = [sum(n) for n in census.counts]
    product = sum(a * b for a, b in zip(*census.counts[:2], strict=True))
    if method == "auto" and not surely_dense(lists, rows):
        work = Work(lists, rows, visits[0], visits[1], groups * len(names), len(names))
        method = plan([work], max(census.spans), rtol, pairs=product).method
    if method == "grid":
        sums = grid.pair_sums(pairs, names, census, visits[2:], rtol)
    else:
        wide = dense.pair_sums(pairs, names, sides, census.counts[:2])
        sums = [s.to(scores.dtype).contiguous() for s in wide]
    if broken is None:
        return sums
    return [s.masked_fill_(broken[:, None, None] & at, torch.nan) for s in sums]


@outside_autocast
def rank_mean(
    scores: Tensor, pos: Tensor, valid: Tensor | None, weight: Tensor | None, tau: Tensor,
    grad: bool, phi: str, rtol: float, method: str,
) -> Mean:  # fmt: skip
    """The mean of `dense.rank_mean`, which lists count, and the gradient where asked for.

    Lists that do not count give 0, others with a non-finite score or a tau that is not > 0 NaN.
    """
    lists, rows = scores.shape
    shape = scores.shape if grad else (0,)
    if not scores.numel():
        none = pos.new_zeros(lists)
        return scores.new_zeros(lists), none, scores.new_zeros(shape)
    scores = clean(scores, valid).contiguous()
    several = lists > 1
    # (int32 adds up bools several times as fast.)
    counts = [pos.sum(1, dtype=torch.int32) if several else pos.sum()]
    if valid is not None and not several:
        counts.append(valid.sum())
    elif valid is not None:
        once = valid[:1] if valid.stride(0) == 0 else valid
        counts.append(once.sum(1, dtype=torch.int32).expand(lists).contiguous())
    if weight is not None:
        wide = torch.promote_types(weight.dtype, scores.dtype)
        weight, some = positive_weight(pos, weight, wide)  # the largest is 1
        counts.append(some[:, 0].long())
        counts.append((torch.where(pos, weight, torch.inf).amin(1) == 1.0).long())
    census = look(scores, tau, counts, typical=not surely_dense(lists, rows))
    positives, *others = census.counts
    everyone = [rows] * lists if valid is None else others.pop(0)
    heavy, even = (positives, None) if weight is None else (others[0], others[1])
    room = int(PHIS[phi].needs_negative)  # for negatives
    defined = [
        0 < n <= m - room and h > 0 for n, m, h in zip(positives, everyone, heavy, strict=True)
    ]
    counting = pos.new_ones(lists) if all(defined) else torch.tensor(defined, device=pos.device)
    if not any(defined):
        return scores.new_zeros(lists), counting, scores.new_zeros(shape)
    dead = [n > 0 and not some for n, some in zip(positives, defined, strict=True)]
    if any(dead):  # its positives are none
        pos = pos & counting[:, None]
        weight = None if weight is None else torch.where(pos, weight, 0.0)
        positives = [0 if gone else n for n, gone in zip(positives, dead, strict=True)]
        census = census._replace(counts=[positives])
    broken = census.broken_lists(scores.device)
    if broken is not None:
        scores = torch.where(broken[:, None], 0.0, scores)
        tau = torch.where(broken, 1.0, tau)
    if even is not None and all(e or not d for e, d in zip(even, defined, strict=True)):
        weight = None
    if valid is not None and everyone == [rows] * lists:
        valid = None
    pool, kept, width = Lists(scores, pos, valid, weight), None, rows
    if valid is not None and is_thin(lists * max(everyone), lists * rows):
        width = max(everyone)
    if method == "auto" and not surely_dense(lists, width):
        pairs = sum(positives) * width
        method = plan([fused_work(lists, width, grad)], max(census.spans), rtol, pairs=pairs).method
    if width < rows and (several or method == "grid"):
        pool, kept = _only_valid(pool, width)
    if method == "grid":
        mean, g = grid.rank_mean(pool, tau, PHIS[phi], census, rtol, grad=grad)
    else:
        sizes = positives, everyone
        mean, g = dense.rank_mean(pool, census.tau, PHIS[phi], sizes, grad=grad)
    if g is not None and kept is not None:
        g = scores.new_zeros(scores.shape).scatter_(1, kept, g)
    mean = mean.to(scores.dtype)
    g = scores.new_zeros(0) if g is None else g
    if broken is not None:
        broken = broken & counting
        mean = mean.masked_fill(broken, torch.nan)
        g = g.masked_fill(broken[:, None], torch.nan) if grad else g
    return mean, counting, g


def _only_valid(pool: Lists, count: int) -> tuple[Lists, Tensor]:
    """The lists without most of the rows that do not count, and the row numbers [L, count] kept.

    Lists with fewer are filled up with rows that do not count.
    """
    assert pool.valid is not None
    valid = pool.valid.expand(pool.scores.shape)
    if valid.shape[0] == 1:
        kept = torch.nonzero_static(valid[0], size=count).T
    else:
        kept = valid.to(torch.uint8).topk(count, dim=1).indices
    found = [None if x is None else x.expand(valid.shape).gather(1, kept) for x in pool[:4]]
    if valid.shape[0] == 1:
        found[2] = None
    return Lists(*found), kept  # type: ignore[arg-type]


def _sums_like(
    scores: Tensor, weights: Tensor, at: Tensor, tau: Tensor, kinds: str, rtol: float, method: str
) -> list[Tensor]:
    return [scores.new_empty(weights.shape) for _ in kinds.split(",")]


def _mean_like(
    scores: Tensor,
    pos: Tensor,
    valid: object,
    weight: object,
    tau: Tensor,
    grad: bool,
    *how: object,
) -> Mean:
    lists = scores.shape[0]
    return scores.new_empty(lists), pos.new_empty(lists), scores.new_empty(
        scores.shape if grad else (0,)
    )  # fmt: skip


def _fold(
    batch_size: int, dims: tuple[int | None, ...], args: tuple[Any, ...], count: int
) -> tuple[list[Tensor | None], torch.Size]:
    """Fold the mapped axis of the first `count` arguments into their list axis."""
    tensors = [
        None if t is None else t.movedim(d, 0) if d is not None else t.expand(batch_size, *t.shape)
        for t, d in zip(args[:count], dims[:count], strict=True)
    ]
    assert tensors[0] is not None
    lists = tensors[0].shape[:2]
    return [None if t is None else t.flatten(0, 1) for t in tensors], lists


def _folded(call: Callable[..., Any], count: int) -> Callable[..., Any]:
    """The vmap rule of a call of lists, whose first `count` arguments have them on their axis 0."""

    def rule(info: Any, dims: tuple[int | None, ...], *args: Any) -> tuple[Any, Any]:
        flat, lists = _fold(info.batch_size, dims, args, count)
        out = call(*flat, *args[count:])
        # What was not asked for is [0].
        split = [
            x.expand(info.batch_size, 0) if x.shape == (0,) else x.unflatten(0, lists) for x in out
        ]
        return type(out)(split), type(out)([0] * len(out))

    return rule


@functools.cache
def kernels_of(device: torch.device) -> ModuleType | None:
    """The same functions in Triton, which read nothing; None where it does not run."""
    if (device.index or 0) >= torch.cuda.device_count():  # of a FakeTensor
        return None
    if torch.version.hip is not None or torch.cuda.get_device_capability(device) < (8, 0):
        return None
    try:
        from triton.runtime import driver

        from . import triton
    except ImportError:
        return None
    try:
        _ = driver.active.utils  # built at the first call
    except Exception as error:  # of a compiler, or for want of one
        warn_user(
            f"the Triton kernels do not run on {device}: Triton, which builds its driver with a C "
            f"compiler and the headers of Python, says {type(error).__name__}: {error}. Metrics "
            "are computed by torch operations instead, which may wait for the device"
        )
        return None
    return triton


def on_gpu(name: str, plain: Callable[..., Any]) -> Callable[..., Any]:
    """The op of this name in Triton where that runs, else the plain one."""

    @outside_autocast
    def run(scores: Tensor, *args: Any) -> Any:
        found = kernels_of(scores.device)
        if found is None:
            return plain(scores, *args)
        with torch.cuda.device(scores.device):
            return getattr(found, name)(scores, *args)

    return run


for _name, _op in ("pair_sums", pair_sums), ("rank_mean", rank_mean):
    LIBRARY.impl(_name, _op, "CPU")
    LIBRARY.impl(_name, on_gpu(_name, _op), "CUDA")
torch.library.register_fake("proxy_losses::pair_sums", _sums_like, lib=LIBRARY)
torch.library.register_fake("proxy_losses::rank_mean", _mean_like, lib=LIBRARY)
for _name, _count in ("pair_sums", 4), ("rank_mean", 5):
    _call = getattr(torch.ops.proxy_losses, _name)
    torch.library.register_vmap(f"proxy_losses::{_name}", _folded(_call, _count), lib=LIBRARY)


def sums_over(group: str) -> Callable[..., list[Tensor]]:
    """The op for one process, or the one for a pool sharded over a group."""
    if not group:
        return torch.ops.proxy_losses.pair_sums
    return lambda *args: list(torch.ops.proxy_losses.sharded_pair_sums(*args, group).unbind(0))


def _one_process_only(group: str) -> None:
    if group:
        raise NotImplementedError("second derivatives of a pool sharded over a group")


# --- derivatives of the sums ----------------------------------------------------------------------


class _SigmoidSums(torch.autograd.Function):
    """(scores, weights, at, tau) -> (sums, slopes); slopes are kept for the backward."""

    @staticmethod
    def forward(
        scores: Tensor, weights: Tensor, at: Tensor, tau: Tensor, slope: bool, rtol: float,
        method: str, group: str,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        kinds = "value,slope" if slope else "value"
        out = sums_over(group)(scores, weights, at, tau, kinds, rtol, method)
        return out[0], out[1] if slope else scores.new_empty(0)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        scores, weights, at, tau, _, *ctx.how = inputs
        ctx.mark_non_differentiable(output[1])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(scores, weights, at, tau, output[1])

    @staticmethod
    @takes_batches
    def backward(ctx: Any, grad: Tensor | None, _: Any) -> tuple[Tensor | None, ...]:
        if grad is None:
            return (None,) * 8
        scores, weights, at, tau, slope = ctx.saved_tensors
        need_scores, need_weights, _, need_tau = ctx.needs_input_grad[:4]
        # Off the targets the sums are the constant 0.
        grad = torch.where(at, grad, 0.0)
        g_scores, g_weights, g_tau = _SigmoidSumsBackward.apply(  # type: ignore[no-untyped-call]
            grad, scores, weights, at, tau, slope, need_weights, need_tau, *ctx.how
        )
        return (g_scores if need_scores else None, g_weights if need_weights else None, None,
                g_tau if need_tau else None, None, None, None, None)  # fmt: skip


class _SigmoidSumsBackward(torch.autograd.Function):
    """The derivative of the sums: the same sums with sources and targets exchanged."""

    @staticmethod
    def forward(
        grad: Tensor, scores: Tensor, weights: Tensor, at: Tensor, tau: Tensor, slope: Tensor,
        need_weights: bool, need_tau: bool, rtol: float, method: str, group: str,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        op = sums_over(group)
        g_weights, g_tau = scores.new_empty(0), tau.new_empty(0)
        if need_weights:
            mass = all_reduce(grad.sum(-1, keepdim=True), "sum", group)
            everywhere = torch.ones_like(at[:, :1])
            below, pull = op(scores, grad, everywhere, tau, "value,slope", rtol, method)
            g_weights = mass - below  # sigma(s_k - s_i) = 1 - sigma(s_i - s_k)
        else:
            (pull,) = op(scores, grad, weights != 0, tau, "slope", rtol, method)
        g_scores = (weights * pull - grad * slope).sum(-2) / tau[:, None]
        if need_tau:
            (stretch,) = op(scores, weights, at, tau, "stretch", rtol, method)
            g_tau = -(grad.double() * stretch).sum((1, 2)) / tau
        return g_scores.to(scores.dtype), g_weights, g_tau

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        grad, scores, weights, at, tau, _, *need = inputs[:8]
        ctx.need, ctx.group = need, inputs[10]
        ctx.save_for_backward(grad, scores, weights, at, tau)

    @staticmethod
    @takes_batches
    def backward(ctx: Any, *v: Tensor) -> tuple[Tensor | None, ...]:
        _one_process_only(ctx.group)
        grad, scores, weights, at, tau = ctx.saved_tensors
        keep = (True, *ctx.need)

        def plain(c: Tensor, s: Tensor, w: Tensor, t: Tensor) -> tuple[Tensor, ...]:
            found = _plain_backward(torch.where(at, c, 0.0), s, w, t)
            return tuple(x for x, need in zip(found, keep, strict=True) if need)

        with torch.autocast(scores.device.type, enabled=False):
            vjp = torch.func.vjp(plain, grad, scores, weights.to(scores.dtype), tau)[1]
            g, s, w, t = vjp(tuple(x for x, need in zip(v, keep, strict=True) if need))
        g_weights = w.to(weights.dtype) if weights.is_floating_point() else None
        return g, s, g_weights, None, t, *(None,) * 6


def _plain_backward(
    grad: Tensor, scores: Tensor, weights: Tensor, tau: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """What `_SigmoidSumsBackward` computes, in differentiable torch with all [M, M] pairs."""
    unit = tau.to(scores.dtype)
    z = in_widths(scores[:, None, :] - scores[:, :, None], unit[:, None, None])
    k = torch.sigmoid(z)
    d = k * torch.sigmoid(-z)
    pull, slope = grad @ d, weights @ d.mT
    g_scores = (weights * pull - grad * slope).sum(-2) / unit[:, None]
    g_tau = -(grad * (weights @ (z * d).mT)).sum((1, 2)) / tau
    return g_scores, grad @ k, g_tau.to(tau.dtype)


# --- sums of softplus -----------------------------------------------------------------------------


class _SoftplusSums(torch.autograd.Function):
    """(scores, weights, at, tau) -> (sums, sums of sigmoid(z), sums of z sigmoid(z)), [L, 1, M].

    softplus(z) = z sigmoid(z) + entropy, and z is a difference of scores: sums of sigmoids by
    weights, and by weights times scores. Both come from the same pass, which errs alike in both, so
    that every pair errs by z times what its sigmoid does, and far pairs by nothing. What cancels
    between them is rounding, hence float64.
    """

    @staticmethod
    def forward(
        scores: Tensor, weights: Tensor, at: Tensor, tau: Tensor, rtol: float, method: str,
        group: str,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        wide = scores.double()[:, None]
        both = torch.cat([weights.double(), torch.where(weights, wide, 0.0)], 1)
        value, entropy = sums_over(group)(
            wide[:, 0], both, at, tau, "value,entropy", rtol, method
        )  # fmt: skip
        above = value[:, :1]
        ramp = torch.where(at, (value[:, 1:] - wide * above) / tau[:, None, None], 0.0)
        out = torch.stack([ramp + entropy[:, :1], above, ramp]).to(scores.dtype)
        return out[0], out[1], out[2]

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        *tensors, ctx.rtol, ctx.method, ctx.group = inputs
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors, *output[1:])

    @staticmethod
    @takes_batches
    def backward(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        if grad is None:
            return (None,) * 7
        scores, weights, at, tau, above, ramp = ctx.saved_tensors
        how, again = (ctx.rtol, ctx.method, ctx.group), torch.is_grad_enabled()
        grad = torch.where(at, grad, 0.0)
        if again:  # someone will differentiate again
            above = sigmoid_sums(Pairs(scores, weights, at, tau), *how)
        # What every source feels, the list upside down.
        pull = sigmoid_sums(Pairs(-scores, grad, weights, tau), *how)
        unit = tau.to(scores.dtype)
        g_scores = (pull - grad * above).squeeze(1) / unit[:, None]
        if not ctx.needs_input_grad[3]:
            g_tau = None
        elif again:  # the sums depend on scores / tau alone
            g_tau = -(g_scores * scores).sum(1).to(tau.dtype) / tau
        else:
            g_tau = -(grad.double() * ramp).sum((1, 2)) / tau
        return g_scores, None, None, g_tau, None, None, None


# --- derivatives of the means ---------------------------------------------------------------------


class _RankMean(torch.autograd.Function):
    """(scores, weight, tau) -> the mean [L]; the gradient of scores is computed on the way."""

    @staticmethod
    def forward(
        scores: Tensor, pos: Tensor, valid: Tensor | None, weight: Tensor | None, tau: Tensor,
        grad: bool, phi: str, rtol: float, method: str, group: str,
    ) -> Mean:  # fmt: skip
        args = (scores, pos, valid, weight, tau, grad, phi, rtol, method)
        if not group:
            out: Mean = torch.ops.proxy_losses.rank_mean(*args)
            return out
        mean, defined, *g = torch.ops.proxy_losses.sharded_rank_mean(*args, group).split(
            [scores.shape[0]] * 2 + [scores.numel()] * grad
        )
        return mean, defined > 0, g[0].view(scores.shape) if grad else scores.new_empty(0)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.how = inputs[6:]
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*inputs[:5], *output)

    @staticmethod
    @takes_batches
    def backward(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        need = ctx.needs_input_grad
        if grad is None:
            return (None,) * len(need)
        again, group = torch.is_grad_enabled(), ctx.how[-1]
        saved = ctx.saved_tensors  # once, or checkpoints object
        if not (again or need[3] or need[4] or group):  # the usual case
            return grad.unsqueeze(1) * saved[-1], *(None,) * (len(need) - 1)
        run: Any = _RankMeanBackward.apply if again else _RankMeanBackward.forward
        # again: someone will differentiate again
        g_scores, g_weight, g_tau = run(*saved, need[3], need[4], *ctx.how)
        grad = all_reduce_with_grad(grad, group)  # every rank back-propagates its own copy
        each = grad.unsqueeze(1)
        return (each * g_scores if need[0] else None, None, None,
                (each * g_weight).to(saved[3].dtype) if need[3] else None,
                grad * g_tau if need[4] else None, None, None, None, None, None)  # fmt: skip


class _EagerMean(torch.autograd.Function):
    """`_RankMean` in the form that no transform takes, at half the overhead of a call."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> Mean:
        out = _RankMean.forward(*args)
        _RankMean.setup_context(ctx, args, out)
        return out

    backward = _RankMean.backward


class _RankMeanBackward(torch.autograd.Function):
    """Derivatives of the mean from what the forward left behind; once more in plain torch."""

    @staticmethod
    def forward(
        scores: Tensor, pos: Tensor, valid: Tensor | None, weight: Tensor | None, tau: Tensor,
        mean: Tensor, defined: Tensor, g: Tensor, need_weight: bool, need_tau: bool,
        phi: str, rtol: float, method: str, group: str,
    ) -> Mean:  # fmt: skip
        g_weight, g_tau = scores.new_empty(0), tau.new_empty(0)
        if not (need_weight or need_tau):
            return g.clone(), g_weight, g_tau  # an input as it is would be a view
        scores = clean(scores, valid)
        groups = torch.stack([torch.ones_like(pos) if valid is None else valid, pos], 1)
        kinds = "value,stretch" if need_tau else "value"
        sums = sums_over(group)(scores, groups, pos[:, None], tau, kinds, rtol, method)
        ranks = sums[0].double() + 0.5
        value, b, a = PHIS[phi].at(ranks[:, 0], ranks[:, 1])
        own = pos.double() if weight is None else torch.where(pos, weight, 0.0).double()
        total = all_reduce(own.sum(-1, keepdim=True), "sum", group)
        share = 1.0 / torch.where(total > 0, total, 1.0)
        counted = pos & defined[:, None]
        if need_weight:
            assert weight is not None
            lift = torch.where(counted, value - mean.double()[:, None], 0.0)
            g_weight = (share * lift).to(torch.promote_types(weight.dtype, scores.dtype))
        if need_tau:  # the sums depend on scores / tau alone
            stretch = sums[1].double()
            each = torch.where(counted, b * stretch[:, 0] + a * stretch[:, 1], 0.0)
            g_tau = -(share * own * each).sum(-1).to(tau.dtype) / tau
        return g.clone(), g_weight, g_tau

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.save_for_backward(*inputs[:5], inputs[6])
        ctx.need, ctx.phi, ctx.group = (True, *inputs[8:10]), inputs[10], inputs[13]

    @staticmethod
    @takes_batches
    def backward(ctx: Any, *v: Tensor) -> tuple[Tensor | None, ...]:
        _one_process_only(ctx.group)
        scores, pos, valid, weight, tau, defined = ctx.saved_tensors
        given = pos if weight is None else weight
        wide = given.to(torch.promote_types(given.dtype, scores.dtype))

        def total(s: Tensor, w: Tensor, t: Tensor) -> Tensor:
            return _plain(Lists(s, pos, valid, w), t, ctx.phi, defined).sum()

        def first(*args: Tensor) -> tuple[Tensor, ...]:
            pulled = torch.func.grad(total, argnums=(0, 1, 2))(*args)
            return tuple(p for p, need in zip(pulled, ctx.need, strict=True) if need)

        cotangents = tuple(x for x, need in zip(v, ctx.need, strict=True) if need)
        with torch.autocast(scores.device.type, enabled=False):
            s, w, t = torch.func.vjp(first, scores, wide, tau)[1](cotangents)
        return s, None, None, None if weight is None else w.to(weight.dtype), t, *(None,) * 9


def _plain(pool: Lists, tau: Tensor, phi: str, defined: Tensor) -> Tensor:
    """The value in differentiable torch, with all [M, M] pairs."""
    scores, pos, valid, weight, *_ = pool
    assert weight is not None
    scores = clean(scores, valid)
    unit = tau.to(scores.dtype)[:, None, None]
    k = torch.sigmoid(in_widths(scores[:, None, :] - scores[:, :, None], unit))
    rank = (k if valid is None else torch.where(valid[:, None], k, 0.0)).sum(-1) + 0.5
    rank_pos = torch.where(pos[:, None], k, 0.0).sum(-1) + 0.5
    weight = torch.where(pos, weight, 0.0).to(scores.dtype)
    total = weight.sum(-1)
    value = (weight * PHIS[phi].at(rank, rank_pos)[0]).sum(-1) / torch.where(total > 0, total, 1.0)
    return torch.where(defined, value, 0.0)


# --- calls ----------------------------------------------------------------------------------------


_TENSORS: dict[Any, int] = {  # first arguments of forward
    _SigmoidSums: 4, _SigmoidSumsBackward: 6, _SoftplusSums: 4, _RankMean: 5, _RankMeanBackward: 8,
}  # fmt: skip
for _function, _count in _TENSORS.items():
    # Not the rule that torch would make: the backward of that is not `takes_batches`.
    _function.vmap = staticmethod(_folded(_function.apply, _count))
    # Autograd binds the arguments of forward at every call; a stored signature halves that.
    _forward: Any = _function.forward
    _forward.__signature__ = inspect.signature(_forward)

_sums_in_graph, _mean_in_graph = in_graph(_SigmoidSums), in_graph(_RankMean)
_softplus_in_graph = in_graph(_SoftplusSums)


def sigmoid_sums(pairs: Pairs, rtol: float, method: str, group: str) -> Tensor:
    """The sums [L, G, M]; ``at`` may be [L, 1, M]. group: "" for this process alone."""
    slope = torch.is_grad_enabled()  # no_grad needs none
    out: Tensor = _sums_in_graph(*pairs, slope, rtol, method, group)[0]
    return out


def softplus_sums(pairs: Pairs, rtol: float, method: str, group: str) -> Tensor:
    """The sums [L, 1, M]; weights [L, 1, M] are bool, and get no gradient."""
    out: Tensor = _softplus_in_graph(*pairs, rtol, method, group)[0]
    return out


def mean_of(
    pool: Lists, tau: Tensor, phi: str, rtol: float, method: str, group: str
) -> tuple[Tensor, Tensor]:
    """The mean [L] and which lists count; positives are valid, weights of any floating dtype."""
    grad = torch.is_grad_enabled()
    mean: Any = _EagerMean.apply if plainly_eager() else _mean_in_graph
    out: Mean = mean(*pool[:4], tau, grad, phi, rtol, method, group)
    return out[0], out[1]


def flat_tau(tau: float | Tensor, scores: Tensor, lists: torch.Size, name: str) -> Tensor:
    """[L] float64 on the device of scores; ranks share its gradient."""
    if not isinstance(tau, Tensor):
        return torch.full((number(lists),), tau, dtype=torch.float64, device=scores.device)
    tau = average_grad(beside(tau, scores, torch.float64), name)
    return tau.expand(lists if lists else (1,)) if len(lists) < 2 else tau.expand(lists).reshape(-1)
