"""Rows of a table for `LinearRanker`: weights, copies, and which are held out."""

from __future__ import annotations

import warnings
from hashlib import blake2b
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from sklearn.utils import check_consistent_length, column_or_1d
from sklearn.utils.validation import _check_sample_weight

CROWDED = 10  # rows per distinct row from which on equal rows are cases, not copies of one

Floats = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]
Ints = npt.NDArray[np.int64]


class Rows(NamedTuple):
    """Part of a table."""

    x: Floats  # [rows, columns]
    y: Bools  # [rows], True for positives
    weight: Floats | None  # [rows]

    def take(self, index: npt.NDArray[Any]) -> Rows:
        return Rows(
            self.x[index], self.y[index], None if self.weight is None else self.weight[index]
        )


def weighted_rows(x: Floats, y: Bools, weight: Any, name: str) -> Rows:
    """Rows without those of weight 0; both classes must be left."""
    if weight is not None:
        weight = _check_sample_weight(weight, x, dtype=np.float64, ensure_non_negative=True)
        kept = weight > 0
        x, y, weight = x[kept], y[kept], weight[kept]
    if not y.any() or y.all():
        where = "" if weight is None else f" among those of {name} above 0"
        raise ValueError(f"expected rows of two classes{where}, got one class or none")
    return Rows(x, y, weight)


def positives(y: Any, classes: npt.NDArray[Any], like: npt.NDArray[Any], name: str) -> Bools:
    """Which labels, one per row of ``like``, are the second of two known classes."""
    y = column_or_1d(y, warn=True)
    check_consistent_length(like, y)
    strange = np.setdiff1d(y, classes)
    if len(strange):
        raise ValueError(
            f"expected {name} of the classes {classes[0]} and {classes[1]}, got {strange[0]} too"
        )
    positive: Bools = y == classes[1]
    return positive


def hold_out(rows: Rows, fraction: float, rng: np.random.RandomState) -> tuple[Rows, Rows]:
    """Rows to train on and rows to validate on: this fraction of the positives and of the others.

    Copies of a row are all on one side, or the validation would see rows that were trained on;
    but where most rows are equal to many others, as of a few binned features, they are cases of
    their own. The order of the rows does not matter.
    """
    keys = _keys(rows.x, rng.bytes(16))
    order = np.lexsort((rows.y, keys))
    rows, keys = rows.take(order), keys[order]
    group = np.cumsum(np.append(False, keys[1:] != keys[:-1]))
    if len(group) >= CROWDED * (group[-1] + 1):
        group = rng.permutation(len(group))
    mass = np.ones(len(group)) if rows.weight is None else rows.weight
    positives = np.bincount(group, weights=mass * rows.y)
    held = np.zeros(len(positives), dtype=bool)
    # Of groups that hold positives only these count, of the others all rows.
    for size, kind in ((positives, positives > 0), (np.bincount(group, mass), positives == 0)):
        held[kind] = _fill(size[kind], fraction)
    return _of_both_classes(rows, ~held[group]), _of_both_classes(rows, held[group])


def _fill(size: npt.NDArray[Any], fraction: float) -> Bools:
    """Groups, first come first taken, that together have this share; one at least, never all."""
    taken = np.zeros(len(size), dtype=bool)
    if len(size) < 2:
        return taken
    room = fraction * size.sum() * (1 + 1e-9)  # 0.3 * 10 is 3
    for index, value in enumerate(size.tolist()):
        if value <= room:
            taken[index], room = True, room - value
    if not taken.any() or taken.all():
        taken[size.argmin()] = not taken.any()
    return taken


def _of_both_classes(rows: Rows, side: Bools) -> Rows:
    for label, name in ((False, "negative"), (True, "positive")):
        members = rows.y == label
        if not (members & side).any():
            warnings.warn(
                f"too few distinct rows of the {name} class to hold some out: its rows are used "
                "for training and for validation alike",
                UserWarning,
                stacklevel=2,
            )
            side = side | members
    return rows.take(side)


def merged(rows: Rows) -> Rows:
    """The rows with copies, of equal features and label, as one of their weight; sorted."""
    keys = _keys(rows.x, b"")
    order = np.lexsort((rows.y, keys))
    rows, keys = rows.take(order), keys[order]
    first = np.append(True, (keys[1:] != keys[:-1]) | (rows.y[1:] != rows.y[:-1]))
    if first.all():
        return rows
    mass = np.ones(len(rows.y)) if rows.weight is None else rows.weight
    weight = np.add.reduceat(mass, np.flatnonzero(first))
    return rows.take(first)._replace(weight=weight)


def _keys(x: Floats, seed: bytes) -> npt.NDArray[np.uint64]:
    """Numbers that look random, equal for equal rows."""
    plain = np.ascontiguousarray(x) + 0.0  # turns -0.0 into 0.0
    digests = b"".join(blake2b(row, digest_size=8, key=seed).digest() for row in plain)
    return np.frombuffer(digests, dtype="<u8").astype(np.uint64)
