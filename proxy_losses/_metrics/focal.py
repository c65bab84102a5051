"""Focal losses: cross-entropy that counts the examples less that are already right."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from numbers import Real
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import softplus

from .. import _numerics as num
from .._checks import (
    check_floating,
    check_fraction,
    check_int,
    check_integers,
    check_label_mask,
    check_number,
    check_positive,
    check_real,
)
from .._functions import takes_batches

SIGMOID_REDUCTIONS = ("none", "mean", "sum")
SOFTMAX_REDUCTIONS = ("none", "mean", "mean_positive", "sum")
MAX_GAMMA = 1e20  # beyond, a gradient may be 0 times inf


def sigmoid_focal(
    inputs: Tensor,
    targets: Tensor,
    *,
    alpha: float = 0.25,
    gamma: float | Tensor = 2.0,
    reduction: str = "mean",
    sample_weight: Tensor | None = None,
    label_mask: Tensor | None = None,
) -> Tensor:
    r"""Focal loss of independent yes/no predictions: binary or multi-label; smaller is better.

    ``loss = alpha_t (1 - p_t)^gamma CE`` with ``p = sigmoid(x)``, ``p_t = t p + (1 - t) (1 - p)``,
    ``alpha_t = t alpha + (1 - t) (1 - alpha)`` and ``CE = -t log p - (1 - t) log(1 - p)``.
    gamma = 0 is binary cross-entropy.

    Args:
        inputs: [...] floating, logits. Half precision is computed in, and returned as, float32.
        targets: [...] as inputs, in [0, 1] and usually 0 or 1; any real dtype. They get no
            gradient.
        alpha: weight of the positives, in [0, 1]; the negatives have 1 - alpha. -1 for no such
            weights.
        gamma: focusing exponent >= 0: a number, or a 0-d tensor when it varies inside a compiled
            function.
        reduction: "none", "mean" over all elements, or "sum".
        sample_weight: floating >= 0, the shape of inputs or with 1 in place of axes after dim 0
            ([N, 1, H, W] for inputs [N, C, H, W]), or None for 1. "mean" is the weighted mean,
            0 if all weights are. It gets no gradient.
        label_mask: [...] bool as inputs, targets that are known, or None for all. Elsewhere the
            loss is 0 and no part of the mean, and input and target may be anything.

    Returns:
        [] in the dtype of inputs (float32 for half input), or [...] for "none". Without elements
        0 with a graph. An input that is not finite and a NaN target give NaN.

    Raises:
        TypeError: wrong dtypes.
        ValueError: shapes that do not fit, alpha, gamma or reduction out of range.

    Example:
        >>> logits = torch.tensor([4.0, 0.0, -4.0])
        >>> sigmoid_focal(logits, torch.tensor([1.0, 1.0, 1.0]), alpha=-1, reduction="none")
        tensor([5.8716e-06, 1.7329e-01, 3.8749e+00])

    Reference: Lin et al., "Focal Loss for Dense Object Detection", ICCV 2017, arXiv:1708.02002.
    """
    check_reduction(reduction, SIGMOID_REDUCTIONS)
    check_elements(inputs, targets, sample_weight, label_mask)
    check_fraction("alpha", alpha, also=-1)
    _check_gamma(gamma)
    targets = targets.detach()
    if label_mask is None:
        return reduce(_sigmoid(inputs, targets, alpha, gamma), reduction, sample_weight)
    inputs, targets = inputs.where(label_mask, 0.0), targets.where(label_mask, 0)
    loss = torch.where(label_mask, _sigmoid(inputs, targets, alpha, gamma), 0.0)
    if sample_weight is not None:
        sample_weight = torch.where(label_mask, sample_weight, 0.0)
    return reduce(loss, reduction, sample_weight, label_mask)


def softmax_focal(
    inputs: Tensor,
    targets: Tensor,
    *,
    alpha: Tensor | Sequence[float] | None = None,
    gamma: float | Tensor = 2.0,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    ignore_index: int = -100,
    background_class: int = 0,
    sample_weight: Tensor | None = None,
) -> Tensor:
    r"""Focal loss of mutually exclusive classes; smaller is better.

    ``loss = alpha[t] (1 - p_t)^gamma CE`` with ``p = softmax(x)`` and, s being label_smoothing,
    ``CE = -(1 - s) log p_t - s mean_c log p_c``. gamma = 0 is cross-entropy.

    Args:
        inputs: [N, C] or [N, C, ...] floating, logits. Half precision is computed in, and
            returned as, float32. -inf excludes a class, as in `torch.nn.functional.cross_entropy`.
        targets: [N] or [N, ...] integer class ids in [0, C), or ignore_index.
        alpha: [C] weights of the classes, a tensor or numbers; None for 1. Numbers are copied to
            the device of inputs at every call, which a CUDA graph cannot hold.
        gamma: focusing exponent >= 0: a number, or a 0-d tensor when it varies inside a compiled
            function.
        reduction: "none"; "mean" over the rows that count; "mean_positive", the sum over them
            divided by the number (or weight) of those not of background_class; or "sum". A number
            or weight of 0 divides by 1.
        label_smoothing: s, in [0, 1].
        ignore_index: target of rows that do not count; it may be a class id. Such rows give 0
            with zero gradient, whatever they hold.
        background_class: the class that "mean_positive" does not count.
        sample_weight: floating >= 0, the shape of targets, or None for 1. It gets no gradient.

    Returns:
        [] in the dtype of inputs (float32 for half input), or [N, ...] for "none". Without rows
        that count 0 with a graph. In a row that counts, a target outside [0, C) and an input that
        is NaN or +inf give NaN; a target whose class is excluded gives inf or NaN.

    Raises:
        TypeError: wrong dtypes, an ignore_index or background_class that is no integer.
        ValueError: shapes that do not fit, alpha not [C], gamma, label_smoothing or reduction out
            of range.

    Example:
        >>> logits = torch.tensor([[4.0, 0.0], [0.0, 0.0], [4.0, 0.0]])
        >>> softmax_focal(logits, torch.tensor([0, 0, 1]), reduction="none")
        tensor([5.8716e-06, 1.7329e-01, 3.8749e+00])

    Reference: Lin et al., "Focal Loss for Dense Object Detection", ICCV 2017, arXiv:1708.02002.
    """
    check_reduction(reduction, SOFTMAX_REDUCTIONS)
    check_class_targets(inputs, targets, sample_weight)
    _check_gamma(gamma)
    check_fraction("label_smoothing", label_smoothing)
    check_int("ignore_index", ignore_index)
    check_int("background_class", background_class)
    if alpha is not None:
        alpha = class_weights(alpha)
        if alpha.shape[0] != inputs.shape[1]:
            raise ValueError(
                f"alpha must have one entry per class: expected [{inputs.shape[1]}], "
                f"got {list(alpha.shape)}"
            )
    targets = targets.to(torch.int64)  # a narrow type may not hold ignore_index
    valid = targets != ignore_index
    counted = valid & (targets != background_class) if reduction == "mean_positive" else valid
    loss = _softmax(inputs, targets, valid, alpha, gamma, label_smoothing)
    return reduce(loss, reduction, sample_weight, counted)


def class_weights(alpha: Tensor | Sequence[float]) -> Tensor:
    """Weights [C] of the classes as a tensor; raise `ValueError` unless they have one axis."""
    if isinstance(alpha, Tensor):
        check_real("alpha", alpha)
        weights = alpha
    else:
        try:
            weights = torch.tensor(alpha, dtype=torch.float64)
        except (TypeError, ValueError, RuntimeError, OverflowError) as error:
            raise TypeError(f"alpha must be a tensor or numbers [C], got {alpha!r:.80}") from error
    if weights.dim() != 1:
        raise ValueError(f"alpha must be a 1-D tensor of shape [C], got {list(weights.shape)}")
    return weights


def _check_gamma(gamma: float | Tensor) -> None:
    if isinstance(gamma, Tensor):
        check_floating("gamma", gamma)
        if gamma.dim():
            raise ValueError(f"gamma must be a number or a 0-d tensor, got {list(gamma.shape)}")
    else:
        check_number("gamma, unless 0,", gamma)
        if gamma != 0:
            check_positive("gamma, unless 0,", gamma)
        if (float(gamma) if isinstance(gamma, Real) else gamma) > MAX_GAMMA:
            raise ValueError(f"gamma must be at most {MAX_GAMMA}, got {gamma}")


# p_t near 1 has lost the digits of 1 - p_t. So both losses take 1 - p_t, its logarithm and that of
# p_t from the logits, adding only terms of one sign; the error left is that of rounding the logits.
# The usual gamma has its gradient written out, a third of the passes, in plain eager code.
# Compilers fuse the plain formula, transforms want it, and so does whoever differentiates again.

USUAL_GAMMA = 2


def _written_out(gamma: float | Tensor) -> bool:
    return num.plainly_eager() and not isinstance(gamma, Tensor) and gamma == USUAL_GAMMA


@num.full_precision
def _sigmoid(x: Tensor, targets: Tensor, alpha: float, gamma: float | Tensor) -> Tensor:
    t = targets.to(x.dtype)
    if _written_out(gamma):
        loss: Tensor = _Sigmoid.apply(x, t, alpha)  # type: ignore[no-untyped-call]
        return loss
    return _plain_sigmoid(x, t, alpha, gamma)


def _plain_sigmoid(x: Tensor, t: Tensor, alpha: float, gamma: float | Tensor) -> Tensor:
    yes, no = _softplus(-x), _softplus(x)  # -log p, -log(1 - p)
    # lerp is exact at targets 0 and 1, and NaN where x is infinite.
    ce = torch.lerp(no, yes, t)
    q = torch.lerp(torch.sigmoid(x), torch.sigmoid(-x), t)  # 1 - p_t
    if isinstance(gamma, Tensor) or 0.0 < gamma < 2.0:
        # The power has a first or second derivative that is infinite at 0, hence exp(gamma log q).
        # Below the least normal number targets are 0 or 1, and their log q needs no q.
        floor = torch.finfo(x.dtype).tiny
        below = (q < floor).to(x.dtype)
        log_q = q.clamp(min=floor).log() - below * (torch.lerp(yes, no, t) + math.log(floor))
        loss = (_like(gamma, x) * log_q).exp() * ce
    else:
        loss = q**gamma * ce
    return loss if alpha < 0 else _alpha_t(t, alpha) * loss


def _alpha_t(t: Tensor, alpha: float) -> Tensor:
    return torch.lerp(t.new_full((), 1.0 - alpha), t.new_full((), alpha), t)


class _Sigmoid(torch.autograd.Function):
    """`_plain_sigmoid` for the usual gamma."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, t: Tensor, alpha: float) -> Tensor:
        p, minus = x.sigmoid(), -x
        n = minus.sigmoid()  # 1 - p
        # -log p and -log(1 - p) share the logarithm of the larger, taken from the smaller.
        shared = torch.minimum(p, n).neg_().log1p_()
        ce = torch.lerp(x.relu(), minus.relu_(), t).sub_(shared)
        q = torch.lerp(p, n, t)  # 1 - p_t
        scaled = q
        if alpha >= 0:
            scaled = t.mul(alpha).add_(1.0 - t, alpha=1.0 - alpha).mul_(q)
        loss = (q * scaled).mul_(ce)
        slope = None
        if ctx.needs_input_grad[0]:
            # q * (2 (1 - 2 t) p (1 - p) ce + q (p - t)), with p - t exact at targets 0 and 1
            outer = p.mul_(n).mul_(ce)
            slope = torch.addcmul(q, t, n, value=-2.0).mul_(q).add_(outer, alpha=2.0)
            slope = slope.addcmul_(t, outer, value=-4.0).mul_(scaled)
        ctx.alpha = alpha
        ctx.save_for_backward(x, t, slope)
        return loss

    @staticmethod
    @takes_batches
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, t, slope = ctx.saved_tensors
        if torch.is_grad_enabled():  # to be differentiated again
            plain = functools.partial(_plain_sigmoid, t=t, alpha=ctx.alpha, gamma=USUAL_GAMMA)
            return _again(plain, x, grad), None, None
        return slope * grad, None, None


def _again(plain: Callable[[Tensor], Tensor], x: Tensor, grad: Tensor) -> Tensor:
    """The gradient of a plain formula, itself differentiable."""
    back: Tensor = torch.func.vjp(plain, x)[1](grad)[0]
    return back


@num.full_precision
def _softmax(
    x: Tensor,
    targets: Tensor,
    valid: Tensor,
    alpha: Tensor | None,
    gamma: float | Tensor,
    label_smoothing: float,
) -> Tensor:
    classes = targets.clamp(0, x.shape[1] - 1)
    index = classes.unsqueeze(1)
    # Rows that do not count are 0 by now; a class id out of range makes its row NaN.
    scale = torch.where(valid & (classes != targets), torch.nan, 1.0).to(x.dtype)
    if alpha is not None:
        scale = alpha.to(x, non_blocking=True)[classes] * scale
    if not label_smoothing and _written_out(gamma):
        loss: Tensor = _Softmax.apply(x, index, valid)  # type: ignore[no-untyped-call]
    else:
        loss = _kept_softmax(x, index, valid, gamma=gamma, label_smoothing=label_smoothing)
    return loss * scale


def _kept_softmax(
    x: Tensor,
    index: Tensor,
    valid: Tensor,
    *,
    gamma: float | Tensor = USUAL_GAMMA,
    label_smoothing: float = 0.0,
) -> Tensor:
    loss = _plain_softmax(num.clean(x, valid[:, None]), index, gamma, label_smoothing)
    return torch.where(valid, loss, 0.0)


def _plain_softmax(
    x: Tensor, index: Tensor, gamma: float | Tensor, label_smoothing: float
) -> Tensor:
    # Against all other classes at once p_t is sigmoid(margin). The fill leaves the class itself
    # out, and keeps the margin finite where there is no other. Large logits are subtracted first.
    x = x - x.detach().amax(1, keepdim=True)
    own = x.gather(1, index)[:, 0]
    rival = x.scatter(1, index, torch.finfo(x.dtype).min).logsumexp(1)
    margin = (own - rival) + num.poison(torch.maximum(own, rival)[..., None])[..., 0]
    ce = _softplus(-margin)
    if label_smoothing:
        ce = (1.0 - label_smoothing) * ce - label_smoothing * x.log_softmax(1).mean(1)
    return (_like(gamma, x) * -_softplus(margin)).exp() * ce


class _Softmax(torch.autograd.Function):
    """`_plain_softmax` for the usual gamma, without smoothing, of the rows that count."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, index: Tensor, valid: Tensor) -> Tensor:
        p, counts = x.softmax(1), valid.unsqueeze(1)
        # The logit of the others together less its own: differences of large logits come first.
        rival, top = x.amax(1, keepdim=True) - x.gather(1, index), p.amax(1, keepdim=True)
        p.scatter_(1, index, 0.0)
        q = p.sum(1, keepdim=True)  # 1 - p_t
        rival.add_((q / top).log_())
        ce, q = torch.where(counts, _softplus(rival), 0.0), torch.where(counts, q, 0.0)
        loss = q.square().mul_(ce)
        share = None
        if ctx.needs_input_grad[0]:
            share = torch.addcmul(q, 1.0 - q, ce, value=2.0).mul_(q)
            # A NaN in a row that does not count ends here; one that does has a share that is NaN.
            p.scatter_(1, index, q.neg_()).nan_to_num_(nan=0.0)
        ctx.save_for_backward(x, index, valid, p, share)
        return loss.squeeze(1)

    @staticmethod
    @takes_batches
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, index, valid, p, share = ctx.saved_tensors
        if torch.is_grad_enabled():
            plain = functools.partial(_kept_softmax, index=index, valid=valid)
            return _again(plain, x, grad), None, None
        return p * (share * grad.unsqueeze(1)), None, None


def _softplus(x: Tensor) -> Tensor:
    """``log(1 + exp(x))`` to the last digit; torch's default threshold stops short of float64."""
    return softplus(x, threshold=40.0)


def _like(gamma: float | Tensor, x: Tensor) -> float | Tensor:
    return num.beside(gamma, x, x.dtype) if isinstance(gamma, Tensor) else gamma


def check_reduction(reduction: str, supported: tuple[str, ...]) -> None:
    """Raise `ValueError` unless the reduction of a pointwise loss is one that it supports."""
    if not isinstance(reduction, str) or reduction not in supported:
        modes = ", ".join(map(repr, supported))
        raise ValueError(f"Invalid reduction: '{reduction}'. Supported modes: {modes}.")


def check_elements(
    inputs: Tensor, targets: Tensor, sample_weight: Tensor | None,
    label_mask: Tensor | None = None,
) -> None:  # fmt: skip
    """Check one target per input, and a weight that has all rows and broadcasts over the rest."""
    check_floating("inputs", inputs)
    check_label_mask(label_mask, inputs.shape, "inputs")
    check_real("targets", targets)
    if targets.shape != inputs.shape:
        raise ValueError(
            f"targets must have the shape of inputs: expected {list(inputs.shape)}, "
            f"got {list(targets.shape)}"
        )
    if sample_weight is None:
        return
    check_floating("sample_weight", sample_weight)
    _check_dim0(sample_weight, inputs, "inputs")
    want, got = list(inputs.shape), list(sample_weight.shape)
    # Fewer axes would broadcast from the right, hence weigh columns as if they were rows.
    if len(got) != len(want) or any(n not in (1, m) for n, m in zip(got, want, strict=True)):
        raise ValueError(
            f"sample_weight must be broadcastable to inputs, axis by axis: expected {want}, or 1 "
            f"in place of axes after dim 0, got {got}"
        )


def check_class_targets(inputs: Tensor, targets: Tensor, sample_weight: Tensor | None) -> None:
    """Check inputs [N, C, ...], one class id for each of [N, ...], and a weight for each id."""
    check_floating("inputs", inputs)
    if inputs.dim() < 2 or inputs.shape[1] == 0:
        raise ValueError(f"inputs must be [N, C] or [N, C, ...], C >= 1, got {list(inputs.shape)}")
    check_integers("targets", targets)
    want = [inputs.shape[0], *inputs.shape[2:]]
    if list(targets.shape) != want:
        raise ValueError(
            f"targets must have the shape of inputs without its class axis: expected {want}, "
            f"got {list(targets.shape)}"
        )
    if sample_weight is None:
        return
    check_floating("sample_weight", sample_weight)
    _check_dim0(sample_weight, targets, "targets")
    if sample_weight.shape != targets.shape:
        raise ValueError(
            f"sample_weight must be of the shape of targets: expected {want}, "
            f"got {list(sample_weight.shape)}"
        )


def _check_dim0(sample_weight: Tensor, x: Tensor, name: str) -> None:
    if sample_weight.shape[:1] != x.shape[:1]:
        raise ValueError(
            f"sample_weight must match {name} dim-0: expected {list(x.shape[:1])}, "
            f"got {list(sample_weight.shape)}"
        )


def reduce(
    loss: Tensor, reduction: str, sample_weight: Tensor | None, counted: Tensor | None = None
) -> Tensor:
    """Reduction of loss [...]: "none", "sum" or any other, a mean.

    Args:
        loss: [...], 0 where nothing counts.
        reduction: as above.
        sample_weight: broadcasts to loss, or None for 1; it gets no gradient.
        counted: [...] bool, whose number (or weight) the mean divides by, or 1 where that is 0;
            None for all. The sum is always over the whole loss.

    Returns:
        [], or [...] for "none".
    """
    weight = None
    if sample_weight is not None:
        weight = sample_weight.detach().to(loss.dtype).expand(loss.shape)
        loss = weight * loss
    if reduction == "none":
        return loss
    if reduction == "mean" and counted is None and weight is None:
        count = loss.numel()
        known = num.size_known(count)
        return loss.mean() if known and count else loss.sum() / max(count, 1)
    total = loss.sum()
    if reduction == "sum":
        return total
    rows = weight if counted is None else counted
    if counted is not None and weight is not None:
        rows = torch.where(counted, weight, 0.0)
    assert rows is not None
    mass = rows.sum()
    if rows.dtype == torch.bool:
        return total / mass.clamp(min=1)
    return total / torch.where(mass > 0, mass, 1)
