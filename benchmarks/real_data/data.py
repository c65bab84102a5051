"""Real tables, and splits that keep identical rows on one side."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from ..trainer import Part

SHARES = (0.6, 0.2, 0.2)  # of train, validation and test
CLIP = 10.0  # standard deviations
LARGE, HUGE = 1e-3, 0.1  # shares of a table above which identical rows make such a group
OPENML = {"creditcard": 1597, "mammography": 310, "aps_failure": 41138}  # data ids

Array = npt.NDArray[Any]


class Table(NamedTuple):
    """Rows with a rare class."""

    name: str
    x: Array  # [rows, features] float32, NaN where missing
    y: Array  # [rows] bool
    group: Array  # [rows] int, equal for rows of identical features
    source: str


class Split(NamedTuple):
    """Row numbers, in random order."""

    train: Array
    val: Array
    test: Array


class Stack(NamedTuple):
    """A table, split once per seed; the parts have as many rows for every seed.

    x is standardised by the training rows, y is bool.
    """

    train: Part
    val: Part
    test: Part


def make_table(name: str, x: Array, y: Array, source: str) -> Table:
    """A table; the rarer of the two labels is the positive unless they are 0 and 1."""
    labels = np.unique(y)
    if len(labels) != 2:
        raise SystemExit(f"{name}: expected two labels, got {len(labels)}")
    rare = labels[np.argmin([(y == label).sum() for label in labels])]
    positive = y == (1 if set(labels.tolist()) == {0, 1} else rare)
    x = np.ascontiguousarray(x, np.float32) + np.float32(0)  # -0 becomes 0
    rows = x.view(np.dtype((np.void, x.shape[1] * x.itemsize)))[:, 0]
    group = np.unique(rows, return_inverse=True)[1].reshape(-1)
    return Table(name, x, positive, group, source)


def load(source: str) -> list[Table]:
    """The tables of a folder of npz files with X and y, or, of "openml", those of `OPENML`."""
    if source == "openml":
        return [_download(name, number) for name, number in OPENML.items()]
    paths = sorted(Path(source).glob("*.npz"))
    if not paths:
        raise SystemExit(f"{source} holds no .npz file: give a folder of npz files with X and y")
    tables = []
    for path in paths:
        with np.load(path) as arrays:
            if not {"X", "y"} <= {*arrays}:
                raise SystemExit(f"{path.name} lacks X or y, it has {sorted(arrays)}")
            tables.append(make_table(path.stem, arrays["X"], arrays["y"], path.name))
    return tables


def _download(name: str, number: int) -> Table:
    import warnings

    from sklearn.datasets import fetch_openml

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of retries
            found = fetch_openml(data_id=number, as_frame=False, parser="liac-arff")
    except OSError as error:
        raise SystemExit(
            f"OpenML data {number} ({name}) cannot be fetched: {error}. This needs a network; "
            "without one use --data FOLDER with npz files of X and y."
        ) from error
    return make_table(name, found.data, found.target, f"OpenML data {number}")


def split(table: Table, seed: int) -> Split:
    """60/20/20 of the rows and of the positives, a group of identical rows in one part.

    Large groups fall at random, those too huge for a small part into train; the others then fill
    every part, first those with a positive to its share of the positives, then the rest to its
    share of the rows.
    """
    rng = np.random.default_rng(seed)
    size = np.bincount(table.group)
    positives = np.bincount(table.group, table.y)
    large = size > max(1.0, LARGE * len(table.y))
    part = np.where(large, rng.choice(3, len(size), p=SHARES), -1)
    part[size > HUGE * len(table.y)] = 0
    _fill(part, np.flatnonzero(~large & (positives > 0)), positives, rng)
    _fill(part, np.flatnonzero(~large & (positives == 0)), size, rng)
    of_row = part[table.group]
    return Split(*(rng.permutation(np.flatnonzero(of_row == k)) for k in range(3)))


def _fill(part: Array, members: Array, weight: Array, rng: np.random.Generator) -> None:
    """Give the members to the parts, so that each gets what it lacks of its share of weight."""
    placed = part >= 0
    held = np.bincount(part[placed], weight[placed], 3)
    order = rng.permutation(members)
    ends = np.cumsum(weight[order])
    total = held.sum() + weight[order].sum()
    lacks = np.clip(np.array(SHARES) * total - held, 0.0, None)
    edges = np.cumsum(lacks)[:2] / max(lacks.sum(), 1e-9) * weight[order].sum()
    part[order] = np.searchsorted(edges, ends - weight[order] / 2)


def thin(rows: Array, y: Array, count: int) -> Array:
    """The first `count` of rows in random order, at their rate of positives."""
    positive = y[rows]
    keep = round(count * positive.mean())
    return np.sort(
        np.r_[np.flatnonzero(positive)[:keep], np.flatnonzero(~positive)[: count - keep]]
    )


def stack(table: Table, seeds: Sequence[int], most_train_rows: int | None = None) -> Stack:
    """The splits of all seeds, standardised by their training rows, clipped, missing values 0.

    Parts are thinned to the smallest over the seeds, and training rows to most_train_rows.
    """
    splits = [split(table, seed) for seed in seeds]
    parts = []
    for k in range(3):
        count = min(len(s[k]) for s in splits)
        if k == 0 and most_train_rows:
            count = min(count, most_train_rows)
        parts.append([s[k][thin(s[k], table.y, count)] for s in splits])
    scales = [_scale(table.x[rows]) for rows in parts[0]]
    made = []
    for chosen in parts:
        x = [_standard(table.x[rows], *scale) for rows, scale in zip(chosen, scales, strict=True)]
        y = [torch.from_numpy(table.y[rows]) for rows in chosen]
        made.append(Part(torch.from_numpy(np.stack(x)), torch.stack(y)))
    return Stack(*made)


def _scale(x: Array) -> tuple[Array, Array]:
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # columns without a value
        mean, deviation = np.nanmean(x, 0, np.float64), np.nanstd(x, 0, np.float64)
    return np.asarray(mean), np.where(deviation > 0, deviation, 1.0)


def _standard(x: Array, mean: Array, deviation: Array) -> Array:
    clipped = np.clip((x - mean) / deviation, -CLIP, CLIP)
    return np.nan_to_num(clipped, nan=0.0).astype(np.float32)
