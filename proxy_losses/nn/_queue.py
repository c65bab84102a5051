"""A `QueueState` kept in buffers, and its checkpoints.

Checkpoints are looked through before anything of them is loaded: a loss loads whole or not at all.
What lies outside the losses is torch's: `load_state_dict` of an outer module may have loaded other
parts before the error, and keys that are missing or too many it reports after loading the rest.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .. import _queue as q
from .._checks import is_labels
from .._lists import Batch
from ..distributed import all_reduce, rank_and_size
from ._batch import readable
from ._ring import apart, count_rows, put_rows
from ._seal import SealedState, seal_of

# Names of buffers are those of imbalanced-losses, so that its checkpoints load. Flags are bytes:
# torch averages no bool.
_BUFFERS = {
    "logits": "_q_logits",
    "sample_weight": "_q_weight",
    "iid_mask": "_q_iid",
    "enqueued": "_q_enqueued",
    "query_ids": "_q_query_ids",
    "label_mask": "_q_label_mask",
    "gains": "_q_gains",
}
_IDS, _LABELS = "_q_targets", "_q_labels"
ROWS = {f: b for f, b in _BUFFERS.items() if f != "enqueued"}  # fields with a row for each slot
# What stands for None.
PLAIN = {"sample_weight": 1, "iid_mask": 1, "query_ids": q.NO_QUERY, "label_mask": 1, "gains": 1}

NOBODY = -1
ONES = ("sample_weight", "iid_mask", "label_mask", "gains")  # where it is 1 or True

OTHER_KIND = "this queue stores multi-label targets: expected [N, C] labels, got [N] class ids"


class MemoryQueue(SealedState):
    """Remembers a `QueueState` between calls and in checkpoints.

    Class ids and labels have a buffer each, as far as `multi_label` leaves open which will come:
    the rows that count are those of the kind stored last, and a queue of the other kind starts
    anew. No batch changes the shape of a buffer.
    """

    _q_logits: Tensor
    _q_targets: Tensor  # [capacity] class ids; ignore_index where there is none
    _q_labels: Tensor  # [capacity, C] 0 or 1
    _q_multi_label: Tensor  # [] 1 when the rows are those of _q_labels
    _q_weight: Tensor
    _q_iid: Tensor  # [capacity] 0 or 1
    _q_query_ids: Tensor
    _q_label_mask: Tensor  # [capacity, C] 0 or 1
    _q_gains: Tensor  # [capacity, C] of the positives; for metrics that read gains alone
    _q_owner: Tensor  # [] the process whose rows they are, see `check_owner`

    def __init__(
        self, capacity: int, num_classes: int, ignore_index: int, multi_label: bool | None = None,
        *, gains: bool = False,
    ) -> None:  # fmt: skip
        super().__init__()
        self.ignore_index = ignore_index
        self.multi_label = False if num_classes == 1 else multi_label
        self._flags: dict[str, Tensor] = {}
        with torch.inference_mode(False):  # a constant, made once
            self._ignored = torch.full((), ignore_index, dtype=torch.int64, device="cpu")
        rows, number = (capacity,), ()
        self.add_state("_q_logits", (capacity, num_classes), torch.float32)
        if self.multi_label is not True:
            self.add_state(_IDS, rows, torch.int64)
        if self.multi_label is not False:
            self.add_state(_LABELS, (capacity, num_classes), torch.uint8)
        if self.multi_label is None:
            self.add_state("_q_multi_label", number, torch.uint8)
        self.add_state("_q_weight", rows, torch.float32)
        self.add_state("_q_iid", rows, torch.uint8)
        self.add_state("_q_query_ids", rows, torch.int64)
        self.add_state("_q_label_mask", (capacity, num_classes), torch.uint8)
        if gains:
            self.add_state("_q_gains", (capacity, num_classes), torch.float32)
        self.rows = {f: name for f, name in ROWS.items() if name in self._buffers}
        self.add_state("_q_owner", number, torch.int64)
        self.add_seal()
        self.fill()

    @torch.no_grad()
    def fill(self) -> None:
        """Empty the queue."""
        for name, value in self._empty().items():
            self._buffers[name].fill_(value)  # type: ignore[union-attr]
        self.see_ones(*(field for field in PLAIN if _BUFFERS[field] in self._buffers))
        self._remember("_q_seal")

    def _empty(self) -> dict[str, float]:
        """Values of the buffers of an empty queue."""
        values: dict[str, float] = dict.fromkeys((_LABELS, "_q_multi_label", "_q_logits"), 0)
        values |= {_IDS: self.ignore_index, "_q_owner": NOBODY, "_q_enqueued": 0}
        values |= {"_q_seal": seal_of(0), "_q_mark": float(seal_of(0))}
        values |= {ROWS[field]: value for field, value in PLAIN.items()}
        return {name: value for name, value in values.items() if name in self._buffers}

    # -- what is stored

    @property
    def state(self) -> q.QueueState:
        """The state as the targets stored last see it; asking for it may wait for the device."""
        labels = self.multi_label
        if labels is None:
            labels = not self._q_multi_label.is_meta and bool(self._q_multi_label)
        return self._seen_by(labels, readable(self._q_enqueued))

    def view(self, targets: Tensor) -> q.QueueState:
        """The state as a batch with such targets sees it: empty if the rows are of another kind.

        Raises:
            ValueError: class ids, and the rows have labels (on the CPU in eager code; elsewhere
                those rows do not count), or `multi_label` says otherwise.
            RuntimeError: the rows are no rows (compiled code does not ask).
        """
        labels = is_labels(targets)
        check_kind(self.multi_label, targets)
        plain = readable(self._q_enqueued)
        state = self._seen_by(labels, plain)
        if not (plain and state.enqueued.is_cpu):
            if self.multi_label is None:
                mine = self._q_multi_label == int(labels)
                state = state._replace(enqueued=torch.where(mine, self._q_enqueued, 0))
            return state
        if not self.is_sound():
            raise RuntimeError(self.fault())
        if self._turns(labels):
            if not labels:
                raise ValueError(OTHER_KIND)
            state = state._replace(enqueued=torch.zeros_like(self._q_enqueued))
        return state

    def _seen_by(self, labels: bool, plain: bool) -> q.QueueState:
        found: dict[str, Any] = {field: self._buffers[name] for field, name in self.rows.items()}
        found["enqueued"] = self._q_enqueued
        # In compiled code and under transforms bytes are no flags by another name.
        flags = self._as_flags if plain else lambda name: self._buffers[name].bool()  # type: ignore[union-attr]
        found["targets"] = flags(_LABELS) if labels else self._buffers[_IDS]
        found["iid_mask"], found["label_mask"] = flags("_q_iid"), flags("_q_label_mask")
        found["ignore_index"], enqueued = self._ignored, found["enqueued"]
        if enqueued.device != self._ignored.device:
            found["ignore_index"] = torch.full_like(enqueued, self.ignore_index)
        return q.QueueState(**found)

    def _as_flags(self, name: str) -> Tensor:
        """A buffer of bytes as bools, in the same memory; made once."""
        made, buffer = self._flags.get(name), self._buffers[name]
        assert buffer is not None
        if made is None or made._base is not buffer or made.data_ptr() != buffer.data_ptr():
            made = self._flags[name] = buffer.view(torch.bool)
        return made

    def _turns(self, labels: bool) -> bool:
        """Whether rows of this kind would be the first of their kind."""
        return self.multi_label is None and int(self._q_multi_label) != labels

    @property
    def dtype(self) -> torch.dtype:
        """Of the stored logits."""
        return self._q_logits.dtype

    # -- storing

    @torch.no_grad()
    def store(
        self, state: q.QueueState, batch: Batch | None = None, where: Tensor | None = None
    ) -> None:
        """Take over what `enqueue` made of `view` and of the batch; False stores nothing."""
        labels = is_labels(state.targets)
        plain = () if batch is None else self.plain()
        for field, name in self.rows.items():
            if field not in plain or getattr(batch, field) is not None:
                self._buffers[name].copy_(getattr(state, field))  # type: ignore[union-attr]
        (self._q_labels if labels else self._q_targets).copy_(state.targets)
        enqueued = state.enqueued
        if self.multi_label is None:
            if batch is not None and where is not None:  # what is not stored turns nothing
                where = where & (torch.zeros_like(enqueued) + batch.logits.shape[0] > 0)
                enqueued = torch.where(where, enqueued, self._q_enqueued)
            self._take_kind(labels, where)
        self._q_enqueued.copy_(enqueued)
        self._sign()

    def _take_kind(self, labels: bool, where: Tensor | None) -> None:
        """From now on the rows are labels, or class ids; False: what they were."""
        if self.multi_label is not None:
            return
        if where is None:
            self._q_multi_label.fill_(labels)
        else:
            kind = torch.where(where, int(labels), self._q_multi_label)
            self._q_multi_label.copy_(kind)
        if labels:  # ids that were replaced must not come back
            ignored = torch.full_like(self._q_targets, self.ignore_index)
            if where is not None:
                ignored = torch.where(where, ignored, self._q_targets)
            self._q_targets.copy_(ignored)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        moved = super()._apply(fn, recurse)
        self._flags = {}
        self._ignored = torch.full_like(self._q_enqueued, self.ignore_index)
        return moved

    def __getstate__(self) -> dict[str, Any]:
        """A copy has tensors of its own."""
        return {**super().__getstate__(), "_flags": {}}

    def write(self, batch: Batch, where: Tensor | None = None) -> None:
        """Store a batch over the oldest rows, in place: what `enqueue` returns, to the bit.

        The weight of the batch has no gradient. where: [] bool, for what Python may not ask; False
        stores nothing. Without it for the CPU, in eager code.
        """
        n = batch.logits.shape[0]
        if n == 0:
            return
        labels = is_labels(batch.targets)
        if where is None:
            self._write_now(batch, labels)
            return
        count = self.view(batch.targets).enqueued
        for field, buffer in self._to_write(batch, labels):
            put_rows(buffer, getattr(batch, field), PLAIN.get(field, 0), n, count, where)
        sealed = self._q_enqueued, self._q_seal, self._q_mark
        count_rows(*sealed, count, where, n, self._q_logits.shape[0])
        self._remember("_q_seal")
        self._take_kind(labels, where)

    def _write_now(self, batch: Batch, labels: bool) -> None:
        """`write` where Python knows the slots: a run of them, or two."""
        if self._turns(labels):
            self.fill()
            self._q_multi_label.fill_(labels)
        capacity, n = self._q_logits.shape[0], batch.logits.shape[0]
        count = int(self._q_enqueued)
        drop, start = (n - capacity, 0) if n >= capacity else (0, count % capacity)
        turn = drop + capacity - start  # the batch's row that comes into slot 0
        for field, buffer in self._to_write(batch, labels):
            rows: Any = getattr(batch, field)
            given = rows is not None
            rows = apart(rows, buffer) if given else PLAIN[field]
            first = rows[drop:turn] if given and (drop or turn < n) else rows
            buffer[start : start + n - drop] = first
            if turn < n:
                buffer[: n - turn] = rows[turn:] if given else rows
        self._count(q.counter_after(count, n, capacity))

    def _to_write(self, batch: Batch, labels: bool) -> Iterator[tuple[str, Tensor]]:
        """Fields that the batch changes, and their buffers."""
        for field, name in (*self.rows.items(), ("targets", _LABELS if labels else _IDS)):
            if getattr(batch, field) is not None or not self._knows(name):
                yield field, self._buffers[name]  # type: ignore[misc]

    def enqueue(
        self, logits: Tensor, targets: Tensor, is_iid: Tensor | None = None,
        sample_weight: Tensor | None = None,
    ) -> None:  # fmt: skip
        """Store rows by hand, as `enqueue` does."""
        state = self.view(targets)
        self.store(q.enqueue(state, logits, targets, sample_weight=sample_weight, iid_mask=is_iid))

    # -- what is known without asking

    def plain(self) -> tuple[str, ...]:
        """Fields known to hold nothing but what stands for None: they did, and stayed as is."""
        if torch.compiler.is_compiling():
            return ()
        return tuple(
            [field for field in PLAIN if field not in self.rows or self._stayed(ROWS[field])]
        )

    def ones(self) -> tuple[str, ...]:
        """Those of `plain` in which 1 or True stands for None."""
        return tuple(field for field in self.plain() if field in ONES)

    def see_ones(self, *fields: str) -> None:
        """Remember that these fields hold nothing but what stands for None."""
        self._remember(*(_BUFFERS[field] for field in fields))

    # -- whose they are

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

    # -- loading

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        """Read checkpoints of the published packages and of earlier versions too."""
        refuse(self, queue_problems(self, state_dict, prefix))
        found = prefix + "_q_logits" in state_dict
        if found:  # else torch says what is missing
            self._complete(state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        if found:
            self._q_owner.fill_(NOBODY)
            self._tidy()

    def _complete(self, saved: dict[str, Any], prefix: str) -> None:
        """Give what was saved the buffers of this queue, no more and no fewer."""

        def give(name: str, value: float | Tensor) -> None:
            """Unless it was saved."""
            if prefix + name in saved or name not in self._buffers:
                return
            like = self._buffers[name]
            x = torch.full(like.shape, 0, dtype=like.dtype, device=logits.device)  # type: ignore[union-attr]
            saved[prefix + name] = x.copy_(value) if isinstance(value, Tensor) else x.fill_(value)

        logits = saved[prefix + "_q_logits"]
        ptr = saved.pop(prefix + "_q_ptr", None)
        if ptr is not None:  # their empty slots hold ignore_index, so the queue may count as filled
            saved[prefix + "_q_enqueued"] = ptr.reshape(()) + logits.shape[0]
        for name in ("_q_query_ids", "_q_label_mask"):  # no room until a batch brought some
            if prefix + name in saved and not saved[prefix + name].numel():
                del saved[prefix + name]
        labels = _saved_kind(saved, prefix)
        targets = saved.get(prefix + _IDS)
        if targets is not None and targets.dim() == 2:
            saved[prefix + _LABELS] = saved.pop(prefix + _IDS)
        for name in (_IDS, _LABELS, "_q_multi_label", "_q_gains"):
            if name not in self._buffers:
                saved.pop(prefix + name, None)
        give("_q_seal", seal_of(saved[prefix + "_q_enqueued"].to(torch.int64)))
        give("_q_mark", saved[prefix + "_q_seal"])
        for name, value in {**self._empty(), "_q_multi_label": int(labels)}.items():
            give(name, value)

    @torch.no_grad()
    def _tidy(self) -> None:
        """Slots that are not filled hold ignore_index: then ids alone tell which rows count."""
        if _IDS not in self._buffers or self._q_enqueued.is_meta or not self.is_sound():
            return
        self._q_targets[int(self._q_enqueued) :] = self.ignore_index


def check_kind(multi_label: bool | None, targets: Tensor) -> None:
    """Raise `ValueError` unless the targets are of the kind that the constructor was told."""
    if multi_label is None or multi_label == is_labels(targets):
        return
    if multi_label:
        raise ValueError(f"multi_label=True: expected [N, C] labels, got {list(targets.shape)}")
    raise ValueError(f"multi_label=False: expected [N] class ids, got {list(targets.shape)}")


# -- checkpoints


def refuse(module: nn.Module, problems: list[str]) -> None:
    """Raise `RuntimeError`, as `load_state_dict` does, if there are problems."""
    if problems:
        lines = "\n\t".join(problems)
        raise RuntimeError(
            f"Error(s) in loading state_dict for {type(module).__name__}, of which nothing was "
            f"loaded:\n\t{lines}"
        )


def _saved_kind(saved: dict[str, Any], prefix: str) -> bool:
    """Whether the saved rows have labels instead of class ids."""
    kind, targets = saved.get(prefix + "_q_multi_label"), saved.get(prefix + _IDS)
    if kind is not None and not kind.is_meta:
        return bool(kind)
    return targets is None or targets.dim() == 2


def queue_problems(queue: MemoryQueue, saved: dict[str, Any], prefix: str) -> list[str]:
    """What keeps the saved rows from being loaded into this queue; none if there are none saved.

    Rows that 0.4 saved get their present names.
    """
    if prefix + "_q_groups" in saved:
        saved[prefix + "_q_query_ids"] = saved.pop(prefix + "_q_groups")
    capacity, classes = queue._q_logits.shape
    shapes: dict[str, list[tuple[int, ...]]] = {
        "_q_logits": [(capacity, classes)],
        _IDS: [(capacity,), (capacity, classes)],
        _LABELS: [(capacity, classes)],
        "_q_multi_label": [()],
        "_q_weight": [(capacity,)],
        "_q_iid": [(capacity,)],
        "_q_enqueued": [()],
        "_q_ptr": [(1,), ()],
        "_q_query_ids": [(0,), (capacity,)],
        "_q_label_mask": [(0, classes), (capacity, classes)],
        "_q_gains": [(capacity, classes)],
        "_q_owner": [()],
        "_q_seal": [()],
        "_q_mark": [(1,)],
    }
    found = {name: saved[prefix + name] for name in shapes if prefix + name in saved}
    if not found:
        return []
    needed = {"_q_logits", _LABELS if _LABELS in found else _IDS}
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
    targets = found.get(_IDS)
    if targets is not None and targets.dim() == 2 and not problems and not is_labels(targets):
        problems.append(f"{prefix}_q_targets [N, C] must be bool, got {targets.dtype}")
    count = found["_q_ptr" if "_q_ptr" in found else "_q_enqueued"]
    if not problems and not count.is_meta and int(count) < 0:
        problems.append(f"{prefix} must have stored 0 rows or more, got {int(count)}")
    labels = _saved_kind(saved, prefix)
    some = not problems and not count.is_meta and ("_q_ptr" in found or int(count) > 0)
    if some and queue.multi_label not in (None, labels):
        kinds = ("class ids", "labels") if queue.multi_label else ("labels", "class ids")
        problems.append(
            f"{prefix} holds rows with {kinds[0]}, and multi_label={queue.multi_label} takes rows "
            f"with {kinds[1]}"
        )
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
