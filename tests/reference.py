"""Independent float64 references: loops written from the formulas, sharing no code with us."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np


def sigmoid(x: float) -> float:
    return 1.0 / (1.0 + math.exp(-x)) if x >= 0 else math.exp(x) / (1.0 + math.exp(x))


def soft_rank(scores: Sequence[float], i: int, among: Sequence[int], tau: float) -> float:
    return 1.0 + sum(sigmoid((scores[j] - scores[i]) / tau) for j in among if j != i)


def smooth_ap(scores, pos, tau, valid=None, weight=None) -> float:
    rows = [j for j in range(len(scores)) if valid is None or valid[j]]
    positives = [j for j in rows if pos[j]]
    w = {j: 1.0 if weight is None else float(weight[j]) for j in positives}
    if not positives or len(positives) == len(rows) or sum(w.values()) == 0:
        return 0.0
    total = 0.0
    for i in positives:
        rank = soft_rank(scores, i, rows, tau)
        total += w[i] * soft_rank(scores, i, positives, tau) / rank
    return total / sum(w.values())


def recall_at_quantile(
    scores, pos, tau, valid=None, weight=None, quantile=0.005, interpolation="higher"
) -> float:
    rows = [j for j in range(len(scores)) if valid is None or valid[j]]
    positives = [j for j in rows if pos[j]]
    w = {j: 1.0 if weight is None else float(weight[j]) for j in positives}
    if not positives or sum(w.values()) == 0:
        return 0.0
    theta = np.quantile([scores[j] for j in rows], 1.0 - quantile, method=interpolation)
    total = sum(w[i] * sigmoid((scores[i] - theta) / tau) for i in positives)
    return total / sum(w.values())


def similarity(x, y, kind="cosine") -> float:
    dot = sum(a * b for a, b in zip(x, y, strict=True))
    norms = math.hypot(*x) * math.hypot(*y)
    return dot if kind == "dot" else dot / norms if norms else 0.0


def retrieval(embeddings, labels, refs=None, ref_labels=None, kind="cosine"):
    """Scores and positives of each query's list, without the query itself where refs is None."""
    lists = []
    for q, (x, label) in enumerate(zip(embeddings, labels, strict=True)):
        scores, pos = [], []
        for m, y in enumerate(embeddings if refs is None else refs):
            if refs is None and m == q:
                continue
            other = (labels if refs is None else ref_labels)[m]
            shares = set(label) & set(other) if isinstance(label, set) else label == other
            scores.append(similarity(x, y, kind))
            pos.append(bool(shares))
        lists.append((scores, pos))
    return lists
