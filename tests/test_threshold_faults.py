"""What recall, partial AUC and the spread make of odd input: scales, weights, tau, NaN, strides."""

from __future__ import annotations

import functools

import pytest
import torch

import proxy_losses as P
from proxy_losses import _quantiles

from .compiling import compile_fresh
from .metrics import lists

recall = functools.partial(P.recall_at_quantile, quantile=0.3)
trapezoid = functools.partial(P.partial_auc, beta=0.5)
pairwise = functools.partial(P.partial_auc, beta=0.5, surrogate="pairwise")
METRICS = {"recall": recall, "trapezoid": trapezoid, "pairwise": pairwise}
every_metric = pytest.mark.parametrize("fn", METRICS.values(), ids=METRICS)
NAN, INF = torch.nan, torch.inf


def defined(fn, scores, pos, weight=None):
    if fn is recall:
        return P.recall_defined(pos, sample_weight=weight)
    return P.partial_auc_defined(scores, pos, sample_weight=weight, **fn.keywords)


# --- the spread of scores ---


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_constants_have_no_spread(dtype):
    g = torch.Generator().manual_seed(0)
    values = torch.randn(200, generator=g, dtype=torch.float64)
    values = torch.cat([values, 1e4 * values, 1e-3 * values, torch.zeros(1)]).to(dtype)
    for rows in (1, 2, 3, 100, 4097):
        assert (P.score_spread(values[:, None].expand(-1, rows)) == 1).all()
    valid = torch.arange(100) < 70
    spoilt = torch.where(valid, values[:, None], NAN)
    assert (P.score_spread(spoilt, valid) == 1).all()
    assert (P.score_spread(values[:, None], torch.zeros(1).bool()) == 1).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("at", [1.0, 1.75, -3.0, 1000.0, 2.0**-10])
@pytest.mark.parametrize("rate", [0.5, 0.01])
def test_one_unit_in_the_last_place_is_rounding_and_two_are_not(dtype, at, rate):
    """Derived at `spread_floor`: a unit is at most eps |x|, two units are more."""
    low = torch.tensor(at, dtype=dtype)
    one = torch.nextafter(low, torch.tensor(INF, dtype=dtype))
    two = torch.nextafter(one, torch.tensor(INF, dtype=dtype))
    few = torch.arange(200) < 200 * rate
    assert P.score_spread(torch.where(few, one, low)) == 1
    if rate == 0.5:
        width = (two - low).item() / 1.349
        assert P.score_spread(torch.where(few, two, low)).item() == pytest.approx(width, rel=1e-2)


def test_a_spread_has_any_scale():
    scores = torch.randn(3, 501, generator=torch.Generator().manual_seed(1))
    ties = torch.where(torch.arange(501) < 400, scores[:, :1], scores)
    for s in (scores, ties):
        for scale in (2.0**-80, 2.0**-43, 2.0**70):
            assert torch.equal(P.score_spread(s * scale), scale * P.score_spread(s))
    want = (ties.double() - ties.double().mean(-1, keepdim=True)).square().mean(-1).sqrt()
    torch.testing.assert_close(P.score_spread(ties).double(), want, rtol=1e-6, atol=0)


# --- the edge of the band ---


@pytest.mark.parametrize(("n", "beta"), [(10_000, 1e-4), (8_000, 1e-3), (200_000, 0.005)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_rank_of_the_edge_is_not_rounded_to_float32(n, beta, dtype):
    """The band of n rows has beta n of them; a positive just below it is under all of these."""
    inside = round(beta * n)
    negatives = torch.arange(float(n), dtype=dtype)
    scores = torch.cat([negatives, negatives[[-inside]] - 0.5])
    pos = torch.arange(n + 1) == n
    value = P.partial_auc(scores, pos, 1e-8, beta=beta, surrogate="pairwise")
    assert value < 1e-6  # what is asked of pairwise sums in float32
    found = _quantiles.quantiles(negatives, [1 - beta], "higher", exact=True)
    assert found == n - inside
    sharded = _quantiles.sharded_quantiles(negatives, [1 - beta], "higher", None, "", exact=True)
    assert torch.equal(sharded, found)


# --- scale, weights, tau ---


@every_metric
@pytest.mark.parametrize("scale", [2.0**-43, 2.0**-90, 2.0**60])  # 2^-43 is 1e-13
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_partial_auc_is_that_of_scaled_scores(fn, scale, dtype):
    scores, pos = lists(0, 3, 60, dtype=dtype)
    tau = torch.tensor(0.3 * scale if fn is recall else 0.3, dtype=dtype)
    assert torch.equal(fn(scores * scale, pos, tau), fn(scores, pos, 0.3))
    assert defined(fn, scores * scale, pos).all()


@every_metric
@pytest.mark.parametrize(
    ("scale", "dtype"),
    [(3e37, torch.float32), (1e-40, torch.float32), (1e-60, torch.float64), (1e307, torch.float64)],
)
@pytest.mark.parametrize("of", [torch.float32, torch.float64])
def test_the_scale_of_weights_does_not_matter(fn, scale, dtype, of):
    scores, pos = lists(1, 2, 50, dtype=of)
    weight = torch.randint(1, 4, (2, 50), generator=torch.Generator().manual_seed(2)).to(dtype)
    want = fn(scores, pos, 0.3, sample_weight=weight)
    scaled = weight * scale
    got = fn(scores, pos, 0.3, sample_weight=scaled)
    # Subnormal weights have about four digits.
    torch.testing.assert_close(got, want, rtol=1e-4 if scale == 1e-40 else 1e-6, atol=0)
    assert defined(fn, scores, pos, scaled).all()
    assert (want > 0.01).all()


@every_metric
def test_weights_of_rows_that_are_not_read_do_not_matter(fn):
    scores, pos = lists(3, 2, 400)
    valid = torch.rand(400, generator=torch.Generator().manual_seed(0)) < 0.8
    read = pos & valid
    results = []
    for junk in (1.0, NAN, INF):
        s = scores.clone().requires_grad_()
        w = torch.where(read, torch.linspace(0.1, 1, 400), junk).requires_grad_()
        value = fn(s, pos, 0.3, valid_mask=valid, sample_weight=w)
        results.append((value, *torch.autograd.grad(value.sum(), (s, w))))
        assert (results[-1][2][~read] == 0).all()
        assert (results[-1][2][read] != 0).any()
    for other in results[1:]:
        assert all(map(torch.equal, other, results[0]))


@every_metric
@pytest.mark.parametrize("m", [3, 60, 3_000])
@pytest.mark.parametrize("bad", [0.0, -0.5, NAN])
def test_a_tensor_tau_that_is_none_gives_nan_at_every_size(fn, m, bad):
    scores, pos = lists(4, 3, m)
    pos[2] = False  # does not count: 0 with zero gradient even so
    scores = scores.sort().values.requires_grad_()
    pos[:2] = torch.arange(m) == m - 1
    tau = torch.tensor([0.3, bad, bad], dtype=torch.float64)
    value = fn(scores, pos, tau)
    single = fn(scores[:1], pos[:1], 0.3)
    torch.testing.assert_close(value[:1], single, rtol=1e-12, atol=0)
    counts = defined(fn, scores, pos)[1].item()
    assert value[1].isnan() if counts else value[1] == 0
    assert value[2] == 0
    value[[0, 2]].sum().backward()
    assert scores.grad[0].isfinite().all()
    assert (scores.grad[2] == 0).all()
    assert fn(scores, pos, torch.tensor(bad))[1].isnan() == counts


def test_a_tau_per_list_may_go_with_lists_that_only_the_weights_have():
    scores, pos = lists(5, 40)
    weight, tau = torch.rand(3, 40, dtype=torch.float64), torch.tensor([0.1, 0.2, 0.3])
    for fn in METRICS.values():
        value = fn(scores, pos, tau.double(), sample_weight=weight)
        each = [
            fn(scores, pos, t.double(), sample_weight=w) for t, w in zip(tau, weight, strict=True)
        ]
        torch.testing.assert_close(value, torch.stack(each), rtol=1e-12, atol=0)


# --- what is not finite ---


@every_metric
@pytest.mark.parametrize("bad", [NAN, INF, -INF])
@pytest.mark.parametrize("why", ["no positive", "no weight", "no negative"])
def test_a_list_that_does_not_count_is_zero_whatever_it_holds(fn, bad, why):
    scores, pos = lists(6, 2, 30)
    weight = torch.ones(2, 30, dtype=torch.float64)
    if why == "no positive":
        pos[0] = False
    elif why == "no weight":
        weight[0] = 0
    elif fn is recall:
        return  # it needs none
    else:
        pos[0] = True
    scores[0, 3] = bad
    tau = torch.full((2,), 0.3, dtype=torch.float64, requires_grad=True)
    leaves = scores.requires_grad_(), weight.requires_grad_(), tau
    value = fn(scores, pos, tau, sample_weight=weight)
    assert value[0] == 0
    for grad in torch.autograd.grad(value.sum(), leaves):
        assert (grad[0] == 0).all()
        assert grad.isfinite().all()
        assert grad[1].any()


@pytest.mark.parametrize("make", [
    lambda: P.RecallAtQuantileLoss(3, 0.3, queue_size=0),
    lambda: P.PAUCAtBudgetLoss(3, beta=0.5, queue_size=0),
    lambda: P.PAUCAtBudgetLoss(3, beta=0.5, queue_size=0, surrogate="pairwise"),
])  # fmt: skip
def test_a_class_that_does_not_count_may_hold_an_infinite_logit(make):
    logits = torch.randn(40, 3, generator=torch.Generator().manual_seed(7))
    logits[5, 2] = INF
    logits.requires_grad_()
    loss = make()(logits, torch.arange(40) % 2)  # no row of class 2
    loss.backward()
    assert loss.isfinite()
    assert logits.grad.isfinite().all()
    assert (logits.grad[:, 2] == 0).all()


# --- strides ---


def laid_out(x: torch.Tensor) -> dict[str, torch.Tensor]:
    """The same numbers in other places."""
    wide = torch.zeros(*x.shape[:-1], 2 * x.shape[-1] + 3, dtype=x.dtype)
    wide[..., 1 : 2 * x.shape[-1] : 2] = x
    flat = torch.zeros(x.numel() + 1, dtype=x.dtype)
    flat[1:] = x.flatten()
    return {
        "transposed": x.mT.contiguous().mT,
        "sliced": wide[..., 1 : 2 * x.shape[-1] : 2],
        "offset": flat[1:].view(x.shape),
        "expanded": x[:1].expand(x.shape),
    }


def calls(x, pos, weight):
    """Every public function here of lists [L, M]."""
    valid = weight > 0.1
    more = {"valid_mask": valid, "sample_weight": weight}
    yield from (fn(x, pos, 0.3, **more) for fn in METRICS.values())
    yield P.recall_saturation(x, pos, 0.05, quantile=0.3, valid_mask=valid)
    yield P.score_spread(x, valid)
    yield P.sigmoid_focal(x, pos, reduction="none", sample_weight=weight)
    yield P.softmax_focal(x, pos[:, 0], reduction="none", sample_weight=weight[:, 0])


@pytest.mark.parametrize(
    ("layout", "compiled"),
    [
        ("transposed", False), ("sliced", False), ("offset", False), ("expanded", False),
        # Others are compiled in tests/test_strides.py.
        pytest.param("expanded", True, marks=pytest.mark.slow),
    ],
)  # fmt: skip
def test_any_strides_and_offsets(layout, compiled):
    g = torch.Generator().manual_seed(8)
    scores, pos = lists(9, 4, 37)
    weight = torch.rand(4, 37, generator=g, dtype=torch.float64)
    given = [laid_out(x)[layout] for x in (scores, pos, weight)]
    plain = [x.clone(memory_format=torch.contiguous_format) for x in given]

    def everything(*args):
        return tuple(calls(*args))

    run = compile_fresh(everything)[0] if compiled else everything
    for got, want in zip(run(*given), everything(*plain), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-14)
    leaf, other = given[0].detach().requires_grad_(), plain[0].requires_grad_()
    sum(x.sum() for x in run(leaf, *given[1:]) if x.requires_grad).backward()
    sum(x.sum() for x in everything(other, *plain[1:]) if x.requires_grad).backward()
    torch.testing.assert_close(leaf.grad, other.grad, rtol=1e-10, atol=1e-14)


# --- settings inside compiled code ---

S, POS = lists(10, 200, dtype=torch.float32)
SETTINGS = {
    "quantile": (lambda s, x: P.recall_at_quantile(s, POS, 0.3, quantile=x), (0.1, 0.2, 0.7)),
    "recall tau": (lambda s, x: P.recall_at_quantile(s, POS, x, quantile=0.1), (0.1, 0.2, 0.4)),
    "beta": (lambda s, x: P.partial_auc(s, POS, 0.3, beta=x), (0.1, 0.2, 0.9)),
    "alpha": (lambda s, x: P.partial_auc(s, POS, 0.3, alpha=x, beta=0.95), (0.1, 0.2, 0.9)),
    "pairs": (
        lambda s, x: P.partial_auc(s, POS, 0.3, beta=x, surrogate="pairwise"), (0.1, 0.2, 0.9)
    ),
    "pAUC tau": (lambda s, x: P.partial_auc(s, POS, x, beta=0.5), (0.1, 0.2, 0.4)),
    "n_knots": (lambda s, x: P.partial_auc(s, POS, 0.3, beta=0.5, n_knots=x), (2, 3, 5)),
    "gamma": (lambda s, x: P.sigmoid_focal(s, POS, gamma=x), (2.0, 0.5, 3.5)),
    "focal alpha": (lambda s, x: P.sigmoid_focal(s, POS, alpha=x), (0.1, 0.5, 0.9)),
    "softmax gamma": (
        lambda s, x: P.softmax_focal(s.view(-1, 4), POS[:50].long(), gamma=x), (2.0, 0.5, 3.5)
    ),
    "smoothing": (
        lambda s, x: P.softmax_focal(s.view(-1, 4), POS[:50].long(), label_smoothing=x),
        (0.1, 0.5, 0.9),
    ),
    "blend": (
        lambda s, x: P.blend_weight(3, P.Schedule(2, 5, final_main_weight=x)), (0.1, 0.5, 0.9)
    ),
    "temperature": (
        lambda s, x: P.temp_at(3, P.Schedule(2, 5, temp_start=x)), (0.1, 0.5, 0.9)
    ),
}  # fmt: skip
# One for each place that a number goes to in a kernel.
KERNELS = ["quantile", "pairs", "pAUC tau", "gamma", "temperature"]


@pytest.mark.parametrize(
    ("name", "backend", "dynamic"),
    [
        *((name, "eager", None) for name in SETTINGS),  # aot_eager: tests/test_faults.py
        *(pytest.param(name, "inductor", True, marks=pytest.mark.slow) for name in KERNELS),
    ],
)
def test_a_setting_may_vary_between_calls_of_compiled_code(name, backend, dynamic):
    """The value, for a compiler may bake a number in that has changed."""
    fn, values = SETTINGS[name]
    torch.compiler.reset()
    compiled = torch.compile(fn, fullgraph=True, backend=backend, dynamic=dynamic)
    found = []
    for x in values:
        want = fn(S, x)
        torch.testing.assert_close(compiled(S, x), want, rtol=2e-6, atol=1e-7)
        found.append(want.item())
    assert len(set(found)) == len(values)
