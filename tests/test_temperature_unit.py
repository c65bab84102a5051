"""The spread of the scores, and a temperature in units of it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.func import vmap

import proxy_losses as P

from .compiling import compile_fresh
from .makers import FUNCTIONS, batch, recall, smooth

of_ranks = pytest.mark.parametrize("make", [smooth, recall])


def by_hand(scores: np.ndarray) -> float:
    upper, lower = np.quantile(scores, [0.75, 0.25]) if len(scores) else (0.0, 0.0)
    if upper > lower:
        return float(upper - lower) / 1.349
    return float(np.std(scores)) if len(scores) and np.std(scores) > 0 else 1.0


@settings(max_examples=100, deadline=None)
@given(m=st.integers(0, 60), seed=st.integers(0, 2**16), rate=st.floats(0, 1), ties=st.floats(0, 1))
def test_is_the_quartile_range_or_the_deviation_or_one(m, seed, rate, ties):
    g = torch.Generator().manual_seed(seed)
    # Tied scores are 0, so that the deviation of a constant is 0 and not a rounding.
    scores = torch.randn(2, m, generator=g, dtype=torch.float64)
    scores = torch.where(torch.rand(2, m, generator=g) < ties, 0.0, scores)
    valid = torch.rand(2, m, generator=g) < rate
    found = P.score_spread(torch.where(valid, scores, torch.nan), valid)
    want = [by_hand(s[v].numpy()) for s, v in zip(scores, valid, strict=True)]
    # A difference of two quantiles below 4, or some dozen squares.
    expected = torch.tensor(want, dtype=torch.float64)
    torch.testing.assert_close(found, expected, rtol=1e-13, atol=4e-15)


@pytest.mark.parametrize(
    ("scores", "spread"),
    [
        ([2.0] * 7, 1.0),  # constant
        ([5.0], 1.0),
        ([0.0] * 8 + [4.0, -4.0], np.sqrt(32 / 10)),  # quartiles tied
        ([0.0, 1.0, 2.0, 3.0, 4.0], 2 / 1.349),
    ],
)
def test_known_spreads(scores, spread):
    assert P.score_spread(torch.tensor(scores)).item() == pytest.approx(spread, rel=1e-6)


def test_is_the_deviation_of_normal_scores():
    scores = torch.randn(60_000, generator=torch.Generator().manual_seed(0))
    # The quartile range of n normal scores is off by about 1.2 / sqrt(n).
    assert P.score_spread(3.0 * scores + 5.0).item() == pytest.approx(3.0, rel=4 * 1.2 / 245)


@pytest.mark.parametrize("rows", [65_536, 65_537, 150_000])
def test_long_lists_are_read_at_a_stride(rows):
    stride = -(-rows // 65_536)
    scores = torch.randn(2, rows, generator=torch.Generator().manual_seed(0))
    valid = torch.arange(rows) < rows // 2
    assert torch.equal(P.score_spread(scores), P.score_spread(scores[:, ::stride]))
    assert torch.equal(
        P.score_spread(scores, valid), P.score_spread(scores[:, ::stride][:, valid[::stride]])
    )
    assert (P.score_spread(scores, valid) != P.score_spread(scores)).all()
    unread = scores.clone()
    unread[:, 1::2] = 1e9
    assert torch.equal(P.score_spread(unread), P.score_spread(scores)) == (stride == 2)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_not_a_number_shows(bad):
    scores = torch.arange(10.0).repeat(2, 1)
    scores[0, 3] = bad
    valid = torch.arange(10) != 3
    assert P.score_spread(scores).isnan().tolist() == [True, False]
    assert P.score_spread(scores, valid).isfinite().all()


def test_dtypes_gradient_and_transforms():
    scores, valid = torch.randn(3, 50), torch.rand(3, 50) < 0.7
    want = P.score_spread(scores, valid)
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        found = P.score_spread(scores.to(dtype), valid)
        assert found.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert torch.equal(found, P.score_spread(scores.to(dtype).to(found.dtype), valid))
    assert not P.score_spread(scores.clone().requires_grad_(), valid).requires_grad
    assert torch.equal(vmap(P.score_spread)(scores, valid), want)
    compiled, _ = compile_fresh(P.score_spread, "aot_eager")
    torch.testing.assert_close(compiled(scores, valid), want, rtol=1e-6, atol=0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(P.score_spread(scores, valid), want)


@of_ranks
@pytest.mark.parametrize("queries", [False, True])
def test_a_loss_in_units_of_the_spread_does_not_see_the_scale(make, queries):
    units = [make(num_classes=3, queue_size=30, temperature_unit="spread") for _ in "ab"]
    plain = [make(num_classes=3, queue_size=30) for _ in "ab"]
    for seed in range(4):
        (a, targets), (b, _) = batch(seed, 16, 3), batch(seed, 16, 3)
        extras = {"query_ids": torch.arange(16) % 2} if queries else {}
        first = units[0](a, targets, **extras)
        second = units[1](1024.0 * b, targets, **extras)
        (first + second).backward()
        assert torch.equal(first, second)  # a power of two: no rounding
        # 1024 of the chain against 1 / 1024 of the spread, which is a constant of the gradient.
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-5, atol=1e-7)
        assert a.grad.any()
        losses = [m(x, targets, **extras) for m, x in zip(plain, (a, 1024.0 * b), strict=True)]
        assert losses[0] != losses[1]


@of_ranks
@pytest.mark.parametrize("as_tensor", [False, True])
def test_tau_multiplies_the_spread_of_each_class(make, as_tensor):
    function, (logits, targets) = FUNCTIONS[make], batch(0, 40, 3)
    logits = logits.detach().double() * torch.tensor([1.0, 10.0, 0.1]).double()
    tau = torch.tensor(0.2) if as_tensor else 0.2
    options = {"reduction": "none"}
    found, _ = function(logits, targets, None, tau, tau_unit="spread", **options)
    spread = P.score_spread(logits.T, targets != -100)
    assert spread.max() > 20 * spread.min()
    for c in range(3):
        alone, _ = function(logits, targets, None, float(tau) * spread[c].item(), **options)
        # A float32 tau is not 0.2; the rest is float64.
        torch.testing.assert_close(found[c], alone[c], rtol=1e-10, atol=0.0)


@of_ranks
def test_the_spread_is_that_of_the_pool_and_a_constant(make):
    module = make(queue_size=100, temperature_unit="spread")
    (old, old_targets), (new, targets) = batch(0, 60), batch(1, 8)
    module(50.0 * old, old_targets)
    _, stats = module(new, targets, None, False, True)
    pool = torch.cat([new, 50.0 * old])[torch.cat([targets, old_targets]) != -100]
    torch.testing.assert_close(stats["tau_eff"], 0.25 * P.score_spread(pool.T))
    # Frozen as a number, the gradient is the same.
    x, y = (new.detach().double().requires_grad_() for _ in "ab")
    FUNCTIONS[make](x, targets, None, 0.5, tau_unit="spread")[0].backward()
    FUNCTIONS[make](y, targets, None, 0.5 * P.score_spread(y.T, targets != -100))[0].backward()
    assert torch.equal(x.grad, y.grad)
    assert x.grad.any()


@of_ranks
def test_a_pool_with_a_bad_score_is_not_a_number(make):
    logits, targets = batch(0, 10)
    spoilt = torch.where(targets[:, None] == 0, torch.inf, logits)
    assert make(temperature_unit="spread")(spoilt, targets).isnan()


@of_ranks
def test_bad_units_and_temperatures(make):
    function, (logits, targets) = FUNCTIONS[make], batch(0)
    with pytest.raises(ValueError, match="temperature_unit must be one of"):
        make(temperature_unit="std")
    with pytest.raises(ValueError, match="tau_unit must be one of"):
        function(logits, targets, None, 0.1, tau_unit="std")
    for tau, error in ((0.0, ValueError), ("0.1", TypeError), (torch.tensor(1), TypeError)):
        with pytest.raises(error, match="tau must be"):
            function(logits, targets, None, tau, tau_unit="spread")
