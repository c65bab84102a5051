"""What the top of a ranked library is judged by."""

from __future__ import annotations

import numpy as np
from sklearn.metrics import average_precision_score, roc_auc_score

from ..real_data.data import Array

ALPHA = 20.0  # of BEDROC: four fifths of it come from the first 8 % of the list
METRICS = {
    "ap": "average precision",
    "ef1": "enrichment at 1 %",
    "ef5": "enrichment at 5 %",
    "bedroc": "BEDROC, alpha 20",
    "auc": "ROC AUC",
}
SCALE = {"ap": 100.0, "ef1": 1.0, "ef5": 1.0, "bedroc": 100.0, "auc": 100.0}  # to points


def metrics_of(scores: Array, y: Array) -> dict[str, float]:
    """Every metric, of scores and labels [molecules]."""
    return {
        "ap": float(average_precision_score(y, scores)),
        "ef1": enrichment(scores, y, 0.01),
        "ef5": enrichment(scores, y, 0.05),
        "bedroc": bedroc(scores, y),
        "auc": float(roc_auc_score(y, scores)),
    }


def by_rank(scores: Array, y: Array) -> Array:
    """Actives [molecules] by rank, the best score first; tied molecules share theirs evenly."""
    values, of, count = np.unique(-scores, return_inverse=True, return_counts=True)
    actives = np.bincount(of, y, len(values)) / count
    return np.repeat(actives, count)


def enrichment(scores: Array, y: Array, share: float) -> float:
    """Rate of actives in the top share of the list, rounded up, over that in all of it."""
    top = int(np.ceil(share * len(y)))
    return float(by_rank(scores, y)[:top].mean() / y.mean())


def bedroc(scores: Array, y: Array, alpha: float = ALPHA) -> float:
    """Boltzmann-enhanced discrimination of ROC, from 0 (all actives last) to 1 (all first).

    With n actives of N molecules, R = n / N and ranks r from 1:
    RIE = 1/n sum exp(-alpha r_i / N) / (1/N (1 - exp(-alpha)) / (exp(alpha / N) - 1)), and BEDROC =
    RIE R sinh(alpha / 2) / (cosh(alpha / 2) - cosh(alpha / 2 - alpha R)) + 1 / (1 - exp(alpha (1 -
    R))) (Truchon and Bayly, "Evaluating virtual screening methods: good and bad metrics for the
    'early recognition' problem", J. Chem. Inf. Model. 2007, equations 18 and 36).
    """
    total, rate = len(y), y.mean()
    weight = np.exp(-alpha * np.arange(1, total + 1) / total)
    random = -np.expm1(-alpha) / np.expm1(alpha / total) / total
    rie = weight @ by_rank(scores, y) / y.sum() / random
    half = alpha / 2
    scale = rate * np.sinh(half) / (np.cosh(half) - np.cosh(half - alpha * rate))
    return float(rie * scale + 1 / -np.expm1(alpha * (1 - rate)))
