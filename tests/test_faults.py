"""Kinds of input that once gave a wrong number or an error, each with what is right.

Right values come from float64 loops (tests/exact.py, tests/reference.py) or from counting. A test
covers a kind, not an example: sizes on both sides of the near-linear method, dtypes, masks, taus
per list, gradients. Where a bound is not derived beside its use it is that of tests/exact.py.
"""

import contextlib
import functools
import itertools
import math
from contextlib import nullcontext
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import proxy_losses as P

from . import exact, processes
from .exact import array

pytestmark = pytest.mark.slow

FLOATS = [torch.float32, torch.float64]
SIZES = [100, 1_000, 20_000]  # pairs one by one; tiles; near-linear
DENSE_OR_GRID = pytest.mark.parametrize("method", ["dense", "grid"])
every_float = pytest.mark.parametrize("dtype", FLOATS, ids=str)
every_size = pytest.mark.parametrize("rows", SIZES)
PAIRWISE = {"surrogate": "pairwise", "beta": 0.3}
METRICS = {
    "smooth_ap": P.smooth_ap,
    "recall": functools.partial(P.recall_at_quantile, quantile=0.2),
    "trapezoid": functools.partial(P.partial_auc, beta=0.3),
    "pairwise": functools.partial(P.partial_auc, **PAIRWISE),
}
every_metric = pytest.mark.parametrize("name", METRICS)


def drawn(rows: int, seed: int = 0, dtype: torch.dtype = torch.float32, rate: float = 0.1):
    g = torch.Generator().manual_seed(seed)
    scores = torch.randn(rows, generator=g, dtype=torch.float64).to(dtype)
    pos = torch.rand(rows, generator=g) < rate
    pos[0], pos[1] = True, False
    return scores, pos


def value_and_grad(fn, scores: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
    leaf = scores.detach().clone().requires_grad_()
    value = fn(leaf, *args, **kwargs)
    (grad,) = torch.autograd.grad(value.sum(), leaf)
    return value.detach(), grad


# -- 1: a spread below the rounding of the scores is none

CONSTANTS = [0.1, 1 / 3, -7.7, 1e-30, -1e-30, 1e30, 12345.678, 0.0, 1.0]


@every_float
@pytest.mark.parametrize("rows", [1, 2, 3, 7, 100, 1_001, 70_000])
def test_constants_do_not_spread(rows, dtype):
    for c in CONSTANTS:
        assert P.score_spread(torch.full((rows,), c, dtype=dtype)) == 1.0, c


def test_constants_of_every_kind_do_not_spread():
    g = torch.Generator().manual_seed(0)
    every = torch.randn(2_000, 1, generator=g) * 10.0 ** torch.randint(-20, 20, (2_000, 1))
    assert (P.score_spread(every.expand(2_000, 100)) == 1.0).all()
    assert (P.score_spread(every.double().expand(2_000, 37)) == 1.0).all()
    for half in (torch.float16, torch.bfloat16):
        found = P.score_spread(torch.full((100,), 0.1, dtype=half))
        assert found == 1.0
        assert found.dtype == torch.float32


@every_float
def test_constants_under_a_mask_do_not_spread(dtype):
    valid = torch.arange(300) % 3 > 0
    scores = torch.where(valid, 0.1, torch.randn(300)).to(dtype)
    assert P.score_spread(scores, valid) == 1.0
    assert P.score_spread(scores.where(valid, torch.nan), valid) == 1.0


@every_float
def test_one_ulp_of_a_few_rows_is_no_spread(dtype):
    """The deviation of one row in ten thousand by one ulp is a hundredth of an ulp."""
    for c in (0.1, -3.3, 1e6):
        scores = torch.full((10_000,), c, dtype=dtype)
        scores[7] = torch.nextafter(scores[7], scores.new_tensor(torch.inf))
        assert P.score_spread(scores) == 1.0


@every_float
@pytest.mark.parametrize("scale", [1e-30, 1e-6, 1.0, 1e30])
def test_what_spreads_keeps_its_spread(dtype, scale):
    scores = torch.linspace(0.0, 1.0, 101, dtype=torch.float64).mul(scale).to(dtype)
    # quartiles are rows 25 and 75; a few roundings
    assert P.score_spread(scores).item() == pytest.approx(0.5 * scale / 1.349, rel=1e-6)
    spike = torch.zeros(100, dtype=dtype)
    spike[3] = scale
    want = scale * math.sqrt(0.01 * 0.99)  # standard deviation of one in a hundred
    assert P.score_spread(spike).item() == pytest.approx(want, rel=1e-5)


@pytest.mark.parametrize("queue_size", [0, 64])
@pytest.mark.parametrize("constant", [0.1, 1 / 3, -7.7])
@pytest.mark.parametrize("rows", [100, 1_000])
def test_a_constant_head_starts_like_one_of_spread_1(constant, rows, queue_size):
    options = {"queue_size": queue_size, "temperature": 0.05, "temperature_unit": "spread"}

    def run(make) -> Tensor:
        logits = torch.full((rows, 1), constant, requires_grad=True)
        make(num_classes=1, **options)(logits, targets).backward()
        return logits.grad[:, 0]

    targets = (torch.arange(rows) % 10 == 0).long()
    want = exact.smooth_ap(torch.full((rows,), constant), targets == 1, 0.05)
    got = array(run(P.SmoothAPLoss))
    assert np.linalg.norm(got + want.grad) <= 3e-6 * want.natural
    recall = functools.partial(P.RecallAtQuantileLoss, quantile=0.1)
    # every positive on the threshold: sigmoid'(0) / tau / positives
    share = array(run(recall))[targets.numpy() == 1]
    assert share == pytest.approx(-0.25 / 0.05 / int(targets.sum()), rel=1e-5)


# -- 2, 3: any strides and offsets (all functions: tests/test_strides.py)


@every_metric
@every_float
@pytest.mark.parametrize("rows", [1_000, 40_000])
@pytest.mark.parametrize("offset", [1, 2, 3, 5, 7])
def test_storage_offsets(name, dtype, rows, offset):
    scores, pos = drawn(rows + 8, offset, dtype)
    cut = slice(offset, rows + offset)
    pos[offset], pos[offset + 1] = True, False
    valid = torch.rand(rows + 8) < 0.9
    for masks in ({}, {"valid_mask": valid}):
        sliced = {k: x[cut] for k, x in masks.items()}
        whole = {k: x.clone() for k, x in sliced.items()}
        got = METRICS[name](scores[cut], pos[cut], 0.05, **sliced)
        assert torch.equal(got, METRICS[name](scores[cut].clone(), pos[cut].clone(), 0.05, **whole))


@every_metric
@pytest.mark.parametrize("shape", [(7, 3), (2_000, 5), (21_000, 2)])
def test_transposed_batches(name, shape):
    g = torch.Generator().manual_seed(3)
    logits = torch.randn(shape, generator=g)
    labels, known = torch.rand(shape, generator=g) < 0.3, torch.rand(shape, generator=g) < 0.8
    labels[0], labels[1], known[:2] = True, False, True
    for masks in ({}, {"valid_mask": known}, {"sample_weight": known.float()}):
        across = value_and_grad(
            lambda s, masks=masks: METRICS[name](
                s.T, labels.T, 0.1, **{k: x.T for k, x in masks.items()}
            ),
            logits,
        )
        along = value_and_grad(
            METRICS[name], logits.T.contiguous(), labels.T.contiguous(), 0.1,
            **{k: x.T.contiguous() for k, x in masks.items()},
        )  # fmt: skip
        # Both are right to 1e-6 and 3e-6 of a scale that is a fraction of the largest gradient;
        # torch itself adds up a transposed axis in another order.
        torch.testing.assert_close(across[0], along[0], rtol=2e-6, atol=0.0)
        largest = along[1].abs().max().item()
        torch.testing.assert_close(across[1].T, along[1], rtol=0.0, atol=1e-5 * largest)


# -- 4: other settings of a loss in the same program


def settings() -> dict[str, list]:
    module: dict[str, Any] = {"num_classes": 1, "queue_size": 0, "temperature": 0.3}
    pauc = functools.partial(P.PAUCAtBudgetLoss, **module, quantile_interpolation="linear")
    return {
        "recall quantile": [P.RecallAtQuantileLoss(**module, quantile=q) for q in (0.1, 0.2, 0.35)],
        "pauc beta": [pauc(beta=b) for b in (0.3, 0.5, 0.7)],
        "pauc alpha": [pauc(alpha=a, beta=0.8) for a in (0.0, 0.1, 0.25)],
        "pauc knots": [pauc(beta=0.5, n_knots=n) for n in (2, 3, 5)],
        "pairwise beta": [pauc(beta=b, surrogate="pairwise") for b in (0.3, 0.5, 0.7)],
        "temperature": [P.SmoothAPLoss(**{**module, "temperature": t}) for t in (0.1, 0.3, 0.7)],
        "sigmoid gamma": [P.SigmoidFocalLoss(gamma=k) for k in (0.0, 0.5, 2.0)],
        "sigmoid alpha": [P.SigmoidFocalLoss(alpha=a) for a in (0.1, 0.25, -1)],
        "softmax gamma": [P.SoftmaxFocalLoss(gamma=k) for k in (0.0, 0.5, 2.0)],
        "softmax smoothing": [P.SoftmaxFocalLoss(label_smoothing=e) for e in (0.0, 0.1, 0.2)],
    }


FUNCTIONS = {
    "recall quantile": (
        lambda s, p, x: P.recall_at_quantile(s, p, 0.1, quantile=x), (0.1, 0.2, 0.35),
    ),
    "pauc beta": (lambda s, p, x: P.partial_auc(s, p, 0.1, beta=x), (0.2, 0.4, 0.55)),
    "pairwise beta": (
        lambda s, p, x: P.partial_auc(s, p, 0.1, beta=x, surrogate="pairwise"), (0.2, 0.4, 0.55),
    ),
    "smooth rtol": (lambda s, p, x: P.smooth_ap(s, p, 0.1, rtol=x), (1e-3, 1e-5, 1e-6)),
    "smooth tau": (lambda s, p, x: P.smooth_ap(s, p, x), (0.1, 0.25, 0.4)),
    "focal gamma": (lambda s, p, x: P.sigmoid_focal(s, p.float(), gamma=x), (0.0, 1.5, 2.5)),
    "focal alpha": (lambda s, p, x: P.sigmoid_focal(s, p.float(), alpha=x), (0.1, 0.25, 0.9)),
    "softmax gamma": (
        lambda s, p, x: P.softmax_focal(s[:, None] * s.new_tensor([1.0, -1.0]), p.long(), gamma=x),
        (0.5, 1.5, 2.5),
    ),
}  # fmt: skip
DYNAMIC = pytest.mark.parametrize("dynamic", [None, True], ids=["static", "dynamic"])


def a_batch(module, rows: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    torch.manual_seed(seed)
    logits, targets = torch.randn(rows, 1), (torch.arange(rows) % 3 == 0).long()
    if isinstance(module, P.SigmoidFocalLoss):
        return logits, targets[:, None].float()
    if isinstance(module, P.SoftmaxFocalLoss):
        return torch.cat([logits, -logits], 1), targets
    return logits, targets


@contextlib.contextmanager
def fresh_compiler():
    torch.compiler.reset()
    with torch._dynamo.config.patch(recompile_limit=64):
        yield
    torch.compiler.reset()


def same_number(got: Tensor, want: Tensor) -> None:
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-7)  # float32, another order of sums


@DYNAMIC
@pytest.mark.parametrize("name", list(settings()))
def test_modules_of_other_settings_compile(name, dynamic):
    """One after the other, and all of them in one program.

    The third finds a graph in which the number is a symbol, if it was made one.
    """
    losses = settings()[name]
    with fresh_compiler():
        for loss, rows in zip(losses, (40, 41, 57), strict=True):
            batch = a_batch(loss, rows)
            compiled = torch.compile(loss, fullgraph=True, backend="aot_eager", dynamic=dynamic)
            same_number(compiled(*batch), loss(*batch))
    if dynamic:  # of one program: tests/test_inductor.py
        return
    with fresh_compiler():
        batch = a_batch(losses[0], 40)

        def together(logits, targets):
            return torch.stack([loss(logits, targets) for loss in losses])

        run = torch.compile(together, fullgraph=True, backend="aot_eager", dynamic=dynamic)
        same_number(run(*batch), together(*batch))


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions_of_other_settings_compile(name):
    """With dynamic shapes from the first call on; others in tests/test_threshold_faults.py."""
    fn, values = FUNCTIONS[name]
    with fresh_compiler():
        compiled = torch.compile(fn, fullgraph=True, backend="aot_eager", dynamic=True)
        for value, rows in zip(values, (40, 41, 57), strict=True):
            scores, pos = drawn(rows, rate=0.4)
            leaf, plain = (scores.clone().requires_grad_() for _ in range(2))
            got, want = compiled(leaf, pos, value), fn(plain, pos, value)
            same_number(got, want)
            got.sum().backward()
            want.sum().backward()
            torch.testing.assert_close(leaf.grad, plain.grad, rtol=1e-5, atol=1e-6)


def test_wrappers_of_other_losses_compile():
    losses = [
        P.LossWarmupWrapper(
            warmup_loss=torch.nn.CrossEntropyLoss(),
            main_loss=P.RecallAtQuantileLoss(num_classes=3, queue_size=0, quantile=q),
            warmup_epochs=0, temp_start=start, temp_end=0.1, temp_decay_steps=10,
        )
        for q, start in [(0.1, 0.5), (0.2, 0.4), (0.3, 0.3)]
    ]  # fmt: skip
    torch.manual_seed(0)
    logits, targets = torch.randn(40, 3), torch.arange(40) % 3
    with fresh_compiler():
        for loss in losses:
            loss.on_train_epoch_start(0)
            loss.on_train_batch_start(0)
            compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
            same_number(compiled(logits, targets), loss(logits, targets))


# -- 5: a non-finite score in a list that does not count

BAD = [math.nan, math.inf, -math.inf]


def undefined_masks(name: str, rows: int) -> list[dict]:
    """Arguments that leave a list undefined for a reason that no score is part of."""
    some = torch.arange(rows) % 3 == 0
    every = torch.ones(rows, dtype=torch.bool)
    found: list[dict] = [
        {"pos_mask": ~every},
        {"pos_mask": some, "valid_mask": ~some},
        {"pos_mask": some, "sample_weight": torch.zeros(rows)},
    ]
    if name != "recall":
        found += [{"pos_mask": every}, {"pos_mask": some, "valid_mask": some}]
    if name in ("trapezoid", "pairwise"):
        found.append({"pos_mask": some, "iid_mask": some})
    return found


@every_metric
@every_float
@pytest.mark.parametrize("rows", [9, 1_000, 20_000])
@pytest.mark.parametrize("bad", BAD)
def test_a_list_that_does_not_count_is_0_whatever_its_scores(name, dtype, rows, bad):
    for options in undefined_masks(name, rows):
        for where in (0, 1, rows - 1):
            scores = torch.linspace(-1.0, 1.0, rows, dtype=dtype)
            scores[where] = bad
            options = dict(options)
            pos = options.pop("pos_mask")
            tau = torch.tensor(0.1, requires_grad=True)
            leaf = scores.clone().requires_grad_()
            value = METRICS[name](leaf, pos, tau, **options)
            grads = torch.autograd.grad(value, (leaf, tau), allow_unused=True)
            assert value == 0.0
            for grad in grads:
                assert grad is None or not grad.any()  # NaN is true
            options["pos_mask"] = pos


@every_metric
@pytest.mark.parametrize("bad", BAD)
def test_it_leaves_the_other_lists_alone(name, bad):
    scores, pos = (torch.stack(x) for x in zip(*(drawn(300, k) for k in range(3)), strict=True))
    want = value_and_grad(METRICS[name], scores, pos, 0.1)
    scores[1, 5], pos[1] = bad, False
    value, grad = value_and_grad(METRICS[name], scores, pos, 0.1)
    for k, there in ((0, True), (1, False), (2, True)):
        assert torch.equal(value[k], want[0][k] * there)
        assert torch.equal(grad[k], want[1][k] * there)


@pytest.mark.parametrize("queue_size", [0, 16])
@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize(
    "make", [P.SmoothAPLoss, P.RecallAtQuantileLoss, P.PAUCAtBudgetLoss], ids=lambda m: m.__name__
)
def test_a_class_without_positives_and_its_bad_logit(make, bad, queue_size):
    options: dict[str, Any] = {"queue_size": queue_size, "temperature": 0.3}
    if make is P.RecallAtQuantileLoss:
        options["quantile"] = 0.2
    if make is P.PAUCAtBudgetLoss:
        options |= {"beta": 0.5, "quantile_interpolation": "linear"}
    torch.manual_seed(0)
    logits, targets = torch.randn(40, 3), torch.arange(40) % 2  # nothing of class 2
    both, _ = value_and_grad(make(num_classes=3, **options), logits, targets)
    logits[7, 2] = bad
    said = pytest.warns(UserWarning, match="not stored") if queue_size else nullcontext()
    with said:
        value, grad = value_and_grad(make(num_classes=3, **options), logits, targets)
    assert torch.equal(value, both)
    assert grad.isfinite().all()
    assert not grad[:, 2].any()
    assert grad[:, :2].any()


@pytest.mark.parametrize("name", ["smooth_ap", "recall"])
@pytest.mark.parametrize("bad", BAD)
def test_saturation_of_a_list_without_positives(name, bad):
    fn = P.smooth_ap_saturation if name == "smooth_ap" else P.recall_saturation
    scores = torch.linspace(0.0, 1.0, 50).clone()
    scores[3] = bad
    assert fn(scores, torch.zeros(50, dtype=torch.bool), 0.1) == 0.0


# -- 6: weights that are not read


@every_metric
@every_float
@every_size
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 1e38, -1.0])
def test_weights_of_other_rows_do_not_matter(name, dtype, rows, bad):
    scores, pos = drawn(rows, 1, dtype)
    valid = torch.rand(rows, generator=torch.Generator().manual_seed(2)) < 0.8
    valid[:2] = True
    clean = torch.rand(rows, generator=torch.Generator().manual_seed(3), dtype=dtype)
    for kinds, dropped in {"negatives": ~pos, "masked": ~valid, "both": ~(pos & valid)}.items():
        masks = {} if kinds == "negatives" else {"valid_mask": valid}

        def run(weight: Tensor, masks=masks) -> tuple[Tensor, ...]:
            leaves = scores.clone().requires_grad_(), weight.clone().requires_grad_()
            value = METRICS[name](leaves[0], pos, 0.1, sample_weight=leaves[1], **masks)
            return (value.detach(), *torch.autograd.grad(value, leaves))

        want = run(torch.where(dropped, 0.5, clean))
        got = run(torch.where(dropped, bad, clean).to(dtype))
        for a, b in zip(got, want, strict=True):
            assert torch.equal(a, b), kinds
        assert not got[2][dropped].any()


# -- 7: sharded pairwise pAUC and a NaN


WHERE = ("a negative", "half of the negatives", "a positive", "nowhere")


def _one_of_two(rank: int) -> dict:
    found = {}
    for case, (rows, where) in enumerate(itertools.product((4, 40, 3_000), WHERE)):
        for bad in BAD:
            scores, pos = drawn(2 * rows, case, torch.float64, rate=0.3)
            pos[3] = True  # some in both shards
            pos[-1], pos[-2] = True, False
            chosen = {"a negative": ~pos, "half of the negatives": ~pos, "a positive": pos}.get(
                where
            )
            if chosen is not None:
                there = chosen.nonzero()[:, 0]
                scores[there[: len(there) // 2 if "half" in where else 1]] = bad
            own = slice(rank * rows, rank * rows + rows)
            for name, fn in METRICS.items():
                try:
                    value = fn(scores[own], pos[own], 0.1, group=dist.group.WORLD)
                except Exception as error:  # a result, too
                    value = repr(error)
                found[rows, where, bad, name] = value, fn(scores, pos, 0.1)
    return found


@pytest.fixture(scope="module")
def two_processes() -> list[dict]:
    return processes.run(2, _one_of_two)


@every_metric
def test_a_bad_score_of_a_shard_is_that_of_the_whole_pool(name, two_processes):
    for found in two_processes:
        for (rows, where, bad, metric), (value, want) in found.items():
            if metric != name:
                continue
            assert isinstance(value, Tensor), (rows, where, bad, value)
            assert want.isnan() == (where != "nowhere")
            torch.testing.assert_close(value, want, rtol=1e-10, atol=0.0, equal_nan=True)


# -- 8: rows on the end of a cell


def on_cell_ends(rows: int, tau: float, far: float, outliers: int, centre: float, seed: int):
    """Few rows an ulp below a typical score, outliers that make the axis long.

    The typical score itself belongs to rows that do not take part, so its cell is empty.
    """
    g = torch.Generator().manual_seed(seed)
    at = torch.tensor(centre, dtype=torch.float64)
    below = torch.nextafter(at, at.new_tensor(-torch.inf))
    takes_part = torch.rand(rows, generator=g) < 0.3
    scores = torch.where(takes_part, below, at)
    there = torch.rand(outliers, generator=g, dtype=torch.float64) - (0.0, 0.5, 1.0)[seed % 3]
    scores[:outliers], takes_part[:outliers] = centre + far * there, True
    return scores, takes_part


CELL_ENDS = [  # rows, outliers, how far they are
    (50, 1, 1e4), (50, 2, 1e6), (50, 2, 1e2), (1_000, 1, 1e4), (1_000, 2, 1e6), (1_000, 40, 1e2),
    (1_000, 40, 1e6), (6_000, 1, 1e4),
]  # fmt: skip
CENTRES = [(0.5, 1.0), (0.3, 1.0), (0.5, -3.7), (2.0, 64.0)]  # tau, typical score


@DENSE_OR_GRID
@pytest.mark.parametrize(("rows", "outliers", "far"), CELL_ENDS)
def test_rows_on_the_end_of_a_cell(method, far, outliers, rows):
    if method == "dense" and rows > 1_000:
        pytest.skip("exact pairs of many rows are not what this is about")
    for seed, (tau, centre) in enumerate(CENTRES if rows <= 1_000 else CENTRES[:1]):
        scores, on = on_cell_ends(rows, tau, far, outliers, centre, seed)
        weights = torch.stack([on, on & (torch.arange(rows) % 2 == 0)]).double()
        got = P.sigmoid_sums(scores, weights, on, tau, method=method)
        want = exact.sigmoid_sums(scores, weights, on, tau)
        limit = exact.value_limit(torch.float64, scores, tau)
        assert (np.abs(array(got) - want.value) <= limit * (want.scale + 1e-300)).all()
        ranks = P.soft_ranks(scores, on, tau, valid_mask=on, method=method)
        for a, b in zip(ranks, exact.soft_ranks(scores, on, tau, on), strict=True):
            assert (np.abs(array(a) - b) <= limit * b).all()
        pos = on & (torch.arange(rows) % 3 == 0)
        pos[0] = True
        value, grad = value_and_grad(P.smooth_ap, scores, pos, tau, valid_mask=on)
        exact.assert_precision(
            value, grad, exact.smooth_ap(scores, pos, tau, on), torch.where(on, scores, 0.0), tau
        )


@DENSE_OR_GRID
@every_float
@pytest.mark.parametrize("rows", [2, 3, 5, 9_001])
@pytest.mark.parametrize("tau", [0.25, 0.5, 1.0, 0.3])
def test_two_neighbouring_floats_rank_as_ties(method, dtype, rows, tau):
    """An ulp of difference is (at most) 2^-23 / tau of a step: ranks are (rows + 1) / 2."""
    for centre in (1.0, -1.0, 0.1, 1024.0):
        scores = torch.full((rows,), centre, dtype=dtype)
        scores[::3] = torch.nextafter(scores[0], scores.new_tensor(-torch.inf))
        every = torch.ones(rows, dtype=torch.bool)
        found = P.soft_ranks(scores, every, tau, method=method)
        ulp = 2.0 ** (-23 if dtype == torch.float32 else -52) * abs(centre)
        # a term moves by at most ulp / (4 tau) times 1/2 of itself; plus the promise
        limit = ulp / tau + exact.value_limit(dtype, scores, tau)
        for ranks in found:
            assert (np.abs(array(ranks) - (rows + 1) / 2) <= limit * (rows + 1) / 2).all()


# -- 9: autocast


def under_autocast(fn, backward_too: bool, *leaves: Tensor) -> list[Tensor]:
    leaves = tuple(x.detach().clone().requires_grad_() for x in leaves)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = fn(*leaves)
        if backward_too:
            grads = torch.autograd.grad(out.sum(), leaves, allow_unused=True)
    if not backward_too:
        grads = torch.autograd.grad(out.sum(), leaves, allow_unused=True)
    return [out.detach(), *grads]


AUTOCAST = {
    "soft_ranks": lambda s, w, t, pos: torch.stack(P.soft_ranks(s, pos, t)),
    "soft_ranks grid": lambda s, w, t, pos: torch.stack(P.soft_ranks(s, pos, t, method="grid")),
    "sigmoid_sums": lambda s, w, t, pos: P.sigmoid_sums(s, w[None], pos, t),
    "sigmoid_sums grid": lambda s, w, t, pos: P.sigmoid_sums(s, w[None], pos, t, method="grid"),
    **{
        name: lambda s, w, t, pos, fn=fn: fn(s, pos, t, sample_weight=w)
        for name, fn in METRICS.items()
    },
    "smooth_ap_loss": lambda s, w, t, pos: P.smooth_ap_loss(
        s[:, None], pos.long(), None, t, sample_weight=w
    )[0],
    "sigmoid_focal": lambda s, w, t, pos: P.sigmoid_focal(s, pos.float(), gamma=t),
    "softmax_focal": lambda s, w, t, pos: P.softmax_focal(
        torch.stack([s, -s], 1), pos.long(), gamma=t
    ),
}


@pytest.mark.parametrize("backward_too", [False, True], ids=["forward", "both"])
@pytest.mark.parametrize("rows", [300, 4_000])
@pytest.mark.parametrize("name", AUTOCAST)
def test_autocast_changes_no_number(name, rows, backward_too):
    scores, pos = drawn(rows, 4)
    weight = torch.rand(rows, generator=torch.Generator().manual_seed(5)) + 0.5
    fn = functools.partial(AUTOCAST[name], pos=pos)
    leaves = scores, weight, torch.tensor(0.1)
    plain = [x.clone().requires_grad_() for x in leaves]
    out = fn(*plain)
    want = [out.detach(), *torch.autograd.grad(out.sum(), plain, allow_unused=True)]
    for a, b in zip(under_autocast(fn, backward_too, *leaves), want, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            assert a.dtype == torch.float32
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6 * b.abs().max().item())


def test_second_derivatives_under_autocast():
    scores, pos = drawn(60, 4, rate=0.4)

    def hessian(s: Tensor) -> Tensor:
        return torch.func.jacrev(torch.func.grad(lambda x: P.smooth_ap(x, pos, 0.3)))(s)

    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = hessian(scores)
    want = hessian(scores.double())
    torch.testing.assert_close(got.double(), want, rtol=0.0, atol=1e-5 * want.abs().max().item())


# -- 10: the edge of a band


def rank_is_clear(n: int, beta: float) -> bool:
    """Far enough from a whole number for every order of float64 operations, not for float32."""
    rank = (1 - beta) * (n - 1)
    return abs(rank - round(rank)) > 1e-6


EDGES = [
    (n, beta)
    for n, beta in [
        (10_000, 1e-4), (8_192, 1e-4), (9_000, 2e-4), (20_000, 1e-4), (50_000, 2e-5),
        (70_000, 5e-5), (200_000, 0.005), (100_001, 1e-5), (120_000, 0.001),
    ]
    if rank_is_clear(n, beta)
]  # fmt: skip


@pytest.mark.parametrize(("negatives", "beta"), EDGES)
@pytest.mark.parametrize("interpolation", ["higher", "lower", "nearest"])
def test_the_band_holds_the_negatives_that_it_should(negatives, beta, interpolation):
    """One positive right under the band's last negative: 0, and 1 / size for one more."""
    scores = torch.arange(float(negatives))
    rank = (1.0 - beta) * (negatives - 1)
    low = {"higher": math.ceil, "lower": math.floor, "nearest": round}[interpolation](rank)
    size = negatives - low
    order = torch.randperm(negatives + 1, generator=torch.Generator().manual_seed(0))
    for dtype in FLOATS:
        for under, want in ((low - 0.5, 0.0), (low + 0.5, 1.0 / size)):
            row = torch.cat([scores, torch.tensor([under])]).to(dtype)[order]
            pos = (torch.arange(negatives + 1) == negatives)[order]
            value = P.partial_auc(
                row, pos, 1e-7, beta=beta, surrogate="pairwise", interpolation=interpolation
            )
            assert value.item() == pytest.approx(want, abs=1e-6), (dtype, under)


@pytest.mark.parametrize(("negatives", "beta"), [e for e in EDGES if e[0] <= 20_000])
@pytest.mark.parametrize("basis", ["fpr", "population"])
@pytest.mark.parametrize("iid", [False, True])
def test_the_module_counts_the_band(negatives, beta, basis, iid):
    g = torch.Generator().manual_seed(1)
    extra = 500 if iid else 0
    logits = torch.randn(negatives + 7 + extra, 1, generator=g)
    targets = torch.zeros(len(logits), dtype=torch.long)
    if basis == "fpr":  # the population of the reference is what the case is about
        targets[:7] = 1
    else:
        targets[:7], targets[7:14] = 1, 0
    mask = torch.arange(len(logits)) < negatives + 7
    reference = logits[:, 0][mask & (targets == 0) if basis == "fpr" else mask]
    rank = math.ceil((1.0 - beta) * (len(reference) - 1))
    if not rank_is_clear(len(reference), beta):
        pytest.skip("an edge that float64 itself may round")
    edge = reference.sort().values[rank]
    want = int(((logits[:, 0] >= edge) & (targets == 0) & mask).sum())
    loss = P.PAUCAtBudgetLoss(
        num_classes=1, queue_size=0, beta=beta, surrogate="pairwise", budget_basis=basis
    )
    given = {"iid_mask": mask} if iid else {}
    _, stats = loss(logits, targets, return_diagnostics=True, **given)
    if want:
        assert stats["band_neg_count"].item() == want
        assert stats["t_beta"].item() == edge


# -- 11: ties, float32, exact pairs

TIES = [(4_096, 20), (2_000, 3), (400, 399), (1_000, 999), (3_000, 1_500), (20_000, 40), (777, 1)]


@pytest.mark.parametrize(("rows", "positives"), TIES)
@pytest.mark.parametrize("gap", [0.0, -0.005, 0.005, 0.3])
@pytest.mark.parametrize("tau", [0.05, 0.01])
def test_ties_keep_the_promise(rows, positives, gap, tau):
    for centre in (0.0, 0.7):
        scores = torch.full((rows,), centre)
        scores[:positives] += gap
        order = torch.randperm(rows, generator=torch.Generator().manual_seed(0))
        scores, pos = scores[order], (torch.arange(rows) < positives)[order]
        value, grad = value_and_grad(P.smooth_ap, scores, pos, tau)
        exact.assert_precision(value, grad, exact.smooth_ap(scores, pos, tau), scores, tau)


@DENSE_OR_GRID
@pytest.mark.parametrize("rows", [400, 4_096])
@pytest.mark.parametrize("levels", [1, 2, 5])
def test_tied_ranks_keep_the_promise(method, rows, levels):
    for seed in range(3):
        g = torch.Generator().manual_seed(seed)
        scores = torch.randint(0, levels, (rows,), generator=g) * 0.013 + 0.7
        pos = torch.rand(rows, generator=g) < (0.01, 0.3, 0.99)[seed]
        pos[0] = True
        found = P.soft_ranks(scores, pos, 0.05, method=method)
        limit = exact.value_limit(torch.float32, scores, 0.05)
        for a, b in zip(found, exact.soft_ranks(scores, pos, 0.05), strict=True):
            assert (np.abs(array(a) - b) <= limit * b).all()


# -- 12: the gradient of tau


def wide(rows: int, top: float, seed: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    narrow = 1e-3 * torch.randn(rows // 2, generator=g)
    scores = torch.cat([narrow, top * torch.rand(rows - rows // 2, generator=g)])
    pos = torch.rand(rows, generator=g) < 0.1
    pos[0], pos[1] = True, False
    return scores.to(dtype), pos


@every_float
@pytest.mark.parametrize("rows", [1_000, 4_000, 20_000])
@pytest.mark.parametrize("top", [1.0, 1e4, 1e6])
def test_the_gradient_of_tau_of_a_wide_list(dtype, rows, top):
    """Within 3 limits of the sum of its absolute terms, as every term is right to its own size."""
    for seed, tau in enumerate([0.0133, 0.002]):
        scores, pos = wide(rows, top, seed, dtype)
        leaf = torch.tensor(tau, dtype=torch.float64, requires_grad=True)
        (got,) = torch.autograd.grad(P.smooth_ap(scores, pos, leaf), leaf)
        want = exact.smooth_ap(scores, pos, tau)
        limit = 3.0 * exact.value_limit(dtype, scores, tau) * want.tau_natural
        assert abs(got.item() - want.tau_grad) <= limit, (
            got.item(), want.tau_grad, (got.item() - want.tau_grad) / want.tau_natural,
        )  # fmt: skip


def test_the_gradients_of_taus_per_list():
    pool = [wide(2_000, top, 5, torch.float32) for top in (1.0, 1e4, 1e6)]
    scores, pos = (torch.stack(x) for x in zip(*pool, strict=True))
    tau = torch.tensor([0.01, 0.02, 0.0133], requires_grad=True)
    (got,) = torch.autograd.grad(P.smooth_ap(scores, pos, tau).sum(), tau)
    for k in range(3):
        want = exact.smooth_ap(scores[k], pos[k], float(tau[k].detach()))
        assert abs(got[k].item() - want.tau_grad) <= 3.1e-6 * want.tau_natural + 2e-7 * abs(
            want.tau_grad
        )


@DENSE_OR_GRID
@pytest.mark.parametrize("rows", [1_000, 4_000])
def test_the_gradient_of_tau_through_soft_ranks(method, rows):
    """d/dtau of sum_i c_i R_i, every pair's term to 3 rtol of itself."""
    scores, pos = wide(rows, 1e4, 7, torch.float32)
    c = torch.randn(rows, generator=torch.Generator().manual_seed(8))
    leaf = torch.tensor(0.0133, dtype=torch.float64, requires_grad=True)
    out = P.soft_ranks(scores, pos, leaf, method=method).all
    (got,) = torch.autograd.grad((out * c).sum(), leaf)
    want = natural = 0.0
    for i, z, _, slope in exact.blocks(array(scores), np.flatnonzero(pos.numpy()), 0.0133):
        terms = array(c)[i, None] * np.where(slope > 0, slope * z, 0.0) / -0.0133
        want, natural = want + terms.sum(), natural + np.abs(terms).sum()
    assert abs(got.item() - want) <= 3.3e-6 * natural, (got.item(), want, natural)


# -- 13: saturation with a tau that requires grad


def saturated(scores: Tensor, pos: Tensor, tau: float) -> float:
    s, p = array(scores), array(pos, bool)
    gone = 0
    for _, _, _, slope in exact.blocks(s, np.flatnonzero(p), tau):
        gone += int((slope.sum(-1) - 0.25 < 1e-4 / 4).sum())
    return gone / max(int(p.sum()), 1)


@every_float
@pytest.mark.parametrize("rows", [1_000, 3_000, 20_000])
@pytest.mark.parametrize("kind", ["normal", "heavy", "clumps"])
def test_saturation_while_tau_requires_grad(dtype, rows, kind):
    g = torch.Generator().manual_seed(11)
    scores, pos = drawn(rows, 11, dtype)
    if kind == "heavy":
        scores = scores / torch.rand(rows, generator=g).to(dtype) ** 2
    if kind == "clumps":
        scores = scores * 0.01 + 1e3 * torch.randint(0, 500, (rows,), generator=g)
    tau = torch.tensor(0.1, requires_grad=True)
    found = P.smooth_ap_saturation(scores.clone().requires_grad_(), pos, tau)
    assert not found.requires_grad
    # a rank whose slope is at the limit may fall on either side
    assert found.item() == pytest.approx(saturated(scores, pos, 0.1), abs=2.0 / int(pos.sum()))
    recall = P.recall_saturation(scores, pos, tau, quantile=0.2)
    assert not recall.requires_grad
    assert 0.0 <= recall <= 1.0
    both = P.smooth_ap_saturation(
        scores.expand(2, -1), pos, torch.tensor([0.1, 0.1], requires_grad=True)
    )
    assert (both == found).all()


def test_saturation_inside_a_gradient():
    scores, pos = drawn(3_000, 12)
    scores = scores / torch.rand(3_000) ** 2

    def loss(tau: Tensor) -> tuple[Tensor, Tensor]:
        return P.smooth_ap(scores, pos, tau), P.smooth_ap_saturation(scores, pos, tau)

    grad, share = torch.func.grad(loss, has_aux=True)(torch.tensor(0.1))
    assert grad.isfinite()
    assert share == P.smooth_ap_saturation(scores, pos, 0.1)


# -- 14: scale of scores and weights, tau out of range, broadcasting


@pytest.mark.parametrize("surrogate", ["trapezoid", "pairwise"])
@pytest.mark.parametrize("tau_scale", ["iqr", "band"])
@every_float
@pytest.mark.parametrize("rows", [100, 1_000, 20_000])
def test_partial_auc_does_not_see_the_scale(surrogate, tau_scale, dtype, rows):
    scores, pos = drawn(rows, 13, dtype)
    options = {"beta": 0.3, "surrogate": surrogate, "tau_scale": tau_scale}
    fn = functools.partial(P.partial_auc, **options)
    value, grad = value_and_grad(fn, scores, pos, 0.1)
    assert 0.01 < value < 1.0
    for power in (-100, -60, -43, -20, 20, 60, 100):  # by powers of two: no digit changes
        scaled, slope = value_and_grad(fn, scores * 2.0**power, pos, 0.1)
        torch.testing.assert_close(scaled, value, rtol=2e-6, atol=0.0)
        torch.testing.assert_close(
            slope * 2.0**power, grad, rtol=1e-5, atol=1e-5 * grad.abs().max().item()
        )
        assert P.partial_auc_defined(scores * 2.0**power, pos, **options)
    tiny, _ = value_and_grad(fn, scores * 1e-13, pos, 0.1)
    torch.testing.assert_close(tiny, value, rtol=1e-4, atol=0.0)


@every_metric
@every_float
@every_size
def test_the_scale_of_weights_does_not_matter(name, dtype, rows):
    scores, pos = drawn(rows, 14, dtype)
    weight = torch.rand(rows, generator=torch.Generator().manual_seed(15)) + 0.5
    want = METRICS[name](scores, pos, 0.1, sample_weight=weight)
    assert want.abs() > 0.01
    huge = [weight * 3e37, weight.double() * 3e37, weight.double() * 1e300]
    tiny = [weight * 1e-30, weight.double() * 1e-60, weight.double() * 1e-300]
    for given in (*huge, *tiny):
        value, grad = value_and_grad(
            lambda s, given=given: METRICS[name](s, pos, 0.1, sample_weight=given), scores
        )
        torch.testing.assert_close(value, want, rtol=1e-5, atol=0.0)
        assert grad.isfinite().all()


@every_metric
@every_float
@every_size
@pytest.mark.parametrize("scale", [1e-30, 1e-45, 1e-60, 1e-300, 3e37, 1e300])
def test_defined_and_value_agree_on_weights(name, dtype, rows, scale):
    scores, pos = drawn(rows, 16, dtype)
    weight = torch.full((rows,), scale, dtype=torch.float64)
    value = METRICS[name](scores, pos, 0.1, sample_weight=weight)
    if name == "smooth_ap":
        defined = P.smooth_ap_defined(pos, None, weight)
    elif name == "recall":
        defined = P.recall_defined(pos, None, weight)
    else:
        surrogate = "pairwise" if name == "pairwise" else "trapezoid"
        defined = P.partial_auc_defined(
            scores, pos, beta=0.3, surrogate=surrogate, sample_weight=weight
        )
    assert value.isfinite()
    want = METRICS[name](scores, pos, 0.1) if defined else torch.zeros_like(value)
    torch.testing.assert_close(value, want, rtol=1e-5, atol=0.0)


def outcome(call) -> str:
    try:
        value = call()
    except ValueError as error:
        return "ValueError" if "tau" in str(error) else repr(error)
    return "NaN" if value.isnan().all() else f"a number {value.flatten()[:3]}"


TAKE_TAU = {
    **METRICS,
    "soft_ranks": lambda s, p, t: P.soft_ranks(s, p, t).all[p],
    "soft_ranks dense": lambda s, p, t: P.soft_ranks(s, p, t, method="dense").all[p],
    "soft_ranks grid": lambda s, p, t: P.soft_ranks(s, p, t, method="grid").all[p],
}


@pytest.mark.parametrize("name", TAKE_TAU)
@pytest.mark.parametrize("bad", [0.0, -0.0, -0.1, math.nan, -math.inf])
def test_a_tau_tensor_out_of_range_is_one_outcome_at_every_size(name, bad):
    found = set()
    for rows in (7, *SIZES):
        for dtype in FLOATS:
            scores, pos = drawn(rows, 17, dtype)
            for tau in (torch.tensor(bad), torch.tensor(bad, dtype=torch.float64)):
                found.add(outcome(lambda s=scores, p=pos, t=tau: TAKE_TAU[name](s, p, t)))
    assert found in ({"ValueError"}, {"NaN"})


@pytest.mark.parametrize("name", METRICS)
@pytest.mark.parametrize("axis", ["sample_weight", "valid_mask", "pos_mask", "scores"])
@pytest.mark.parametrize("rows", [50, 20_000])
def test_one_argument_alone_has_the_axis_of_tau(name, axis, rows):
    scores, pos = drawn(rows, 18, torch.float64, rate=0.3)
    given = {"scores": scores, "pos_mask": pos, "sample_weight": torch.ones(rows).double(),
             "valid_mask": torch.ones(rows, dtype=torch.bool)}  # fmt: skip
    g = torch.Generator().manual_seed(19)
    given[axis] = {
        "scores": scores + 0.1 * torch.randn(3, rows, generator=g, dtype=torch.float64),
        "pos_mask": pos & (torch.rand(3, rows, generator=g) < 0.9),
        "sample_weight": torch.rand(3, rows, generator=g, dtype=torch.float64),
        "valid_mask": torch.rand(3, rows, generator=g) < 0.9,
    }[axis]
    tau = torch.tensor([0.1, 0.2, 0.4], dtype=torch.float64, requires_grad=True)

    def call(args: dict, t: Tensor) -> Tensor:
        masks = {k: args[k] for k in ("sample_weight", "valid_mask")}
        return METRICS[name](args["scores"], args["pos_mask"], t, **masks)

    value = call(given, tau)
    assert value.shape == (3,)
    (grad,) = torch.autograd.grad(value.sum(), tau)
    for k in range(3):
        one = tau[k].detach().clone().requires_grad_()
        want = call({**given, axis: given[axis][k]}, one)
        torch.testing.assert_close(value[k], want, rtol=1e-11, atol=0.0)
        (slope,) = torch.autograd.grad(want, one)
        torch.testing.assert_close(grad[k], slope, rtol=1e-8, atol=1e-11)


# -- in modules the weight gets no gradient; the functions keep theirs


@pytest.mark.parametrize("queue_size", [0, 16])
@pytest.mark.parametrize(
    "make", [P.SmoothAPLoss, P.RecallAtQuantileLoss, P.PAUCAtBudgetLoss], ids=lambda m: m.__name__
)
def test_modules_give_the_weight_no_gradient(make, queue_size):
    options = {"beta": 0.5} if make is P.PAUCAtBudgetLoss else {}
    torch.manual_seed(0)
    loss = make(num_classes=1, queue_size=queue_size, temperature=0.3, **options)
    for _ in range(2):
        logits = torch.randn(40, 1, requires_grad=True)
        weight = torch.rand(40, requires_grad=True)
        loss(logits, (torch.arange(40) % 3 == 0).long(), sample_weight=weight).backward()
        assert logits.grad.any()
        assert weight.grad is None


@every_metric
@every_size
def test_functions_give_the_weight_its_gradient(name, rows):
    """Of a weighted mean: (value of a row - mean) / total, so it is orthogonal to the weights."""
    scores, pos = drawn(rows, 20, torch.float64)
    weight = torch.rand(rows, dtype=torch.float64, generator=torch.Generator().manual_seed(21))
    weight.requires_grad_()
    value = METRICS[name](scores, pos, 0.1, sample_weight=weight)
    (grad,) = torch.autograd.grad(value, weight)
    assert grad[pos].any()
    assert not grad[~pos].any()
    assert abs(float((grad * weight.detach()).sum())) <= 1e-11
    if name == "smooth_ap":
        want = exact.smooth_ap(scores, pos, 0.1, weight=weight).weight_grad
        assert np.abs(array(grad) - want).max() <= 1e-11 * np.abs(want).max()
