"""Focal losses as loops over the published formulas, in 120 decimal digits.

With so many digits nothing cancels for logits up to 100, so the formulas stand as printed; the
derivatives are central differences, exact to about 1e-60.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from decimal import Context, Decimal, localcontext

STEP = Decimal("1e-30")


def sigmoid_element(x: Decimal, t: float, alpha=0.25, gamma=2.0) -> Decimal:
    t = Decimal(t)
    p = 1 / (1 + (-x).exp())
    p_t = p * t + (1 - p) * (1 - t)
    ce = -(t * p.ln() + (1 - t) * (1 - p).ln())
    alpha_t = 1 if alpha < 0 else Decimal(alpha) * t + (1 - Decimal(alpha)) * (1 - t)
    return alpha_t * power(1 - p_t, gamma) * ce


def softmax_row(xs: Sequence[Decimal], t: int, alpha=None, gamma=2.0, smoothing=0.0) -> Decimal:
    total = sum(x.exp() for x in xs)
    log_p = [x - total.ln() for x in xs]
    s = Decimal(smoothing)
    ce = -(1 - s) * log_p[t] - s * sum(log_p) / len(xs)
    p_t = xs[t].exp() / total
    return (1 if alpha is None else Decimal(alpha[t])) * power(1 - p_t, gamma) * ce


def power(base: Decimal, exponent: float) -> Decimal:
    return Decimal(1) if exponent == 0 else (base ** Decimal(exponent) if base else base)


def reduce(losses, weights, counted, reduction: str):
    """The losses of all elements to "none", "sum", or their sum over the weight that counts."""
    losses = [w * x for w, x in zip(weights, losses, strict=True)]
    if reduction == "none":
        return [float(x) for x in losses]
    if reduction == "sum":
        return float(sum(losses))
    mass = sum(w for w, c in zip(weights, counted, strict=True) if c)
    return float(sum(losses) / (mass or 1))


def sigmoid_focal(inputs, targets, *, alpha=0.25, gamma=2.0, reduction="mean", sample_weight=None):
    xs, ts, n = numbers(inputs), targets.reshape(-1).tolist(), inputs.numel()
    weights = [1] * n if sample_weight is None else numbers(sample_weight.expand(inputs.shape))
    with localcontext(Context(prec=120)):
        losses = [sigmoid_element(x, t, alpha, gamma) for x, t in zip(xs, ts, strict=True)]
        return reduce(losses, weights, [True] * n, reduction)


def softmax_focal(
    inputs, targets, *, alpha=None, gamma=2.0, reduction="mean", label_smoothing=0.0,
    ignore_index=-100, background_class=0, sample_weight=None,
):  # fmt: skip
    rows = [numbers(r) for r in inputs.movedim(1, -1).reshape(-1, inputs.shape[1])]
    ts = targets.reshape(-1).tolist()
    weights = [1] * len(ts) if sample_weight is None else numbers(sample_weight)
    with localcontext(Context(prec=120)):
        losses = [
            Decimal(0) if t == ignore_index
            else softmax_row(row, t, alpha, gamma, label_smoothing)
            for row, t in zip(rows, ts, strict=True)
        ]  # fmt: skip
        left_out = {ignore_index} | ({background_class} if reduction == "mean_positive" else set())
        return reduce(losses, weights, [t not in left_out for t in ts], reduction)


def numbers(x) -> list[Decimal]:
    return [Decimal(v) for v in x.reshape(-1).tolist()]


def gradient(f: Callable[[list[Decimal]], Decimal], at: Sequence[float]) -> list[float]:
    """Gradient of f by central differences of error STEP^2."""
    out = []
    with localcontext(Context(prec=120)):
        xs = [Decimal(x) for x in at]
        for j, x in enumerate(xs):
            up, down = ([*xs[:j], x + d, *xs[j + 1 :]] for d in (STEP, -STEP))
            out.append(float((f(up) - f(down)) / (2 * STEP)))
    return out
