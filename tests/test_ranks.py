"""The rank primitive: values, derivatives, tiles, memory, errors."""

from __future__ import annotations

import threading
import time

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import proxy_losses as P
from proxy_losses._ranks import dense

from . import reference
from .metrics import lists

# A few thousand float64 terms per sum.
TIGHT = {"rtol": 1e-11, "atol": 1e-13}


def reference_sums(scores, weights, at, tau):
    """[L, G, M], one pair at a time."""
    out = torch.zeros(weights.shape, dtype=torch.float64)
    for k in range(scores.shape[0]):
        for g in range(weights.shape[1]):
            for i in at[k].nonzero()[:, 0].tolist():
                out[k, g, i] = sum(
                    float(weights[k, g, j])
                    * reference.sigmoid(float(scores[k, j] - scores[k, i]) / tau)
                    for j in range(scores.shape[1])
                )
    return out


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**16),
    m=st.integers(1, 25),
    groups=st.integers(1, 3),
    tau=st.floats(1e-3, 10),
    rate=st.floats(0, 1),
)
def test_sums_are_the_formula(seed, m, groups, tau, rate):
    g = torch.Generator().manual_seed(seed)
    scores = torch.randn(3, m, generator=g, dtype=torch.float64)
    weights = torch.randn(3, groups, m, generator=g, dtype=torch.float64)
    weights[torch.rand(weights.shape, generator=g) < 0.5] = 0.0
    at = torch.rand(3, m, generator=g) < rate
    torch.testing.assert_close(
        P.sigmoid_sums(scores, weights, at, tau),
        reference_sums(scores, weights, at, tau),
        rtol=1e-12,
        atol=1e-13,
    )


def plain_sums(scores, weights, at, tau):
    """All pairs in differentiable torch."""
    k = torch.sigmoid((scores[:, None, :] - scores[:, :, None]) / tau)
    return torch.where(at[:, None, :], weights @ k.mT, 0.0)


# Shapes on both sides of every tile boundary: rows of one list alone or mixed, by target or by
# source, one column block or several.
@pytest.mark.parametrize("num_lists", [1, 3])
@pytest.mark.parametrize("m", [50, 700, dense._COLUMNS + 1])
@pytest.mark.parametrize("rate", [0.002, 0.05, 0.9])
def test_tiles_join_seamlessly(num_lists, m, rate):
    if num_lists * m * m * rate > 2e7:
        num_lists, m = 1, m // 2  # keep the reference small
    g = torch.Generator().manual_seed(m)
    scores = torch.randn(num_lists, m, generator=g, dtype=torch.float64)
    at = torch.rand(num_lists, m, generator=g) < rate * torch.linspace(0.1, 2, num_lists)[:, None]
    weights = (torch.rand(num_lists, 2, m, generator=g, dtype=torch.float64) - 0.3).clamp(min=0)
    args = [scores.clone().requires_grad_(), weights.clone().requires_grad_()]
    plain = [scores.clone().requires_grad_(), weights.clone().requires_grad_()]
    ours = P.sigmoid_sums(*args, at, 0.2, method="dense")
    theirs = plain_sums(*plain, at, 0.2)
    torch.testing.assert_close(ours, theirs, **TIGHT)
    c = torch.randn(ours.shape, generator=g, dtype=torch.float64)
    (ours * c).sum().backward()
    (theirs * c).sum().backward()
    for a, b in zip(args, plain, strict=True):
        torch.testing.assert_close(a.grad, b.grad, **TIGHT)


def test_ranks_count_from_one():
    scores = torch.tensor([5.0, 1.0, 3.0, 2.0], dtype=torch.float64)
    pos = torch.tensor([False, True, True, False])
    valid = torch.tensor([True, True, True, False])
    ranks = P.soft_ranks(scores, pos, 1e-3, valid_mask=valid)
    assert ranks.all.tolist() == [0, 3, 2, 0]
    assert ranks.pos.tolist() == [0, 2, 1, 0]


def test_ties_share_a_rank():
    ranks = P.soft_ranks(torch.zeros(5), torch.ones(5, dtype=torch.bool), 0.01)
    assert ranks.all.tolist() == [3.0] * 5  # the mean of 1 .. 5


def test_float32_subtracts_before_it_scales():
    scores, pos = lists(0, 200)
    far = (scores + 1e4).float()  # the offset itself rounds scores to about 1e-3
    exact = P.smooth_ap(far.double(), pos, 0.05)
    # Differences of float32 are exact here; what remains is float32 summation.
    assert P.smooth_ap(far, pos, 0.05).item() == pytest.approx(exact.item(), rel=1e-6)


def test_slope_survives_saturation():
    """sigma - sigma^2 is 0 in float32 here; the true slope exp(-30) is not."""
    scores = torch.tensor([30.0, 0.0], requires_grad=True)
    P.smooth_ap(scores, torch.tensor([True, False]), 1.0).backward()
    assert scores.grad[0].item() == pytest.approx(9.357622968840175e-14, rel=1e-5)


def test_gradcheck_in_scores_weights_and_tau():
    scores, at = lists(1, 2, 8)
    inputs = (
        scores.requires_grad_(),
        torch.randn(2, 2, 8, dtype=torch.float64, requires_grad=True),
        torch.tensor([0.3, 0.7], dtype=torch.float64, requires_grad=True),
    )

    def f(s, w, t):
        return P.sigmoid_sums(s, w, at, t)

    assert torch.autograd.gradcheck(f, inputs)
    assert torch.autograd.gradgradcheck(f, inputs)


def test_second_order_compiles():
    from torch.func import grad

    from .compiling import compile_fresh

    scores, pos = lists(2, 12)

    def penalty(s):
        return (grad(lambda x: P.smooth_ap(x, pos, 0.3))(s) ** 2).sum()

    compiled, _ = compile_fresh(grad(penalty))
    torch.testing.assert_close(compiled(scores), grad(penalty)(scores), rtol=1e-10, atol=1e-14)


def test_opcheck():
    scores, at = lists(3, 2, 10)
    weights = torch.rand(2, 2, 10, dtype=torch.float64)
    tau = torch.full((2,), 0.3, dtype=torch.float64)
    how = (1e-12, "auto")
    ops = torch.ops.proxy_losses
    torch.library.opcheck(ops.pair_sums, (scores, weights, at[:, None], tau, "value,slope", *how))
    weight = at.to(scores.dtype)
    for valid in (None, torch.ones_like(at)):
        args = (scores, at, valid, weight, tau, True, "precision", *how)
        torch.library.opcheck(ops.rank_mean, args)


def test_same_bits_twice():
    scores, pos = lists(4, 2000, dtype=torch.float32)
    grads = []
    for _ in range(2):
        s = scores.clone().requires_grad_()
        P.smooth_ap(s, pos, 0.05).backward()
        grads.append(s.grad)
    assert torch.equal(*grads)


def test_no_buffer_of_pairs():
    """2 * 10^7 pairs take 80 MB a copy; the peak stays at a few copies of the pool."""
    m, positives = 100_000, 200
    scores = torch.randn(m, requires_grad=True)
    pos = torch.arange(m) < positives
    peak = 0
    done = threading.Event()

    def resident() -> int:
        with open("/proc/self/statm") as f:
            return int(f.read().split()[1]) * 4096

    def watch() -> None:
        nonlocal peak
        while not done.is_set():
            peak = max(peak, resident())
            time.sleep(0.001)

    start = resident()
    watcher = threading.Thread(target=watch)
    watcher.start()
    P.smooth_ap(scores, pos, 0.05).backward()
    done.set()
    watcher.join()
    assert scores.grad.isfinite().all()
    assert peak - start < 0.5 * m * positives * 4


@pytest.mark.parametrize(
    ("kwargs", "error", "says"),
    [
        ({"scores": torch.ones(4, dtype=torch.int64)}, TypeError, "scores must be a floating"),
        ({"at": torch.ones(4)}, TypeError, "at must be a bool tensor"),
        ({"weights": torch.ones(4)}, ValueError, r"weights \[..., G, M\]"),
        ({"weights": torch.ones(2, 5)}, ValueError, "share their last axis"),
        ({"at": torch.ones(3, dtype=torch.bool)}, ValueError, "share their last axis"),
        ({"weights": [1.0]}, TypeError, "weights must be a real tensor, got list"),
        ({"at": torch.tensor(True)}, ValueError, "share their last axis"),
        ({"scores": torch.randn(2, 4), "at": torch.ones(3, 4).bool()}, ValueError, "leading axes"),
        ({"scores": torch.randn(2, 4), "weights": torch.ones(3, 1, 4)}, ValueError, "leading axes"),
        ({"rtol": 0.0}, ValueError, "rtol must be None or in"),
        ({"rtol": "0.1"}, TypeError, "rtol must be a number, got str"),
        ({"tau": -1.0}, ValueError, "tau must be positive"),
        ({"tau": torch.ones(2)}, ValueError, "one value per list"),
    ],
)
def test_bad_arguments(kwargs, error, says):
    args = {
        "scores": torch.randn(4),
        "weights": torch.ones(2, 4),
        "at": torch.ones(4, dtype=torch.bool),
        "tau": 0.1,
    } | kwargs
    with pytest.raises(error, match=says):
        P.sigmoid_sums(
            args["scores"], args["weights"], args["at"], args["tau"], rtol=args.get("rtol")
        )


@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        ({"scores": torch.tensor(1.0)}, ValueError, "scores must have at least one axis"),
        ({"pos_mask": torch.ones(4)}, TypeError, "pos_mask must be a bool tensor"),
        ({"pos_mask": torch.ones(3).bool()}, ValueError, r"pos_mask must .*\[..., 4\], got \[3\]"),
        ({"valid_mask": torch.ones(4)}, TypeError, "valid_mask must be a bool tensor"),
        ({"valid_mask": torch.ones(3).bool()}, ValueError, "valid_mask must have"),
    ],
)
def test_bad_arguments_of_ranks(change, error, says):
    args = {"scores": torch.randn(4), "pos_mask": torch.ones(4).bool(), "tau": 0.1} | change
    with pytest.raises(error, match=says):
        P.soft_ranks(**args)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_ranks_of_half_precision_are_those_of_full(dtype):
    """In 16 bits a rank above 2048 is none, and one above 65504 infinite."""
    rows = 70_000
    scores = torch.zeros(rows, dtype=dtype, requires_grad=True)
    ranks = P.soft_ranks(scores, torch.arange(rows) == 3, 1.0)
    assert ranks.all.dtype == torch.float32
    assert ranks.all[3].item() == pytest.approx(0.5 * (rows + 1), rel=1e-4)
    ranks.all.sum().backward()
    assert scores.grad.dtype == dtype
    assert scores.grad[0].item() == 0.25
