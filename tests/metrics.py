"""The one list of metrics that the contract matrix runs over; a new metric joins here."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import pytest
import torch
from sklearn.metrics import average_precision_score
from torch import Tensor

import proxy_losses as P

from . import reference


class Metric(NamedTuple):
    name: str
    fn: Callable[..., Tensor]  # (scores, pos, tau, *, valid_mask, sample_weight)
    reference: Callable[..., float]  # (scores, pos, tau, valid, weight) of one list
    exact: Callable[..., float]  # (scores, pos): the metric it becomes as tau -> 0
    counts: Callable[..., Tensor]
    needs_negative: bool
    perfect: float  # value as tau -> 0 when all positives lead


QUANTILE = 0.3


def recall(scores: Tensor, pos: Tensor, tau: float | Tensor, **kwargs: object) -> Tensor:
    return P.recall_at_quantile(scores, pos, tau, quantile=QUANTILE, **kwargs)


def reference_recall(scores, pos, tau, valid=None, weight=None) -> float:
    return reference.recall_at_quantile(scores, pos, tau, valid, weight, QUANTILE)


def exact_recall(scores: np.ndarray, pos: np.ndarray) -> float:
    """Positives above the threshold, the one on it (a score of the list) counted half."""
    theta = np.quantile(scores, 1 - QUANTILE, method="higher")
    return float(((scores > theta) + 0.5 * (scores == theta))[pos].mean())


METRICS = [
    Metric(
        "smooth_ap",
        P.smooth_ap,
        reference.smooth_ap,
        lambda s, p: average_precision_score(p, s),
        P.smooth_ap_counts,
        needs_negative=True,
        perfect=1.0,
    ),
    Metric(
        "recall_at_quantile",
        recall,
        reference_recall,
        exact_recall,
        P.recall_counts,
        needs_negative=False,
        perfect=1.0,
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
