"""Small images of digits to learn an embedding from, and how well they are ranked by it."""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor, nn

METRICS = {"map": "mAP", "map_at_r": "mAP@R", "recall_at_1": "recall@1", "recall_at_5": "recall@5"}


class Part(NamedTuple):
    """Images of some digits."""

    digits: tuple[int, ...]
    first: float = 0.0  # share of each digit's images, in the order of the data set
    last: float = 1.0


class Question(NamedTuple):
    """What is learnt and what is ranked."""

    folds: tuple[tuple[Part, Part], ...]  # of tuning: learnt, ranked; each has its own seed
    learnt: Part
    ranked: Part


SIX = (0, 1, 2, 3, 4, 5)
QUESTIONS = {
    "unseen digits": Question(
        tuple(
            (Part(tuple(d for d in SIX if d not in out)), Part(out))
            for out in ((0, 1), (2, 3), (4, 5))
        ),
        Part(SIX),
        Part((6, 7, 8, 9)),
    ),
    "new images": Question(
        ((Part(SIX, 0.0, 0.4), Part(SIX, 0.4, 0.6)),) * 3,
        Part(SIX, 0.0, 0.6),
        Part(SIX, 0.6, 1.0),
    ),
}


@cache
def images(part: Part) -> tuple[Tensor, Tensor]:
    """Pixels [N, 64] in [0, 1] and labels [N], sorted by label."""
    from sklearn.datasets import load_digits

    x, y = (torch.from_numpy(a) for a in load_digits(return_X_y=True))
    rows_of = [(y == digit).nonzero()[:, 0] for digit in part.digits]
    rows = torch.cat(
        [rows[int(part.first * len(rows)) : int(part.last * len(rows))] for rows in rows_of]
    )
    return x[rows].float() / 16, y[rows]


def shifted(x: Tensor, draw: torch.Generator) -> Tensor:
    """Every image moved by up to one pixel each way."""
    padded = nn.functional.pad(x.view(-1, 8, 8), (1, 1, 1, 1))
    at = torch.randint(0, 3, (2, len(x), 1), generator=draw) + torch.arange(8)
    image = torch.arange(len(x))[:, None, None]
    return padded[image, at[0, :, :, None], at[1, :, None, :]].view(-1, 64)


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
