"""Quantiles by selection equal torch.quantile, and work where it does not."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from proxy_losses import _numerics as num
from proxy_losses import _quantiles, score_spread
from proxy_losses._checks import INTERPOLATIONS

from .compiling import compile_fresh

every_interpolation = pytest.mark.parametrize("interpolation", INTERPOLATIONS)


@every_interpolation
@settings(max_examples=80, deadline=None)
@given(
    m=st.integers(1, 400),
    q=st.floats(0, 1) | st.sampled_from([0.995, 0.99, 0.9, 0.5, 0.005]),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    ties=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_equals_torch_quantile(interpolation, m, q, dtype, ties, seed):
    g = torch.Generator().manual_seed(seed)
    scores = torch.randn(2, m, generator=g, dtype=dtype)
    scores = scores.round() if ties else scores
    ours = _quantiles.quantiles(scores, [q], interpolation)[..., 0]
    theirs = torch.quantile(scores, q, dim=-1, interpolation=interpolation)
    assert torch.equal(ours, theirs)


@every_interpolation
@settings(max_examples=50, deadline=None)
@given(m=st.integers(1, 200), q=st.floats(0, 1), rate=st.floats(0, 1), seed=st.integers(0, 2**16))
def test_masked_equals_removed(interpolation, m, q, rate, seed):
    g = torch.Generator().manual_seed(seed)
    scores, valid = torch.randn(3, m, generator=g), torch.rand(3, m, generator=g) < rate
    ours = _quantiles.quantiles(scores, [q], interpolation, valid)[..., 0]
    for k in range(3):
        kept = scores[k, valid[k]]
        if len(kept):
            assert ours[k] == torch.quantile(kept, q, interpolation=interpolation)


@every_interpolation
@settings(max_examples=80, deadline=None)
@given(
    m=st.integers(1, 300),
    levels=st.lists(st.floats(0, 1) | st.sampled_from([0.0, 0.005, 0.5, 0.995, 1.0]), min_size=1),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    ties=st.booleans(),
    rate=st.none() | st.floats(0, 1),
    seed=st.integers(0, 2**16),
)
def test_several_levels_equal_torch_quantile(interpolation, m, levels, dtype, ties, rate, seed):
    """In any order, with repeats; the tail is that of the lowest or the highest level."""
    g = torch.Generator().manual_seed(seed)
    scores = torch.randn(2, m, generator=g, dtype=dtype)
    scores = scores.round() if ties else scores
    valid = None if rate is None else torch.rand(2, m, generator=g) < rate
    q = torch.tensor(levels, dtype=dtype)
    ours = _quantiles.quantiles(scores, levels, interpolation, valid)
    assert ours.shape == (2, len(levels))
    for k in range(2):
        kept = scores[k] if valid is None else scores[k, valid[k]]
        if len(kept):
            assert torch.equal(ours[k], torch.quantile(kept, q, interpolation=interpolation))


def test_a_narrow_band_sorts_its_tail_alone(monkeypatch):
    taken, topk = [], torch.Tensor.topk
    monkeypatch.setattr(
        torch.Tensor, "topk", lambda s, k, **kw: taken.append(k) or topk(s, k, **kw)
    )
    scores = torch.randn(10_000)
    for reach in (0.99, 1.0), (0.0, 0.01):
        found = _quantiles.quantiles(scores, reach, "higher")
        assert torch.equal(
            found, torch.quantile(scores, torch.tensor(reach), interpolation="higher")
        )
    assert max(taken) < 110


def test_several_levels_of_no_rows():
    assert _quantiles.quantiles(torch.zeros(3, 0), [0.2, 0.8], "linear").tolist() == [[0, 0]] * 3


@every_interpolation
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_recall_threshold(interpolation, dtype):
    scores = num.lift(torch.randn(1000).to(dtype))
    assert _quantiles.quantiles(scores, [0.995], interpolation) == torch.quantile(
        scores, 0.995, interpolation=interpolation
    )


def test_more_rows_than_torch_quantile_takes():
    m = (1 << 24) + 3
    scores = torch.rand(m)
    with pytest.raises(RuntimeError, match="too large"):
        torch.quantile(scores, 0.999)
    k = int(np.ceil(0.999 * (m - 1)))
    expected = np.partition(scores.numpy(), k)[k]
    assert _quantiles.quantiles(scores, [0.999], "higher").item() == expected


def test_transforms():
    scores, valid = torch.randn(4, 30), torch.rand(4, 30) < 0.7

    def f(s, v):
        return _quantiles.quantiles(s, [0.8], "linear", v)

    expected = f(scores, valid)
    assert torch.equal(torch.func.vmap(f)(scores, valid), expected)
    compiled, _ = compile_fresh(f)
    # lerp may be fused as a multiply-add: one rounding apart.
    torch.testing.assert_close(compiled(scores, valid), expected, rtol=2e-7, atol=1e-7)


def test_threshold_is_a_constant_of_the_gradient():
    scores = torch.randn(30, requires_grad=True)
    assert not _quantiles.quantiles(scores, [0.8], "linear").requires_grad


@pytest.mark.parametrize(
    ("args", "error", "says"),
    [
        (([1.0, 2.0],), TypeError, "scores must be a floating-point tensor, got list"),
        ((torch.arange(4),), TypeError, "scores must be .* got a tensor of torch.int64"),
        ((torch.tensor(1.0),), ValueError, "scores must have at least one axis"),
        ((torch.ones(4), torch.ones(4)), TypeError, "valid_mask must be a bool tensor"),
        ((torch.ones(4), torch.ones(3).bool()), ValueError, "valid_mask must have"),
    ],
)
def test_bad_arguments_of_the_spread(args, error, says):
    with pytest.raises(error, match=says):
        score_spread(*args)


def test_a_width_with_a_gradient_divides_alike():
    """To the bit where a sigmoid is not flat; then its gradient is 0, for what is no number NaN."""
    away = torch.tensor([0.0, 1e-20, -3e-20, 7.0, -1e30])
    for width in (1e-20, 1e-3, 1.0, torch.inf, torch.nan):
        fixed = torch.tensor([width])
        moving = fixed.clone().requires_grad_()
        steps = torch.sigmoid(num.in_widths(away, moving))
        assert torch.equal(steps.isnan(), (away / fixed).isnan())
        assert torch.equal(steps.nan_to_num(), torch.sigmoid(away / fixed).nan_to_num())
        exact = torch.tensor([width], dtype=torch.float64, requires_grad=True)
        wanted = torch.sigmoid(away.double() / exact)
        for x, y in ((steps, moving), (wanted, exact)):
            x.sum().backward()
            y.grad *= y.detach().nan_to_num(posinf=0.0)
        # 1 less a float32 sigmoid is off by 2^-24, times at most 7.
        tol = {"rtol": 1e-6, "atol": 1e-6, "equal_nan": True}
        torch.testing.assert_close(moving.grad.double(), exact.grad, **tol)
    none, one = (torch.tensor([x], requires_grad=True) for x in (torch.nan, 1.0))
    grads = torch.autograd.grad(num.in_widths(none, one).sigmoid(), (none, one))
    assert all(g.isnan() for g in grads)
