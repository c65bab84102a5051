"""Warmup -> blend -> ranking loss, with the temperature schedule, as a module."""

from __future__ import annotations

import functools
import inspect
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.nn.parallel import DataParallel, DistributedDataParallel

from .. import _schedule
from .._checks import (
    as_number,
    as_whole,
    check_flag,
    check_int,
    check_temperature,
    warn_user,
)
from .._old_names import takes_old_names
from .._schedule import Clock, Schedule, ScheduleState
from ._batch import ScheduledLoss, readable
from ._published import BATCH_HOOK, EPOCH_HOOK, PublishedSchedule
from ._queue import problems_of, refuse
from ._state import StateModule, guard

PARALLEL = DataParallel, DistributedDataParallel
_FACTORS, _BITS = (3, 5, 7, 11, 13), 0x14057B7EF767814F  # of the seal

AVERAGED = (
    "the schedule of this LossWarmupWrapper was averaged or never filled: it is at no step. An "
    "average (torch's AveragedModel, Lightning's WeightAveraging) must leave buffers alone, "
    "use_buffers=False; reset() starts the schedule of a copy anew"
)
CHANGED = (
    "the schedule of a compiled LossWarmupWrapper was changed from outside, or averaged: read its "
    "main_weight before the call, outside of compiled code"
)


class Progress(NamedTuple):
    """What the buffer of a wrapper holds, in this order."""

    epoch: int  # last epoch started
    step: int  # last step started
    switch_step: int  # step of the first main-phase batch; -1 before it
    hooks: int  # bits, which of the two hooks were called
    clock: int  # 1 if the schedule counts steps, 0 if epochs
    seal: int  # `_seal_of` the others


def _seal_of(numbers: Sequence[Any]) -> Any:
    """A number of many digits, of ints or 0-d tensors; no average of two is that of a third."""
    total = sum(f * (n + 1) for f, n in zip(_FACTORS, numbers, strict=True))
    return total % 2**56 ^ _BITS


def _is_sealed(numbers: Sequence[Any]) -> Any:
    return numbers[-1] == _seal_of(numbers[:-1])


def _first(out: Any) -> Any:
    """The loss of a callable that returns it alone or first of a tuple."""
    return out[0] if isinstance(out, tuple) else out


def _bare(loss: Callable[..., Any]) -> Callable[..., Any]:
    """What `torch.compile` or a parallel wrapper was put around, which hides its signature."""
    inner: Any = loss
    while inner is not None:
        loss = inner
        own = getattr(loss, "__dict__", {})  # a mock has whatever else it is asked for
        if isinstance(loss, PARALLEL):
            inner = loss.module
        else:
            inner = own.get("_modules", {}).get("_orig_mod", own.get("_torchdynamo_orig_callable"))
    return loss


def takes(loss: Callable[..., Any], name: str, *, by_name: bool = False) -> bool:
    """Whether a loss has a keyword of this name, or any unless it must be by name."""
    loss = _bare(loss)
    try:
        params = inspect.signature(loss.forward if isinstance(loss, nn.Module) else loss).parameters
    except (TypeError, ValueError):
        return False
    return name in params or any(
        p.kind is inspect.Parameter.VAR_KEYWORD and not by_name for p in params.values()
    )


class LossWarmupWrapper(PublishedSchedule, StateModule):
    """Trains with a standard loss first, blends into a ranking loss, then decays its temperature.

    Call `on_train_epoch_start(epoch)` and `on_train_batch_start(global_step)` from the training
    loop; step mode (warmup_steps given) needs the second alone. At the first batch of the main
    phase the queue of main_loss is emptied once and the temperature clock starts. Numbers of epochs
    and steps may be whole floats, as of a product or a file.

    Args:
        warmup_loss: any callable (logits, targets) -> loss; of a tuple the first element counts.
        main_loss: any callable (logits, targets) -> loss; a writable `temperature` is scheduled,
            a `reset_queue()` is called at the switch.
        warmup_epochs: epochs of warmup_loss alone, >= 0.
        temp_start: temperature at the switch, > 0, in units of the main loss. Its default and that
            of temp_end are the published ones; with ``temperature_unit="spread"`` in the main loss
            0.25 for both is advised (see the guide).
        temp_end: temperature after temp_decay_steps, > 0.
        temp_decay_steps: steps from the switch to temp_end, >= 1; see `temp_at`.
        blend_epochs: epochs of the linear ramp from warmup_loss to main_loss, >= 0.
        warmup_steps: warmup in steps instead of epochs.
        blend_steps: blend in steps; requires warmup_steps.
        final_main_weight: weight of main_loss after the blend, in (0, 1]; the rest is warmup_loss.
            0.75 is advised.
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
        warmup_epochs, blend_epochs, warmup_steps, blend_steps, temp_decay_steps = (
            as_whole(name, x)
            for name, x in (
                ("warmup_epochs", warmup_epochs), ("blend_epochs", blend_epochs),
                ("warmup_steps", warmup_steps), ("blend_steps", blend_steps),
                ("temp_decay_steps", temp_decay_steps),
            )
        )  # fmt: skip
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
        bare = _bare(main_loss)
        own = isinstance(bare, ScheduledLoss)
        self._references = bare.references if isinstance(bare, ScheduledLoss) else ()
        self._has_temperature = own or hasattr(main_loss, "temperature")
        self._weight_to_warmup = takes(warmup_loss, "sample_weight")
        self._mask_to_warmup = takes(warmup_loss, "label_mask", by_name=True)
        self._store_to_warmup = takes(warmup_loss, "store", by_name=True)
        self._store_to_main = takes(main_loss, "store")
        self._no_batch_hook_warned = False
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
        self._offer_extra_state()
        self._progress: Tensor
        self.add_state("_progress", (len(Progress._fields),), torch.int64)
        self._left: tuple[weakref.ref[Tensor] | None, int] = (None, 0)
        self._seen: Progress  # what was read last, and what follows from it
        self._weight: float
        self._blend_weight: Tensor | None = None  # the same on the device of the losses
        self._hooks: int
        self.fill()
        if self._has_temperature and self._seen.switch_step >= 0:
            main_loss.temperature = float(temp_start)  # type: ignore[attr-defined]

    def fill(self) -> None:
        """The start of the schedule; the losses are modules of their own."""
        self._write(0, 0, -1 if self._sched.warmup_steps > 0 else 0, 0)

    # -- where the schedule is

    def _write(self, epoch: int, step: int, switch_step: int, hooks: int) -> None:
        """Move on, in place."""
        numbers = (epoch, step, switch_step, hooks, int(self._clock == "step"))
        progress = Progress(*numbers, _seal_of(numbers))
        for place, number in enumerate(progress):
            self._progress[place].fill_(number)  # to copy them would wait for the device
        self._see(progress)

    def _move(
        self, start: Callable[..., tuple[Tensor, ScheduleState]], now: int, hook: int
    ) -> bool:
        """Move on by `start_epoch` or `start_step`, and what that says."""
        with unset_fake_temporarily():  # the numbers are there
            flag, state = start(self._state, _number(now), self._sched, clock=self._clock)
            said, numbers = bool(flag), [int(x) for x in state]
        self._write(numbers[0], numbers[1], numbers[2], self._hooks | hook)
        return said

    def _see(self, progress: Progress) -> None:
        """Remember what the buffer holds, and what follows from it."""
        self._left = weakref.ref(self._progress), self._progress._version
        now = progress.epoch if self._clock == "epoch" else progress.step
        warmup, blend, *_, final = self._sched
        self._weight = float(
            _schedule.ramp(now - warmup, blend, final, lambda yes, a, b: a if yes else b)
        )
        if self._blend_weight is not None:
            self._blend_weight.fill_(self._weight)
        self._seen, self._hooks = progress, progress.hooks

    def _now(self) -> Progress:
        """The numbers of the buffer.

        Off the CPU they are read only if somebody else has written them, as `load_state_dict` and
        averages over copies do; the hooks know what they wrote.
        """
        x = self._progress
        ref, version = self._left
        stayed = ref is not None and id(ref()) == id(x) and x._version == version
        if x.is_meta or not readable(x) or (stayed and not x.is_cpu):
            return self._seen
        progress = Progress(*x.tolist())
        if not _is_sealed(progress):
            raise RuntimeError(AVERAGED)
        if progress != self._seen:
            self._see(progress)
            if not isinstance(_bare(self.main_loss), ScheduledLoss):  # those have it in a buffer
                self._set_temperature()
        return progress

    @property
    def _state(self) -> ScheduleState:
        return ScheduleState(*(_number(n) for n in self._now()[:3]))

    def _guarded(self, loss: Tensor, weight: float) -> Tensor:
        """The loss of compiled code, which is of the phase of this weight, if the buffer agrees."""
        there = self._weight_there()
        agrees = there >= 1.0 if weight >= 1.0 else there == 0.0
        if 0.0 < weight < 1.0:
            agrees = (there > 0.0) & (there < 1.0)
        sealed: Tensor = _is_sealed(self._progress.unbind())
        return guard(loss, agrees & sealed, CHANGED)

    def _weight_there(self) -> Tensor:
        """[] float64, main_weight computed where the buffer is."""
        state = ScheduleState(*self._progress[:3].unbind())
        return _schedule.state_weight(state, self._sched, clock=self._clock)

    def _weight_beside(self, loss: Tensor) -> Tensor:
        """The weight on the loss's device, written in place: a CUDA graph keeps the address."""
        if self._blend_weight is None or self._blend_weight.device != loss.device:
            with torch.inference_mode(False):
                self._blend_weight = torch.full(
                    (), self._weight, dtype=torch.float64, device=loss.device
                )
        return self._blend_weight

    def _set_temperature(self) -> None:
        if self._has_temperature and self._now().switch_step >= 0:
            with unset_fake_temporarily():
                temperature = float(_schedule.state_temp(self._state, self._sched))
            self.main_loss.temperature = temperature  # type: ignore[attr-defined]

    def reset(self) -> None:
        """Start anew: the schedule at its start, and both losses reset if they have a `reset()`.

        A loss that has none, but a `reset_queue()`, gets that called. For a run of its own with
        the same wrapper, as in cross-validation.

        Example:
            >>> wrapper = LossWarmupWrapper(
            ...     torch.nn.CrossEntropyLoss(), SmoothAPLoss(4), warmup_steps=5
            ... )
            >>> wrapper.on_train_batch_start(7)
            >>> wrapper.reset()
            >>> wrapper.main_weight, wrapper.in_warmup
            (0.0, True)
        """
        for loss in (self.warmup_loss, self.main_loss):
            reset = getattr(loss, "reset", getattr(loss, "reset_queue", None))
            if callable(reset):
                reset()
        self._no_batch_hook_warned = self._mask_warned = self._standing_warned = False
        self._called_before = False
        self.fill()
        self._set_temperature()

    def _reset_queue(self) -> None:
        if hasattr(self.main_loss, "reset_queue"):
            self.main_loss.reset_queue()

    @property
    def in_warmup(self) -> bool:
        """Whether warmup_loss alone is in use."""
        with unset_fake_temporarily():
            return bool(_schedule.in_warmup(_schedule.now(self._state, self._clock), self._sched))

    @property
    def in_blend(self) -> bool:
        """Whether the run is in the ramp from warmup_loss to main_loss."""
        with unset_fake_temporarily():
            return bool(_schedule.in_blend(_schedule.now(self._state, self._clock), self._sched))

    @property
    def main_weight(self) -> float:
        """Weight of main_loss now, in [0, final_main_weight]."""
        self._now()
        return self._weight

    @property
    def ap_weight(self) -> float:
        """The name of `main_weight` in proxy-losses 0.1.1."""
        return self.main_weight

    @property
    def current_temperature(self) -> float | None:
        """Temperature of main_loss now; None if it has none."""
        return getattr(self.main_loss, "temperature", None)

    def on_train_epoch_start(self, epoch: int) -> None:
        """Call at the start of each epoch, before its first batch."""
        epoch = as_whole("epoch", epoch)
        check_int("epoch", epoch)
        main = self._move(_schedule.start_epoch, epoch, EPOCH_HOOK)
        if self.reset_queue_each_epoch and main:
            self._reset_queue()

    def on_train_batch_start(self, global_step: int) -> None:
        """Call before each training step with the number of steps taken so far."""
        global_step = as_whole("global_step", global_step)
        check_int("global_step", global_step)
        if self._move(_schedule.start_step, global_step, BATCH_HOOK):
            self._reset_queue()
        self._set_temperature()

    @functools.partial(takes_old_names, passes_to="main_loss")
    def forward(
        self, logits: Tensor, targets: Tensor, *, sample_weight: Tensor | None = None,
        iid_mask: Tensor | None = None, query_ids: Tensor | None = None,
        label_mask: Tensor | None = None, row_ids: Tensor | None = None, store: bool = True,
        **kwargs: Any,
    ) -> Any:  # fmt: skip
        """Loss of the current phase.

        Args:
            logits: what the two losses take.
            targets: what the two losses take.
            sample_weight: goes to main_loss, and to warmup_loss if it declares the argument.
            iid_mask: goes to main_loss, in the blend too.
            query_ids: goes to main_loss, in the blend too.
            label_mask: goes to main_loss, and to warmup_loss if it declares the argument.
            row_ids: goes to main_loss, in the blend too, see `RetrievalLoss`.
            store: False goes to the losses that declare the argument: the queue stays as it is.
            **kwargs: go to main_loss, and only when it is the whole loss (main_weight 1); the
                references of a `RetrievalLoss` in the blend too.

        Returns:
            What main_loss returns when it is the whole loss, else a scalar.

        Warns:
            UserWarning: once each, in training: no hook was called that the schedule needs; a
                label_mask is given and warmup_loss takes none.
        """
        check_flag("store", store)
        compiling = torch.compiler.is_compiling()
        if not compiling:
            self._now()
        weight = self._weight
        if self.training and self.strict:
            self._check_driven()
        elif self.training:  # a sanity check before training is no mistake
            self._warn_undriven()
        weights = {} if sample_weight is None else {"sample_weight": sample_weight}
        rows = {
            "iid_mask": iid_mask, "query_ids": query_ids, "label_mask": label_mask,
            "row_ids": row_ids,
        }  # fmt: skip
        extras: dict[str, Any] = {
            **weights,
            **{name: x for name, x in rows.items() if x is not None},
        }
        to_warmup: dict[str, Any] = {**weights} if self._weight_to_warmup else {}
        if weight < 1.0 and label_mask is not None:
            to_warmup |= self._mask_of_warmup(label_mask)
        if not store:  # what declares no such argument stores nothing
            to_warmup |= {"store": False} if self._store_to_warmup else {}
            extras |= {"store": False} if self._store_to_main else {}
        loss: Any
        if weight >= 1.0:
            loss = self.main_loss(logits, targets, **extras, **kwargs)
        else:
            loss = _first(self.warmup_loss(logits, targets, **to_warmup))
        if 0.0 < weight < 1.0:
            extras |= {name: kwargs[name] for name in self._references if name in kwargs}
            main = _first(self.main_loss(logits, targets, **extras))
            w: Tensor | float = weight
            if isinstance(main, Tensor):  # a tensor does not recompile when it changes
                w = self._weight_there() if compiling else self._weight_beside(main)
                w = w.to(device=main.device, dtype=main.dtype)
            loss = (1.0 - w) * loss + w * main
        if not compiling:
            return loss
        if isinstance(loss, tuple):
            return self._guarded(loss[0], weight), *loss[1:]
        return self._guarded(loss, weight) if isinstance(loss, Tensor) else loss

    def check_values(self) -> None:
        """`check_values` of both losses, where they have it."""
        for loss in (self.warmup_loss, self.main_loss):
            check = getattr(loss, "check_values", None)
            if callable(check):
                check()

    # -- loading

    def __getstate__(self) -> dict[str, Any]:
        """A copy has a buffer of its own."""
        state = {**self.__dict__, "_left": (None, 0), "_blend_weight": None}
        del state["get_extra_state"]
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._offer_extra_state()

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        """Load the schedule and the losses, or nothing; the schedule may be missing."""
        key, old = prefix + "_progress", prefix + "_extra_state"
        problems = []
        if key in state_dict:
            problems += progress_problems(state_dict[key], key, self._clock)
            state_dict.pop(old, None)
        elif old in state_dict:  # up to 0.4, and of imbalanced-losses
            problems += schedule_problems(state_dict[old], self._clock)
        for name, module in self.named_modules():
            if isinstance(module, ScheduledLoss):
                problems += module.problems_with(state_dict, f"{prefix}{name}.")
        refuse(self, problems)
        if key not in state_dict:  # checkpoints from before the schedule was saved stay loadable
            state_dict[key] = self._continued(state_dict.pop(old, {}))
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        if not self._progress.is_meta:
            progress = Progress(*self._progress.tolist())
            if _is_sealed(progress):  # else a call says so
                self._see(progress)
                if not isinstance(_bare(self.main_loss), ScheduledLoss):
                    self._set_temperature()

    def _continued(self, state: Mapping[str, Any]) -> Tensor:
        """The buffer after an old extra state; what that lacks stays as it is."""
        now, switch = self._seen, state.get("switch_step", self._seen.switch_step)
        hooks = now.hooks
        if "batch_hook_seen" in state:  # a run may resume within an epoch
            hooks = (EPOCH_HOOK | BATCH_HOOK) if state["batch_hook_seen"] else 0
        numbers = (
            int(state.get("epoch", now.epoch)),
            int(state.get("global_step", now.step)),
            -1 if switch is None else int(switch),
            hooks,
            now.clock,
        )
        if self._has_temperature and state.get("temperature") is not None:
            self.main_loss.temperature = state["temperature"]  # type: ignore[attr-defined]
        return torch.tensor((*numbers, _seal_of(numbers)), dtype=torch.int64, device="cpu")

    def _check_driven(self) -> None:
        by_epoch = self._clock == "epoch" and (self.warmup_epochs or self.blend_epochs)
        hooks = {
            "on_train_epoch_start(epoch)": self._hooks & EPOCH_HOOK or not by_epoch,
            "on_train_batch_start(global_step)": self._hooks & BATCH_HOOK,
        }
        missing = " and ".join(name for name, seen in hooks.items() if not seen)
        if missing:
            raise RuntimeError(
                f"the schedule is not driven: {missing} was never called; call it from the "
                "training loop, or use a callback of proxy_losses.integrations"
            )

    _mask_warned = _standing_warned = _called_before = False

    def _mask_of_warmup(self, label_mask: Tensor) -> dict[str, Tensor]:
        if self._mask_to_warmup:
            return {"label_mask": label_mask}
        if not self._mask_warned and not torch.compiler.is_compiling():
            self._mask_warned = True
            warn_user(
                f"{type(self).__name__}: warmup_loss {type(self.warmup_loss).__name__} has no "
                "argument 'label_mask': it trains on what targets hold where the label is "
                "unknown; give it a warmup_loss(logits, targets, label_mask=None)"
            )
        return {}

    def _warn_standing(self) -> None:
        """Say once that nothing moves the clock of the warmup or the blend."""
        if self._clock == "epoch":
            hook, seen = "on_train_epoch_start(epoch)", bool(self._hooks & EPOCH_HOOK)
            needed = self.warmup_epochs + self.blend_epochs > 0
        else:
            hook = "on_train_batch_start(global_step)"
            seen = bool(self._hooks & BATCH_HOOK) or self._no_batch_hook_warned
            needed = bool(self.warmup_steps or self.blend_steps)
        if seen or not needed or not torch.is_grad_enabled():
            return
        if not (self._hooks & BATCH_HOOK or self._called_before):  # a first call may be a trial
            self._called_before = True
            return
        self._standing_warned = True
        warn_user(
            f"{type(self).__name__}: {hook} was never called: the schedule stays at its start, "
            f"with main_weight {self._weight:.3g}. Call it from the training loop, or use a "
            "callback of proxy_losses.integrations."
        )

    def _warn_undriven(self) -> None:
        if not self._standing_warned and not torch.compiler.is_compiling():
            self._warn_standing()
        seen = self._hooks & BATCH_HOOK or self._no_batch_hook_warned
        if self._weight == 0 or seen or not self._has_temperature:
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


def _number(n: int) -> Tensor:
    return torch.full((), n, dtype=torch.int64, device="cpu")


def progress_problems(saved: object, key: str, clock: str) -> list[str]:
    """What keeps a wrapper from continuing from this buffer; an average is told of at a call."""
    shape = [len(Progress._fields)]
    if not isinstance(saved, Tensor):
        return [f"{key} must be a tensor, got {type(saved).__name__}"]
    if list(saved.shape) != shape or saved.dtype != torch.int64:
        return [f"{key} must be {shape} int64, got {list(saved.shape)} {saved.dtype}"]
    if saved.is_meta:
        return []
    progress = Progress(*saved.tolist())
    if not _is_sealed(progress):
        return []
    return schedule_problems({"clock": "step" if progress.clock else "epoch"}, clock)


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
