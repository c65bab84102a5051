"""Trains a stack of networks, and keeps of each the weights of best validation AP."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from sklearn.metrics import average_precision_score, roc_curve
from torch import Tensor

from proxy_losses.demo._measure import recall_at_top, top_count

from .arms import BASE, Arm, optimizer
from .data import Array, Part, Stack
from .losses import Batch, Setup
from .models import Weights, scores

TOP = 0.005  # of the negatives, for pAUC
METRICS = {"ap": "AP", "recall": "recall in the top 0.5 %", "pauc": "pAUC, FPR <= 0.5 %"}
ENRICHED = 0.2


class Budget(NamedTuple):
    """How much is run, for every arm alike."""

    base_steps: int = 1600  # of BCE, whose best checkpoint all others start from
    steps: int = 240  # of those
    every: int = 40  # steps between evaluations
    batch: int = 512
    most_train_rows: int = 20_000
    rounds: int = 150  # of gradient boosting
    rounds_every: int = 10


class Fitted(NamedTuple):
    """Best checkpoint of every network."""

    ap: Tensor  # [seeds, configurations] float64, on the validation rows
    step: Tensor  # [seeds, configurations] int64; 0 is where it started
    weights: Weights  # each [seeds, configurations, ...]
    evaluations: int  # checkpoints looked at, per network


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


@torch.no_grad()
def part_scores(weights: Weights, part: Part) -> Tensor:
    """[seeds, configurations, rows], one seed at a time to save memory."""
    each = (scores([w[s : s + 1] for w in weights], part.x[s : s + 1]) for s in range(len(part.x)))
    return torch.cat([*each])


def validation_ap(weights: Weights, part: Part) -> Tensor:
    """[seeds, configurations] float64."""
    found = part_scores(weights, part).numpy()
    values = [
        [average_precision_score(y, row) for row in rows]
        for y, rows in zip(part.y.numpy(), found, strict=True)
    ]
    return torch.tensor(values, dtype=torch.float64)


class Training:
    """All configurations of an arm for all seeds, from weights [seeds, ...]."""

    def __init__(self, part: Part, arm: Arm, model: str, start: Weights, order: Tensor) -> None:
        """`order` is `batches`."""
        rates = [configuration["rate"] for configuration in arm.configurations(model)]
        self.part, self.order = part, order
        self.networks = [[w.clone().requires_grad_() for w in start] for _ in rates]
        groups = [{"params": n, "lr": r} for n, r in zip(self.networks, rates, strict=True)]
        self.optimizer = optimizer(arm)(groups)
        before = part_scores([w[:, None] for w in start], part)[:, 0]
        self.loss = arm.make(Setup(arm.values, before, part.y, order.shape[1]))
        self.seeds = torch.arange(len(order))[:, None]

    def weights(self) -> Weights:
        """Each [seeds, configurations, ...]."""
        return [torch.stack(tensors, 1) for tensors in zip(*self.networks, strict=True)]

    def step(self, number: int) -> None:
        """One step of every network."""
        rows = self.order[:, number]
        x, y = self.part.x[self.seeds, rows], self.part.y[self.seeds, rows]
        self.optimizer.zero_grad()
        losses = self.loss(scores(self.weights(), x), Batch(y, rows, number))
        losses.sum().backward()
        self.optimizer.step()


def fit(
    stack: Stack,
    arm: Arm,
    model: str,
    start: Weights,
    seeds: Sequence[int],
    budget: Budget,
    tick: Callable[[], Any] = lambda: None,
) -> Fitted:
    """Train every configuration of an arm, keep the best checkpoint of each network."""
    steps = budget.base_steps if arm.name == BASE.name else budget.steps
    streams = [2 * seed + (arm.name != BASE.name) for seed in seeds]
    order = batches(stack.train.y, streams, steps, budget.batch, arm.batches)
    training = Training(stack.train, arm, model, start, order)
    best = [w.detach() for w in training.weights()]
    ap = validation_ap(best, stack.val)
    at = torch.zeros_like(ap, dtype=torch.int64)
    evaluations = 1
    for number in range(steps):
        training.step(number)
        tick()
        if (number + 1) % budget.every:
            continue
        now = [w.detach() for w in training.weights()]
        value = validation_ap(now, stack.val)
        evaluations += 1
        better = value > ap
        ap, at = torch.where(better, value, ap), torch.where(better, number + 1, at)
        best = [
            torch.where(better.view(*better.shape, *[1] * (w.dim() - 2)), w, b)
            for w, b in zip(now, best, strict=True)
        ]
    return Fitted(ap, at, best, evaluations)


def choose(fitted: Fitted) -> tuple[Tensor, Weights]:
    """(configuration of best validation AP of every seed, its weights [seeds, ...])."""
    chosen = fitted.ap.argmax(1)
    seeds = torch.arange(len(chosen))
    return chosen, [w[seeds, chosen] for w in fitted.weights]


def metrics_of(found: Tensor, y: Tensor) -> list[dict[str, float]]:
    """Every metric of every seed, from scores [seeds, rows]."""
    return [
        {"ap": float(average_precision_score(labels, s)), "recall": top_recall(s, labels),
         "pauc": partial_area(s, labels)}
        for s, labels in zip(found.numpy(), y.numpy(), strict=True)
    ]  # fmt: skip


def top_recall(found: Array, y: Array) -> float:
    """Positives in the top 0.5 % of rows, rounded up, over the most that could be there."""
    return recall_at_top(found, y) * float(y.sum()) / min(top_count(len(y)), float(y.sum()))


def partial_area(found: Array, y: Array) -> float:
    """Mean true-positive rate over false-positive rates up to 0.5 %."""
    fpr, tpr, _ = roc_curve(y, found, drop_intermediate=False)
    knots = np.r_[fpr[fpr < TOP], TOP]
    heights = np.r_[tpr[fpr < TOP], np.interp(TOP, fpr, tpr)]
    return float(np.trapezoid(heights, knots) / TOP)
