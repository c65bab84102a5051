"""An epoch clock: how the state of a schedule moves on, and what it says."""

from __future__ import annotations

import torch
from torch import Tensor

from ._schedule import Clock, Schedule, ScheduleState, as_clock, blend_weight, in_warmup, temp_at


def init_schedule(sched: Schedule, *, device: torch.device | None = None) -> ScheduleState:
    """State before the first batch: without warmup the switch is step 0, else still to come.

    Args:
        sched: the schedule.
        device: where to keep the state.

    Returns:
        `ScheduleState`.

    Raises:
        TypeError, ValueError: a field of sched is of a wrong type or out of range.

    Example:
        >>> init_schedule(Schedule(warmup_steps=2)).switch_step
        tensor(-1)
    """
    zero = torch.zeros((), dtype=torch.int64, device=device)
    waits = in_warmup(zero, sched)
    return ScheduleState(zero, zero.clone(), torch.where(waits, -1, 0))


def start_epoch(
    state: ScheduleState, epoch: int | Tensor, sched: Schedule, *, clock: Clock = "epoch"
) -> tuple[Tensor, ScheduleState]:
    """Advance the epoch.

    Args:
        state: the state so far.
        epoch: int or 0-d integer tensor.
        sched: the schedule.
        clock: what warmup_steps and blend_steps count, "epoch" or "step".

    Returns:
        ([] bool, whether the main phase has begun, which is when a queue that is reset each epoch
        must be; the new state).

    Raises:
        TypeError: epoch is not an integer.
        ValueError: a field of sched is out of range, or another clock.

    Example:
        >>> sched = Schedule(warmup_steps=1)  # epochs here
        >>> begun, state = start_epoch(init_schedule(sched), 0, sched)
        >>> begun, start_epoch(state, 1, sched)[0]
        (tensor(False), tensor(True))
    """
    state = state._replace(epoch=as_clock(epoch, "epoch"))
    return ~in_warmup(_now(state, clock), sched), state


def start_step(
    state: ScheduleState, step: int | Tensor, sched: Schedule, *, clock: Clock = "step"
) -> tuple[Tensor, ScheduleState]:
    """Advance the step; the first one of the main phase is latched as the switch.

    Args:
        state: the state so far.
        step: int or 0-d integer tensor, the global step about to run.
        sched: the schedule.
        clock: what warmup_steps and blend_steps count, "epoch" or "step".

    Returns:
        ([] bool, whether this is the switch, at which the queue must be reset once; the new
        state).

    Raises:
        TypeError: step is not an integer.
        ValueError: a field of sched is out of range, or another clock.

    Example:
        >>> sched = Schedule(warmup_steps=1)  # epochs here
        >>> _, state = start_epoch(init_schedule(sched), 1, sched)
        >>> reset, state = start_step(state, 40, sched, clock="epoch")
        >>> reset, state.switch_step
        (tensor(True), tensor(40))
    """
    state = state._replace(step=as_clock(step))
    switch = ~in_warmup(_now(state, clock), sched) & (state.switch_step < 0)
    return switch, state._replace(switch_step=torch.where(switch, state.step, state.switch_step))


def state_temp(state: ScheduleState, sched: Schedule) -> Tensor:
    """Temperature of the state's step, counted from the latched switch; temp_start before it.

    Args:
        state: the state.
        sched: the schedule.

    Returns:
        [] float64: `temp_at` of the step, with switch_step in place of warmup_steps.

    Raises:
        TypeError, ValueError: a field of sched is of a wrong type or out of range.

    Example:
        >>> sched = Schedule(warmup_steps=1, temp_start=0.1, temp_end=0.001, temp_decay_steps=100)
        >>> _, state = start_step(init_schedule(sched), 7, sched)  # the first after warmup
        >>> _, later = start_step(state, 57, sched)
        >>> round(state_temp(later, sched).item(), 6)
        0.01
    """
    switched = sched._replace(warmup_steps=state.switch_step)
    step = torch.where(state.switch_step < 0, state.switch_step, state.step)
    return temp_at(step, switched)


def state_weight(state: ScheduleState, sched: Schedule, *, clock: Clock = "step") -> Tensor:
    """Weight of the main loss at the state's step or epoch.

    Args:
        state: the state.
        sched: the schedule.
        clock: what warmup_steps and blend_steps count, "epoch" or "step".

    Returns:
        [] float64: `blend_weight` of the step or epoch.

    Raises:
        TypeError: a field of sched is of a wrong type.
        ValueError: a field of sched is out of range, or another clock.

    Example:
        >>> sched = Schedule(warmup_steps=1, blend_steps=1)  # epochs here
        >>> _, state = start_epoch(init_schedule(sched), 1, sched)
        >>> state_weight(state, sched, clock="epoch").item()
        0.5
    """
    return blend_weight(_now(state, clock), sched)


def _now(state: ScheduleState, clock: Clock) -> Tensor:
    if clock not in ("step", "epoch"):
        raise ValueError(f"clock must be 'step' or 'epoch', got {clock!r}")
    return state.epoch if clock == "epoch" else state.step
