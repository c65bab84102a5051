"""What the demo measures: average precision, recall at the top, and how sure it is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from sklearn.metrics import average_precision_score

from ._tables import Ints

Array = npt.NDArray[np.floating[Any]]

TOP_ONE_IN = 200  # the top 0.5 %


class Measures(NamedTuple):
    """Of one model on the test rows; of several classes, the mean over classes."""

    aucpr: float
    recall: float  # in the top 0.5 %
    best_recall: float  # the largest that a perfect ranking could have there


class Interval(NamedTuple):
    """A difference in AUCPR and its 95 % bootstrap interval."""

    difference: float
    low: float
    high: float


def class_lists(scores: Array, labels: Ints) -> list[tuple[Array, npt.NDArray[np.bool_]]]:
    """One (scores, is positive) list per class; a single one of two classes."""
    if scores.shape[1] == 1:
        return [(scores[:, 0], labels == 1)]
    return [(scores[:, index], labels == index) for index in range(scores.shape[1])]


def aucpr(scores: Array, labels: Ints) -> float:
    """Average precision of ``scores`` [rows, classes], the mean over classes."""
    return float(np.mean([average_precision_score(y, s) for s, y in class_lists(scores, labels)]))


def top_count(rows: int) -> int:
    """How many rows the top 0.5 % are, rounded up, so at least one."""
    return -(-rows // TOP_ONE_IN)


def recall_at_top(scores: Array, positive: npt.NDArray[np.bool_]) -> float:
    """The share of the positives among the top 0.5 % of scores; ties share the last places."""
    count = top_count(len(scores))
    threshold = np.partition(scores, -count)[-count]
    above, tied = scores > threshold, scores == threshold
    hits = positive[above].sum() + (count - above.sum()) * positive[tied].mean()
    return float(hits / positive.sum())


def measure(scores: Array, labels: Ints) -> Measures:
    """Everything in the final table, for one model."""
    lists = class_lists(scores, labels)
    return Measures(
        aucpr(scores, labels),
        float(np.mean([recall_at_top(s, y) for s, y in lists])),
        float(np.mean([min(1.0, top_count(len(y)) / y.sum()) for _, y in lists])),
    )


def weighted_aucpr(scores: Array, labels: Ints) -> Callable[[Array], float]:
    """A function of row weights: ``aucpr`` of rows so weighted, sorted only once."""
    prepared = []
    for list_scores, positive in class_lists(scores, labels):
        order = np.argsort(-list_scores, kind="stable")
        ends = np.flatnonzero(np.diff(list_scores[order], append=-np.inf))  # of each run of ties
        prepared.append((order, positive[order], ends))

    def value(weight: Array) -> float:
        values = []
        for order, positive, ends in prepared:
            ranked = weight[order]
            hits = np.cumsum(ranked * positive)[ends]
            rows = np.cumsum(ranked)[ends]
            precision = hits / np.maximum(rows, 1e-300)
            values.append((np.diff(hits, prepend=0.0) * precision).sum() / hits[-1])
        return float(np.mean(values))

    return value


def bootstrap_difference(
    ours: Array, theirs: Array, labels: Ints, seed: int, rounds: int = 400
) -> Interval:
    """Resample the test rows within each class, the same rows for both models."""
    rng = np.random.default_rng(seed)
    of_ours, of_theirs = weighted_aucpr(ours, labels), weighted_aucpr(theirs, labels)
    members = [np.flatnonzero(labels == label) for label in np.unique(labels)]
    weight = np.ones(len(labels))
    differences = []
    for _ in range(rounds):
        for rows in members:
            drawn = rng.integers(len(rows), size=len(rows))
            weight[rows] = np.bincount(drawn, minlength=len(rows))
        differences.append(of_ours(weight) - of_theirs(weight))
    low, high = np.quantile(differences, [0.025, 0.975])
    return Interval(aucpr(ours, labels) - aucpr(theirs, labels), float(low), float(high))
