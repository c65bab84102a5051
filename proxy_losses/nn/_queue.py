"""A `QueueState` kept in buffers, and its checkpoints.

Checkpoints are looked through before anything of them is loaded: a loss loads whole or not at all.
What lies outside the losses is torch's: `load_state_dict` of an outer module may have loaded other
parts before the error, and keys that are missing or too many it reports after loading the rest.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .. import _queue as q
from .._checks import is_labels
from .._lists import Batch
from ..distributed import all_reduce, rank_and_size
from ._batch import NeverNarrow

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


NOBODY = -1
ONES = ("sample_weight", "iid_mask")  # fields in which 1 or True stands for None


class MemoryQueue(NeverNarrow):
    """Remembers a `QueueState` between calls and in checkpoints."""

    _q_logits: Tensor
    _q_targets: Tensor
    _q_query_ids: Tensor

    def __init__(self, capacity: int, num_classes: int, ignore_index: int) -> None:
        super().__init__()
        self.ignore_index = ignore_index
        state = q.init_queue(capacity, num_classes, ignore_index=ignore_index)
        for field, buffer in _BUFFERS.items():
            # ignore_index is an argument of the constructor, not a state of the run.
            self.register_buffer(buffer, getattr(state, field), persistent=field != "ignore_index")
        self._ones: dict[str, tuple[weakref.ref[Tensor], int]] = {}
        self.see_ones(*ONES)
        self._q_owner: Tensor
        self.register_buffer("_q_owner", torch.full((), NOBODY), persistent=False)

    @property
    def state(self) -> q.QueueState:
        """The state; its tensors are the buffers themselves."""
        buffers = self._buffers
        return q.QueueState(*(buffers[b] for b in _BUFFERS.values()))  # type: ignore[arg-type]

    @property
    def dtype(self) -> torch.dtype:
        """Of the stored logits."""
        return self._q_logits.dtype

    @torch.no_grad()
    def store(self, state: q.QueueState) -> None:
        """Take over a new state."""
        for field, buffer in _BUFFERS.items():
            new, old = getattr(state, field), getattr(self, buffer)
            if new is old:
                continue
            if new.shape == old.shape:
                old.copy_(new)  # in place: compiled steps and CUDA graphs keep the address
            else:  # the first multi-label batch, or the first with query_ids
                setattr(self, buffer, new.clone())

    def ones(self) -> tuple[str, ...]:
        """Fields known to hold nothing but 1 or True: they did, and nothing was written since."""
        if torch.compiler.is_compiling():
            return ()
        now = ((f, getattr(self, _BUFFERS[f]), seen) for f, seen in self._ones.items())
        # By identity: weak references compare what they refer to.
        return tuple(
            f for f, x, (ref, version) in now if id(ref()) == id(x) and x._version == version
        )

    def see_ones(self, *fields: str) -> None:
        """Remember that these fields hold nothing but 1 or True."""
        for field in fields:
            buffer = getattr(self, _BUFFERS[field])
            if not buffer.is_inference():  # those count no versions
                self._ones[field] = weakref.ref(buffer), buffer._version

    def __getstate__(self) -> dict[str, Any]:
        """A copy has tensors of its own."""
        return {**self.__dict__, "_ones": {}}

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """What is known of the values stays known where they are moved."""
        ones = self.ones()
        moved = super()._apply(fn, recurse)
        self.see_ones(*ones)
        return moved

    def write(self, batch: Batch, where: Tensor | None = None) -> None:
        """Store a batch over the oldest rows, in place: what `enqueue` returns, to the bit.

        The weight of the batch has no gradient. where: [] bool, False stores nothing.
        """
        state, n = self.state, batch.logits.shape[0]
        if n == 0:
            return
        batch = batch._replace(logits=batch.logits.detach())
        room = q.match_queue(state, batch.targets, batch.query_ids)
        if room is not state:
            self.store(room)
            state = self.state
        drop, slots = q.next_slots(state, n)
        ones = self.ones()
        for field, buffer in state._asdict().items():
            if field in ("enqueued", "ignore_index") or not buffer.numel():
                continue
            rows = getattr(batch, field)
            if rows is not None:
                rows = rows[drop:] if drop else rows
                rows = rows.to(buffer.device, buffer.dtype)
            elif field in ones:
                continue
            else:
                default = q.NO_QUERY if field == "query_ids" else 1
                if where is None:
                    buffer.index_fill_(0, slots, default)
                    continue
                rows = buffer.new_full(slots.shape, default)
            if where is not None:
                rows = torch.where(where, rows, buffer.index_select(0, slots))
            buffer.index_copy_(0, slots, rows)
        if where is None:
            state.enqueued.copy_(q.counter_after(state, n))
        elif n < state.logits.shape[0]:
            state.enqueued.add_(where, alpha=n)
        else:
            after = q.counter_after(state, n)
            state.enqueued.copy_(torch.where(where, after, state.enqueued))

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
        self, logits: Tensor, targets: Tensor, is_iid: Tensor | None = None,
        sample_weight: Tensor | None = None,
    ) -> None:  # fmt: skip
        """Store rows by hand, as `enqueue` does."""
        self.store(
            q.enqueue(self.state, logits, targets, sample_weight=sample_weight, iid_mask=is_iid)
        )

    def reset(self) -> None:
        """Empty the queue."""
        self.store(q.reset_queue(self.state))
        if not torch.compiler.is_compiling():
            self.see_ones(*ONES)
        self._q_owner.fill_(NOBODY)

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
        if query_ids.numel() != state.query_ids.numel():
            self._q_query_ids = torch.zeros_like(query_ids, device=state.query_ids.device)
        targets = state_dict[prefix + "_q_targets"]
        if is_labels(targets) != is_labels(state.targets):
            self._q_targets = q.init_queue(
                *state.logits.shape, device=state.targets.device, multi_label=is_labels(targets)
            ).targets
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        self._tidy()

    @torch.no_grad()
    def _tidy(self) -> None:
        """Slots that are not filled hold ignore_index: then ids alone tell which rows count."""
        state = self.state
        if state.enqueued.is_meta or is_labels(state.targets):
            return
        rest = state.targets[int(state.enqueued) :]
        if (rest != state.ignore_index).any():  # rows of another ignore_index, or none at all
            self._q_targets = state.targets.clone()
            self._q_targets[int(state.enqueued) :] = state.ignore_index


# -- checkpoints


def refuse(module: nn.Module, problems: list[str]) -> None:
    """Raise `RuntimeError`, as `load_state_dict` does, if there are problems."""
    if problems:
        lines = "\n\t".join(problems)
        raise RuntimeError(
            f"Error(s) in loading state_dict for {type(module).__name__}, of which nothing was "
            f"loaded:\n\t{lines}"
        )


def queue_problems(queue: q.QueueState, saved: dict[str, Any], prefix: str) -> list[str]:
    """What keeps the saved rows from being loaded into this queue; none if there are none saved.

    Rows that 0.4 saved get their present names.
    """
    if prefix + "_q_groups" in saved:
        saved[prefix + "_q_query_ids"] = saved.pop(prefix + "_q_groups")
    capacity, classes = queue.logits.shape
    shapes: dict[str, list[tuple[int, ...]]] = {
        "_q_logits": [(capacity, classes)],
        "_q_targets": [(capacity,), (capacity, classes)],
        "_q_weight": [(capacity,)],
        "_q_iid": [(capacity,)],
        "_q_enqueued": [()],
        "_q_ptr": [(1,), ()],
        "_q_query_ids": [(0,), (capacity,)],
    }
    found = {name: saved[prefix + name] for name in shapes if prefix + name in saved}
    if not found:
        return []
    needed = {"_q_logits", "_q_targets"}
    needed |= {"_q_ptr"} if "_q_ptr" in found else {"_q_weight", "_q_iid", "_q_enqueued"}
    if missing := sorted(needed - set(found)):
        return [f"the queue is incomplete: {prefix} lacks {', '.join(missing)}"]
    for name, x in found.items():
        if not isinstance(x, Tensor):
            return [f"{prefix}{name} must be a tensor, got {type(x).__name__}"]
    rows = found["_q_logits"].shape
    if len(rows) == 2 and rows != (capacity, classes):
        return [
            f"size mismatch for {prefix}_q_logits: the checkpoint has queue_size={rows[0]} and "
            f"num_classes={rows[1]}, this module queue_size={capacity} and num_classes={classes}"
        ]
    problems = [
        f"size mismatch for {prefix}{name}: expected {' or '.join(str(list(s)) for s in allowed)}, "
        f"got {list(found[name].shape)}"
        for name, allowed in shapes.items()
        if name in found and found[name].shape not in allowed
    ]
    targets = found["_q_targets"]
    if targets.dim() == 2 and not problems and not is_labels(targets):
        problems.append(f"{prefix}_q_targets [N, C] must be bool, got {targets.dtype}")
    count = found["_q_ptr" if "_q_ptr" in found else "_q_enqueued"]
    if not problems and not count.is_meta and int(count) < 0:
        problems.append(f"{prefix} must have stored 0 rows or more, got {int(count)}")
    return problems


def number_problems(
    saved: Mapping[str, Any], key: str, check: Callable[[str, Any], None]
) -> list[str]:
    """Whether a saved tensor is one number that passes the check; nothing if it was not saved."""
    if key not in saved:
        return []
    x = saved[key]
    if isinstance(x, Tensor) and x.is_meta:
        return []
    if not isinstance(x, Tensor) or x.numel() != 1:
        return [f"{key} must be a tensor of one number, got {x!r:.80}"]
    return problems_of(check, key, x.item())


def problems_of(check: Callable[..., None], *args: Any) -> list[str]:
    try:
        check(*args)
    except (TypeError, ValueError) as error:
        return [str(error)]
    return []
