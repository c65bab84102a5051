"""State of rows under a seal: it tells rows from an average of rows, and who wrote last."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

from ._batch import readable
from ._state import StateModule

T = TypeVar("T", int, Tensor)
SEAL = [2**40, 2**21 - 9, 0x14057B7EF767814F]  # turn, factor and bits of the seal, below 2^63
AVERAGED = (
    "the memory queue of this loss was averaged or never filled: its rows, class ids and counter "
    "belong to no batch. An average (torch's AveragedModel, Lightning's WeightAveraging) must "
    "leave buffers alone, use_buffers=False; reset() or reset_queue() empties the queue of a copy"
)
CAST = (
    "the memory queue of this loss comes from a state dict that was cast to another dtype, as by "
    ".half(): its counter, its rows and the temperature are rounded. Save and load state_dict() as "
    "it is, or reset() the loss to start with an empty queue"
)


def seal_of(count: T) -> T:
    """A number of many digits, not linear in the counter: no average of two is that of a third."""
    turn, factor, bits = SEAL
    return count % turn * factor ^ bits


class SealedState(StateModule):
    """Rows in buffers, with their counter and its seal."""

    _q_enqueued: Tensor  # [] rows ever enqueued, as in `QueueState`
    _q_seal: Tensor  # [] a function of the counter that no average keeps
    _q_mark: Tensor  # [1] the seal as a floating number: some averages leave integers alone

    def __init__(self) -> None:
        super().__init__()
        self._left: dict[str, tuple[weakref.ref[Tensor], int]] = {}

    def add_seal(self) -> None:
        """Register the counter and its seal."""
        self.add_state("_q_enqueued", (), torch.int64)
        self.add_state("_q_seal", (), torch.int64)
        # Not []: torch.compile takes that for a Python number and forgets what is written.
        self.add_state("_q_mark", (1,), torch.float64)

    def reset(self) -> None:
        """Empty the queue."""
        self.fill()

    def _tells(self) -> bool:
        """Whether Python may ask for the value of a buffer: on the CPU, in eager code."""
        enqueued: Any = self._buffers["_q_enqueued"]
        return bool(enqueued.is_cpu) and readable(enqueued)

    def _sign(self) -> None:
        """Seal the counter that was just written."""
        if self._tells():
            self._count(int(self._q_enqueued))
            return
        self._q_seal.copy_(seal_of(self._q_enqueued))
        self._q_mark.copy_(self._q_seal)
        self._remember("_q_seal")

    def _count(self, count: int) -> None:
        """Write the counter and its seal."""
        seal = seal_of(count)
        for name, value in ("_q_enqueued", count), ("_q_seal", seal), ("_q_mark", float(seal)):
            self._buffers[name].fill_(value)  # type: ignore[union-attr]
        self._remember("_q_seal")

    def is_sound(self) -> bool:
        """False for an average of states and for memory that was never written; for the CPU."""
        found: dict[str, Any] = self._buffers
        seal, mark = int(found["_q_seal"]), float(found["_q_mark"])
        return seal == seal_of(int(found["_q_enqueued"])) and mark == float(seal)

    def fault(self) -> str:
        """Why it is not sound; for the CPU."""
        seal = torch.tensor([float(seal_of(int(self._q_enqueued)))], dtype=torch.float64)
        narrow = (torch.float32, torch.bfloat16, torch.float16)  # of which the last has inf
        rounded = any(torch.equal(seal.to(of).double(), self._q_mark) for of in narrow)
        return CAST if rounded else AVERAGED

    def doubts(self) -> Tensor | None:
        """[] bool, `is_sound` where Python may not ask; None where it is known."""
        if self._knows("_q_seal") or self._tells():
            return None
        sealed = self._q_seal == seal_of(self._q_enqueued)
        return sealed & (self._q_mark[0] == self._q_seal.to(self._q_mark.dtype))

    # -- what was left, and stayed so

    def _remember(self, *names: str) -> None:
        if torch.compiler.is_compiling():
            return
        for name in names:
            buffer = self._buffers[name]
            assert buffer is not None
            self._left[name] = weakref.ref(buffer), buffer._version

    def _stayed(self, name: str) -> bool:
        """Whether nobody wrote to the buffer since it was remembered."""
        ref, version = self._left.get(name, (None, 0))
        buffer = self._buffers[name]
        # By identity: weak references compare what they refer to.
        return ref is not None and ref() is buffer and buffer._version == version  # type: ignore[union-attr]

    def _knows(self, name: str) -> bool:
        """`_stayed`, which compiled code must not ask."""
        return not torch.compiler.is_compiling() and self._stayed(name)

    def __getstate__(self) -> dict[str, Any]:
        """A copy has tensors of its own."""
        return {**self.__dict__, "_left": {}}

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """What is known of the values stays known where they are moved."""
        stayed = [name for name in self._left if self._stayed(name)]
        moved = super()._apply(fn, recurse)
        self._remember(*stayed)
        return moved
