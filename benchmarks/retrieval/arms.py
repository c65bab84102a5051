"""What is compared: each arm turns labelled rows into a map of embeddings."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.neighbors import NeighborhoodComponentsAnalysis
from sklearn.preprocessing import normalize
from torch import Tensor

from proxy_losses.integrations._embedder import Affine, Labelled, _Judge
from proxy_losses.integrations.sklearn import LinearEmbedder

from .data import Array, Rows, Split

OURS = "LinearEmbedder"
PROXY_RATE = 1e-3  # of Adam on proxies of classes, which start at the means of the classes
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


Fit = Callable[[Any, Split, Effort], Found]  # value of the arm's parameter -> what it finds


class Arm(NamedTuple):
    """A method, and the configurations it is given."""

    fit: Fit
    parameter: str
    values: tuple[Any, ...]


class WithLoss(LinearEmbedder):
    """`LinearEmbedder` with a loss of pytorch-metric-learning: the same start, steps, selection."""

    make: Callable[[int, int], torch.nn.Module]  # (classes, width)

    def _ascend(self, value: float, start: Affine, train: Labelled, *more: Any) -> Any:
        self._module = self.make(int(train.y.max()) + 1, len(start.weight))
        self._optimizer = None
        proxies = [*self._module.parameters()]
        if proxies:
            means = _means(normalize(start.of(train.x)), train.y)
            with torch.no_grad():  # [classes, width] or its transpose
                (proxy,) = proxies
                proxy.copy_(torch.from_numpy(means if proxy.shape == means.shape else means.T))
            self._optimizer = torch.optim.Adam(proxies, lr=PROXY_RATE)
        return super()._ascend(value, start, train, *more)

    def _loss(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        if self._optimizer is not None:  # the step after the gradient of the call before
            self._optimizer.step()
            self._optimizer.zero_grad()
        return self._module(embeddings, labels)


def _means(x: Array, y: Array) -> Array:
    return np.stack([x[y == label].mean(0) for label in range(y.max() + 1)])


def embedder(value: Any, split: Split, effort: Effort, make: Any = None, **options: Any) -> Found:
    """Our estimator, or it with another loss."""
    model = LinearEmbedder() if make is None else WithLoss()
    if make is None:
        options = {"tau": value, **options}
    else:
        model.make = partial(make, value)
    model.set_params(
        random_state=0, device="cpu", max_iter=effort.steps, n_iter_no_change=effort.patience,
        **options,
    )  # fmt: skip
    model.fit(*split.train, X_val=split.held.x, y_val=split.held.y)
    return Found(model.validation_score_, model.transform)


def whitened(value: float, split: Split, effort: Effort) -> Found:
    model = LinearEmbedder(shrinkages=(value,), max_iter=0, device="cpu", random_state=0)
    model.fit(*split.train, X_val=split.held.x, y_val=split.held.y)
    return Found(model.validation_score_, model.transform)


def lda(value: float, split: Split, effort: Effort) -> Found:
    model = LinearDiscriminantAnalysis(solver="eigen", shrinkage=value)
    x = normalize(split.train.x).astype(np.float64)
    model.fit(x, split.train.y)
    return judged(split.held, lambda rows: normalize(model.transform(normalize(rows))))


def nca(value: float, split: Split, effort: Effort) -> Found:
    """From centred unit rows of this norm, on some rows: its time is quadratic in them."""
    mean = normalize(split.train.x).mean(0)

    def centred(x: Array) -> Array:
        return value * normalize(normalize(x) - mean)

    some = np.random.default_rng(0).permutation(len(split.train.y))[:NCA_ROWS]
    model = NeighborhoodComponentsAnalysis(init="identity", max_iter=NCA_STEPS, random_state=0)
    model.fit(centred(split.train.x[some]), split.train.y[some])
    return judged(split.held, lambda rows: normalize(model.transform(centred(rows))))


def judged(held: Rows, embed: Callable[[Array], Array]) -> Found:
    """With its held-out mean average precision, from the queries that `LinearEmbedder` asks."""
    x = embed(held.x).astype(np.float32)
    same = Affine(np.eye(x.shape[1]), np.zeros(x.shape[1]))
    y = np.unique(held.y, return_inverse=True)[1]
    rng = np.random.RandomState(0)
    return Found(_Judge(Labelled(x, y), rng, torch.device("cpu"))(same), embed)


def arms() -> dict[str, Arm]:
    """All. Those trained have two configurations each, the first the default of its package.

    Each of these starts from the best of the same whitenings, or the raw embeddings, as the arm
    that is only whitened does.
    """
    from pytorch_metric_learning import losses

    def peer(make: Callable[[Any, int, int], torch.nn.Module]) -> Fit:
        return partial(embedder, make=make)

    return {
        "raw": Arm(lambda _, split, effort: judged(split.held, normalize), "", (None,)),
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
            "alpha", (32.0, 16.0),
        ),
        "normalised softmax": Arm(
            peer(lambda tau, *sizes: losses.NormalizedSoftmaxLoss(*sizes, temperature=tau)),
            "temperature", (0.05, 0.1),
        ),
        "NCA": Arm(nca, "norm of the rows", (3.0, 6.0)),
        "LDA": Arm(lda, "shrinkage", (0.5, 0.9)),
    }  # fmt: skip


def choose(arm: Arm, split: Split, effort: Effort) -> dict[str, Any]:
    """The configuration of the best held-out mean average precision, on the test classes."""
    begin = time.process_time()
    tried = [arm.fit(value, split, effort) for value in arm.values]
    best = max(range(len(tried)), key=lambda k: tried[k].value)
    seconds = time.process_time() - begin
    return {
        **evaluate(tried[best].embed(split.test.x), split.test.y, effort.queries),
        "chosen": arm.values[best],
        "validation": [round(found.value, 5) for found in tried],
        "cpu_s": round(seconds, 2),
    }


def evaluate(x: Array, y: Array, queries: int) -> dict[str, float]:
    """Mean average precision and recall at 1, of some queries that rank all other rows."""
    some = np.random.default_rng(0).permutation(len(y))[:queries]
    y = np.unique(y, return_inverse=True)[1]
    same = Affine(np.eye(x.shape[1]), np.zeros(x.shape[1]))
    judge = _Judge(Labelled(x, y), None, torch.device("cpu"))
    judge.queries = some
    scores = x[some] @ x.T
    scores[np.arange(len(some)), some] = -np.inf
    return {
        "map": round(judge(same), 5),
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
