"""Saturation, and the diagnostics of the modules: what they say, and that they change nothing."""

from __future__ import annotations

import functools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.func import vmap

import proxy_losses as P
from proxy_losses._ranks import rank_slopes

from . import reference
from .compiling import compile_fresh
from .makers import PAD, QUANTILE, batch, every_loss, pauc, recall, smooth
from .metrics import TAU, TIGHT, lists

SATURATION = {
    "smooth_ap": (P.smooth_ap_saturation, reference.smooth_ap_saturation),
    "recall": (
        functools.partial(P.recall_saturation, quantile=QUANTILE),
        functools.partial(reference.recall_saturation, quantile=QUANTILE),
    ),
}
every_share = pytest.mark.parametrize("name", SATURATION)
of_ranks = pytest.mark.parametrize("make", [smooth, recall])
RANK_KEYS = {"saturation", "tau_eff", "pos_count", "grad_pos_count"}
KEYS = {  # of others
    "partial_auc": {
        "t_alpha", "t_beta", "tau_eff", "pauc_var", "band_neg_count", "grad_pos_count",
    },
    "smooth_mrr": {*RANK_KEYS, "first_rank"},
    "recall_at_precision": {*RANK_KEYS, "threshold", "precision"},
}  # fmt: skip


@every_share
@settings(max_examples=80, deadline=None)
@given(
    m=st.integers(1, 30),
    seed=st.integers(0, 2**16),
    tau=st.floats(1e-3, 1),
    rate=st.floats(0, 1),
)
def test_saturation_is_the_share_of_flat_positives(name, m, seed, tau, rate):
    share, by_hand = SATURATION[name]
    g = torch.Generator().manual_seed(seed)
    scores = torch.randn(2, m, generator=g, dtype=torch.float64)
    pos, valid = torch.rand(2, m, generator=g) < rate, torch.rand(2, m, generator=g) < 0.8
    junk = torch.where(valid, scores, torch.nan)
    got = share(junk, pos, tau, valid_mask=valid)
    want = [
        by_hand(s, p, tau, v)
        for s, p, v in zip(scores.tolist(), pos.tolist(), valid.tolist(), strict=True)
    ]
    # A share of at most 30: one rounding of a quotient.
    torch.testing.assert_close(got.double(), torch.tensor(want, dtype=torch.float64))


@pytest.mark.parametrize("name", SATURATION)
def test_saturation_broadcasts_its_masks(name):
    share, _ = SATURATION[name]
    scores, pos = lists(3, 4, 12)
    valid = torch.arange(12) % 5 > 0
    got = share(scores, pos[0], TAU, valid_mask=valid)
    whole = [x.expand(4, 12) for x in (pos[0], valid)]
    assert torch.equal(got, share(scores, whole[0], TAU, valid_mask=whole[1]))
    got = share(scores[0], pos, TAU, valid_mask=valid)
    assert torch.equal(got, share(scores[0].expand(4, 12), pos, TAU, valid_mask=whole[1]))


def test_rank_slopes():
    scores, pos = lists(4, 2, 30)
    valid = torch.arange(30) % 7 > 0
    found = rank_slopes(scores.requires_grad_(), pos, TAU, valid_mask=valid)
    steps = torch.sigmoid((scores[:, None, :] - scores[:, :, None]) / TAU)
    slopes = (steps * (1 - steps) * valid).sum(-1) - 0.25  # less its own
    torch.testing.assert_close(found, torch.where(pos & valid, slopes, 0.0).detach(), **TIGHT)
    assert not found.requires_grad


@every_share
def test_saturation_rises_as_logits_grow(name):
    share, _ = SATURATION[name]
    scores, pos = lists(0, 200)
    found = [share(scale * scores, pos, 0.05).item() for scale in (0.1, 1.0, 10.0, 100.0, 1e4)]
    assert found == sorted(found)
    assert found[0] == 0.0
    # The row on the threshold may be a positive, and is never flat.
    assert found[-1] >= 1 - 1 / pos.sum()


@every_share
def test_saturation_of_many_rows(name):
    """Beyond the sizes that are summed pair by pair; ten pairs of positives stand apart."""
    share, _ = SATURATION[name]
    far = torch.arange(10.0) + 50
    scores = torch.cat([torch.randn(20_000), far, far, -far])
    pos = torch.arange(20_030) >= 20_000
    # Twins lie on one score, where a rank has its largest slope; the threshold is far from all.
    assert share(scores, pos, 0.01).item() == pytest.approx(1 / 3 if name == "smooth_ap" else 1.0)


@every_share
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_saturation_takes_all_dtypes_and_gives_no_gradient(name, dtype):
    share, _ = SATURATION[name]
    scores, pos = lists(1, 3, 40, dtype=dtype)
    found = share(scores.requires_grad_(), pos, torch.tensor(0.02, requires_grad=True))
    assert not found.requires_grad
    assert found.shape == (3,)
    torch.testing.assert_close(found, share(scores.double(), pos, 0.02), check_dtype=False)
    assert 0 < found.mean() < 1


@every_share
def test_saturation_under_transforms(name):
    share, _ = SATURATION[name]
    scores, pos = lists(2, 3, 40, dtype=torch.float32)
    tau = torch.tensor([0.001, 0.01, 0.1])
    want = share(scores, pos, tau)
    assert len(set(want.tolist())) > 1
    assert torch.equal(
        torch.stack([share(*args) for args in zip(scores, pos, tau, strict=True)]), want
    )
    assert torch.equal(vmap(share)(scores, pos, tau), want)
    compiled, _ = compile_fresh(share, "aot_eager")
    assert torch.equal(compiled(scores, pos, tau), want)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(share(scores, pos, tau), want)
    assert share(torch.zeros(2, 0), torch.zeros(2, 0, dtype=torch.bool), 0.1).tolist() == [0, 0]


@every_share
@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        ({"scores": torch.ones(4, dtype=torch.int64)}, TypeError, "scores must be a floating"),
        ({"scores": [1.0]}, TypeError, "scores must be a floating-point tensor, got list"),
        ({"pos_mask": torch.ones(4)}, TypeError, "pos_mask must be a bool tensor"),
        ({"valid_mask": torch.ones(3).bool()}, ValueError, "valid_mask must have"),
        ({"tau": 0.0}, ValueError, "tau must be positive"),
        ({"tau": torch.ones(2)}, ValueError, "one value per list"),
    ],
)
def test_saturation_names_a_bad_argument(name, change, error, says):
    args = {"scores": torch.randn(4), "pos_mask": torch.ones(4).bool(), "tau": 0.1} | change
    with pytest.raises(error, match=says):
        SATURATION[name][0](args.pop("scores"), args.pop("pos_mask"), args.pop("tau"), **args)


def test_recall_saturation_names_a_bad_quantile():
    for change in {"quantile": 0.0}, {"interpolation": "cubic"}:
        with pytest.raises(ValueError, match=next(iter(change))):
            P.recall_saturation(torch.randn(4), torch.ones(4).bool(), 0.1, **change)


@every_loss
@pytest.mark.parametrize("extras", ["plain", "weights", "queries"])
def test_diagnostics_change_nothing(make, extras):
    quiet, telling = (make(num_classes=3, queue_size=40) for _ in "ab")
    if make is not pauc:
        quiet.temperature_unit = telling.temperature_unit = "spread"
    for seed in range(4):
        (a, targets), (b, _) = batch(seed, 14, 3), batch(seed, 14, 3)
        given_ = {
            "plain": {},
            "weights": {"sample_weight": torch.rand(14)},
            "queries": {"query_ids": torch.arange(14) % 2},
        }[extras]
        want = quiet(a, targets, None, True, **given_)
        *got, stats = telling(b, targets, None, True, True, **given_)
        alone, again = telling.eval()(b, targets, None, False, True, **given_)
        telling.train()
        assert alone.shape == ()
        assert stats.keys() == again.keys() == KEYS.get(make.__name__, RANK_KEYS)
        assert not any(x.requires_grad for x in stats.values())
        (want[0] + got[0]).backward()
        for x, y in zip((*want, a.grad), (*got, b.grad), strict=True):
            torch.testing.assert_close(x, y, rtol=0.0, atol=0.0, equal_nan=True)
        assert all(map(torch.equal, quiet._queue.state, telling._queue.state))


@every_loss
def test_diagnostics_ignore_weights(make):
    logits, targets = batch(0, 30, 3)
    weight = torch.rand(30) + 0.1
    _, plain = make(num_classes=3)(logits, targets, None, False, True)
    loss, weighted = make(num_classes=3)(logits, targets, None, False, True, sample_weight=weight)
    assert loss != make(num_classes=3)(logits, targets)
    for name in plain:
        assert torch.equal(plain[name], weighted[name])


@of_ranks
@pytest.mark.parametrize("unit", ["score", "spread"])
def test_diagnostics_of_the_pool(make, unit):
    module = make(num_classes=4, queue_size=50, temperature=0.01, temperature_unit=unit)
    (old, old_targets), (new, targets) = batch(0, 40, 3), batch(1, 12, 3)
    old, new = (torch.cat([x, x[:, :1]], 1) for x in (old, new))  # nothing is of class 3
    module(old, old_targets)
    _, per_class, _, stats = module(new, targets, None, True, True)
    keep = torch.cat([targets, old_targets]) != PAD
    scores, ids = torch.cat([new, old])[keep].T, torch.cat([targets, old_targets])[keep]
    share = SATURATION["smooth_ap" if make is smooth else "recall"][0]
    for c in range(4):
        pos = ids == c
        assert stats["pos_count"][c] == pos.sum()
        assert stats["grad_pos_count"][c] == (targets == c).sum()
        if c == 3:
            assert stats["saturation"][c].isnan()
            assert stats["tau_eff"][c].isnan()
            continue
        tau = 0.01 * P.score_spread(scores[c]) if unit == "spread" else torch.tensor(0.01)
        torch.testing.assert_close(stats["tau_eff"][c], tau)
        torch.testing.assert_close(stats["saturation"][c], share(scores[c], pos, tau))
    assert 0 < stats["saturation"][:3].mean() < 1
    assert per_class[:3].isfinite().all()


@every_loss
def test_diagnostics_of_padding_alone(make):
    logits = torch.randn(3, 2)
    loss, stats = make(num_classes=2)(logits, torch.full((3,), PAD), None, False, True)
    assert loss == 0.0
    for name, x in stats.items():
        assert x.tolist() == [0, 0] if name.endswith("count") else x.isnan().all()


@every_loss
def test_diagnostics_of_labels_and_one_class(make):
    logits, labels = torch.randn(20, 3), torch.rand(20, 3) < 0.4
    _, stats = make(num_classes=3)(logits, labels, None, False, True)
    assert stats["grad_pos_count"].tolist() == labels.sum(0).tolist()
    logits, targets = batch(2, 20)  # with padding, which is not 0 either
    _, stats = make(queue_size=50)(logits, targets, None, False, True)
    assert stats["grad_pos_count"].tolist() == [(targets == 1).sum()]
    if make is not pauc:
        assert stats["pos_count"].tolist() == [(targets == 1).sum()]
    assert {x.shape for x in stats.values()} == {(1,)}
