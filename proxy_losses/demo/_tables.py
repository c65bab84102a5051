"""Rows to learn from: made on the spot, bundled with scikit-learn, or a file."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple
from zipfile import BadZipFile

import numpy as np
import numpy.typing as npt
import pandas as pd
from sklearn.datasets import load_digits, make_classification
from sklearn.model_selection import train_test_split
from sklearn.preprocessing import StandardScaler

from ._common import DemoError

Array = npt.NDArray[Any]
MADE_ROWS = (12_800, 20_000, 40_000)  # of train, validation and test
CLIP_SD = 10.0
MOST_CATEGORIES = 100  # of a text column


class Rows(NamedTuple):
    """A table, or one side of its split."""

    x: Array  # [rows, columns] floating
    y: Array  # [rows] int64, 0 .. classes - 1; of two classes 1 is the positive


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


def make_split(name: str, rate: float, seed: int) -> list[Rows]:
    """Fresh rows of a made table, to train, to validate and to test; every seed has its own."""
    rng = np.random.default_rng(seed)
    drawn = [MADE[name](rows, rate, rng) for rows in MADE_ROWS]
    return [Rows(x.astype(np.float32), y.astype(np.int64)) for x, y in drawn]


def synthetic(seed: int, rate: float, classes: int) -> Rows:
    """scikit-learn's two or four made classes; every seed has its own."""
    weights = [1 - rate, rate] if classes == 2 else [0.90, 0.06, 0.03, 0.01]
    x, y = make_classification(
        n_samples=20_000, n_features=20, n_informative=8, n_redundant=4, n_classes=classes,
        n_clusters_per_class=3, weights=weights, random_state=seed,
        flip_y=0.0,  # a share of random labels would swamp the few positives
    )  # fmt: skip
    return Rows(x, y.astype(np.int64))


def load_table(data: str, target: str | None, multiclass: bool) -> tuple[Rows, list[str]]:
    """The digits or a file, and the names of the classes."""
    if data == "digits":
        x, y = load_digits(return_X_y=True)
        names = [*"0123456789"] if multiclass else ["the rest", "8"]
        return Rows(x, (y if multiclass else y == 8).astype(np.int64)), names
    frame = read(data, ".csv", ".parquet", ".npz")
    target = "y" if data.lower().endswith(".npz") else target
    names = [*frame]
    columns = ", ".join(names if len(names) <= 12 else [*names[:8], "...", *names[-3:]])
    if target is None:
        raise DemoError(f"which column is the label? Add --target COLUMN; there are: {columns}")
    if target not in frame:
        instead = "; a csv file needs commas between its columns" * (frame.shape[1] == 1)
        raise DemoError(f"no column {target!r}; there are: {columns}{instead}")
    y, classes = label_codes(frame[target], multiclass)
    return Rows(features(frame.drop(columns=target)), y), classes


def read(data: str, *suffixes: str) -> pd.DataFrame:
    """The file that ``--data`` names; of an .npz the arrays x and, as last column, y."""
    path = Path(data)
    suffix = path.suffix.lower()
    if not path.exists():
        raise DemoError(f"no such file: {path}")
    if suffix not in suffixes:
        raise DemoError(f"{path} is not a file that ends in {' or '.join(suffixes)}")
    try:
        if suffix != ".npz":
            return (pd.read_csv if suffix == ".csv" else pd.read_parquet)(path).rename(columns=str)
        with path.open("rb") as file:
            found = {name.lower(): array for name, array in np.load(file).items()}
        if not {"x", "y"} <= {*found} or found["x"].ndim != 2:
            shapes = {name: list(array.shape) for name, array in found.items()}
            raise ValueError(f"it must hold x [rows, columns] and y [rows], it holds {shapes}")
        return pd.DataFrame(found["x"]).rename(columns=str).assign(y=found["y"].squeeze())
    except (OSError, ValueError, ImportError, AttributeError, EOFError, BadZipFile) as error:
        instead = "; save text labels with y.astype(str)" * ("Object arrays" in str(error))
        raise DemoError(f"cannot read {path}: {error}{instead}") from error


def features(frame: pd.DataFrame) -> Array:
    """Numbers, without a column of row numbers; text becomes one column for each value."""
    if frame.empty:
        raise DemoError("the table has no rows, or no columns besides the label")
    first = frame.iloc[:, 0]
    numbers = pd.to_numeric(first, errors="coerce").to_numpy(np.float64, na_value=np.nan)
    counts = any(np.array_equal(numbers, np.arange(k, k + len(first))) for k in (0, 1))
    if counts or first.name == "Unnamed: 0":  # pandas' word for a column without a name
        print(f"column {first.name!r} is left out: it numbers the rows, or is a saved index")
        return features(frame.iloc[:, 1:])
    text = frame.select_dtypes(exclude=["number", "bool"])
    for name, values in text.nunique().items():
        if values > MOST_CATEGORIES:
            values = f"{values:,} different values: drop it, or turn it into numbers"
            raise DemoError(f"column {name!r} is text with {values}")
    frame = pd.get_dummies(frame, columns=list(text), dtype=float)
    x: Array = frame.to_numpy(dtype=np.float64, na_value=np.nan)
    for name, bad in zip(frame, (~np.isfinite(x)).sum(0), strict=True):
        if bad:
            where = f"missing or infinite in {bad:,} of {len(x):,} rows"
            raise DemoError(f"column {name!r} is {where}: fill or drop them first")
    return x


def label_codes(raw: pd.Series, multiclass: bool) -> tuple[Array, list[str]]:
    """Numbers of the classes, and their names; of 0 and 1 the positive is 1, else the rarer."""
    label, counts = f"the label {raw.name!r}", raw.value_counts()
    if raw.isna().any():
        raise DemoError(f"{label} is missing in {raw.isna().sum():,} rows")
    if len(counts) < 2:
        what = "there are no positives" if (raw == 0).all() else "there is nothing to tell apart"
        raise DemoError(f"{label} is {counts.index[0]} in all rows: {what}")
    if len(counts) > 2 and not multiclass:
        many = f"{len(counts):,} values ({', '.join(map(str, counts.index[:5]))}, ...)"
        instead = "add --multiclass to rank every class against the rest"
        if len(counts) > MOST_CATEGORIES:
            instead = "make a column of 0 and 1 of it"
        raise DemoError(f"{label} is not binary, it has {many}: {instead}")
    names = sorted(counts.index, key=str) if multiclass else [*counts.index]  # else by count
    names = sorted(names) if {*names} == {0, 1} else names
    return pd.Categorical(raw, names).codes.astype(np.int64), [*map(str, names)]


def thin(table: Rows, rate: float, seed: int) -> Rows:
    """Drop random positives until they are this share of the rows."""
    positives = np.flatnonzero(table.y == 1)
    wanted = round(rate * (len(table.y) - len(positives)) / (1 - rate))
    if wanted > len(positives):
        own = f"the data's own rate, {table.y.mean():.4g}"
        raise DemoError(f"--pos-rate {rate:g} is above {own}: positives can only be thinned out")
    dropped = np.random.default_rng(seed).permutation(positives)[wanted:]
    return Rows(np.delete(table.x, dropped, axis=0), np.delete(table.y, dropped))


def split_table(table: Rows, names: list[str], seed: int) -> list[Rows]:
    """60/20/20 by class, standardised by the training rows; copies of a row are in one part."""
    keys = pd.util.hash_pandas_object(pd.DataFrame(table.x + 0.0), index=False)  # no -0.0
    _, first, group = np.unique(keys, return_index=True, return_inverse=True)
    different = np.bincount(table.y[first], minlength=len(names))
    if different.min() < 5:
        raise DemoError(
            f"class {names[different.argmin()]!r} has {different.min()} different rows, too few "
            "to split: at least 5 are needed, and 50 to see anything"
        )
    fit, rest = train_test_split(first, train_size=0.6, stratify=table.y[first], random_state=seed)
    held, test = train_test_split(rest, test_size=0.5, stratify=table.y[rest], random_state=seed)
    parts = [np.isin(first[group], rows) for rows in (fit, held, test)]
    x = StandardScaler().fit(table.x[parts[0]]).transform(table.x).clip(-CLIP_SD, CLIP_SD)
    return [Rows(x[part].astype(np.float32), table.y[part]) for part in parts]
