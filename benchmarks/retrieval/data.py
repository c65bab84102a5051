"""Embeddings with classes, and splits of the classes."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

SHARES = (0.6, 0.15, 0.25)  # of the classes: training, validation, test
OVERLAP = SHARES[2] / (SHARES[0] + SHARES[1])  # of two splits' tests, as of rows elsewhere

Array = npt.NDArray[Any]


class Rows(NamedTuple):
    """Embeddings and their classes."""

    x: Array  # [rows, features] float32
    y: Array  # [rows] int


class Cell(NamedTuple):
    """What is done to the labelled part, training and validation alike."""

    noise: float  # share of rows that get the label of another class of that part
    rows: int | None  # most rows of a class; None for all

    @property
    def name(self) -> str:
        """As the tables call it."""
        return f"{100 * self.noise:g} % noise, {self.rows or 'all'} rows a class"


class Split(NamedTuple):
    """Rows of three sets of classes."""

    train: Rows
    held: Rows
    test: Rows


def load(folder: Path) -> dict[str, Rows]:
    """The embeddings there: npz files with x [rows, features] and y [rows]."""
    found = {}
    for path in sorted(folder.glob("*.npz")):
        with np.load(path) as arrays:
            if {"x", "y"} <= {*arrays}:
                found[path.stem] = Rows(arrays["x"].astype(np.float32), arrays["y"].astype(int))
    if not found:
        raise SystemExit(f"{folder} holds no .npz file of embeddings with x and y")
    return found


def made(classes: int = 24, rows: int = 12, width: int = 16) -> dict[str, Rows]:
    """Normal classes whose rows scatter widely in half of the directions."""
    rng = np.random.default_rng(0)
    y = np.repeat(np.arange(classes), rows)
    scatter = np.where(np.arange(width) < width // 2, 2.0, 0.7)
    x = rng.normal(size=(classes, width))[y] + rng.normal(size=(len(y), width)) * scatter
    return {"made": Rows(x.astype(np.float32), y)}


def split(rows: Rows, cell: Cell, seed: int) -> Split:
    """Classes at random into three parts; the same rows for every cell of a seed."""
    rng = np.random.default_rng(seed)
    classes = rng.permutation(np.unique(rows.y))
    ends = np.round(np.cumsum(SHARES[:2]) * len(classes)).astype(int)
    train, held, test = np.split(classes, ends)
    order = rng.permutation(len(rows.y))
    known = order[np.isin(rows.y[order], classes[: ends[1]])]
    known = known[_place(rows.y[known]) < (cell.rows or len(known))]
    y = _noisy(rows.y[known], classes[: ends[1]], cell.noise, rng)
    parts = [np.isin(y, some) for some in (train, held)]
    test_rows = np.flatnonzero(np.isin(rows.y, test))
    return Split(
        *(Rows(rows.x[known[part]], y[part]) for part in parts),
        Rows(rows.x[test_rows], rows.y[test_rows]),
    )


def _place(y: Array) -> Array:
    """How many rows of its class come before each row."""
    order = np.argsort(y, kind="stable")
    first = np.searchsorted(y[order], y[order])
    place = np.empty(len(y), dtype=int)
    place[order] = np.arange(len(y)) - first
    return place


def _noisy(y: Array, classes: Array, share: float, rng: np.random.Generator) -> Array:
    """Labels of which a share, to the row, is that of another class, drawn evenly."""
    wrong = rng.permutation(len(y))[: round(share * len(y))]
    classes = np.sort(classes)
    at = np.searchsorted(classes, y[wrong])
    y = y.copy()
    y[wrong] = classes[(at + rng.integers(1, len(classes), len(wrong))) % len(classes)]
    return y
