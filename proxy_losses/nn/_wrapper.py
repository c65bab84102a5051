"""Warmup -> blend -> ranking loss, with the temperature schedule, as a module."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .. import _schedule
from .._checks import (
    as_number,
    check_flag,
    check_int,
    check_temperature,
    warn_user,
)
from .._schedule import Clock, Schedule, ScheduleState
from ._published import PublishedSchedule
from ._queue import problems_of, refuse
from ._ranking import RankingLoss


def _first(out: Any) -> Any:
    """The loss of a callable that returns it alone or first of a tuple."""
    return out[0] if isinstance(out, tuple) else out


def _takes_sample_weight(loss: Callable[..., Any]) -> bool:
    try:
        params = inspect.signature(loss.forward if isinstance(loss, nn.Module) else loss).parameters
    except (TypeError, ValueError):
        return False
    return "sample_weight" in params or any(
        p.kind is inspect.Parameter.VAR_KEYWORD for p in params.values()
    )


class LossWarmupWrapper(PublishedSchedule, nn.Module):
    """Trains with a standard loss first, blends into a ranking loss, then decays its temperature.

    Call `on_train_epoch_start(epoch)` and `on_train_batch_start(global_step)` from the training
    loop; step mode (warmup_steps given) needs the second alone. At the first batch of the main
    phase the queue of main_loss is emptied once and the temperature clock starts.

    Args:
        warmup_loss: any callable (logits, targets) -> loss; of a tuple the first element counts.
        main_loss: any callable (logits, targets) -> loss; a writable `temperature` is scheduled,
            a `reset_queue()` is called at the switch.
        warmup_epochs: epochs of warmup_loss alone, >= 0.
        temp_start: temperature at the switch, > 0.
        temp_end: temperature after temp_decay_steps, > 0.
        temp_decay_steps: steps from the switch to temp_end, >= 1; see `temp_at`.
        blend_epochs: epochs of the linear ramp from warmup_loss to main_loss, >= 0.
        warmup_steps: warmup in steps instead of epochs.
        blend_steps: blend in steps; requires warmup_steps.
        final_main_weight: weight of main_loss after the blend, in (0, 1].
        reset_queue_each_epoch: also empty the queue at each epoch start of the main phase.
        gather_distributed: None leaves main_loss.gather_distributed; True and False overwrite it.
        strict: raise in training if a hook that this schedule needs was never called.

    Raises:
        TypeError: a loss that cannot be called, an argument of a wrong type.
        ValueError: an argument out of range, or epoch and step variants given together.
        RuntimeError: from a call, with strict.

    Example:
        >>> wrapper = LossWarmupWrapper(
        ...     torch.nn.CrossEntropyLoss(), SmoothAPLoss(4), warmup_epochs=5, blend_epochs=2
        ... )
        >>> for epoch in (4, 5, 6, 7):
        ...     wrapper.on_train_epoch_start(epoch)
        ...     print(round(wrapper.main_weight, 3))
        0.0
        0.333
        0.667
        1.0
    """

    def __init__(
        self, warmup_loss: Callable[..., Any], main_loss: Callable[..., Any],
        warmup_epochs: int = 0, temp_start: float = 0.05, temp_end: float = 0.005,
        temp_decay_steps: int = 10_000, *, blend_epochs: int = 0, warmup_steps: int | None = None,
        blend_steps: int | None = None, final_main_weight: float = 1.0,
        reset_queue_each_epoch: bool = False, gather_distributed: bool | None = None,
        strict: bool = False,
    ) -> None:  # fmt: skip
        super().__init__()
        for name, loss in (("warmup_loss", warmup_loss), ("main_loss", main_loss)):
            if not callable(loss):
                raise TypeError(f"{name} must be callable, got {type(loss).__name__}")
        check_flag("reset_queue_each_epoch", reset_queue_each_epoch)
        check_flag("gather_distributed", gather_distributed, optional=True)
        _check_clocks(warmup_epochs, blend_epochs, warmup_steps, blend_steps)
        self._clock: Clock = "epoch" if warmup_steps is None else "step"
        phases = warmup_epochs, blend_epochs
        if warmup_steps is not None:
            phases = warmup_steps, blend_steps or 0
        sched = Schedule(*phases, temp_start, temp_end, temp_decay_steps, final_main_weight)
        self._sched = Schedule(**{name: as_number(name, x) for name, x in sched._asdict().items()})
        _schedule.check_schedule(self._sched)
        self.warmup_loss = warmup_loss
        self.main_loss = main_loss
        self.warmup_epochs, self.blend_epochs = warmup_epochs, blend_epochs
        self.warmup_steps, self.blend_steps = warmup_steps, blend_steps
        self.temp_start, self.temp_end = temp_start, temp_end
        self.temp_decay_steps = temp_decay_steps
        self.final_main_weight = final_main_weight
        self.reset_queue_each_epoch = reset_queue_each_epoch
        self.gather_distributed = gather_distributed
        self.strict = strict
        self._has_temperature = hasattr(main_loss, "temperature")
        self._weight_to_warmup = _takes_sample_weight(warmup_loss)
        self._batch_hook_seen = self._epoch_hook_seen = self._no_batch_hook_warned = False
        if not self._has_temperature:
            warn_user(
                f"main_loss {type(main_loss).__name__} has no attribute 'temperature': there is "
                "no temperature to schedule"
            )
        if reset_queue_each_epoch and not hasattr(main_loss, "reset_queue"):
            warn_user(
                "reset_queue_each_epoch is set, but main_loss "
                f"{type(main_loss).__name__} has no method 'reset_queue'"
            )
        if gather_distributed is not None and hasattr(main_loss, "gather_distributed"):
            main_loss.gather_distributed = gather_distributed
        self._blend_weight = torch.zeros((), dtype=torch.float64)
        self._enter(_schedule.init_schedule(self._sched))
        self._set_temperature()

    def _enter(self, state: ScheduleState) -> None:
        """Take over a schedule state and what follows from it."""
        weight = float(_schedule.state_weight(state, self._sched, clock=self._clock))
        self._state, self._main_weight = state, weight
        self._blend_weight.fill_(self._main_weight)  # in place: compiled code holds the tensor

    def _set_temperature(self) -> None:
        if self._has_temperature and int(self._state.switch_step) >= 0:
            self.main_loss.temperature = float(  # type: ignore[attr-defined]
                _schedule.state_temp(self._state, self._sched)
            )

    def _reset_queue(self) -> None:
        if hasattr(self.main_loss, "reset_queue"):
            self.main_loss.reset_queue()

    @property
    def in_warmup(self) -> bool:
        """Whether warmup_loss alone is in use."""
        return bool(_schedule.in_warmup(_schedule.now(self._state, self._clock), self._sched))

    @property
    def in_blend(self) -> bool:
        """Whether the run is in the ramp from warmup_loss to main_loss."""
        return bool(_schedule.in_blend(_schedule.now(self._state, self._clock), self._sched))

    @property
    def main_weight(self) -> float:
        """Weight of main_loss now, in [0, final_main_weight]."""
        return self._main_weight

    @property
    def ap_weight(self) -> float:
        """The name of `main_weight` in proxy-losses 0.1.1."""
        return self._main_weight

    @property
    def current_temperature(self) -> float | None:
        """Temperature of main_loss now; None if it has none."""
        return getattr(self.main_loss, "temperature", None)

    def on_train_epoch_start(self, epoch: int) -> None:
        """Call at the start of each epoch, before its first batch."""
        epoch = as_number("epoch", epoch)
        self._epoch_hook_seen = True
        main, state = _schedule.start_epoch(self._state, epoch, self._sched, clock=self._clock)
        self._enter(state)
        if self.reset_queue_each_epoch and main:
            self._reset_queue()

    def on_train_batch_start(self, global_step: int) -> None:
        """Call before each training step with the number of steps taken so far."""
        global_step = as_number("global_step", global_step)
        switch, state = _schedule.start_step(
            self._state, global_step, self._sched, clock=self._clock
        )
        self._enter(state)
        self._batch_hook_seen = True
        if switch:
            self._reset_queue()
        self._set_temperature()

    def forward(
        self, logits: Tensor, targets: Tensor, *, sample_weight: Tensor | None = None,
        iid_mask: Tensor | None = None, query_ids: Tensor | None = None, **kwargs: Any,
    ) -> Any:  # fmt: skip
        """Loss of the current phase.

        Args:
            logits: what the two losses take.
            targets: what the two losses take.
            sample_weight: goes to main_loss, and to warmup_loss if it declares the argument.
            iid_mask: goes to main_loss, in the blend too.
            query_ids: goes to main_loss, in the blend too.
            **kwargs: go to main_loss, and only when it is the whole loss (main_weight 1).

        Returns:
            What main_loss returns when it is the whole loss, else a scalar.
        """
        weight = self._main_weight
        if self.training and self.strict:
            self._check_driven()
        elif self.training and weight > 0:  # a sanity check before training is no mistake
            self._warn_undriven()
        weights = {} if sample_weight is None else {"sample_weight": sample_weight}
        rows = {"iid_mask": iid_mask, "query_ids": query_ids}
        extras = {**weights, **{name: x for name, x in rows.items() if x is not None}}
        if weight >= 1.0:
            return self.main_loss(logits, targets, **extras, **kwargs)
        warm = _first(
            self.warmup_loss(logits, targets, **(weights if self._weight_to_warmup else {}))
        )
        if weight == 0.0:
            return warm
        main = _first(self.main_loss(logits, targets, **extras))
        w: Tensor | float = weight
        if isinstance(main, Tensor):  # a tensor does not recompile when it changes
            w = self._weight_beside(main).to(main.dtype)
        return (1.0 - w) * warm + w * main

    def _weight_beside(self, loss: Tensor) -> Tensor:
        """The weight on the loss's device, moved there once: a CUDA graph keeps the address."""
        if self._blend_weight.device != loss.device:
            self._blend_weight = torch.full(
                (), self._main_weight, dtype=torch.float64, device=loss.device
            )
        return self._blend_weight

    def check_values(self) -> None:
        """`check_values` of both losses, where they have it."""
        for loss in (self.warmup_loss, self.main_loss):
            check = getattr(loss, "check_values", None)
            if callable(check):
                check()

    def get_extra_state(self) -> dict[str, Any]:
        """Where the schedule is, as plain numbers."""
        switch = int(self._state.switch_step)
        return {
            "clock": self._clock,
            "epoch": int(self._state.epoch),
            "global_step": int(self._state.step),
            "switch_step": switch if switch >= 0 else None,
            "batch_hook_seen": self._batch_hook_seen,
            "temperature": getattr(self.main_loss, "temperature", None),
        }

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Continue from `get_extra_state`; what it lacks stays as it is."""
        if problems := schedule_problems(state, self._clock):
            raise ValueError("; ".join(problems))
        state = {**self.get_extra_state(), **state}
        switch = -1 if state["switch_step"] is None else state["switch_step"]
        numbers = (state["epoch"], state["global_step"], switch)
        self._enter(ScheduleState(*(torch.tensor(int(n), dtype=torch.int64) for n in numbers)))
        self._batch_hook_seen = state["batch_hook_seen"]
        self._epoch_hook_seen |= self._batch_hook_seen  # a run may resume within an epoch
        if self._has_temperature and state["temperature"] is not None:
            self.main_loss.temperature = state["temperature"]  # type: ignore[attr-defined]

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        """Load the schedule and the losses, or nothing; the schedule may be missing."""
        # Checkpoints from before the schedule was saved stay loadable.
        state = state_dict.setdefault(prefix + "_extra_state", self.get_extra_state())
        problems = schedule_problems(state, self._clock)
        for name, module in self.named_modules():
            if isinstance(module, RankingLoss):
                problems += module.problems_with(state_dict, f"{prefix}{name}.")
        refuse(self, problems)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def _check_driven(self) -> None:
        by_epoch = self._clock == "epoch" and (self.warmup_epochs or self.blend_epochs)
        hooks = {
            "on_train_epoch_start(epoch)": self._epoch_hook_seen or not by_epoch,
            "on_train_batch_start(global_step)": self._batch_hook_seen,
        }
        missing = " and ".join(name for name, seen in hooks.items() if not seen)
        if missing:
            raise RuntimeError(
                f"the schedule is not driven: {missing} was never called; call it from the "
                "training loop, or use a callback of proxy_losses.integrations"
            )

    def _warn_undriven(self) -> None:
        if self._batch_hook_seen or self._no_batch_hook_warned or not self._has_temperature:
            return
        self._no_batch_hook_warned = True
        warn_user(
            "on_train_batch_start was never called: the temperature stays at "
            f"{self.current_temperature}. Call it with the global step before every batch."
        )


def _check_clocks(
    warmup_epochs: int, blend_epochs: int, warmup_steps: int | None, blend_steps: int | None
) -> None:
    check_int("warmup_epochs", warmup_epochs, 0)
    check_int("blend_epochs", blend_epochs, 0)
    if warmup_steps is not None:
        check_int("warmup_steps", warmup_steps, 0)
    if blend_steps is not None:
        check_int("blend_steps", blend_steps, 0)
    if warmup_steps is not None and warmup_epochs:
        raise ValueError("warmup_epochs and warmup_steps exclude each other; give one")
    if blend_steps is not None and blend_epochs:
        raise ValueError("blend_epochs and blend_steps exclude each other; give one")
    if blend_steps is not None and warmup_steps is None:
        raise ValueError("blend_steps requires warmup_steps")


def schedule_problems(state: object, clock: str) -> list[str]:
    """What keeps a wrapper from continuing from this extra state; keys may be missing."""
    if not isinstance(state, Mapping):
        return [f"the schedule's state must be a dict, got {type(state).__name__}"]
    saved_clock = state.get("clock", clock)
    if saved_clock != clock:
        return [
            f"the checkpoint is of a warmup counted in {saved_clock}s and this wrapper's is in "
            f"{clock}s (warmup_epochs, warmup_steps)"
        ]
    problems = []
    for name, minimum in (("epoch", None), ("global_step", None), ("switch_step", -1)):
        if name in state and (name != "switch_step" or state[name] is not None):
            problems += problems_of(check_int, name, state[name], minimum)
    if not isinstance(state.get("batch_hook_seen", False), bool):
        problems.append(f"batch_hook_seen must be a bool, got {state['batch_hook_seen']!r:.80}")
    if state.get("temperature") is not None:
        problems += problems_of(check_temperature, "temperature", state["temperature"])
    return problems
