"""Smooth-AP on pools of any size against `torch.sort`, a dense form and a peer, with targets.

``python -m benchmarks.ranks [--quick] [--out FILE] [--only PART ...]`` measures;
``python -m benchmarks.ranks --plot`` draws what the file holds into a PNG beside it.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import harness, report
from .harness import OURS, Case, Fn, Skip, Suite
from .report import Goal
from .smooth_ap import PEER, PLAIN_PM, TAU, make_list, plain_positive_rows, value_and_grad, within

MODULE = "benchmarks.ranks"
SORT, DENSE = "torch.sort", "dense one-vs-rest"
FUNCTION, LOSS = "smooth_ap", "SmoothAPLoss"
TOLERANCE = 1e-4  # of the gate; float32 sums of the plain forms round at about 1e-6
TILE = 1 << 17  # pairs alive at once in the dense form
CURVE_RATES = (0.005, 0.05)

Loss = Callable[[Tensor, Tensor], Tensor]
Batch = tuple[Tensor, Tensor]  # logits, targets


class Sizes(NamedTuple):
    """Lengths of the lists."""

    small: tuple[int, ...] = (1_000, 2_000, 4_000)
    small_rates: tuple[float, ...] = (0.005, 0.05, 0.5)
    pool: int = 64_000
    curve: tuple[int, ...] = (1_000, 4_000, 16_000, 64_000, 256_000, 1_000_000)
    sort: int = 1_000_000
    huge: int = 10_000_000
    queue: tuple[int, int, int] = (1_000, 512, 1_024)  # classes, batch, queue
    classes: tuple[int, int] = (10, 16_384)  # classes, pool
    worst: int = 200_000
    check: int = 16_000


FULL = Sizes()
QUICK = Sizes((1_000, 4_000), CURVE_RATES, 16_000, (1_000, 4_000, 16_000), 64_000, 256_000,
              (50, 64, 128), (10, 2_048), 20_000)  # fmt: skip


def student_list(m: int, rate: float) -> Batch:
    """Heavy tails: Student t with 2 degrees of freedom, the positives shifted by 1."""
    _, pos = make_list(m, rate)
    gen = torch.Generator().manual_seed(m + 1)
    exponential = -torch.rand(m, generator=gen).clamp_(min=1e-7).log_()
    return torch.randn(m, generator=gen) / exponential.sqrt() + pos, pos


def blob_list(m: int, rate: float) -> Batch:
    """Half of the rows within about TAU of one score, half about 20 TAU from any other."""
    _, pos = make_list(m, rate)
    gen = torch.Generator().manual_seed(m + 1)
    blob = torch.rand(m, generator=gen) < 0.5
    alone = torch.rand(m, generator=gen) * (20.0 * TAU * m)
    return torch.where(blob, torch.randn(m, generator=gen) * TAU, alone), pos


LISTS = {"normal": make_list, "Student t": student_list, "blob and isolated": blob_list}


def as_loss(metric: Loss, scores: Tensor, pos: Tensor) -> Tensor:
    return 1.0 - metric(scores, pos)


def sort(scores: Tensor) -> tuple[Tensor, ...]:
    """The yardstick."""
    torch.sort(scores)
    return ()


class Steps:
    """Training steps through all batches; the queue holds the last ones before and after."""

    def __init__(self, make: Callable[[], Any], batches: list[Batch]) -> None:
        self.make, self.batches, self.loss = make, batches, None

    def __call__(self) -> tuple[Tensor, ...]:
        """Loss and gradient of every step."""
        if self.loss is None:
            self.loss = self.make()
            for logits, targets in self.batches[1:]:
                self.loss(logits, targets)
        steps = [value_and_grad(self.loss, *batch) for batch in self.batches]
        return tuple(torch.stack(column) for column in zip(*steps, strict=True))


def dense_one_vs_rest(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Loss and gradient from exact pairs, each visited once, in tiles; every class has rows."""
    m, classes = logits.shape
    grad, ap = torch.zeros_like(logits.T), logits.new_zeros(())
    for g, s, pos in zip(grad, logits.T.contiguous(), torch.arange(classes)[:, None] == targets,
                         strict=True):  # fmt: skip
        rows, hit = pos.nonzero()[:, 0], pos.to(s.dtype)
        for part in rows.split(max(1, TILE // m)):
            k = torch.sigmoid((s - s[part, None]) / TAU)
            rank = k.sum(1) + 0.5  # the own sigmoid(0) is in the sum
            phi, share = (k @ hit + 0.5) / rank, 1.0 / (classes * rows.numel())
            a = share / rank
            ap += share * phi.sum()
            k.mul_(1.0 - k)
            up, down = torch.stack([a, a * phi]) @ k
            g += hit * up - down
            g[part] -= a * (k @ hit - phi * k.sum(1))
    return 1.0 - ap, (grad / -TAU).T.flatten()


class Cases:
    """Makes cases; holds what is common to them."""

    def __init__(
        self, max_gb: float, peer: Callable[..., Any] | None, packages: dict[str, Any]
    ) -> None:
        """`packages` are versions of ours."""
        self.max_gb, self.peer, self.packages = max_gb, peer, packages

    def peer_or(self, pairs: int, make: Callable[[Any], Fn]) -> Fn | Skip:
        """The peer, unless it is absent or would need too much memory."""
        if self.peer is None:
            return Skip("absent", "it cannot be imported here")
        return within(PEER, pairs, self.max_gb) or make(self.peer)

    def one_list(
        self, name: str, *, form: str, shape: str, m: int, rate: float, tau: float,
        goal: Goal | None, check: bool = False,
    ) -> Case:  # fmt: skip
        """One list of scores; the goal decides who else runs."""
        scores, pos = LISTS[shape](m, rate)
        p = int(pos.sum())
        column, ids = scores[:, None], pos.long()

        def run(module: Callable[..., Any]) -> Fn:
            return partial(value_and_grad, module(1, queue_size=0, temperature=tau), column, ids)

        def run_function(metric: Loss) -> Fn:
            return partial(value_and_grad, partial(as_loss, metric), scores, pos)

        contenders: dict[str, Fn | Skip] = {
            name: run(package.SmoothAPLoss)
            if form == LOSS
            else run_function(partial(package.smooth_ap, tau=tau))
            for name, package in self.packages.items()
        }
        if goal is None or goal.against != SORT:
            contenders[PEER] = self.peer_or(p * m, run)
        if check:
            contenders[PLAIN_PM] = run_function(plain_positive_rows)
        else:
            contenders[SORT] = partial(sort, scores)
        sizes = {"M": m, "P": p, "positive_rate": rate, "tau": tau}
        return Case(name, sizes, contenders, goal)

    def with_queue(self, name: str, *, shape: tuple[int, int, int], goal: Goal | None) -> Case:
        """One call takes queue / batch + 1 steps, after which the queue holds the same rows."""
        c, n, queue = shape
        gen = torch.Generator().manual_seed(c)
        batches = [
            (torch.randn(n, c, generator=gen), torch.randint(0, c, (n,), generator=gen))
            for _ in range(queue // n + 1)
        ]

        def steps(loss: Callable[..., Any]) -> Fn:
            return Steps(partial(loss, c, queue_size=queue, temperature=TAU), batches)

        pairs = (n + queue) ** 2
        ours = {name: steps(package.SmoothAPLoss) for name, package in self.packages.items()}
        contenders = {**ours, PEER: self.peer_or(pairs, steps)}
        sizes = {"classes": c, "batch": n, "queue": queue, "steps": len(batches), "tau": TAU}
        return Case(name, sizes, contenders, goal)

    def one_vs_rest(self, name: str, *, shape: tuple[int, int], goal: Goal | None) -> Case:
        """Classes over one pool without a queue."""
        c, m = shape
        gen = torch.Generator().manual_seed(c)
        logits = torch.randn(m, c, generator=gen)
        targets = torch.arange(m)[torch.randperm(m, generator=gen)] % c

        def run(loss: Callable[..., Any]) -> Fn:
            module = loss(c, queue_size=0, temperature=TAU)
            return partial(value_and_grad, module, logits, targets)

        contenders: dict[str, Fn | Skip] = {
            **{name: run(package.SmoothAPLoss) for name, package in self.packages.items()},
            DENSE: partial(dense_one_vs_rest, logits, targets),
            PEER: self.peer_or(m * m, run),
        }
        return Case(name, {"classes": c, "M": m, "tau": TAU}, contenders, goal)


def every_case(cases: Cases, sizes: Sizes) -> dict[str, Callable[[str], Case]]:
    """Name -> what makes the case, smallest lists first; a child makes only what it measures."""
    lists: dict[tuple[str, str, int, float, float], Goal | None] = {}
    for m in sizes.curve:  # what the plot shows; goals follow
        lists |= dict.fromkeys((FUNCTION, "normal", m, rate, TAU) for rate in CURVE_RATES)
    for form in (FUNCTION, LOSS):
        for m in sizes.small:
            for rate in sizes.small_rates:
                lists[form, "normal", m, rate, TAU] = Goal("speed-up", 0.9, PEER)
        lists[form, "normal", sizes.pool, 0.005, TAU] = Goal("speed-up", 100.0, PEER)
    for tau in (0.01, TAU, 0.5):
        lists[FUNCTION, "normal", sizes.sort, 0.05, tau] = Goal("share of time", 0.6, SORT)
        lists[FUNCTION, "Student t", sizes.sort, 0.05, tau] = Goal("share of time", 1.3, SORT)
    most = Goal("bytes per element", 50.0, elements=sizes.huge)
    lists[FUNCTION, "normal", sizes.huge, 0.05, TAU] = most
    slowest = Goal("us per element", 0.5, elements=sizes.worst)
    lists[FUNCTION, "blob and isolated", sizes.worst, 0.05, TAU] = slowest
    found: dict[str, Callable[[str], Case]] = {}
    for key in sorted(lists, key=lambda key: (key[2], key[3], key[0] != FUNCTION, key)):
        form, shape, m, rate, tau = key
        name = f"{form}, {shape}, M = {m:,}, {100 * rate:g} %, tau {tau:g}"
        found[name] = partial(
            cases.one_list, form=form, shape=shape, m=m, rate=rate, tau=tau, goal=lists[key]
        )
    c, n, queue = sizes.queue
    goal = Goal("speed-up", 25.0, PEER)
    name = f"{LOSS}, {c:,} classes, batch {n} and queue {queue:,}"
    found[name] = partial(cases.with_queue, shape=sizes.queue, goal=goal)
    c, m = sizes.classes
    goal = Goal("speed-up", 50.0, DENSE)
    name = f"{LOSS}, {c:,} classes, M = {m:,}"
    found[name] = partial(cases.one_vs_rest, shape=sizes.classes, goal=goal)
    return found


def checks(cases: Cases, m: int) -> list[Case]:
    """Small cases of every kind, for the gate."""
    lists = [
        cases.one_list(f"check: {form}, {shape}", form=form, shape=shape, m=m, rate=0.005,
                       tau=TAU, goal=None, check=True)
        for form, shape in [(FUNCTION, "normal"), (LOSS, "normal"), (FUNCTION, "Student t"),
                            (FUNCTION, "blob and isolated")]
    ]  # fmt: skip
    queue = cases.with_queue("check: classes with a queue", shape=(20, 32, 64), goal=None)
    return [*lists, queue, cases.one_vs_rest("check: classes", shape=(5, 500), goal=None)]


def build(args: argparse.Namespace) -> Suite:
    package, version = harness.peer(PEER)
    cases = Cases(args.max_gb, package and package.SmoothAPLoss, harness.packages(args))
    sizes = QUICK if args.quick else FULL
    every = every_case(cases, sizes)
    names = [name for name in every if not args.only or any(part in name for part in args.only)]
    if not names:
        raise SystemExit("--only is in none of\n" + "\n".join(every))
    if args.peak_of:
        names = [name for name in names if name in (names[0], args.peak_of[0])]
    made = [every[name](name) for name in names]
    few = () if args.peak_of else checks(cases, sizes.check)
    about = "forward and backward of a Smooth-AP loss, float32, eager; torch.sort sorts the scores"
    return Suite("ranks", about, OURS, made, TOLERANCE, {PEER: version}, few)


def main(argv: Sequence[str] | None = None) -> int:
    options = harness.parser(MODULE)
    options.add_argument("--only", nargs="+", help="cases whose name contains one of these")
    options.add_argument("--plot", action="store_true", help="draw the file, measure nothing")
    options.add_argument(
        "--max-gb", type=float, default=6.0, help="skip contenders with larger pair buffers"
    )
    args = options.parse_args(argv)
    if not args.plot:
        return harness.main(MODULE, build, argv, options)
    from . import rank_figures  # needs matplotlib

    path = args.out or report.ROOT / report.RESULTS / "ranks.json"
    rank_figures.draw_speed(json.loads(path.read_text()), path.with_suffix(".png"))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
