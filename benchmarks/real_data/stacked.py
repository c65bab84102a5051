"""BCE, and from there full-batch steps of BCE or of Smooth-AP, for all seeds at once.

Every tensor has a seed axis in front. Nothing mixes the seeds, so that the gradient of the sum of
their losses is that of each, and Adam, which works entry by entry, trains each as if it were alone.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.metrics import average_precision_score
from torch import Tensor

import proxy_losses as pl
from proxy_losses.integrations import _scorecard as card
from proxy_losses.integrations._rows import Rows

from .data import Array, Part, Stack

Weights = list[Tensor]  # weight [seeds, in, out] and bias [seeds, 1, out] of every layer
Loss = Callable[[Tensor], Tensor]  # scores [seeds, rows] -> [seeds]


class Capacity(NamedTuple):
    """A linear model on some features, or a network with one hidden layer on all."""

    name: str
    features: int | None = None  # the best ones, None for all
    hidden: int | None = None  # units, None for a linear model


class Budget(NamedTuple):
    """How much is run; the same for every cell."""

    base_steps: int = 1500  # of BCE on batches, for networks
    batch: int = 512
    base_rate: float = 1e-2  # falls to 0
    base_every: int = 40  # steps between validations
    steps: int = 120  # over all rows, of each arm
    every: int = 10
    rates: tuple[float, float] = (1e-3, 3e-3)  # of networks, validation picks one
    linear_rates: tuple[float, float] = (0.03, 0.1)  # in units of the spread of the scores
    tau: float = 0.25  # in units of the spread of the scores at the start
    linear_tau: float = 0.1
    penalties: tuple[float, ...] = (0.01, 0.1, 1.0)  # C of the logistic regression


class Found(NamedTuple):
    """The best validated weights of every seed."""

    weights: Weights
    ap: Array  # [seeds], on the validation rows


def scores(weights: Weights, x: Tensor) -> Tensor:
    """[seeds, rows] from [seeds, rows, features]."""
    for layer in range(0, len(weights) - 2, 2):
        x = torch.baddbmm(weights[layer + 1], x, weights[layer]).relu()
    return torch.baddbmm(weights[-1], x, weights[-2])[..., 0]


@torch.no_grad()
def average_precision(weights: Weights, part: Part) -> Array:
    """[seeds] float64."""
    found = scores(weights, part.x).numpy()
    return np.array(
        [average_precision_score(y, s) for y, s in zip(part.y.numpy(), found, strict=True)]
    )


def keep_better(best: Found, weights: Weights, part: Part) -> Found:
    """For each seed the weights that validate better, the earlier ones if equal."""
    ap = average_precision(weights, part)
    better = torch.from_numpy(ap > best.ap)[:, None, None]
    kept = [torch.where(better, w.detach(), b) for w, b in zip(weights, best.weights, strict=True)]
    return Found(kept, np.maximum(ap, best.ap))


def pick_features(part: Part, count: int | None) -> Tensor | None:
    """[seeds, count] column numbers by `LinearRanker`'s selection; None for all columns."""
    if count is None or count >= part.x.shape[2]:
        return None
    columns = []
    for x, y in zip(part.x.double().numpy(), part.y.numpy(), strict=True):
        support = card.select(Rows(x - x.mean(0), y, None), count)
        columns.append(np.argsort(~support, kind="stable")[:count])
    return torch.from_numpy(np.stack(columns))


def narrowed(stack: Stack, columns: Tensor | None) -> Stack:
    if columns is None:
        return stack
    seeds = torch.arange(len(columns))[:, None]
    return Stack(*(Part(p.x.transpose(1, 2)[seeds, columns].transpose(1, 2), p.y) for p in stack))


def logistic(stack: Stack, budget: Budget) -> Found:
    """Logistic regressions, the penalty picked by validation, scaled to scores of spread 1."""
    starts = []
    for seed in range(len(stack.train.x)):
        train, held = (
            Rows(p.x[seed].double().numpy(), p.y[seed].numpy(), None)
            for p in (stack.train, stack.val)
        )
        starts.append(card.warm_start(train, held, budget.penalties, card.exact("ap", 0.5, 0.5))[0])
    weights = [
        torch.tensor(np.stack([s.coef for s in starts]), dtype=torch.float32)[:, :, None],
        torch.tensor([s.intercept for s in starts], dtype=torch.float32)[:, None, None],
    ]
    return Found(weights, average_precision(weights, stack.val))


def network(stack: Stack, hidden: int, budget: Budget) -> Found:
    """One hidden layer, BCE on batches from random weights, the best validated checkpoint."""
    seeds, rows, features = stack.train.x.shape
    draw = torch.Generator().manual_seed(0)
    weights = []
    for fan_in, fan_out in ((features, hidden), (hidden, 1)):
        for size in (fan_in, 1):
            tensor = 2 * torch.rand(seeds, size, fan_out, generator=draw) - 1
            weights.append((tensor / fan_in**0.5).requires_grad_())
    optimizer = torch.optim.Adam(weights, lr=budget.base_rate)
    pick = torch.arange(seeds)[:, None]
    best = Found([w.detach().clone() for w in weights], np.full(seeds, -np.inf))
    for step in range(1, budget.base_steps + 1):
        index = torch.randint(rows, (seeds, min(budget.batch, rows)), generator=draw)
        for group in optimizer.param_groups:
            group["lr"] = budget.base_rate * (1 - step / budget.base_steps)
        optimizer.zero_grad()
        loss = bce(stack.train.y[pick, index])
        loss(scores(weights, stack.train.x[pick, index])).sum().backward()
        optimizer.step()
        if step % budget.base_every == 0:
            best = keep_better(best, weights, stack.val)
    return best


def bce(y: Tensor, scale: Tensor | None = None) -> Loss:
    """Of scores times a scale [seeds]."""
    target = y.float()

    def loss(found: Tensor) -> Tensor:
        logits = found if scale is None else found * scale[:, None]
        return F.binary_cross_entropy_with_logits(logits, target, reduction="none").mean(-1)

    return loss


def smooth_ap(y: Tensor, tau: Tensor) -> Loss:
    return lambda found: 1.0 - pl.smooth_ap(found, y, tau, rtol=1e-4)


def ascend(start: Found, stack: Stack, loss: Loss, rates: tuple[float, ...], b: Budget) -> Found:
    """Full-batch Adam from the start at each rate; the best validated point of every seed."""
    best = start
    for rate in rates:
        weights = [w.detach().clone().requires_grad_() for w in start.weights]
        optimizer = torch.optim.Adam(weights, lr=rate)
        for step in range(1, b.steps + 1):
            optimizer.zero_grad()
            loss(scores(weights, stack.train.x)).sum().backward()
            optimizer.step()
            if step % b.every == 0:
                best = keep_better(best, weights, stack.val)
    return best


def arms(stack: Stack, capacity: Capacity, budget: Budget) -> dict[str, Array]:
    """Test AP [seeds] of BCE, of BCE continued, and of Smooth-AP from the same start."""
    if capacity.hidden is not None:
        start = network(stack, capacity.hidden, budget)
        rates, tau = budget.rates, budget.tau
    else:
        stack = narrowed(stack, pick_features(stack.train, capacity.features))
        start = logistic(stack, budget)
        # A step changes the scores by at most about the rate, in units of their spread.
        width = start.weights[0].shape[1] ** 0.5
        rates, tau = tuple(rate / width for rate in budget.linear_rates), budget.linear_tau
    with torch.no_grad():
        spread = scores(start.weights, stack.train.x).std(-1)
    scale = None
    if capacity.hidden is None:
        start = start._replace(weights=[w / spread[:, None, None] for w in start.weights])
        scale, spread = spread, torch.ones_like(spread)
    y = stack.train.y
    found = {
        "start": start,
        "continued": ascend(start, stack, bce(y, scale), rates, budget),
        "smooth_ap": ascend(start, stack, smooth_ap(y, tau * spread), rates, budget),
    }
    return {name: average_precision(f.weights, stack.test) for name, f in found.items()}
