"""Trains an embedding of digits with several losses, and ranks digits it has not seen.

``python -m benchmarks.metric_learning`` tunes, trains and evaluates, and writes
``results/metric_learning.json`` and its plot. All arms share network, initial weights, batches,
number of configurations and of steps; what differs is the loss. They learn from the first
60 % of the images of the digits 0-5. A configuration is judged by the mean average precision on two
of these digits after learning the other four. Then each arm learns all six and is asked two
questions: to rank the unseen digits 6-9, and the remaining images of the digits 0-5.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import cache, partial
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from proxy_losses import retrieval_lists, smooth_ap, smooth_ap_counts

from . import harness, report

PEER = "pytorch_metric_learning"
OURS = "Smooth-AP"
RATES = (1e-3, 2e-3)
WIDTHS = (64, 128, 32)
PER_CLASS = 10  # rows of each class in a batch
LEARNT, SHARE = (0, 1, 2, 3, 4, 5), 0.6  # digits, share of their images
FOLDS = (((2, 3, 4, 5), (0, 1)), ((0, 1, 4, 5), (2, 3)), ((0, 1, 2, 3), (4, 5)))  # learnt, judged
TUNING_SEEDS = (1000, 1001)
QUESTIONS = {  # digits, from and to which share of their images
    "unseen digits": ((6, 7, 8, 9), 0.0, 1.0),
    "new images of the digits learnt": (LEARNT, SHARE, 1.0),
}
METRICS = {"map": "mAP", "map_at_r": "mAP@R", "recall_at_1": "recall@1", "recall_at_5": "recall@5"}

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
    tuning_seeds: tuple[int, ...]
    seeds: range


FULL = Budget((100, 200, 300), 3, RATES, TUNING_SEEDS, range(16))
QUICK = Budget((1, 2), 2, (1e-3,), (1000,), range(2))


def ours(tau: float) -> Loss:
    """1 - mean Smooth-AP over the queries that have a positive."""

    def loss(embeddings: Tensor, labels: Tensor) -> Tensor:
        lists = retrieval_lists(embeddings, labels)
        ap = smooth_ap(lists.scores, lists.pos_mask, tau, valid_mask=lists.valid_mask)
        counts = smooth_ap_counts(lists.pos_mask, lists.valid_mask)
        return 1 - ap.sum() / counts.sum().clamp(min=1)

    return loss


def arms() -> dict[str, Arm]:
    """All losses; the rest are those of the peer."""
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


@cache
def digits(
    classes: tuple[int, ...], first: float = 0.0, last: float = SHARE
) -> tuple[Tensor, Tensor]:
    """Images [N, 64] in [0, 1] and labels [N], sorted by class; a range of each class's rows."""
    from sklearn.datasets import load_digits

    x, y = (torch.from_numpy(a) for a in load_digits(return_X_y=True))
    rows_of = [(y == c).nonzero()[:, 0] for c in classes]
    rows = torch.cat([rows[int(first * len(rows)) : int(last * len(rows))] for rows in rows_of])
    return x[rows].float() / 16, y[rows]


def shifted(x: Tensor, draw: torch.Generator) -> Tensor:
    """Every image moved by up to one pixel each way."""
    padded = nn.functional.pad(x.view(-1, 8, 8), (1, 1, 1, 1))
    at = torch.randint(0, 3, (2, len(x), 1), generator=draw) + torch.arange(8)
    image = torch.arange(len(x))[:, None, None]
    return padded[image, at[0, :, :, None], at[1, :, None, :]].view(-1, 64)


def network(seed: int) -> nn.Module:
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(seed)
        inputs, hidden, outputs = WIDTHS
        return nn.Sequential(nn.Linear(inputs, hidden), nn.ReLU(), nn.Linear(hidden, outputs))


def evaluate(embeddings: Tensor, labels: Tensor) -> dict[str, float]:
    """All metrics, every row ranking all others by cosine similarity."""
    from sklearn.neighbors import NearestNeighbors

    found = precision(embeddings, labels, "mean_average_precision_at_r", "precision_at_1")
    near = NearestNeighbors(n_neighbors=5, metric="cosine").fit(embeddings.numpy())
    hit = labels[torch.from_numpy(near.kneighbors(return_distance=False))] == labels[:, None]
    return {
        "map": found["mean_average_precision"],
        "map_at_r": found["mean_average_precision_at_r"],
        "recall_at_1": found["precision_at_1"],
        "recall_at_5": hit.any(1).double().mean().item(),
    }


def precision(embeddings: Tensor, labels: Tensor, *more: str) -> dict[str, float]:
    """Mean average precision, and more of the peer's metrics."""
    from pytorch_metric_learning.distances import CosineSimilarity
    from pytorch_metric_learning.utils.accuracy_calculator import AccuracyCalculator
    from pytorch_metric_learning.utils.inference import CustomKNN

    calculator = AccuracyCalculator(
        include=("mean_average_precision", *more),
        knn_func=CustomKNN(CosineSimilarity()),
        device=torch.device("cpu"),
    )
    found: dict[str, float] = calculator.get_accuracy(embeddings, labels)
    return found


def train(
    loss: Loss, rate: float, steps: Sequence[int], seed: int, classes: tuple[int, ...]
) -> Iterator[tuple[int, nn.Module]]:
    """Batches of equally many rows of each class; the network after each of these steps."""
    x, y = digits(classes)
    rows_of = [(y == c).nonzero()[:, 0] for c in classes]
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


def tune(arm: Arm, budget: Budget) -> tuple[Choice, list[dict[str, Any]]]:
    """The configuration of the best mean average precision on held-out classes, and all tried."""
    tried = []
    for value, rate in product(arm.values[: budget.values], budget.rates):
        runs: dict[int, list[float]] = {steps: [] for steps in budget.steps}
        for (learnt, judged), seed in product(FOLDS, budget.tuning_seeds):
            x, y = digits(judged)
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


def run(budget: Budget) -> dict[str, Any]:
    questions = {name: digits(*which) for name, which in QUESTIONS.items()}
    results: dict[str, dict[str, list[dict[str, float]]]] = {name: {} for name in questions}

    def ask(arm: str, embeds: Callable[[Tensor], Tensor]) -> None:
        for name, (x, y) in questions.items():
            results[name].setdefault(arm, []).append(evaluate(embeds(x), y))

    tuned = {}
    for name, arm in arms().items():
        print(name, file=sys.stderr, flush=True)
        start = time.process_time()
        choice, tried = tune(arm, budget)
        middle = time.process_time()
        loss = arm.make(choice.value)
        for seed in budget.seeds:
            for _, net in train(loss, choice.rate, (choice.steps,), seed, LEARNT):
                ask(name, partial(embed, net))
        tuned[name] = {
            "parameter": arm.parameter, "chosen": choice._asdict(), "tried": tried,
            "tuning_cpu_s": round(middle - start, 1),
            "training_cpu_s": round(time.process_time() - middle, 1),
        }  # fmt: skip
    for seed in budget.seeds:
        ask("untrained network", partial(embed, network(seed)))
        ask("raw pixels", lambda x: x)
    by_metric = {
        question: {arm: {m: [r[m] for r in runs] for m in METRICS} for arm, runs in found.items()}
        for question, found in results.items()
    }
    return {"tuning": tuned, "results": by_metric}


def main(argv: Sequence[str] | None = None) -> int:
    options = argparse.ArgumentParser(prog="python -m benchmarks.metric_learning")
    options.add_argument("--quick", action="store_true", help="few steps, to see that it works")
    options.add_argument("--plot", action="store_true", help="draw the file, train nothing")
    options.add_argument("--out", type=Path, help="JSON file; without it, --quick writes none")
    args = options.parse_args(argv)
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
    commit, dirty = report.checkout()
    written = {
        "suite": "metric_learning", "about": __doc__.splitlines()[0], "ours": OURS,
        "quick": args.quick, "date": report.now(), "commit": commit, "dirty": dirty,
        "versions": report.versions() | {p: harness.peer(p)[1] for p in (PEER, "sklearn")},
        "machine": report.machine(1),
        "protocol": {
            "data": "sklearn load_digits / 16, shifted by up to a pixel in training",
            "learnt": LEARNT, "share": SHARE, "questions": QUESTIONS,
            "folds": FOLDS, "network": WIDTHS, "optimizer": "Adam", "per_class": PER_CLASS,
            "steps": budget.steps, "rates": budget.rates, "tuning_seeds": budget.tuning_seeds,
            "seeds": list(budget.seeds), "metrics": METRICS, "selected_by": "map",
        },
    }  # fmt: skip
    written |= run(budget)
    written["tie"] = metric_figures.TIE
    written["compared"] = {
        question: metric_figures.compare(found, OURS)
        for question, found in written["results"].items()
    }
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
