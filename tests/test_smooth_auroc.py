"""Smooth AUROC, its two surrogates, and the sums of softplus under one of them."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import roc_auc_score
from torch import Tensor
from torch.func import vmap

import proxy_losses as P
from proxy_losses._ranks import How, softplus_sums

from . import exact
from .metrics import TIGHT, lists

SHAPES = "normal", "ties", "clump", "outliers", "shifted", "far"
by_logistic = {"surrogate": "logistic"}


def draw(kind: str, rows: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(rows)
    s, some = torch.randn(rows, generator=g, dtype=torch.float64), torch.rand(rows, generator=g)
    if kind == "ties":
        s = s.round()
    elif kind == "clump":
        s = torch.where(some < 0.5, s * 1e-3, s * 1e3)
    elif kind == "outliers":
        s = torch.where(some < 0.05, s * 1e9, s)
    elif kind == "shifted":
        s = s * 0.1 + 50.0
    elif kind == "far":
        s = s * 10.0 ** (6.0 * some.double())
    return s.to(dtype), torch.rand(rows, generator=g) < 0.1


@pytest.mark.parametrize("kind", SHAPES)
@pytest.mark.parametrize("method", ["dense", "grid"])
@pytest.mark.parametrize(
    ("dtype", "rtol"),
    [(torch.float32, 1e-3), (torch.float32, 1e-6), (torch.float64, 1e-6), (torch.float64, 1e-12)],
    ids=str,
)
def test_softplus_sums_keep_their_promise(kind, method, rtol, dtype):
    tau, single = 0.3, dtype == torch.float32
    scores, pos = draw(kind, 3000, dtype)
    scores.requires_grad_()
    found = softplus_sums(scores, ~pos, pos, tau, How(rtol, method))
    assert found.dtype == dtype
    assert not found[~pos].any()
    g = torch.Generator().manual_seed(0)
    share = torch.rand(3000, generator=g, dtype=torch.float64)
    (grad,) = torch.autograd.grad((found.double() * share).sum(), scores)
    s, p = exact.array(scores), pos.numpy()
    pull = np.zeros(3000)
    for i, z, up, _ in exact.blocks(s, np.flatnonzero(p), tau):
        want = (np.logaddexp(0.0, z) * ~p).sum(1)
        off = np.abs(exact.array(found)[i] - want)
        # The floor is the rounding of s / tau in float64, of both scores of every pair above.
        floor = exact.ULP[torch.float64] * np.abs(s).max() / tau * np.minimum(1.0 + want, 3000)
        assert (off <= rtol * (1.0 + want) + single * exact.ULP[dtype] * want + floor).all()
        flow = up * ~p * share.numpy()[i, None] / tau
        pull += flow.sum(0)
        pull[i] -= flow.sum(1)
    near = np.linalg.norm(exact.array(grad) - pull) / np.linalg.norm(pull)
    assert near <= 3.0 * rtol + single * 2 * exact.ULP[dtype]


def test_softplus_sums_have_all_their_derivatives():
    scores, pos = lists(3, 2, 8)
    tau = torch.tensor([0.3, 0.5], dtype=torch.float64, requires_grad=True)
    valid = torch.arange(8) != 5

    def f(s, t):
        return softplus_sums(s, valid & ~pos, pos & valid, t)

    args = scores.requires_grad_(), tau
    assert torch.autograd.gradcheck(f, args)
    assert torch.autograd.gradgradcheck(f, args)


def test_the_gradient_of_tau_is_not_cancelled_away():
    """Scores that all lie 1e8 off: by their products with the gradient nothing would be left."""
    scores, pos = lists(2, 40)
    found = []
    for shift in (0.0, 2.0**27):
        tau = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
        s = ((64 * scores).round() / 64 + shift).requires_grad_()
        P.smooth_auroc(s, pos, tau, **by_logistic).backward()
        found.append(tau.grad)
    # 2^27 / tau times 2^-53, of numbers near 1.
    torch.testing.assert_close(found[1], found[0], rtol=1e-6, atol=0.0)


def test_softplus_sums_of_lists_that_are_broken():
    scores, pos = lists(1, 3, 12)
    scores[0, 4] = math.nan
    tau = torch.tensor([0.3, 0.3, -1.0], dtype=torch.float64)
    found = softplus_sums(scores, ~pos, pos, tau)
    assert found[0][pos[0]].isnan().all()
    assert found[2][pos[2]].isnan().all()
    assert found[1].isfinite().all()
    assert (found[~pos] == 0).all()
    with pytest.raises(ValueError, match="tau must be positive"):
        softplus_sums(scores, ~pos, pos, 0.0)


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**16), m=st.integers(2, 40), tau=st.floats(1e-3, 10.0))
def test_upside_down_the_classes_change_places(seed, m, tau):
    """s_i - s_j is the same pair when scores are negated and positives are the others."""
    scores, pos = lists(seed, m)
    for surrogate in ("sigmoid", "logistic"):
        value = P.smooth_auroc(scores, pos, tau, surrogate=surrogate)
        other = P.smooth_auroc(-scores, ~pos, tau, surrogate=surrogate)
        torch.testing.assert_close(other, value, **TIGHT)
    # And a score reversed is one minus the area.
    torch.testing.assert_close(
        P.smooth_auroc(-scores, pos, tau),
        1.0 - P.smooth_auroc(scores, pos, tau),
        rtol=0,
        atol=1e-12,
    )


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**16), m=st.integers(3, 60), tau=st.floats(1e-2, 10.0), ties=st.booleans()
)
def test_logistic_is_below_the_area(seed, m, tau, ties):
    """log2(1 + exp(z)) is 1 at a tie and above the step: a bound of the area without its ties."""
    scores, pos = lists(seed, m)
    scores = scores.round() if ties else scores
    value = P.smooth_auroc(scores, pos, tau, **by_logistic).item()
    wins = (scores[pos][:, None] > scores[~pos]).double().mean().item()
    assert value <= wins + 1e-12 <= roc_auc_score(pos, scores) + 2e-12


@pytest.mark.parametrize("rows", [50, 20_000])
def test_limit_counts_tied_pairs_half(rows):
    g = torch.Generator().manual_seed(rows)
    scores = torch.randint(0, 10, (rows,), generator=g).float()
    pos = torch.rand(rows, generator=g) < 0.3
    got = P.smooth_auroc(scores, pos, 1e-3).item()
    assert got == pytest.approx(roc_auc_score(pos, scores), rel=2e-6)


def test_logistic_has_no_floor_and_all_ties_are_zero():
    pos = torch.tensor([True, False])
    assert P.smooth_auroc(torch.tensor([0.0, 10.0]), pos, 0.1, **by_logistic) < -100
    assert P.smooth_auroc(torch.zeros(2), pos, 0.1, **by_logistic).item() == pytest.approx(0.0)
    loss_fn = P.AUROCLoss(1, "logistic", queue_size=0, temperature=0.1)
    assert loss_fn(torch.tensor([[0.0], [10.0]]), torch.tensor([1, 0])) > 100


@pytest.mark.parametrize("surrogate", ["sigmoid", "logistic"])
def test_a_wrong_pair_far_apart_pulls_in_the_logistic_surrogate_alone(surrogate):
    scores = torch.tensor([0.0, 100.0], requires_grad=True)
    P.smooth_auroc(scores, torch.tensor([True, False]), 1.0, surrogate=surrogate).backward()
    pull = 1.0 / math.log(2.0) if surrogate == "logistic" else 0.0
    torch.testing.assert_close(scores.grad, torch.tensor([pull, -pull]), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("surrogate", ["sigmoid", "logistic"])
def test_long_lists_are_those_of_brute_force(surrogate):
    """Beyond the sizes summed pair by pair, with masks and weights, in a batch."""
    g = torch.Generator().manual_seed(4)
    scores = torch.randn(2, 20_000, generator=g)
    pos, valid = (torch.rand(2, 20_000, generator=g) < rate for rate in (0.05, 0.7))
    weight = torch.rand(2, 20_000, generator=g)
    leaf = torch.where(valid, scores, torch.nan).requires_grad_()
    value = P.smooth_auroc(
        leaf, pos, 0.2, surrogate=surrogate, valid_mask=valid, sample_weight=weight
    )
    value.sum().backward()
    wide = scores.double().requires_grad_()
    total = []
    for s, p, v, w in zip(wide, pos, valid, weight.double(), strict=True):
        z = (s[p & v][:, None] - s[v & ~p]) / 0.2
        each = z.sigmoid()
        if surrogate == "logistic":
            each = 1.0 - torch.nn.functional.softplus(-z, threshold=100) / math.log(2.0)
        total.append((each.mean(1) * w[p & v]).sum() / w[p & v].sum())
    want = torch.stack(total)
    want.sum().backward()
    torch.testing.assert_close(value.double(), want, rtol=3e-6, atol=0.0)
    off = (leaf.grad.double() - wide.grad).norm() / wide.grad.norm()
    assert off < 3e-6


@pytest.mark.parametrize("surrogate", ["sigmoid", "logistic"])
def test_diagnostics_tell_which_positives_feel_no_pair(surrogate):
    """Far above all negatives nothing pulls; far below, the logistic surrogate still does."""
    logits = torch.tensor([[50.0], [-50.0], [0.1], [0.0], [50.0]])
    targets = torch.tensor([1, 1, 1, 0, 1])
    loss_fn = P.AUROCLoss(1, surrogate, queue_size=0, temperature=1.0)
    _, stats = loss_fn(logits, targets, return_diagnostics=True)
    assert stats["saturation"].item() == (0.75 if surrogate == "sigmoid" else 0.5)
    assert stats["pos_count"].item() == 4
    assert stats["tau_eff"].item() == 1.0


def test_a_bad_surrogate_is_named():
    pos = torch.tensor([True, False])
    with pytest.raises(ValueError, match=r"surrogate must be one of .*'hinge'"):
        P.smooth_auroc(torch.randn(2), pos, 0.1, surrogate="hinge")
    with pytest.raises(ValueError, match=r"surrogate must be one of .*'hinge'"):
        P.AUROCLoss(1, "hinge")
    with pytest.raises(ValueError, match="rtol"):
        P.smooth_auroc(torch.randn(2), pos, 0.1, rtol=2.0)


def test_a_list_that_does_not_count_has_no_gradient_whatever_its_tau():
    scores, pos = lists(5, 2, 9)
    pos[0] = True
    for surrogate in ("sigmoid", "logistic"):
        leaf, tau = scores.clone().requires_grad_(), torch.tensor([-1.0, 0.3])
        value = P.smooth_auroc(leaf, pos, tau, surrogate=surrogate)
        value.sum().backward()
        assert value[0] == 0
        assert (leaf.grad[0] == 0).all()
        assert (leaf.grad[1] != 0).any()


def test_a_mapped_call_of_long_lists():
    g = torch.Generator().manual_seed(6)
    scores, pos = torch.randn(3, 6000, generator=g), torch.rand(3, 6000, generator=g) < 0.3

    def one(s, p):
        return P.smooth_auroc(s, p, 0.1, **by_logistic)

    want = torch.stack([one(s, p) for s, p in zip(scores, pos, strict=True)])
    torch.testing.assert_close(vmap(one)(scores, pos), want, rtol=2e-6, atol=0.0)
