"""What the focal losses have beyond the contract of `test_pointwise`: digits, padding, options."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import cross_entropy, one_hot

import proxy_losses as P

from . import reference_focal as ref
from .pointwise import LOSSES, TIGHT, batch

SIGMOID, SOFTMAX = LOSSES
INF, NAN = torch.inf, torch.nan
GAMMAS = [0, 0.01, 0.5, 1.0, 1.5, 2.0, 3.5]
both_dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.float64])


def rounding(dtype: torch.dtype, gamma: float, logit: float) -> dict[str, float]:
    """Tolerance of a loss or its gradient.

    Both are about exp(-(gamma + 1) |logit|) where they are small, so an eps in the logarithm, as
    wide as the logit, is that much in the value; a dozen operations add theirs. Numbers that are
    not normal have fewer digits.
    """
    eps = torch.finfo(dtype).eps
    return {"rtol": eps * (16 + 2 * (gamma + 1) * abs(logit)), "atol": 8 * torch.finfo(dtype).tiny}


@both_dtypes
@pytest.mark.parametrize("gamma", GAMMAS)
@pytest.mark.parametrize("t", [0.0, 1.0, 0.25, 1e-3])
def test_no_digits_are_lost_where_p_is_0_or_1(dtype, gamma, t):
    for value in (0.0, 1e-3, 0.5, 5.0, 16.5, 20.5, 37.0, 41.0, 80.0, -0.5, -17.0, -41.0, -80.0):
        x = torch.tensor([value], dtype=dtype, requires_grad=True)
        target = torch.tensor([t], dtype=dtype)
        loss = P.sigmoid_focal(x, target, gamma=gamma, reduction="sum")
        loss.backward()
        want = ref.sigmoid_focal(x.detach(), target, gamma=gamma, reduction="sum")
        slope = ref.gradient(
            lambda xs, target=target: ref.sigmoid_element(xs[0], target.item(), gamma=gamma),
            x.tolist(),
        )
        tol = rounding(dtype, gamma, value)
        torch.testing.assert_close(loss.item(), want, **tol)
        torch.testing.assert_close(x.grad.tolist(), slope, **tol)


@both_dtypes
@pytest.mark.parametrize("gamma", GAMMAS)
@pytest.mark.parametrize("smoothing", [0.0, 0.125])
def test_no_digits_are_lost_where_one_class_takes_all(dtype, gamma, smoothing):
    for lead in (0.0, 1e-3, 5.0, 16.5, 20.5, 41.0, 80.0, -17.0, -41.0, -80.0):
        x = torch.tensor([[0.25, lead + 0.5, -1.0]], dtype=dtype, requires_grad=True)
        options = {"gamma": gamma, "label_smoothing": smoothing, "reduction": "sum"}
        loss = P.softmax_focal(x, torch.tensor([1]), **options)
        loss.backward()
        want = ref.softmax_focal(x.detach(), torch.tensor([1]), **options)
        slope = ref.gradient(
            lambda xs: ref.softmax_row(xs, 1, gamma=gamma, smoothing=smoothing),
            x[0].tolist(),
        )
        tol = rounding(dtype, gamma, abs(lead) + 2)
        torch.testing.assert_close(loss.item(), want, **tol)
        # The smoothed loss has terms of both signs: digits relative to the largest.
        scale = 0.0 if not smoothing else tol["rtol"] * max(map(abs, slope))
        torch.testing.assert_close(
            x.grad[0].tolist(), slope, rtol=tol["rtol"], atol=tol["atol"] + scale
        )


def test_two_classes_are_a_yes_and_a_no():
    x, t, w = batch(SOFTMAX, 0, 20, 2)
    valid = t >= 0
    for gamma in (0.5, 2.0):
        pair = P.softmax_focal(x, t, gamma=gamma, alpha=[0.75, 0.25], sample_weight=w)
        single = P.sigmoid_focal(
            (x[:, 1] - x[:, 0])[valid], t[valid], gamma=gamma, sample_weight=w[valid]
        )
        torch.testing.assert_close(pair, single, **TIGHT)


def test_targets_of_any_real_dtype():
    x, t, _ = batch(SIGMOID, 1)
    t = t.round()
    want = P.sigmoid_focal(x, t)
    for dtype in (torch.bool, torch.int64, torch.uint8, torch.float32, torch.float16):
        assert torch.equal(P.sigmoid_focal(x, t.to(dtype)), want)
    assert P.sigmoid_focal(x.float(), t.double()).dtype == torch.float32
    x, t, _ = batch(SOFTMAX, 1, 6, 2)
    want = P.softmax_focal(x, t.abs() % 2)
    for dtype in (torch.bool, torch.int32, torch.uint8):
        assert torch.equal(P.softmax_focal(x, (t.abs() % 2).to(dtype)), want)


def test_targets_get_no_gradient_and_show_when_not_a_number():
    x, t, _ = batch(SIGMOID, 2)
    t[0, 1] = NAN
    for options in SIGMOID.options:
        each = P.sigmoid_focal(x, t.requires_grad_(), reduction="none", **options)
        assert torch.equal(each.isnan(), t.isnan())
        assert not each.requires_grad


def test_alpha_weighs_positives_against_negatives():
    x, t, _ = batch(SIGMOID, 3)
    t = t.round()
    plain = P.sigmoid_focal(x, t, alpha=-1, reduction="none")
    for alpha in (0.0, 1e-6, 0.25, 1):
        weighed = P.sigmoid_focal(x, t, alpha=alpha, reduction="none")
        want = (alpha * t + (1 - alpha) * (1 - t)) * plain
        torch.testing.assert_close(weighed, want, **TIGHT)


def test_alpha_of_classes():
    x, t, _ = batch(SOFTMAX, 4)
    alpha = torch.tensor([1.0, 2.0, 3.0, 0.1], dtype=torch.float64)
    want = alpha[t.clamp(min=0)] * P.softmax_focal(x, t, reduction="none")
    for given in (alpha, alpha.tolist(), tuple(alpha.tolist())):
        weighed = P.softmax_focal(x, t, alpha=given, reduction="none")
        torch.testing.assert_close(weighed, want, **TIGHT)
    whole = P.softmax_focal(x, t, alpha=torch.tensor([1, 2, 3, 4]))
    assert torch.equal(whole, P.softmax_focal(x, t, alpha=[1.0, 2.0, 3.0, 4.0]))
    assert P.softmax_focal(x.float(), t, alpha=alpha).dtype == torch.float32


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("ignore_index", [-100, -1, 0, 3])
def test_gamma_zero_is_cross_entropy(smoothing, ignore_index):
    x, t, _ = batch(SOFTMAX, 5, 12, 4, 3)
    t = torch.where(t < 0, ignore_index, t)
    kwargs = {"label_smoothing": smoothing, "ignore_index": ignore_index}
    for reduction in ("none", "mean", "sum"):
        got = P.softmax_focal(x, t, gamma=0.0, reduction=reduction, **kwargs)
        torch.testing.assert_close(got, cross_entropy(x, t, reduction=reduction, **kwargs), **TIGHT)


@pytest.mark.parametrize("options", SOFTMAX.options)
@pytest.mark.parametrize("ignore_index", [-100, 0, 2])
@pytest.mark.parametrize("junk", [1e30, NAN, INF, -INF])
def test_padding_is_as_if_it_were_not_there(options, ignore_index, junk):
    x, t, w = batch(SOFTMAX, 6, 20, 4)
    t = torch.where(t < 0, ignore_index, t)
    valid = t != ignore_index
    kwargs = {**options, "ignore_index": ignore_index}
    spoilt = torch.where(valid[:, None], x, junk).requires_grad_()
    each = P.softmax_focal(spoilt, t, reduction="none", **kwargs)
    assert (each[~valid] == 0).all()
    assert (each[valid] > 0).all()
    for reduction in SOFTMAX.reductions[1:]:
        kept = x[valid].clone().requires_grad_()
        a = P.softmax_focal(spoilt, t, reduction=reduction, sample_weight=w, **kwargs)
        b = P.softmax_focal(kept, t[valid], reduction=reduction, sample_weight=w[valid], **kwargs)
        torch.testing.assert_close(a, b, **TIGHT)
        (da,), (db,) = torch.autograd.grad(a, spoilt), torch.autograd.grad(b, kept)
        torch.testing.assert_close(da[valid], db, **TIGHT)
        assert (da[~valid] == 0).all()


@pytest.mark.parametrize("reduction", SOFTMAX.reductions)
@pytest.mark.parametrize("ignore_index", [-100, 1])
@pytest.mark.parametrize("weighted", [False, True])
def test_padding_alone_is_zero_with_a_graph(reduction, ignore_index, weighted):
    x = torch.full((3, 4, 2), NAN, requires_grad=True)
    t = torch.full((3, 2), ignore_index)
    loss = P.softmax_focal(
        x, t, reduction=reduction, ignore_index=ignore_index,
        sample_weight=torch.ones(3, 2) if weighted else None,
    )  # fmt: skip
    assert (loss == 0).all()
    loss.sum().backward()
    assert torch.equal(x.grad, torch.zeros(3, 4, 2))


def test_mean_positive():
    x, t, w = batch(SOFTMAX, 7, 30, 4)

    def value(reduction, t=t, **kwargs):
        return P.softmax_focal(x, t, reduction=reduction, **kwargs)

    for background in range(4):
        positive = (t >= 0) & (t != background)
        kwargs = {"background_class": background}
        torch.testing.assert_close(
            value("mean_positive", **kwargs), value("sum") / positive.sum(), **TIGHT
        )
        torch.testing.assert_close(
            value("mean_positive", sample_weight=w, **kwargs),
            value("sum", sample_weight=w) / w[positive].sum(),
            **TIGHT,
        )
        weightless = torch.where(positive, 0.0, w)
        torch.testing.assert_close(
            value("mean_positive", sample_weight=weightless, **kwargs),
            value("sum", sample_weight=weightless),
            **TIGHT,
        )
    negatives = torch.where(t < 0, t, 0)
    torch.testing.assert_close(value("mean_positive", negatives), value("sum", negatives), **TIGHT)
    positives = torch.where(t == 0, 1, t)
    torch.testing.assert_close(value("mean_positive", positives), value("mean", positives), **TIGHT)


@pytest.mark.parametrize("stray", [-1, 4, 2**40, -(2**40)])
def test_a_class_id_out_of_range_gives_nan_in_its_row(stray):
    x, t, _ = batch(SOFTMAX, 8)
    t[:2] = torch.tensor([2, -100])
    t[0] = stray
    for options in SOFTMAX.options:
        leaf = x.clone().requires_grad_()
        each = P.softmax_focal(leaf, t, reduction="none", **options)
        assert each.isnan().tolist() == [True] + [False] * 5
        assert P.softmax_focal(x, t, **options).isnan()
        each.sum().backward()
        assert leaf.grad[0].isnan().any()
        assert leaf.grad[1:].isfinite().all()


def test_minus_infinity_excludes_a_class():
    x, t, _ = batch(SOFTMAX, 9, 30, 4)
    t = torch.where(t == 3, 2, t)
    x[:, 3] = -INF
    for gamma in GAMMAS:
        a, b = x.clone().requires_grad_(), x[:, :3].clone().requires_grad_()
        got, want = P.softmax_focal(a, t, gamma=gamma), P.softmax_focal(b, t, gamma=gamma)
        torch.testing.assert_close(got, want, **TIGHT)
        got.backward()
        want.backward()
        torch.testing.assert_close(a.grad[:, :3], b.grad, **TIGHT)
        assert (a.grad[:, 3] == 0).all()
        own = P.softmax_focal(x, torch.full_like(t, 3), gamma=gamma, reduction="none")
        assert (own == INF).all()


@pytest.mark.parametrize("gamma", GAMMAS)
def test_one_class_is_always_right(gamma):
    alone = torch.tensor([[3.0], [-1e4], [0.0]], requires_grad=True)
    excluded = torch.full((3, 4), -INF)
    excluded[:, 2] = torch.tensor([3.0, -1e4, 0.0])
    excluded.requires_grad_()
    for x, own in ((alone, 0), (excluded, 2)):
        loss = P.softmax_focal(x, torch.full((3,), own), gamma=gamma, reduction="none")
        assert (loss == 0).all()
        (grad,) = torch.autograd.grad(loss.sum(), x)
        assert (grad == 0).all()


def test_sigmoid_weights_broadcast_over_trailing_axes():
    x, t, _ = batch(SIGMOID, 10, 3, 4, 2, 5)
    for shape in ((3, 1, 1, 1), (3, 1, 2, 5), (3, 4, 1, 5), (3, 4, 2, 5)):
        w = torch.rand(shape, dtype=torch.float64)
        for reduction in SIGMOID.reductions:
            got = P.sigmoid_focal(x, t, reduction=reduction, sample_weight=w)
            full = w.expand(x.shape)
            want = P.sigmoid_focal(x, t, reduction=reduction, sample_weight=full)
            torch.testing.assert_close(got, want, **TIGHT)


def test_many_labels_are_many_binary_losses():
    x, ids, _ = batch(SOFTMAX, 11, 9, 4)
    labels = one_hot(ids.clamp(min=0), 4)
    each = P.sigmoid_focal(x, labels, reduction="none")
    for c in range(4):
        alone = P.sigmoid_focal(x[:, c], labels[:, c], reduction="none")
        torch.testing.assert_close(each[:, c], alone, **TIGHT)
    assert torch.equal(P.sigmoid_focal(x[0, 0], labels[0, 0]), each[0, 0])


@pytest.mark.parametrize(
    ("fn", "args", "kwargs", "error", "says"),
    [
        ("sigmoid", [(3,), (3,)], {"alpha": 1.5}, ValueError, r"alpha must be in \[0, 1\], or -1"),
        ("sigmoid", [(3,), (3,)], {"alpha": NAN}, ValueError, "alpha must be .*got nan"),
        ("sigmoid", [(3,), (3,)], {"alpha": None}, TypeError, "alpha must be a number, got None"),
        ("sigmoid", [(3, 3), (3, 3)], {"w": (3,)}, ValueError, "broadcastable to inputs"),
        ("sigmoid", [(3, 4), (3, 4)], {"w": (3, 2)}, ValueError, "broadcastable to inputs"),
        ("sigmoid", [(3, 4), (3, 4)], {"w": (3, 4, 1)}, ValueError, "broadcastable to inputs"),
        ("softmax", [(3,), (3,)], {}, ValueError, r"inputs must be \[N, C\] or .* got \[3\]"),
        ("softmax", [(3, 0), (3,)], {}, ValueError, r"C >= 1, got \[3, 0\]"),
        ("softmax", [(3, 2, 4), (3,)], {}, ValueError, r"expected \[3, 4\], got \[3\]"),
        ("softmax", [(3, 2), (3,)], {"float": True}, TypeError, "targets must be an integer"),
        ("softmax", [(3, 2), (3,)], {"alpha": 0.25}, ValueError, "alpha must be a 1-D tensor"),
        ("softmax", [(3, 2), (3,)], {"alpha": [[1.0, 2.0]]}, ValueError, "alpha must be a 1-D"),
        ("softmax", [(3, 2), (3,)], {"alpha": [1.0]}, ValueError, r"expected \[2\], got \[1\]"),
        ("softmax", [(3, 2), (3,)], {"label_smoothing": 1.1}, ValueError, "label_smoothing must"),
        ("softmax", [(3, 2), (3,)], {"label_smoothing": -1}, ValueError, r"in \[0, 1\], got -1"),
        (
            "softmax",
            [(3, 2), (3,)],
            {"ignore_index": 0.5},
            TypeError,
            "ignore_index must be an int",
        ),
        ("softmax", [(3, 2), (3,)], {"background_class": "0"}, TypeError, "background_class must"),
        ("softmax", [(3, 2, 4), (3, 4)], {"w": (3, 1)}, ValueError, "of the shape of targets"),
        ("softmax", [(3, 2, 4), (3, 4)], {"w": (3,)}, ValueError, r"expected \[3, 4\], got \[3\]"),
    ],
)
def test_bad_arguments(fn, args, kwargs, error, says):
    shape, target_shape = args
    kwargs = dict(kwargs)
    targets = torch.zeros(target_shape, dtype=torch.float32 if kwargs.pop("float", 0) else int)
    if "w" in kwargs:
        kwargs["sample_weight"] = torch.ones(kwargs.pop("w"))
    with pytest.raises(error, match=says):
        getattr(P, f"{fn}_focal")(torch.zeros(shape), targets, **kwargs)
