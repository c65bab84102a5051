"""What is compared: each arm turns labelled rows into a map of embeddings."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.neighbors import NeighborhoodComponentsAnalysis
from sklearn.preprocessing import normalize
from torch import Tensor

from proxy_losses.integrations._classes import MOST_QUERIES, Affine, Judge, Labelled
from proxy_losses.integrations.sklearn import LinearEmbedder

from .data import Array, Split

OURS = "LinearEmbedder"
PROXY_RATE = 1e-2  # of Adam on the proxies of classes, which start as their package draws them
NCA_ROWS, NCA_STEPS = 600, 20


class Effort(NamedTuple):
    """How much is run."""

    steps: int
    patience: int
    queries: int  # of a test, each of which ranks the whole test part


FULL = Effort(200, 80, 1000)
QUICK = Effort(20, 20, 50)


class Found(NamedTuple):
    """A fitted configuration."""

    value: float  # held-out mean average precision
    embed: Callable[[Array], Array]


class Task(NamedTuple):
    """What an arm is given."""

    split: Split
    effort: Effort
    shrinkage: float  # of the whitening that is best on the validation classes


Results = dict[str, dict[str, Any]]  # of every arm
Fit = Callable[[Any, Task], Found]  # value of the arm's parameter -> what it finds


class Arm(NamedTuple):
    """A method, and the configurations it is given."""

    fit: Fit
    parameter: str
    values: tuple[Any, ...]
    proxy_rate: float | None = None

    def record(self) -> dict[str, Any]:
        """What is tried, in words and numbers."""
        return {k: v for k, v in self._asdict().items() if k != "fit" and v is not None}


class WithLoss(LinearEmbedder):
    """`LinearEmbedder` with a loss of pytorch-metric-learning: the same start, steps, selection."""

    make: Callable[[int, int], torch.nn.Module]  # (classes, width)

    def _steps(self, start: Affine, rows: Labelled, *more: Any) -> Iterator[Tensor]:
        with torch.random.fork_rng(devices=()):
            torch.manual_seed(0)
            self._module = self.make(int(rows.y.max()) + 1, len(start.weight))
        proxies = [*self._module.parameters()]
        self._optimizer = torch.optim.Adam(proxies, lr=PROXY_RATE) if proxies else None
        return super()._steps(start, rows, *more)

    def _loss(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        if self._optimizer is not None:  # the step after the gradient of the call before
            self._optimizer.step()
            self._optimizer.zero_grad()
        return self._module(embeddings, labels)


def embedder(value: Any, task: Task, make: Any = None) -> Found:
    """Our estimator, or it with another loss, from the best whitening or the raw embeddings."""
    model = LinearEmbedder(tau=value) if make is None else WithLoss()
    if make is not None:
        model.make = partial(make, value)
    effort = task.effort
    return validated(
        model.set_params(max_iter=effort.steps, n_iter_no_change=effort.patience),
        task.split, task.shrinkage,
    )  # fmt: skip


def whitened(value: float, task: Task) -> Found:
    return validated(LinearEmbedder(max_iter=0), task.split, value)


def validated(model: LinearEmbedder, split: Split, shrinkage: float) -> Found:
    """Fitted with this shrinkage, or on the raw embeddings where these are better."""
    model.set_params(shrinkages=(shrinkage,), device="cpu", random_state=0)
    model.fit(*split.train, X_val=split.held.x, y_val=split.held.y)
    return Found(model.validation_score_, model.transform)


def lda(value: float, task: Task) -> Found:
    model = LinearDiscriminantAnalysis(solver="eigen", shrinkage=value)
    x, y = task.split.train
    model.fit(normalize(x).astype(np.float64), y)
    return judged(task, lambda rows: normalize(model.transform(normalize(rows))))


def nca(value: float, task: Task) -> Found:
    """From centred unit rows of this norm, on some rows: its time is quadratic in them."""
    train = task.split.train
    mean = normalize(train.x).mean(0)

    def centred(x: Array) -> Array:
        return value * normalize(normalize(x) - mean)

    some = np.random.default_rng(0).permutation(len(train.y))[:NCA_ROWS]
    model = NeighborhoodComponentsAnalysis(init="identity", max_iter=NCA_STEPS, random_state=0)
    model.fit(centred(train.x[some]), train.y[some])
    return judged(task, lambda rows: normalize(model.transform(centred(rows))))


def judged(task: Task, embed: Callable[[Array], Array]) -> Found:
    """With its held-out mean average precision, from the queries that `LinearEmbedder` asks."""
    held = task.split.held
    x = embed(held.x).astype(np.float32)
    rows = Labelled(x, np.unique(held.y, return_inverse=True)[1])
    judge = Judge(rows, torch.device("cpu"), np.random.RandomState(0), MOST_QUERIES)
    return Found(judge(Affine(np.eye(x.shape[1]), np.zeros(x.shape[1]))), embed)


def arms() -> dict[str, Arm]:
    """All. Those trained have two configurations each, the first the default of its package.

    Each of these starts from the best of the same whitenings, or the raw embeddings, as the arm
    that is only whitened does.
    """
    from pytorch_metric_learning import losses

    def peer(make: Callable[[Any, int, int], torch.nn.Module]) -> Fit:
        return partial(embedder, make=make)

    return {
        "raw": Arm(lambda _, task: judged(task, normalize), "", (None,)),
        "whitened": Arm(whitened, "shrinkage", LinearEmbedder().shrinkages),
        OURS: Arm(embedder, "tau", (0.05, 0.1)),
        "MultiSimilarity": Arm(
            peer(lambda beta, *_: losses.MultiSimilarityLoss(beta=beta)), "beta", (50.0, 20.0)
        ),
        "SupCon": Arm(
            peer(lambda tau, *_: losses.SupConLoss(temperature=tau)), "temperature", (0.1, 0.05)
        ),
        "ProxyAnchor": Arm(
            peer(lambda alpha, *sizes: losses.ProxyAnchorLoss(*sizes, alpha=alpha)),
            "alpha", (32.0, 8.0), PROXY_RATE,
        ),
        "normalised softmax": Arm(
            peer(lambda tau, *sizes: losses.NormalizedSoftmaxLoss(*sizes, temperature=tau)),
            "temperature", (0.05, 0.1), PROXY_RATE,
        ),
        "NCA": Arm(nca, "norm of the rows", (3.0, 6.0)),
        "LDA": Arm(lda, "shrinkage", (0.5, 0.9)),
    }  # fmt: skip


def run(split: Split, effort: Effort, before: Results) -> Results:
    """Every arm on the test classes, with its best configuration on the validation classes.

    What was found before is kept.
    """
    task, found = Task(split, effort, 1.0), {}
    for name, arm in arms().items():
        found[name] = before.get(name) or _judge_arm(arm, task)
        if name == "whitened":
            task = task._replace(shrinkage=found[name]["chosen"])
    return found


def _judge_arm(arm: Arm, task: Task) -> dict[str, Any]:
    begin = time.process_time()
    tried = [arm.fit(value, task) for value in arm.values]
    best = max(range(len(tried)), key=lambda k: tried[k].value)
    seconds = time.process_time() - begin
    test = task.split.test
    return {
        **evaluate(tried[best].embed(test.x), test.y, task.effort.queries),
        "chosen": arm.values[best],
        "validation": [round(one.value, 5) for one in tried],
        "cpu_s": round(seconds, 2),
    }


def evaluate(x: Array, y: Array, queries: int) -> dict[str, float]:
    """Mean average precision and recall at 1, of some queries that rank all other rows."""
    x, rng = x.astype(np.float32), np.random.RandomState(0)
    rows = Labelled(x, np.unique(y, return_inverse=True)[1])
    judge = Judge(rows, torch.device("cpu"), rng, queries)
    some, (x, y) = judge.queries, rows.take(np.argsort(rows.y, kind="stable"))
    scores = x[some] @ x.T
    scores[np.arange(len(some)), some] = -np.inf
    return {
        "map": round(judge(Affine(np.eye(x.shape[1]), np.zeros(x.shape[1]))), 5),
        "recall_at_1": round(float((y[scores.argmax(1)] == y[some]).mean()), 5),
    }


def step_times(repeats: int, width: int = 384, sizes: tuple[int, ...] = (128, 256, 512)) -> Any:
    """Arm -> rows of a batch -> median CPU milliseconds of a loss with its gradient."""
    found: dict[str, dict[str, float]] = {}
    for name, arm in arms().items():
        if arm.fit is not embedder and getattr(arm.fit, "func", None) is not embedder:
            continue
        for rows in sizes:
            x = torch.randn(rows, width, generator=torch.Generator().manual_seed(0))
            y = torch.arange(rows) // 8
            x.requires_grad_()
            if arm.fit is embedder:
                loss = LinearEmbedder(tau=arm.values[0])._loss
            else:
                loss = arm.fit.keywords["make"](arm.values[0], rows // 8, width)
            times = []
            for _ in range(repeats):
                begin = time.thread_time()
                loss(x, y).backward()
                times.append(1e3 * (time.thread_time() - begin))
            found.setdefault(name, {})[str(rows)] = round(float(np.median(times)), 2)
    return found
