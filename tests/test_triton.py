"""The Triton kernels, run by Triton's interpreter on tensors of the CPU.

``TRITON_INTERPRET=1 python -m pytest tests/test_triton.py``: in a process of its own, as Triton
looks at the variable when it is imported.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("runs with TRITON_INTERPRET=1 only", allow_module_level=True)
pytest.importorskip("triton")

import proxy_losses as P
from proxy_losses import _numerics as num
from proxy_losses import _quantiles
from proxy_losses._metrics._record import defaults_of, over_lists
from proxy_losses._ranks import How, Lists, op, phi, triton
from proxy_losses._ranks import steps as _steps
from proxy_losses._ranks.triton import launch, ring
from proxy_losses._ranks.triton import steps as step_kernels
from proxy_losses._ranks.triton.phi import TWINS
from proxy_losses.nn import _ring

from . import exact
from .metrics import EXAMPLES, METRICS, TAU

KINDS = "value", "value,slope", "slope", "stretch", "value,stretch", "value,entropy"


@pytest.fixture(autouse=True)
def _nothing_is_zero_by_luck() -> Iterator[None]:
    """New memory holds NaN and the largest integers."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    assert torch.empty(1).isnan()
    yield
    torch.use_deterministic_algorithms(before)


@pytest.fixture
def through_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    """The ops that the library calls are the launchers."""
    for name in triton.__all__:
        monkeypatch.setattr(torch.ops.proxy_losses, name, getattr(triton, name))
    monkeypatch.setattr(_steps, "_runs", lambda device: True)


def draw(kind: str, lists: int, rows: int, seed: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Scores of a shape, and one tau per list."""
    gen = torch.Generator().manual_seed(seed)
    s = torch.randn(lists, rows, generator=gen, dtype=torch.float64)
    some = torch.rand(lists, rows, generator=gen)
    if kind == "ties":
        s = s.round()
    elif kind == "clump":  # half of the rows crowd, half lie far apart
        s = torch.where(some < 0.5, s * 1e-3, s * 1e3)
    elif kind == "outliers":
        s = torch.where(some < 0.05, s * 1e20, s)
    elif kind == "shifted":
        s = s * 0.1 + 50.0
    elif kind == "constant":
        s = torch.zeros_like(s) - 3.0
    tau = torch.rand(lists, generator=gen, dtype=torch.float64) * 0.3 + 0.01
    return s.to(dtype), tau


def masks(lists: int, rows: int, seed: int) -> tuple[Tensor, Tensor]:
    gen = torch.Generator().manual_seed(1000 + seed)
    valid = torch.rand(lists, rows, generator=gen) < 0.7
    return (torch.rand(lists, rows, generator=gen) < 0.3) & valid, valid


SHAPES = ("normal", "ties", "clump", "outliers", "shifted", "constant")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("method", ["dense", "grid"])
@pytest.mark.parametrize(("lists", "rows"), [(1, 3), (2, 25), (1, 130)])
def test_means_are_those_of_brute_force(
    method: str, shape: str, dtype: torch.dtype, lists: int, rows: int
) -> None:
    rtol = exact.RTOL[dtype]
    scores, tau = draw(shape, lists, rows, rows, dtype)
    pos, valid = masks(lists, rows, rows)
    gen = torch.Generator().manual_seed(7)
    weight = torch.rand(lists, rows, generator=gen)
    dirty = torch.where(valid, scores, torch.nan)
    given = [(valid, weight), (None, None), (valid, None)]
    for v, w in given[: 1 if rows > 100 else 3]:
        s = scores if v is None else dirty
        mean, defined, g = launch.rank_mean(s, pos, v, w, tau, True, "precision", rtol, method)
        alone = launch.rank_mean(s, pos, v, w, tau, False, "precision", rtol, method)
        assert alone[2].numel() == 0
        torch.testing.assert_close(alone[0], mean, rtol=2 * exact.ULP[dtype], atol=0.0)
        for k in range(lists):
            p, among = pos[k], torch.ones_like(pos[k]) if v is None else v[k]
            assert bool(defined[k]) == bool(p.any() and (among & ~p).any())
            wanted = exact.smooth_ap(
                scores[k], p, float(tau[k]), among, None if w is None else w[k]
            )
            assert abs(float(mean[k]) - wanted.value) <= rtol + exact.ULP[dtype]
            off = np.linalg.norm(exact.array(g[k]) - wanted.grad)
            assert off <= 3 * rtol * wanted.natural


@pytest.mark.parametrize("rtol", [1e-3, 1e-5, 1e-8, 1e-11])
@pytest.mark.parametrize("method", ["dense", "grid"])
def test_accuracy_asked_for_is_kept(method: str, rtol: float) -> None:
    """In float32 up to the rounding of what is returned."""
    scores, tau = draw("normal", 2, 300, 5, torch.float32)
    pos, _ = masks(2, 300, 5)
    mean, _, g = launch.rank_mean(scores, pos, None, None, tau, True, "precision", rtol, method)
    for k in range(2):
        wanted = exact.smooth_ap(scores[k], pos[k], float(tau[k]))
        assert abs(float(mean[k]) - wanted.value) <= rtol + exact.ULP[torch.float32]
        off = np.linalg.norm(exact.array(g[k]) - wanted.grad)
        assert off <= (3 * rtol + exact.ULP[torch.float32]) * wanted.natural


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("kinds", KINDS)
@pytest.mark.parametrize("method", ["dense", "grid"])
def test_sums_are_those_of_brute_force(method: str, kinds: str, dtype: torch.dtype) -> None:
    rtol, rows = exact.RTOL[dtype], 70
    for turn, groups in enumerate((1, 2, 3)):
        shape = SHAPES[(turn + KINDS.index(kinds)) % 4]
        scores, tau = draw(shape, 2, rows, turn, dtype)
        pos, valid = masks(2, rows, turn)
        gen = torch.Generator().manual_seed(turn)
        weights: Tensor = torch.randn(2, groups, rows, generator=gen, dtype=dtype)
        weights = torch.where(valid[:, None], weights, 0.0)
        if groups == 2:
            weights = weights > 0
        at = pos[:, None] if turn else torch.rand(2, groups, rows, generator=gen) < 0.5
        found = launch.pair_sums(scores, weights, at, tau, kinds, rtol, method)
        for k in range(2):
            s, w = exact.array(scores[k]), exact.array(weights[k])
            asked = at[k].expand(groups, rows)
            for kind, sums in zip(kinds.split(","), found, strict=True):
                value, scale = _pairs(s, w, float(tau[k]), kind)
                value[~asked.numpy()] = 0.0
                # Slopes as the sums themselves; z sigma'(z) is at most z times that, and so is the
                # entropy.
                factor = {"value": 1.0, "slope": 3.0}.get(kind, 30.0)
                off = np.abs(exact.array(sums[k]) - value)
                assert (off <= factor * rtol * scale).all()
                assert not sums[k][~asked].any()


def _pairs(s: np.ndarray, w: np.ndarray, tau: float, kind: str) -> tuple[np.ndarray, np.ndarray]:
    """Sums [G, M] of one kernel at all rows, and the scale of their promise."""
    value, scale = np.zeros(w.shape), np.zeros(w.shape)
    for i, z, up, slope in exact.blocks(s, np.arange(len(s)), tau):
        entropy = np.logaddexp(0.0, -np.abs(z)) + np.abs(z) * np.minimum(up, 1.0 - up)
        k = {"value": up, "slope": slope, "stretch": z * slope, "entropy": entropy}[kind]
        for g in range(len(w)):
            value[g, i] = (k * w[g]).sum(-1)
            scale[g, i] = (up * np.abs(w[g])).sum(-1) + np.abs(w[g]).max(initial=0.0) / 2
    return value, scale


@pytest.mark.parametrize("method", ["dense", "grid"])
def test_expanded_inputs_are_those_written_out(method: str) -> None:
    scores, tau = draw("normal", 1, 60, 1, torch.float32)
    pos, valid = masks(3, 60, 2)
    valid = valid[:1]
    pos = pos & valid
    wide = scores.expand(3, 60), valid.expand(3, 60), tau.expand(3)
    found = []
    for s, v, t in (wide, [x.contiguous() for x in wide]):
        both = v[:, None].expand(3, 2, 60)
        found.append(
            (
                *launch.rank_mean(s, pos, v, None, t, True, "precision", 1e-6, method),
                *launch.pair_sums(s, both, pos[:, None], t, "value", 1e-6, method),
            )
        )
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("method", ["dense", "grid"])
@pytest.mark.parametrize("name", [*TWINS, "inverse"])
def test_every_phi_is_that_of_torch(
    name: str, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those with a kernel of their own and any other."""
    inverse = phi.Phi("inverse", lambda r, _: (1 / r, -1 / r**2, 0.0 * r))
    monkeypatch.setitem(phi.PHIS, "inverse", inverse)
    scores, tau = draw("normal", 3, 50, 3, torch.float32)
    pos, valid = masks(3, 50, 3)
    pos[2] = False
    weight = torch.rand(3, 50, generator=torch.Generator().manual_seed(0))
    args = pos, valid, weight, tau, True, name, 1e-6
    found = launch.rank_mean(torch.where(valid, scores, torch.nan), *args, method)
    wanted = op.rank_mean(scores.double(), *args[:-1], 1e-12, "dense")
    assert torch.equal(found[1], wanted[1])
    # R - R+ is a sum of up to 50 terms.
    scale = 50.0 if name == "outranked" else 1.0
    assert (found[0] - wanted[0]).abs().max() <= 1e-6 * scale
    assert (found[2] - wanted[2]).norm(dim=1).max() <= 3e-6 * scale / float(tau.min())


@pytest.mark.parametrize("method", ["dense", "grid"])
def test_lists_that_are_not_sound(method: str) -> None:
    """A non-finite score or a tau that is none: NaN; a list that does not count: 0."""
    scores, _ = draw("normal", 5, 20, 0, torch.float32)
    pos = torch.zeros(5, 20, dtype=torch.bool)
    pos[:3, :5] = True
    pos[4] = True
    scores[0, 7], scores[3, 2] = torch.inf, torch.nan
    tau = torch.tensor([0.1, torch.nan, 0.2, 0.1, 0.1], dtype=torch.float64)
    mean, defined, g = launch.rank_mean(
        scores, pos, None, None, tau, True, "precision", 1e-6, method
    )
    assert defined.tolist() == [True, True, True, False, False]
    assert mean.isnan().tolist() == [True, True, False, False, False]
    assert g.isnan().all(1).tolist() == [True, True, False, False, False]
    assert not mean[3:].any()
    assert not g[3:].any()
    sums = launch.pair_sums(scores, ~pos[:, None], pos[:, None], tau, "value", 1e-6, method)[0][
        :, 0
    ]
    for k, broken in enumerate((True, True, False, True, False)):
        assert bool(sums[k][pos[k]].isnan().all()) is (broken or not pos[k].any())
        assert not sums[k][~pos[k]].any()


@pytest.mark.parametrize("method", ["dense", "grid"])
def test_weights_of_any_scale(method: str) -> None:
    scores, tau = draw("normal", 2, 30, 0, torch.float32)
    pos, _ = masks(2, 30, 0)
    weight = torch.rand(2, 30, generator=torch.Generator().manual_seed(0))
    plain = launch.rank_mean(scores, pos, None, weight, tau, True, "precision", 1e-6, method)
    for scale in (2.0**-120, 2.0**120):
        found = launch.rank_mean(
            scores, pos, None, weight * scale, tau, True, "precision", 1e-6, method
        )
        assert all(torch.equal(a, b) for a, b in zip(found, plain, strict=True))
    none = launch.rank_mean(scores, pos, None, 0 * weight, tau, True, "precision", 1e-6, method)
    assert not none[0].any()
    assert not none[1].any()
    assert not none[2].any()


def test_no_list_has_more_bins_than_have_room() -> None:
    """Crowds just large enough with few rows between them, and random lists."""
    crowds = []
    for between in (1, 2, 7, 9):
        loose = torch.arange(between) + 2.0
        parts = [torch.cat([torch.zeros(17), loose]) + 100.0 * k for k in range(40)]
        crowds.append(torch.cat(parts)[None])
    gen = torch.Generator().manual_seed(0)
    lists = [*crowds, torch.randn(1, 1, generator=gen), torch.randn(4, 700, generator=gen)]
    lists += [(torch.randn(2, 500, generator=gen) * r).round() for r in (1, 30, 300)]
    tight = []
    for scores in lists:
        rows = scores.shape[1]
        tau = torch.full((len(scores),), 0.01, dtype=torch.float64)
        bins = launch._cut(scores, None, None, None, tau, 1e-6, torch.float32)
        assert bins.room == len(scores) * launch._most_bins(rows, bins.nodes)
        used = int(bins.first[-1])
        tight.append(used / bins.room)
        starts = bins.starts[: used + 1]
        assert starts[0] == 0
        assert starts[-1] == scores.numel()
        assert (starts.diff() > 0).all()
        assert (torch.diff(starts) <= launch.LONGEST).all()
    assert 0.9 < max(tight) <= 1.0


def test_lists_long_enough_for_several_programs_and_stretches(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Few programs share many bins; long crowds are cut; large windows take several turns."""
    monkeypatch.setattr(launch, "PROGRAMS", 3)
    monkeypatch.setattr(launch, "LONGEST", 64)
    scores, tau = draw("normal", 2, 700, 9, torch.float32)
    scores[1] = scores[1] * 1e-4
    pos, _ = masks(2, 700, 9)
    mean, _, g = launch.rank_mean(scores, pos, None, None, tau, True, "precision", 1e-6, "grid")
    for k in range(2):
        wanted = exact.smooth_ap(scores[k], pos[k], float(tau[k]))
        assert abs(float(mean[k]) - wanted.value) <= 1e-6
        assert np.linalg.norm(exact.array(g[k]) - wanted.grad) <= 3e-6 * wanted.natural


def test_shapes_alone_choose_the_method() -> None:
    assert launch.takes_pairs(1000, launch.SHORT, "auto")
    assert launch.takes_pairs(1, 16384, "auto")
    assert not launch.takes_pairs(1, 65536, "auto")
    assert not launch.takes_pairs(1000, launch.SHORT + 1, "auto")
    assert launch.takes_pairs(1, 1 << 20, "dense")
    assert not launch.takes_pairs(1, 4, "grid")


@pytest.mark.parametrize("rows", [0, 1])
def test_empty_lists(rows: int) -> None:
    scores, tau = torch.zeros(2, rows), torch.ones(2, dtype=torch.float64)
    none = scores > 1
    mean, defined, g = launch.rank_mean(
        scores, none, None, None, tau, True, "precision", 1e-6, "auto"
    )
    assert mean.tolist() == [0.0, 0.0]
    assert not defined.any()
    assert g.tolist() == scores.tolist()
    sums = launch.pair_sums(scores, none[:, None], none[:, None], tau, "value,slope", 1e-6, "auto")
    assert [s.shape for s in sums] == [(2, 1, rows)] * 2


@pytest.mark.parametrize(
    ("rows", "count", "where"),
    [
        (3, 6, True),
        (3, 2, False),
        (8, 5, True),
        (8, 5, False),
        (11, 5, True),
        (1, 1 << 41, True),
    ],
)
def test_the_ring_is_written_as_by_torch(rows: int, count: int, where: bool) -> None:
    """To the bit: values of every kind of buffer, and the counter with its seal."""
    gen = torch.Generator().manual_seed(rows)
    flag, before = torch.tensor(where), torch.tensor(count)
    numbers = torch.randn(rows, 3, generator=gen, dtype=torch.float64)
    ids = torch.randint(-100, 1 << 60, (rows,), generator=gen)
    cases: list[tuple[torch.dtype, Tensor | None, int, tuple[int, ...]]] = [
        (torch.float32, numbers, 0, (8, 3)),
        (torch.float64, numbers.T.contiguous().T.bfloat16(), 0, (8, 3)),
        (torch.int64, ids, 0, (8,)),
        (torch.uint8, numbers > 0, 0, (8, 3)),
        (torch.int64, None, torch.iinfo(torch.int64).min, (8,)),
        (torch.float32, None, 1, (8, 3)),
    ]
    for dtype, given, value, shape in cases:
        found = torch.arange(shape[0]).reshape(-1, *[1] * (len(shape) - 1)).expand(shape).to(dtype)
        found, wanted = found.clone(), found.clone()
        ring.put_rows(found, given, value, rows, before, flag)
        _ring._put_rows(wanted, given, value, rows, before, flag)
        assert torch.equal(found, wanted)
    state = [
        [torch.tensor(count), torch.tensor(0), torch.zeros(1, dtype=torch.float64)] for _ in "ab"
    ]
    ring.count_rows(*state[0], before, flag, rows, 8, _ring.SEAL)
    _ring._count_rows(*state[1], before, flag, rows, 8, _ring.SEAL)
    assert all(map(torch.equal, *state))


@pytest.mark.filterwarnings("ignore:overflow encountered in cast")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_batch_is_kept_as_by_torch(dtype: torch.dtype) -> None:
    """With numbers and weights that are none or too large, in rows that count and in padding."""
    logits, ids = torch.zeros(700, 3, dtype=torch.float64), torch.zeros(700, dtype=torch.int64)
    weight, valid = torch.ones(700, dtype=torch.float64), torch.ones(900, dtype=torch.bool)
    ids[5] = -1
    kept = []
    for row, value in ((6, 1.0), (699, torch.nan), (5, torch.inf), (6, -torch.inf), (0, 1e300)):
        bad, heavy = logits.clone(), weight.clone()
        bad[row, 1], heavy[row] = value, value
        labels = torch.zeros(700, 3, dtype=torch.bool)
        gains = torch.ones(700, 3, dtype=torch.float64)
        gains[row, 1] = value
        for args in (
            (bad, ids, None, None, valid), (logits, ids, heavy, None, valid),
            (bad, labels, None, None, valid), (logits, ids, None, gains, valid),
            (logits, labels, None, -gains, valid),
            (logits.half(), ids, heavy.float(), gains.float(), ~valid),
        ):  # fmt: skip
            found = ring.keeps(*args, dtype, -1)
            assert found.shape == ()
            assert found == _ring._keeps(*args, dtype, -1)
            kept.append(bool(found))
    assert 0 < sum(kept) < len(kept)


@pytest.mark.usefixtures("through_triton")
@pytest.mark.parametrize("example", EXAMPLES.values(), ids=EXAMPLES.keys())
@pytest.mark.parametrize("method", ["dense", "grid"])
def test_metrics_and_all_their_gradients(
    example: Any, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By scores, weights and tau, as in float64 on the CPU."""
    monkeypatch.setattr(launch, "SHORT", 0 if method == "grid" else 1 << 20)
    monkeypatch.setattr(launch, "FEW_PAIRS", 0)
    gen = torch.Generator().manual_seed(3)
    scores = torch.randn(2, 90, generator=gen)
    pos = torch.rand(2, 90, generator=gen) < 0.4
    weight = torch.rand(2, 90, generator=gen)
    found = []
    for dtype in (torch.float32, torch.float64):
        if dtype == torch.float64:
            monkeypatch.undo()
        s, w = (x.to(dtype).requires_grad_() for x in (scores, weight))
        tau = torch.tensor([0.3, 0.2], dtype=torch.float64, requires_grad=True)
        value = example.metric.function(s, pos, tau, sample_weight=w, **example.settings)
        found.append([value, *torch.autograd.grad(value.sum(), (s, w, tau))])
    for single, double in zip(*found, strict=True):
        # Float32 scores against float64: sums of at most 90 terms, and thresholds.
        torch.testing.assert_close(single.double(), double.double(), rtol=1e-4, atol=2e-6)


@pytest.mark.usefixtures("through_triton")
def test_soft_ranks_and_saturation() -> None:
    scores, tau = draw("normal", 2, 60, 2, torch.float32)
    pos, valid = masks(2, 60, 2)
    ranks = P.soft_ranks(scores, pos, tau, valid_mask=valid)
    for k in range(2):
        wanted = exact.soft_ranks(scores[k], pos[k], float(tau[k]), valid[k])
        for got, want in zip(ranks, wanted, strict=True):
            np.testing.assert_allclose(exact.array(got[k]), want, rtol=2e-6)


# -- metrics of a threshold, of the first positive and of gains


@pytest.fixture
def launched(through_triton: None, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Which of their kernels ran; small ones, that take several turns."""
    names: list[str] = []
    monkeypatch.setattr(step_kernels, "BLOCK", 32)
    for name in ("mean_above", "precision_place", "first_rank", "relative_gains", "ideal_share"):
        kernel = getattr(step_kernels, name)

        def run(*args: Any, name: str = name, kernel: Any = kernel) -> Any:
            names.append(name)
            return kernel(*args)

        monkeypatch.setattr(torch.ops.proxy_losses, name, run)
    return names


OWN_KERNEL = [
    m for m in METRICS if m.name.split("_")[-1] not in ("ap", "auroc", "logistic", "pairwise")
]
own_kernel = pytest.mark.parametrize("metric", OWN_KERNEL, ids=lambda m: m.name)
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)


def judged(metric: Any, *shape: int, seed: int = 0) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Scores, positives (or gains), and masks; every list counts."""
    gen = torch.Generator().manual_seed(seed)
    scores = torch.randn(*shape, generator=gen, dtype=torch.float32).double()
    pos, valid = torch.rand(2, *shape, generator=gen) < torch.tensor([0.3, 0.8])[:, None, None]
    pos[..., :2], valid[..., :3] = torch.tensor([True, False]), True
    weight = torch.rand(shape, generator=gen)
    first = pos * torch.randint(1, 4, shape, generator=gen) if metric.graded else pos
    return scores, first, {"valid_mask": valid, "sample_weight": weight}


@own_kernel
@dtypes
def test_values_are_those_of_loops(metric: Any, dtype: torch.dtype, launched: list[str]) -> None:
    """Ties in the second list; a masked row holds what is no number."""
    scores, first, masks = judged(metric, 2, 45)
    scores[1] = (2 * scores[1]).round()
    for given in ({}, masks) if dtype == torch.float32 else (masks,):
        valid, weight = given.get("valid_mask"), given.get("sample_weight")
        s = scores if valid is None else torch.where(valid, scores, torch.nan)
        with torch.no_grad():
            found = metric.fn(s.to(dtype), first, TAU, **given)
        assert launched
        for k in range(2):
            rows = [None if x is None else x[k].tolist() for x in (valid, weight)]
            wanted = metric.reference(scores[k].tolist(), first[k].tolist(), TAU, *rows)
            # A few roundings of z, at most 20, and of what is returned.
            assert abs(float(found[k]) - wanted) <= 20 * exact.ULP[dtype] * max(1.0, wanted)


@own_kernel
@pytest.mark.parametrize(("dtype", "masked"), [(torch.float32, False), (torch.float64, True)])
def test_gradients_are_those_of_plain_formulas(
    metric: Any, dtype: torch.dtype, masked: bool, launched: list[str], monkeypatch: Any
) -> None:
    """With the derivative of the threshold that the formula names; masked, of the CPU."""
    scores, first, given = judged(metric, 2, 45, seed=1)
    tau = torch.tensor(TAU, dtype=torch.float64)
    if masked:
        scores[1] = (2 * scores[1]).round()
        scores = torch.where(given["valid_mask"], scores, torch.nan)
    else:
        given = {}
    s = scores.to(dtype).requires_grad_()
    (found,) = torch.autograd.grad(metric.fn(s, first, tau, **given).sum(), s)
    assert launched
    monkeypatch.undo()
    s = scores.clone().requires_grad_()
    if masked or metric.frozen is None:
        value = metric.fn(s, first, tau, **given)
    else:
        value = metric.frozen(scores, first, torch.ones_like(scores))(s)
    (wanted,) = torch.autograd.grad(value.sum(), s)
    assert (wanted.norm(dim=1) > 1e-3).all()
    off = (found.double() - wanted).norm(dim=1)
    assert (off <= 50 * exact.ULP[dtype] * wanted.norm(dim=1)).all()


@contextmanager
def computed_by(device: str) -> Iterator[None]:
    """By kernels, or by torch operations."""
    with pytest.MonkeyPatch.context() as patch:
        if device == "torch":
            patch.setattr(_steps, "_runs", lambda device: False)
        yield


@pytest.mark.filterwarnings("ignore:invalid value")
@own_kernel
@pytest.mark.parametrize("bad", [torch.inf, -torch.inf])
def test_lists_that_a_kernel_finds_unsound(metric: Any, bad: float, launched: list[str]) -> None:
    """NaN as on the CPU: a score or a weight that is not finite, a tau that is none."""
    scores, first, given = judged(metric, 7, 12, seed=2)
    scores, valid, weight = scores.float(), given["valid_mask"], given["sample_weight"]
    tau = torch.full((7,), TAU, dtype=torch.float64)
    scores[0, 0], scores[1, 1], weight[2], tau[3] = torch.nan, bad, torch.nan, -1.0
    first[4], valid[5], weight[6] = 0, False, 0.0
    scores[4:, 4] = torch.nan
    found = []
    for device in ("kernels", "torch"):
        s = scores.clone().requires_grad_()
        with computed_by(device):
            value = metric.fn(s, first, tau, valid_mask=valid, sample_weight=weight)
            (g,) = torch.autograd.grad(value.sum(), s)
        found.append(value)
        assert value[:4].isnan().all()
        assert not value[4:].any()
        assert not g[4:].any()
        assert g[:4][valid[:4]].isnan().all()
    assert launched
    assert torch.equal(found[0].isnan(), found[1].isnan())


@own_kernel
def test_batched_gradients_of_a_kernel_keep_their_graph(metric: Any, launched: list[str]) -> None:
    scores, first, given = judged(metric, 2, 12, seed=4)
    found = []
    for device in ("kernels", "torch"):
        s = scores.clone().requires_grad_()
        with computed_by(device):
            value, each = metric.fn(s, first, TAU, **given), torch.eye(2, dtype=torch.float64)
            (g,) = torch.autograd.grad(value, s, each, is_grads_batched=True, create_graph=True)
            found.append((g, torch.autograd.grad(g.square().sum(), s)[0]))
    assert launched
    for got, wanted in zip(*found, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("metric", [m for m in METRICS if m.name == "partial_auc_implicit"])
@dtypes
def test_a_temperature_that_underflows(
    metric: Any, dtype: torch.dtype, launched: list[str]
) -> None:
    tiny = torch.tensor(torch.finfo(dtype).tiny, dtype=torch.float64)
    scores, first, given = judged(metric, 2, 12, seed=3)
    value = [metric.fn((x * scores).to(dtype), first, tiny, **given) for x in (1.0, 2.0**-60)]
    assert launched
    assert torch.equal(*value)


@pytest.mark.parametrize("precision", [0.2, 0.5, 0.9, 1.0])
@pytest.mark.usefixtures("launched")
def test_places_of_a_precision_are_those_of_torch(precision: float) -> None:
    """To the bit; tied rows, lists of few rows, of positives and of negatives alone."""
    gen = torch.Generator().manual_seed(5)
    scores = (3 * torch.randn(16, 70, generator=gen)).round()
    rates = torch.linspace(0, 1, 16)[:, None]
    pos, valid = torch.rand(16, 70, generator=gen) < rates, torch.rand(16, 70, generator=gen) < 0.9
    valid[:3] = torch.arange(70) < torch.arange(3)[:, None]
    for mask in (None, valid):
        hits = pos if mask is None else pos & mask
        wanted = _quantiles.at_precision(scores, hits, mask, precision)
        found = _steps.lowest_at(Lists(scores, hits, mask), precision)
        assert all(map(torch.equal, found, wanted))


@own_kernel
def test_lists_at_the_edges(metric: Any, launched: list[str]) -> None:
    """Value, gradient and what counts as by torch: ties, one kind of row, hardly any row."""
    example = EXAMPLES[metric.name]
    gen = torch.Generator().manual_seed(6)
    rows = torch.arange(40)
    scores = torch.randn(9, 40, generator=gen, dtype=torch.float64)
    pos, valid = torch.rand(9, 40, generator=gen) < 0.5, torch.ones(9, 40, dtype=torch.bool)
    # No spread at all, or rounding alone.
    scores[0], scores[1] = 2.0, torch.where(pos[1], scores[1], 1.0 + 2.0**-52 * (rows % 2).double())
    pos[2], pos[3] = True, rows < 20
    valid[3] = rows < 20  # nothing but positives that count
    pos[4] = False
    valid[5:7] = rows < torch.tensor([[1], [2]])
    pos[5:7, 0] = True
    scores[7], pos[7] = 0.05 * scores[7], rows % 10 < 7  # more positives at the threshold
    gains = pos * torch.rand(9, 40, generator=gen, dtype=torch.float64)
    gains[3], gains[8] = 1.5 * pos[3], pos[8].double()
    lists = Lists(scores, pos, valid, gains=gains if metric.graded else None)
    found = []
    for device in ("kernels", "torch"):
        s = scores.clone().requires_grad_()
        with computed_by(device):
            out = over_lists(
                example.metric, lists._replace(scores=s), TAU, {
                    **defaults_of(example.metric), **example.settings
                }, How(),
            )  # fmt: skip
            (g,) = torch.autograd.grad(out.value.sum(), s)
        found.append((out.value, g, out.defined, out.degenerate))
    assert launched
    (value, g, *flags), (wanted, wanted_g, *wanted_flags) = found
    torch.testing.assert_close(value, wanted, rtol=1e-12, atol=0.0)
    torch.testing.assert_close(g, wanted_g, rtol=1e-9, atol=1e-13)
    for a, b in zip(flags, wanted_flags, strict=True):
        assert a is b is None or torch.equal(a, b)


def test_a_band_of_more_lists_than_scores(launched: list[str]) -> None:
    """One list of scores, two bands."""
    rows, found = torch.arange(30), []
    iid = rows < torch.tensor([[30], [20]])
    for device in ("kernels", "torch"):
        s = (7.0 * rows).sin().double().requires_grad_()
        with pytest.MonkeyPatch.context() as patch:
            if device == "torch":
                patch.setattr(_steps, "_runs", lambda device: False)
            value = P.partial_auc(
                s, rows % 3 == 0, 0.3, beta=0.5, iid_mask=iid, threshold_grad="implicit"
            )
            (g,) = torch.autograd.grad(value[0] + 2.0 * value[1], s, create_graph=True)
            found.append((value, g, torch.autograd.grad(g[3], s)[0]))
    assert launched
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


@pytest.mark.usefixtures("launched")
def test_weights_that_are_none_show_where_they_matter() -> None:
    """As by torch: not in lists that are all above the threshold, or that do not spread."""
    s, weight = torch.arange(12.0).view(2, 6), torch.full((2, 6), torch.nan)
    pos, valid = torch.arange(6) % 2 == 0, torch.arange(6) < torch.tensor([[6], [3]])
    given = {"valid_mask": valid, "sample_weight": weight}
    found = P.recall_at_k(s, pos, 0.3, k=4, **given)
    flat = s.minimum(torch.tensor([[9.0], [6.0]]))
    for value in (found, P.partial_auc(flat, pos, 0.3, beta=0.5, **given)):
        assert value.isnan().tolist() == [True, False]


@pytest.mark.filterwarnings("ignore:overflow")
@pytest.mark.usefixtures("launched")
def test_thresholds_with_no_row_near_and_scores_that_overflow() -> None:
    """The nearest rows move it; as `with_implicit_grad` does, whose tests are of the same cases."""
    pos = torch.tensor([[True, False, False, False]])
    for scores, theta, tau in (
        ([0.0, 1.0, 3.0, 1e30], 2.25, 1e-20),
        ([-3e38, 3e38, 1e38, 0.0], 0.0, 1e-3),
        ([0.0, 0.5, 0.25, 3e38], 1e-3, 1e-3),
    ):
        s = torch.tensor([scores])
        among = torch.tensor([[True, True, True, False]])
        at, unit = torch.tensor([[theta]]), torch.tensor([tau], dtype=torch.float64)
        args = None, None, unit, at, None, among, None, None, 1, [], "quantile"
        _, g, *_ = step_kernels.mean_above(s, pos, *args, True)
        leaf = s.clone().requires_grad_()
        some = torch.tensor([[True]])
        moved = num.with_implicit_grad(at, leaf, among, tau, some)
        num.step_means(leaf, moved, tau, pos, some).sum().backward()
        assert leaf.grad is not None
        torch.testing.assert_close(g, leaf.grad, rtol=1e-5, atol=0.0)


def test_shapes_strides_and_second_derivatives(launched: list[str], monkeypatch: Any) -> None:
    """Masks of all lists, scores one class beside the other, [B, L, M]; twice differentiated."""
    gen = torch.Generator().manual_seed(4)
    logits = torch.randn(30, 3, generator=gen, dtype=torch.float64)
    pos, valid = torch.rand(2, 30, generator=gen) < torch.tensor([[0.4], [0.8]])
    pos[0] = valid[0] = True
    pick = torch.randn(2, 3, 30, generator=gen, dtype=torch.float64)
    for function in (
        functools.partial(P.recall_at_k, k=(3, 7)),
        functools.partial(P.recall_at_precision, precision=0.5),
        functools.partial(P.partial_auc, beta=0.5, tau_scale="band", budget_basis="population"),
        P.smooth_mrr,
    ):
        found = []
        for device in ("kernels", "torch"):
            with computed_by(device):
                z = logits.clone().requires_grad_()
                s = torch.stack([z.T, 2 * z.T])
                value = function(s, pos, 0.3, valid_mask=valid)
                assert value.shape == (2, 3)
                (g,) = torch.autograd.grad(value.sum(), z, create_graph=True)
                (once,) = torch.autograd.grad(function(z.T, pos, 0.3).sum(), z)
                found.append((value, g, once, *torch.autograd.grad((g * pick[0].T).sum(), z)))
        for a, b in zip(*found, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)
    assert launched
