"""Warmup, blend and temperature: functions of a step, and the state of a run on either clock."""

from __future__ import annotations

from collections.abc import Callable
from numbers import Integral
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from ._checks import check_int, check_positive, check_temperature, fail_type, traced_number
from ._numerics import beside

Clock = Literal["step", "epoch"]


class Schedule(NamedTuple):
    """Warmup -> blend -> main, and a geometric temperature from the switch on.

    `blend_weight` and `temp_at` have the formulas. `warmup_steps` and `blend_steps` count steps, or
    epochs when the clock is the epoch. A field that varies between calls of one compiled function
    must be a 0-d tensor.

    Example:
        >>> Schedule(warmup_steps=500, blend_steps=3).temp_start
        0.05
    """

    warmup_steps: int | Tensor = 0  # >= 0, steps before the switch
    blend_steps: int | Tensor = 0  # >= 0, steps of the ramp after it
    temp_start: float | Tensor = 0.05  # > 0, in units of the scores
    temp_end: float | Tensor = 0.005  # > 0
    temp_decay_steps: int | Tensor = 10_000  # > 0, steps from temp_start to temp_end
    final_main_weight: float | Tensor = 1.0  # in (0, 1], weight of the main loss after the blend


class ScheduleState(NamedTuple):
    """Where a run is. Every field is a 0-d int64 tensor, so states stack, save and compare.

    Save ``state._asdict()``, as with `QueueState`.

    Example:
        >>> state = init_schedule(Schedule(warmup_steps=2))
        >>> ScheduleState(**state._asdict()) == state
        True
    """

    epoch: Tensor  # [] int64, last epoch started
    step: Tensor  # [] int64, last step started
    switch_step: Tensor  # [] int64, step of the first main-phase batch; -1 before it


def check_schedule(sched: Schedule) -> None:
    """Raise `ValueError` or `TypeError` for a static field out of range; tensors are not read."""
    if not isinstance(sched, Schedule):
        raise TypeError(f"sched must be a Schedule, got {type(sched).__name__}")
    for name, x in sched._asdict().items():
        if isinstance(x, Tensor):
            if x.is_complex() or x.dtype == torch.bool:
                fail_type(name, "a number or a tensor of real numbers", x)
        elif name.endswith("steps"):
            check_int(name, x, 1 if name == "temp_decay_steps" else 0)
        elif name == "final_main_weight":
            check_positive(name, x)
            if x > 1:
                raise ValueError(f"{name} must be in (0, 1], got {x}")
        else:
            check_temperature(name, x)


def check_state(state: ScheduleState) -> None:
    """Raise `TypeError` unless it is a `ScheduleState`, and not a tuple that was loaded as one."""
    if not isinstance(state, ScheduleState):
        raise TypeError(f"state must be a ScheduleState, got {type(state).__name__}")


def as_clock(step: int | Tensor, name: str = "step") -> Tensor:
    """The step as a 0-d int64 tensor (an int above 2^24 would round in float32)."""
    step = traced_number(step)
    if isinstance(step, Tensor):
        if step.is_floating_point() or step.is_complex() or step.dtype == torch.bool:
            raise TypeError(f"{name} must be an int or an integer tensor, got {step.dtype}")
        return step.to(torch.int64)
    if isinstance(step, bool) or not isinstance(step, Integral | torch.SymInt):
        raise TypeError(f"{name} must be an int or an integer tensor, got {type(step).__name__}")
    if not isinstance(step, int | torch.SymInt):  # of numpy, say
        step = int(step)
    if isinstance(step, int) and not torch.compiler.is_compiling():
        check_int(name, step)
    return torch.full((), step, dtype=torch.int64)


def _real(x: float | Tensor, like: Tensor) -> Tensor:
    """As float64 on like's device; numbers before any arithmetic, lest a compiler bake it in."""
    if isinstance(x, Tensor):
        return beside(x, like, torch.float64)
    return torch.full((), x, dtype=torch.float64, device=like.device)


def _together(state: ScheduleState, clock: Tensor) -> tuple[ScheduleState, Tensor]:
    """A state and a step on one device: that of the one which is not on the host."""
    check_state(state)
    place = state.step if clock.is_cpu else clock
    *fields, clock = (beside(x, place, torch.int64) for x in (*state, clock))
    return ScheduleState(*fields), clock


def _checked(step: int | Tensor, sched: Schedule) -> Tensor:
    if not torch.compiler.is_compiling():
        check_schedule(sched)
    return as_clock(step)


def in_warmup(step: int | Tensor, sched: Schedule) -> Tensor:
    """Whether step lies before the switch: ``step < warmup_steps``.

    Args:
        step: int or 0-d integer tensor (any shape is fine: the answer has the same).
        sched: the schedule.

    Returns:
        bool tensor of step's shape.

    Raises:
        TypeError: step is not an integer.
        ValueError: a field of sched is out of range.

    Example:
        >>> in_warmup(499, Schedule(warmup_steps=500))
        tensor(True)
    """
    return _checked(step, sched) < sched.warmup_steps


def in_blend(step: int | Tensor, sched: Schedule) -> Tensor:
    """Whether step lies in the ramp between the switch and the final weight.

    ``warmup_steps <= step < warmup_steps + blend_steps``.

    Args:
        step: int or 0-d integer tensor.
        sched: the schedule.

    Returns:
        bool tensor of step's shape.

    Raises:
        TypeError: step is not an integer.
        ValueError: a field of sched is out of range.

    Example:
        >>> in_blend(500, Schedule(warmup_steps=500, blend_steps=3))
        tensor(True)
    """
    since = _checked(step, sched) - sched.warmup_steps
    return (since >= 0) & (since < sched.blend_steps)


def blend_weight(step: int | Tensor, sched: Schedule) -> Tensor:
    """Weight of the main loss: 0 in warmup, a linear ramp in the blend, then the final weight.

    ``(k + 1) / (B + 1) * final_main_weight`` in blend step k = 0 .. B - 1; without a blend the
    final weight starts at once.

    Args:
        step: int or 0-d integer tensor.
        sched: the schedule.

    Returns:
        float64 tensor of step's shape, in [0, final_main_weight].

    Raises:
        TypeError: step is not an integer.
        ValueError: a field of sched is out of range.

    Example:
        >>> sched = Schedule(warmup_steps=500, blend_steps=3)
        >>> [blend_weight(k, sched).item() for k in (499, 500, 501, 502, 503)]
        [0.0, 0.25, 0.5, 0.75, 1.0]
    """
    clock = _checked(step, sched)
    since = clock - sched.warmup_steps
    final = _real(sched.final_main_weight, clock)
    blend = _real(sched.blend_steps, clock)
    weight: Tensor = ramp(since, blend, final, torch.where)
    return weight


def ramp(since: Any, blend: Any, final: Any, where: Callable[[Any, Any, Any], Any]) -> Any:
    """`blend_weight` of the steps since the switch; of numbers with a `where` for numbers."""
    weight = where(since < blend, (since + 1) / (blend + 1.0) * final, final)
    return where(since < 0, 0.0, weight)


def temp_at(step: int | Tensor, sched: Schedule) -> Tensor:
    """Temperature: geometric from temp_start at the switch to temp_end, clamped on both sides.

    ``temp_start * (temp_end / temp_start) ** (elapsed / temp_decay_steps)`` with elapsed =
    step - warmup_steps clamped to [0, temp_decay_steps].

    Args:
        step: int or 0-d integer tensor; exact above 2^24.
        sched: the schedule. When the switch came at another step, as on an epoch clock, give
            ``sched._replace(warmup_steps=switch_step)``.

    Returns:
        float64 tensor of step's shape, between temp_start and temp_end.

    Raises:
        TypeError: step is not an integer.
        ValueError: a field of sched is out of range.

    Example:
        >>> sched = Schedule(temp_start=0.1, temp_end=0.001, temp_decay_steps=100)
        >>> [round(temp_at(k, sched).item(), 6) for k in (0, 50, 100, 1000)]
        [0.1, 0.01, 0.001, 0.001]
    """
    return _temp_at(_checked(step, sched), sched)


def _temp_at(clock: Tensor, sched: Schedule) -> Tensor:
    start, end = _real(sched.temp_start, clock), _real(sched.temp_end, clock)
    elapsed = (clock - sched.warmup_steps).clamp(min=0)
    done = elapsed.to(torch.float64) / _real(sched.temp_decay_steps, clock)
    temp = start * (end / start) ** done.clamp(max=1.0)
    temp = temp.clamp(torch.minimum(start, end), torch.maximum(start, end))  # the power rounds
    return torch.where(done >= 1.0, end, temp)


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
    state, latest = _together(state, as_clock(epoch, "epoch"))
    state = state._replace(epoch=latest)
    return ~in_warmup(now(state, clock), sched), state


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
    state, latest = _together(state, as_clock(step))
    state = state._replace(step=latest)
    switch = ~in_warmup(now(state, clock), sched) & (state.switch_step < 0)
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
    check_state(state)
    clock = _checked(state.step, sched)
    switched = sched._replace(warmup_steps=state.switch_step)
    return _temp_at(torch.where(state.switch_step < 0, state.switch_step, clock), switched)


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
    return blend_weight(now(state, clock), sched)


def now(state: ScheduleState, clock: Clock) -> Tensor:
    """The step or epoch of the state."""
    check_state(state)
    if clock not in ("step", "epoch"):
        raise ValueError(f"clock must be 'step' or 'epoch', got {clock!r}")
    return state.epoch if clock == "epoch" else state.step
