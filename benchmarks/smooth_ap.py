"""Smooth-AP, value and gradient, against the formula written plainly in torch, and peers.

``python -m benchmarks.smooth_ap [--quick] [--out FILE]``
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from . import harness
from .harness import OURS, Case, Fn, Skip, Suite

MODULE = "benchmarks.smooth_ap"
PLAIN_MM, PLAIN_PM, PEER = "plain M x M", "plain P x M", "imbalanced_losses"
TAU = 0.05
GRID = [(m, rate) for m in (1_000, 4_000, 16_000, 64_000) for rate in (0.005, 0.05, 0.5)]
QUICK_GRID = [(1_000, 0.005), (4_000, 0.05)]
# Float32 pair buffers alive at once in the backward, as the peak memory shows.
LIVE_PAIRS = {PLAIN_MM: 3.0, PLAIN_PM: 3.0, PEER: 3.75}
TOLERANCE = 1e-4  # of the gate; float32 sums of the plain forms round at about 1e-6

Metric = Callable[[Tensor, Tensor], Tensor]


def plain_all_pairs(scores: Tensor, pos: Tensor) -> Tensor:
    """AP = mean over positives of R+ / R, from the sigmoids of all M x M pairs."""
    above = torch.sigmoid((scores[None, :] - scores[:, None]) / TAU)  # [i, j]: j above i
    # 1 + the sum over j != i; the own term is sigmoid(0) = 1/2.
    rank_all = 0.5 + above.sum(1)
    rank_pos = 0.5 + above @ pos.to(scores.dtype)
    return (rank_pos / rank_all)[pos].mean()


def plain_positive_rows(scores: Tensor, pos: Tensor) -> Tensor:
    """The same from the P rows of the positives alone, P x M pairs."""
    above = torch.sigmoid((scores[None, :] - scores[pos][:, None]) / TAU)
    rank_all = 0.5 + above.sum(1)
    rank_pos = 0.5 + above @ pos.to(scores.dtype)
    return (rank_pos / rank_all).mean()


def value_and_grad(metric: Metric, scores: Tensor, pos: Tensor) -> tuple[Tensor, Tensor]:
    """One eager forward and backward; the gradient is flat."""
    leaf = scores.detach().requires_grad_()
    value = metric(leaf, pos)
    (grad,) = torch.autograd.grad(value, leaf)
    return value.detach(), grad.flatten()


def within(name: str, pairs: int, max_gb: float) -> Skip | None:
    """Why a contender of so many pairs does not run, None if it may."""
    gb = LIVE_PAIRS[name] * 4 * pairs / 1e9
    if gb <= max_gb:
        return None
    return Skip("skipped", f"its pair buffers take about {gb:.3g} GB, limit {max_gb:g}")


def make_list(m: int, rate: float) -> tuple[Tensor, Tensor]:
    """A list of m normal scores, the positives one standard deviation higher; seeded."""
    gen = torch.Generator().manual_seed(m)
    pos = torch.zeros(m, dtype=torch.bool)
    pos[torch.randperm(m, generator=gen)[: round(rate * m)]] = True
    return torch.randn(m, generator=gen) + pos, pos


def make_case(
    m: int, rate: float, max_gb: float, peer: Metric | None, packages: Mapping[str, Any]
) -> Case:
    scores, pos = make_list(m, rate)
    p = int(pos.sum())

    def run(metric: Metric) -> Fn:
        return partial(value_and_grad, metric, scores, pos)

    contenders: dict[str, Fn | Skip] = {
        **{name: run(partial(package.smooth_ap, tau=TAU)) for name, package in packages.items()},
        PLAIN_PM: within(PLAIN_PM, p * m, max_gb) or run(plain_positive_rows),
        PLAIN_MM: within(PLAIN_MM, m * m, max_gb) or run(plain_all_pairs),
        PEER: within(PEER, p * m, max_gb) or run(peer)
        if peer
        else Skip("absent", "it cannot be imported here"),
    }
    sizes = {"M": m, "P": p, "positive_rate": rate, "tau": TAU}
    return Case(f"M = {m:,}, P = {p:,} ({100 * rate:g} %)", sizes, contenders)


def build(args: argparse.Namespace) -> Suite:
    package, version = harness.peer(PEER)
    peer: Metric | None = None
    if package is not None:
        loss = package.SmoothAPLoss(1, queue_size=0, temperature=TAU)

        def peer(scores: Tensor, pos: Tensor) -> Tensor:
            value: Tensor = 1.0 - loss(scores[:, None], pos.long())
            return value

    grid, packages = QUICK_GRID if args.quick else GRID, harness.packages(args)
    cases = [make_case(m, rate, args.max_gb, peer, packages) for m, rate in grid]
    about = f"forward and backward of Smooth-AP on one list, float32, eager, tau {TAU:g}"
    return Suite("smooth_ap", about, OURS, cases, TOLERANCE, {PEER: version})


def main(argv: list[str] | None = None) -> int:
    options = harness.parser(MODULE)
    options.add_argument(
        "--max-gb", type=float, default=2.0, help="skip contenders with larger pair buffers"
    )
    return harness.main(MODULE, build, argv, options)


if __name__ == "__main__":
    raise SystemExit(main())
