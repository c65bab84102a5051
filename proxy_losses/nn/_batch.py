"""What loss modules share: value checks of a batch, gathering, and what a wrapper schedules."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from .._checks import MAX_WEIGHT, as_number, check_temperature, warn_user
from ..distributed import all_gather_with_grad, world_size
from . import _late
from ._state import StateModule

UNFILLED = (
    "the state of {name} is on the meta device: load_state_dict(..., assign=True), or "
    "to_empty(device=...) and then load_state_dict, give it a place and values"
)


def as_floating(sample_weight: Any) -> Any:
    """Integer and bool weights to float32; anything else unchanged, for the checks to name."""
    if isinstance(sample_weight, Tensor) and not (
        sample_weight.is_floating_point() or sample_weight.is_complex()
    ):
        return sample_weight.float()
    return sample_weight


def as_flags(mask: Any) -> Any:
    """Integers to bool; anything else unchanged, for the checks to name."""
    if isinstance(mask, Tensor) and not (mask.is_floating_point() or mask.is_complex()):
        return mask.bool()
    return mask


def readable(x: Tensor) -> bool:
    """Whether Python may branch on the values of x.

    Not while compiling or capturing a CUDA graph, nor inside torch.func or FakeTensorMode.
    """
    if _late.silent(x) or isinstance(x, FakeTensor):
        return False
    try:
        x.data_ptr()
    except RuntimeError:  # a tensor wrapped by a transform has no data of its own
        return False
    return True


def check_class_ids(targets: Tensor, num_classes: int, ignore_index: int) -> None:
    """Raise `ValueError` unless the targets are in [0, num_classes) or ignore_index."""
    targets = targets.to(torch.int64)
    stray = (targets.clamp(0, num_classes - 1) != targets) & (targets != ignore_index)
    if stray.any():
        raise ValueError(
            f"targets contain class ids outside [0, {num_classes}) and other than "
            f"ignore_index={ignore_index}: {targets[stray][:5].tolist()}"
        )


def judge_class_ids(
    said: Mapping[str, float], num_classes: int, ignore_index: int, at: str
) -> None:
    """`check_class_ids` of the least and the largest id that count."""
    least, largest = said["least id"], said["largest id"]
    if not 0 <= least <= largest < num_classes:
        raise ValueError(
            f"{at}targets contain class ids outside [0, {num_classes}) and other than "
            f"ignore_index={ignore_index}: they are from {least:.0f} to {largest:.0f}"
        )


def are_gains(low: float, high: float) -> bool:
    """Whether numbers from low to high may be gains."""
    return low >= 0 and high < MAX_WEIGHT


class BatchLoss(StateModule):
    """A loss that takes weights and may gather the rows of all processes."""

    gather_distributed: bool | None
    _gather_resolved: bool | None = None
    _zero_weight_warned = False
    _pending: _late.Pending | None = None  # there from the first forward off the CPU on

    def check_values(self) -> None:
        """Raise and warn now about what was found in earlier forwards; waits for the device.

        Off the CPU the values of a batch are checked without waiting, so that a fault is raised at
        a later forward. Call this where nothing may stay unsaid, as at the end of an epoch. On
        the CPU everything has been said.

        Raises:
            ValueError: the first fault, and the forward that had it; a further call goes on.
        """
        if self._pending is not None:
            self._pending.settle()

    def _begin(self, inputs: Tensor) -> None:
        """Begin a forward: raise and warn about what has been found in earlier ones."""
        if torch.compiler.is_compiling() or (self._pending is None and _late.at_once(inputs)):
            return
        if _late.silent(inputs):
            return
        if self._pending is None:
            self._pending = _late.Pending()
        self._pending.begin()

    def _may_ask(self, inputs: Tensor) -> bool:
        """Whether questions about values off the CPU can be asked now."""
        return self._pending is not None and readable(inputs) and self._pending.room(inputs)

    def _ask(self, inputs: Tensor, asked: Mapping[str, Tensor], judge: _late.Judge) -> None:
        if self._pending is not None and all(map(readable, asked.values())):
            self._pending.ask(inputs, asked, judge)

    def _judge_weight(self, said: Mapping[str, float], at: str = "") -> None:
        """Raise or warn about a weight of this range, which has a NaN if the weight has one."""
        low, high = said["least weight"], said["largest weight"]
        if not (abs(low) < MAX_WEIGHT and abs(high) < MAX_WEIGHT):
            raise ValueError(f"{at}sample_weight must be finite, below {MAX_WEIGHT:.1e}")
        if low < 0:
            raise ValueError(f"{at}sample_weight must be non-negative, got {low}")
        if high == 0 and not self._zero_weight_warned:
            self._zero_weight_warned = True
            warn_user(
                f"{at}{type(self).__name__}: sample_weight is entirely zero; rows of weight 0 give "
                "no gradient"
            )

    def _judge_gains(self, said: Mapping[str, float], at: str = "") -> None:
        """Raise about grades of this range, as of weights."""
        low, high = said["least gain"], said["largest gain"]
        if not are_gains(low, high):
            raise ValueError(
                f"{at}targets, which are relevance grades, must be finite and >= 0, below "
                f"{MAX_WEIGHT:.1e}, got {low if not low >= 0 else high}; where a grade is missing "
                "pass label_mask=, [N, C] bool, False there"
            )

    def __getstate__(self) -> dict[str, Any]:
        """A copy may land in another process group: it decides for itself whether to gather."""
        return {**self.__dict__, "_gather_resolved": None, "_pending": None}

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


class ScheduledLoss(BatchLoss):
    """A loss with a temperature and, if it has one, a queue: what a `LossWarmupWrapper` moves."""

    distributed = "gather"
    references: tuple[str, ...] = ()  # arguments beside the rows that a blend passes on too
    _queue: Any  # a module with a `reset()`, or None
    _tau: Tensor
    _no_grad_warned = False

    def add_temperature(self, value: float) -> None:
        """Register the temperature; `fill` gives it this value."""
        value = as_number("temperature", value)
        check_temperature("temperature", value)
        self._first_temperature = float(value)
        self.add_state("_tau", (), torch.float64)

    def fill(self) -> None:
        """The temperature of the constructor; the queue is a module of its own."""
        self._tau.fill_(self._first_temperature)

    @property
    def temperature(self) -> float:
        """Temperature in units of the scores; writable, and saved with the queue.

        It lives in a buffer, on the device of the module: asking for it may wait for the device,
        training does not. On the meta device and inside FakeTensorMode, where there are no
        numbers, it is the constructor's. A checkpoint that has none leaves it as it is.
        """
        unknown = self._tau.is_meta or isinstance(self._tau, FakeTensor)
        return self._first_temperature if unknown else float(self._tau)

    @temperature.setter
    def temperature(self, value: float) -> None:
        value = as_number("temperature", value)
        check_temperature("temperature", value)
        self._tau.fill_(float(value))

    def reset_queue(self) -> None:
        """Empty the queue."""
        if self._queue is not None:
            self._queue.reset()

    def reset(self) -> None:
        """Start anew: no stored rows, the temperature of the constructor, no warning given yet.

        Settings that were overwritten since stay. For a run of its own with the same loss, as in
        cross-validation.

        Example:
            >>> loss_fn = SmoothAPLoss(1, queue_size=8, temperature=0.5)
            >>> first = loss_fn(torch.tensor([[0.3], [0.1]]), torch.tensor([0, 1]))
            >>> loss_fn.temperature = 0.1
            >>> loss_fn.reset()
            >>> bool(loss_fn(torch.tensor([[0.3], [0.1]]), torch.tensor([0, 1])) == first)
            True
        """
        self.reset_queue()
        self.fill()
        self._forget_warnings()
        self._pending = None

    def _forget_warnings(self) -> None:
        """What was said may be said again."""
        self._zero_weight_warned = self._no_grad_warned = False

    def problems_with(self, state_dict: dict[str, Any], prefix: str) -> list[str]:
        """What keeps a checkpoint from being loaded."""
        raise NotImplementedError

    def _begin(self, inputs: Tensor) -> None:
        if self._tau.is_meta and not inputs.is_meta:
            raise RuntimeError(UNFILLED.format(name=type(self).__name__))
        super()._begin(inputs)

    def _refuse_recompute(self) -> None:
        """Raise if a backward calls this forward, which stores, a second time."""
        if not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1:
            raise RuntimeError(
                f"{type(self).__name__} is called inside a backward, as torch.utils.checkpoint "
                "does to compute a forward anew: the queue has changed since, and the batch would "
                "be stored twice. Checkpoint the layers alone and call the loss outside, or pass "
                "store=False"
            )

    def _warn_no_grad(self, rows: int) -> None:
        """Say once that rows are stored which look like those of a validation."""
        if torch.compiler.is_compiling() or self._no_grad_warned or self._queue is None:
            return
        if rows and not torch.is_grad_enabled():
            self._no_grad_warned = True
            warn_user(
                f"{type(self).__name__}: rows are stored in the queue while gradients are "
                "disabled, as in a validation whose loss was left in training mode: call "
                "loss.eval() first, or pass store=False"
            )
