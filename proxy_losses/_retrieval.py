"""Retrieval: from embeddings and labels to one list of scores per query."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from . import _numerics as num
from ._checks import check_choice, check_floating, fail_type

SIMILARITIES = ("cosine", "dot")


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
    embeddings: Tensor,
    labels: Tensor,
    *,
    ref_embeddings: Tensor | None = None,
    ref_labels: Tensor | None = None,
    similarity: str = "cosine",
) -> RetrievalLists:
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
    _check(embeddings, labels, ref_embeddings, ref_labels)
    lists: RetrievalLists = _lifted(embeddings, labels, ref_embeddings, ref_labels, similarity)
    return lists


@num.full_precision
def _lifted(
    embeddings: Tensor,
    labels: Tensor,
    ref_embeddings: Tensor | None,
    ref_labels: Tensor | None,
    similarity: str,
) -> RetrievalLists:
    queries = _unit_rows(embeddings) if similarity == "cosine" else embeddings
    if ref_embeddings is None or ref_labels is None:
        refs, ref_labels = queries, labels
        valid = ~torch.eye(queries.shape[-2], dtype=torch.bool, device=queries.device)
    else:
        refs = ref_embeddings.to(queries.dtype)
        refs = _unit_rows(refs) if similarity == "cosine" else refs
        valid = torch.ones((), dtype=torch.bool, device=queries.device)
    if labels.dtype == torch.bool:  # how many labels they share
        pos = labels.to(queries.dtype) @ ref_labels.to(queries.dtype).mT > 0
    else:
        pos = labels[..., :, None] == ref_labels[..., None, :]
    return RetrievalLists(*torch.broadcast_tensors(queries @ refs.mT, pos, valid))


def _unit_rows(x: Tensor) -> Tensor:
    """Rows [..., D] divided by their norms; 0 with zero gradient where the square underflows."""
    # A direction has no scale, so the gradient needs none of the scale's. Squares then neither
    # overflow nor vanish, unlike those of x.
    scale = x.detach().abs().amax(-1, keepdim=True)
    zero = scale <= torch.finfo(x.dtype).tiny ** 0.5  # False for NaN, which goes on
    x = torch.where(zero, 0.0, x / torch.where(zero, 1.0, scale))
    return x / torch.where(zero, 1.0, (x * x).sum(-1, keepdim=True)).sqrt()


def _check(
    embeddings: Tensor, labels: Tensor, ref_embeddings: Tensor | None, ref_labels: Tensor | None
) -> None:
    """Check queries, embeddings [..., Q, D] and their labels, and references likewise or None."""
    leading = [_check_labelled("", embeddings, labels)]
    if ref_embeddings is not None and ref_labels is not None:
        leading.append(_check_labelled("ref_", ref_embeddings, ref_labels))
        if ref_embeddings.shape[-1] != embeddings.shape[-1]:
            raise ValueError(
                "ref_embeddings must have the width of embeddings: "
                f"expected [..., {embeddings.shape[-1]}], got {list(ref_embeddings.shape)}"
            )
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


def _check_labelled(prefix: str, embeddings: Tensor, labels: Tensor) -> torch.Size:
    """Check rows [..., N, D] and their labels, [..., N] integers or [..., N, L] bool; [...]."""
    name = f"{prefix}embeddings"
    check_floating(name, embeddings)
    if embeddings.dim() < 2 or embeddings.shape[-1] == 0:
        raise ValueError(f"{name} must be [..., rows, D] with D >= 1, got {list(embeddings.shape)}")
    what = "integers [..., rows] or bool [..., rows, L]"
    if not isinstance(labels, Tensor) or labels.is_floating_point() or labels.is_complex():
        fail_type(f"{prefix}labels", what, labels)
    rows = embeddings.shape[-2]
    shape = labels.shape[:-1] if labels.dtype == torch.bool else labels.shape
    if shape[-1:] == (rows,):
        try:
            leading: torch.Size = torch.broadcast_shapes(embeddings.shape[:-2], shape[:-1])
            return leading
        except RuntimeError:
            pass
    raise ValueError(
        f"{prefix}labels must be {what} with the rows and leading axes of {name} "
        f"{list(embeddings.shape)}, got {list(labels.shape)} of {labels.dtype}"
    )
