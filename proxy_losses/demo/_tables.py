"""A table for the demo: features, labels, names, and the checks on them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from ._errors import DemoError

MIN_PER_CLASS = 5  # distinct rows of a class: 3 to train on, 1 to validate, 1 to test
SHARES = (0.6, 0.2, 0.2)  # train, validation, test
CLIP_SD = 10.0
_SHOWN = 8

Floats = npt.NDArray[np.floating[Any]]
Ints = npt.NDArray[np.int64]


class Table(NamedTuple):
    """One data set, ready to be split."""

    name: str
    features: Floats  # [rows, columns], all finite
    labels: Ints  # [rows], 0 .. classes - 1; of two classes, 1 is the positive
    classes: tuple[str, ...]  # what each label was called


class Part(NamedTuple):
    """The training, validation or test share of a table."""

    features: npt.NDArray[np.float32]  # [rows, columns], standardised
    labels: Ints  # [rows]


class Split(NamedTuple):
    """A stratified 60/20/20 split; copies of a row are all on one side."""

    train: Part
    validation: Part
    test: Part
    copies: int  # rows that repeat an earlier row


def some(values: Sequence[Any]) -> str:
    """The first few values, for a message."""
    text = ", ".join(str(value) for value in values[:_SHOWN])
    return text + (", ..." if len(values) > _SHOWN else "")


def check_features(features: Floats, columns: Sequence[str]) -> Floats:
    """Refuse a table without rows or columns, and NaN or infinite entries."""
    if features.ndim != 2 or 0 in features.shape:
        raise DemoError(f"the features must be a table of rows and columns, got {features.shape}")
    bad = ~np.isfinite(features)
    where = np.flatnonzero(bad.any(axis=0))
    if where.size:
        first = where[0]
        more = f" (and {where.size - 1} more columns)" if where.size > 1 else ""
        raise DemoError(
            f"feature column {columns[first]!r} is NaN or infinite in {int(bad[:, first].sum()):,} "
            f"of {len(features):,} rows{more}: fill or drop them first"
        )
    return features


def encode_labels(target: npt.NDArray[Any], multiclass: bool) -> tuple[Ints, tuple[str, ...]]:
    """Labels 0 .. C - 1 and their names; of two classes the rarer is 1, unless they are 0 and 1."""
    if target.dtype == object:
        missing = sum(value is None or value != value for value in target)
        target = target.astype(str)
    else:
        missing = int(np.isnan(target).sum()) if target.dtype.kind == "f" else 0
    if missing:
        raise DemoError(f"the target is missing in {missing:,} of {len(target):,} rows")
    values, labels, counts = np.unique(target, return_inverse=True, return_counts=True)
    shown = [f"{value:g}" for value in values] if values.dtype.kind == "f" else values
    names = tuple(str(value) for value in shown)
    if len(values) < 2:
        raise DemoError(f"the target has a single class ({some(names)}): at least two are needed")
    if not multiclass:
        if len(values) > 2:
            raise DemoError(
                f"the target has {len(values):,} different values ({some(names)}): "
                "add --multiclass to rank every class against the rest"
            )
        is_zero_one = target.dtype.kind in "biuf" and values[0] == 0 and values[1] == 1
        if not is_zero_one and counts[0] < counts[1]:
            labels, names = 1 - labels, names[::-1]
    return labels.astype(np.int64).reshape(-1), names


def thin_positives(table: Table, rate: float, seed: int) -> Table:
    """Drop random positives until they are ``rate`` of the rows."""
    positives = np.flatnonzero(table.labels == 1)
    negatives = len(table.labels) - len(positives)
    wanted = round(rate * negatives / (1 - rate))
    if wanted > len(positives):
        raise DemoError(
            f"--pos-rate {rate:g} is above the data's own rate, "
            f"{len(positives) / len(table.labels):.4g}: positives can only be thinned out"
        )
    dropped = np.random.default_rng(seed).permutation(positives)[wanted:]
    features = np.delete(table.features, dropped, axis=0)
    return table._replace(features=features, labels=np.delete(table.labels, dropped))


def split_table(table: Table, seed: int) -> Split:
    """Split 60/20/20 by class, then standardise with the training rows' mean and deviation."""
    group_of = _groups(table.features)
    part_of = _assign(group_of, table, np.random.default_rng(seed))
    rows = [np.flatnonzero(part_of[group_of] == part) for part in range(3)]

    known = table.features[rows[0]].astype(np.float64)
    mean, deviation = known.mean(axis=0), known.std(axis=0)
    deviation[deviation <= 1e-12 * np.abs(mean)] = 1.0  # a constant column

    def part(index: Ints) -> Part:
        scaled = (table.features[index].astype(np.float64) - mean) / deviation
        return Part(scaled.clip(-CLIP_SD, CLIP_SD).astype(np.float32), table.labels[index])

    train, validation, test = (part(index) for index in rows)
    return Split(train, validation, test, copies=len(group_of) - len(part_of))


def _groups(features: Floats) -> Ints:
    """A number per row, the same for equal rows, in order of appearance."""
    seen: dict[int, int] = {}
    rows = (row.tobytes() for row in features + 0.0)  # + 0.0 turns -0.0 into 0.0
    return np.array([seen.setdefault(hash(row), len(seen)) for row in rows], dtype=np.int64)


def _assign(group_of: Ints, table: Table, rng: np.random.Generator) -> Ints:
    """A part per group: 0 train, 1 validation, 2 test.

    Copies of a row share a group, or the test set would hold rows that were trained on. Per
    class, each group, large ones first, goes to the part that lacks most of its share.
    """
    size = np.bincount(group_of)
    label_of = _commonest_label(group_of, table.labels, len(table.classes))
    part_of = np.zeros(len(size), dtype=np.int64)
    for label, name in enumerate(table.classes):
        members = rng.permutation(np.flatnonzero(label_of == label))
        members = members[np.argsort(-size[members], kind="stable")]
        lacking = [share * int(size[members].sum()) for share in SHARES]
        for group in members:
            part_of[group] = part = lacking.index(max(lacking))
            lacking[part] -= int(size[group])
        if len(members) < MIN_PER_CLASS or len(set(part_of[members])) < len(SHARES):
            raise DemoError(
                f"class {name!r} has {len(members)} distinct rows, too few for a 60/20/20 split: "
                f"at least {MIN_PER_CLASS} are needed"
            )
    return part_of


def _commonest_label(group_of: Ints, labels: Ints, classes: int) -> Ints:
    """The label of most rows of each group."""
    pairs, counts = np.unique(group_of * classes + labels, return_counts=True)
    pairs = pairs[np.argsort(counts, kind="stable")]
    label_of = np.zeros(group_of.max() + 1, dtype=np.int64)
    label_of[pairs // classes] = pairs % classes  # of a group's pairs the last, the commonest
    return label_of
