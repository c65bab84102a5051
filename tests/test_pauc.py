"""Partial AUC: every option against loops, the band, what gets a gradient, degenerate lists."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import roc_auc_score

import proxy_losses as P
from proxy_losses import _numerics as num
from proxy_losses._checks import INTERPOLATIONS
from proxy_losses._metrics.partial_auc import PARTIAL_AUC
from proxy_losses._ranks import How, Lists

from .metrics import TIGHT, lists
from .reference import partial_auc_band

FLOATS = ("t_alpha", "t_beta", "tau_eff", "pauc_var")
both_surrogates = pytest.mark.parametrize("surrogate", ["trapezoid", "pairwise"])


def found(scores, pos, tau, *, iid=None, live=None, valid=None, weight=None, **options):
    settings = {option.name: option.default for option in PARTIAL_AUC.options} | options
    lists = Lists(scores, pos, valid, weight, iid, live)
    return num.full_precision(PARTIAL_AUC.evaluate)(lists, tau, settings, How(), stats=True)


@st.composite
def bands(draw):
    low, high = sorted(draw(st.sets(st.integers(0, 64), min_size=2, max_size=2)))
    return {
        # Multiples of 1/64, and knots of 1/256: levels, ranks and quantiles are exact.
        "alpha": low / 64,
        "beta": high / 64,
        "n_knots": draw(st.sampled_from([2, 3, 5])),
        "surrogate": draw(st.sampled_from(["trapezoid", "pairwise"])),
        "tau_scale": draw(st.sampled_from(["iqr", "band"])),
        "pos_numerator": draw(st.sampled_from(["pool", "live"])),
        "budget_basis": draw(st.sampled_from(["fpr", "population"])),
        "interpolation": draw(st.sampled_from(INTERPOLATIONS)),
        "min_tpr": draw(st.sampled_from([0.0, 0.25, 0.5, 0.8, 0.9375])),
    }


@settings(max_examples=300, deadline=None)
@given(
    band=bands(),
    m=st.integers(1, 40),
    seed=st.integers(0, 2**16),
    tau=st.floats(0.01, 10),
    rates=st.tuples(*[st.floats(0, 1)] * 4),
)
def test_every_option_is_the_formula(band, m, seed, tau, rates):
    g = torch.Generator().manual_seed(seed)
    scores = torch.randint(-64, 64, (2, m), generator=g).double() / 16  # with ties
    masks = [torch.rand(2, m, generator=g) <= rate for rate in rates]
    weight = torch.rand(2, m, generator=g, dtype=torch.float64)
    pos, valid, iid, live = masks
    got = found(scores, pos, tau, iid=iid, live=live, valid=valid, weight=weight, **band)
    for k in range(2):
        want = partial_auc_band(
            scores[k].tolist(), pos[k].tolist(), tau, valid[k].tolist(), weight[k].tolist(),
            iid=iid[k].tolist(), live=live[k].tolist(), **band,
        )  # fmt: skip
        assert got.defined[k] == (want is not None)
        if want is None:
            assert got.value[k] == got.stats["band_neg_count"][k] == 0
            assert all(got.stats[name][k].isnan() for name in FLOATS)
            continue
        torch.testing.assert_close(got.value[k].item(), want.value, **TIGHT)
        for name, x in got.stats.items():
            torch.testing.assert_close(x[k].item(), getattr(want, name), **TIGHT)
    public = dict(valid_mask=valid, sample_weight=weight, iid_mask=iid, live_mask=live, **band)
    assert torch.equal(P.partial_auc(scores, pos, tau, **public), got.value)
    del public["n_knots"], public["min_tpr"]
    assert torch.equal(P.partial_auc_defined(scores, pos, **public), got.defined)


@pytest.mark.parametrize("n_knots", [2, 3, 6])
@pytest.mark.parametrize("n", [101, 201, 1001])
def test_the_end_knots_are_the_edges_of_the_band(n, n_knots):
    """Ranks here are whole but for rounding, so another route to a level ends a row away."""
    negatives = torch.arange(n, dtype=torch.float64)
    for alpha, beta in [(a / 100, b / 100) for a in range(0, 50, 7) for b in range(a + 9, 100, 9)]:
        edges = [torch.quantile(negatives, 1.0 - f, interpolation="higher") for f in (alpha, beta)]
        # One positive on each edge, in lists of their own: at its knot it counts 1/2.
        scores = torch.stack([torch.cat([negatives, edge[None]]) for edge in edges]).float()
        pos = (torch.arange(n + 1) == n).expand(2, -1)
        got = found(scores, pos, 1e-6, alpha=alpha, beta=beta, n_knots=n_knots)
        assert got.stats["t_alpha"].tolist() == [edges[0].item()] * 2
        assert got.stats["t_beta"].tolist() == [edges[1].item()] * 2
        end = 0.25 / (n_knots - 1)  # an end has half the share of a knot
        torch.testing.assert_close(got.value, torch.tensor([1 - end, end]))


@both_surrogates
@pytest.mark.parametrize("budget_basis", ["fpr", "population"])
def test_rows_that_are_not_iid_never_move_the_band(surrogate, budget_basis):
    scores, pos = lists(0, 60)
    iid = torch.rand(60, generator=torch.Generator().manual_seed(1)) < 0.6
    band = {"beta": 0.4, "surrogate": surrogate, "budget_basis": budget_basis}
    moved = torch.where(iid | pos, scores, 1e3 * scores)  # out of the band
    a, b = (found(s, pos, 0.3, iid=iid, **band) for s in (scores, moved))
    # Removed altogether, but for positives: theirs is the value.
    kept = iid | pos
    c = found(scores[kept], pos[kept], 0.3, iid=iid[kept], **band)
    for name in ("t_alpha", "t_beta", "tau_eff", "band_neg_count"):
        assert a.stats[name] == b.stats[name] == c.stats[name]
    if surrogate == "trapezoid":
        assert a.value == b.value
    else:  # they do count as negatives of the band, until they leave it
        assert a.value != b.value
    torch.testing.assert_close(b.value, c.value, **TIGHT)
    everything = found(scores, pos, 0.3, **band)
    assert everything.stats["t_beta"] != a.stats["t_beta"]


@both_surrogates
@pytest.mark.parametrize("pos_numerator", ["pool", "live"])
def test_who_gets_a_gradient(surrogate, pos_numerator):
    scores, pos = lists(2, 50)
    live = torch.arange(50) < 25
    scores.requires_grad_()
    options = {"surrogate": surrogate, "pos_numerator": pos_numerator}
    got = found(scores, pos, 1.0, live=live, alpha=0.25, beta=0.5, **options)
    got.value.backward()
    inside = (scores >= got.stats["t_beta"]) & (scores <= got.stats["t_alpha"])
    expected = pos & live if pos_numerator == "live" else pos.clone()
    if surrogate == "pairwise":
        expected |= ~pos & inside
    elif pos_numerator == "live":  # pull and push balance in the batch
        expected = live
    else:
        expected[:] = True
    assert torch.equal(scores.grad != 0, expected)
    assert 1 < got.stats["band_neg_count"] < (~pos).sum()


@both_surrogates
def test_a_wide_band_of_many_rows(surrogate):
    """Beyond the sizes that are summed pair by pair."""
    g = torch.Generator().manual_seed(0)
    scores = torch.randn(30_000, generator=g)
    pos = torch.rand(30_000, generator=g) < 0.02
    value = P.partial_auc(scores + pos, pos, 0.1, beta=0.5, surrogate=surrogate)
    s, n = (scores + pos).double(), (~pos).sum()
    ranked = s[~pos].sort().values
    high, low = ranked[(0.75 * (n - 1)).ceil().long()], ranked[(0.25 * (n - 1)).ceil().long()]
    band = ranked[(0.5 * (n - 1)).ceil().long() :]
    against = band if surrogate == "pairwise" else band[[0, -1]]
    want = torch.sigmoid((s[pos][:, None] - against) / (0.1 * (high - low))).mean()
    # Sums are asked to 1e-6; float32 scores against a temperature of about 0.1 add 1e-6 a term.
    assert value.item() == pytest.approx(want.item(), rel=4e-6)


@settings(max_examples=60, deadline=None)
@given(m=st.integers(12, 60), seed=st.integers(0, 2**16), floor=st.floats(0.01, 0.99))
def test_above_a_floor_the_limit_is_the_area_there(m, seed, floor):
    """Of the whole curve: that of the flipped problem up to 1 - floor."""
    g = torch.Generator().manual_seed(seed)
    scores, pos = torch.randperm(m, generator=g).double(), torch.rand(m, generator=g) < 0.4
    pos[:5] = torch.arange(5) < 1
    most = 1 - floor
    standard = roc_auc_score(~pos, -scores, max_fpr=most)
    area = most**2 / 2 + (2 * standard - 1) * (most - most**2 / 2)
    value = P.partial_auc(scores, pos, 1e-6, beta=1.0, surrogate="pairwise", min_tpr=floor)
    # Counts below 60, in float64, over a share of at least 0.01 of them.
    assert value.item() == pytest.approx(area / most, rel=1e-12, abs=1e-12)


@both_surrogates
def test_above_a_floor_the_hardest_positives_alone_have_a_gradient(surrogate):
    """And the true one: which they are costs nothing, for others are as hard where it changes."""
    scores, pos = lists(7, 40, rate=0.5)
    own = scores[pos]

    def value(s):
        every = scores.masked_scatter(pos, s)
        how = {"surrogate": surrogate, "threshold_grad": "none", "min_tpr": 0.66}
        return P.partial_auc(every, pos, 0.5, beta=0.5, **how)

    assert torch.autograd.gradcheck(value, own.clone().requires_grad_())
    s = own.clone().requires_grad_()
    value(s).backward()
    count = math.ceil(len(own) * 0.34)
    assert torch.equal(s.grad != 0, own <= own.sort().values[count - 1])


@both_surrogates
def test_above_any_floor_a_positive_of_some_weight_counts(surrogate):
    scores, pos = lists(8, 30)
    weight = pos.double()
    hardest = torch.where(pos, scores, torch.inf).argmin()
    weight[hardest] = 0.0  # no positive for the floor either
    how = {"surrogate": surrogate, "beta": 0.5, "min_tpr": 0.999}
    found = P.partial_auc(scores, pos, 0.5, sample_weight=weight, **how)
    left = torch.where(pos & (weight > 0), scores, torch.inf).argmin()
    one = torch.arange(30) == left
    del how["min_tpr"]
    valid = ~pos | one
    torch.testing.assert_close(
        found, P.partial_auc(scores, one, 0.5, valid_mask=valid, **how), **TIGHT
    )


def test_a_spread_of_a_millionth_is_a_spread():
    scores = torch.linspace(0, 2e-6, 41, dtype=torch.float64)
    pos = torch.arange(41) == 40
    assert P.partial_auc_defined(scores, pos)
    assert P.partial_auc(scores, pos, 1e-3, beta=0.5) == 1.0


@both_surrogates
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_not_a_number_shows_beside_tied_scores_too(surrogate, bad):
    scores, pos = torch.zeros(6), torch.arange(6) == 5
    scores[5] = bad
    assert P.partial_auc(scores, pos, 0.1, surrogate=surrogate).isnan()
    assert P.partial_auc_defined(scores, pos, surrogate=surrogate)


def test_an_empty_band_is_degenerate_for_pairs_alone():
    scores = torch.tensor([0.0, 10.0, 20.0, 30.0, 25.0])
    pos = torch.arange(5) == 4
    # The edges are 18 and 16.5: between two negatives.
    between = {"alpha": 0.4, "beta": 0.45, "interpolation": "linear"}
    assert P.partial_auc_defined(scores, pos, **between)
    assert not P.partial_auc_defined(scores, pos, surrogate="pairwise", **between)
    assert P.partial_auc(scores, pos, 0.1, surrogate="pairwise", **between) == 0.0


@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        ({"alpha": -0.1}, ValueError, "alpha.*beta.*got alpha=-0.1"),
        ({"alpha": 0.005}, ValueError, "alpha.*beta"),
        ({"alpha": 0.5, "beta": 0.4}, ValueError, "alpha.*beta"),
        ({"beta": 1.5}, ValueError, "alpha.*beta"),
        ({"beta": float("nan")}, ValueError, "alpha.*beta"),
        ({"alpha": "0"}, TypeError, "alpha must be a number, got str"),
        ({"beta": None}, TypeError, "beta must be a number"),
        *(({"n_knots": x}, ValueError, "n_knots must be an integer >= 2") for x in (1, 2.0, True)),
        ({"min_tpr": 1.0}, ValueError, r"min_tpr.*\[0, 1\), got 1.0"),
        ({"min_tpr": -0.1}, ValueError, "min_tpr.*got -0.1"),
        ({"min_tpr": None}, TypeError, "min_tpr must be a number"),
        ({"surrogate": "exact"}, ValueError, "surrogate must be one of"),
        ({"tau_scale": "std"}, ValueError, "tau_scale must be one of"),
        ({"pos_numerator": "all"}, ValueError, "pos_numerator must be one of"),
        ({"budget_basis": "tpr"}, ValueError, "budget_basis must be one of"),
        ({"interpolation": "cubic"}, ValueError, "interpolation must be one of"),
        ({"rtol": 0.0}, ValueError, "rtol must be"),
        ({"iid_mask": torch.ones(4)}, TypeError, "iid_mask must be a bool tensor"),
        ({"iid_mask": torch.ones(3).bool()}, ValueError, "iid_mask must have the list length"),
        ({"live_mask": torch.ones(4)}, TypeError, "live_mask must be a bool tensor"),
        ({"live_mask": torch.ones(2, 3).bool()}, ValueError, "live_mask must have the list"),
    ],
)
def test_bad_options(change, error, says):
    scores, pos = torch.arange(4.0), torch.arange(4) == 3
    with pytest.raises(error, match=says):
        P.partial_auc(scores, pos, 0.1, **change)
