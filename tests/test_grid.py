"""pair_sums against float64 brute force."""

import math

import pytest
import torch
from torch import Tensor

from proxy_losses._ranks import op

SHAPES = [
    "normal",
    "t2",
    "uniform",
    "two blobs",
    "ties",
    "exponential",
    "blob and isolated",
    "offset",
]


def pair_sums(
    scores: Tensor, weights: Tensor, at: Tensor, tau: Tensor, kinds: str, rtol: float
) -> list[Tensor]:
    """The registered sums by the near-linear method."""
    return op.pair_sums(scores, weights, at, tau, kinds, rtol, "grid")


def draw(shape: str, lists: int, rows: int, tau: float, g: torch.Generator) -> Tensor:
    size = (lists, rows)
    normal = torch.randn(size, generator=g, dtype=torch.float64)
    uniform = torch.rand(size, generator=g, dtype=torch.float64)
    half = torch.rand(size, generator=g) < 0.5
    if shape == "t2":
        return normal / (-uniform.clamp(min=1e-12).log()).sqrt()
    if shape == "uniform":
        return uniform
    if shape == "two blobs":
        return normal * 0.1 + half * 300.0
    if shape == "ties":
        return torch.where(half, normal.mul(2.0).round(), 0.5)
    if shape == "exponential":
        return -uniform.clamp(min=1e-12).log()
    if shape == "blob and isolated":
        return torch.where(half, normal * tau, uniform * rows * 20.0 * tau)
    if shape == "offset":
        return normal + 1e4
    return normal


class Exact:
    """Brute force sums and the sums of absolute terms, [L, G, M]."""

    def __init__(self, scores: Tensor, weights: Tensor, at: Tensor, tau: Tensor) -> None:
        s, w = scores.double(), weights.double()
        z = (s[:, :, None] - s[:, None, :]) / tau[:, None, None]  # [L, j, i]
        up, down = torch.sigmoid(z), torch.sigmoid(-z)
        self.value, self.slope = (w @ up) * at, (w @ (up * down)) * at
        self.stretch = (w @ (z * up * down)) * at
        self.value_scale, self.slope_scale = w.abs() @ up, w.abs() @ (up * down)
        self.stretch_scale = w.abs() @ ((1.0 + z.abs()) * up * down)
        self.unit = w.abs().amax(-1, keepdim=True)


def check(
    scores: Tensor, weights: Tensor, at: Tensor, tau: Tensor, rtol: float, slack: float = 1.0
) -> Exact:
    exact = Exact(scores, weights, at, tau)
    value, slope, stretch = pair_sums(scores, weights, at, tau, "value,slope,stretch", rtol)
    floor = 4e-7 if scores.dtype == torch.float32 else 1e-15  # output rounding
    rtol = max(rtol, floor) * slack
    half = exact.unit / 2 + 1e-300
    value_error = (value.double() - exact.value).abs() / (exact.value_scale + half)
    slope_error = (slope.double() - exact.slope).abs() / (exact.slope_scale + half)
    # Near z = 0 its terms vanish, but not what interpolation makes of them.
    stretch_error = (stretch.double() - exact.stretch).abs() / (exact.stretch_scale + half)
    assert float(value_error.max()) <= rtol
    assert float(slope_error.max()) <= 3 * rtol
    assert float(stretch_error.max()) <= 10 * rtol
    assert not value.masked_select(~at.expand_as(value)).any()
    assert not slope.masked_select(~at.expand_as(slope)).any()
    return exact


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(
    "seed", [pytest.param(k, marks=[pytest.mark.slow] if k >= 12 else []) for k in range(25)]
)
def test_random(shape: str, seed: int) -> None:
    g = torch.Generator().manual_seed(1000 * SHAPES.index(shape) + seed)

    def uniform() -> float:
        return float(torch.rand((), generator=g))

    for _ in range(2):
        rows = int(math.exp(uniform() * math.log(3000.0)))
        lists = 1 if rows > 500 or uniform() < 0.5 else 3
        tau = 10.0 ** (uniform() * 4.2 - 3.0)
        rtol = [1e-4, 1e-6, 1e-8, 1e-12][int(uniform() * 4)]
        dtype = torch.float32 if rtol >= 1e-6 and uniform() < 0.7 else torch.float64
        scores = draw(shape, lists, rows, tau, g).to(dtype)
        positive = torch.rand(lists, rows, generator=g) < uniform()
        taus = tau * (1.0 + torch.rand(lists, generator=g, dtype=torch.float64))
        # two times the rounding of one coordinate, all that float64 scores permit
        digits = 2.0**-52 * float((scores.double().abs().amax(1) / taus).max()) / rtol
        slack = 1.0 + 4.0 * digits * (dtype == torch.float64)
        ranks = torch.stack([torch.ones_like(scores), positive.to(dtype)], 1)
        check(scores, ranks, positive[:, None], taus, rtol, slack)
        signed = torch.randn(lists, 2, rows, generator=g).to(dtype) * positive[:, None]
        at = torch.stack([torch.ones_like(positive), positive], 1)
        check(scores, signed, at, taus, rtol, slack)
        _check_gradient(scores, positive, taus, rtol, slack)


def _check_gradient(
    scores: Tensor, positive: Tensor, tau: Tensor, rtol: float, slack: float
) -> None:
    """Gradient of average precision: within 3 rtol of max(|g|, |a| / (4 tau)) in norm."""
    groups = torch.stack([torch.ones_like(scores), positive.to(scores.dtype)], 1)
    at = positive[:, None]

    def gradient(value: Tensor, slope: Tensor, slopes: object) -> tuple[Tensor, Tensor]:
        count = positive.sum(1, keepdim=True).clamp(min=1)
        everyone, hits = value[:, 0].double() + 0.5, value[:, 1].double() + 0.5
        a = torch.where(positive, 1.0 / (count * everyone), 0.0)
        b = torch.where(positive, -hits / (count * everyone**2), 0.0)
        c = torch.stack([b, a + b], 1).to(scores.dtype)
        target = torch.stack([~positive, positive], 1)
        sums = slopes(c, target)  # type: ignore[operator]
        own = a * slope[:, 1].double() + b * slope[:, 0].double()
        return (sums.double().sum(1) - own) / tau[:, None], a

    exact = Exact(scores, groups, at, tau)
    wanted, a = gradient(
        exact.value, exact.slope, lambda c, target: Exact(scores, c, target, tau).slope
    )
    value, slope = pair_sums(scores, groups, at, tau, "value,slope", rtol)
    found, _ = gradient(
        value,
        slope,
        lambda c, target: pair_sums(scores, c, target, tau, "slope", rtol)[0],
    )
    natural = torch.maximum(wanted.norm(dim=1), a.norm(dim=1) / (4.0 * tau))
    error = (found - wanted).norm(dim=1) / (natural + 1e-300)
    floor = 4e-7 if scores.dtype == torch.float32 else 1e-15
    assert float(error.max()) <= 3.0 * max(rtol, floor) * slack


@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float32, 1e-6), (torch.float64, 1e-12)])
@pytest.mark.parametrize("rows", [1, 2, 3, 700])
@pytest.mark.parametrize("which", ["one", "all", "none", "half"])
@pytest.mark.parametrize("kind", ["equal", "normal", "outliers", "zero weights", "ranges"])
def test_edges(dtype: torch.dtype, rtol: float, rows: int, which: str, kind: str) -> None:
    g = torch.Generator().manual_seed(7)
    scores = torch.randn(3, rows, generator=g, dtype=torch.float64)
    if kind == "equal":
        scores = scores * 0 + 0.3
    if kind == "outliers":
        scores[:, 0], scores[:, -1] = 1e6, -1e6
    if kind == "ranges":
        scores = scores * torch.tensor([[1e-3], [1.0], [1e4]], dtype=torch.float64)
    target = torch.zeros(3, rows, dtype=torch.bool)
    if which == "one":
        target[:, rows // 2] = True
    if which == "all":
        target[:] = True
    if which == "half":
        target[:, ::2] = True
    scores = scores.to(dtype)
    weights = torch.stack([torch.ones_like(scores), target.to(dtype)], 1)
    if kind == "zero weights":
        weights.zero_()
    for scale in (1e-4, 0.05, 3.0):
        tau = scale * torch.tensor([1.0, 2.0, 0.5], dtype=torch.float64)
        digits = 2.0**-52 * float((scores.double().abs().amax(1) / tau).max()) / rtol
        slack = 1.0 + 4.0 * digits * (dtype == torch.float64)
        check(scores, weights, target[:, None], tau, rtol, slack)
        check(scores[1:2], weights[1:2], target[1:2, None], tau[1:2], rtol, slack)


@pytest.mark.parametrize("shape", [(0, 5), (3, 0), (0, 0)])
def test_nothing(shape: tuple[int, int]) -> None:
    lists, rows = shape
    at = torch.ones(lists, 1, rows, dtype=torch.bool)
    (value,) = pair_sums(
        torch.zeros(shape), torch.zeros(lists, 2, rows), at, torch.ones(lists).double(), "value",
        1e-6,
    )  # fmt: skip
    assert value.shape == (lists, 2, rows)


@pytest.mark.parametrize("share", [0.05, 0.5])
def test_blob_and_isolated_rows_in_the_large(share: float) -> None:
    g = torch.Generator().manual_seed(3)
    rows, tau = 40_000, 0.01
    scores = draw("blob and isolated", 1, rows, tau, g).float()
    positive = torch.rand(1, rows, generator=g) < share
    weights = torch.stack([torch.ones_like(scores), positive.float()], 1)
    taus = torch.tensor([tau], dtype=torch.float64)
    (value,) = pair_sums(scores, weights, positive[:, None], taus, "value", 1e-6)
    for i in positive[0].nonzero()[::400, 0].tolist():
        apart = scores[0].double() - scores[0, i].double()
        exact = weights[0].double() @ torch.sigmoid(apart / tau)
        assert torch.allclose(value[0, :, i].double(), exact, rtol=1e-6, atol=0)


def test_inputs_are_left_alone_and_bits_repeat() -> None:
    g = torch.Generator().manual_seed(5)
    scores = torch.randn(2, 3000, generator=g, dtype=torch.float64)
    weights = torch.rand(2, 1, 3000, generator=g, dtype=torch.float64)
    at = torch.ones(2, 1, 3000, dtype=torch.bool)
    tau = torch.tensor([0.1, 1e-4], dtype=torch.float64)
    copies = scores.clone(), weights.clone()
    first = pair_sums(scores, weights, at, tau, "value", 1e-8)[0]
    second = pair_sums(scores, weights, at, tau, "value", 1e-8)[0]
    assert torch.equal(first, second)
    assert torch.equal(scores, copies[0])
    assert torch.equal(weights, copies[1])


def test_absurd_range_raises() -> None:
    scores = torch.tensor([[0.0, 3e38]])
    weights, at = torch.ones(1, 1, 2), torch.ones(1, 1, 2, dtype=torch.bool)
    with pytest.raises(OverflowError, match="dense"):
        pair_sums(scores, weights, at, torch.tensor([1e-5], dtype=torch.float64), "value", 1e-6)
