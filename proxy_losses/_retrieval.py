"""The loss of a retrieval: rows ranked by similarity, and a memory of past rows, passed by hand."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import _numerics as num
from ._checks import (
    as_tau,
    check_bool,
    check_choice,
    check_int,
    check_row_ids,
    check_stored_dtype,
    fail_type,
)
from ._lists import (
    SIMILARITIES,
    check_embeddings,
    check_labelled,
    check_retrieval,
    check_width,
    directions,
    share_label,
    wide,
)
from ._metrics import METRICS, Metric
from ._metrics._record import Found, Settings, check_settings, defaults_of, over_lists, reads_of
from ._queue import into_all_slots, into_slots, plain_slots
from ._ranks import How, Lists
from .distributed import all_reduce, all_reduce_with_grad

NO_ROW = torch.iinfo(torch.int64).min  # id of rows stored without one
# Every metric that has a record; here they are named as in a sentence, "ap" for smooth_ap.
BY_NAME: dict[str, Metric] = {m.name.removeprefix("smooth_"): m for m in METRICS}
REDUCTIONS = ("mean", "none")


# -- the memory


class MemoryState(NamedTuple):
    """The last rows that were references, as many as its capacity: what `QueueState` is to logits.

    One running counter gives both the next slot, enqueued % capacity, and the fill,
    min(enqueued, capacity). Save it with ``torch.save(memory._asdict(), file)``.

    Example:
        >>> init_memory(4, 2).enqueued
        tensor(0)
    """

    embeddings: Tensor  # [capacity, D] floating, of any length: cosine divides when it compares
    labels: Tensor  # [capacity] int64 class ids, or [capacity, L] bool when rows have several
    row_ids: Tensor  # [capacity] int64 ids of rows, the least int64 where none was given
    enqueued: Tensor  # [] int64, rows ever enqueued; rounded up to a turn by a batch >= capacity


def init_memory(
    capacity: int, width: int, *, num_labels: int | None = None,
    dtype: torch.dtype = torch.float32, device: torch.device | str | None = None,
) -> MemoryState:  # fmt: skip
    """An empty memory of embeddings.

    Args:
        capacity: rows kept, >= 1.
        width: D >= 1, of the embeddings.
        num_labels: L >= 1 to store [L] bool labels for each row; None for a class id.
        dtype: of the stored embeddings; float32 keeps half-precision training exact.
        device: where to keep it.

    Returns:
        `MemoryState`.

    Raises:
        TypeError, ValueError: a size that is not a positive integer, a dtype that is not floating.

    Example:
        >>> init_memory(4, 2).labels
        tensor([0, 0, 0, 0])
    """
    check_int("capacity", capacity, 1)
    check_int("width", width, 1)
    check_stored_dtype(dtype)
    labels = torch.zeros(capacity, dtype=torch.int64, device=device)
    if num_labels is not None:
        check_int("num_labels", num_labels, 1)
        labels = torch.zeros(capacity, num_labels, dtype=torch.bool, device=device)
    return MemoryState(
        torch.zeros(capacity, width, dtype=dtype, device=device),
        labels,
        torch.full((capacity,), NO_ROW, dtype=torch.int64, device=device),
        torch.zeros((), dtype=torch.int64, device=device),
    )


def reset_memory(memory: MemoryState) -> MemoryState:
    """The same memory, empty.

    Args:
        memory: the memory, left unchanged.

    Returns:
        A `MemoryState` of the same shapes, dtypes and device.

    Raises:
        TypeError: memory is no `MemoryState`.

    Example:
        >>> memory = enqueue_embeddings(init_memory(4, 2), torch.ones(3, 2), torch.arange(3))
        >>> reset_memory(memory).enqueued
        tensor(0)
    """
    check_memory(memory)
    zeros = MemoryState(*map(torch.zeros_like, memory))
    return zeros._replace(row_ids=torch.full_like(memory.row_ids, NO_ROW))


def enqueue_embeddings(
    memory: MemoryState, embeddings: Tensor, labels: Tensor, *, row_ids: Tensor | None = None,
    where: Tensor | None = None,
) -> MemoryState:  # fmt: skip
    """Store rows over the oldest ones; of a batch above capacity the last rows remain.

    Args:
        memory: the memory so far, left unchanged.
        embeddings: [N, D] floating, stored detached in the memory's dtype.
        labels: [N] integers, or [N, L] bool in a memory made with num_labels.
        row_ids: [N] integer ids of the rows, or None.
        where: [] bool or None; False stores nothing.

    Returns:
        The new `MemoryState`.

    Raises:
        TypeError, ValueError: wrong dtypes or shapes.

    Example:
        >>> x = torch.tensor([[1.0, 0.0], [0.0, 1.0], [3.0, 4.0]])
        >>> memory = enqueue_embeddings(init_memory(2, 2), x, torch.tensor([5, 6, 7]))
        >>> memory.embeddings, memory.labels
        (tensor([[0., 1.],
                [3., 4.]]), tensor([6, 7]))
    """
    check_memory(memory)
    check_labelled("", embeddings, labels)
    check_fits(memory, "", embeddings, labels)
    check_row_ids("row_ids", row_ids, embeddings.shape[0])
    if where is None:
        where = torch.ones_like(memory.enqueued, dtype=torch.bool)
    check_bool("where", where)
    if where.dim():
        raise ValueError(f"where must be one bool for the whole batch, got {list(where.shape)}")
    return put_rows(memory, Rows(embeddings, labels, row_ids), where)


def put_rows(memory: MemoryState, rows: Rows, where: Tensor) -> MemoryState:
    """`enqueue_embeddings` of what was checked."""
    n = rows.embeddings.shape[0]
    into = into_slots if plain_slots(n) else into_all_slots
    put, enqueued = into(memory.enqueued, n, memory.embeddings.shape[0], where)
    return MemoryState(
        put(memory.embeddings, rows.embeddings),
        put(memory.labels, rows.labels),
        put(memory.row_ids, rows.known_ids()),
        torch.where(where, enqueued, memory.enqueued),
    )


def check_memory(memory: object) -> None:
    """Raise `TypeError` unless it is a `MemoryState`, and not a tuple that was loaded as one."""
    if not isinstance(memory, MemoryState):
        raise TypeError(f"memory must be a MemoryState, got {type(memory).__name__}")


def check_fits(memory: MemoryState, prefix: str, embeddings: Tensor, labels: Tensor) -> None:
    """Raise unless rows are of the width and of the kind of labels that are stored."""
    width = memory.embeddings.shape[1]
    if embeddings.shape[1:] != (width,):
        raise ValueError(
            f"{prefix}embeddings must be [N, D={width}] as in the memory, "
            f"got {list(embeddings.shape)}"
        )
    if labels.shape[1:] != memory.labels.shape[1:]:
        tail = "".join(f", L={n}] bool" for n in memory.labels.shape[1:]) or "] class ids"
        raise ValueError(
            f"{prefix}labels must be [N{tail} as in the memory, got {list(labels.shape)} "
            f"of {labels.dtype}"
        )


# -- what is ranked


class Rows(NamedTuple):
    """Rows of a batch, as queries or as references."""

    embeddings: Tensor  # [N, D] floating
    labels: Tensor | None  # [N] int64 or [N, L] bool; None where relevance tells
    row_ids: Tensor | None = None  # [N] int64, or None
    home: Tensor | None = None  # [N] int64, place in the whole batch of rows that rank each other

    def known_ids(self) -> Tensor:
        """[N] int64: the ids, or that there are none."""
        if self.row_ids is not None:
            return self.row_ids
        return torch.full_like(self.embeddings[:, 0], NO_ROW, dtype=torch.int64)


class Call(NamedTuple):
    """What a loss is called with, checked."""

    queries: Rows
    refs: Rows  # the queries themselves, unless some were given
    relevance: Tensor | None  # [Q, M] bool or floating, or None where labels tell


def read_call(
    embeddings: Tensor, labels: Tensor, ref_embeddings: Tensor | None, ref_labels: Tensor | None,
    row_ids: Tensor | None, ref_row_ids: Tensor | None,
) -> Call:  # fmt: skip
    """Check the arguments of a loss, and tell queries from references."""
    alone = ref_embeddings is None and ref_labels is None
    if ref_embeddings is not None and ref_labels is None:
        _check_relevance(embeddings, labels, ref_embeddings)
    else:
        check_retrieval(embeddings, labels, ref_embeddings, ref_labels)
    for name, x in (("embeddings", embeddings), ("ref_embeddings", ref_embeddings)):
        if x is not None and x.dim() != 2:
            raise ValueError(f"{name} must be [N, D], got {list(x.shape)}")
    check_row_ids("row_ids", row_ids, embeddings.shape[0])
    if alone and ref_row_ids is not None:
        raise ValueError("ref_row_ids need ref_embeddings: without, row_ids are those of all rows")
    if alone:
        rows = Rows(embeddings, wide(labels), _as_ids(row_ids))
        rows = rows._replace(home=torch.arange(rows.embeddings.shape[0], device=embeddings.device))
        return Call(rows, rows, None)
    assert ref_embeddings is not None
    check_row_ids("ref_row_ids", ref_row_ids, ref_embeddings.shape[0])
    if (row_ids is None) != (ref_row_ids is None):
        lacking = "row_ids" if row_ids is None else "ref_row_ids"
        raise ValueError(f"row_ids and ref_row_ids must be given together, got no {lacking}")
    told = ref_labels is not None
    queries = Rows(embeddings, wide(labels) if told else None, _as_ids(row_ids))
    refs = Rows(ref_embeddings, None if ref_labels is None else wide(ref_labels))
    return Call(queries, refs._replace(row_ids=_as_ids(ref_row_ids)), None if told else labels)


def _as_ids(row_ids: Tensor | None) -> Tensor | None:
    return None if row_ids is None else row_ids.to(torch.int64)


def _check_relevance(embeddings: Tensor, relevance: Tensor, refs: Tensor) -> None:
    check_embeddings("embeddings", embeddings)
    check_embeddings("ref_embeddings", refs)
    check_width(embeddings, refs)
    kind = "relevance [Q, M], bool or floating, where there are no ref_labels"
    told = isinstance(relevance, Tensor) and (
        relevance.dtype == torch.bool
        or (relevance.is_floating_point() and relevance.dtype.itemsize > 1)
    )
    if not told:
        fail_type("labels", kind, relevance)
    shape = (embeddings.shape[0], refs.shape[0])
    if relevance.shape != shape:
        raise ValueError(f"labels must be {kind}: {list(shape)}, got {list(relevance.shape)}")


def rank(
    call: Call, memory: MemoryState | None, metric: Metric, settings: Settings,
    tau: float | Tensor, *, similarity: str, ignore_index: int,
) -> Found:  # fmt: skip
    """[Q]: the metric of every query over its references."""
    lists: Lists = num.outside_autocast(_lists)(
        call.queries.embeddings, call, memory, similarity, ignore_index
    )
    reads, relevance = reads_of(metric, settings), call.relevance
    if "live" in reads:
        rows = torch.arange(lists.scores.shape[-1], device=lists.scores.device)
        lists = lists._replace(live=rows < call.refs.embeddings.shape[0])
    if "gains" in reads and relevance is not None and relevance.is_floating_point():
        lists = lists._replace(pos=relevance != 0, gains=relevance)  # what is none shows as NaN
    tau = as_tau(tau, lists.scores.shape[:-1])
    return over_lists(metric, lists, tau, settings, How())


def _lists(
    x: Tensor, call: Call, memory: MemoryState | None, similarity: str, ignore_index: int
) -> Lists:
    """[Q, M]: the references of the call, then the stored ones."""
    queries, refs, relevance = call
    ids, counted = refs.row_ids, _counted(refs, ignore_index)
    x = num.lift(x)
    if refs is queries:
        x = r = _unit(x, counted, similarity)
    else:
        x = _unit(x, _counted(queries, ignore_index), similarity)
        r = _unit(refs.embeddings.to(x.dtype), counted, similarity)
    scores, labels, homes = x @ r.mT, refs.labels, refs.home
    if memory is not None:
        stored = Rows(memory.embeddings.detach(), memory.labels)
        slots = torch.arange(stored.embeddings.shape[0], device=memory.enqueued.device)
        filled = (slots < memory.enqueued).to(x.device)
        there = _counted(stored, ignore_index)
        there = filled if there is None else filled & there.to(x.device)
        m = _unit(stored.embeddings.to(x), there, similarity)
        # Two products: the stored rows need no gradient.
        scores = torch.cat([scores, x @ m.mT], -1)
        assert labels is not None
        labels = torch.cat([labels, memory.labels.to(labels.device)])
        if counted is None:
            counted = torch.ones_like(r[:, 0], dtype=torch.bool)
        counted = torch.cat([counted, there])
        if homes is not None:
            homes = torch.cat([homes, torch.full_like(there, -1, dtype=torch.int64)])
        if ids is not None:
            ids = torch.cat([ids, memory.row_ids.to(ids.device)])
    if relevance is None:
        assert queries.labels is not None
        assert labels is not None
        pos = share_label(queries.labels, labels, x.dtype)
    else:
        pos = relevance if relevance.dtype == torch.bool else relevance > 0
    valid = counted
    if homes is not None and queries.home is not None:
        other = queries.home[:, None] != homes
        valid = other if valid is None else valid & other
    if ids is not None and queries.row_ids is not None:
        mine = queries.row_ids[:, None]
        other = (mine != ids) | (mine == NO_ROW)
        valid = other if valid is None else valid & other
    return Lists(scores, pos, valid)


def _unit(x: Tensor, counted: Tensor | None, similarity: str) -> Tensor:
    """`directions`, of rows that do not count 0: what is not finite there must not spread."""
    if counted is not None:
        x = torch.where(counted[:, None], x, 0.0)
    return directions(x, similarity)


def _counted(rows: Rows, ignore_index: int) -> Tensor | None:
    """[N] bool, or None for all: only class ids have padding."""
    if rows.labels is None or rows.labels.dtype == torch.bool:
        return None
    return rows.labels != ignore_index


def is_sound(refs: Rows, dtype: torch.dtype, ignore_index: int) -> Tensor:
    """[] bool: rows that count are finite in the dtype they are stored in."""
    zeros = refs.embeddings.detach().to(dtype) * 0.0
    sound, counted = zeros.sum(-1) == 0.0, _counted(refs, ignore_index)
    return (sound if counted is None else sound | ~counted).all()


def reduce_queries(found: Found, reduction: str, name: str = "") -> Tensor:
    """The mean over the queries that count, of all processes, or [Q] of these with NaN."""
    if reduction == "none":
        return torch.where(found.defined, 1.0 - found.value, torch.nan)
    # 0 - 0 where it does not count
    total = torch.add(found.defined, found.value, alpha=-1).sum()
    number = all_reduce(found.defined.sum(), "sum", name)
    return all_reduce_with_grad(total, name) / number.clamp(min=1)


# -- the loss function


def choose_metric(name: str, given: Mapping[str, Any], caller: str) -> tuple[Metric, Settings]:
    """The record and all settings of a metric by its short name."""
    check_choice("metric", name, tuple(BY_NAME))
    metric = BY_NAME[name]
    defaults = defaults_of(metric)
    for unknown in given:
        if unknown not in defaults:
            raise TypeError(
                f"{caller}() got an unexpected keyword argument {unknown!r}; metric={name!r} "
                f"takes {list(defaults) or 'none of its own'}"
            )
    settings = {**defaults, **given}
    check_settings(metric, settings)
    return metric, settings


def retrieval_loss(
    embeddings: Tensor, labels: Tensor, memory: MemoryState | None, tau: float | Tensor, *,
    metric: str = "ap", ref_embeddings: Tensor | None = None, ref_labels: Tensor | None = None,
    row_ids: Tensor | None = None, ref_row_ids: Tensor | None = None, similarity: str = "cosine",
    reduction: str = "mean", ignore_index: int = -100, **settings: Any,
) -> tuple[Tensor, MemoryState | None]:  # fmt: skip
    r"""1 - a ranking metric of every row as a query among the others and a memory; the new memory.

    ``loss = mean over queries q that count of 1 - metric(similarity(x_q, r_m) over m, positives)``
    with the references r_m: the other rows of the batch, or given ones, then the stored rows. A
    reference is a positive of the query when they share a label. Any number of rows per class, in
    any order. It takes Q x M similarities, their gradient, and a rank operation over them.

    Args:
        embeddings: [Q, D] floating, the queries. Half precision is computed in float32.
        labels: [Q] integers, or [Q, L] bool when a row may have several labels; with
            ref_embeddings and without ref_labels the relevance [Q, M], bool or floating >= 0.
        memory: `MemoryState` of past references, or None. It needs labels, not relevance.
        tau: temperature in units of the similarity (for "partial_auc" in units of the spread that
            `partial_auc` names), > 0: a number, a 0-d tensor, or [Q].
        metric: "ap", "recall_at_k", "precision_at_k", "mrr", "ndcg", "auroc", "recall_at_quantile",
            "recall_at_precision" or "partial_auc", each the function of that name, or with
            "smooth_" before. "ndcg" takes relevance as gains, and 1 for a positive where labels
            tell.
        ref_embeddings: [M, D] floating, the references; they get a gradient. None: the other rows
            of the batch.
        ref_labels: [M] integers or [M, L] bool, as labels are.
        row_ids: [Q] integer ids of the rows in the data. A reference with the id of the query is
            the query, and left out: so a memory that is longer than an epoch does not rank a row
            for its own past. Two views of a row that shall find each other need ids of their own.
        ref_row_ids: [M] integers, the ids of given references.
        similarity: "cosine" or "dot".
        reduction: "mean" over the queries that count, or "none" for [Q] with NaN where one does
            not.
        ignore_index: class id of rows that are neither queries nor references; they take slots in
            the memory.
        **settings: options of the metric, such as k.

    Returns:
        (loss, new memory). The loss is exactly 0 with zero gradient when no query counts, and NaN
        when a row that counts is not finite; such a batch is not stored. What is stored are the
        references of the batch, raw and detached.

    Raises:
        TypeError, ValueError: wrong dtypes or shapes, an option out of range or of no such
            metric, relevance together with a memory.

    Example:
        >>> x = torch.tensor([[1.0, 0.0], [0.8, 0.6], [0.0, 1.0]])
        >>> memory = init_memory(8, 2)
        >>> loss, memory = retrieval_loss(x, torch.tensor([0, 0, 1]), memory, 0.01)
        >>> loss.item(), memory.enqueued.item()
        (0.0, 3)
        >>> loss, memory = retrieval_loss(-x, torch.tensor([0, 0, 1]), memory, 0.01)
        >>> round(loss.item(), 2)
        0.47

    Reference: Brown et al., "Smooth-AP: Smoothing the Path Towards Large-Scale Image Retrieval",
    ECCV 2020, arXiv:2007.12163; the memory: Wang et al., "Cross-Batch Memory for Embedding
    Learning", CVPR 2020, arXiv:1912.06798.
    """
    record, chosen = choose_metric(metric, settings, "retrieval_loss")
    check_choice("similarity", similarity, SIMILARITIES)
    check_choice("reduction", reduction, REDUCTIONS)
    check_int("ignore_index", ignore_index)
    call = read_call(embeddings, labels, ref_embeddings, ref_labels, row_ids, ref_row_ids)
    if memory is not None:
        check_memory(memory)
        check_call_fits(memory, call)
    found = rank(
        call, memory, record, chosen, tau, similarity=similarity, ignore_index=ignore_index
    )
    loss = reduce_queries(found, reduction)
    if memory is None:
        return loss, None
    where = is_sound(call.refs, memory.embeddings.dtype, ignore_index)
    return loss, put_rows(memory, call.refs, where)


def check_call_fits(memory: MemoryState, call: Call) -> None:
    """Raise unless the references can be stored."""
    if call.refs.labels is None:
        raise ValueError("relevance [Q, M] says nothing of stored rows: a memory needs ref_labels")
    prefix = "" if call.refs is call.queries else "ref_"
    check_fits(memory, prefix, call.refs.embeddings, call.refs.labels)
