"""Smooth reciprocal rank: what its soft maximum means, its limits, and what it does to ties."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import proxy_losses as P

from .metrics import TIGHT, lists


def by_drawing(scores, pos, tau: float) -> tuple[float, float]:
    """Mean of the first positive's rank and of its reciprocal over all draws (Plackett-Luce)."""
    odds = [math.exp(s / tau) for s in scores]
    rank = reciprocal = 0.0
    for order in itertools.permutations(range(len(odds))):
        chance, left = 1.0, sum(odds)
        for j in order:
            chance *= odds[j] / left
            left -= odds[j]
        first = 1 + next(k for k, j in enumerate(order) if pos[j])
        rank += chance * first
        reciprocal += chance / first
    return rank, reciprocal


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**16), m=st.integers(2, 6), tau=st.floats(0.2, 5.0))
def test_is_one_over_the_expected_rank_of_the_first_positive(seed, m, tau):
    scores, pos = lists(seed, m)
    value = P.smooth_mrr(scores, pos, tau).item()
    rank, reciprocal = by_drawing(scores.tolist(), pos.tolist(), tau)
    assert value == pytest.approx(1.0 / rank, rel=1e-9)  # m! terms of which the last is a rest
    assert value <= reciprocal * (1.0 + 1e-9)


@settings(max_examples=40, deadline=None)
@given(
    above=st.integers(0, 5), tied=st.integers(0, 5), positives=st.integers(1, 5),
    later=st.integers(0, 3),
)  # fmt: skip
def test_limit_and_its_ties(above, tied, positives, later):
    scores = torch.tensor([2.0] * above + [1.0] * (tied + positives) + [0.0] * (later + 1))
    pos = torch.zeros(len(scores), dtype=torch.bool)
    pos[above + tied : above + tied + positives] = True
    pos[len(scores) - later :] = True  # the rest of the positives does not matter
    value = P.smooth_mrr(scores.double(), pos, 1e-3).item()
    assert value == pytest.approx(1.0 / (1 + above + tied / (positives + 1)), rel=1e-12)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**16), m=st.integers(2, 40), tau=st.floats(1e-3, 10.0))
def test_with_one_positive_it_is_smooth_ap(seed, m, tau):
    scores, _ = lists(seed, m)
    pos = torch.arange(m) == seed % m
    torch.testing.assert_close(
        P.smooth_mrr(scores, pos, tau), P.smooth_ap(scores, pos, tau), **TIGHT
    )


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**16), m=st.integers(3, 40), tau=st.floats(1e-2, 10.0))
def test_rises_with_every_positive_and_falls_with_every_negative(seed, m, tau):
    scores, pos = lists(seed, m)
    leaf = scores.clone().requires_grad_()
    value = P.smooth_mrr(leaf, pos, tau)
    value.backward()
    assert 0 < value <= 1
    assert (leaf.grad[pos] >= 0).all()
    assert (leaf.grad[~pos] <= 0).all()
    first = torch.where(pos, scores, -math.inf).argmax()
    assert leaf.grad[first] == leaf.grad.max()
    # A shift of all scores changes nothing.
    assert leaf.grad.sum().abs() <= 1e-12 * (1 + leaf.grad.abs().sum())
    # One positive more can only help.
    more = pos.clone()
    more[scores.where(~pos, math.inf).argmin()] = True
    assert more.all() or P.smooth_mrr(scores, more, tau) >= value.detach() * (1 - 1e-12)


def test_the_first_positive_keeps_its_gradient_among_many():
    """Its share is that of its odds, whatever stands below; its own part of 1 / R is whole."""
    scores = torch.cat([torch.tensor([1.0, 0.9]), torch.linspace(-2, -1, 100)]).double()
    pos = torch.arange(102) != 0  # behind one negative
    alone = torch.arange(102) == 1
    found = []
    for some, valid in ((pos, None), (alone, torch.arange(102) < 2)):
        leaf = scores.clone().requires_grad_()
        P.smooth_mrr(leaf, some, 0.1, valid_mask=valid).backward()
        found.append(leaf.grad[1])
    # 100 others of odds below e^-19.
    torch.testing.assert_close(found[0], found[1], rtol=100 * math.exp(-19.0), atol=0.0)


def test_weights_are_numbers_of_positives():
    scores, pos = lists(4, 12)
    count = torch.where(pos, torch.arange(12) % 3, 1)
    many = scores.repeat_interleave(count), pos.repeat_interleave(count)
    weight = count.double()
    w = weight[pos]
    # Weights count as numbers times sum w / sum w^2: shift the positives by what is taken.
    taken = (w.sum() / w.square().sum()).log() * 0.3
    want = P.smooth_mrr(many[0] + torch.where(many[1], taken, 0.0), many[1], 0.3)
    torch.testing.assert_close(P.smooth_mrr(scores, pos, 0.3, sample_weight=weight), want, **TIGHT)


def test_weights_get_a_gradient():
    scores, pos = lists(6, 2, 9)
    weight = torch.rand(2, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    assert torch.autograd.gradcheck(
        lambda w, t: P.smooth_mrr(scores, pos, t, sample_weight=w),
        (weight.requires_grad_(), torch.tensor(0.4, dtype=torch.float64, requires_grad=True)),
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("tau", [1e-6, 1e-2, 1e4])
def test_long_lists_and_wide_scores(dtype, tau):
    g = torch.Generator().manual_seed(3)
    scores = (1e4 * torch.randn(300_000, generator=g)).to(dtype).requires_grad_()
    pos = torch.rand(300_000, generator=g) < 0.01
    value = P.smooth_mrr(scores, pos, tau)
    value.backward()
    assert scores.grad.isfinite().all()
    s = scores.detach().double()
    first = tau * torch.logsumexp(s[pos] / tau, 0)
    want = 1.0 / (1.0 + ((s[~pos] - first) / tau).sigmoid().sum())
    # A float32 place in a list is worth that many roundings of its distance in tau.
    rtol = 1e-10 if dtype == torch.float64 else 1e-5
    torch.testing.assert_close(value.double(), want, rtol=rtol, atol=0.0)


def test_diagnostics():
    logits = torch.tensor([[3.0], [2.0], [1.0], [0.0]])
    loss_fn = P.MRRLoss(1, queue_size=0, temperature=0.01)
    loss, stats = loss_fn(logits, torch.tensor([0, 0, 1, 1]), return_diagnostics=True)
    assert stats["first_rank"].item() == pytest.approx(3.0)
    assert loss.item() == pytest.approx(1 - 1 / 3)
    assert stats["saturation"].item() == 1.0
    assert stats["pos_count"].item() == 2
    loss_fn.temperature = 1.0
    _, stats = loss_fn(logits, torch.tensor([0, 0, 1, 1]), return_diagnostics=True)
    assert stats["saturation"].item() == 0.0
    assert 1.0 < stats["first_rank"].item() < 3.0


def test_is_the_mean_over_queries():
    logits = torch.tensor([[3.0], [2.0], [1.0], [3.0], [2.0], [1.0]])
    targets, ids = torch.tensor([0, 1, 0, 0, 0, 1]), torch.arange(6) // 3
    loss, _ = P.smooth_mrr_loss(logits, targets, None, 1e-3, query_ids=ids)
    assert loss.item() == pytest.approx(1 - (1 / 2 + 1 / 3) / 2)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("tau_moves", [False, True])
def test_a_weight_that_is_no_number_shows(bad, tau_moves):
    scores, pos = lists(4, 12)
    tau = torch.tensor(0.3, dtype=torch.float64, requires_grad=tau_moves)
    weight = torch.ones(12, dtype=torch.float64)
    weight[0] = bad
    value = P.smooth_mrr(scores.requires_grad_(), pos, tau, sample_weight=weight)
    assert value.isnan()
    assert torch.autograd.grad(value, scores)[0].isnan().all()
