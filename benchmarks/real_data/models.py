"""Where networks start, and logistic regressions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from sklearn.linear_model import LogisticRegression

from ..trainer import Weights
from .data import Array

MOST_FOR_NEWTON = 500  # features; its Hessian is their square
WIDTHS: dict[str, tuple[int, ...]] = {"linear": (), "MLP": (64,)}  # hidden units


def initial(model: str, features: int, seeds: Sequence[int]) -> Weights:
    """Uniform within 1 / sqrt(fan in), each [seeds, ...]."""
    widths = (features, *WIDTHS[model], 1)
    stacks: list[Weights] = []
    for seed in seeds:
        draw = torch.Generator().manual_seed(seed)
        layers: Weights = []
        for fan_in, fan_out in pairwise(widths):
            for shape in ((fan_in, fan_out), (1, fan_out)):
                layers.append((2 * torch.rand(shape, generator=draw) - 1) / fan_in**0.5)
        stacks.append(layers)
    return [torch.stack(tensors) for tensors in zip(*stacks, strict=True)]


def best_logistic(
    x: Array, y: Array, Cs: Sequence[float], score: Callable[[LogisticRegression], float]
) -> LogisticRegression:
    """The logistic regression that scores best, of equal ones that of the smallest C."""
    solver = "newton-cholesky" if x.shape[1] <= MOST_FOR_NEWTON else "lbfgs"
    models = [LogisticRegression(C=C, solver=solver, max_iter=1000).fit(x, y) for C in sorted(Cs)]
    return max(models, key=score)
