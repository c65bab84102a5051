"""Seconds per epoch of every arm: one unstacked network each, interleaved."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from functools import partial

from torch import Tensor

from .. import harness
from ..trainer import Arm, Budget, Part, Training
from .arms import of_model
from .data import Stack
from .models import initial
from .train import batches


def epochs(
    stack: Stack, arms: Sequence[Arm], model: str, budget: Budget, repeats: int
) -> dict[str, dict[str, float]]:
    """Median seconds of an epoch, and its median ratio to that of the first arm."""
    part = Part(stack.train.x[:1], stack.train.y[:1])
    batch = budget.batch or part.y.shape[1]
    budget = Budget(max(1, part.y.shape[1] // batch), batch=batch)
    start = initial(model, part.x.shape[2], [0])
    calls: dict[str, tuple[harness.Fn, int]] = {}
    for arm in arms:
        single = of_model(arm._replace(rates=arm.rates[:1], values=arm.values[:1]), model)
        order = batches(part.y, [0], budget.steps, batch, arm.batches)
        epoch = partial(_epoch, Training(part, single, start, budget, order).step, budget.steps)
        epoch()  # what the first call builds is not part of an epoch
        calls[arm.name] = (epoch, 1)
    samples = harness.rounds(calls, repeats)
    first = samples[arms[0].name]
    return {
        name: {
            "ratio": round(statistics.median(a / b for a, b in zip(mine, first, strict=True)), 2),
            "seconds": float(f"{statistics.median(mine):.3g}"),
        }
        for name, mine in samples.items()
    }


def _epoch(step: Callable[[int], None], steps: int) -> tuple[Tensor, ...]:
    for number in range(steps):
        step(number)
    return ()
