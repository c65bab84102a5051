"""The one list of metrics that the contract matrix runs over; a new metric joins here."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from sklearn.metrics import average_precision_score, roc_auc_score
from torch import Tensor

import proxy_losses as P

from . import reference


class Metric(NamedTuple):
    name: str
    fn: Callable[..., Tensor]  # (scores, pos, tau, *, valid_mask, sample_weight)
    reference: Callable[..., float]  # (scores, pos, tau, valid, weight) of one list
    exact: Callable[..., float]  # (scores, pos): the metric it becomes as tau -> 0
    counts: Callable[..., Tensor]  # (scores, pos, valid, weight)
    needs_negative: bool
    perfect: float = 1.0  # value as tau -> 0 when all positives lead
    # (scores, pos, weight) -> value of any scores in plain torch, at TAU, with what is a constant
    # of the gradient taken from the given scores; None where there is no such thing
    frozen: Callable[..., Callable[[Tensor], Tensor]] | None = None
    tau_of_spread: bool = False  # tau multiplies a spread of the scores


QUANTILE = 0.3


def recall(scores: Tensor, pos: Tensor, tau: float | Tensor, **kwargs: object) -> Tensor:
    return P.recall_at_quantile(scores, pos, tau, quantile=QUANTILE, **kwargs)


def reference_recall(scores, pos, tau, valid=None, weight=None) -> float:
    return reference.recall_at_quantile(scores, pos, tau, valid, weight, QUANTILE)


def exact_recall(scores: np.ndarray, pos: np.ndarray) -> float:
    """Positives above the threshold, the one on it (a score of the list) counted half."""
    theta = np.quantile(scores, 1 - QUANTILE, method="higher")
    return float(((scores > theta) + 0.5 * (scores == theta))[pos].mean())


def frozen_recall(scores: Tensor, pos: Tensor, weight: Tensor) -> Callable[[Tensor], Tensor]:
    theta = torch.quantile(scores, 1 - QUANTILE, dim=-1, keepdim=True, interpolation="higher")
    w = torch.where(pos, weight, 0.0)
    return lambda s: (w * torch.sigmoid((s - theta) / TAU)).sum(-1) / w.sum(-1)


# Dyadic, so that levels and knots are exact in any order of operations.
TRAPEZOID = {"alpha": 0.125, "beta": 0.625, "n_knots": 3}
PAIRWISE = {"alpha": 0.0, "beta": 0.5, "surrogate": "pairwise"}


def at_levels(scores: Tensor, among: Tensor, levels: list[float]) -> Tensor:
    """[K, ...]: quantiles of the scores in a mask."""
    ranked = scores.where(among, torch.nan)
    return torch.nanquantile(ranked, scores.new_tensor(levels), dim=-1, interpolation="higher")


def frozen_trapezoid(scores: Tensor, pos: Tensor, weight: Tensor) -> Callable[[Tensor], Tensor]:
    low, high = at_levels(scores, ~pos, [0.25, 0.75])
    knots = at_levels(scores, ~pos, [0.875, 0.625, 0.375])
    temperature, w = TAU * (high - low)[..., None], torch.where(pos, weight, 0.0)

    def value(s: Tensor) -> Tensor:
        above = torch.sigmoid((s - knots[..., None]) / temperature)
        area = torch.trapezoid(above, dim=0) / (len(knots) - 1)
        return (w * area).sum(-1) / w.sum(-1)

    return value


def frozen_pairwise(scores: Tensor, pos: Tensor, weight: Tensor) -> Callable[[Tensor], Tensor]:
    low, high, least = at_levels(scores, ~pos, [0.25, 0.75, 0.5])[..., None]
    temperature, w = TAU * (high - low), torch.where(pos, weight, 0.0)
    band = ~pos & (scores >= least)

    def value(s: Tensor) -> Tensor:
        steps = torch.sigmoid((s[..., :, None] - s[..., None, :]) / temperature[..., None])
        pairs = w[..., :, None] * band[..., None, :]
        return (pairs * steps).sum((-1, -2)) / pairs.sum((-1, -2))

    return value


def exact_trapezoid(scores: np.ndarray, pos: np.ndarray) -> float:
    """Trapezoids of the exact true-positive rates at the knots."""
    negatives = scores[~pos]
    if len(negatives) < 3:  # "higher" puts both quartiles on the same score
        return 0.0
    knots = np.quantile(negatives, 1 - np.linspace(0.125, 0.625, 3), method="higher")
    rates = (scores[pos][:, None] > knots).mean(0)
    return float((rates[1:] + rates[:-1]).mean() / 2)


def exact_pairwise(scores: np.ndarray, pos: np.ndarray) -> float:
    """Area up to the whole number of negatives that the band holds, before standardisation."""
    count = int((~pos).sum())
    if count < 3:
        return 0.0
    max_fpr = (count - math.ceil(0.5 * (count - 1))) / count
    standard = roc_auc_score(pos, scores, max_fpr=max_fpr)
    least = max_fpr**2 / 2  # of a random order
    return float(least + (2 * standard - 1) * (max_fpr - least)) / max_fpr


def partial_auc_metric(name: str, options: dict[str, Any], **fields: Any) -> Metric:
    keys = options.keys() - {"n_knots"}
    return Metric(
        name,
        functools.partial(P.partial_auc, **options),
        functools.partial(reference.partial_auc, **options),
        counts=lambda s, p, v, w: P.partial_auc_defined(
            s, p, valid_mask=v, sample_weight=w, **{k: options[k] for k in keys}
        ),
        needs_negative=True,
        tau_of_spread=True,
        **fields,
    )


METRICS = [
    Metric(
        "smooth_ap",
        P.smooth_ap,
        reference.smooth_ap,
        lambda s, p: average_precision_score(p, s),
        lambda s, p, v, w: P.smooth_ap_defined(p, v, w),
        needs_negative=True,
    ),
    Metric(
        "recall_at_quantile",
        recall,
        reference_recall,
        exact_recall,
        lambda s, p, v, w: P.recall_defined(p, v, w),
        needs_negative=False,
        frozen=frozen_recall,
    ),
    partial_auc_metric(
        "partial_auc_trapezoid", TRAPEZOID, exact=exact_trapezoid, frozen=frozen_trapezoid
    ),
    partial_auc_metric(
        "partial_auc_pairwise", PAIRWISE, exact=exact_pairwise, frozen=frozen_pairwise
    ),
]

every_metric = pytest.mark.parametrize("metric", METRICS, ids=lambda m: m.name)
TAU = 0.3
# Both sides sum at most a few dozen terms in float64.
TIGHT = {"rtol": 1e-12, "atol": 1e-14}


def lists(
    seed: int, *shape: int, rate: float = 0.3, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor]:
    """Random scores and masks in which every list has a positive and a negative."""
    g = torch.Generator().manual_seed(seed)
    scores = torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype)
    pos = torch.rand(*shape, generator=g) < rate
    pos[..., 0], pos[..., 1] = True, False
    return scores, pos
