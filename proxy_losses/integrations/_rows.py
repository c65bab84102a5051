"""Rows of a table for `LinearRanker`: weights, copies, which are held out, scales."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from hashlib import blake2b
from itertools import pairwise
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt
from scipy.sparse import csr_array, issparse
from sklearn.preprocessing import StandardScaler
from sklearn.utils import check_consistent_length, column_or_1d
from sklearn.utils.validation import _check_sample_weight

CROWDED = 10  # rows per distinct row from which on equal rows are cases, not copies of one
BLOCK = 2**22  # cells that may be made dense, or looked at, together

Floats = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]
Ints = npt.NDArray[np.int64]
Table: TypeAlias = Any  # Floats, or a csr_array of them in canonical form and without zeros


class Rows(NamedTuple):
    """Part of a table."""

    x: Table  # [rows, columns]
    y: Bools  # [rows], True for positives
    weight: Floats | None  # [rows]

    def take(self, index: npt.NDArray[Any]) -> Rows:
        return Rows(
            self.x[index], self.y[index], None if self.weight is None else self.weight[index]
        )


def as_table(x: Any) -> Table:
    """A table as it is computed with: sparse where less than a quarter is filled.

    That depends on what it holds and not on how it came, so that a dense table and its sparse
    copies give the same results, bit for bit. Only a sparse one above BLOCK never turns dense.
    """
    if not issparse(x):
        return csr_array(x) if 4 * np.count_nonzero(x) < x.size else x
    x = csr_array(x)
    if not (x.has_canonical_format and x.data.all()):
        x = x.copy()  # it is the user's
        x.sum_duplicates()
        x.eliminate_zeros()
    cells = x.shape[0] * x.shape[1]
    return x.toarray() if cells <= BLOCK and 4 * x.nnz >= cells else x


def weighted_rows(x: Table, y: Bools, weight: Any, name: str) -> Rows:
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
    keys, y = keys[order], rows.y[order]
    group = np.cumsum(np.append(False, keys[1:] != keys[:-1]))
    if len(group) >= CROWDED * (group[-1] + 1):
        group = rng.permutation(len(group))
    mass = np.ones(len(group)) if rows.weight is None else rows.weight[order]
    positives = np.bincount(group, weights=mass * y)
    held = np.zeros(len(positives), dtype=bool)
    # Of groups that hold positives only these count, of the others all rows.
    for size, kind in ((positives, positives > 0), (np.bincount(group, mass), positives == 0)):
        held[kind] = _fill(size[kind], fraction)
    sides = (_of_both_classes(y, side) for side in (~held[group], held[group]))
    train, validation = (rows.take(order[side]) for side in sides)
    return train, validation


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


def _of_both_classes(y: Bools, side: Bools) -> Bools:
    for label, name in ((False, "negative"), (True, "positive")):
        members = y == label
        if not (members & side).any():
            warnings.warn(
                f"too few distinct rows of the {name} class to hold some out: its rows are used "
                "for training and for validation alike",
                UserWarning,
                stacklevel=2,
            )
            side = side | members
    return side


def merged(rows: Rows) -> Rows:
    """The rows with copies, of equal features and label, as one of their weight; sorted."""
    keys = _keys(rows.x, b"")
    order = np.lexsort((rows.y, keys))
    keys, y = keys[order], rows.y[order]
    first = np.append(True, (keys[1:] != keys[:-1]) | (y[1:] != y[:-1]))
    if first.all():
        return rows.take(order)
    mass = np.ones(len(y)) if rows.weight is None else rows.weight[order]
    weight = np.add.reduceat(mass, np.flatnonzero(first))
    return rows.take(order[first])._replace(weight=weight)


def _keys(x: Table, seed: bytes) -> npt.NDArray[np.uint64]:
    """Numbers that look random, equal for equal rows, sparse or not."""
    digests = b"".join(_digests(x, seed))
    return np.frombuffer(digests, dtype="<u8").astype(np.uint64)


def _digests(x: Table, seed: bytes) -> Iterator[bytes]:
    step = len(x.indptr) if issparse(x) else max(1, BLOCK // x.shape[1])
    for start in range(0, x.shape[0], step):
        block = csr_array(x[start : start + step])  # 0.0 and -0.0 are not in it
        data, places = block.data.astype("<f8", copy=False), block.indices.astype("<i8", copy=False)
        ends = block.indptr.tolist()
        for begin, end in pairwise(ends):
            gaps = b"gaps" if end - begin < x.shape[1] else b""
            digest = blake2b(data[begin:end], digest_size=8, key=seed, person=gaps)
            if gaps:
                digest.update(places[begin:end])
            yield digest.digest()


# -- scales


class Scaling(NamedTuple):
    """Features in standard deviations: ``(x - shift) / scale``.

    A feature that is 0 in half of the rows or more is not centred, so that a sparse table stays
    sparse, and one that is filled in above that at most doubles. The solution is the same, since
    the intercept is free; and the mean of what is not centred is at most one standard deviation,
    so that solvers find it as fast.
    """

    shift: Floats  # [columns]
    scale: Floats  # [columns], 1 for a constant

    def apply(self, rows: Rows) -> Rows:
        """The scaled rows, in place of the others; a sparse table is replaced where centred."""
        x, columns = rows.x, np.flatnonzero(self.shift)
        if not issparse(x):
            x -= self.shift
            x /= self.scale
            return rows
        if len(columns):
            n, k = x.shape[0], len(columns)
            shifts = np.tile(self.shift[columns], n), np.tile(columns, n), np.arange(n + 1) * k
            x = x - csr_array(shifts, shape=x.shape)
        x.data /= self.scale[x.indices]
        return rows._replace(x=x)


def scaling(rows: Rows) -> Scaling:
    """Means and standard deviations of these rows."""
    scaler = StandardScaler(with_mean=False).fit(rows.x, sample_weight=rows.weight)
    n, columns = rows.x.shape
    if issparse(rows.x):
        filled = np.bincount(rows.x.indices, minlength=columns)
    else:
        filled = np.count_nonzero(rows.x, axis=0)
    return Scaling(np.where(2 * filled > n, scaler.mean_, 0.0), scaler.scale_)
