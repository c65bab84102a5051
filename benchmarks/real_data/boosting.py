"""Gradient boosting with logloss, the yardstick, tuned as the others are."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from sklearn.ensemble import HistGradientBoostingClassifier
from sklearn.metrics import average_precision_score
from threadpoolctl import threadpool_limits

from ..trainer import Budget
from .data import Stack
from .train import metrics_of

NAME = "gradient boosting"
CONFIGURATIONS = (
    {"learning_rate": 0.05, "max_leaf_nodes": 31},
    {"learning_rate": 0.1, "max_leaf_nodes": 31},
    {"learning_rate": 0.1, "max_leaf_nodes": 8},
)


def fit(
    stack: Stack, seeds: Sequence[int], budget: Budget, tick: Callable[[], Any] = lambda: None
) -> dict[str, Any]:
    """Every seed's configuration and number of rounds of best validation AP, on test."""
    record: dict[str, Any] = {"chosen": [], "step": [], "tried": []}
    runs = []
    for number, seed in enumerate(seeds):
        (x, y), (x_val, y_val), (x_test, y_test) = (
            (part.x[number].numpy(), part.y[number].numpy()) for part in stack
        )
        found = []
        for configuration in CONFIGURATIONS:
            booster = HistGradientBoostingClassifier(
                **configuration, max_iter=budget.steps, early_stopping=False, random_state=seed
            )
            with threadpool_limits(1):
                booster.fit(x, y)
                stages = [
                    (average_precision_score(y_val, s), done)
                    for done, s in enumerate(booster.staged_decision_function(x_val), 1)
                    if done % budget.every == 0
                ]
            ap, at = max(stages, key=lambda stage: stage[0])
            found.append((ap, at, booster))
            tick()
        chosen = max(range(len(found)), key=lambda k: found[k][0])
        _, at, booster = found[chosen]
        with threadpool_limits(1):
            stages = booster.staged_decision_function(x_test)
            scores = next(s for done, s in enumerate(stages, 1) if done == at)
        runs += metrics_of(torch.from_numpy(scores)[None], torch.from_numpy(y_test)[None])
        record["chosen"].append(chosen)
        record["step"].append(at)
        record["tried"].append([round(float(ap), 5) for ap, _, _ in found])
    return {name: [round(run[name], 5) for run in runs] for name in runs[0]} | record
