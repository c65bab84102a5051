"""What losses of single elements or rows share: checks of the batch, and reduction."""

from __future__ import annotations

import torch
from torch import Tensor

from ._checks import check_floating, check_integers, check_real


def check_reduction(reduction: str, supported: tuple[str, ...]) -> None:
    """Raise `ValueError` unless the reduction of a pointwise loss is one that it supports."""
    if not isinstance(reduction, str) or reduction not in supported:
        modes = ", ".join(map(repr, supported))
        raise ValueError(f"Invalid reduction: '{reduction}'. Supported modes: {modes}.")


def check_elements(inputs: Tensor, targets: Tensor, sample_weight: Tensor | None) -> None:
    """Check one target per input, and a weight that has all rows and broadcasts over the rest."""
    check_floating("inputs", inputs)
    check_real("targets", targets)
    if targets.shape != inputs.shape:
        raise ValueError(
            f"targets must have the shape of inputs: expected {list(inputs.shape)}, "
            f"got {list(targets.shape)}"
        )
    if sample_weight is None:
        return
    check_floating("sample_weight", sample_weight)
    _check_dim0(sample_weight, inputs, "inputs")
    want, got = list(inputs.shape), list(sample_weight.shape)
    # Fewer axes would broadcast from the right, hence weigh columns as if they were rows.
    if len(got) != len(want) or any(n not in (1, m) for n, m in zip(got, want, strict=True)):
        raise ValueError(
            f"sample_weight must be broadcastable to inputs, axis by axis: expected {want}, or 1 "
            f"in place of axes after dim 0, got {got}"
        )


def check_class_targets(inputs: Tensor, targets: Tensor, sample_weight: Tensor | None) -> None:
    """Check inputs [N, C, ...], one class id for each of [N, ...], and a weight for each id."""
    check_floating("inputs", inputs)
    if inputs.dim() < 2 or inputs.shape[1] == 0:
        raise ValueError(f"inputs must be [N, C] or [N, C, ...], C >= 1, got {list(inputs.shape)}")
    check_integers("targets", targets)
    want = [inputs.shape[0], *inputs.shape[2:]]
    if list(targets.shape) != want:
        raise ValueError(
            f"targets must have the shape of inputs without its class axis: expected {want}, "
            f"got {list(targets.shape)}"
        )
    if sample_weight is None:
        return
    check_floating("sample_weight", sample_weight)
    _check_dim0(sample_weight, targets, "targets")
    if sample_weight.shape != targets.shape:
        raise ValueError(
            f"sample_weight must be of the shape of targets: expected {want}, "
            f"got {list(sample_weight.shape)}"
        )


def _check_dim0(sample_weight: Tensor, x: Tensor, name: str) -> None:
    if sample_weight.shape[:1] != x.shape[:1]:
        raise ValueError(
            f"sample_weight must match {name} dim-0: expected {list(x.shape[:1])}, "
            f"got {list(sample_weight.shape)}"
        )


def reduce(
    loss: Tensor, reduction: str, sample_weight: Tensor | None, counted: Tensor | None = None
) -> Tensor:
    """Reduction of loss [...]: "none", "sum" or any other, a mean.

    Args:
        loss: [...], 0 where nothing counts.
        reduction: as above.
        sample_weight: broadcasts to loss, or None for 1; it gets no gradient.
        counted: [...] bool, whose number (or weight) the mean divides by, or 1 where that is 0;
            None for all. The sum is always over the whole loss.

    Returns:
        [], or [...] for "none".
    """
    weight = None
    if sample_weight is not None:
        weight = sample_weight.detach().to(loss.dtype).expand(loss.shape)
        loss = weight * loss
    if reduction == "none":
        return loss
    total = loss.sum()
    if reduction == "sum":
        return total
    if counted is not None:
        mass = (counted if weight is None else torch.where(counted, weight, 0.0)).sum()
    elif weight is not None:
        mass = weight.sum()
    else:
        return total / max(loss.numel(), 1)
    return total / torch.where(mass > 0, mass, 1)
