"""Two tables of random rows, and many small models trained on them side by side."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from itertools import groupby
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits as bce_loss

import proxy_losses as P

INPUTS = 8
QUANTILE = 0.005  # of the recall and the partial AUC that are trained for


class World(NamedTuple):
    """Rows to learn from and the model that learns."""

    about: str
    draw: Callable[[int, torch.Generator], tuple[Tensor, Tensor]]
    hidden: int  # units of the hidden layer; 0 is a linear model
    rate: float  # learning rate of Adam


class Arm(NamedTuple):
    """How one model is trained. Shares are of all steps; tau is in spreads of the scores."""

    loss: Literal["ap", "recall", "trapezoid", "pairwise"] = "ap"  # the last two: partial AUC
    tau: float = 0.25
    unit: Literal["frozen", "spread", "decay"] = "frozen"  # of the scores at the switch, or now
    queue: int = 2048  # rows
    keep: bool = False  # the queue is filled in warmup too, and not emptied at the switch
    warmup: float = 0.4  # 1 is cross-entropy to the end
    blend: float = 0.0
    main: float = 1.0  # weight of the ranking loss after the blend; the rest is cross-entropy


CONTROL = Arm(queue=0, warmup=1.0)
DECAY = 20.0  # "decay" falls from DECAY ** 0.5 * tau to tau / DECAY ** 0.5


class Budget(NamedTuple):
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

    x: Tensor  # [S, N, INPUTS]
    y: Tensor  # [S, N] bool
    test_x: Tensor
    test_y: Tensor
    batches: Tensor  # [S, steps, batch] rows of x


class Outcome(NamedTuple):
    """What became of the models [S] of an arm."""

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


def make_data(world: World, budget: Budget) -> Data:
    """Every seed has rows, held-out rows and batches of its own."""
    found = []
    for seed in range(budget.seeds):
        draw = torch.Generator().manual_seed(seed)
        x, y = world.draw(budget.rows, draw)
        order = torch.randint(0, budget.rows, (budget.steps, budget.batch), generator=draw)
        found.append((x, y, *world.draw(budget.held_out, draw), order))
    return Data(*(torch.stack(parts) for parts in zip(*found, strict=True)))


def first_weights(world: World, seeds: int) -> list[Tensor]:
    """Of every seed; the same for all arms."""
    draws = [torch.Generator().manual_seed(1000 + seed) for seed in range(seeds)]

    def normal(*shape: int) -> Tensor:
        return torch.stack([torch.randn(shape, generator=d) for d in draws]) / shape[0] ** 0.5

    if not world.hidden:
        return [torch.zeros(seeds, 1, 1), normal(INPUTS, 1)]
    bias, width = torch.zeros(seeds, 1, world.hidden), world.hidden
    return [bias, normal(INPUTS, width), torch.zeros(seeds, 1, 1), normal(width, 1)]


def apply(weights: Sequence[Tensor], x: Tensor) -> Tensor:
    """Scores [K, N] of K models on x [S, N, INPUTS], where K is a multiple of S."""
    x = x.repeat(len(weights[0]) // len(x), 1, 1)
    for layer in range(0, len(weights), 2):
        x = torch.baddbmm(weights[layer], x.relu() if layer else x, weights[layer + 1])
    return x[..., 0]


def train(world: World, arms: Sequence[Arm], data: Data) -> list[Outcome]:
    """All arms, those that differ in numbers alone as one batch of models."""
    found: dict[Arm, Outcome] = {}

    def kind(arm: Arm) -> tuple[Any, ...]:
        return arm.loss, arm.queue, arm.keep, arm.unit == "spread"

    for _, some in groupby(sorted(set(arms), key=kind), kind):
        together = list(some)
        found |= zip(together, _train(world, together, data), strict=True)
    return [found[arm] for arm in arms]


def _train(world: World, arms: list[Arm], data: Data) -> list[Outcome]:
    seeds, steps, _ = data.batches.shape
    one = arms[0]
    weights = [w.repeat(len(arms), 1, 1).requires_grad_() for w in first_weights(world, seeds)]

    def per_model(values: Sequence[float]) -> Tensor:
        return torch.tensor(values).repeat_interleave(seeds)

    switch = per_model([round(arm.warmup * steps) for arm in arms])
    schedule = P.Schedule(
        switch,
        per_model([round(arm.blend * steps) for arm in arms]),
        final_main_weight=per_model([arm.main for arm in arms]),
    )
    reach = per_model([DECAY**0.5 if arm.unit == "decay" else 1.0 for arm in arms])
    tau, spread = per_model([arm.tau for arm in arms]), torch.ones(len(switch))
    decay = P.Schedule(switch, 0, tau * reach, tau / reach, (steps - switch).clamp(min=1))
    optimizer = torch.optim.Adam(weights, world.rate, foreach=True)
    empty = _queues(one.queue, len(switch))
    queue, seed = empty, torch.arange(seeds)[:, None]
    for step in range(steps):
        now = torch.tensor(step)
        x, y = (part[seed, data.batches[:, step]] for part in (data.x, data.y))
        y = y.repeat(len(arms), 1)
        scores = apply(weights, x)
        losses = bce_loss(scores, y.to(scores.dtype), reduction="none").mean(1)
        at_switch = switch == step
        if at_switch.any():
            if one.unit != "spread":
                with torch.no_grad():
                    found = P.score_spread(apply(weights, data.x))
                spread = torch.where(at_switch, found, spread)
            if queue is not None and empty is not None and not one.keep:
                queue = _where(at_switch, empty, queue)
        if one.keep or (switch <= step).any():
            ranked, queue = _rank(one)(
                scores[..., None], y.long(), queue, P.temp_at(now, decay) * spread
            )
            queue = queue and P.QueueState(*(field.detach() for field in queue))
            weight = P.blend_weight(now, schedule)
            losses = torch.where(weight > 0, (1 - weight) * losses + weight * ranked, losses)
        optimizer.zero_grad()
        losses.sum().backward()
        optimizer.step()
    with torch.no_grad():
        last = P.temp_at(torch.tensor(steps - 1), decay) * spread
        outcome = _outcome(weights, one, last, queue, switch * (not one.keep), data)
    return [
        Outcome(*(part.unflatten(0, (len(arms), seeds))[arm] for part in outcome))
        for arm in range(len(arms))
    ]


def _rank(arm: Arm) -> Callable[..., tuple[Tensor, P.QueueState | None]]:
    """The loss of every model with its own queue and tau."""
    unit = "spread" if arm.unit == "spread" else "score"
    if arm.loss == "ap":
        loss: Callable[..., Any] = partial(P.smooth_ap_loss, tau_unit=unit)
    elif arm.loss == "recall":
        loss = partial(P.recall_at_quantile_loss, quantile=QUANTILE, tau_unit=unit)
    else:  # its temperature always is in units of a spread
        loss = partial(P.partial_auc_loss, beta=QUANTILE, surrogate=arm.loss)
    each = 0 if arm.queue else None
    call: Callable[..., tuple[Tensor, P.QueueState | None]] = torch.func.vmap(
        loss, in_dims=(0, 0, each, 0), out_dims=(0, each)
    )
    return call


def _queues(rows: int, models: int) -> P.QueueState | None:
    if not rows:
        return None
    return P.QueueState(*(f.expand(models, *f.shape).clone() for f in P.init_queue(rows, 1)))


def _where(mask: Tensor, these: P.QueueState, those: P.QueueState) -> P.QueueState:
    """Queue by queue."""
    return P.QueueState(*(
        torch.where(mask.view(-1, *[1] * (a.dim() - 1)), a, b)
        for a, b in zip(these, those, strict=True)
    ))  # fmt: skip


def _outcome(
    weights: list[Tensor], arm: Arm, tau: Tensor, queue: P.QueueState | None, start: Tensor,
    data: Data,
) -> Outcome:  # fmt: skip
    """Of all models [K]; start is the step of the first row in the queue."""
    scores = apply(weights, data.test_x)
    models, seeds = len(scores), len(data.x)
    y = data.test_y.repeat(models // seeds, 1)
    learnt = apply(weights, data.x)
    judged = learnt, exact_ap(scores, y), recall_at_top(scores, y)
    if queue is None:
        return Outcome(*judged, *[torch.full((models,), torch.nan)] * 3)
    size, batch = arm.queue, data.batches.shape[2]
    # The number of the row in each slot, counted from the first row stored.
    slot, count = torch.arange(size), queue.enqueued[:, None]
    number = count - 1 - (count - 1 - slot) % size
    valid = number >= 0
    number = (number + start[:, None] * batch).clamp(min=0)
    seed = torch.arange(models)[:, None] % seeds
    rows = data.batches.flatten(1)[seed, number.clamp(max=data.batches[0].numel() - 1)]
    fresh = learnt.gather(1, rows)
    stored, pos = queue.logits[..., 0], queue.targets == 1
    spread = P.score_spread(fresh, valid)
    apart = torch.where(valid, stored - fresh, 0.0).square().sum(1) / valid.sum(1)
    if arm.unit == "spread":
        tau = tau * spread
    old, new = (P.smooth_ap(s, pos, tau, valid_mask=valid) for s in (stored, fresh))
    lost = P.smooth_ap_saturation(stored, pos, tau, valid_mask=valid)
    return Outcome(*judged, lost, apart.sqrt() / spread, old - new)


def exact_ap(scores: Tensor, y: Tensor) -> Tensor:
    """Average precision of every list [K, N]."""
    from sklearn.metrics import average_precision_score

    pairs = zip(y.numpy(), scores.numpy(), strict=True)
    found = [average_precision_score(truth, s) for truth, s in pairs]
    return torch.tensor(found, dtype=torch.float64)


def recall_at_top(scores: Tensor, y: Tensor) -> Tensor:
    """Share of the positives of every list [K, N] in the top QUANTILE of it."""
    top = scores.topk(round(QUANTILE * scores.shape[1])).indices
    return y.gather(1, top).sum(1) / y.sum(1)
