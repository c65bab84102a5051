"""The losses that are compared, and what each of them is tuned over."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from sklearn.metrics import average_precision_score
from torch import Tensor

import proxy_losses as pl

from ..real_data import losses
from ..real_data.models import best_logistic, initial
from ..real_data.train import batches, validation_ap
from ..trainer import Arm, Batch, Budget, Fitted, Loss, Make, Setup, Training, Weights, score_all
from .data import Parts
from .metrics import metrics_of

TOP = 0.01  # of the molecules, or of the inactives
CONTROL, LOGISTIC = "BCE", "tuned logistic"
MODES = ("continued", "from scratch")
Cs = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 1.0)

Metric = Callable[[Tensor, Tensor, Tensor], Tensor]
Found = dict[str, Any]


class Field(NamedTuple):
    """How a model is trained; all losses alike."""

    budget: dict[str, Budget]  # by mode
    rates: dict[str, tuple[float, float]]
    decays: tuple[float, ...]  # of a linear model in units of the tuned logistic regression's


FIELDS = {
    "linear": Field(
        {"continued": Budget(150, 10), "from scratch": Budget(200, 10)},
        {"continued": (2e-3, 1e-2), "from scratch": (1e-2, 3e-2)},
        (0.1, 1.0, 10.0, 100.0),
    ),
    "MLP": Field(
        {"continued": Budget(100, 10, 2048), "from scratch": Budget(240, 10, 2048)},
        {"continued": (3e-4, 1e-3), "from scratch": (1e-3, 3e-3)},
        (1e-4, 1e-3),
    ),
}


def quick(field: Field) -> Field:
    """A few steps."""
    budget = {m: Budget(6, 3, b.batch and 128) for m, b in field.budget.items()}
    return field._replace(budget=budget)


def _smooth_ap(scores: Tensor, y: Tensor, tau: Tensor) -> Tensor:
    return pl.smooth_ap(scores, y, tau, rtol=1e-3)


def _recall(scores: Tensor, y: Tensor, tau: Tensor) -> Tensor:
    return pl.recall_at_quantile(scores, y, tau, quantile=TOP, threshold_grad="implicit")


def _partial_auc(scores: Tensor, y: Tensor, tau: Tensor) -> Tensor:
    return pl.partial_auc(scores, y, tau, beta=TOP, threshold_grad="implicit")


def mixed(metric: Metric, share: float, ranges: bool, frozen: bool) -> Make:
    """This share of 1 - metric, the rest BCE, of the rows of a step.

    The value is the temperature: in units of the spread of the scores where training starts, or,
    not frozen, where it is; with ranges the metric has units of its own.
    """

    def make(setup: Setup) -> Loss:
        values = torch.tensor(setup.values)
        at_start = pl.score_spread(setup.before())[:, None] if frozen and not ranges else None

        def loss(scores: Tensor, batch: Batch) -> Tensor:
            unit = torch.ones(()) if ranges else pl.score_spread(scores.detach())
            tau = (values * (unit if at_start is None else at_start)).expand(scores.shape[:2])
            y = batch.y[:, None].expand(scores.shape)
            ranking = 1 - metric(scores, y, tau)
            if share == 1:
                return ranking
            return share * ranking + (1 - share) * plain(scores, batch)

        plain = losses.bce(setup)
        return loss

    return make


def arms(mode: str) -> dict[str, tuple[Make, str | None, tuple[float, float] | None]]:
    """Loss, its own parameter and the two values of it."""
    ours = partial(mixed, frozen=mode == "continued")
    spread = "tau / spread"
    return {
        CONTROL: (losses.bce, None, None),
        "Smooth-AP": (ours(_smooth_ap, 1.0, False), spread, (0.25, 0.1)),
        "half Smooth-AP, half BCE": (ours(_smooth_ap, 0.5, False), spread, (0.25, 0.1)),
        "half recall, half BCE": (ours(_recall, 0.5, False), spread, (0.25, 0.1)),
        "half partial AUC, half BCE": (
            ours(_partial_auc, 0.5, True), "tau / interquartile range of the negatives",
            (0.25, 0.1),
        ),
        "focal": (losses.focal, "gamma", (2.0, 1.0)),
        "BCE, pos_weight": (losses.weighted_bce, "exponent of negatives / positives", (0.5, 1.0)),
    }  # fmt: skip


def arm_of(name: str, model: str, mode: str, unit: float, field: Field) -> Arm:
    """Every penalty at both rates, and there with one value each of the arm's own parameter."""
    make, parameter, values = arms(mode)[name]
    count = len(field.decays)
    scale = unit if model == "linear" else 1.0
    settings = [(k, i) for k in range(2) for i in range(count)]
    return Arm(
        name, make, tuple(field.rates[mode][k] for k, _ in settings), parameter,
        tuple(values[(k + i) % 2] for k, i in settings) if values else (),
        decays=tuple(scale * field.decays[i] for _, i in settings),
    )  # fmt: skip


def logistic(parts: Parts) -> tuple[Weights, float, Found]:
    """The tuned logistic regression, its penalty on the mean loss, and what it scores."""
    x, y = parts.train.x.rows.astype(np.float64), parts.train.y[0].numpy()
    held, truth = parts.val.x.rows.astype(np.float64), parts.val.y[0].numpy()
    tried: dict[float, float] = {}

    def score(model: Any) -> float:
        tried[model.C] = average_precision_score(truth, model.decision_function(held))
        return tried[model.C]

    begin = time.process_time()
    model = best_logistic(x, y, Cs, score)
    weights = [torch.from_numpy(model.coef_.T), torch.from_numpy(model.intercept_[None])]
    weights = [w.float()[None] for w in weights]
    found = judged(weights, parts) | {
        "C": model.C, "validation": [round(tried[C], 5) for C in Cs],
        "cpu_s": round(time.process_time() - begin, 1),
    }  # fmt: skip
    return weights, 1 / (model.C * len(y)), found


def judged(weights: Weights, parts: Parts) -> Found:
    """Every metric on the test molecules."""
    scores = score_all([w[:, None] for w in weights], parts.test.x)[0, 0]
    found = metrics_of(scores.numpy(), parts.test.y[0].numpy())
    return {name: round(value, 5) for name, value in found.items()}


def train(arm: Arm, parts: Parts, start: Weights, budget: Budget, seed: int) -> Fitted:
    """Every configuration, its checkpoint of best validation average precision."""
    order = None
    if budget.batch:
        order = batches(parts.train.y, [seed], budget.steps, budget.batch, "plain")
    training = Training(parts.train, arm, start, budget, order)
    return training.fit(lambda weights: validation_ap(weights, parts.val))


def run(parts: Parts, seed: int, fields: dict[str, Field]) -> Any:
    """(model, mode, arm -> what it found) in turn; what continues starts from BCE's best."""
    features = parts.train.x.rows.shape[1]
    start, unit, found = logistic(parts)
    yield "linear", "start", {LOGISTIC: found}
    for model, field in fields.items():
        for mode in MODES if model == "linear" else MODES[::-1]:
            begin_at = start if mode == "continued" else initial(model, features, [seed])
            found = {}
            for name in arms(mode):
                begin = time.process_time()
                arm = arm_of(name, model, mode, unit, field)
                fitted = train(
                    arm, parts, begin_at, field.budget[mode], 2 * seed + MODES.index(mode)
                )
                (chosen,), weights = fitted.choose()
                found[name] = judged(weights, parts) | {
                    "chosen": int(chosen), "step": int(fitted.step[0, chosen]),
                    "validation": [round(v, 5) for v in fitted.value[0].tolist()],
                    "cpu_s": round(time.process_time() - begin, 1),
                }  # fmt: skip
                if model == "MLP" and (mode, name) == ("from scratch", CONTROL):
                    start = weights
            yield model, mode, found
