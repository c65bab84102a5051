"""Underscore names of the published packages, for code and tests that reached for them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import _queue as q
from .._metrics.recall import recall_at_quantile, recall_defined
from .._metrics.smooth_ap import smooth_ap, smooth_ap_defined
from .._schedule import Clock, Schedule, ScheduleState, in_warmup, now
from ._queue import MemoryQueue


class PublishedNames:
    """Names kept on the ranking losses; new code uses the functions they call."""

    _queue: MemoryQueue | None
    temperature: float

    @property
    def _temperature(self) -> float:
        return self.temperature

    def _state(self) -> q.QueueState:
        if self._queue is None:
            raise AttributeError("there is no queue: queue_size is 0")
        return self._queue.state

    @property
    def _q_logits(self) -> Tensor:
        return self._state().logits

    @property
    def _q_targets(self) -> Tensor:
        return self._state().targets

    @property
    def _q_ptr(self) -> Tensor:
        state = self._state()
        return (state.enqueued % state.logits.shape[0])[None]

    def _enqueue(self, logits: Tensor, targets: Tensor) -> None:
        if self._queue is not None:
            self._queue.enqueue(logits, targets)

    def _merge_with_queue(self, logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        if self._queue is None:
            return logits, targets
        state = self._queue.state
        return (
            torch.cat([logits, state.logits.to(logits)]),
            torch.cat([targets, state.targets.to(targets)]),
        )

    @staticmethod
    def _compute_smooth_ap(
        scores: Tensor, is_pos: Tensor, tau: float, sample_weight: Tensor | None = None
    ) -> tuple[Tensor, bool]:
        value = smooth_ap(scores, is_pos, tau, sample_weight=sample_weight)
        return value, bool(smooth_ap_defined(is_pos, None, sample_weight))

    def _soft_recall_at_quantile(
        self, scores: Tensor, is_pos: Tensor, sample_weight: Tensor | None = None
    ) -> tuple[Tensor, bool]:
        recall = recall_at_quantile(
            scores, is_pos, self.temperature, sample_weight=sample_weight,
            quantile=self.quantile,  # type: ignore[attr-defined]
            interpolation=self.quantile_interpolation,  # type: ignore[attr-defined]
        )  # fmt: skip
        return recall, bool(recall_defined(is_pos, None, sample_weight))


EPOCH_HOOK, BATCH_HOOK = 1, 2  # bits of the hooks that were called


class PublishedSchedule:
    """Names kept on the wrapper; new code uses its properties."""

    @property
    def _state(self) -> ScheduleState:
        raise NotImplementedError

    _sched: Schedule
    _clock: Clock
    _hooks: int

    @property
    def _batch_hook_seen(self) -> bool:
        return bool(self._hooks & BATCH_HOOK)

    def _offer_extra_state(self) -> None:
        """Give this instance a `get_extra_state`; a class that had one would save a dict by it."""
        self.get_extra_state = self._extra_state

    def _extra_state(self) -> dict[str, Any]:
        switch = int(self._state.switch_step)
        return {
            "clock": self._clock,
            "epoch": self._epoch,
            "global_step": self._global_step,
            "switch_step": switch if switch >= 0 else None,
            "batch_hook_seen": self._batch_hook_seen,
            "temperature": self.current_temperature,  # type: ignore[attr-defined]
        }

    @property
    def _epoch(self) -> int:
        return int(self._state.epoch)

    @property
    def _global_step(self) -> int:
        return int(self._state.step)

    @property
    def _step_mode(self) -> bool:
        return self._clock == "step"

    @property
    def _switch_step(self) -> int | None:
        """None before the main phase, -1 in it until its first batch, then that step."""
        switch = int(self._state.switch_step)
        if switch >= 0:
            return switch
        return None if in_warmup(now(self._state, self._clock), self._sched) else -1
