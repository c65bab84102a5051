"""Rows of queries on padded axes."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.func import vmap

import proxy_losses as P
from proxy_losses._lists import every_list

from .compiling import compile_fresh

EXTREME = [torch.iinfo(torch.int64).min, torch.iinfo(torch.int64).max, -1, 0, 1]
IDS = st.integers(-3, 3) | st.sampled_from(EXTREME) | st.integers(-(2**63), 2**63 - 1)


def rows_by_hand(ids: list[int], valid: list[bool]) -> list[list[int]]:
    """Rows of each query in their order; queries in the order of their ids."""
    kept = [k for k, v in enumerate(valid) if v]
    return [[k for k in kept if ids[k] == q] for q in sorted({ids[k] for k in kept})]


def placed(lists: P.QueryLists) -> list[list[int]]:
    return [r[v].tolist() for r, v in zip(lists.rows, lists.valid_mask, strict=True)]


@settings(max_examples=150, deadline=None)
@given(st.data(), st.lists(IDS, max_size=20), st.integers(1, 8), st.integers(1, 8))
def test_every_row_goes_to_its_query(data, ids, queries, length):
    flags = st.lists(st.booleans(), min_size=len(ids), max_size=len(ids))
    valid = data.draw(st.none() | flags)
    mask = None if valid is None else torch.tensor(valid, dtype=torch.bool)
    query_ids = torch.tensor(ids, dtype=torch.int64)
    lists = P.query_lists(query_ids, queries, length, valid_mask=mask)
    assert lists.rows.shape == lists.valid_mask.shape == (queries, length)
    assert (lists.rows.dtype, lists.valid_mask.dtype) == (torch.int64, torch.bool)
    want = rows_by_hand(ids, valid or [True] * len(ids))
    fits = len(want) <= queries and max(map(len, want), default=0) <= length
    assert lists.fits.item() == fits
    # What does not fit is left out, from the end.
    kept = [rows[:length] for rows in want[:queries]]
    assert placed(lists) == kept + [[]] * (queries - len(kept))
    assert (lists.rows[~lists.valid_mask] == 0).all()


@settings(max_examples=100, deadline=None)
@given(st.data(), st.lists(st.integers(-2, 9) | st.sampled_from(EXTREME), max_size=40))
def test_all_queries_of_the_data(data, ids):
    flags = st.lists(st.booleans(), min_size=len(ids), max_size=len(ids))
    valid = data.draw(flags)
    parts = every_list(torch.tensor(ids, dtype=torch.int64), torch.tensor(valid).bool(), None)
    want = rows_by_hand(ids, valid)
    assert sorted(r for part in parts for r in placed(part) if r) == sorted(want)
    assert all(part.fits for part in parts)
    assert sum(part.rows.numel() for part in parts) <= 2 * sum(valid)


@pytest.mark.parametrize("sizes", [[5000] + [3] * 300, [1] * 900, [64, 65, 33, 32, 31], [1 << 12]])
def test_one_long_query_does_not_pad_the_short_ones(sizes):
    query_ids = torch.repeat_interleave(torch.tensor(sizes))
    query_ids = query_ids[
        torch.randperm(len(query_ids), generator=torch.Generator().manual_seed(0))
    ]
    parts = every_list(query_ids, torch.ones_like(query_ids, dtype=torch.bool), None)
    assert sum(part.rows.numel() for part in parts) <= 2 * sum(sizes)
    assert sorted(n for part in parts for n in part.valid_mask.sum(-1).tolist()) == sorted(sizes)
    # An axis for each power of two, not for each length.
    assert len(parts) == len({(n - 1).bit_length() for n in sizes})


def test_a_given_shape_is_kept():
    query_ids = torch.tensor([4, 4, 7])
    (part,) = every_list(query_ids, torch.tensor([True, True, False]), (3, 2))
    assert placed(part) == [[0, 1], [], []]
    assert part.fits


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32, torch.int64])
def test_integer_types(dtype):
    lists = P.query_lists(torch.tensor([9, 200, 9, 100]).to(dtype), 3, 2)
    assert placed(lists) == [[0, 2], [3], [1]]
    assert lists.rows.dtype == torch.int64


def test_transforms():
    g = torch.Generator().manual_seed(0)
    query_ids = torch.randint(-2, 3, (4, 15), generator=g)
    valid = torch.rand(4, 15, generator=g) < 0.8
    want = [P.query_lists(x, 4, 6, valid_mask=v) for x, v in zip(query_ids, valid, strict=True)]
    assert len({w.fits.item() for w in want}) == 2
    mapped = vmap(lambda x, v: P.query_lists(x, 4, 6, valid_mask=v))(query_ids, valid)
    compiled, compiles = compile_fresh(
        lambda x, v: P.query_lists(x, 4, 6, valid_mask=v), "aot_eager"
    )
    for k, expected in enumerate(want):
        assert all(map(torch.equal, compiled(query_ids[k], valid[k]), expected))
        assert all(torch.equal(x[k], y) for x, y in zip(mapped, expected, strict=True))
    assert compiles() == 1


@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        ({"num_lists": 0}, ValueError, "num_lists must be >= 1"),
        ({"list_length": -1}, ValueError, "list_length must be >= 1"),
        ({"num_lists": 2.0}, TypeError, "num_lists must be an integer"),
        ({"list_length": True}, TypeError, "list_length must be an integer"),
        ({"query_ids": torch.zeros(4)}, TypeError, "query_ids must be integer query ids"),
        ({"query_ids": torch.zeros(4).bool()}, TypeError, "query_ids must be integer query ids"),
        ({"query_ids": [1, 2]}, TypeError, "query_ids must be a tensor, got list"),
        ({"query_ids": None}, TypeError, "query_ids must be a tensor, got NoneType"),
        ({"query_ids": torch.zeros(2, 2, dtype=torch.int64)}, ValueError, "query_ids must match"),
        ({"query_ids": torch.tensor(3)}, ValueError, "query_ids must match"),
        ({"valid_mask": torch.ones(4)}, TypeError, "valid_mask must be a bool tensor"),
        ({"valid_mask": torch.ones(3).bool()}, ValueError, "valid_mask must match query_ids"),
        ({"valid_mask": torch.ones(5).bool()}, ValueError, "valid_mask must match query_ids"),
    ],
)
def test_bad_arguments(change, error, says):
    args = {"query_ids": torch.arange(4), "num_lists": 4, "list_length": 1} | change
    with pytest.raises(error, match=says):
        P.query_lists(**args)
