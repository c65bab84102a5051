"""Do your embeddings find rows of the same class, also of classes that nobody labelled?

This fits linear maps of embeddings on the rows of some classes, and asks every row of other classes
for its like: R@1 is how often the nearest row is of its class, mAP the mean average precision of
the rows ranked by cosine similarity. Compared are the raw embeddings; LinearEmbedder's whitening
within classes, a closed form; LinearEmbedder, which goes on from there with Smooth-AP; and the same
start and steps in a plain loop with RetrievalLoss, and with a contrastive loss (SupCon). All of it
is done with the given labels, and with a share of them drawn at random.

Without flags the embeddings are made on the spot. With --data FILE they are yours: an .npz with x
[rows, width], from any frozen encoder, and y [rows], the class of each. What to expect: whitening
gains over the raw embeddings, and tuning over whitening. With clean labels the two losses are
mostly alike; with wrong ones RetrievalLoss loses less on the made embeddings.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Sequence
from functools import partial
from itertools import product
from typing import Any

import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure
from sklearn.model_selection import train_test_split
from sklearn.neighbors import NearestNeighbors
from sklearn.preprocessing import normalize
from sklearn.utils import check_X_y
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from proxy_losses import RetrievalLoss
from proxy_losses.integrations.sklearn import LinearEmbedder

from ._tables import Array, Rows, read
from ._verdict import gain_of

CLASSES, ROWS = 16, 8  # of a batch
STEPS = 20  # of an epoch: from one validation to the next
TEMPERATURES = (0.1, 0.2)  # that either loss is tuned with, to keep the better
MADE = 60, 24, 64  # classes, rows of each, width
ARMS = ["raw", "whitened", "contrastive loss", "RetrievalLoss", "LinearEmbedder"]
PAIRS = [(4, 0), (4, 1), (3, 2)]  # of these, to compare


def made(seed: int) -> Rows:
    """Classes that differ on few directions, among others that vary a lot within every class."""
    classes, rows, width = MADE
    rng = np.random.default_rng(seed)
    y = np.repeat(np.arange(classes), rows)
    centres = rng.normal(size=(classes, width)) * np.r_[np.ones(16), np.full(width - 16, 0.2)]
    within = np.r_[np.full(16, 0.8), np.linspace(2.0, 0.2, width - 16)]
    spread = rng.gamma(2.0, 0.5, size=(len(y), 1))  # some rows lie far out
    x = centres[y] + spread * within * rng.normal(size=(len(y), width))
    return Rows((x @ np.linalg.qr(rng.normal(size=(width, width)))[0]).astype(np.float32), y)


def load(data: str) -> Rows:
    """The embeddings of a file, with classes numbered from 0."""
    if not data.lower().endswith(".npz"):
        raise ValueError(f"{data} is not a file that ends in .npz, with embeddings x and classes y")
    x, y = check_X_y(*read(data, "y"), dtype=np.float32)
    return Rows(x, np.unique(y, return_inverse=True)[1])


def split_classes(rows: Rows, seed: int) -> list[Rows]:
    """Rows to learn from, to select by, and to be judged on; no class is in two of them."""
    usable = np.flatnonzero(np.bincount(rows.y) > 1)
    if len(usable) < 10:
        raise ValueError(
            f"there are {len(usable)} classes of two rows or more: at least 10 are needed, to "
            "learn from some and to be judged on others"
        )
    learnt, others = train_test_split(usable, train_size=0.4, random_state=seed)
    held = max(2, round(0.15 * len(usable)))
    classes = [learnt, *train_test_split(others, train_size=held, random_state=seed)]
    parts = [np.isin(rows.y, part) for part in classes]
    return [Rows(rows.x[part], rows.y[part]) for part in parts]


def with_noise(rows: Rows, share: float, rng: np.random.Generator) -> Rows:
    """A share of the labels drawn anew, at the rate of the classes."""
    wrong = rng.random(len(rows.y)) < share
    return rows._replace(y=np.where(wrong, rng.choice(rows.y, len(rows.y)), rows.y))


def contrastive(embeddings: Tensor, labels: Tensor, temperature: float) -> Tensor:
    """Supervised contrastive loss (Khosla et al., 2020): each positive against all other rows."""
    z = F.normalize(embeddings)
    logits = (z @ z.T / temperature).fill_diagonal_(-1e9)  # no row against itself
    same = (labels[:, None] == labels).to(z.dtype).fill_diagonal_(0)
    able = same.any(1)
    return F.cross_entropy(logits[able], same[able] / same[able].sum(1, keepdim=True))


def tune(
    start: LinearEmbedder, losses: Sequence[Any], train: Rows, held: Rows, steps: int, seed: int
) -> LinearEmbedder:
    """The best map, by mAP on the held-out classes, on the way of Adam from the whitened one."""
    x, y = torch.from_numpy(normalize(train.x) - start.mean_), torch.from_numpy(train.y)
    members = [np.flatnonzero(train.y == k) for k in np.unique(train.y)]
    best, reached = start, start.score(*held)
    for loss_fn in losses:
        weight = torch.from_numpy(start.components_.copy()).requires_grad_()
        optimizer = torch.optim.Adam([weight], lr=start.learning_rate / x.shape[1] ** 0.5)
        rng = np.random.default_rng(seed)
        for step in range(1, steps + 1):
            drawn = rng.permutation(len(members))[:CLASSES]
            rows = np.concatenate([rng.permutation(members[k])[:ROWS] for k in drawn])
            loss = loss_fn(x[rows] @ weight.T, y[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if step % STEPS == 0:
                now = copy.copy(start)
                now.components_ = weight.detach().numpy().copy()
                if (score := now.score(*held)) > reached:
                    best, reached = now, score
    return best


def judge(model: LinearEmbedder, test: Rows) -> tuple[float, float]:
    """R@1 and mAP in points."""
    z = model.transform(test.x)
    near = NearestNeighbors(n_neighbors=1).fit(z).kneighbors(return_distance=False)[:, 0]
    return 100 * float((test.y[near] == test.y).mean()), 100 * model.score(*test)


def compare(parts: Sequence[Rows], noise: float, epochs: int, seed: int) -> Array:
    """R@1 and mAP [arms, 2] on the unseen classes, in the order of `ARMS`."""
    rng = np.random.default_rng(seed)
    train, held = (with_noise(part, noise, rng) for part in parts[:2])

    def embedder(**settings: Any) -> LinearEmbedder:
        model = LinearEmbedder(random_state=seed, device="cpu", **settings)
        model.fit(*train, X_val=held.x, y_val=held.y)
        return model

    whitened = embedder(max_iter=0)
    ours = [RetrievalLoss(temperature=tau) for tau in TEMPERATURES]
    theirs = [partial(contrastive, temperature=tau) for tau in TEMPERATURES]
    models = [
        embedder(max_iter=0, shrinkages=()),
        whitened,
        tune(whitened, theirs, train, held, epochs * STEPS, seed),
        tune(whitened, ours, train, held, epochs * STEPS, seed),
        embedder(max_iter=epochs * STEPS, n_iter_no_change=None),
    ]
    return np.array([judge(model, parts[2]) for model in models])


def run(args: argparse.Namespace) -> Array:
    """Tune, print, draw; returns [seeds, labels as given or noisy, arms, R@1 or mAP]."""
    rows = load(args.data) if args.data else None
    epochs = min(args.total_epochs, args.most_epochs)
    first = split_classes(rows or made(args.seed), args.seed)
    sizes = [f"{len(np.unique(part.y))} classes ({len(part.y):,} rows)" for part in first]
    print("Learnt from {}, selected by {}, judged on {}".format(*sizes))
    labels = ["labels as given", f"{100 * args.noise:g} % of labels random"]
    found = []
    seeds = range(args.seed, args.seed + args.seeds)
    for seed in tqdm(seeds, "seeds", disable=None, leave=False):
        parts = split_classes(rows or made(seed), seed)
        found.append([compare(parts, noise, epochs, seed) for noise in (0.0, args.noise)])
    values: Array = np.array(found)
    columns = pd.MultiIndex.from_product([labels, ["R@1", "mAP"]])
    table = pd.DataFrame(np.hstack([*values.mean(0)]), ARMS, columns)
    print(f"\nOn unseen classes, x 100\n{table.to_string(float_format='%.2f')}\n")
    overlap = len(first[2].y) / len(first[0].y) if rows else 0.0
    for at, (ours, theirs) in product((0, 1), PAIRS):
        apart = values[:, at, ours, 1] - values[:, at, theirs, 1]
        gain = gain_of(apart.tolist(), overlap)
        print(f"{labels[at]}: {ARMS[ours]} - {ARMS[theirs]}: mAP {gain}: {gain.verdict}")
    print("(95 % intervals over the seeds. A tie: these cannot tell the two apart.)")
    figure = Figure(figsize=(11, 4.4), dpi=130, layout="constrained")
    for ax, metric in zip(figure.subplots(1, 2), ("mAP", "R@1"), strict=True):
        ax.plot(table.xs(metric, axis=1, level=1), ARMS, "o", ms=9, label=labels)
        ax.invert_yaxis()
        ax.set_xlabel(f"{metric} x 100 on unseen classes, mean over seeds ({args.seeds})")
        ax.grid(axis="x", alpha=0.5)
    ax.legend(loc="lower left")
    figure.savefig(args.out, format="png")
    return values
