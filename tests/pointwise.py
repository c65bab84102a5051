"""The one list of pointwise losses that their contract matrix runs over; a new loss joins here."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy

import proxy_losses as P

from . import reference_focal


class Pointwise(NamedTuple):
    name: str
    fn: Callable[..., Tensor]  # (inputs, targets, *, reduction, sample_weight, **options)
    module: type[torch.nn.Module]
    reference: Callable[..., Any]  # the same arguments -> float, or a list for "none"
    targets: Callable[[Tensor, torch.Generator], Tensor]  # for inputs [N, C, ...]
    weight_shape: Callable[[Tensor], tuple[int, ...]]  # the smallest one for inputs [N, C, ...]
    plain: Callable[..., Tensor]  # (inputs, targets) -> what gamma = 0 is, unreduced
    neutral: dict[str, Any]  # options with which only gamma is left
    options: list[dict[str, Any]]  # to run through
    reductions: tuple[str, ...]
    of_inputs: str  # what a weight has to match


def binary(inputs: Tensor, g: torch.Generator) -> Tensor:
    """Mostly zeros, some ones, some in between."""
    t = (torch.rand(inputs.shape, generator=g) < 0.3).to(inputs.dtype)
    soft = torch.rand(inputs.shape, generator=g).to(inputs.dtype)
    return torch.where(torch.rand(inputs.shape, generator=g) < 0.2, soft, t)


def class_ids(inputs: Tensor, g: torch.Generator) -> Tensor:
    """Ids in [0, C) and padding."""
    n, c, *rest = inputs.shape
    ids = torch.randint(c, (n, *rest), generator=g)
    return torch.where(torch.rand(n, *rest, generator=g) < 0.2, -100, ids)


LOSSES = [
    Pointwise(
        "sigmoid_focal",
        P.sigmoid_focal,
        P.SigmoidFocalLoss,
        reference_focal.sigmoid_focal,
        binary,
        lambda x: (x.shape[0], *[1] * (x.dim() - 1)),
        lambda x, t: binary_cross_entropy_with_logits(x, t, reduction="none"),
        {"alpha": -1},
        [{}, {"alpha": -1, "gamma": 0.5}, {"alpha": 0.9, "gamma": 3.5}, {"gamma": 0}],
        ("none", "mean", "sum"),
        "inputs",
    ),
    Pointwise(
        "softmax_focal",
        P.softmax_focal,
        P.SoftmaxFocalLoss,
        reference_focal.softmax_focal,
        class_ids,
        lambda x: (x.shape[0], *x.shape[2:]),
        lambda x, t: cross_entropy(x, t, reduction="none"),
        {},
        [
            {},
            {"alpha": [0.25, 0.5, 1.0, 3.0], "gamma": 0.5},
            {"gamma": 3.5, "label_smoothing": 0.125, "background_class": 2},
            {"gamma": 0, "label_smoothing": 1.0},
        ],
        ("none", "mean", "mean_positive", "sum"),
        "targets",
    ),
]

every_loss = pytest.mark.parametrize("loss", LOSSES, ids=lambda x: x.name)
every_option = pytest.mark.parametrize(
    ("loss", "options"),
    [pytest.param(x, o, id=f"{x.name}-{k}") for x in LOSSES for k, o in enumerate(x.options)],
)
every_reduction = pytest.mark.parametrize(
    ("loss", "reduction"),
    [pytest.param(x, r, id=f"{x.name}-{r}") for x in LOSSES for r in x.reductions],
)
# Both sides do at most some hundred operations in float64 on logits of a few units.
TIGHT = {"rtol": 1e-12, "atol": 1e-14}


def batch(
    loss: Pointwise, seed: int, *shape: int, scale: float = 2.0, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor, Tensor]:
    """Inputs of this shape, [6, 4] if none is given, their targets and full weights."""
    g = torch.Generator().manual_seed(seed)
    shape = shape or (6, 4)
    inputs = (scale * torch.randn(shape, generator=g, dtype=torch.float64)).to(dtype)
    targets = loss.targets(inputs, g)
    return inputs, targets, torch.rand(targets.shape, generator=g, dtype=torch.float64)
