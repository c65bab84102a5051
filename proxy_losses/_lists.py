"""What is ranked, as lists: a batch and its queue, rows by query id, embeddings by similarity."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from . import _numerics as num
from ._checks import (
    check_batch,
    check_bool,
    check_choice,
    check_floating,
    check_int,
    check_query_ids,
    check_row_extras,
    fail_type,
    is_labels,
)
from ._old_names import takes_old_names
from ._queue import NO_QUERY, QueueState, check_queue, match_queue, queue_rows
from ._ranks import Lists

SIMILARITIES = ("cosine", "dot")


# -- a batch and its queue


class Batch(NamedTuple):
    """The rows of one training step, as the user gives them."""

    logits: Tensor  # [N, C] floating
    targets: Tensor  # [N] class ids or [N, C] bool labels
    sample_weight: Tensor | None = None  # [N] floating, None for 1
    iid_mask: Tensor | None = None  # [N] bool, None for True
    query_ids: Tensor | None = None  # [N] int64 query ids, None for one list of all
    label_mask: Tensor | None = None  # [N, C] bool, labels that are known, None for all
    gains: Tensor | None = None  # [N, C] floating, of the positives, None for 1
    floats: Tensor | None = None  # [N] or [N, C] targets as given, if floats; one may tell of a row


class Pool(NamedTuple):
    """The rows a loss ranks: the live batch, then the stored rows; one list per class."""

    # Scores, pos and gains [C, M], valid [M] or, with unknown labels, [C, M], others [M].
    lists: Lists
    query_ids: Tensor | None = None  # [M] int64 query ids, None for one list of all

    def take(self, rows: Tensor) -> Pool:
        """The pool of these rows; rows [Q, L] makes lists, [C, Q, L] and [Q, L]."""
        ids = None if self.query_ids is None else self.query_ids[rows]
        return Pool(Lists(*(None if x is None else x[..., rows] for x in self.lists)), ids)  # type: ignore[arg-type]


class Known(NamedTuple):
    """What is known of a queue beside its values, so that they need not be asked."""

    tidy: bool = False  # slots that are not filled hold the ignore_index of batch and queue
    ones: tuple[str, ...] = ()  # fields that hold nothing but 1 or True


NOTHING = Known()


def wide(targets: Tensor) -> Tensor:
    """Class ids in int64, which holds any ignore_index; bools as they are."""
    return targets if targets.dtype == torch.bool else targets.to(torch.int64)


def positives(targets: Tensor, num_classes: int) -> Tensor:
    """[C, M] bool. Binary: every class id but 0, so that a stray label is not lost."""
    if is_labels(targets):
        return targets.T
    if num_classes == 1:
        return (targets != 0)[None]
    return wide(targets) == torch.arange(num_classes, device=targets.device)[:, None]


def valid_rows(targets: Tensor, ignore_index: int) -> Tensor | None:
    """[N] bool, or None for all: labels have no padding."""
    return None if is_labels(targets) else wide(targets) != ignore_index


def from_grades(logits: Tensor, targets: Tensor, ignore_index: int) -> tuple[Tensor, Tensor | None]:
    """Class ids or labels that say which rows have a gain, and `Batch.gains`.

    For a metric that reads gains: targets [N] for one class and [N, C] for several are relevance
    grades. Others stay as they are, for `check_batch` to judge.

    Raises:
        ValueError: targets of another shape.
    """
    if not isinstance(logits, Tensor) or not isinstance(targets, Tensor) or targets.is_complex():
        return targets, None
    n, classes = (*logits.shape, 0, 0)[:2]
    if classes == 1 and targets.shape == (n,) and targets.dtype != torch.bool:
        grades = targets if targets.is_floating_point() else targets.to(torch.int64)
        padding = grades == ignore_index
        pos = (grades != 0) > padding  # a NaN is one, and shows
        ids = pos * (2 if ignore_index == 1 else 1)
        kept = ignore_index if grades.is_floating_point() else grades  # a number takes a kernel
        targets, grades = torch.where(padding, kept, ids), grades[:, None]
        pos = pos[:, None]
    elif classes > 1 and targets.shape == (n, classes) and targets.dtype != torch.bool:
        grades, pos = targets, targets != 0
        targets = pos
    elif logits.dim() == 2 and targets.shape not in ((n,), (n, classes)):
        raise ValueError(
            f"targets must be relevance grades [N={n}] of one class or [N={n}, C={classes}] of "
            f"several, or class ids [N={n}], got {list(targets.shape)}"
        )
    else:
        return targets, None
    grades = grades if grades.is_floating_point() else grades.to(torch.float32)
    return targets, torch.where(pos, grades, 1.0)


def rows_of(valid: Tensor) -> Tensor:
    """[M] bool from valid [M] or [C, M]: rows that count for some class."""
    return valid if valid.dim() == 1 else valid.any(0)


def padding_rows(targets: Tensor, ignore_index: int) -> Tensor | None:
    """[N] bool, the others; or None for none."""
    return None if is_labels(targets) else wide(targets) == ignore_index


def some_valid(pool: Pool) -> Tensor:
    """[] bool, False when the pool holds padding alone."""
    valid = pool.lists.valid
    if valid is None:
        return pool.lists.pos.new_ones(pool.lists.pos.shape[-1:]).any()
    return valid.any()


def make_pool(
    batch: Batch, queue: QueueState | None, *, ignore_index: int = -100, reads: tuple[str, ...] = ()
) -> Pool:
    """Live rows, then stored rows (in the live dtype, without gradient), as one list per class.

    Nothing is made up that nobody gave: without a queue weights are those of the batch or None,
    and flags and gains are there if `reads` names them: "iid", "live", "gains".
    """
    if queue is not None:
        check_queue(queue)
    check_batch(batch.logits, batch.targets, None if queue is None else queue.logits.shape[1])
    check_row_extras(batch.logits.shape, *batch[2:7])
    batch = batch._replace(targets=wide(batch.targets))
    return join(batch, queue, ignore_index, reads)


def join(
    batch: Batch, queue: QueueState | None, ignore_index: int, reads: tuple[str, ...],
    known: Known = NOTHING,
) -> Pool:  # fmt: skip
    """`make_pool` of what was checked, with targets in int64 or bool."""
    logits, targets, weight, iid, query_ids, labelled, gains, _ = batch
    n, num_classes = logits.shape
    if query_ids is not None:
        query_ids = query_ids.to(torch.int64)  # a narrower id could not tell NO_QUERY
    live = None
    if queue is None:
        valid = valid_rows(targets, ignore_index)
        iid = iid if "iid" in reads else None
    else:
        queue = match_queue(queue, targets, query_ids, labelled, gains)
        stored = queue.logits.detach() if queue.logits.requires_grad else queue.logits
        logits = torch.cat([logits, stored.to(logits)])
        both = torch.cat([targets, queue.targets.to(targets.device)])
        if known.tidy and not is_labels(targets):
            valid = both != ignore_index
        else:
            filled, now = queue_rows(queue)[2].to(both.device), valid_rows(targets, ignore_index)
            valid = torch.cat([filled.new_ones(n) if now is None else now, filled])
        targets = both
        if weight is not None or "sample_weight" not in known.ones:
            # A stored weight acts on later calls too.
            weight = queue.sample_weight.new_ones(n) if weight is None else weight
            weight = torch.cat([weight, queue.sample_weight.to(weight.device)])
        if "iid" not in reads:
            iid = None
        elif iid is not None or "iid_mask" not in known.ones:
            iid = queue.iid_mask.new_ones(n) if iid is None else iid
            iid = torch.cat([iid, queue.iid_mask.to(iid.device)])
        if "live" in reads:
            live = torch.arange(targets.shape[0], device=targets.device) < n
        if query_ids is not None:
            query_ids = torch.cat([query_ids, queue.query_ids.to(query_ids)])
        if labelled is not None or (
            "label_mask" not in known.ones and queue.label_mask.numel()
        ):  # fmt: skip
            before = queue.label_mask.to(logits.device)
            labelled = before.new_ones(n, num_classes) if labelled is None else labelled
            labelled = torch.cat([labelled, before])
        if gains is not None or (
            "gains" in reads and "gains" not in known.ones and queue.gains.numel()
        ):  # fmt: skip
            before = queue.gains.to((logits if gains is None else gains).device)
            gains = before.new_ones(n, num_classes) if gains is None else gains
            gains = torch.cat([gains, before])
    if labelled is not None:  # in the layout of the scores, lest sums add up in another order
        told = labelled.T.contiguous()
        valid = told if valid is None else valid & told
    if query_ids is not None:
        placed = query_ids != NO_QUERY
        valid = placed if valid is None else valid & placed
    if gains is not None:
        gains = gains.T.contiguous()
    lists = Lists(logits.T, positives(targets, num_classes), valid, weight, iid, live, gains)
    return Pool(lists, query_ids)


def _scattered(x: Tensor) -> Tensor:
    """Integers below 2**32 to such integers that look random, one to one (murmur3's last step)."""
    for shift, factor in (16, 0x85EBCA6B), (13, 0xC2B2AE35):
        x = ((x ^ (x >> shift)) * factor) & 0xFFFFFFFF
    return x ^ (x >> 16)


def subsample_pool(pool: Pool, cap: int, *, seed: int | Tensor) -> Pool:
    """Of the valid rows max(1, cap // (2 * classes)) of each class, the rest uniform; cap in all.

    Rows that are not valid come last. Deterministic in the seed, a number or a [] tensor, on every
    device and process.
    """
    pos, valid = pool.lists.pos, pool.lists.valid
    rows = torch.arange(pos.shape[-1], device=pos.device)
    draw = _scattered((torch.zeros_like(rows[:1]) + seed) & 0xFFFFFFFF)
    keys = _scattered(rows ^ draw).double() / 2**32  # without ties
    if valid is not None:
        keys, pos = torch.where(rows_of(valid), keys, -1.0), pos & valid
    classes = pos if pos.shape[0] > 1 else torch.cat([pos, ~pos])
    quota = max(1, cap // (2 * classes.shape[0]))
    first = torch.where(classes, keys, -1.0).topk(min(quota, keys.numel()), dim=-1)
    chosen = torch.zeros_like(keys).scatter_reduce(
        0, first.indices.flatten(), (first.values >= 0).to(keys.dtype).flatten(), "amax"
    )
    return pool.take((keys + 2.0 * chosen).topk(cap).indices)


# -- rows by query id


class QueryLists(NamedTuple):
    """Rows by query, padded: ``scores[..., lists.rows]`` is [..., Q, L].

    Example:
        >>> lists = query_lists(torch.tensor([3, 3, 3, 8]), 2, 3)
        >>> scores = torch.tensor([0.1, 0.3, 0.2, 0.9])
        >>> pos = torch.tensor([True, False, True, True])
        >>> smooth_ap(scores[lists.rows], pos[lists.rows], 0.01, valid_mask=lists.valid_mask)
        tensor([0.5833, 0.0000])
    """

    rows: Tensor  # [Q, L] int64, row numbers; 0 in the padding
    valid_mask: Tensor  # [Q, L] bool
    fits: Tensor  # [] bool, False when there were more queries or longer ones than asked for


@takes_old_names
def query_lists(
    query_ids: Tensor, num_lists: int, list_length: int, *, valid_mask: Tensor | None = None
) -> QueryLists:
    """One padded list of row numbers per query, of a size known beforehand (for compiled code).

    Args:
        query_ids: [N] int64 ids, any values in any order; queries come out in their order.
        num_lists: Q >= 1, at least the number of queries; lists left over are all padding.
        list_length: L >= 1, at least the longest query.
        valid_mask: [N] bool, rows to place; None means all.

    Returns:
        `QueryLists`. Rows that find no place are left out, and `fits` says so.

    Raises:
        TypeError, ValueError: wrong dtypes, shapes or sizes.

    Example:
        >>> lists = query_lists(torch.tensor([7, 3, 7]), 2, 2)
        >>> lists.rows, lists.valid_mask
        (tensor([[1, 0],
                [0, 2]]), tensor([[ True, False],
                [ True,  True]]))
    """
    check_int("num_lists", num_lists, 1)
    check_int("list_length", list_length, 1)
    if query_ids is None:  # elsewhere it is one list of all
        fail_type("query_ids", "a tensor", query_ids)
    check_query_ids(query_ids, query_ids.numel() if isinstance(query_ids, Tensor) else 0)
    n = query_ids.shape[0]
    if valid_mask is not None:
        check_bool("valid_mask", valid_mask)
        if valid_mask.shape != query_ids.shape:
            raise ValueError(
                f"valid_mask must match query_ids: expected [{n}], got {list(valid_mask.shape)}"
            )
    keep = torch.ones_like(query_ids, dtype=torch.bool) if valid_mask is None else valid_mask
    order = query_ids.argsort(stable=True)
    order = order[(~keep)[order].to(torch.uint8).argsort(stable=True)]  # rows to place come first
    ids, placed = query_ids[order], keep[order]
    # A query starts where the id changes.
    starts = torch.ones_like(placed)
    starts[1:] = ids[1:] != ids[:-1]
    number = starts.cumsum(0) - 1
    place = torch.arange(n, device=query_ids.device)
    first = torch.where(starts, place, 0).cummax(0).values if n else place
    column = place - first
    inside = placed & (number < num_lists) & (column < list_length)
    slots = num_lists * list_length
    slot = torch.where(inside, number * list_length + column, slots)
    index = order.new_zeros(slots + 1).scatter(0, slot, order)  # the last slot is for the rest
    taken = torch.zeros_like(index, dtype=torch.bool).scatter(0, slot, inside)
    shape = (num_lists, list_length)
    return QueryLists(
        index[:slots].reshape(shape), taken[:slots].reshape(shape), (inside == placed).all()
    )


def every_list(
    query_ids: Tensor, valid_mask: Tensor, shape: tuple[int, int] | None
) -> list[QueryLists]:
    """All queries of the valid rows.

    Without a shape they are learnt from the data (eager code alone) and put on axes of similar
    length, so that one long query does not pad a thousand short ones: at most twice the rows.
    """
    if shape is not None:
        return [query_lists(query_ids, *shape, valid_mask=valid_mask)]
    if torch.compiler.is_compiling():
        raise ValueError(
            "query_ids inside torch.compile need query_shape=(queries, longest query): "
            "expected two integers, got None"
        )
    _, query, sizes = query_ids[valid_mask].unique(return_inverse=True, return_counts=True)
    if not sizes.numel():
        none = query_ids.new_zeros(0, 1)
        return [QueryLists(none, none.bool(), torch.ones_like(none.sum(), dtype=torch.bool))]
    rows = valid_mask.nonzero()[:, 0]
    power = (2 * sizes - 1).log2().floor().long()  # 2**(power - 1) < size <= 2**power
    found = []
    for p in power.unique().tolist():
        mine = power == p
        member = mine[query]
        lists = query_lists(query[member], int(mine.sum()), int(sizes[mine].max()))
        found.append(lists._replace(rows=rows[member][lists.rows]))
    return found


# -- embeddings by similarity


class RetrievalLists(NamedTuple):
    """One list per query, over its references; all three fields have the same shape.

    Example:
        >>> lists = retrieval_lists(torch.eye(3), torch.tensor([0, 0, 1]))
        >>> lists.pos_mask[0], lists.valid_mask[0]
        (tensor([ True,  True, False]), tensor([False,  True,  True]))
    """

    scores: Tensor  # [..., Q, M] floating, similarity of query and reference
    pos_mask: Tensor  # [..., Q, M] bool, the reference shares a label with the query
    valid_mask: Tensor  # [..., Q, M] bool, False where the reference is the query itself


def retrieval_lists(
    embeddings: Tensor, labels: Tensor, *, ref_embeddings: Tensor | None = None,
    ref_labels: Tensor | None = None, similarity: str = "cosine",
) -> RetrievalLists:  # fmt: skip
    r"""Every row as a query that ranks the other rows, or given references, by similarity.

    ``scores[q, m] = <x_q, r_m> / (|x_q| |r_m|)``, without the norms for "dot". A reference is a
    positive of the query when they share a label. Any number of rows per class, in any order.
    The lists go to any metric over lists, such as `smooth_ap`.

    Args:
        embeddings: [..., Q, D] floating, the queries. Half precision is computed in, and
            returned as, float32.
        labels: [..., Q] integers, or [..., Q, L] bool when a row may have several labels.
        ref_embeddings: [..., M, D] floating, read in the dtype of the scores. None: the queries
            themselves, M = Q, each left out of its own list. Given references all count, also
            ones equal to a query.
        ref_labels: [..., M] integers or [..., M, L] bool, as labels are.
        similarity: "cosine" or "dot". A zero row has cosine 0 with all others and gets no
            gradient; so does one whose square underflows.

    Returns:
        `RetrievalLists`. To leave out more references, such as padding, narrow the mask:
        ``lists._replace(valid_mask=lists.valid_mask & keep)``. Rows masked so must still be
        finite, or the gradient of all others is NaN.

    Raises:
        TypeError: wrong dtypes, or class ids beside multi-labels.
        ValueError: shapes that do not fit, one of ref_embeddings and ref_labels without the
            other, or an unknown similarity.

    Example:
        >>> embeddings = torch.tensor([[1.0, 0.0], [0.8, 0.6], [0.0, 1.0], [-1.0, 0.0]])
        >>> labels = torch.tensor([0, 0, 1, 0])
        >>> lists = retrieval_lists(embeddings, labels)
        >>> lists.scores[0]
        tensor([ 1.0000,  0.8000,  0.0000, -1.0000])
        >>> ap = smooth_ap(lists.scores, lists.pos_mask, 0.01, valid_mask=lists.valid_mask)
        >>> ap
        tensor([0.8333, 0.8333, 0.0000, 0.5833])

        Row 2 has no positive: its value is 0 and it must not count in the mean.

        >>> counts = smooth_ap_defined(lists.pos_mask, lists.valid_mask)
        >>> 1 - ap.sum() / counts.sum().clamp(min=1)
        tensor(0.2500)

    Reference: Brown et al., "Smooth-AP: Smoothing the Path Towards Large-Scale Image Retrieval",
    ECCV 2020, arXiv:2007.12163. The paper's code also ranks the query for itself, as a positive
    that is always first; ``ref_embeddings=embeddings, ref_labels=labels`` gives that.
    """
    check_choice("similarity", similarity, SIMILARITIES)
    check_retrieval(embeddings, labels, ref_embeddings, ref_labels)
    lists: RetrievalLists = _similarities(
        embeddings, labels, ref_embeddings, ref_labels, similarity
    )
    return lists


@num.full_precision
def _similarities(
    embeddings: Tensor, labels: Tensor, ref_embeddings: Tensor | None, ref_labels: Tensor | None,
    similarity: str,
) -> RetrievalLists:  # fmt: skip
    queries = directions(embeddings, similarity)
    if ref_embeddings is None or ref_labels is None:
        refs, ref_labels = queries, labels
        valid = ~torch.eye(queries.shape[-2], dtype=torch.bool, device=queries.device)
    else:
        refs = directions(ref_embeddings.to(queries.dtype), similarity)
        valid = torch.ones((), dtype=torch.bool, device=queries.device)
    pos = share_label(labels, ref_labels, queries.dtype)
    return RetrievalLists(*torch.broadcast_tensors(queries @ refs.mT, pos, valid))


def share_label(labels: Tensor, ref_labels: Tensor, dtype: torch.dtype) -> Tensor:
    """[..., Q, M] bool; multi-labels are counted in the dtype."""
    if labels.dtype == torch.bool:
        return labels.to(dtype) @ ref_labels.to(dtype).mT > 0
    return labels[..., :, None] == ref_labels[..., None, :]


def directions(x: Tensor, similarity: str) -> Tensor:
    """Rows [..., D] whose products are the similarities."""
    return _unit_rows(x) if similarity == "cosine" else x


def _unit_rows(x: Tensor) -> Tensor:
    """Rows [..., D] divided by their norms; 0 with zero gradient where the square underflows."""
    # A direction has no scale, so the gradient needs none of the scale's. Squares then neither
    # overflow nor vanish, unlike those of x.
    scale = x.detach().abs().amax(-1, keepdim=True)
    zero = scale <= torch.finfo(x.dtype).tiny ** 0.5  # False for NaN, which goes on
    x = torch.where(zero, 0.0, x / torch.where(zero, 1.0, scale))
    return x / torch.where(zero, 1.0, (x * x).sum(-1, keepdim=True)).sqrt()


def check_retrieval(
    embeddings: Tensor, labels: Tensor, ref_embeddings: Tensor | None, ref_labels: Tensor | None
) -> None:
    """Check queries, embeddings [..., Q, D] and their labels, and references likewise or None."""
    leading = [check_labelled("", embeddings, labels)]
    if ref_embeddings is not None and ref_labels is not None:
        leading.append(check_labelled("ref_", ref_embeddings, ref_labels))
        check_width(embeddings, ref_embeddings)
        if (ref_labels.dtype == torch.bool) != (labels.dtype == torch.bool):
            fail_type("ref_labels", f"of the kind of labels, {labels.dtype}", ref_labels)
        if labels.dtype == torch.bool and ref_labels.shape[-1] != labels.shape[-1]:
            raise ValueError(
                "ref_labels must have as many labels as labels: "
                f"expected [..., {labels.shape[-1]}], got {list(ref_labels.shape)}"
            )
    elif ref_embeddings is not None or ref_labels is not None:
        lacking = "ref_labels" if ref_labels is None else "ref_embeddings"
        raise ValueError(f"ref_embeddings and ref_labels must be given together, got no {lacking}")
    try:
        torch.broadcast_shapes(*leading)
    except RuntimeError:
        raise ValueError(
            "leading axes of queries and references must broadcast, "
            f"got {' and '.join(str(list(shape)) for shape in leading)}"
        ) from None


def check_embeddings(name: str, x: Tensor) -> None:
    """Raise unless x is [..., rows, D] floating."""
    check_floating(name, x)
    if x.dim() < 2 or x.shape[-1] == 0:
        raise ValueError(f"{name} must be [..., rows, D] with D >= 1, got {list(x.shape)}")


def check_width(embeddings: Tensor, ref_embeddings: Tensor) -> None:
    """Raise `ValueError` unless references are as wide as queries."""
    if ref_embeddings.shape[-1] != embeddings.shape[-1]:
        raise ValueError(
            "ref_embeddings must have the width of embeddings: "
            f"expected [..., {embeddings.shape[-1]}], got {list(ref_embeddings.shape)}"
        )


def check_labelled(prefix: str, embeddings: Tensor, labels: Tensor) -> torch.Size:
    """Check rows [..., N, D] and their labels, [..., N] integers or [..., N, L] bool; [...]."""
    name = f"{prefix}embeddings"
    check_embeddings(name, embeddings)
    what = "integers [..., rows] or bool [..., rows, L]"
    if not isinstance(labels, Tensor) or labels.is_floating_point() or labels.is_complex():
        fail_type(f"{prefix}labels", f"a tensor of {what}", labels, "pass labels.long()")
    rows = embeddings.shape[-2]
    shape = labels.shape[:-1] if labels.dtype == torch.bool else labels.shape
    if shape[-1:] == (rows,):
        try:
            leading: torch.Size = torch.broadcast_shapes(embeddings.shape[:-2], shape[:-1])
            return leading
        except RuntimeError:
            pass
    instead = ""
    if labels.dim() == 2 and labels.shape[0] == rows:
        column = labels.shape[1] == 1
        instead = "; pass labels[:, 0]" if column else "; of one-hot columns pass labels.argmax(1)"
    raise ValueError(
        f"{prefix}labels must be {what} with the rows and leading axes of {name} "
        f"{list(embeddings.shape)}, got {list(labels.shape)} of {labels.dtype}{instead}"
    )
