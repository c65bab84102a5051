"""Independent float64 pair sums in numpy blocks: long lists, gradients, how large errors may be.

Written from the formulas, sharing no code with the package; tests/reference.py has the same as
plain loops for short lists.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

BLOCK = 1 << 21  # pairs in the memory at once
# Rounding of a result to its dtype: half an ulp, relative.
ULP = {torch.float32: 2.0**-24, torch.float64: 2.0**-53}
RTOL = {torch.float32: 1e-6, torch.float64: 1e-12}


def array(x: Tensor | np.ndarray, dtype: type = np.float64) -> np.ndarray:
    return (x.detach().cpu().numpy() if isinstance(x, Tensor) else np.asarray(x)).astype(dtype)


def blocks(s: np.ndarray, rows: np.ndarray, tau: float) -> Iterator[tuple[np.ndarray, ...]]:
    """(targets i, z = (s_j - s_i) / tau, sigmoid(z), sigmoid'(z)), [i, j] each."""
    step = max(1, BLOCK // max(len(s), 1))
    for start in range(0, len(rows), step):
        i = rows[start : start + step]
        with np.errstate(over="ignore", under="ignore"):
            z = (s[None, :] - s[i, None]) / tau
            e = np.exp(-np.abs(z))
            up = np.where(z >= 0, 1.0, e) / (1.0 + e)
            yield i, z, up, e / (1.0 + e) ** 2


class Sums(NamedTuple):
    value: np.ndarray  # [G, M], 0 off the targets
    scale: np.ndarray  # [G, M], sum of absolute terms and half the largest weight


def sigmoid_sums(scores, weights, at, tau: float) -> Sums:
    """One list: scores [M], weights [G, M], at [M]."""
    s, w = array(scores), array(weights)
    value, scale = np.zeros(w.shape), np.zeros(w.shape)
    for i, _, up, _ in blocks(s, np.flatnonzero(array(at, bool)), tau):
        for g in range(len(w)):
            value[g, i] = (up * w[g]).sum(-1)
            scale[g, i] = (up * np.abs(w[g])).sum(-1) + np.abs(w[g]).max(initial=0.0) / 2
    return Sums(value, scale)


def soft_ranks(scores, pos, tau: float, valid=None) -> tuple[np.ndarray, np.ndarray]:
    """(R, R+) of one list, 0 off the positives."""
    p = array(pos, bool)
    v = np.ones_like(p) if valid is None else array(valid, bool)
    p = p & v
    found = sigmoid_sums(scores, np.stack([v, p]), p, tau).value
    return np.where(p, found[0] + 0.5, 0.0), np.where(p, found[1] + 0.5, 0.0)


class Precision(NamedTuple):
    """Smooth-AP of one list, its derivatives, and the scales of what they are sums of."""

    value: float
    grad: np.ndarray  # [M], by the scores
    tau_grad: float
    natural: float  # max(|grad|_2, |a|_2 / (4 tau)), a_i = omega_i / R_i
    tau_natural: float  # sum of the absolute terms of tau_grad
    weight_grad: np.ndarray  # [M]


def smooth_ap(scores, pos, tau: float, valid=None, weight=None) -> Precision:
    s, p = array(scores).copy(), array(pos, bool)
    v = np.ones_like(p) if valid is None else array(valid, bool)
    s[~v], p = 0.0, p & v
    w = np.where(p, 1.0 if weight is None else array(weight), 0.0)
    grad, weight_grad = np.zeros_like(s), np.zeros_like(s)
    if not w.max(initial=0.0) > 0.0 or not (v & ~p).any():
        return Precision(0.0, grad, 0.0, 0.0, 0.0, weight_grad)
    top = w.max()
    w = w / top
    total = w.sum()
    value = tau_grad = tau_natural = norm = 0.0
    fall = np.zeros_like(s)  # what every row gets as a source
    rows = np.flatnonzero(p)
    phis = np.zeros_like(s)
    for i, z, up, slope in blocks(s, rows, tau):
        ranks = (up * v).sum(-1) + 0.5
        hits = (up * p).sum(-1) + 0.5
        omega = w[i] / total
        a, phi = omega / ranks, hits / ranks
        b = -a * phi
        value += float((omega * phi).sum())
        phis[i] = phi
        norm += float((a**2).sum())
        pull = slope * (b[:, None] * v + a[:, None] * p)
        fall += pull.sum(0)
        grad[i] -= pull.sum(-1)
        tau_terms = np.where(slope > 0, pull * z, 0.0)
        tau_grad -= float(tau_terms.sum()) / tau
        parts = slope * np.abs(z) * (np.abs(b)[:, None] * v + a[:, None] * p)
        tau_natural += float(np.where(slope > 0, parts, 0.0).sum()) / tau
    grad = (grad + fall) / tau
    weight_grad[rows] = (phis[rows] - value) / (total * top)
    natural = max(float(np.linalg.norm(grad)), norm**0.5 / (4.0 * tau))
    return Precision(value, grad, tau_grad, natural, tau_natural, weight_grad)


def value_limit(dtype: torch.dtype, scores, tau: float, rtol: float | None = None) -> float:
    """Relative error that a value may have.

    The accuracy asked for; the rounding of the result; and, of float64 scores alone, what the
    rounding of a coordinate s / tau by 2^-52 |s| / tau costs: twice, for both ends of a pair.
    (Scores are float32 in the other case and coordinates float64.)
    """
    floor = 0.0
    if dtype == torch.float64:
        s = np.abs(array(scores))
        floor = 2.0 * 2.0**-52 * float(s[np.isfinite(s)].max(initial=0.0)) / tau
    return (RTOL[dtype] if rtol is None else rtol) + 4.0 * ULP[dtype] + floor


def assert_precision(
    value: Tensor, grad: Tensor | None, want: Precision, scores, tau: float,
    rtol: float | None = None,
) -> None:  # fmt: skip
    """The promise of the package: value within rtol, gradient within 3 rtol of its scale."""
    limit = value_limit(scores.dtype, scores, tau, rtol)
    off = abs(float(value) - want.value)
    assert off <= limit * abs(want.value), (float(value), want.value, off, limit)
    if grad is not None:
        off = float(np.linalg.norm(array(grad) - want.grad))
        assert off <= 3.0 * limit * want.natural + 1e-300, (off / (want.natural + 1e-300), limit)


def quantile(values: np.ndarray, fraction: float, interpolation: str = "higher") -> float:
    """The score at the upper fraction: the order statistic at rank (1 - fraction) * (n - 1)."""
    ordered = np.sort(array(values))
    rank = (1.0 - fraction) * (len(ordered) - 1)
    low, high = ordered[int(np.floor(rank))], ordered[int(np.ceil(rank))]
    return float({
        "lower": low, "higher": high, "nearest": ordered[round(rank)],
        "midpoint": (low + high) / 2, "linear": low + (rank - np.floor(rank)) * (high - low),
    }[interpolation])  # fmt: skip


def sigmoid(z: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore", under="ignore"):
        e = np.exp(-np.abs(z))
    return np.where(z >= 0, 1.0, e) / (1.0 + e)


def recall(scores, pos, tau: float, quantile_: float, interpolation: str = "higher") -> float:
    s, p = array(scores), array(pos, bool)
    theta = quantile(s, quantile_, interpolation)
    return float(sigmoid((s[p] - theta) / tau).mean())


def pairwise_auc(
    scores, pos, tau: float, beta: float, alpha: float = 0.0, interpolation: str = "higher"
) -> tuple[float, int]:
    """(pairwise partial AUC, negatives in the band) of one list, tau in interquartile ranges."""
    s, p = array(scores), array(pos, bool)
    n = s[~p]
    low, high = (quantile(n, f, interpolation) for f in (beta, alpha))
    temperature = tau * (quantile(n, 0.25, interpolation) - quantile(n, 0.75, interpolation))
    band = n[(n >= low) & (n <= high)]
    steps = [sigmoid((x - band) / temperature).mean() for x in s[p]]
    return float(np.mean(steps)), len(band)
