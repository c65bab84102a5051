"""Independent float64 references: loops written from the formulas, sharing no code with us."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

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


def smooth_auroc(scores, pos, tau, valid=None, weight=None, surrogate="sigmoid") -> float:
    rows = [j for j in range(len(scores)) if valid is None or valid[j]]
    w = {i: 1.0 if weight is None else float(weight[i]) for i in rows if pos[i]}
    negatives = [j for j in rows if not pos[j]]
    if not negatives or sum(w.values()) == 0:
        return 0.0
    total = 0.0
    for i in w:
        for j in negatives:
            z = (scores[j] - scores[i]) / tau
            if surrogate == "sigmoid":
                total += w[i] * sigmoid(-z)
            else:
                softplus = max(z, 0.0) + math.log1p(math.exp(-abs(z)))
                total += w[i] * (1.0 - softplus / math.log(2.0))
    return total / sum(w.values()) / len(negatives)


def smooth_mrr(scores, pos, tau, valid=None, weight=None) -> float:
    """By the odds of the draw: j comes before all positives with weight e_j / (e_j + E)."""
    rows = [j for j in range(len(scores)) if valid is None or valid[j]]
    w = {i: 1.0 if weight is None else float(weight[i]) for i in rows if pos[i]}
    w = {i: x for i, x in w.items() if x > 0}
    negatives = [j for j in rows if not pos[j]]
    if not negatives or not w:
        return 0.0
    top = max(scores[i] for i in w)
    effective = sum(w.values()) / sum(x * x for x in w.values())
    mass = sum(x * effective * math.exp((scores[i] - top) / tau) for i, x in w.items())
    rank = 1.0
    for j in negatives:
        z = (scores[j] - top) / tau
        rank += 1.0 / (1.0 + mass * math.exp(-z)) if z > 0 else math.exp(z) / (math.exp(z) + mass)
    return 1.0 / rank


def smooth_ndcg(scores, gains, tau, valid=None, weight=None, k=None) -> float:
    rows = [j for j in range(len(scores)) if valid is None or valid[j]]
    g = {j: float(gains[j]) * (1.0 if weight is None else float(weight[j])) for j in rows}
    best = sorted(g.values(), reverse=True)
    if not best or best[0] == best[-1]:
        return 0.0
    ideal = sum(x / math.log2(1 + place) for place, x in enumerate(best[:k], 1))
    ordered = sorted((scores[j] for j in rows), reverse=True)
    total = 0.0
    for i in rows:
        if g[i] > 0:
            part = g[i] / math.log2(1.0 + soft_rank(scores, i, rows, tau))
            if k is not None and k < len(rows):
                part *= sigmoid((scores[i] - (ordered[k - 1] + ordered[k]) / 2) / tau)
            total += part
    return total / ideal


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


def recall_at_k(scores, pos, tau, valid=None, weight=None, k=10, normalize="positives") -> float:
    rows = [j for j in range(len(scores)) if valid is None or valid[j]]
    positives = [j for j in rows if pos[j]]
    w = {j: 1.0 if weight is None else float(weight[j]) for j in positives}
    if not positives or sum(w.values()) == 0:
        return 0.0
    ordered = sorted((scores[j] for j in rows), reverse=True)
    each = []
    for place in [k] if isinstance(k, int) else k:
        value = 1.0
        if place < len(rows):
            theta = (ordered[place - 1] + ordered[place]) / 2
            total = sum(w[i] * sigmoid((scores[i] - theta) / tau) for i in positives)
            value = total / sum(w.values())
        if normalize != "positives":
            over = place if normalize == "k" else min(place, len(positives))
            value *= len(positives) / over
        each.append(value)
    return sum(each) / len(each)


def precision_at_k(scores, pos, tau, valid=None, weight=None, k=10, normalize="k") -> float:
    return recall_at_k(scores, pos, tau, valid, weight, k, normalize)


def held_threshold(scores: Sequence[float], tau: float, total: float) -> float:
    """The threshold above which the soft steps of the scores sum to this total, by bisection."""
    low, high = min(scores) - 1e3 * tau, max(scores) + 1e3 * tau
    for _ in range(200):
        middle = (low + high) / 2
        if math.fsum(sigmoid((s - middle) / tau) for s in scores) > total:
            low = middle
        else:
            high = middle
    return (low + high) / 2


def held_recall(scores, pos, tau, theta, start, among, weight=None) -> float:
    """Mean over positives of the soft step above a threshold.

    It is theta where the scores are those of the start, and holds its sum of steps over the rows
    among as they move.
    """
    total = math.fsum(sigmoid((start[j] - theta) / tau) for j in among)
    at = held_threshold([scores[j] for j in among], tau, total)
    positives = [i for i in range(len(scores)) if pos[i]]
    w = [1.0 if weight is None else float(weight[i]) for i in positives]
    steps = (sigmoid((scores[i] - at) / tau) for i in positives)
    return math.fsum(a * x for a, x in zip(w, steps, strict=True)) / sum(w)


def quantile(values: Sequence[float], level: float, interpolation: str) -> float:
    """As defined by torch: the order statistic at rank level * (n - 1), counted from 0."""
    ordered = sorted(values)
    rank = level * (len(ordered) - 1)
    low, high = ordered[math.floor(rank)], ordered[math.ceil(rank)]
    return {
        "lower": low,
        "higher": high,
        "nearest": ordered[round(rank)],
        "midpoint": (low + high) / 2,
        "linear": low + (rank - math.floor(rank)) * (high - low),
    }[interpolation]


class Band(NamedTuple):
    """A partial AUC and what it is made of."""

    value: float
    t_alpha: float
    t_beta: float
    tau_eff: float
    pauc_var: float
    band_neg_count: int


def partial_auc_band(
    scores, pos, tau, valid=None, weight=None, *, iid=None, live=None, alpha=0.0, beta=0.005,
    surrogate="trapezoid", n_knots=2, tau_scale="iqr", pos_numerator="pool", budget_basis="fpr",
    interpolation="higher",
) -> Band | None:  # fmt: skip
    """None where partial AUC is not defined."""
    rows = [j for j in range(len(scores)) if valid is None or valid[j]]
    negatives = [j for j in rows if not pos[j]]
    iid_negatives = [j for j in negatives if iid is None or iid[j]]
    positives = [j for j in rows if pos[j]]
    if pos_numerator == "live" and live is not None:
        positives = [j for j in positives if live[j]]
    w = [1.0 if weight is None else float(weight[j]) for j in positives]
    if not iid_negatives or sum(w) == 0:
        return None
    among = iid_negatives
    if budget_basis == "population":
        among = [j for j in rows if iid is None or iid[j]]
    among = [scores[j] for j in among]
    knots = [alpha + (beta - alpha) * k / (n_knots - 1) for k in range(n_knots)]
    thresholds = [quantile(among, 1.0 - f, interpolation) for f in knots]
    t_alpha, t_beta = thresholds[0], thresholds[-1]
    low, high = t_beta, t_alpha
    if tau_scale == "iqr":
        low, high = (quantile(among, q, interpolation) for q in (0.25, 0.75))
    if not high > low:
        return None
    temperature = tau * (high - low)
    inside = [j for j in negatives if t_beta <= scores[j] <= t_alpha]
    each = []  # of every positive, its part in the value
    for i in positives:
        if surrogate == "trapezoid":
            above = [sigmoid((scores[i] - t) / temperature) for t in thresholds]
            area = sum((a + b) / 2 for a, b in itertools.pairwise(above))
            each.append(area / (n_knots - 1))
        elif not inside:
            return None
        else:
            steps = [sigmoid((scores[i] - scores[j]) / temperature) for j in inside]
            each.append(sum(steps) / len(steps))
    value = sum(a * b for a, b in zip(w, each, strict=True)) / sum(w)
    mean = sum(each) / len(each)
    variance = sum((x - mean) ** 2 for x in each) / len(each)
    count = len(set(inside) & set(iid_negatives))
    return Band(value, t_alpha, t_beta, temperature, variance, count)


def partial_auc(*args, **options) -> float:
    found = partial_auc_band(*args, **options)
    return 0.0 if found is None else found.value


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


def smooth_ap_saturation(scores, pos, tau, valid=None) -> float:
    rows = [j for j in range(len(scores)) if valid is None or valid[j]]
    positives = [j for j in rows if pos[j]]
    gone = 0
    for i in positives:
        steps = [sigmoid((scores[j] - scores[i]) / tau) for j in rows if j != i]
        gone += sum(p * (1 - p) for p in steps) < 1e-4 / 4
    return gone / max(len(positives), 1)


def recall_saturation(
    scores, pos, tau, valid=None, quantile=0.005, interpolation="higher"
) -> float:
    rows = [j for j in range(len(scores)) if valid is None or valid[j]]
    positives = [j for j in rows if pos[j]]
    if not positives:
        return 0.0
    theta = np.quantile([scores[j] for j in rows], 1.0 - quantile, method=interpolation)
    above = [sigmoid((scores[i] - theta) / tau) for i in positives]
    return sum(p * (1 - p) < 1e-4 / 4 for p in above) / len(positives)
