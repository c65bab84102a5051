"""Mean precision with its gradient, by the grid, against float64 brute force."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from proxy_losses._ranks import PRECISION, How, Lists, rank_mean

from .test_grid import SHAPES, draw


def brute(
    scores: Tensor, pos: Tensor, valid: Tensor, weight: Tensor, tau: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Value [L], gradient [L, M] and |a|_2 [L]; 0 for lists that do not count."""
    value, norm = torch.zeros(len(tau)).double(), torch.zeros(len(tau)).double()
    gradient = torch.zeros_like(scores, dtype=torch.float64)
    for k in range(len(tau)):
        total = float(weight[k].double().sum())
        if total == 0 or not (valid[k] & ~pos[k]).any():
            continue
        among, rows = pos[k].double(), valid[k].double()
        index = pos[k].nonzero()[:, 0]
        s = torch.where(valid[k], scores[k].double(), 0.0)
        up = (s - s[index, None]).div_(tau[k]).sigmoid_()
        slope = (s[index, None] - s).div_(tau[k]).sigmoid_().mul_(up)
        ranks, hits = up @ rows + 0.5, up @ among + 0.5
        share = weight[k, index].double() / total
        value[k] = (share * hits / ranks).sum()
        a = share / ranks
        b = -a * hits / ranks
        norm[k] = a.norm()
        gradient[k] = ((b @ slope) * rows + (a @ slope) * among) / tau[k]
        gradient[k, index] -= (b * (slope @ rows) + a * (slope @ among)) / tau[k]
    return value, gradient, norm


def measured(
    scores: Tensor,
    pos: Tensor,
    valid: Tensor | None,
    weight: Tensor | None,
    tau: Tensor,
    rtol: float,
    method: str = "grid",
) -> tuple[Tensor, Tensor]:
    x = scores.clone().requires_grad_()
    lists = Lists(x, pos, valid, weight)
    value, _ = rank_mean(lists, tau, PRECISION, How(rtol, method))
    (gradient,) = torch.autograd.grad(value.sum(), x)
    return value.detach().double(), gradient.double()


def errors(
    found: tuple[Tensor, Tensor], wanted: tuple[Tensor, Tensor, Tensor], tau: Tensor
) -> tuple[float, float]:
    """Largest error of the values, relative, and of the gradients, in their natural scale."""
    value, gradient, norm = wanted
    natural = torch.maximum(gradient.norm(dim=1), norm / (4.0 * tau)) + 1e-300
    off = (found[0] - value).abs() / (value + 1e-300)
    return float(off.max()), float(((found[1] - gradient).norm(dim=1) / natural).max())


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("seed", range(16))
def test_grid_is_within_its_tolerance(shape: str, seed: int) -> None:
    g = torch.Generator().manual_seed(7_000 + 100 * SHAPES.index(shape) + seed)

    def uniform() -> float:
        return float(torch.rand((), generator=g))

    for _ in range(9):
        rows = int(math.exp(uniform() * math.log(3000.0)))
        lists = 1 if rows > 400 or uniform() < 0.5 else 3
        tau = 10.0 ** (uniform() * 4.2 - 3.0)
        rtol = [1e-4, 1e-6, 1e-8, 1e-12][int(uniform() * 4)]
        dtype = torch.float32 if rtol >= 1e-6 and uniform() < 0.7 else torch.float64
        scores = draw(shape, lists, rows, tau, g).to(dtype)
        rate = [uniform() ** 3, uniform() ** 3, 0.0, 1.0][min(int(uniform() * 20), 3)]
        pos = torch.rand(lists, rows, generator=g) < rate
        if uniform() < 0.3:
            pos[:, int(uniform() * rows)] = True
        valid = torch.rand(lists, rows, generator=g) < 0.8 if uniform() < 0.3 else None
        if valid is not None:
            pos &= valid
        weight = None
        if uniform() < 0.3:
            weight = (torch.rand(lists, rows, generator=g) * 2.0 - 0.2).clamp(min=0.0)
            weight = weight.to(dtype) * pos
        taus = tau * (1.0 + torch.rand(lists, generator=g, dtype=torch.float64))
        everyone = torch.ones_like(pos) if valid is None else valid
        even = pos.to(dtype) if weight is None else weight
        wanted = brute(scores, pos, everyone, even, taus)
        found = measured(scores, pos, valid, weight, taus, rtol)
        value, gradient = errors(found, wanted, taus)
        # output rounding, and the rounding of one coordinate, all that float64 scores permit
        limit = max(rtol, 4e-7 if dtype == torch.float32 else 1e-15)
        if dtype == torch.float64:
            limit += 4.0 * 2.0**-52 * float((scores.abs().amax(1) / taus).max())
        assert value <= limit
        assert gradient <= 3.0 * limit
        if rows < 100:
            close = measured(scores, pos, valid, weight, taus, rtol, "dense")
            value, gradient = errors(close, wanted, taus)
            limit = 1e-6 if dtype == torch.float32 else 1e-12
            assert value <= limit
            assert gradient <= 3 * limit


@pytest.mark.parametrize("rtol", [1e-4, 1e-6, 1e-8, 1e-12])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("shape", ["normal", "blob and isolated"])  # in bins; with exact pairs
def test_methods_agree(rtol: float, weighted: bool, shape: str) -> None:
    g = torch.Generator().manual_seed(4)
    scores = draw(shape, 3, 2000, 0.05, g)
    pos = torch.rand(3, 2000, generator=g) < torch.tensor([[0.01], [0.3], [0.0]])
    weight = torch.rand(3, 2000, generator=g, dtype=torch.float64) * pos if weighted else None
    tau = torch.tensor([0.05, 0.2, 1.0], dtype=torch.float64)
    mean, gradient = measured(scores, pos, None, weight, tau, rtol)
    exact, exact_gradient = measured(scores, pos, None, weight, tau, rtol, "dense")
    # and the rounding of one coordinate
    limit = rtol + 4.0 * 2.0**-52 * float((scores.abs().amax(1) / tau).max())
    torch.testing.assert_close(mean, exact, rtol=2 * limit, atol=0)
    scale = exact_gradient.norm(dim=1)
    assert ((gradient - exact_gradient).norm(dim=1) <= 6 * limit * scale).all()


@pytest.mark.parametrize("method", ["dense", "grid"])
@pytest.mark.parametrize("lists", [1, 3])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", ["positive", "negative", "invalid", "without positives"])
def test_what_is_not_finite(method: str, lists: int, bad: float, where: str) -> None:
    """One such valid score makes its list NaN, unless that does not count; others stay."""
    g = torch.Generator().manual_seed(9)
    scores = torch.randn(lists, 40, generator=g)
    pos = torch.rand(lists, 40, generator=g) < 0.3
    pos[0, :2] = torch.tensor([True, False])
    valid = torch.ones_like(pos)
    row = 0 if where == "positive" else 1
    scores[0, row] = bad
    if where == "invalid":
        valid[0, row] = False
    if where == "without positives":
        pos[0] = False
    tau = torch.full((lists,), 0.1, dtype=torch.float64)
    value, gradient = measured(scores, pos, valid, None, tau, 1e-6, method)
    wanted = brute(scores, pos, valid, pos.float(), tau)
    if where in ("positive", "negative"):
        assert value[0].isnan()
        assert gradient[0].isnan().all()
        value[0], gradient[0] = wanted[0][0], wanted[1][0] = 0.0, torch.zeros(40).double()
    torch.testing.assert_close(value, wanted[0], rtol=1e-6, atol=0)
    torch.testing.assert_close(gradient, wanted[1], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("method", ["dense", "grid"])
def test_gradient_of_the_weights(method: str) -> None:
    g = torch.Generator().manual_seed(2)
    scores = torch.randn(2, 30, generator=g, dtype=torch.float64)
    pos = torch.rand(2, 30, generator=g) < 0.4
    weight = (torch.rand(2, 30, generator=g, dtype=torch.float64) * pos).requires_grad_()
    tau = torch.tensor([0.1, 1.0], dtype=torch.float64)

    def value(w: Tensor) -> Tensor:
        return rank_mean(Lists(scores, pos, None, w), tau, PRECISION, How(1e-12, method))[0]

    assert torch.autograd.gradcheck(value, (weight,))


def test_empty() -> None:
    for shape in ((0, 5), (3, 0)):
        none = torch.zeros(shape, dtype=torch.bool)
        value, defined = rank_mean(Lists(torch.zeros(shape), none), 0.1, PRECISION)
        assert value.shape == defined.shape == shape[:1]
        assert not value.any()
        assert not defined.any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_weights_of_fewer_digits_than_the_scores(dtype: torch.dtype) -> None:
    """Their own values count, not what is left of them in units of the largest."""
    g = torch.Generator().manual_seed(0)
    scores, pos = torch.randn(1, 60, generator=g, dtype=torch.float64), torch.arange(60) % 3 == 0
    weight = torch.rand(1, 60, generator=g).to(dtype)
    found = [
        rank_mean(Lists(scores, pos, None, w), 0.1, PRECISION)[0] for w in (weight, weight.double())
    ]
    torch.testing.assert_close(*found, rtol=1e-12, atol=0.0)
