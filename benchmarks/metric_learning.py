"""Trains an embedding of digits with several losses, and ranks digits it has not seen.

``python -m benchmarks.metric_learning`` tunes, trains and evaluates, and writes
``results/metric_learning.json`` and its plot. All arms share network, initial weights, batches,
number of configurations and of steps; what differs is the loss. There are two questions: to rank
the digits 6-9 after learning from 0-5, and to rank new images of 0-5. For each, an arm is tuned by
mean average precision on images of 0-5 that the tuning run did not learn; those it is asked about
are embedded once, at the end.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import product
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from proxy_losses import retrieval_lists, smooth_ap, smooth_ap_defined

from . import harness, report
from .digits import METRICS, QUESTIONS, Part, Question, evaluate, images, precision, shifted

PEER = "pytorch_metric_learning"
OURS = "Smooth-AP"
WIDTHS = (64, 128, 32)
PER_CLASS = 10  # rows of each class in a batch

Loss = Callable[[Tensor, Tensor], Tensor]


class Arm(NamedTuple):
    """A loss, made from one of three values of its own parameter."""

    make: Callable[[float], Loss]
    parameter: str
    values: tuple[float, ...]


class Choice(NamedTuple):
    """A configuration."""

    value: float  # of the arm's parameter
    rate: float  # learning rate of Adam
    steps: int


class Budget(NamedTuple):
    """How much is run."""

    steps: tuple[int, ...]  # after which a network is evaluated, ascending
    values: int  # of an arm's parameter
    rates: tuple[float, ...]
    folds: int
    seeds: range


FULL = Budget((100, 200, 300), 3, (1e-3, 2e-3), 3, range(12))
QUICK = Budget((1, 2), 2, (1e-3,), 1, range(2))
TUNING_SEED = 1000  # of the first fold


def ours(tau: float) -> Loss:
    """1 - mean Smooth-AP over the queries that have a positive."""

    def loss(embeddings: Tensor, labels: Tensor) -> Tensor:
        lists = retrieval_lists(embeddings, labels)
        ap = smooth_ap(lists.scores, lists.pos_mask, tau, valid_mask=lists.valid_mask)
        counts = smooth_ap_defined(lists.pos_mask, lists.valid_mask)
        return 1 - ap.sum() / counts.sum().clamp(min=1)

    return loss


def arms() -> dict[str, Arm]:
    """All losses; the rest are those of the peer.

    Its SmoothAPLoss equals the formula only for as many classes as rows per class. Here, as its
    documentation allows, it gets 6 classes of 10 rows (4 of 10 in tuning for unseen digits).
    """
    from pytorch_metric_learning import losses

    taus = (0.01, 0.03, 0.1)
    return {
        OURS: Arm(ours, "tau", taus),
        "peer SmoothAPLoss": Arm(losses.SmoothAPLoss, "temperature", taus),
        "peer ContrastiveLoss": Arm(
            lambda margin: losses.ContrastiveLoss(neg_margin=margin),
            "neg_margin",
            (0.3, 0.6, 1.0),
        ),
        "peer MultiSimilarityLoss": Arm(
            lambda beta: losses.MultiSimilarityLoss(beta=beta), "beta", (10.0, 20.0, 50.0)
        ),
    }


def network(seed: int) -> nn.Module:
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(seed)
        inputs, hidden, outputs = WIDTHS
        return nn.Sequential(nn.Linear(inputs, hidden), nn.ReLU(), nn.Linear(hidden, outputs))


def train(
    loss: Loss, rate: float, steps: Sequence[int], seed: int, part: Part
) -> Iterator[tuple[int, nn.Module]]:
    """Batches of equally many rows of each class; the network after each of these steps."""
    x, y = images(part)
    rows_of = [(y == digit).nonzero()[:, 0] for digit in part.digits]
    draw = torch.Generator().manual_seed(seed)
    net = network(seed)
    optimizer = torch.optim.Adam(net.parameters(), rate)
    for step in range(1, steps[-1] + 1):
        batch = [rows[torch.randperm(len(rows), generator=draw)[:PER_CLASS]] for rows in rows_of]
        rows = torch.cat(batch)  # sorted by class, as the peer's SmoothAPLoss asks
        optimizer.zero_grad()
        loss(net(shifted(x[rows], draw)), y[rows]).backward()
        optimizer.step()
        if step in steps:
            yield step, net


def tune(arm: Arm, question: Question, budget: Budget) -> tuple[Choice, list[dict[str, Any]]]:
    """The configuration of the best mean average precision over the folds, and all tried."""
    tried = []
    for value, rate in product(arm.values[: budget.values], budget.rates):
        runs: dict[int, list[float]] = {steps: [] for steps in budget.steps}
        for seed, (learnt, ranked) in enumerate(question.folds[: budget.folds], TUNING_SEED):
            x, y = images(ranked)
            for steps, net in train(arm.make(value), rate, budget.steps, seed, learnt):
                runs[steps].append(precision(embed(net, x), y)["mean_average_precision"])
        for steps, found in runs.items():
            choice = Choice(value, rate, steps)
            tried.append({**choice._asdict(), "map": sum(found) / len(found), "runs": found})
    best = max(tried, key=lambda t: t["map"])
    return Choice(best["value"], best["rate"], best["steps"]), tried


def embed(net: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        out: Tensor = net(x)
    return out


def answer(question: Question, budget: Budget) -> tuple[dict[str, Any], dict[str, Any]]:
    """(how every arm was tuned, every metric of every arm and seed)."""
    x, y = images(question.ranked)
    tuned, results = {}, {}
    for name, arm in arms().items():
        print(name, file=sys.stderr, flush=True)
        start = time.process_time()
        choice, tried = tune(arm, question, budget)
        middle = time.process_time()
        loss, steps = arm.make(choice.value), (choice.steps,)
        results[name] = [
            evaluate(embed(net, x), y)
            for seed in budget.seeds
            for _, net in train(loss, choice.rate, steps, seed, question.learnt)
        ]
        tuned[name] = {
            "parameter": arm.parameter, "chosen": choice._asdict(), "tried": tried,
            "tuning_cpu_s": round(middle - start, 1),
            "training_cpu_s": round(time.process_time() - middle, 1),
        }  # fmt: skip
    results["untrained network"] = [evaluate(embed(network(s), x), y) for s in budget.seeds]
    results["raw pixels"] = [evaluate(x, y)] * len(budget.seeds)
    by_metric = {arm: {m: [r[m] for r in runs] for m in METRICS} for arm, runs in results.items()}
    return tuned, by_metric


def main(argv: Sequence[str] | None = None) -> int:
    args = report.options("metric_learning").parse_args(argv)
    default = report.ROOT / report.RESULTS / "metric_learning.json"
    if args.plot:
        from . import metric_figures

        path = args.out or default
        metric_figures.draw(json.loads(path.read_text()), path.with_suffix(".png"))
        return 0
    for package in (PEER, "sklearn", "matplotlib"):
        if harness.peer(package)[0] is None:
            raise SystemExit(f'{package} is missing: pip install -e ".[bench]"')
    from . import metric_figures

    torch.set_num_threads(1)
    budget = QUICK if args.quick else FULL
    peers = {p: harness.peer(p)[1] for p in (PEER, "sklearn")}
    written = report.heading("metric_learning", __doc__.splitlines()[0], peers) | {
        "ours": OURS, "quick": args.quick,
        "protocol": {
            "data": "sklearn load_digits / 16, shifted by up to a pixel in training",
            "questions": {name: question._asdict() for name, question in QUESTIONS.items()},
            "network": WIDTHS, "optimizer": "Adam", "per_class": PER_CLASS,
            "tuning_seed": TUNING_SEED, **budget._asdict(), "seeds": list(budget.seeds),
            "metrics": METRICS, "selected_by": "map",
        },
        "tie": metric_figures.TIE, "tuning": {}, "results": {}, "compared": {},
    }  # fmt: skip
    for name, question in QUESTIONS.items():
        written["tuning"][name], found = answer(question, budget)
        written["results"][name] = found
        written["compared"][name] = metric_figures.compare(found, OURS)
    written["cpu_s"] = round(time.process_time(), 1)
    print(metric_figures.show(written))
    out = args.out or (None if args.quick else default)
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(written, indent=1) + "\n")
        metric_figures.draw(written, out.with_suffix(".png"))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
