"""Rows to learn from: made on the spot, bundled with scikit-learn, or a file."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path
from textwrap import shorten
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pandas as pd
from sklearn.datasets import load_digits, make_classification
from sklearn.model_selection import train_test_split
from sklearn.preprocessing import StandardScaler

from ._verdict import OVERLAP

Array = npt.NDArray[Any]
MADE_ROWS = (12_800, 20_000, 40_000)  # of train, validation and test


class Rows(NamedTuple):
    """A table, or one side of its split."""

    x: Array  # [rows, columns] floating
    y: Array  # [rows] int64, 0 .. classes - 1; of two classes 1 is the positive


def splits_of(args: argparse.Namespace) -> tuple[dict[str, Callable[[int], list[Rows]]], float]:
    """Tables by name, each to be split by a seed, and how much of a table such splits share."""
    data, rate = args.data or ("digits" if args.multiclass else "made"), args.pos_rate
    if args.multiclass and (rate or data == "made"):
        raise ValueError("--multiclass is not for made rows, and not with --pos-rate")
    if args.target and data in ("made", "synthetic", "digits"):
        raise ValueError(f"--target is for files with named columns; {data} has none")
    if data == "made":
        return {name: partial(made, name, rate or 0.01) for name in MADE}, 0.0
    if data == "synthetic":
        classes = 4 if args.multiclass else 2
        return {data: lambda seed: split(synthetic(seed, rate or 0.005, classes), seed)}, 0.0
    frame, label = read(data, "target" if data == "digits" else args.target)
    if data == "digits" and not args.multiclass:
        label = label.where(label == 8, "the rest")
    rows = Rows(features(frame), class_numbers(label, args.multiclass))
    rows = thin(rows, rate, args.seed) if rate else rows
    return {Path(data).name: partial(split, rows)}, OVERLAP


def contested(rows: int, rate: float, rng: np.random.Generator) -> tuple[Array, Array]:
    """Most positives are raised a little on one input, where some negatives are higher still.

    The other positives stand out on another input: no linear model has bulk and top right at once.
    """
    y, kind = rng.random(rows) < rate, rng.random(rows)
    x = rng.normal(size=(rows, 8))
    x[:, 0] += 1.5 * (y & (kind < 0.7)) + 2.5 * (~y & (kind < 0.02))
    x[:, 1] += 3.0 * (y & (kind >= 0.7))
    return x, y


def smooth(rows: int, rate: float, rng: np.random.Generator) -> tuple[Array, Array]:
    """The log-odds are a smooth function of the inputs, almost a linear one."""
    x = rng.normal(size=(rows, 8))
    odds = 2.0 * np.sin(x[:, 0]) + np.tanh(x[:, 1] * x[:, 2]) + 2.0 * x[:, 3]
    odds += rng.logistic(size=rows)
    return x, odds > np.quantile(odds, 1.0 - rate)


MADE = {"contested top": contested, "smooth odds": smooth}


def made(name: str, rate: float, seed: int) -> list[Rows]:
    """Rows of a made table, to train, to validate and to test; every seed has its own."""
    rng = np.random.default_rng(seed)
    drawn = [MADE[name](rows, rate, rng) for rows in MADE_ROWS]
    return [Rows(x.astype(np.float32), y.astype(np.int64)) for x, y in drawn]


def synthetic(seed: int, rate: float, classes: int) -> Rows:
    """scikit-learn's two or four made classes; every seed has its own."""
    weights = [1 - rate, rate] if classes == 2 else [0.90, 0.06, 0.03, 0.01]
    x, y = make_classification(
        20_000, n_features=20, n_informative=8, n_redundant=4, n_classes=classes,
        n_clusters_per_class=3, weights=weights, random_state=seed,
        flip_y=0.0,  # a share of random labels would swamp the few positives
    )  # fmt: skip
    return Rows(x, y.astype(np.int64))


def read(data: str, target: str | None) -> tuple[pd.DataFrame, pd.Series]:
    """The table that ``--data`` names, and its column of labels."""
    readers = {
        ".csv": pd.read_csv,
        ".parquet": pd.read_parquet,
        ".npz": read_npz,
        "digits": lambda _: load_digits(as_frame=True).frame,
    }
    kind = Path(data).suffix.lower() or data
    if kind not in readers:
        raise ValueError(f"{data} is not a file that ends in .csv, .parquet or .npz")
    try:
        frame = readers[kind](data).rename(columns=str)
    except Exception as error:  # whatever is wrong with the file
        hint = "; save text labels with y.astype(str)" * ("Object arrays" in str(error))
        raise ValueError(f"cannot read {data}: {error}{hint}") from error
    target = "y" if kind == ".npz" else target
    if target not in frame:
        columns = f"one of {shorten(', '.join(frame), 200)}; got {target}"
        hint = "; a csv file needs commas between its columns" * (frame.shape[1] == 1)
        raise ValueError(f"--target must be the label's column, {columns}{hint}")
    return frame.drop(columns=target), frame[target]


def read_npz(path: str) -> pd.DataFrame:
    """The columns of x, and y."""
    with open(path, "rb") as file:
        arrays = {name.lower(): array for name, array in np.load(file).items()}
    if not {"x", "y"} <= {*arrays} or arrays["x"].ndim != 2:
        shapes = {name: list(array.shape) for name, array in arrays.items()}
        raise ValueError(f"it must hold x [rows, columns] and y [rows], it holds {shapes}")
    return pd.DataFrame(arrays["x"]).assign(y=arrays["y"].squeeze())


def features(frame: pd.DataFrame) -> Array:
    """Numbers, without a column of row numbers; text becomes one column for each value."""
    numbers = np.arange(len(frame))
    for name, first in frame.iloc[:, :1].items():
        if name == "Unnamed: 0" or any((first == numbers + k).all() for k in (0, 1)):
            print(f"column {name!r} is left out: it numbers the rows, or is a saved index")
            return features(frame.drop(columns=name))
    if frame.empty:
        raise ValueError("the table has no rows, or no columns besides the label")
    for name, text in frame.select_dtypes(exclude=["number", "bool"]).items():
        if text.nunique() > 100:
            many = f"{text.nunique():,} different values"
            raise ValueError(f"column {name!r} is text of {many}: drop it, or make numbers of it")
        frame = pd.get_dummies(frame, columns=[name], dtype=float)
    x: Array = frame.to_numpy(dtype=np.float64, na_value=np.nan)
    gaps = pd.Series((~np.isfinite(x)).sum(0), frame.columns)
    if gaps.any():
        where = f"column {gaps.idxmax()!r} is missing or infinite in {gaps.max():,} of {len(x):,}"
        raise ValueError(f"{where} rows: fill or drop them first")
    return x


def class_numbers(label: pd.Series, multiclass: bool) -> Array:
    """0 .. classes - 1; of two classes 1 is the positive, which is 1 of 0 and 1, else the rarer."""
    classes = [*label.value_counts(dropna=False).index]
    if label.isna().any() or len(classes) < 2 or (len(classes) > 2 and not multiclass):
        raise ValueError(
            f"the label {label.name!r} must have two values, or more with --multiclass (every "
            f"class against the rest), and none missing; it has {len(classes):,}: "
            + shorten(", ".join(map(str, classes)), 60)
        )
    if multiclass or {*classes} == {0, 1}:
        classes.sort(key=str)
    if len(classes) == 2:
        print(f"positive: {label.name} = {classes[1]}")
    numbers: Array = pd.Categorical(label, classes).codes.astype(np.int64)
    return numbers


def thin(rows: Rows, rate: float, seed: int) -> Rows:
    """Drop random positives until they are this share of the rows."""
    positives = np.flatnonzero(rows.y == 1)
    kept = round(rate * (len(rows.y) - len(positives)) / (1 - rate))
    if kept > len(positives):
        own = f"the data's own rate, {rows.y.mean():.4g}"
        raise ValueError(f"--pos-rate {rate:g} is above {own}: positives can only be thinned out")
    dropped = np.random.default_rng(seed).permutation(positives)[kept:]
    return Rows(np.delete(rows.x, dropped, axis=0), np.delete(rows.y, dropped))


def split(rows: Rows, seed: int) -> list[Rows]:
    """60/20/20 by class, standardised by the training rows; copies of a row are in one part."""
    keys = pd.util.hash_pandas_object(pd.DataFrame(rows.x + 0.0), index=False)  # no -0.0
    _, first, group = np.unique(keys, return_index=True, return_inverse=True)
    different = np.bincount(rows.y[first], minlength=rows.y.max() + 1).min()
    if different < 5:
        few = f"the rarest class has {different} different rows, too few to split"
        raise ValueError(f"{few}: at least 5 are needed, and 50 to see anything")
    fit, rest = train_test_split(first, train_size=0.6, stratify=rows.y[first], random_state=seed)
    held, test = train_test_split(rest, test_size=0.5, stratify=rows.y[rest], random_state=seed)
    parts = [np.isin(first[group], some) for some in (fit, held, test)]
    x = StandardScaler().fit(rows.x[parts[0]]).transform(rows.x).clip(-10.0, 10.0)
    return [Rows(x[part].astype(np.float32), rows.y[part]) for part in parts]
