"""Trains arms on a table, and measures them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from sklearn.metrics import average_precision_score, roc_curve
from torch import Tensor

from ..trainer import Arm, Budget, Fitted, Part, Training, Weights, average_precision, score_all
from .arms import BASE
from .data import Array, Stack

TOP = 0.005  # of the negatives, for pAUC
TOP_ONE_IN = 200  # rows, for the recall
METRICS = {"ap": "AP", "recall": "recall in the top 0.5 %", "pauc": "pAUC, FPR <= 0.5 %"}
ENRICHED = 0.2


class Effort(NamedTuple):
    """How much is run, for every arm alike."""

    base: Budget  # of BCE, whose best checkpoint all others start from
    more: Budget  # of those
    boosting: Budget = Budget(150, 10)  # in rounds
    most_train_rows: int | None = 20_000


def batches(y: Tensor, seeds: Sequence[int], steps: int, size: int, kind: str) -> Tensor:
    """[seeds, steps, size] row numbers: every row once before any comes again.

    Enriched batches do so for each class apart.
    """
    drawn = []
    for seed, labels in zip(seeds, y, strict=True):
        draw = torch.Generator().manual_seed(seed)
        if kind == "plain":
            drawn.append(_cycle(torch.arange(len(labels)), steps, size, draw))
        else:
            count = round(ENRICHED * size)
            halves = [
                _cycle(labels.nonzero()[:, 0], steps, count, draw),
                _cycle((~labels).nonzero()[:, 0], steps, size - count, draw),
            ]
            drawn.append(torch.cat(halves, 1))
    return torch.stack(drawn)


def _cycle(rows: Tensor, steps: int, size: int, draw: torch.Generator) -> Tensor:
    turns = -(-steps * size // len(rows))
    order = [rows[torch.randperm(len(rows), generator=draw)] for _ in range(turns)]
    return torch.cat(order)[: steps * size].view(steps, size)


def validation_ap(weights: Weights, part: Part) -> Tensor:
    """[seeds, configurations] float64."""
    return average_precision(score_all(weights, part.x), part.y)


def fit(
    stack: Stack,
    arm: Arm,
    start: Weights,
    seeds: Sequence[int],
    budget: Budget,
    tick: Callable[[], Any] = lambda: None,
) -> Fitted:
    """Train every configuration of an arm, keep the best checkpoint of each network."""
    streams = [2 * seed + (arm.name != BASE.name) for seed in seeds]
    order = batches(stack.train.y, streams, budget.steps, budget.batch or 0, arm.batches)
    training = Training(stack.train, arm, start, budget, order, tick)
    return training.fit(lambda weights: validation_ap(weights, stack.val))


def metrics_of(found: Tensor, y: Tensor) -> list[dict[str, float]]:
    """Every metric of every seed, from scores [seeds, rows]."""
    return [
        {"ap": float(average_precision_score(labels, s)), "recall": top_recall(s, labels),
         "pauc": partial_area(s, labels)}
        for s, labels in zip(found.numpy(), y.numpy(), strict=True)
    ]  # fmt: skip


def top_recall(found: Array, y: Array) -> float:
    """Positives in the top 0.5 % of rows, rounded up, over the most that could be there.

    Ties share the last places.
    """
    count = -(-len(y) // TOP_ONE_IN)
    threshold = np.partition(found, -count)[-count]
    above, tied = found > threshold, found == threshold
    hits = y[above].sum() + (count - above.sum()) * y[tied].mean()
    return float(hits / min(count, y.sum()))


def partial_area(found: Array, y: Array) -> float:
    """Mean true-positive rate over false-positive rates up to 0.5 %."""
    fpr, tpr, _ = roc_curve(y, found, drop_intermediate=False)
    knots = np.r_[fpr[fpr < TOP], TOP]
    heights = np.r_[tpr[fpr < TOP], np.interp(TOP, fpr, tpr)]
    return float(np.trapezoid(heights, knots) / TOP)
