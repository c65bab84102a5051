"""Two tables of random rows, and many small models trained on them side by side."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from itertools import groupby, pairwise
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits as bce_loss

import proxy_losses as P

from .trainer import (
    Arm,
    Batch,
    Budget,
    Part,
    Queued,
    Setup,
    Training,
    Weights,
    average_precision,
    score_all,
)

INPUTS = 8
QUANTILE = 0.005  # of the recall and the partial AUC that are trained for


class World(NamedTuple):
    """Rows to learn from and the model that learns."""

    about: str
    draw: Callable[[int, torch.Generator], tuple[Tensor, Tensor]]
    hidden: int  # units of the hidden layer; 0 is a linear model
    rate: float  # learning rate of Adam


class Setting(NamedTuple):
    """How one model is trained. Shares are of all steps; tau is in spreads of the scores."""

    loss: Literal["ap", "recall", "trapezoid", "pairwise"] = "ap"  # the last two: partial AUC
    tau: float = 0.25
    unit: Literal["frozen", "spread", "decay"] = "frozen"  # of the scores at the switch, or now
    queue: int = 2048  # rows
    keep: bool = False  # the queue is filled in warmup too, and not emptied at the switch
    warmup: float = 0.4  # 1 is cross-entropy to the end
    blend: float = 0.0
    main: float = 1.0  # weight of the ranking loss after the blend; the rest is cross-entropy
    grad: Literal["none", "implicit"] = "none"  # of the threshold of recall and of the trapezoid


CONTROL = Setting(queue=0, warmup=1.0)
DECAY = 20.0  # "decay" falls from DECAY ** 0.5 * tau to tau / DECAY ** 0.5


class Scale(NamedTuple):
    """How much is run."""

    seeds: int
    steps: int
    batch: int
    rows: int  # learnt from
    held_out: int
    pools: int  # random pools of each size
    every: int  # of the settings on each axis


class Data(NamedTuple):
    """Rows of all seeds."""

    learnt: Part
    held_out: Part
    batches: Tensor  # [S, steps, batch] of the rows learnt from


class Outcome(NamedTuple):
    """What became of the models [S] of a setting."""

    scores: Tensor  # [S, N] of the rows learnt from
    ap: Tensor  # average precision of the held-out rows
    recall: Tensor  # of the positives in the top QUANTILE of them
    saturation: Tensor  # share of positives of the last pools without gradient
    drift: Tensor  # root mean square of stored minus fresh scores, in spreads; NaN without queue
    stale: Tensor  # smooth AP of the last pool minus that of its rows scored afresh; NaN likewise


def contested(n: int, draw: torch.Generator) -> tuple[Tensor, Tensor]:
    """Most positives are slightly raised on one input, where some negatives are higher still.

    The other positives stand out on another input: no linear model has them all on top.
    """
    y, kind = torch.rand(n, generator=draw) < 0.01, torch.rand(n, generator=draw)
    x = torch.randn(n, INPUTS, generator=draw)
    x[:, 0] += 1.5 * (y & (kind < 0.7)) + 2.5 * (~y & (kind < 0.02))
    x[:, 1] += 3.0 * (y & (kind >= 0.7))
    return x, y


def curved(n: int, draw: torch.Generator) -> tuple[Tensor, Tensor]:
    """The log-odds are a smooth function of the inputs."""
    x = torch.randn(n, INPUTS, generator=draw)
    odds = 2.0 * x[:, 0].sin() + (x[:, 1] * x[:, 2]).tanh() + 2.0 * x[:, 3] - 6.9
    return x, torch.rand(n, generator=draw) < torch.sigmoid(odds)


WORLDS = {
    "contested top, linear": World("linear model, top and bulk at odds", contested, 0, 0.02),
    "smooth odds, MLP": World("MLP of 16 units that can fit the truth", curved, 16, 0.01),
}


def make_data(world: World, scale: Scale) -> Data:
    """Every seed has rows, held-out rows and batches of its own."""
    found = []
    for seed in range(scale.seeds):
        draw = torch.Generator().manual_seed(seed)
        x, y = world.draw(scale.rows, draw)
        order = torch.randint(0, scale.rows, (scale.steps, scale.batch), generator=draw)
        found.append((x, y, *world.draw(scale.held_out, draw), order))
    x, y, test_x, test_y, order = (torch.stack(parts) for parts in zip(*found, strict=True))
    return Data(Part(x, y), Part(test_x, test_y), order)


def first_weights(world: World, seeds: int) -> Weights:
    """Of every seed; the same for all settings."""
    draws = [torch.Generator().manual_seed(1000 + seed) for seed in range(seeds)]
    widths, weights = [INPUTS, *[world.hidden] * (world.hidden > 0), 1], []
    for shape in pairwise(widths):
        drawn = torch.stack([torch.randn(shape, generator=d) for d in draws])
        weights += [drawn / shape[0] ** 0.5, torch.zeros(seeds, 1, shape[1])]
    return weights


def train(world: World, settings: Sequence[Setting], data: Data) -> list[Outcome]:
    """All settings, those that differ in numbers alone as one stack of models."""
    found: dict[Setting, Outcome] = {}

    def kind(s: Setting) -> tuple[Any, ...]:
        return s.loss, s.queue, s.keep, s.unit == "spread", s.grad

    seeds, steps, batch = data.batches.shape
    start = first_weights(world, seeds)
    for _, some in groupby(sorted(set(settings), key=kind), kind):
        together = tuple(some)
        arm = Arm(together[0].loss, Blended, (world.rate,) * len(together), "setting", together)
        training = Training(data.learnt, arm, start, Budget(steps, batch=batch), data.batches)
        ((_, weights),) = training.after([steps])
        blended = training.loss
        assert isinstance(blended, Blended)
        outcome = blended.outcome(score_all(weights, data.held_out.x), training.score(), data)
        found |= {
            setting: Outcome(*(part[:, k] for part in outcome))
            for k, setting in enumerate(together)
        }
    return [found[setting] for setting in settings]


class Blended:
    """Cross-entropy and a ranking loss by the schedule of every model, which has its own queue.

    Models are the last axis of what is kept: the settings of a seed are neighbours.
    """

    def __init__(self, setup: Setup) -> None:
        self.setup, self.one = setup, setup.values[0]
        seeds, steps = len(setup.y), setup.steps

        def per_model(values: Sequence[float]) -> Tensor:
            return torch.tensor(values).repeat(seeds)

        self.switch = per_model([round(s.warmup * steps) for s in setup.values])
        self.schedule = P.Schedule(
            self.switch,
            per_model([round(s.blend * steps) for s in setup.values]),
            final_main_weight=per_model([s.main for s in setup.values]),
        )
        reach = per_model([DECAY**0.5 if s.unit == "decay" else 1.0 for s in setup.values])
        tau, self.spread = per_model([s.tau for s in setup.values]), torch.ones(len(self.switch))
        length = (steps - self.switch).clamp(min=1)
        self.decay = P.Schedule(self.switch, 0, tau * reach, tau / reach, length)
        self.ranking = Queued(_ranking(self.one), self.one.queue, len(self.switch))

    def tau(self, step: int) -> Tensor:
        """Of every model."""
        return P.temp_at(torch.tensor(step), self.decay) * self.spread

    def __call__(self, found: Tensor, batch: Batch) -> Tensor:
        """One loss per model."""
        y = batch.y.repeat_interleave(found.shape[1], 0)
        scores = found.flatten(0, 1)
        losses = bce_loss(scores, y.to(scores.dtype), reduction="none").mean(1)
        at_switch = self.switch == batch.step
        if at_switch.any():
            if self.one.unit != "spread":
                now = P.score_spread(self.setup.score().flatten(0, 1))
                self.spread = torch.where(at_switch, now, self.spread)
            if not self.one.keep:
                self.ranking.clear(at_switch)
        if self.one.keep or (self.switch <= batch.step).any():
            ranked = self.ranking(scores, y, self.tau(batch.step))
            weight = P.blend_weight(torch.tensor(batch.step), self.schedule)
            losses = torch.where(weight > 0, (1 - weight) * losses + weight * ranked, losses)
        return losses.view(found.shape[:2])

    def outcome(self, held_out: Tensor, learnt: Tensor, data: Data) -> Outcome:
        """Every field [S, settings], from scores [S, settings, rows] at the end."""
        shape = held_out.shape[:2]
        y = data.held_out.y
        recall = recall_at_top(held_out, y[:, None].expand(held_out.shape))
        judged = learnt, average_precision(held_out, y), recall
        if not (queue := self.ranking.queue):
            return Outcome(*judged, *[torch.full(shape, torch.nan)] * 3)
        size, batch = self.one.queue, data.batches.shape[2]
        # The number of the row in each slot, counted from the first row stored.
        slot, count = torch.arange(size), queue.enqueued[:, None]
        number = count - 1 - (count - 1 - slot) % size
        valid = number >= 0
        start = self.switch * (not self.one.keep)  # the step of the first row in the queue
        number = (number + start[:, None] * batch).clamp(min=0)
        seed = torch.arange(shape[0]).repeat_interleave(shape[1])[:, None]
        rows = data.batches.flatten(1)[seed, number.clamp(max=data.batches[0].numel() - 1)]
        fresh = learnt.flatten(0, 1).gather(1, rows)
        stored, pos = queue.logits[..., 0], queue.targets == 1
        spread = P.score_spread(fresh, valid)
        apart = torch.where(valid, stored - fresh, 0.0).square().sum(1) / valid.sum(1)
        tau = self.tau(self.setup.steps - 1)
        if self.one.unit == "spread":
            tau = tau * spread
        old, new = (P.smooth_ap(s, pos, tau, valid_mask=valid) for s in (stored, fresh))
        lost = P.smooth_ap_saturation(stored, pos, tau, valid_mask=valid)
        figures = lost, apart.sqrt() / spread, old - new
        return Outcome(*judged, *(figure.view(shape) for figure in figures))


def _ranking(setting: Setting) -> Callable[..., Any]:
    unit = "spread" if setting.unit == "spread" else "score"
    if setting.loss == "ap":
        return partial(P.smooth_ap_loss, tau_unit=unit)
    grad = {"threshold_grad": setting.grad}
    if setting.loss == "recall":
        return partial(P.recall_at_quantile_loss, quantile=QUANTILE, tau_unit=unit, **grad)
    # its temperature always is in units of a spread
    return partial(P.partial_auc_loss, beta=QUANTILE, surrogate=setting.loss, **grad)


def recall_at_top(scores: Tensor, y: Tensor) -> Tensor:
    """Share of the positives of every list [..., N] in the top QUANTILE of it."""
    top = scores.topk(round(QUANTILE * scores.shape[-1])).indices
    return y.gather(-1, top).sum(-1) / y.sum(-1)
