"""Rows to learn from: made on the spot, bundled with scikit-learn, or a file."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from ._common import DemoError, file_of, read_npz

SUFFIXES = (".csv", ".parquet", ".npz")
DIGIT = 8
CLIP_SD = 10.0
MOST_CATEGORIES = 100  # of a text column

Array = npt.NDArray[Any]


class Part(NamedTuple):
    """Rows of one side of a split."""

    x: Array  # [rows, columns] float32
    y: Array  # [rows] int64; of two classes 1 is the positive


class Split(NamedTuple):
    """What one seed learns from, selects by, and is judged on."""

    train: Part
    validation: Part
    test: Part


class Table(NamedTuple):
    """One data set, to be split."""

    name: str
    x: Array  # [rows, columns] float64, finite
    y: Array  # [rows] int64, 0 .. classes - 1
    classes: tuple[str, ...]


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
MADE_ROWS = (12_800, 20_000, 40_000)  # of train, validation and test


def make_split(name: str, rate: float, seed: int) -> Split:
    """Fresh rows of a made table; every seed has its own."""
    rng = np.random.default_rng(seed)
    drawn = [MADE[name](rows, rate, rng) for rows in MADE_ROWS]
    return Split(*(Part(x.astype(np.float32), y.astype(np.int64)) for x, y in drawn))


def synthetic(seed: int, rate: float, multiclass: bool) -> Table:
    """scikit-learn's made classes; every seed has its own."""
    from sklearn.datasets import make_classification

    weights = [0.90, 0.06, 0.03, 0.01] if multiclass else [1 - rate, rate]
    x, y = make_classification(
        n_samples=20_000, n_features=20, n_informative=8, n_redundant=4, n_classes=len(weights),
        n_clusters_per_class=3, weights=weights, random_state=seed,
        flip_y=0.0,  # a share of random labels would swamp the few positives
    )  # fmt: skip
    return Table("synthetic", x, y.astype(np.int64), tuple("0123"[: len(weights)]))


def load_table(data: str, target: str | None, multiclass: bool) -> Table:
    """The digits or a file."""
    if data == "digits":
        from sklearn.datasets import load_digits

        x, y = load_digits(return_X_y=True)
        names = tuple("0123456789") if multiclass else ("the rest", str(DIGIT))
        return Table("digits", x, (y if multiclass else y == DIGIT).astype(np.int64), names)
    name, frame, target = _read(file_of(data, SUFFIXES), target)
    frame = frame.rename(columns=str)
    columns = ", ".join(list(frame)[:12]) + ", ..." * (frame.shape[1] > 12)
    if target is None:
        raise DemoError(f"which column is the label? Add --target COLUMN; there are: {columns}")
    if target not in frame:
        alone = frame.shape[1] == 1
        instead = "; a csv file needs commas between its columns" * alone
        raise DemoError(f"no column {target!r}; there are: {columns}{instead}")
    return Table(name, _features(frame.drop(columns=[target])), *_labels(frame[target], multiclass))


def _read(path: Path, target: str | None) -> tuple[str, Any, str | None]:
    import pandas as pd

    try:
        if path.suffix.lower() == ".npz":
            x, y = read_npz(path, "xy")
            return path.name, pd.DataFrame(x).assign(y=y.squeeze()), "y"
        read = pd.read_csv if path.suffix.lower() == ".csv" else pd.read_parquet
        return path.name, read(path), target
    except (OSError, ValueError, ImportError) as error:
        raise DemoError(f"cannot read {path}: {error}") from error


def _features(frame: Any) -> Array:
    """Numbers; text columns become one column for each value."""
    import pandas as pd

    if frame.empty:
        raise DemoError("the table has no rows, or no columns besides the label")
    text = frame.select_dtypes(exclude=["number", "bool"])
    for name, values in text.nunique().items():
        if values > MOST_CATEGORIES:
            raise DemoError(
                f"column {name!r} is text with {values:,} different values: drop it, or turn it "
                "into numbers"
            )
    frame = pd.get_dummies(frame, columns=list(text), dtype=float)
    x: Array = frame.to_numpy(dtype=np.float64, na_value=np.nan)
    for name, bad in zip(frame, (~np.isfinite(x)).sum(0), strict=True):
        if bad:
            raise DemoError(
                f"column {name!r} is missing or infinite in {bad:,} of {len(x):,} rows: fill or "
                "drop them first"
            )
    return x


def _labels(raw: Any, multiclass: bool) -> tuple[Array, tuple[str, ...]]:
    """Numbers of the classes, and their names; of 0 and 1 the positive is 1, else the rarer."""
    import pandas as pd

    if raw.isna().any():
        raise DemoError(f"the label {raw.name!r} is missing in {raw.isna().sum():,} rows")
    counts = raw.value_counts()
    if len(counts) < 2:
        what = "there are no positives" if (raw == 0).all() else "there is nothing to tell apart"
        raise DemoError(f"the label {raw.name!r} is {counts.index[0]} in all rows: {what}")
    if multiclass:
        codes, names = pd.factorize(raw.astype(str), sort=True)
        return codes.astype(np.int64), tuple(names)
    if len(counts) > 2:
        some = ", ".join(map(str, counts.index[:5]))
        instead = "add --multiclass to rank every class against the rest"
        if len(counts) > MOST_CATEGORIES:
            instead = "make a column of 0 and 1 of it"
        raise DemoError(
            f"the label {raw.name!r} is not binary, it has {len(counts):,} values ({some}, ...): "
            + instead
        )
    negative, positive = counts.index  # by count
    if {negative, positive} == {0, 1}:
        negative, positive = sorted(counts.index)
    return (raw == positive).to_numpy(np.int64), (str(negative), str(positive))


def thin(table: Table, rate: float, seed: int) -> Table:
    """Drop random positives until they are this share of the rows."""
    positives = np.flatnonzero(table.y == 1)
    wanted = round(rate * (len(table.y) - len(positives)) / (1 - rate))
    if wanted > len(positives):
        raise DemoError(
            f"--pos-rate {rate:g} is above the data's own rate, {table.y.mean():.4g}: positives "
            "can only be thinned out"
        )
    dropped = np.random.default_rng(seed).permutation(positives)[wanted:]
    x, y = np.delete(table.x, dropped, axis=0), np.delete(table.y, dropped)
    return table._replace(x=x, y=y)


def split_table(table: Table, seed: int) -> Split:
    """60/20/20 by class, standardised by the training rows; copies of a row are in one part."""
    import pandas as pd

    rng = np.random.default_rng(seed)
    keys = pd.util.hash_pandas_object(pd.DataFrame(table.x + 0.0), index=False)
    _, first, group = np.unique(keys, return_index=True, return_inverse=True)
    size, label = np.bincount(group), table.y[first]
    part_of = np.zeros(len(first), dtype=np.int64)
    for k, name in enumerate(table.classes):
        members = rng.permutation(np.flatnonzero(label == k))
        ends = size[members].cumsum()
        part_of[members] = np.searchsorted([0.6, 0.8], (ends - size[members] / 2) / ends[-1:])
        rows = np.bincount(part_of[group[table.y == k]], minlength=3)
        if rows.min() < 1 or rows[0] < 3:
            raise DemoError(
                f"class {name!r} has {len(members)} different rows, too few to split: at least 5 "
                "are needed, and 50 to see anything"
            )
    where = [np.flatnonzero(part_of[group] == k) for k in range(3)]
    mean, deviation = table.x[where[0]].mean(0), table.x[where[0]].std(0)
    scaled = (table.x - mean) / np.where(deviation > 1e-12 * np.abs(mean), deviation, 1.0)
    scaled = scaled.clip(-CLIP_SD, CLIP_SD).astype(np.float32)
    return Split(*(Part(scaled[rows], table.y[rows]) for rows in where))
