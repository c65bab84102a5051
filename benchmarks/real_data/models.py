"""Many small networks in one: every tensor has a seed axis and a configuration axis in front.

Nothing mixes the networks of a stack, so that the gradient of the sum of their losses is that of
each, and Adam, which works entry by entry, trains each as if it were alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

WIDTHS: dict[str, tuple[int, ...]] = {"linear": (), "MLP": (64,)}  # hidden units

Weights = list[Tensor]  # weight and bias of every layer in turn


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


def scores(weights: Weights, x: Tensor) -> Tensor:
    """[seeds, configurations, rows] from weights [seeds, configurations, ...].

    x is [seeds, rows, features]: the configurations of a seed see the same rows.
    """
    h = torch.einsum("sbd,skdh->skbh", x, weights[0]) + weights[1]
    for weight, bias in zip(weights[2::2], weights[3::2], strict=True):
        h = h.relu() @ weight + bias
    return h[..., 0]
