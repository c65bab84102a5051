"""Pools far beyond what pairs in memory allow, against answers known in closed form or by tiles."""

from __future__ import annotations

import pytest
import torch

import proxy_losses as P
from proxy_losses._ranks import PRECISION, How, Lists, rank_mean

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("rows", [1_000_000])
def test_sorted_pools_have_a_known_ap(rows):
    """Scores 1 apart in units far above tau: ranks are integers."""
    positives = rows // 20
    scores = torch.arange(rows, 0, -1, dtype=torch.float64)
    pos = torch.zeros(rows, dtype=torch.bool)
    pos[:positives] = True
    assert P.smooth_ap(scores, pos, 1e-2).item() == pytest.approx(1.0, rel=1e-12)
    # Positives last: the k-th of them has k positives among rows - positives + k.
    k = torch.arange(1, positives + 1, dtype=torch.float64)
    expected = (k / (rows - positives + k)).mean().item()
    assert P.smooth_ap(scores, pos.flip(0), 1e-2).item() == pytest.approx(expected, rel=1e-11)


@pytest.mark.parametrize("tau", [1e-3, 0.05, 1.0])
@pytest.mark.parametrize("heavy", [False, True], ids=["normal", "student"])
def test_grid_keeps_its_promise_on_a_large_pool(tau, heavy):
    g = torch.Generator().manual_seed(0)
    rows, positives, rtol = 200_000, 300, 1e-6
    scores = torch.randn(rows, generator=g)
    if heavy:
        scores = scores / torch.rand(rows, generator=g).log().neg().sqrt()
    pos = torch.zeros(rows, dtype=torch.bool)
    pos[torch.randperm(rows, generator=g)[:positives]] = True
    weight = pos.double()
    exact = scores.double().requires_grad_()
    value, _ = rank_mean(Lists(exact, pos, None, weight), tau, PRECISION, How(None, "dense"))
    value.backward()
    ranks = P.soft_ranks(exact.detach(), pos, tau, method="dense").all[pos]
    ours = scores.clone().requires_grad_()
    fast, _ = rank_mean(Lists(ours, pos, None, weight), tau, PRECISION, How(rtol, "grid"))
    fast.backward()
    # The value is returned in float32, which rounds it once more.
    assert fast.item() == pytest.approx(value.item(), rel=rtol + 6e-8)
    natural = (1 / (positives * ranks)).norm() / (4 * tau)
    error = (ours.grad.double() - exact.grad).norm()
    assert error <= 3 * rtol * max(exact.grad.norm(), natural)
