"""What is asked of values: at once on the CPU, elsewhere without waiting for the answer.

A device works through a queue of kernels, and a read of a value waits until all of them have run.
So answers travel into pinned memory while the host goes on, and are heard at a later forward: the
first at which the event behind the copy has happened. What they say is raised there, with the
number of the forward that it is about. Processes that train together may so raise at different
forwards; the first that does ends the run.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, TypeAlias

import torch
from torch import Tensor

from .._checks import check_flag

RING = 4  # answers on their way for one module; while there are as many nothing more is asked


# -- at once


def _environment(value: str) -> bool:
    """What PROXY_LOSSES_DEBUG says."""
    if value not in ("", "0", "1"):
        raise ValueError(f"PROXY_LOSSES_DEBUG must be 0 or 1, got {value!r}")
    return value == "1"


_debug = _environment(os.environ.get("PROXY_LOSSES_DEBUG", ""))


class set_debug:  # named as torch.set_grad_enabled, which is of its kind
    """Check values at once on every device, or where that costs nothing.

    The losses refuse class ids out of range and weights that are no weights, and warn of scores
    without spread. On the CPU they do so in the call itself, before anything is stored. On other
    devices that would make the host wait for the device, so the word comes at a later forward and
    says which one it is about ("at forward 17: ..."), or from `check_values()` of the loss. With
    debug on every device is waited for: slower, and the traceback shows the faulty batch.

    A function and a context manager; for the whole process. The environment variable
    PROXY_LOSSES_DEBUG=1 says the same from the start. Compiled code, transforms of torch.func and
    CUDA graphs being captured check no values either way.

    Args:
        mode: True for at once.

    Raises:
        TypeError: mode is not a bool.
        ValueError: from the import, PROXY_LOSSES_DEBUG is neither 0 nor 1.

    Example:
        >>> with set_debug(True):
        ...     SmoothAPLoss(1)(torch.tensor([[0.3], [0.1]]), torch.tensor([0, 1])) > 0.5
        tensor(False)
    """

    def __init__(self, mode: bool = True) -> None:
        global _debug
        check_flag("mode", mode)
        self._before, _debug = _debug, bool(mode)

    def __enter__(self) -> set_debug:
        """Debug as set, until the block ends."""
        return self

    def __exit__(self, *_: object) -> None:
        """As it was before."""
        global _debug
        _debug = self._before


def at_once(x: Tensor) -> bool:
    """Whether the values of x may be waited for."""
    return x.is_cpu or _debug


# -- later


class Answer(Protocol):
    """Numbers on their way from a device."""

    def arrived(self) -> bool:
        """Whether they are there."""

    def wait(self) -> None:
        """Until they are."""

    def numbers(self) -> list[float]:
        """What they are, once they are there."""


class Sent:
    """Numbers on their way into pinned memory."""

    def __init__(self, numbers: Sequence[Tensor]) -> None:
        device = numbers[0].device
        self._host = [
            torch.empty((), dtype=x.dtype, device="cpu", pin_memory=True).copy_(
                x.detach(), non_blocking=True
            )
            for x in numbers
        ]
        self._event = torch.Event(device)
        self._event.record(torch.accelerator.current_stream(device))

    def arrived(self) -> bool:
        """Whether the event behind the copies has happened."""
        return bool(self._event.query())

    def wait(self) -> None:
        """For the event."""
        self._event.synchronize()

    def numbers(self) -> list[float]:
        """As plain numbers."""
        return [x.item() for x in self._host]


def carrier(x: Tensor) -> Callable[[Sequence[Tensor]], Answer] | None:
    """How numbers leave the device of x; None for one that has no events, such as meta."""
    device = torch.accelerator.current_accelerator()
    return None if device is None or device.type != x.device.type else Sent


def silent(x: Tensor) -> bool:
    """Whether no value may be asked about or heard.

    While compiling, being traced or capturing a CUDA graph.
    """
    if torch.compiler.is_compiling() or torch._C._is_tracing():
        return True
    return x.is_cuda and torch.cuda.is_current_stream_capturing()


Judge: TypeAlias = Callable[[Mapping[str, float], str], Any]  # (answers, "at forward 17: ")


class Pending:
    """Answers that a module waits for, in the order of its forwards."""

    def __init__(self) -> None:
        self.forwards = 0
        self._waiting: deque[tuple[int, list[str], Answer, Judge]] = deque()

    def begin(self) -> None:
        """Count a forward, and judge what has arrived."""
        self.forwards += 1
        while self._waiting and self._waiting[0][2].arrived():
            self._judge_first()

    def settle(self) -> None:
        """Judge everything, however long it takes."""
        while self._waiting:
            self._waiting[0][2].wait()
            self._judge_first()

    def room(self, x: Tensor) -> bool:
        """Whether something can be asked about x."""
        return len(self._waiting) < RING and carrier(x) is not None

    def ask(self, x: Tensor, asked: Mapping[str, Tensor], judge: Judge) -> None:
        """Send for these [] tensors; what they are goes to judge at a later forward."""
        send = carrier(x)
        if asked and send is not None:
            answer = send(list(asked.values()))
            self._waiting.append((self.forwards, list(asked), answer, judge))

    def _judge_first(self) -> None:
        forward, names, answer, judge = self._waiting.popleft()
        said = dict(zip(names, answer.numbers(), strict=True))
        judge(said, f"at forward {forward}: ")
