"""What `LinearEmbedder` is made of: rows by class, whitening, batches, the held-out metric."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from sklearn.preprocessing import normalize

MOST_QUERIES = 512  # of a validation; all rows are ranked for each
_QUERIES = 256  # that are ranked together
_FEWEST = 4  # classes of two rows or more, of which some can be held out whole

Array = npt.NDArray[Any]
Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.intp]


class Labelled(NamedTuple):
    """Unit rows and their classes."""

    x: Array  # [rows, features]
    y: Ints  # [rows]

    def take(self, index: npt.NDArray[Any]) -> Labelled:
        return Labelled(self.x[index], self.y[index])


class Affine(NamedTuple):
    """``weight @ (x - mean)`` of a unit row x."""

    weight: Floats  # [components, features]
    mean: Floats  # [features]

    def of(self, x: Array) -> Array:
        mapped: Array = (x - self.mean.astype(x.dtype)) @ self.weight.T.astype(x.dtype)
        return mapped


def unit_rows(x: Array) -> Array:
    """Rows divided by their norms, of which no square overflows or vanishes; 0 stays 0."""
    _, exponent = np.frexp(np.abs(x).max(axis=1, keepdims=True))
    unit: Array = normalize(np.ldexp(x, -exponent), copy=False)
    return unit


class Batches:
    """Rows of some classes, drawn evenly among the classes of two rows or more."""

    def __init__(self, y: Ints, classes: int, rows: int, rng: np.random.RandomState) -> None:
        order = np.argsort(y, kind="stable")
        members = np.split(order, np.flatnonzero(np.diff(y[order])) + 1)
        self.members = [rows for rows in members if len(rows) > 1]
        self.classes, self.rows, self.rng = min(classes, len(self.members)), rows, rng

    def draw(self) -> Ints:
        drawn = self.rng.permutation(len(self.members))[: self.classes]
        return np.concatenate(
            [self.rng.permutation(self.members[k])[: self.rows] for k in drawn.tolist()]
        )


class Judge:
    """Mean average precision of labelled rows under a map, every row ranking the others.

    NaN for a map that is not finite.
    """

    def __init__(
        self,
        rows: Labelled,
        device: torch.device,
        rng: np.random.RandomState | None = None,
        most: int | None = None,
    ) -> None:
        """Of more queries than `most`, as many are drawn by rng."""
        x, y = rows.take(np.argsort(rows.y, kind="stable"))
        queries = np.flatnonzero(np.bincount(y)[y] > 1)
        if not len(queries):
            raise ValueError("expected rows to rank of which two share a class, got none")
        if rng is not None and most is not None and len(queries) > most:
            queries = np.sort(rng.permutation(queries)[:most])
        self.x, self.queries = torch.from_numpy(x).to(device), queries
        first, last = (np.searchsorted(y, y[queries], side) for side in ("left", "right"))
        self.spans = [*zip(first.tolist(), last.tolist(), strict=True)]  # rows of its class

    def __call__(self, affine: Affine) -> float:
        weight, mean = (torch.from_numpy(of).to(self.x) for of in affine)
        z = torch.nn.functional.normalize((self.x - mean) @ weight.T)
        if not z.isfinite().all():  # all would be equal, which may be better than chance
            return float("nan")
        values: list[float] = []
        for some in np.split(self.queries, range(_QUERIES, len(self.queries), _QUERIES)):
            found = (z[torch.from_numpy(some).to(z.device)] @ z.T).cpu().numpy()
            found[np.arange(len(some)), some] = -np.inf  # the query itself comes last
            spans = self.spans[len(values) :]
            values += map(_precision, found, np.sort(found), spans)
        return float(np.mean(values))


def _precision(scores: Array, ascending: Array, span: tuple[int, int]) -> float:
    """Average precision of rows first to last, as scikit-learn's: ties share the last place.

    Of the scores one is -inf, and that is of one of these rows, which does not count.
    """
    mine = np.sort(scores[slice(*span)])[1:]
    found = len(mine) - np.searchsorted(mine, mine)
    return float(np.mean(found / (len(scores) - np.searchsorted(ascending, mine))))


def whitenings(rows: Labelled, shrinkages: Sequence[float]) -> list[tuple[float, Affine]]:
    """(a, ((1 - a) S + a I)^(-1/2) of centred rows), S within classes and of mean eigenvalue 1."""
    x = rows.x.astype(np.float64)
    sizes = np.bincount(rows.y)
    sums = np.zeros((len(sizes), x.shape[1]))
    np.add.at(sums, rows.y, x)
    apart = x - (sums / sizes.clip(min=1)[:, None])[rows.y]
    values, vectors = np.linalg.eigh(apart.T @ apart)
    average = values.mean()
    rounding = max(np.finfo(rows.x.dtype).eps, sizes.max() * np.finfo(np.float64).eps)
    if not values.sum() > len(x) * rounding**2:  # equal rows in every class
        return []
    values, mean = values.clip(min=0.0) / average, x.mean(0)
    return [
        (a, Affine((vectors * ((1.0 - a) * values + a) ** -0.5) @ vectors.T, mean))
        for a in shrinkages
    ]


def leading(affine: Affine, x: Array, width: int) -> Affine:
    """The map, or onto the directions in which its unit rows spread most about the origin."""
    if width == len(affine.weight):
        return affine
    mapped = unit_rows(affine.of(x.astype(np.float64)))
    vectors = np.linalg.eigh(mapped.T @ mapped)[1][:, : -width - 1 : -1]
    return affine._replace(weight=vectors.T @ affine.weight)


def hold_out(
    rows: Labelled, fraction: float, rng: np.random.RandomState
) -> tuple[Labelled, Labelled]:
    """Rows to train on and rows of other classes to validate on; of few classes, other rows.

    At least two classes of two rows or more are on either side. Classes of one row are shared
    out in the same proportion.
    """
    sizes = np.bincount(rows.y)
    several, single = np.flatnonzero(sizes > 1), np.flatnonzero(sizes == 1)
    if len(several) < _FEWEST:
        return _hold_out_rows(rows, fraction, rng)
    count = int(np.clip(round(fraction * len(several)), 2, len(several) - 2))
    held = np.zeros(len(sizes), dtype=bool)
    held[rng.permutation(several)[:count]] = True
    held[rng.permutation(single)[: round(fraction * len(single))]] = True
    side = held[rows.y]
    return rows.take(~side), rows.take(side)


def _hold_out_rows(
    rows: Labelled, fraction: float, rng: np.random.RandomState
) -> tuple[Labelled, Labelled]:
    """The fraction of each class of four rows or more, two at least on either side.

    All on both sides where less than two classes are that large: one has nothing to be told from.
    """
    side = np.zeros(len(rows.y), dtype=bool)
    for label, size in enumerate(np.bincount(rows.y).tolist()):
        if size >= 4:
            count = int(np.clip(round(fraction * size), 2, size - 2))
            side[rng.permutation(np.flatnonzero(rows.y == label))[:count]] = True
    alike = len(np.unique(rows.y[side])) < 2
    warnings.warn(
        f"fewer than {_FEWEST} classes of two rows or more: "
        + ("all rows are used for training and for validation alike" if alike
           else "rows are held out instead of classes"),
        UserWarning,
        stacklevel=2,
    )  # fmt: skip
    return (rows, rows) if alike else (rows.take(~side), rows.take(side))
