"""The plan is a pure function of sizes: which method, with which parameters."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy_losses._ranks import plan as p
from proxy_losses._ranks.plan import Work


def smooth_ap(rows: int, positives: int, lists: int = 1) -> tuple[list[Work], int]:
    """The two calls of value and gradient, and the pairs of the dense method."""
    calls = [
        Work(lists, rows, lists * rows, positives, 4, 2),
        Work(lists, rows, positives, lists * rows, 2, 1),
    ]
    return calls, positives * rows


@pytest.mark.parametrize(
    ("rows", "positives", "lists", "span", "method"),
    [
        (1_000, 5, 1, 200.0, "dense"),
        (1_000, 50, 1, 200.0, "dense"),
        (16_384, 1_600, 1, 200.0, "grid"),
        (65_536, 330, 1, 200.0, "grid"),
        (1_000_000, 50_000, 1, 1_000.0, "grid"),
        (1_000_000, 50_000, 1, 1e6, "grid"),  # heavy tails: cells are counted later
        (1_536, 1_536, 1_000, 200.0, "dense"),  # one-vs-rest, a positive in one class each
        (16_384, 16_384, 10, 200.0, "grid"),
        (1_000_000, 50_000, 1, math.inf, "dense"),
        (1_000_000, 50_000, 1, math.nan, "dense"),
    ],
)
def test_chooses_by_size(rows, positives, lists, span, method):
    calls, pairs = smooth_ap(rows, positives, lists)
    assert p.plan(calls, span, 1e-6, pairs=pairs).method == method


@pytest.mark.parametrize("method", ["dense", "grid"])
def test_a_method_can_be_forced(method):
    calls, pairs = smooth_ap(4_000, 200)
    assert p.plan(calls, 100.0, 1e-6, pairs=pairs, method=method).method == method


@given(
    rows=st.integers(2, 10**8),
    span=st.floats(0, 1e9),
    rtol=st.floats(1e-13, 1e-2),
    lists=st.integers(1, 1000),
)
def test_grid_parameters_keep_the_promise(rows, span, rtol, lists):
    chosen = p.grid_plan(Work(lists, rows, lists * rows, rows), span, rtol)
    assert chosen.error <= rtol * (1 + 1e-9) or chosen.nodes == p.MAX_NODES
    assert p.MIN_NODES <= chosen.nodes <= p.MAX_NODES
    assert chosen.bin_width <= p.MAX_BIN_WIDTH or chosen.nodes == p.MAX_NODES
    assert chosen.cost > 0
    if span >= p.cell_width(rows, rtol):
        # all pairs further apart than a cell together weigh less than rtol
        assert rows * math.exp(-chosen.cell_width) <= rtol * (1 + 1e-9)
        assert chosen.bins * chosen.bin_width == pytest.approx(chosen.cell_width)


@given(nodes=st.integers(p.MIN_NODES, p.MAX_NODES), rtol=st.floats(1e-13, 1e-2))
def test_width_and_error_are_inverse(nodes, rtol):
    assert p.interpolation_error(nodes, p.bin_width(nodes, rtol)) == pytest.approx(rtol, rel=1e-6)


@given(rtol=st.floats(1e-12, 1e-3))
def test_more_nodes_allow_wider_bins(rtol):
    widths = [p.bin_width(n, rtol) for n in range(p.MIN_NODES, p.MAX_NODES + 1)]
    assert all(a < b for a, b in pairwise(widths))


def test_cost_grows_with_work_and_accuracy():
    work = Work(1, 100_000, 100_000, 5_000)
    cost = p.grid_plan(work, 1e3, 1e-6).cost
    assert p.grid_plan(work._replace(sources=200_000), 1e3, 1e-6).cost > cost
    assert p.grid_plan(work, 1e3, 1e-12).cost > cost > p.grid_plan(work, 1e3, 1e-4).cost
    assert p.grid_plan(work, 1e6, 1e-6).cost > cost
    assert p.grid_plan(work, 1e6, 1e-6, cells=600).cost < p.grid_plan(work, 1e6, 1e-6).cost
    assert p.dense_cost(10**6) > p.dense_cost(10**5)
