"""Precision and recall at k: places, short lists, several k, what they are over."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import proxy_losses as P
from proxy_losses import _quantiles

from . import reference
from .metrics import TIGHT, lists
from .reference import held_recall
from .test_threshold_grad import CLOSE, gradient, slope_of

both = pytest.mark.parametrize("name", ["precision_at_k", "recall_at_k"])


@both
@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_any_list_is_the_formula(name, data):
    """With ties, masks, weights and lists shorter than k."""
    draw = data.draw
    m, g = draw(st.integers(1, 30)), torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
    place = st.integers(1, 40)
    k = draw(st.one_of(place, st.lists(place, min_size=1, max_size=3).map(tuple)))
    normalize = draw(st.sampled_from(["min", "k" if name == "precision_at_k" else "positives"]))
    scores = torch.randint(-20, 20, (2, m), generator=g).double() / 8
    pos, valid = (torch.rand(2, m, generator=g) < rate for rate in (0.4, 0.8))
    weight = torch.rand(2, m, generator=g, dtype=torch.float64)
    tau, how = draw(st.floats(1e-3, 10)), {"k": k, "normalize": normalize}
    value = getattr(P, name)(scores, pos, tau, valid_mask=valid, sample_weight=weight, **how)
    want = [
        getattr(reference, name)(*(x[i].tolist() for x in (scores, pos)), tau, valid[i].tolist(),
                                 weight[i].tolist(), **how)
        for i in range(2)
    ]  # fmt: skip
    torch.testing.assert_close(value, torch.tensor(want, dtype=torch.float64), **TIGHT)


@settings(max_examples=100, deadline=None)
@given(
    m=st.integers(0, 60), seed=st.integers(0, 2**16), masked=st.booleans(),
    places=st.lists(st.integers(1, 70), min_size=1, max_size=4),
)  # fmt: skip
def test_places_are_found_by_selection_as_by_sorting(m, seed, masked, places):
    g = torch.Generator().manual_seed(seed)
    scores = torch.randn(3, m, generator=g).round(decimals=1)
    valid = torch.rand(3, m, generator=g) < 0.6 if masked else None
    found, enough = _quantiles.between_places(scores, places, valid)
    for i in range(3):
        kept = scores[i] if valid is None else scores[i][valid[i]]
        kept = kept.sort(descending=True).values
        assert enough[i].tolist() == [k < len(kept) for k in places]
        want = [0.5 * kept[k - 1] + 0.5 * kept[k] if k < len(kept) else 0.0 for k in places]
        assert found[i].tolist() == [float(x) for x in want]


@pytest.mark.parametrize("m", [0, 1, 2, 7, 3_000])
def test_places_by_digits(m, monkeypatch):
    """What finds them over several processes, and where a size is not known."""
    g = torch.Generator().manual_seed(1)
    scores = torch.randn(3, m, generator=g).round(decimals=2)
    places = (1, 2, 6, m + 1)
    for valid in (None, torch.rand(3, m, generator=g) < 0.7):
        want = _quantiles.between_places(scores, places, valid)
        with monkeypatch.context() as patch:
            patch.setattr(_quantiles, "size_known", lambda size: False)
            got = _quantiles.between_places(scores, places, valid)
        assert all(map(torch.equal, got, want))


@pytest.mark.parametrize("k", [1, 4, 12])
def test_the_gradient_is_that_of_a_soft_place(k):
    scores, pos = lists(2, 13)
    theta = scores.sort(descending=True).values[k - 1 : k + 1].mean().item()

    def value(s):
        return held_recall(s, pos.tolist(), 0.3, theta, scores.tolist(), range(13))

    def by_us(s, p, tau):
        return P.recall_at_k(s, p, tau, k=k)

    torch.testing.assert_close(gradient(by_us, scores, pos, 0.3), slope_of(value, scores), **CLOSE)


@both
def test_the_threshold_as_a_constant(name):
    scores, pos = lists(3, 40)
    found = [
        getattr(P, name)(scores, pos, 0.3, k=5, threshold_grad=how) for how in ("implicit", "none")
    ]
    assert torch.equal(*found)

    def still(s, p, tau):
        return getattr(P, name)(s, p, tau, k=5, threshold_grad="none")

    assert torch.equal(gradient(still, scores, pos, 0.3) != 0, pos)


def test_all_rows_are_in_where_there_is_no_place_beyond():
    scores, pos = lists(4, 10)
    s = scores.clone().requires_grad_()
    tau = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    for k in (10, 11, 10**9):
        value = P.recall_at_k(s, pos, tau, k=k)
        assert value == 1.0
        assert [x.abs().sum() for x in torch.autograd.grad(value, (s, tau))] == [0, 0]
        precision = P.precision_at_k(scores, pos, 0.3, k=k)
        assert precision.item() == pytest.approx(int(pos.sum()) / k, rel=1e-15)
    assert P.recall_at_k(scores, pos, 0.3, k=9) < 1.0
    assert P.recall_at_k(scores, pos, torch.tensor(-1.0), k=10).isnan()
    scores[0] = torch.nan
    assert P.recall_at_k(scores, pos, 0.3, k=10).isnan()


@both
def test_several_k_are_the_mean_and_kinds_of_sequences_the_same(name):
    scores, pos = lists(5, 2, 30)
    fn = getattr(P, name)
    each = [fn(scores, pos, 0.3, k=k) for k in (1, 5, 40)]
    for k in ((1, 5, 40), [1, 5, 40]):
        torch.testing.assert_close(fn(scores, pos, 0.3, k=k), torch.stack(each).mean(0), **TIGHT)


def test_divided_by_the_smaller_number_both_are_the_same():
    scores, pos = lists(6, 4, 30)
    for k in (1, 8, 20):
        how = {"k": k, "normalize": "min"}
        found = P.precision_at_k(scores, pos, 0.1, **how), P.recall_at_k(scores, pos, 0.1, **how)
        assert torch.equal(*found)


@both
@pytest.mark.parametrize(
    ("given", "error", "says"),
    [
        ({"k": 0}, ValueError, "k must be >= 1, got 0"),
        ({"k": (3, -1)}, ValueError, "k must be >= 1, got -1"),
        ({"k": []}, ValueError, "k must be an integer >= 1 or a sequence of such, got"),
        ({"k": 2.0}, TypeError, "k must be an integer, got float"),
        ({"k": True}, TypeError, "k must be an integer, got bool"),
        ({"k": "3"}, TypeError, "k must be an integer, got str"),
        ({"k": None}, TypeError, "k must be an integer, got NoneType"),
        ({"normalize": "rows"}, ValueError, "normalize must be one of"),
        ({"threshold_grad": True}, ValueError, "threshold_grad must be one of"),
    ],
)
def test_bad_options(name, given, error, says):
    module = {"precision_at_k": P.PrecisionAtKLoss, "recall_at_k": P.RecallAtKLoss}[name]
    with pytest.raises(error, match=says):
        getattr(P, name)(torch.randn(5), torch.ones(5).bool(), 0.1, **given)
    with pytest.raises(error, match=says):
        module(1, **given)


def test_lists_of_a_module_by_query():
    torch.manual_seed(7)
    logits, ids = torch.randn(60, 1), (torch.arange(60) % 4 == 0).long()
    query = torch.arange(60) % 3
    module = P.RecallAtKLoss(1, k=[1, 4], queue_size=0, temperature=0.2)
    each = [
        P.recall_at_k(logits[query == q, 0], ids[query == q] == 1, 0.2, k=(1, 4)) for q in range(3)
    ]
    found = module(logits, ids, query_ids=query)
    torch.testing.assert_close(found, 1 - torch.stack(each).mean())
