"""From query ids to lists: where the rows of each query go on a padded axis."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ._checks import check_bool, check_int, check_query_ids


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
