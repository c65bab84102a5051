"""Recall at a precision: the place, the gradient of its threshold, lists where there is none."""

from __future__ import annotations

import functools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchmetrics.functional.classification import binary_recall_at_fixed_precision

import proxy_losses as P
from proxy_losses import _quantiles

from .metrics import lists
from .reference import held_precision, sigmoid, threshold_at
from .test_threshold_grad import CLOSE, gradient, slope_of


def a_list(m: int, seed: int, rate: float, *, ties: bool):
    g = torch.Generator().manual_seed(seed)
    scores = torch.randn(m, generator=g, dtype=torch.float64)
    scores = (2 * scores).round() / 2 if ties else scores
    pos, valid = (torch.rand(m, generator=g) < share for share in (rate, 0.8))
    return scores, pos & valid, valid


any_list = given(
    m=st.integers(0, 40), seed=st.integers(0, 2**16), rate=st.floats(0, 1), ties=st.booleans(),
    precision=st.one_of(st.sampled_from([0.1, 1 / 3, 0.6, 0.75, 1.0]), st.floats(0.01, 1.0)),
)  # fmt: skip


@settings(max_examples=200, deadline=None)
@any_list
def test_the_place_is_the_last_that_reaches_the_precision(m, seed, rate, ties, precision):
    scores, pos, valid = a_list(m, seed, rate, ties=ties)
    rows = valid.nonzero()[:, 0].tolist()
    want = threshold_at(scores.tolist(), pos.tolist(), rows, precision) if rows else None
    found = _quantiles.at_precision(scores, pos, valid, precision)
    assert [x.item() for x in found] == [want or 0.0, want is not None]
    # By a sort where this is a selection, and as several processes count.
    padded = [torch.nn.functional.pad(x, (0, 8 * m + 20)) for x in (scores, pos, valid)]
    assert all(map(torch.equal, _quantiles.at_precision(*padded, precision), found))
    count = valid.sum(-1, keepdim=True)
    counted = _quantiles._sharded_at_precision(scores, pos, valid, precision, count, "")
    assert all(map(torch.equal, counted, found))


@settings(max_examples=100, deadline=None)
@any_list
def test_the_limit_is_that_of_torchmetrics(m, seed, rate, ties, precision):
    scores, pos, _ = a_list(m + 1, seed, rate, ties=ties)
    pos[-1] = True
    # It compares in float32; scores in [0, 1] are left as they are.
    precision, scores = round(precision, 3), scores.sigmoid()
    want, _ = binary_recall_at_fixed_precision(scores, pos.long(), precision)
    found = P.recall_at_precision(scores, pos, 1e-6, precision=precision)
    if want > 0 or not (pos & (scores == scores.max())).any():
        assert found.item() == pytest.approx(want.item(), rel=1e-6, abs=1e-12)
    else:
        assert found > 0  # half of those tied with the largest


@pytest.mark.parametrize("tau", [0.1, 0.3])
def test_the_gradient_holds_the_soft_precision(tau):
    scores, pos = lists(2, 24)
    pos = pos | (scores > 1.0)
    theta = threshold_at(scores.tolist(), pos.tolist(), range(24), 0.8)

    def value(s):
        return held_precision(s, pos.tolist(), tau, theta, scores.tolist(), 0.8)

    fn = functools.partial(P.recall_at_precision, precision=0.8)
    found = gradient(fn, scores, pos, tau)
    torch.testing.assert_close(found, slope_of(value, scores), **CLOSE)


@settings(max_examples=100, deadline=None)
@any_list
def test_negatives_are_pushed_by_what_positives_gain(m, seed, rate, ties, precision):
    """The gradient of positives is that of a constant threshold, up to doubled."""
    scores, pos, valid = a_list(m, seed, rate, ties=ties)
    how = {"precision": precision, "valid_mask": valid}
    values = [
        P.recall_at_precision(scores, pos, 0.3, threshold_grad=grad, **how)
        for grad in ("implicit", "none")
    ]
    assert torch.equal(*values)
    fn = functools.partial(P.recall_at_precision, **how)
    found = gradient(fn, scores, pos, 0.3)
    plain = gradient(functools.partial(fn, threshold_grad="none"), scores, pos, 0.3)
    assert ((found[pos] >= plain[pos] - 1e-15) & (found[pos] <= 2 * plain[pos] + 1e-15)).all()
    assert (found[~pos] <= 0).all()
    assert (plain[~pos] == 0).all()
    assert (found[~valid] == 0).all()
    assert found.sum().abs() < 1e-14


def test_where_no_threshold_is_precise_enough_there_is_a_gradient():
    scores = torch.tensor([2.0, 1.0, 0.5, 0.0, -1.0], dtype=torch.float64)
    pos = torch.tensor([False, True, False, True, False])
    fn = functools.partial(P.recall_at_precision, precision=0.9)
    steps = [sigmoid((s - 2.0) / 0.3) for s in (1.0, 0.0)]
    assert fn(scores, pos, 0.3).item() == pytest.approx(sum(steps) / 2, rel=1e-14)
    found = gradient(fn, scores, pos, 0.3)
    assert found[1] > 0.05
    assert found[0] < -0.05


def test_where_all_rows_are_precise_enough_there_is_nothing_to_gain():
    scores, pos = lists(4, 10, rate=0.9)
    s = scores.clone().requires_grad_()
    tau = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    value = P.recall_at_precision(s, pos, tau, precision=0.5)
    assert value == 1.0
    assert [x.abs().sum() for x in torch.autograd.grad(value, (s, tau))] == [0, 0]
    assert P.recall_at_precision(scores, pos, 0.3, precision=5e-324) == 1.0
    assert P.recall_at_precision(scores, pos, torch.tensor(-1.0), precision=0.5).isnan()
    scores[0] = torch.nan
    assert P.recall_at_precision(scores, pos, 0.3, precision=0.5).isnan()


def test_what_a_module_tells_of_its_threshold():
    module = P.RecallAtPrecisionLoss(3, 0.6, queue_size=0, temperature=0.1)
    logits = torch.tensor([5.0, 4.0, 3.0, 2.0, 1.0, 0.0])[:, None].repeat(1, 3)
    labels = torch.tensor([[1, 0, 1, 0, 0, 1], [0, 1, 0, 0, 0, 0], [1, 1, 0, 1, 1, 0]]).T.bool()
    _, stats = module(logits, labels, return_diagnostics=True)
    torch.testing.assert_close(stats["precision"], torch.tensor([2 / 3, 0.0, 2 / 3]))
    assert stats["threshold"].tolist() == [2.5, 5.0, 0.0]


@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        ({"precision": 0.0}, ValueError, r"precision must be in \(0, 1\], got 0.0"),
        ({"precision": 1.01}, ValueError, "precision must be in"),
        ({"precision": "high"}, TypeError, "precision must be a number, got str"),
        ({"threshold_grad": "exact"}, ValueError, "threshold_grad must be one of"),
    ],
)
def test_bad_options(change, error, says):
    with pytest.raises(error, match=says):
        P.recall_at_precision(torch.randn(5), torch.ones(5).bool(), 0.1, **change)
    with pytest.raises(error, match=says):
        P.RecallAtPrecisionLoss(1, **change)
