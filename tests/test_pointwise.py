"""The contract matrix of the pointwise losses: every one of them through the same behaviours."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import gradcheck, gradgradcheck

from .pointwise import TIGHT, batch, every_loss, every_option, every_reduction


def check_reference(loss, x, t, **kwargs) -> None:
    value = loss.fn(x, t, **kwargs)
    want = torch.tensor(loss.reference(x, t, **kwargs), dtype=torch.float64)
    torch.testing.assert_close(value.reshape(want.shape), want, **TIGHT)


@every_option
def test_value_is_the_formula(loss, options):
    x, t, w = batch(loss, 0)
    for reduction in loss.reductions:
        check_reference(loss, x, t, reduction=reduction, **options)
        check_reference(loss, x, t, reduction=reduction, sample_weight=w, **options)


@every_loss
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_value_is_the_formula_for_any_arguments(loss, data):
    draw = data.draw
    shape = draw(st.lists(st.integers(1, 4), min_size=2, max_size=4))
    x, t, w = batch(loss, draw(st.integers(0, 2**16)), *shape, scale=draw(st.floats(0, 8)))
    kwargs = {
        "gamma": draw(st.sampled_from([0, 0.01, 0.5, 1, 2, 5]) | st.floats(0, 6)),
        "reduction": draw(st.sampled_from(loss.reductions)),
    }
    unit = st.floats(0, 1)
    if loss.name == "sigmoid_focal":
        kwargs["alpha"] = draw(unit | st.just(-1))
        if draw(st.booleans()):
            w = w[tuple(slice(None, n) for n in loss.weight_shape(x))]
    else:
        c = shape[1]
        kwargs["alpha"] = draw(st.none() | st.lists(unit, min_size=c, max_size=c))
        kwargs["label_smoothing"] = draw(unit)
        kwargs["ignore_index"] = draw(st.sampled_from([-100, 0, c - 1]))
        kwargs["background_class"] = draw(st.integers(0, c - 1))
        t = torch.where(t < 0, kwargs["ignore_index"], t)
    if draw(st.booleans()):
        kwargs["sample_weight"] = torch.where(w < draw(unit), 0.0, w)
    check_reference(loss, x, t, **kwargs)


@every_option
def test_gamma_zero_is_the_plain_loss(loss, options):
    x, t, _ = batch(loss, 1)
    for gamma in (0, 0.0, torch.tensor(0.0)):
        value = loss.fn(x, t, **{**loss.neutral, "gamma": gamma, "reduction": "none"})
        # torch's binary loss cancels up to |x| eps of its value.
        torch.testing.assert_close(value, loss.plain(x, t), rtol=1e-12, atol=1e-14)


@every_loss
def test_more_focus_counts_easy_rows_less(loss):
    x, t, _ = batch(loss, 2, 50, 4)
    values = [
        loss.fn(x, t, gamma=gamma, reduction="none", **loss.neutral) for gamma in (0, 0.3, 1, 2, 5)
    ]
    for low, high in pairwise(values):
        assert (high <= low).all()
        assert (high < low).any()
    assert (loss.fn(x, t, gamma=1e4, reduction="none", **loss.neutral) >= 0).all()


@every_option
def test_gradients(loss, options):
    x, t, w = batch(loss, 3, 3, 4)
    for reduction in loss.reductions:

        def f(x, reduction=reduction):
            return loss.fn(x, t, reduction=reduction, sample_weight=w, **options)

        assert gradcheck(f, (x.requires_grad_(),))
        assert gradgradcheck(f, (x,))


@every_loss
@pytest.mark.parametrize("gamma", [0.25, 0.5, 1.0, 2.0])
def test_gradients_at_zero_logits(loss, gamma):
    _, t, _ = batch(loss, 4, 3, 4)
    x = torch.zeros(3, 4, dtype=torch.float64, requires_grad=True)
    assert gradcheck(lambda x: loss.fn(x, t, gamma=gamma), (x,))
    assert gradgradcheck(lambda x: loss.fn(x, t, gamma=gamma), (x,))


@every_loss
def test_a_tensor_gamma_is_the_number_and_gets_a_gradient(loss):
    x, t, _ = batch(loss, 5)
    for gamma in (0.0, 0.5, 2.0, 3.5):
        number, tensor = (loss.fn(x, t, gamma=g) for g in (gamma, torch.tensor(gamma)))
        torch.testing.assert_close(number, tensor, **TIGHT)
    gamma = torch.tensor(1.5, dtype=torch.float64, requires_grad=True)
    assert gradcheck(lambda gamma: loss.fn(x, t, gamma=gamma), (gamma,))


@every_loss
@pytest.mark.parametrize("gamma", [0.0, 0.01, 0.5, 1.0, 2.0, 5.0])
@pytest.mark.parametrize("huge", [60.0, 110.0, 1e4, 1e30])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_huge_logits_give_finite_derivatives(loss, gamma, huge, dtype):
    """Also where p_t is 1, or 0, to the last digit; the second derivative too."""
    g = torch.Generator().manual_seed(6)
    x = huge * torch.randint(-1, 2, (40, 4), generator=g).to(dtype)
    t = loss.targets(x, g)
    x.requires_grad_()
    value = loss.fn(x, t, gamma=gamma, reduction="none")
    (first,) = torch.autograd.grad(value.sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(first.square().sum(), x)
    for what in (value, first, second):
        assert what.isfinite().all()
    assert value.max() > 0.1 * huge


@every_reduction
def test_reductions_are_those_of_the_elements(loss, reduction):
    x, t, w = batch(loss, 7)
    each = loss.fn(x, t, reduction="none", sample_weight=w)
    assert each.shape == t.shape
    if reduction == "sum":
        torch.testing.assert_close(loss.fn(x, t, reduction="sum", sample_weight=w), each.sum())
    if reduction != "none":
        assert loss.fn(x, t, reduction=reduction).shape == ()


@every_loss
def test_batch_equals_loop(loss):
    x, t, w = batch(loss, 8, 5, 4, 3)
    each = loss.fn(x, t, reduction="none", sample_weight=w)
    for k in range(5):
        one = loss.fn(x[k, None], t[k, None], reduction="none", sample_weight=w[k, None])
        torch.testing.assert_close(each[k, None], one, **TIGHT)


@every_reduction
def test_permutation(loss, reduction):
    x, t, w = batch(loss, 9, 30, 4)
    order = torch.randperm(30, generator=torch.Generator().manual_seed(0))
    results = []
    for rows in (slice(None), order):
        leaf = x[rows].clone().requires_grad_()
        value = loss.fn(leaf, t[rows], reduction=reduction, sample_weight=w[rows])
        value.sum().backward()
        results.append((value.detach(), leaf.grad))
    (a, da), (b, db) = results
    torch.testing.assert_close(a[order] if reduction == "none" else a, b, **TIGHT)
    torch.testing.assert_close(da[order], db, **TIGHT)


@every_reduction
def test_weights(loss, reduction):
    x, t, w = batch(loss, 10)

    def value(w, x=x):
        return loss.fn(x, t, reduction=reduction, sample_weight=w)

    ones = torch.ones_like(w)
    torch.testing.assert_close(value(ones), value(None), **TIGHT)
    scale = 1.0 if reduction.startswith("mean") else 3.0
    torch.testing.assert_close(value(3.0 * w), scale * value(w), **TIGHT)
    assert (value(torch.zeros_like(w)) == 0).all()
    smallest = torch.rand(loss.weight_shape(x), dtype=torch.float64)
    full = smallest.expand(t.shape)
    torch.testing.assert_close(value(smallest), value(full), **TIGHT)
    assert value(w, x.float()).dtype == torch.float32  # a wider weight does not promote
    leaf = w.clone().requires_grad_()
    assert not value(leaf).requires_grad
    if reduction.startswith("mean"):
        kept = w[:, None] if w.dim() == 1 else w
        kept = torch.where(torch.arange(6)[:, None] < 4, kept, 0.0).reshape(w.shape)
        alone = loss.fn(x[:4], t[:4], reduction=reduction, sample_weight=w[:4])
        torch.testing.assert_close(value(kept), alone, **TIGHT)


@every_reduction
def test_nothing_gives_zero_with_a_graph(loss, reduction):
    for shape in ((0, 4), (0, 4, 3), (2, 4, 0)):
        x, t, w = batch(loss, 11, *shape)
        for weight in (None, w):
            leaf = x.clone().requires_grad_()
            value = loss.fn(leaf, t, reduction=reduction, sample_weight=weight)
            assert value.shape == (t.shape if reduction == "none" else ())
            assert value.sum().item() == 0.0
            value.sum().backward()
            assert leaf.grad.shape == shape


@every_option
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_dtypes(loss, options, dtype):
    x, t, _ = batch(loss, 12, dtype=dtype)
    x.requires_grad_()
    for reduction in loss.reductions:
        value = loss.fn(x, t, reduction=reduction, **options)
        assert value.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        exact = loss.fn(x.detach().double(), t, reduction=reduction, **options)
        # Lifted input is exact. A logit of up to 8 rounded to float32 moves the logarithm of the
        # loss by up to (gamma + 1) * 8 eps, and so does the arithmetic.
        tol = 1e-12 if dtype == torch.float64 else 80 * torch.finfo(torch.float32).eps
        torch.testing.assert_close(value.double(), exact, rtol=tol, atol=0.0)
        (grad,) = torch.autograd.grad(value.sum(), x)
        assert grad.dtype == dtype
        assert grad.abs().sum() > 0


@every_option
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_an_input_that_is_not_finite_gives_nan(loss, options, bad):
    for row in range(4):
        for column in range(4):
            x, t, _ = batch(loss, 13)
            t = torch.where(t < 0, 0, t) if t.dim() == 1 else t
            t[row] = 0 if t.dim() == 1 else t[row].round()
            x[row, column] = bad
            leaf = x.clone().requires_grad_()
            value = loss.fn(leaf, t, reduction="none", **options)
            at = (row, column) if t.dim() == 2 else (row,)
            assert value[at].isnan()
            assert value.isnan().sum() == 1
            value.sum().backward()
            others = torch.arange(6) != row
            assert leaf.grad[others].isfinite().all()
            assert loss.fn(x, t, **options).isnan()


@every_loss
@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        ({"inputs": [1.0]}, TypeError, "inputs must be a floating-point tensor, got list"),
        ({"inputs": torch.ones(4, 3).long()}, TypeError, "inputs must be a floating.*int64"),
        ({"targets": [1, 2]}, TypeError, "targets must be a"),
        ({"targets": torch.ones(4, 3, dtype=torch.cfloat)}, TypeError, "targets.*complex"),
        ({"targets": torch.ones(3).long()}, ValueError, r"targets must have .* got \[3\]"),
        ({"targets": torch.ones(4, 4).long()}, ValueError, r"targets must have .* got \[4, 4\]"),
        ({"gamma": -0.5}, ValueError, "gamma, unless 0, must be positive.*got -0.5"),
        ({"gamma": float("nan")}, ValueError, "gamma, unless 0, must be positive.*got nan"),
        ({"gamma": float("inf")}, ValueError, "gamma, unless 0, must be positive.*got inf"),
        ({"gamma": "2"}, TypeError, "gamma, unless 0, must be a number, got str"),
        ({"gamma": torch.ones(3)}, ValueError, r"gamma must be a number or a 0-d tensor, got \[3"),
        ({"gamma": torch.tensor(2)}, TypeError, "gamma must be a floating-point tensor"),
        ({"sample_weight": 2.0}, TypeError, "sample_weight must be a floating.*got float"),
        ({"sample_weight": torch.ones(4).bool()}, TypeError, "sample_weight must be a floating"),
        ({"sample_weight": torch.ones(3)}, ValueError, "sample_weight must match {} dim-0"),
        ({"sample_weight": torch.tensor(1.0)}, ValueError, "sample_weight must match {} dim-0"),
        ({"sample_weight": torch.ones(1, 3)}, ValueError, "sample_weight must match {} dim-0"),
        ({"sample_weight": torch.ones(4, 7)}, ValueError, "sample_weight must be "),
    ],
)
def test_bad_arguments(loss, change, error, says):
    x, t, _ = batch(loss, 14, 4, 3)
    args = {"inputs": x, "targets": t} | change
    with pytest.raises(error, match=says.format(loss.of_inputs)):
        loss.fn(args.pop("inputs"), args.pop("targets"), **args)


@every_loss
@pytest.mark.parametrize("reduction", ["median", "mean ", None, "MEAN"])
def test_a_reduction_it_does_not_have(loss, reduction):
    x, t, _ = batch(loss, 15)
    modes = ", ".join(map(repr, loss.reductions))
    for call in (
        lambda: loss.fn(x, t, reduction=reduction),
        lambda: loss.module(reduction=reduction)(x, t),
    ):
        with pytest.raises(ValueError) as caught:  # noqa: PT011
            call()
        assert str(caught.value) == f"Invalid reduction: '{reduction}'. Supported modes: {modes}."
