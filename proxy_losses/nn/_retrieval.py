"""The retrieval loss as a module: its memory in buffers, and what a step checks and stores."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .. import _numerics as num
from .. import _retrieval as r
from .._checks import (
    MAX_WEIGHT,
    check_choice,
    check_flag,
    check_int,
    check_temperature,
    warn_user,
)
from .._lists import SIMILARITIES
from .._metrics._record import Found
from ..distributed import default_group, default_rank, group_name
from . import _late
from ._batch import ScheduledLoss, are_gains, readable
from ._queue import number_problems, refuse
from ._ring import count_rows, put_rows
from ._seal import AVERAGED, SealedState, seal_of
from ._state import guard

EMBEDDINGS, LABELS, ROW_IDS = "_q_embeddings", "_q_labels", "_q_row_ids"


class EmbeddingQueue(SealedState):
    """Remembers a `MemoryState` between calls and in checkpoints; rows are written in place."""

    _q_embeddings: Tensor  # [capacity, D] float32
    _q_labels: Tensor  # [capacity] int64, or [capacity, L] 0 or 1: torch averages no bool
    _q_row_ids: Tensor  # [capacity] int64

    def __init__(self, capacity: int, width: int, num_labels: int | None) -> None:
        super().__init__()
        self.multi_label = num_labels is not None
        self.add_state(EMBEDDINGS, (capacity, width), torch.float32)
        if num_labels is None:
            self.add_state(LABELS, (capacity,), torch.int64)
        else:
            self.add_state(LABELS, (capacity, num_labels), torch.uint8)
        self.add_state(ROW_IDS, (capacity,), torch.int64)
        self.add_seal()
        self.fill()

    @torch.no_grad()
    def fill(self) -> None:
        """Empty the memory."""
        empty = {EMBEDDINGS: 0, LABELS: 0, ROW_IDS: r.NO_ROW, "_q_enqueued": 0}
        empty |= {"_q_seal": seal_of(0), "_q_mark": seal_of(0)}
        for name, value in empty.items():
            self._buffers[name].fill_(value)  # type: ignore[union-attr]
        self._remember("_q_seal")

    @property
    def state(self) -> r.MemoryState:
        """The rows, and how many were stored.

        Raises:
            RuntimeError: the rows are no rows (compiled code does not ask).
        """
        if self._tells() and not self.is_sound():
            raise RuntimeError(self.fault())
        labels = self._q_labels.bool() if self.multi_label else self._q_labels
        return r.MemoryState(self._q_embeddings, labels, self._q_row_ids, self._q_enqueued)

    @torch.no_grad()
    def write(self, state: r.MemoryState, rows: r.Rows, where: Tensor) -> None:
        """Store rows over the oldest: what `enqueue_embeddings` makes of the state, to the bit."""
        assert rows.labels is not None
        n, into = rows.embeddings.shape[0], (self._q_embeddings, self._q_labels, self._q_row_ids)
        if num.plainly_eager():
            given = rows.embeddings, rows.labels, rows.known_ids()
            for buffer, new in zip(into, given, strict=True):
                put_rows(buffer, new, 0, n, state.enqueued, where)
            sealed = self._q_enqueued, self._q_seal, self._q_mark
            count_rows(*sealed, state.enqueued, where, n, self._q_embeddings.shape[0])
            self._remember("_q_seal")
            return
        *fields, enqueued = r.put_rows(state, rows, where)
        for buffer, field in zip(into, fields, strict=True):
            buffer.copy_(field)
        self._q_enqueued.copy_(enqueued)
        self._sign()

    def problems_with(self, saved: Mapping[str, Any], prefix: str) -> list[str]:
        """What keeps saved rows from being loaded; none if there are none saved."""
        found = {name: saved.get(prefix + name) for name in self._buffers}
        if all(x is None for x in found.values()):
            return []
        problems = []
        for name, mine in self._buffers.items():
            x = found[name]
            if not isinstance(x, Tensor):
                got = "none" if x is None else type(x).__name__
                problems.append(f"{prefix}{name} must be a tensor, got {got}")
            elif mine is not None and x.shape != mine.shape:
                problems.append(
                    f"size mismatch for {prefix}{name}: expected {list(mine.shape)}, "
                    f"got {list(x.shape)}; the checkpoint has another memory_size, embedding_dim "
                    "or num_labels"
                )
        return problems


class RetrievalLoss(ScheduledLoss):
    r"""1 - a ranking metric of every row of a batch as a query among the others and a memory.

    Called with embeddings [N, D] and labels [N], see `RetrievalLoss.forward`; formula, limits and
    what it takes are those of `retrieval_loss`. Any number of rows per class, in any order; rows
    without a positive are references alone. To decay the temperature, and to start from another
    loss of embeddings and labels, see `LossWarmupWrapper`.

    Args:
        metric: "ap", "recall_at_k", "precision_at_k", "mrr", "ndcg", "auroc", "recall_at_quantile",
            "recall_at_precision" or "partial_auc", see `retrieval_loss`.
        memory_size: past references that are ranked too, 0 for none. They get no gradient. With
            M references in all a step takes N x M similarities.
        embedding_dim: D, needed with memory_size > 0.
        num_labels: L, where labels are [N, L] bool; needed for these with memory_size > 0.
        temperature: in units of the similarity, > 0, see tau of `retrieval_loss`; smaller is
            closer to the metric, with sharper gradients.
        similarity: "cosine" or "dot".
        ignore_index: class id of rows that are neither queries nor references.
        reduction: "mean" over the queries that count, or "none" for [N], those of this process,
            with NaN where one does not.
        update_memory_in_eval: store rows in eval mode too.
        gather_distributed: rank the rows of this process among those of all, and store all: None
            and True when there are several processes, False never. The mean is over the queries
            of all, and the gradient that DistributedDataParallel averages is that of one process.
        **settings: options of the metric, such as k.

    Raises:
        ValueError, TypeError: an argument out of range, an option that the metric does not have.

    Example:
        >>> loss_fn = RetrievalLoss("recall_at_k", k=1, memory_size=512, embedding_dim=2)
        >>> x = torch.tensor([[1.0, 0.0], [0.8, 0.6], [0.0, 1.0]], requires_grad=True)
        >>> loss_fn(x, torch.tensor([0, 1, 1])).item() > 0.4
        True
    """

    references = ("ref_embeddings", "ref_labels", "ref_row_ids")

    def __init__(
        self, metric: str = "ap", *, memory_size: int = 0, embedding_dim: int | None = None,
        num_labels: int | None = None, temperature: float = 0.05, similarity: str = "cosine",
        ignore_index: int = -100, reduction: str = "mean", update_memory_in_eval: bool = False,
        gather_distributed: bool | None = None, **settings: Any,
    ) -> None:  # fmt: skip
        super().__init__()
        self.settings = r.choose_metric(metric, settings, type(self).__name__)[1]
        check_int("memory_size", memory_size, 0)
        if embedding_dim is not None:
            check_int("embedding_dim", embedding_dim, 1)
        elif memory_size:
            raise ValueError(
                f"memory_size={memory_size} needs embedding_dim=, the width D of the embeddings"
            )
        if num_labels is not None:
            check_int("num_labels", num_labels, 1)
        check_choice("similarity", similarity, SIMILARITIES)
        check_int("ignore_index", ignore_index)
        check_choice("reduction", reduction, r.REDUCTIONS)
        check_flag("update_memory_in_eval", update_memory_in_eval)
        check_flag("gather_distributed", gather_distributed, optional=True)
        self.metric, self.similarity, self.reduction = metric, similarity, reduction
        self.memory_size, self.embedding_dim = memory_size, embedding_dim
        self.num_labels, self.ignore_index = num_labels, ignore_index
        self.update_memory_in_eval = update_memory_in_eval
        self.gather_distributed = gather_distributed
        self.add_temperature(temperature)
        self._queue: EmbeddingQueue | None = None
        if memory_size:
            assert embedding_dim is not None
            self._queue = EmbeddingQueue(memory_size, embedding_dim, num_labels)
        self.fill()

    def extra_repr(self) -> str:
        """What was chosen."""
        return f"{self.metric!r}, memory_size={self.memory_size}, similarity={self.similarity!r}"

    @property
    def memory(self) -> r.MemoryState | None:
        """The stored rows, which share their storage with the module; None without memory."""
        return None if self._queue is None else self._queue.state

    def forward(
        self, embeddings: Tensor, labels: Tensor, ref_embeddings: Tensor | None = None,
        ref_labels: Tensor | None = None, *, row_ids: Tensor | None = None,
        ref_row_ids: Tensor | None = None, store: bool = True,
    ) -> Tensor:  # fmt: skip
        """Loss of the batch against itself and the memory; in training, the batch is then stored.

        Args:
            embeddings: [N, D] floating, the queries.
            labels: [N] integers or [N, L] bool; with ref_embeddings and without ref_labels the
                relevance [N, M], bool or floating >= 0. (A metric that knows no grades takes what
                is > 0 as a positive.)
            ref_embeddings: [M, D] floating, references with a gradient; None: the other rows.
            ref_labels: [M] integers or [M, L] bool, as labels are.
            row_ids: [N] integer ids of the rows in the data, or None; a reference with the id of
                the query is left out. Give them when the memory is longer than an epoch.
            ref_row_ids: [M] integer ids of given references.
            store: False leaves the memory as it is, for all calls on a batch but the last.

        Returns:
            [] loss, or [N] for reduction "none"; exactly 0 with zero gradient when no query
            counts, NaN when a row that counts is not finite, which is not stored then.

        Raises:
            TypeError, ValueError: wrong dtypes, shapes or values; nothing is stored then. A
                negative or non-finite relevance is found at once on the CPU, elsewhere at a later
                forward, see `set_debug`.
            RuntimeError: a backward calls this again, as torch.utils.checkpoint does, and rows
                would be stored twice (compiled code does not ask).

        Warns:
            UserWarning: once each, when rows are stored in training mode while gradients are
                disabled, and when a batch with a finite loss is not stored because a float64
                embedding is too large for float32.
        """
        check_flag("store", store)
        call = r.read_call(embeddings, labels, ref_embeddings, ref_labels, row_ids, ref_row_ids)
        if self.embedding_dim is not None and embeddings.shape[1] != self.embedding_dim:
            raise ValueError(
                f"embeddings must be [N, embedding_dim={self.embedding_dim}], "
                f"got {list(embeddings.shape)}"
            )
        told = call.relevance is None
        if self.num_labels is not None and told and labels.shape[1:] != (self.num_labels,):
            raise ValueError(
                f"labels must be [N, num_labels={self.num_labels}] bool, "
                f"got {list(labels.shape)} of {labels.dtype}"
            )
        self._begin(embeddings)
        queue = self._queue
        memory = None if queue is None else queue.state
        stores = memory is not None and store and (self.training or self.update_memory_in_eval)
        if stores:
            self._refuse_recompute()
        if memory is not None:
            r.check_call_fits(memory, call)
        if call.relevance is not None:
            self._look(call.relevance)
        name = group_name(default_group()) if self._gathers() else ""
        if name:
            call = self._with_all(call)
        found = r.rank(
            call, memory, r.BY_NAME[self.metric], self.settings, self._tau,
            similarity=self.similarity, ignore_index=self.ignore_index,
        )  # fmt: skip
        if queue is not None and (sound := queue.doubts()) is not None:
            found = found._replace(value=guard(found.value, sound, AVERAGED))
        loss = r.reduce_queries(found, self.reduction, name)
        if memory is not None and stores:
            self._store(memory, call.refs, found)
        return loss

    def _with_all(self, call: r.Call) -> r.Call:
        """The queries of this process, and the references of all, if all can be told by labels."""
        queries, refs, relevance = call
        if relevance is not None:
            return call
        if refs is queries:  # places in the whole batch, without asking the others for theirs
            assert refs.home is not None
            refs = queries = refs._replace(home=refs.home + (default_rank() << 32))
        return call._replace(queries=queries, refs=r.Rows(*self._gather(*refs)))

    def _store(self, memory: r.MemoryState, refs: r.Rows, found: Found) -> None:
        assert self._queue is not None
        if not self.update_memory_in_eval:
            self._warn_no_grad(refs.embeddings.shape[0])
        where = r.is_sound(refs, memory.embeddings.dtype, self.ignore_index)
        if refs.embeddings.dtype == torch.float64:  # others fit
            self._tell_unstored(refs.embeddings, ~where & found.value.isfinite().all())
        self._queue.write(memory, refs, where.to(memory.enqueued.device))

    # -- what the values say

    _unstored_warned = False

    def _forget_warnings(self) -> None:
        super()._forget_warnings()
        self._unstored_warned = False

    def _tell_unstored(self, embeddings: Tensor, unstored: Tensor) -> None:
        """Say once that rows with a finite loss are not stored."""
        if self._unstored_warned or not (readable(embeddings) and readable(unstored)):
            return
        if _late.at_once(embeddings):
            self._judge_stored({"unstored": float(unstored)})
        elif self._may_ask(embeddings):
            self._ask(embeddings, {"unstored": unstored}, self._judge_stored)

    def _judge_stored(self, said: Mapping[str, float], at: str = "") -> None:
        if said["unstored"] and not self._unstored_warned:
            self._unstored_warned = True
            warn_user(
                f"{at}{type(self).__name__}: a batch was not stored in the memory, because an "
                "embedding of a row that counts is too large for torch.float32, in which rows are "
                "stored; no such batch is. Scale or normalize the embeddings"
            )

    def _look(self, relevance: Tensor) -> None:
        """Raise if this is no relevance."""
        if relevance.dtype == torch.bool or not relevance.numel() or not readable(relevance):
            return
        now = _late.at_once(relevance)
        if not now and not self._may_ask(relevance):
            return
        low, high = relevance.detach().aminmax()
        asked = {"least relevance": low, "largest relevance": high}
        if now:
            self._judge({what: float(x) for what, x in asked.items()})
        else:
            self._ask(relevance, asked, self._judge)

    def _judge(self, said: Mapping[str, float], at: str = "") -> None:
        low, high = said["least relevance"], said["largest relevance"]
        if not are_gains(low, high):
            raise ValueError(
                f"{at}{type(self).__name__}: relevance must be finite and >= 0, below "
                f"{MAX_WEIGHT:.1e}, got values from {low} to {high}"
            )

    # -- loading

    def problems_with(self, state_dict: dict[str, Any], prefix: str) -> list[str]:
        """What keeps a checkpoint from being loaded."""
        problems = number_problems(state_dict, prefix + "_tau", check_temperature)
        if self._queue is not None:
            problems += self._queue.problems_with(state_dict, prefix + "_queue.")
        return problems

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        """Load whole or not at all."""
        refuse(self, self.problems_with(state_dict, prefix))
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
