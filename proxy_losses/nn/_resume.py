"""The part of the warmup wrapper that checkpoints carry."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from .._schedule import Clock, ScheduleState
from ._base import RankingLoss
from ._saved import refuse, schedule_problems


class SavedSchedule(nn.Module):
    """Saves and restores where the schedule is."""

    _clock: Clock
    _state: ScheduleState
    _enter: Callable[[ScheduleState], None]
    _has_temperature: bool
    _batch_hook_seen: bool
    _epoch_hook_seen: bool
    main_loss: Callable[..., Any]

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
