"""What every loss module does to a batch before the mathematics: value checks and gathering."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .._checks import MAX_WEIGHT, warn_user
from ..distributed import all_gather_with_grad, world_size
from ._state import StateModule


def as_floating(sample_weight: Any) -> Any:
    """Integer and bool weights to float32; anything else unchanged, for the checks to name."""
    if isinstance(sample_weight, Tensor) and not (
        sample_weight.is_floating_point() or sample_weight.is_complex()
    ):
        return sample_weight.float()
    return sample_weight


def readable(x: Tensor) -> bool:
    """Whether Python may branch on the values of x: not when compiling, nor inside torch.func."""
    if torch.compiler.is_compiling():
        return False
    try:
        x.data_ptr()
    except RuntimeError:  # a tensor wrapped by a transform has no data of its own
        return False
    return True


def check_class_ids(targets: Tensor, num_classes: int, ignore_index: int) -> None:
    """Raise `ValueError` unless the targets are in [0, num_classes) or ignore_index."""
    if not readable(targets):
        return
    targets = targets.to(torch.int64)
    stray = (targets.clamp(0, num_classes - 1) != targets) & (targets != ignore_index)
    if stray.any():
        raise ValueError(
            f"targets contain class ids outside [0, {num_classes}) and other than "
            f"ignore_index={ignore_index}: {targets[stray][:5].tolist()}"
        )


class BatchLoss(StateModule):
    """A loss that takes weights and may gather the rows of all processes."""

    gather_distributed: bool | None
    _gather_resolved: bool | None = None
    _zero_weight_warned = False

    def _check_weight(self, sample_weight: Tensor | None) -> None:
        if sample_weight is None or not readable(sample_weight) or not sample_weight.numel():
            return
        self._judge_weight(*torch.stack(sample_weight.detach().aminmax()).tolist())

    def _judge_weight(self, low: float, high: float) -> None:
        """Raise or warn about a weight of this range, which has a NaN if the weight has one."""
        if not (abs(low) < MAX_WEIGHT and abs(high) < MAX_WEIGHT):
            raise ValueError(f"sample_weight must be finite, below {MAX_WEIGHT:.1e}")
        if low < 0:
            raise ValueError(f"sample_weight must be non-negative, got {low}")
        if high == 0 and not self._zero_weight_warned:
            self._zero_weight_warned = True
            warn_user(
                f"{type(self).__name__}: sample_weight is entirely zero; rows of weight 0 give no "
                "gradient"
            )

    def __getstate__(self) -> dict[str, Any]:
        """A copy may land in another process group: it decides for itself whether to gather."""
        return {**self.__dict__, "_gather_resolved": None}

    def _gathers(self) -> bool:
        """Whether to gather, decided at the first forward, when the process group is there."""
        if self._gather_resolved is None:
            self._gather_resolved = self.gather_distributed is not False and world_size() > 1
        return self._gather_resolved

    def _gather(self, inputs: Tensor, *rows: Tensor | None) -> tuple[Any, ...]:
        """The rows of all processes, or those given; inputs alone carry a gradient."""
        if not self._gathers():
            return inputs, *rows
        # One call: fewer collectives, and in a compiled function the results share one size.
        found = iter(all_gather_with_grad(inputs, *(r.detach() for r in rows if r is not None)))
        return next(found), *(None if r is None else next(found) for r in rows)
