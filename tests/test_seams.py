"""Fuzzing of seams: where the method changes, ends of cells and bins, ties, extreme scales.

Every value is held against float64 pair sums (tests/exact.py) and the promise of the package:
within rtol, 1e-6 of float32 scores and 1e-12 of float64 ones, and gradients within 3 rtol of
max(|g|_2, |a|_2 / (4 tau)); of float64 scores plus the rounding of a coordinate, 2^-52 |s| / tau.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

import proxy_losses as P

from . import exact
from .exact import RTOL, array
from .fuzzing import FUZZ

DTYPES = st.sampled_from([torch.float32, torch.float64])
# Exact pairs are taken outright up to 1e5 of them: 316 squared.
ROWS = st.one_of(
    st.sampled_from([1, 2, 3, 4, 5, 7, 8, 15, 63, 64, 65, 255, 256, 257, 315, 316, 317, 318]),
    st.sampled_from([400, 999, 1_000, 1_024, 2_000, 3_163, 5_000]),
    st.integers(1, 700),
)
KINDS = [
    "normal", "ties", "one value", "neighbours", "multiples", "cell ends", "clump and outliers",
    "two blobs", "heavy", "lowest", "integers", "below typical", "below typical",
]  # fmt: skip
MOST = 300  # targets of a long list, which is what an exact pair sum costs


class Pool(NamedTuple):
    """One list; masks, weights and several lists are made from it."""

    scores: Tensor
    pos: Tensor
    valid: Tensor
    weight: Tensor
    tau: float
    label: str  # what was drawn

    def __repr__(self) -> str:
        return self.label


def toward(x: Tensor, up: Tensor, ulps: int) -> Tensor:
    """Each score moved by some ulps, up or down."""
    for _ in range(ulps):
        x = torch.nextafter(x, torch.where(up, torch.inf, -torch.inf).to(x.dtype))
    return x


def shaped(kind: str, rows: int, tau: float, dtype: torch.dtype, g: torch.Generator) -> Tensor:
    """Scores of spread about 1 in float64, and what must be exact in the dtype already so."""
    normal = torch.randn(rows, generator=g, dtype=torch.float64)
    uniform = torch.rand(rows, generator=g, dtype=torch.float64)
    coin = torch.rand(rows, generator=g) < 0.5
    pick = torch.randint(0, 4, (rows,), generator=g)
    few = torch.rand(rows, generator=g) < min(0.5, 5.0 / rows)
    # cells are K = ln(rows / rtol) tau wide, from a typical or from the lowest score; B bins each
    cell = tau * math.log(max(rows, 2) / RTOL[dtype])
    bins = int(torch.randint(1, 40, (), generator=g))
    step = torch.randint(-60, 60, (rows,), generator=g).double()
    far = 10.0 ** (6.0 * uniform)
    return {
        "normal": normal,
        "ties": (normal * int(torch.randint(1, 9, (), generator=g))).round() / 4.0,
        "one value": torch.where(few, normal, torch.full_like(normal, 0.7)),
        "neighbours": torch.full_like(normal, float(normal[0])),
        "multiples": step * tau / 2.0,
        "cell ends": 1.0 + step * cell / bins,
        "clump and outliers": torch.where(few, far * normal.sign(), 1e-3 * normal + 1.0),
        "two blobs": 0.05 * normal + 200.0 * tau * coin,
        "heavy": normal / uniform.clamp(min=1e-9) ** 2,
        "lowest": torch.where(pick == 0, torch.full_like(normal, -1.0), uniform * 3.0 - 1.0),
        "integers": step,
        "below typical": torch.full_like(normal, 1.0),
    }[kind]


@st.composite
def pools(draw, dtype: torch.dtype | None = None) -> Pool:
    dtype = draw(DTYPES) if dtype is None else dtype
    rows = draw(ROWS)
    kind = draw(st.sampled_from(KINDS))
    ratio = 10.0 ** draw(st.sampled_from([-3.0, -2.5, -2.0, -1.5, -1.0, -0.3, 0.0, 0.5, 1.0]))
    scale = draw(st.sampled_from([1.0] * 6 + [1e-30, 1e-10, 1e10, 1e30, 2.0**-40, 2.0**40]))
    shift = draw(st.sampled_from([0.0] * 4 + [-3.7, 64.0, 1e4]))
    ulps = draw(st.sampled_from([0, 0, 1, 2]))
    share = draw(st.sampled_from([0.0, 0.02, 0.3, 0.39, 0.41, 0.9, 1.0]))
    kept = draw(st.sampled_from([1.0, 1.0, 0.95, 0.5, 0.1]))
    seed = draw(st.integers(0, 2**20))
    g = torch.Generator().manual_seed(seed)
    tau = min(max(ratio * scale, 1e-20), 1e20)  # the range that is allowed
    scores = ((shaped(kind, rows, ratio, dtype, g) + shift) * scale).to(dtype)
    if ulps:
        some = torch.rand(rows, generator=g) < 0.4
        up = torch.rand(rows, generator=g) < 0.5
        scores = torch.where(some, toward(scores, up, ulps), scores)
    pos = torch.rand(rows, generator=g) < share
    valid = torch.rand(rows, generator=g) < kept
    if kind == "below typical":  # whose own cell is empty, on an axis that outliers make long
        beside = torch.rand(rows, generator=g) < 0.3
        few = torch.rand(rows, generator=g) < draw(st.sampled_from([1.0, 2.0, 40.0])) / rows
        far = scale * 10.0 ** (6.0 * torch.rand(rows, generator=g)) * (1 - 2 * (seed % 2))
        below = toward(scores, torch.zeros_like(beside), 1)
        scores = torch.where(few, (scores + far).to(dtype), torch.where(beside, below, scores))
        valid = beside | few
        pos &= valid
    pos[int(torch.randint(0, rows, (), generator=g))] = True
    if rows > 1_200:  # bound the exact pairs
        pos &= pos.cumsum(0) <= MOST
    weight = torch.rand(rows, generator=g, dtype=torch.float64).to(dtype)
    label = f"{kind} {rows} {dtype} tau {tau} shift {shift} ulps {ulps} {share} {kept} {seed}"
    return Pool(scores, pos, valid, weight, tau, label)


def grid_reaches(pool: Pool) -> bool:
    """The near-linear method is defined up to a range of 2^50 tau."""
    s = array(pool.scores)
    return float(s.max() - s.min()) <= 2.0**49 * pool.tau


def fits(x: np.ndarray | float, dtype: torch.dtype) -> bool:
    return bool(np.abs(x).max(initial=0.0) < torch.finfo(dtype).max / 16)


def assert_sums(got: Tensor, want: exact.Sums, pool: Pool) -> None:
    limit = exact.value_limit(pool.scores.dtype, pool.scores, pool.tau)
    off = np.abs(array(got) - want.value)
    bad = ~(off <= limit * want.scale)  # NaN is bad
    assert not bad.any(), (pool.label, float(np.max(off / (limit * want.scale + 1e-300))))


BOTH = ("auto", "dense", "grid")
SEAMS = settings(FUZZ, max_examples=120)


@SEAMS
@given(pool=pools(), signed=st.booleans())
def test_sums_by_any_method(pool, signed):
    w = torch.stack([pool.valid.to(pool.weight), pool.weight - 0.5 * signed])
    want = exact.sigmoid_sums(pool.scores, w, pool.pos, pool.tau)
    for method in BOTH if grid_reaches(pool) else BOTH[:2]:
        got = P.sigmoid_sums(pool.scores, w, pool.pos, pool.tau, method=method)
        assert got.dtype == pool.scores.dtype
        assert not got[:, ~pool.pos].any()
        try:
            assert_sums(got, want, pool)
        except AssertionError as error:
            raise AssertionError(f"{method}: {error}") from error


@SEAMS
@given(pool=pools())
def test_ranks_among_the_valid_by_any_method(pool):
    """Rows that do not count may be those of a typical score, which then has an empty cell."""
    want = exact.soft_ranks(pool.scores, pool.pos, pool.tau, pool.valid)
    limit = exact.value_limit(pool.scores.dtype, pool.scores, pool.tau)
    for method in BOTH if grid_reaches(pool) else BOTH[:2]:
        got = P.soft_ranks(pool.scores, pool.pos, pool.tau, valid_mask=pool.valid, method=method)
        for a, b in zip(got, want, strict=True):
            off = np.abs(array(a) - b)
            assert (off <= limit * b).all(), (
                method,
                pool.label,
                (off / (limit * b + 1e-300)).max(),
            )


@SEAMS
@given(pool=pools(), masked=st.booleans(), weighted=st.booleans())
def test_smooth_ap_keeps_its_promise(pool, masked, weighted):
    masks = {}
    if masked:
        masks["valid_mask"] = pool.valid
    if weighted:
        masks["sample_weight"] = pool.weight
    want = exact.smooth_ap(
        pool.scores, pool.pos, pool.tau, pool.valid if masked else None,
        pool.weight if weighted else None,
    )  # fmt: skip
    leaf = pool.scores.clone().requires_grad_()
    value = P.smooth_ap(leaf, pool.pos, pool.tau, **masks)
    (grad,) = torch.autograd.grad(value, leaf)
    scores = torch.where(pool.valid, pool.scores, 0.0) if masked else pool.scores
    try:
        if not fits(want.natural, pool.scores.dtype):
            grad = None
        exact.assert_precision(value.detach(), grad, want, scores, pool.tau)
    except AssertionError as error:
        raise AssertionError(f"{pool.label}: {error}") from error
    if masked and grad is not None:
        assert not grad[~pool.valid].any()


@settings(SEAMS, max_examples=50)
@given(data=st.data(), dtype=DTYPES)
def test_lists_together_are_lists_alone(data, dtype):
    """Lists of any kind side by side, each with its tau: each as exact as on its own."""
    few = [data.draw(pools(dtype)) for _ in range(data.draw(st.integers(2, 3)))]
    rows = min(len(p.scores) for p in few)
    scores, pos, valid = (torch.stack([getattr(p, k)[:rows] for p in few]) for k in
                          ("scores", "pos", "valid"))  # fmt: skip
    tau = torch.tensor([p.tau for p in few], dtype=torch.float64)
    leaf = scores.clone().requires_grad_()
    value = P.smooth_ap(leaf, pos, tau, valid_mask=valid)
    (grad,) = torch.autograd.grad(value.sum(), leaf)
    for k, pool in enumerate(few):
        want = exact.smooth_ap(scores[k], pos[k], pool.tau, valid[k])
        fit = fits(want.natural, dtype)
        counted = torch.where(valid[k], scores[k], 0.0)
        try:
            exact.assert_precision(
                value[k].detach(), grad[k] if fit else None, want, counted, pool.tau
            )
        except AssertionError as error:
            raise AssertionError(f"list {k}: {pool.label}: {error}") from error


@settings(SEAMS, max_examples=60)
@given(
    rows=st.integers(280, 360), positives=st.integers(280, 360), dtype=DTYPES,
    tau=st.sampled_from([0.01, 0.1, 1.0]), seed=st.integers(0, 999),
)  # fmt: skip
@example(rows=316, positives=316, dtype=torch.float32, tau=0.1, seed=0)
@example(rows=317, positives=316, dtype=torch.float32, tau=0.1, seed=0)
def test_the_method_changes_without_a_step(rows, positives, dtype, tau, seed):
    """About 1e5 pairs; lists whose pairs just differ have all the same right value."""
    g = torch.Generator().manual_seed(seed)
    scores = torch.randn(rows, generator=g, dtype=torch.float64).to(dtype)
    pos = torch.arange(rows) < min(positives, rows - 1)
    leaf = scores.clone().requires_grad_()
    value = P.smooth_ap(leaf, pos, tau)
    (grad,) = torch.autograd.grad(value, leaf)
    exact.assert_precision(value.detach(), grad, exact.smooth_ap(scores, pos, tau), scores, tau)


@pytest.mark.parametrize("tau", [0.3, 0.05])
@pytest.mark.parametrize("dtype", list(RTOL), ids=str)
@pytest.mark.parametrize("multiplicity", [1, 2, 3, 7, 50, 333, 2_000])
def test_ties_of_every_multiplicity(multiplicity, dtype, tau):
    """2,000 rows on 2,000 / multiplicity values, positives in some groups, all or mixed."""
    values = torch.linspace(-1.0, 1.0, -(-2_000 // multiplicity), dtype=dtype)
    scores = values.repeat_interleave(multiplicity)[:2_000]
    for share in (0.01, 0.4, 0.98):
        pos = torch.rand(2_000, generator=torch.Generator().manual_seed(multiplicity)) < share
        pos[5], pos[-7] = True, False
        leaf = scores.clone().requires_grad_()
        value = P.smooth_ap(leaf, pos, tau)
        (grad,) = torch.autograd.grad(value, leaf)
        exact.assert_precision(value.detach(), grad, exact.smooth_ap(scores, pos, tau), scores, tau)


@pytest.mark.parametrize("dtype", list(RTOL), ids=str)
@pytest.mark.parametrize("rows", [5, 300, 1_200])
@pytest.mark.parametrize("scale", [2.0**-126, 2.0**-140])
def test_denormal_scores(dtype, rows, scale):
    """All of them are ties at the least tau that there is; and so is zero."""
    g = torch.Generator().manual_seed(rows)
    scores = (torch.randint(-200, 200, (rows,), generator=g) * scale).to(dtype)
    pos = torch.arange(rows) % 3 == 0
    scores[::4] = 0.0
    tau = 1e-20
    want = exact.smooth_ap(scores, pos, tau)
    given = P.smooth_ap(scores, pos, torch.tensor(tau, dtype=torch.float64))
    exact.assert_precision(given, None, want, scores, tau)
    ranks = P.soft_ranks(scores, pos, tau, method="grid").all
    wanted = exact.soft_ranks(scores, pos, tau)[0]
    assert (np.abs(array(ranks) - wanted) <= exact.value_limit(dtype, scores, tau) * wanted).all()
