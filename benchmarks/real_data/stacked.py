"""BCE, and from there full-batch steps of BCE or of Smooth-AP, for all seeds at once."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from sklearn.linear_model import orthogonal_mp
from sklearn.metrics import average_precision_score
from torch import Tensor

import proxy_losses as pl

from ..trainer import Arm, Batch, Budget, Loss, Make, Part, Setup, Training, Weights, score_all
from .data import Array, Stack
from .losses import bce, scaled_bce
from .models import best_logistic
from .train import Effort, validation_ap

BASE_RATE = 1e-2  # of networks, falls to 0
RATES = (1e-3, 3e-3)  # of networks, validation picks one
LINEAR_RATES = (0.03, 0.1)  # in units of the spread of the scores
TAU, LINEAR_TAU = 0.25, 0.1  # in units of the spread of the scores at the start
PENALTIES = (0.01, 0.1, 1.0)  # C of the logistic regression
SETTINGS = ("BASE_RATE", "RATES", "LINEAR_RATES", "TAU", "LINEAR_TAU", "PENALTIES")
EFFORT = Effort(Budget(1500, 40, 512, fall=True), Budget(120, 10))  # the same for every cell


class Capacity(NamedTuple):
    """A linear model on some features, or a network with one hidden layer on all."""

    name: str
    features: int | None = None  # the best ones, None for all
    hidden: int | None = None  # units, None for a linear model


def pick_features(part: Part, count: int | None) -> Tensor | None:
    """[seeds, count] column numbers by orthogonal matching pursuit; None for all columns."""
    if count is None or count >= part.x.shape[2]:
        return None
    columns = []
    for x, y in zip(part.x.double().numpy(), part.y.numpy(), strict=True):
        coef = orthogonal_mp(x - x.mean(0), y - y.mean(), n_nonzero_coefs=count)
        columns.append(np.argsort(coef.reshape(-1) == 0, kind="stable")[:count])
    return torch.from_numpy(np.stack(columns))


def narrowed(stack: Stack, columns: Tensor | None) -> Stack:
    if columns is None:
        return stack
    seeds = torch.arange(len(columns))[:, None]
    return Stack(*(Part(p.x.transpose(1, 2)[seeds, columns].transpose(1, 2), p.y) for p in stack))


def logistic(stack: Stack) -> Weights:
    """Logistic regressions, the penalty picked by validation."""
    coefs, intercepts = [], []
    for (x, y), (x_val, y_val) in zip(*(zip(*p, strict=True) for p in stack[:2]), strict=True):
        x_val, truth = x_val.double().numpy(), y_val.numpy()
        found = best_logistic(
            x.double().numpy(), y.numpy(), PENALTIES,
            lambda m, x_val=x_val, truth=truth: average_precision_score(
                truth, x_val @ m.coef_[0] + m.intercept_[0]
            ),
        )  # fmt: skip
        coefs.append(found.coef_.T)
        intercepts.append(found.intercept_[None])
    made = (torch.from_numpy(np.stack(w)) for w in (coefs, intercepts))
    return [w.to(stack.train.x.dtype) for w in made]


def network(stack: Stack, hidden: int, budget: Budget) -> Weights:
    """One hidden layer, BCE on batches from random weights, the best validated checkpoint."""
    seeds, rows, features = stack.train.x.shape
    draw = torch.Generator().manual_seed(0)
    weights = []
    for fan_in, fan_out in ((features, hidden), (hidden, 1)):
        for size in (fan_in, 1):
            tensor = 2 * torch.rand(seeds, size, fan_out, generator=draw) - 1
            weights.append((tensor / fan_in**0.5).to(stack.train.x.dtype))
    shape = seeds, min(budget.batch or rows, rows)
    drawn = [torch.randint(rows, shape, generator=draw) for _ in range(budget.steps)]
    arm = Arm("BCE", bce, (BASE_RATE,))
    training = Training(stack.train, arm, weights, budget, torch.stack(drawn, 1))
    return training.fit(lambda now: validation_ap(now, stack.val)).choose()[1]


def smooth_ap(tau: Tensor) -> Make:
    """Of all rows; tau [seeds]."""

    def make(setup: Setup) -> Loss:
        def loss(found: Tensor, batch: Batch) -> Tensor:
            pos = batch.y[:, None].expand(found.shape)
            return 1.0 - pl.smooth_ap(found, pos, tau[:, None].expand(found.shape[:2]), rtol=1e-4)

        return loss

    return make


def arms(stack: Stack, capacity: Capacity, effort: Effort = EFFORT) -> dict[str, Array]:
    """Test AP [seeds] of BCE, of BCE continued, and of Smooth-AP from the same start."""
    rates, tau = RATES, TAU
    if capacity.hidden is not None:
        start = network(stack, capacity.hidden, effort.base)
    else:
        stack = narrowed(stack, pick_features(stack.train, capacity.features))
        start = logistic(stack)
        # A step changes the scores by at most about the rate, in units of their spread.
        rates = tuple(rate / start[0].shape[1] ** 0.5 for rate in LINEAR_RATES)
        tau = LINEAR_TAU
    spread = score_all([w[:, None] for w in start], stack.train.x)[:, 0].std(-1)
    scale = torch.ones_like(spread)
    if capacity.hidden is None:  # scores of spread 1
        start = [w / spread[:, None, None] for w in start]
        scale, spread = spread, scale
    found = {"start": start}
    for name, make in (("continued", scaled_bce(scale)), ("smooth_ap", smooth_ap(tau * spread))):
        training = Training(stack.train, Arm(name, make, rates), start, effort.more)
        found[name] = training.fit(lambda now: validation_ap(now, stack.val)).choose()[1]
    return {
        name: validation_ap([w[:, None] for w in weights], stack.test)[:, 0].numpy()
        for name, weights in found.items()
    }
