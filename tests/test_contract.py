"""The contract matrix: every metric of the library through the same behaviours."""

from __future__ import annotations

import inspect

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.func import jacrev

from proxy_losses._metrics import METRICS

from .metrics import TAU, TIGHT, Metric, every_metric, lists


def by_list(metric: Metric, scores, pos, tau, valid=None, weight=None) -> torch.Tensor:
    return torch.tensor(
        [
            metric.reference(
                scores[k].tolist(),
                pos[k].tolist(),
                tau,
                None if valid is None else valid[k].tolist(),
                None if weight is None else weight[k].tolist(),
            )
            for k in range(scores.shape[0])
        ],
        dtype=torch.float64,
    )


@every_metric
@pytest.mark.parametrize("tau", [0.01, 0.3, 5.0])
def test_value_is_the_formula(metric, tau):
    scores, pos = lists(0, 6, 25)
    torch.testing.assert_close(
        metric.fn(scores, pos, tau), by_list(metric, scores, pos, tau), **TIGHT
    )


@every_metric
@settings(max_examples=60, deadline=None)
@given(
    m=st.integers(1, 30),
    seed=st.integers(0, 2**16),
    tau=st.floats(1e-3, 10),
    rate=st.floats(0, 1),
)
def test_value_is_the_formula_on_any_lists(metric, m, seed, tau, rate):
    g = torch.Generator().manual_seed(seed)
    scores = torch.randn(3, m, generator=g, dtype=torch.float64)
    pos, valid = torch.rand(3, m, generator=g) < rate, torch.rand(3, m, generator=g) < 0.8
    weight = torch.rand(3, m, generator=g, dtype=torch.float64)
    value = metric.fn(scores, pos, tau, valid_mask=valid, sample_weight=weight)
    torch.testing.assert_close(value, by_list(metric, scores, pos, tau, valid, weight), **TIGHT)
    assert ((value >= metric.least) & (value <= metric.most)).all()


@every_metric
@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**16), m=st.integers(3, 60))
def test_limit_is_the_exact_metric(metric, seed, m):
    if metric.exact is None:
        pytest.skip("it becomes no metric that is computed elsewhere")
    rng = np.random.default_rng(seed)
    scores = rng.permutation(m).astype(float)  # gaps of 1: sigmoid(-1 / (tau m)) underflows
    pos = rng.random(m) < 0.4
    pos[:2] = True, False
    value = metric.fn(torch.tensor(scores), torch.tensor(pos), 1e-5)
    assert value.item() == pytest.approx(metric.exact(scores, pos), rel=1e-12)


@every_metric
def test_extremes(metric):
    scores = torch.linspace(1, -1, 40, dtype=torch.float64)
    top, bottom = torch.arange(40) < 4, torch.arange(40) >= 36
    assert metric.fn(scores, top, 1e-4).item() == pytest.approx(metric.perfect, abs=1e-12)
    assert metric.fn(scores, bottom, 1e-4).item() < metric.worst
    assert metric.fn(1e6 * scores, top, 1e-6).item() == pytest.approx(metric.perfect)


@every_metric
def test_degenerate_lists_are_zero_with_zero_gradient(metric):
    scores = torch.randn(4, 8, dtype=torch.float64, requires_grad=True)
    pos = torch.zeros(4, 8, dtype=torch.bool)
    pos[1] = True  # all positive
    pos[2, 0] = pos[3, 0] = True
    valid = torch.ones(4, 8, dtype=torch.bool)
    valid[2] = False  # all masked
    weight = torch.ones(4, 8, dtype=torch.float64)
    weight[3] = 0.0
    value = metric.fn(scores, pos, TAU, valid_mask=valid, sample_weight=weight)
    counts = metric.counts(scores, pos, valid, weight)
    assert counts.tolist() == [False, not metric.needs_negative, False, False]
    assert (value[~counts] == 0).all()
    value.sum().backward()
    assert torch.isfinite(scores.grad).all()
    assert (scores.grad[~counts] == 0).all()


@every_metric
def test_empty_lists(metric):
    scores = torch.zeros(2, 0, requires_grad=True)
    value = metric.fn(scores, torch.zeros(2, 0, dtype=torch.bool), TAU)
    assert value.tolist() == [0.0, 0.0]
    value.sum().backward()
    assert metric.fn(torch.zeros(0, 5), torch.zeros(0, 5, dtype=torch.bool), TAU).shape == (0,)
    for shape in (2, 0, 5), (2, 3, 0):
        mapped = torch.func.vmap(lambda s, p: metric.fn(s, p, TAU))
        found = mapped(torch.zeros(shape), torch.zeros(shape, dtype=torch.bool))
        assert torch.equal(found, torch.zeros(shape[:-1]))


@every_metric
@pytest.mark.parametrize("junk", [0.0, torch.nan, torch.inf, -torch.inf, 1e30])
def test_masked_equals_removed(metric, junk):
    scores, pos = lists(1, 20)
    valid = torch.rand(20, generator=torch.Generator().manual_seed(2)) < 0.7
    valid[:2] = True
    kept = scores[valid].clone().requires_grad_()
    masked = torch.where(valid, scores, junk).requires_grad_()
    a = metric.fn(masked, pos, TAU, valid_mask=valid)
    b = metric.fn(kept, pos[valid], TAU)
    torch.testing.assert_close(a, b, **TIGHT)
    a.backward()
    b.backward()
    torch.testing.assert_close(masked.grad[valid], kept.grad, **TIGHT)
    assert (masked.grad[~valid] == 0).all()


@every_metric
def test_batch_equals_loop(metric):
    scores, pos = lists(3, 2, 3, 17)
    tau = torch.rand(2, 3, dtype=torch.float64) + 0.1
    batched = metric.fn(scores, pos, tau)
    assert batched.shape == (2, 3)
    looped = [[metric.fn(scores[i, j], pos[i, j], tau[i, j]) for j in range(3)] for i in range(2)]
    torch.testing.assert_close(batched, torch.stack([torch.stack(r) for r in looped]), **TIGHT)


@every_metric
def test_masks_broadcast(metric):
    scores, pos = lists(4, 3, 12)
    valid = torch.arange(12) < 10
    a = metric.fn(scores, pos, TAU, valid_mask=valid)
    b = metric.fn(scores, pos, TAU, valid_mask=valid.expand(3, 12))
    torch.testing.assert_close(a, b, rtol=0, atol=0)


@every_metric
def test_permutation(metric):
    scores, pos = lists(5, 50)
    order = torch.randperm(50, generator=torch.Generator().manual_seed(0))
    a, b = scores.clone().requires_grad_(), scores[order].clone().requires_grad_()
    va, vb = metric.fn(a, pos, TAU), metric.fn(b, pos[order], TAU)
    torch.testing.assert_close(va, vb, **TIGHT)
    va.backward()
    vb.backward()
    torch.testing.assert_close(a.grad[order], b.grad, **TIGHT)


@every_metric
def test_shift_and_scale(metric):
    scores, pos = lists(6, 30)
    tau = TAU if metric.tau_of_spread else TAU * 4
    torch.testing.assert_close(
        metric.fn(scores * 4 + 8, pos, tau), metric.fn(scores, pos, TAU), **TIGHT
    )


@every_metric
def test_weights(metric):
    scores, pos = lists(7, 30)
    ones = torch.ones(30, dtype=torch.float64)
    plain = metric.fn(scores, pos, TAU)
    torch.testing.assert_close(metric.fn(scores, pos, TAU, sample_weight=ones), plain, **TIGHT)
    w = torch.rand(30, dtype=torch.float64)
    a = metric.fn(scores, pos, TAU, sample_weight=w)
    b = metric.fn(scores, pos, TAU, sample_weight=torch.where(pos, 3 * w, 9.0))
    torch.testing.assert_close(a, b, **TIGHT)  # negatives' weights and the scale do not matter
    f32 = metric.fn(scores.float(), pos, TAU, sample_weight=w)
    assert f32.dtype == torch.float32  # a wider weight does not promote


@every_metric
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_dtypes(metric, dtype):
    scores, pos = lists(8, 4, 40, dtype=dtype)
    scores.requires_grad_()
    value = metric.fn(scores, pos, TAU)
    assert value.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    exact = metric.fn(scores.detach().double(), pos, TAU)
    # Lifted input is exact: what remains is float32 arithmetic on a few dozen terms.
    tol = 1e-12 if dtype == torch.float64 else 40 * torch.finfo(torch.float32).eps
    torch.testing.assert_close(value.double(), exact, rtol=tol, atol=tol)
    value.sum().backward()
    assert scores.grad.dtype == dtype
    assert scores.grad.abs().sum() > 0


@every_metric
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("where", ["positive", "negative"])
def test_non_finite_valid_score_is_nan(metric, bad, where):
    scores, pos = lists(9, 2, 30)
    scores[0, 0 if where == "positive" else 1] = bad
    value = metric.fn(scores.requires_grad_(), pos, TAU)
    assert value[0].isnan()
    assert value[1].isfinite()
    tau = torch.full((2,), TAU, dtype=torch.float64, requires_grad=True)
    values = value, metric.fn(scores, pos, tau)
    for g in (
        *torch.autograd.grad(values[0].sum(), scores),
        *torch.autograd.grad(values[1].sum(), (scores, tau)),
    ):
        assert g[0].isnan().all()
        assert g[1].isfinite().all()
    none = torch.zeros_like(pos)
    assert (metric.fn(scores, none, TAU) == 0).all()  # nothing to rank: still not NaN


@every_metric
def test_gradcheck(metric):
    scores, pos = lists(10, 2, 9)
    weight = torch.rand(2, 9, dtype=torch.float64)

    def f(s: torch.Tensor) -> torch.Tensor:
        return metric.fn(s, pos, TAU, sample_weight=weight)

    if metric.frozen is None:
        s = scores.requires_grad_()
        assert torch.autograd.gradcheck(f, (s,))
        assert torch.autograd.gradgradcheck(f, (s,))
        return
    frozen = metric.frozen(scores, pos, weight)
    for of in (jacrev, lambda g: jacrev(jacrev(g))):
        found, expected = of(f)(scores), of(frozen)(scores)
        assert expected.abs().max() > 0.01
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


@every_metric
def test_tau_gets_a_gradient(metric):
    scores, pos = lists(11, 3, 20)
    tau = torch.tensor(TAU, dtype=torch.float64, requires_grad=True)
    metric.fn(scores, pos, tau).sum().backward()
    step = 1e-6
    up, down = (metric.fn(scores, pos, TAU + d).sum() for d in (step, -step))
    # Central difference: error step^2 f''' + eps / step, far below 1e-6 here.
    assert tau.grad.item() == pytest.approx(((up - down) / (2 * step)).item(), rel=1e-6)


@every_metric
@pytest.mark.parametrize(("scale", "tau"), [(0, -100), (66, -33), (-60, -60), (-100, -100)])
def test_the_gradient_of_tau_does_not_overflow(metric, scale, tau):
    """Powers of two; float32, whose squares of these overflow, against float64 near 1."""
    scores, pos = lists(18, 2, 20, dtype=torch.float32)
    scores[1, 10:] *= 2.0**20  # far apart in one list, and near
    units, at = (scores.double(), tau) if metric.tau_of_spread else (scores.double(), tau - scale)
    found = []
    for s, t in ((units, at), (scores * 2.0**scale, tau)):
        t = torch.tensor(2.0**t, dtype=torch.float64, requires_grad=True)
        value = metric.fn(s, pos, t)
        value.sum().backward()
        found.append((value.detach().double(), t.grad * t.detach()))
    # In units of the value per e-fold of tau: float32 arithmetic on a few dozen terms.
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-5)


@every_metric
@pytest.mark.parametrize(
    ("kwargs", "error", "says"),
    [
        ({"scores": [1.0, 2.0]}, TypeError, "scores must be a floating-point tensor, got list"),
        ({"scores": torch.ones(4, dtype=torch.int64)}, TypeError, "floating-point.*int64"),
        ({"scores": torch.tensor(1.0)}, ValueError, "at least one axis"),
        ({"pos_mask": torch.ones(4)}, TypeError, "pos_mask must be a bool tensor"),
        ({"pos_mask": torch.ones(5, dtype=torch.bool)}, ValueError, r"expected \[..., 4\], got"),
        ({"valid_mask": torch.ones(4)}, TypeError, "valid_mask must be a bool"),
        ({"valid_mask": torch.ones(3, dtype=torch.bool)}, ValueError, "valid_mask must have"),
        ({"valid_mask": torch.ones(4, device="meta").bool()}, ValueError, "expected cpu, got meta"),
        ({"sample_weight": torch.ones(4).bool()}, TypeError, "sample_weight must be a floating"),
        ({"sample_weight": torch.ones(2)}, ValueError, "sample_weight must have the list length"),
        ({"tau": 0.0}, ValueError, "tau must be positive"),
        ({"tau": float("nan")}, ValueError, "tau must be positive"),
        ({"tau": "0.1"}, TypeError, "tau must be a number, got str"),
        ({"tau": torch.tensor(1)}, TypeError, "tau must be a floating-point tensor"),
        ({"tau": torch.ones(3)}, ValueError, "one value per list"),
    ],
)
def test_bad_arguments(metric, kwargs, error, says):
    args = {"scores": torch.randn(4), "pos_mask": torch.ones(4, dtype=torch.bool), "tau": 0.1}
    if metric.graded and "pos_mask" in kwargs:  # of any real dtype
        if error is TypeError:
            kwargs, says = {"pos_mask": torch.ones(4) * 1j}, "gains must be a real tensor"
        says = says.replace("pos_mask", "gains")
    args |= kwargs
    with pytest.raises(error, match=says):
        metric.fn(args.pop("scores"), args.pop("pos_mask"), args.pop("tau"), **args)


@every_metric
def test_leading_axes_that_do_not_broadcast(metric):
    labels = "gains" if metric.graded else "pos_mask"
    with pytest.raises(ValueError, match=f"leading axes of {labels}"):
        metric.fn(torch.randn(2, 4), torch.ones(3, 4, dtype=torch.bool), 0.1)


BOOLS = torch.ones(4, dtype=torch.bool)
DEFINED = {m.defined.__name__: m.defined for m in METRICS}  # some metrics share one
every_defined = pytest.mark.parametrize("defined", DEFINED.values(), ids=list(DEFINED))


@every_defined
@pytest.mark.parametrize(
    ("marks", "others", "error", "says"),
    [
        ([True], {}, TypeError, "marks must be a .* tensor, got list"),
        (torch.ones(4) * 1j, {}, TypeError, "marks must be a .* tensor, got .*complex64"),
        (BOOLS, {"valid_mask": torch.ones(4)}, TypeError, "valid_mask must be a bool"),
        (BOOLS, {"valid_mask": BOOLS[:3]}, ValueError, r"valid_mask must have .*\[..., 4\], got"),
        (BOOLS, {"sample_weight": BOOLS}, TypeError, "sample_weight must be a floating"),
        (BOOLS, {"sample_weight": torch.ones(3, 2)}, ValueError, "sample_weight must have"),
        (BOOLS.expand(2, 4), {"valid_mask": BOOLS.expand(3, 4)}, ValueError, "leading axes of val"),
    ],
)
def test_bad_arguments_of_which_lists_count(defined, marks, others, error, says):
    first = next(iter(inspect.signature(defined).parameters))
    lead = (torch.randn(marks.shape if isinstance(marks, torch.Tensor) else 1),)
    says = says.replace("marks", "gains" if first == "gains" else "pos_mask")
    with pytest.raises(error, match=says):
        defined(*(lead if first == "scores" else ()), marks, **others)


@every_defined
def test_a_number_is_no_list_and_a_list_is_no_tensor(defined):
    first = next(iter(inspect.signature(defined).parameters))
    if first == "scores":
        with pytest.raises(TypeError, match="scores must be a floating-point tensor, got list"):
            defined([1.0], BOOLS[:1])
        return
    with pytest.raises(ValueError, match=f"{first} must have at least one axis"):
        defined(BOOLS[0])
