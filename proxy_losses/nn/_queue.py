"""A `QueueState` kept in buffers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .. import _queue as q
from .._checks import is_labels
from ..distributed import all_reduce, rank_and_size
from ._saved import queue_problems, refuse

# Buffer names are those of imbalanced-losses, so that its checkpoints load.
_BUFFERS = {
    "logits": "_q_logits",
    "targets": "_q_targets",
    "sample_weight": "_q_weight",
    "iid_mask": "_q_iid",
    "enqueued": "_q_enqueued",
    "ignore_index": "_q_ignore_index",
    "query_ids": "_q_query_ids",
}


def never_narrow(fn: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """Let `nn.Module._apply` move tensors, but not round them to a smaller dtype (`half()`)."""

    def apply(t: Tensor) -> Tensor:
        moved = fn(t)
        return t.to(moved.device) if moved.element_size() < t.element_size() else moved

    return apply


NOBODY = -1


class MemoryQueue(nn.Module):
    """Remembers a `QueueState` between calls and in checkpoints."""

    _q_targets: Tensor
    _q_query_ids: Tensor

    def __init__(self, capacity: int, num_classes: int, ignore_index: int) -> None:
        super().__init__()
        state = q.init_queue(capacity, num_classes, ignore_index=ignore_index)
        for field, buffer in _BUFFERS.items():
            # ignore_index is an argument of the constructor, not a state of the run.
            self.register_buffer(buffer, getattr(state, field), persistent=field != "ignore_index")
        self._q_owner: Tensor
        self.register_buffer("_q_owner", torch.full((), NOBODY), persistent=False)

    @property
    def state(self) -> q.QueueState:
        """The state; its tensors are the buffers themselves."""
        return q.QueueState(**{f: getattr(self, b) for f, b in _BUFFERS.items()})

    @torch.no_grad()
    def store(self, state: q.QueueState) -> None:
        """Take over a new state."""
        for field, buffer in _BUFFERS.items():
            new, old = getattr(state, field), getattr(self, buffer)
            if new.shape == old.shape:
                old.copy_(new)  # in place: compiled steps and CUDA graphs keep the address
            else:  # the first multi-label batch, or the first with query_ids
                setattr(self, buffer, new.clone())

    def check_owner(self, group: str) -> None:
        """Raise on every process if the rows of one were replaced by those of another."""
        rank = rank_and_size(group)[0]
        foreign = (self._q_owner != NOBODY) & (self._q_owner != rank)
        if all_reduce(foreign, "max", group):
            raise RuntimeError(
                "the queue of distributed='shard' holds the rows of another process, as after a "
                "broadcast of buffers: keep the loss outside of DistributedDataParallel, or pass "
                "it broadcast_buffers=False"
            )
        self._q_owner.fill_(rank)

    def enqueue(
        self,
        logits: Tensor,
        targets: Tensor,
        is_iid: Tensor | None = None,
        sample_weight: Tensor | None = None,
    ) -> None:
        """Store rows by hand, as `enqueue` does."""
        self.store(
            q.enqueue(self.state, logits, targets, sample_weight=sample_weight, iid_mask=is_iid)
        )

    def reset(self) -> None:
        """Empty the queue."""
        self.store(q.reset_queue(self.state))
        self._q_owner.fill_(NOBODY)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> MemoryQueue:
        super()._apply(never_narrow(fn), recurse)  # type: ignore[no-untyped-call]
        return self

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        """Read checkpoints of the published packages too, and those of a multi-label queue."""
        state = self.state
        refuse(self, queue_problems(state, state_dict, prefix))
        if prefix + "_q_logits" not in state_dict:  # torch says what is missing
            super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
            return
        ptr = state_dict.pop(prefix + "_q_ptr", None)
        if ptr is not None:
            # Their empty slots hold ignore_index, so the queue may count as filled.
            state_dict[prefix + "_q_enqueued"] = ptr.reshape(()) + state.logits.shape[0]
            state_dict.setdefault(prefix + "_q_weight", torch.ones_like(state.sample_weight))
            state_dict.setdefault(prefix + "_q_iid", torch.ones_like(state.iid_mask))
        query_ids = state_dict.setdefault(prefix + "_q_query_ids", q.reset_queue(state).query_ids)
        if query_ids.numel() != state.query_ids.numel() and 0 in (
            query_ids.numel(),
            state.query_ids.numel(),
        ):
            self._q_query_ids = torch.zeros_like(query_ids, device=state.query_ids.device)
        targets = state_dict.get(prefix + "_q_targets")
        if targets is not None and is_labels(targets) != is_labels(state.targets):
            self._q_targets = q.init_queue(
                *state.logits.shape, device=state.targets.device, multi_label=is_labels(targets)
            ).targets
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
