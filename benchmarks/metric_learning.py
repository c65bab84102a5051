"""Trains an embedding of digits with several losses, and ranks digits it has not seen.

``python -m benchmarks.metric_learning`` tunes, trains and evaluates, and writes
``results/metric_learning.json`` and its plot. All arms share network, initial weights, batches,
number of configurations and of steps; what differs is the loss. There are two questions: to rank
the digits 6-9 after learning from 0-5, and to rank new images of 0-5. For each, an arm is tuned by
mean average precision on images of 0-5 that the tuning run did not learn; those it is asked about
are embedded once, at the end.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import product
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from proxy_losses import retrieval_lists, smooth_ap, smooth_ap_defined

from . import harness, metric_figures, report, trainer
from .digits import METRICS, QUESTIONS, Part, Question, evaluate, images, precision, shifted
from .trainer import Arm, Budget, Setup, Training, Weights, each, score_all

PEER = "pytorch_metric_learning"
OURS = "Smooth-AP"
WIDTHS = (64, 128, 32)
PER_CLASS = 10  # rows of each class in a batch

Loss = Callable[[Tensor, Tensor], Tensor]


class Choice(NamedTuple):
    """A configuration."""

    value: float  # of the arm's parameter
    rate: float  # learning rate of Adam
    steps: int


class Effort(NamedTuple):
    """How much is run."""

    steps: tuple[int, ...]  # after which a network is evaluated, ascending
    values: int  # of an arm's parameter
    rates: tuple[float, ...]
    folds: int
    seeds: range


FULL = Effort((100, 200, 300), 3, (1e-3, 2e-3), 3, range(12))
QUICK = Effort((1, 2), 2, (1e-3,), 1, range(2))
TUNING_SEED = 1000  # of the first fold


def ours(tau: float) -> Loss:
    """1 - mean Smooth-AP over the queries that have a positive."""

    def loss(embeddings: Tensor, labels: Tensor) -> Tensor:
        lists = retrieval_lists(embeddings, labels)
        ap = smooth_ap(lists.scores, lists.pos_mask, tau, valid_mask=lists.valid_mask)
        counts = smooth_ap_defined(lists.pos_mask, lists.valid_mask)
        return 1 - ap.sum() / counts.sum().clamp(min=1)

    return loss


def arms() -> list[Arm]:
    """All losses with three values of a parameter of their own; the rest are those of the peer.

    Its SmoothAPLoss equals the formula only for as many classes as rows per class. Here, as its
    documentation allows, it gets 6 classes of 10 rows (4 of 10 in tuning for unseen digits).
    """
    from pytorch_metric_learning import losses

    def arm(name: str, make: Callable[[Any], Loss], parameter: str, *values: float) -> Arm:
        def of(value: float, _: Setup) -> Callable[..., Tensor]:
            loss = make(value)
            return lambda found, labels, *_: loss(found, labels)

        return Arm(name, each(of), (), parameter, values)

    return [
        arm(OURS, ours, "tau", 0.01, 0.03, 0.1),
        arm("peer SmoothAPLoss", losses.SmoothAPLoss, "temperature", 0.01, 0.03, 0.1),
        arm(
            "peer ContrastiveLoss", lambda margin: losses.ContrastiveLoss(neg_margin=margin),
            "neg_margin", 0.3, 0.6, 1.0,
        ),
        arm(
            "peer MultiSimilarityLoss", lambda beta: losses.MultiSimilarityLoss(beta=beta),
            "beta", 10.0, 20.0, 50.0,
        ),
    ]  # fmt: skip


def network(seed: int) -> Weights:
    """As torch initialises it."""
    inputs, hidden, outputs = WIDTHS
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(seed)
        layers = nn.Linear(inputs, hidden), nn.Linear(hidden, outputs)
    return [w for layer in layers for w in (layer.weight.detach().T, layer.bias.detach()[None])]


def batches(part: Part, steps: int, seed: int) -> tuple[Tensor, Tensor]:
    """Rows of all steps: equally many of each class, sorted by class as a peer asks."""
    x, y = images(part)
    rows_of = [(y == digit).nonzero()[:, 0] for digit in part.digits]
    draw = torch.Generator().manual_seed(seed)
    found = []
    for _ in range(steps):
        batch = [rows[torch.randperm(len(rows), generator=draw)[:PER_CLASS]] for rows in rows_of]
        rows = torch.cat(batch)
        found.append((shifted(x[rows], draw), y[rows]))
    made = [torch.cat(tensors) for tensors in zip(*found, strict=True)]
    return made[0], made[1]


def train(
    arm: Arm, parts: Sequence[Part], seeds: Sequence[int], steps: Sequence[int]
) -> Iterator[tuple[int, Weights]]:
    """Networks [seeds, configurations, ...] after each of these steps; each seed has its part."""
    drawn = [batches(part, steps[-1], s) for part, s in zip(parts, seeds, strict=True)]
    rows = trainer.Part(*(torch.stack(tensors) for tensors in zip(*drawn, strict=True)))
    start = [torch.stack(w) for w in zip(*map(network, seeds), strict=True)]
    size = rows.y.shape[1] // steps[-1]
    order = torch.arange(rows.y.shape[1]).view(1, -1, size).expand(len(seeds), -1, -1)
    return Training(rows, arm, start, Budget(steps[-1], batch=size), order).after(steps)


def embed(weights: Weights, seed: int, x: Tensor) -> Tensor:
    """[configurations, rows, outputs] of one seed's networks."""
    return score_all([w[seed : seed + 1] for w in weights], x[None])[0]


def tune(arm: Arm, question: Question, effort: Effort) -> tuple[Choice, list[dict[str, Any]]]:
    """The configuration of the best mean average precision over the folds, and all tried."""
    choices = [*product(arm.values[: effort.values], effort.rates)]
    runs: dict[Choice, list[float]] = {
        Choice(*choice, steps): [] for choice in choices for steps in effort.steps
    }
    values, rates = zip(*choices, strict=True)
    learnt, ranked = zip(*question.folds[: effort.folds], strict=True)
    seeds = range(TUNING_SEED, TUNING_SEED + len(learnt))
    for steps, weights in train(
        arm._replace(values=values, rates=rates), learnt, seeds, effort.steps
    ):
        for fold, part in enumerate(ranked):
            x, y = images(part)
            for choice, found in zip(choices, embed(weights, fold, x), strict=True):
                runs[Choice(*choice, steps)].append(precision(found, y)["mean_average_precision"])
    tried = [
        {**choice._asdict(), "map": sum(found) / len(found), "runs": found}
        for choice, found in runs.items()
    ]
    best = max(tried, key=lambda t: t["map"])
    return Choice(best["value"], best["rate"], best["steps"]), tried


def answer(question: Question, effort: Effort) -> tuple[dict[str, Any], dict[str, Any]]:
    """(how every arm was tuned, every metric of every arm and seed)."""
    x, y = images(question.ranked)
    tuned, results, seeds = {}, {}, effort.seeds
    for arm in arms():
        print(arm.name, file=sys.stderr, flush=True)
        start = time.process_time()
        choice, tried = tune(arm, question, effort)
        middle = time.process_time()
        chosen = arm._replace(values=(choice.value,), rates=(choice.rate,))
        ((_, weights),) = train(chosen, [question.learnt] * len(seeds), seeds, [choice.steps])
        results[arm.name] = [evaluate(embed(weights, k, x)[0], y) for k in range(len(seeds))]
        tuned[arm.name] = {
            "parameter": arm.parameter, "chosen": choice._asdict(), "tried": tried,
            "tuning_cpu_s": round(middle - start, 1),
            "training_cpu_s": round(time.process_time() - middle, 1),
        }  # fmt: skip
    untrained = [[w[None, None] for w in network(seed)] for seed in seeds]
    results["untrained network"] = [evaluate(embed(w, 0, x)[0], y) for w in untrained]
    results["raw pixels"] = [evaluate(x, y)] * len(seeds)
    by_metric = {arm: {m: [r[m] for r in runs] for m in METRICS} for arm, runs in results.items()}
    return tuned, by_metric


def measure(quick: bool) -> report.Written:
    for package in (PEER, "sklearn"):
        if harness.peer(package)[0] is None:
            raise SystemExit(f'{package} is missing: pip install -e ".[bench]"')
    effort = QUICK if quick else FULL
    peers = {p: harness.peer(p)[1] for p in (PEER, "sklearn")}
    written = report.heading("metric_learning", __doc__.splitlines()[0], peers) | {
        "ours": OURS, "quick": quick,
        "protocol": {
            "data": "sklearn load_digits / 16, shifted by up to a pixel in training",
            "questions": {name: question._asdict() for name, question in QUESTIONS.items()},
            "network": WIDTHS, "optimizer": "Adam", "per_class": PER_CLASS,
            "tuning_seed": TUNING_SEED, **effort._asdict(), "seeds": list(effort.seeds),
            "metrics": METRICS, "selected_by": "map",
        },
        "tie": metric_figures.TIE, "tuning": {}, "results": {}, "compared": {},
    }  # fmt: skip
    for name, question in QUESTIONS.items():
        written["tuning"][name], found = answer(question, effort)
        written["results"][name] = found
        written["compared"][name] = metric_figures.compare(found, OURS)
    written["cpu_s"] = round(time.process_time(), 1)
    return written


def main(argv: Sequence[str] | None = None) -> int:
    return report.main("metric_learning", argv, measure, metric_figures.show, metric_figures.draw)


if __name__ == "__main__":
    raise SystemExit(main())
