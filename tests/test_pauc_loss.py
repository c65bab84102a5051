"""`PAUCAtBudgetLoss`: classes left out, the one warning, diagnostics, iid rows, live positives."""

from __future__ import annotations

import math

import pytest
import torch

import proxy_losses as P

from .makers import PAD, batch, pauc, warned
from .reference import partial_auc_band

KEYS = {"t_alpha", "t_beta", "tau_eff", "pauc_var", "band_neg_count", "grad_pos_count"}
TIGHT = {"rtol": 1e-12, "atol": 1e-14}
both_surrogates = pytest.mark.parametrize("surrogate", ["trapezoid", "pairwise"])


@pytest.mark.parametrize(
    ("name", "out_of_range", "of_wrong_type"),
    [
        ("alpha.*beta", [{"alpha": -0.1}, {"alpha": 0.6}, {"beta": 1.1}, {"beta": math.nan}], []),
        ("n_knots", [{"n_knots": x} for x in (1, 0, 2.5, True, None)], []),
        ("surrogate", [{"surrogate": x} for x in ("square", None)], []),
        ("tau_scale", [{"tau_scale": "mad"}], []),
        ("pos_numerator", [{"pos_numerator": "queue"}], []),
        ("budget_basis", [{"budget_basis": "precision"}], []),
        ("quantile_interpolation", [{"quantile_interpolation": "cubic"}], []),
        ("alpha", [], [{"alpha": "0"}, {"alpha": None}]),
        ("beta", [], [{"beta": "1"}, {"beta": None}]),
    ],
)
def test_a_bad_argument_is_named(name, out_of_range, of_wrong_type):
    for cases, error in (out_of_range, ValueError), (of_wrong_type, TypeError):
        for kwargs in cases:
            with pytest.raises(error, match=name):
                pauc(**kwargs)


SPREAD = [0.0, 10.0, 20.0, 30.0]
GAP = {"alpha": 0.4, "beta": 0.45}  # between 16.5 and 18
# Negatives, which rows are iid (the positive first), options, whether the class counts.
CASES = {
    "sound": (SPREAD, [1, 1, 1, 1, 1], {}, True),
    "no negatives": ([], [1], {}, False),
    "no iid negatives": (SPREAD, [1, 0, 0, 0, 0], {}, False),
    "no iid negatives of the population": (
        SPREAD, [1, 0, 0, 0, 0], {"budget_basis": "population"}, False
    ),
    "an iid positive and negative": (SPREAD, [1, 1, 0, 0, 0], {"budget_basis": "population"}, True),
    "no row in the band": (SPREAD, [1, 1, 1, 1, 1], GAP, True),
    "no pair in the band": (SPREAD, [1, 1, 1, 1, 1], {**GAP, "surrogate": "pairwise"}, False),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_classes_that_do_not_count(case, reduction):
    negatives, iid, options, counts = CASES[case]
    logits = torch.tensor([25.0, *negatives])[:, None].requires_grad_()
    targets, iid = (torch.arange(len(logits)) == 0).long(), torch.tensor(iid).bool()
    module = pauc(queue_size=0, reduction=reduction, **options)
    loss, per_class, valid, stats = module(logits, targets, iid, True, True)
    assert (valid.tolist(), (~per_class.isnan()).tolist()) == ([counts], [counts])
    if reduction == "none":
        assert torch.equal(loss.isnan(), ~valid)
    else:
        assert loss.item() == (per_class.item() if counts else 0.0)
    for name in KEYS - {"grad_pos_count", "band_neg_count"}:
        assert stats[name].isfinite().tolist() == [counts]
    assert counts or stats["band_neg_count"].tolist() == [0]
    assert stats["grad_pos_count"].tolist() == [1]  # of the batch, whether they count or not
    loss.nansum().backward()
    assert logits.grad.isfinite().all()
    assert logits.grad.any() == counts


def test_a_class_without_dispersion_warns_once():
    tied, targets = torch.zeros(6, 1), torch.tensor([1, 0, 0, 0, 0, 0])
    module, out = pauc(queue_size=0), []
    (text,) = warned(lambda: out.extend(module(tied, targets, True) for _ in range(3)))
    assert "PAUCAtBudgetLoss" in text
    assert "dispersion" in text
    for loss, per_class, valid in out:
        assert (loss.item(), per_class.isnan().item(), valid.item()) == (0.0, True, False)
    (text,) = warned(lambda: pauc(queue_size=0)(tied, targets))  # once for each instance
    # Collapsed in one class of two.
    two = torch.cat([tied, torch.arange(6.0)[:, None]], 1)
    module = pauc(queue_size=0, num_classes=2)
    (text,) = warned(lambda: out.append(module(two, torch.tensor([1, 0, 0, 0, 1, 1]), True)))
    assert out[-1][2].tolist() == [False, True]
    # A spread of a millionth is one, and other reasons to leave a class out are no news.
    fine = torch.linspace(0, 1e-6, 6)[:, None].flip(0)
    module = pauc(queue_size=0)
    assert warned(lambda: out.append(module(fine, targets, True))) == []
    assert out[-1][2].tolist() == [True]
    assert warned(lambda: module(fine, torch.zeros(6, dtype=torch.int64))) == []
    assert warned(lambda: module(tied, torch.ones(6, dtype=torch.int64))) == []


def flagged(seed: int, n: int = 12, classes: int = 3):
    logits, targets = batch(seed, n, classes)
    g = torch.Generator().manual_seed(seed)
    iid, weight = torch.rand(n, generator=g) < 0.7, torch.rand(n, generator=g)
    return logits.detach().double().requires_grad_(), targets, iid, weight


@both_surrogates
@pytest.mark.parametrize("pos_numerator", ["pool", "live"])
@pytest.mark.parametrize("budget_basis", ["fpr", "population"])
def test_is_the_formula_over_the_pool_with_its_diagnostics(surrogate, pos_numerator, budget_basis):
    options = {
        "alpha": 0.125, "beta": 0.625, "surrogate": surrogate, "pos_numerator": pos_numerator,
        "budget_basis": budget_basis, "quantile_interpolation": "higher", "n_knots": 3,
        "tau_scale": "band" if budget_basis == "fpr" else "iqr",
    }  # fmt: skip
    module = pauc(num_classes=3, queue_size=100, reduction="none", **options).double()
    options["interpolation"] = options.pop("quantile_interpolation")
    queue = P.init_queue(100, 3, dtype=torch.float64)
    rows = []  # of the pool: logits, target, iid, weight
    for seed in range(4):
        logits, targets, iid, weight = flagged(seed)
        targets = targets if seed else targets.clamp(max=1)  # class 2 joins later
        loss, stats = module(logits, targets, iid, False, True, sample_weight=weight)
        assert stats.keys() == KEYS
        again, queue = P.partial_auc_loss(
            logits, targets, queue, 0.25, reduction="none", sample_weight=weight, iid_mask=iid,
            **options,
        )  # fmt: skip
        torch.testing.assert_close(again, loss, rtol=0.0, atol=0.0, equal_nan=True)
        fields = (logits, targets, iid, weight)
        live = list(zip(*(x.tolist() for x in fields), strict=True))
        pool = [row for row in live + rows if row[1] != PAD]
        for c in range(3):
            want = partial_auc_band(
                [row[0][c] for row in pool], [row[1] == c for row in pool], 0.25, None,
                [row[3] for row in pool], iid=[row[2] for row in pool],
                live=[k < sum(row[1] != PAD for row in live) for k in range(len(pool))], **options,
            )  # fmt: skip
            assert stats["grad_pos_count"][c] == (targets == c).sum()
            if want is None:
                assert loss[c].isnan()
                continue
            torch.testing.assert_close(loss[c].item(), 1 - want.value, **TIGHT)
            for name in KEYS - {"grad_pos_count"}:
                torch.testing.assert_close(stats[name][c].item(), getattr(want, name), **TIGHT)
        assert seed == 0 or loss.isfinite().all()
        rows = live + rows


@both_surrogates
@pytest.mark.parametrize("tau_scale", ["iqr", "band"])
def test_the_scale_of_the_logits_does_not_matter(surrogate, tau_scale):
    modules = [pauc(surrogate=surrogate, tau_scale=tau_scale, num_classes=3) for _ in "abc"]
    for seed in range(4):
        logits, targets, iid, _ = flagged(seed)
        (a, b, c) = (
            module(x.float(), targets, iid)
            for module, x in zip(modules, (logits, 1024 * logits, 3 * logits - 7), strict=True)
        )
        assert torch.equal(a, b)  # a power of two: no rounding
        # Cancellation in logits of about 10 against a spread of about 3, over tau = 0.25.
        torch.testing.assert_close(a, c, rtol=1e-5, atol=1e-6)


@pytest.mark.filterwarnings("ignore:.*max_pool_size")
@pytest.mark.parametrize("cap", [None, 40])
def test_negatives_that_are_not_iid_never_move_the_band(cap):
    """Live, stored and drawn from a pool above the cap."""
    still, moved, unflagged = (pauc(queue_size=60, max_pool_size=cap, beta=0.3) for _ in "abc")
    for seed in range(6):
        logits, targets, iid, _ = flagged(seed, 30, 1)
        with torch.no_grad():
            other = torch.where((iid | (targets == 1))[:, None], logits, logits + 50.0)
        (a, sa), (b, sb) = (
            module(x, targets, iid, False, True) for module, x in ((still, logits), (moved, other))
        )
        assert torch.equal(a, b)
        for name in KEYS:
            assert torch.equal(sa[name], sb[name])
        _, sc = unflagged(other, targets, None, False, True)
        assert sc["t_alpha"] > sa["t_alpha"] + 40


@both_surrogates
def test_live_positives_have_their_gradient_undiluted(surrogate):
    pool, live = (
        pauc(queue_size=100, surrogate=surrogate, pos_numerator=p) for p in ("pool", "live")
    )
    old, targets, iid, _ = flagged(0, 41, 1)
    for module in (pool, live):
        module(old, targets, iid)
    positives = int((targets == 1).sum())
    assert positives == 20
    new = torch.linspace(-1, 1, 6, dtype=torch.float64)[:, None]
    y = torch.tensor([0, 0, 1, 0, 0, 1])
    grads, stats = [], []
    for module in (pool, live):
        x = new.clone().requires_grad_()
        loss, found = module.eval()(x, y, None, False, True)
        loss.backward()
        grads.append(x.grad[y == 1])
        stats.append(found)
    torch.testing.assert_close(grads[1], grads[0] * (positives + 2) / 2, rtol=1e-9, atol=0.0)
    assert grads[0].abs().min() > 0
    for name in ("t_alpha", "t_beta", "tau_eff", "band_neg_count"):
        assert torch.equal(stats[0][name], stats[1][name])  # the band is that of the pool
    nobody = torch.zeros(6, dtype=torch.int64)
    assert pool(new, nobody, True)[2].tolist() == [True]
    assert live(new, nobody, True)[2].tolist() == [False]
