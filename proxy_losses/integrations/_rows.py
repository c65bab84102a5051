"""Rows of a table for `LinearRanker`: weights, copies, which are held out, scales."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from hashlib import blake2b
from heapq import heapreplace
from itertools import pairwise
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt
from scipy.sparse import csr_array, issparse, vstack
from sklearn.preprocessing import StandardScaler
from sklearn.utils import check_consistent_length, column_or_1d
from sklearn.utils.validation import _check_sample_weight

CROWDED = 10  # rows per distinct row from which on equal rows are cases, not copies of one
BLOCK = 2**22  # cells that may be made dense, or looked at, together
LARGEST = 1e150  # in size: the squares of any number of them have a sum

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
        _check_size(x, x)
        return csr_array(x) if 4 * np.count_nonzero(x) < x.size else x
    x = csr_array(x)
    if not (x.has_canonical_format and x.data.all()):
        x = x.copy()  # it is the user's
        x.sum_duplicates()
        x.eliminate_zeros()
    _check_size(x, x.data)
    cells = x.shape[0] * x.shape[1]
    return x.toarray() if cells <= BLOCK and 4 * x.nnz >= cells else x


def _check_size(x: Table, values: Floats) -> None:
    if max(values.max(initial=0.0), -values.min(initial=0.0)) > LARGEST:
        column = int(abs(x).argmax()) % x.shape[1]
        raise ValueError(
            f"expected features of at most {LARGEST:g} in size, got {abs(x).max():g} in column "
            f"{column}: give it another unit, or clip it"
        )


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


class Sides(NamedTuple):
    """Which rows are fitted on and which are judged by, part by part."""

    fit: Bools  # [lists, rows]; the last list is what the result is fitted on
    held: Bools  # [parts, rows]; lists are the parts, and one of all rows if that is none of them


def hold_out(rows: Rows, fraction: float, rng: np.random.RandomState) -> Sides:
    """One part: this fraction of the positives and of the others is held out.

    Copies of a row are all on one side, or the validation would see rows that were trained on;
    but where most rows are equal to many others, as of a few binned features, they are cases of
    their own. The order of the rows does not matter.
    """
    group, positives, size = _groups(rows, rng)
    held = np.zeros(len(size), dtype=bool)
    for mass, kind in _kinds(positives, size):
        held[kind] = _fill(mass[kind], fraction)
    return _sides(rows.y, [held[group]])


def folds(rows: Rows, count: int, repeats: int, rng: np.random.RandomState) -> Sides | None:
    """So many folds, drawn anew so many times, each with its share of either class.

    Copies as in `hold_out`. Fewer folds where a class has fewer distinct rows; None below two.
    """
    held: list[Bools] = []
    for _ in range(repeats):
        group, positives, size = _groups(rows, rng)
        kinds = _kinds(positives, size)
        number = min(count, *(int(kind.sum()) for _, kind in kinds))
        if number < 2:
            return None
        fold = np.zeros(len(size), dtype=np.int64)
        for mass, kind in kinds:
            fold[kind] = _deal(mass[kind], number)
        held += [fold[group] == k for k in range(number)]
    return _sides(rows.y, held)


def split_by(cv: Any, rows: Rows, y: npt.NDArray[Any], kept: Any) -> Sides:
    """The parts of a splitter, which numbers the rows as they were given; ``kept`` are left."""
    fit: list[Bools] = []
    held: list[Bools] = []
    for train, test in cv.split(np.zeros((len(y), 1)), y):
        for sides, index in ((fit, train), (held, test)):
            side = np.zeros(len(y), dtype=bool)
            side[index] = True
            side = side[kept]
            if not (rows.y[side].any() and (~rows.y[side]).any()):
                raise ValueError(
                    f"expected rows of two classes on both sides of each part of cv, "
                    f"got one class or none in part {len(held)}"
                )
            sides.append(side)
    if not held:
        raise ValueError("expected cv of one part or more, got none")
    return Sides(np.stack([*fit, np.ones(len(rows.y), dtype=bool)]), np.stack(held))


def beside(rows: Rows, held: Rows) -> tuple[Rows, Sides]:
    """One part: rows to fit on and others to judge by, as one table."""
    if issparse(rows.x) or issparse(held.x):
        x = vstack([csr_array(rows.x), csr_array(held.x)], format="csr")
    else:
        x = np.concatenate([rows.x, held.x])
    masses = [np.ones(len(part.y)) if part.weight is None else part.weight for part in (rows, held)]
    first = np.arange(x.shape[0]) < len(rows.y)
    both = Rows(as_table(x), np.concatenate([rows.y, held.y]), np.concatenate(masses))
    return both, Sides(first[None], ~first[None])


def count_positives(rows: Rows) -> int:
    """Distinct rows that are positive: as many as there are positives to tell apart."""
    _, positives, _ = _groups(rows, np.random.RandomState(0))
    return int((positives > 0).sum())


def _groups(rows: Rows, rng: np.random.RandomState) -> tuple[Ints, Floats, Floats]:
    """A number per row, equal for copies, in an order that the seed draws; mass of each group.

    (group [rows], mass of its positives [groups], mass of all its rows [groups]).
    """
    keys = _keys(rows.x, rng.bytes(16))
    order = np.lexsort((rows.y, keys))
    keys = keys[order]
    sorted_group = np.cumsum(np.append(False, keys[1:] != keys[:-1]))
    if len(keys) >= CROWDED * (sorted_group[-1] + 1):
        sorted_group = rng.permutation(len(keys))
    group = np.empty(len(keys), dtype=np.int64)
    group[order] = sorted_group
    mass = np.ones(len(keys)) if rows.weight is None else rows.weight
    positives: Floats = np.bincount(group, mass * rows.y).astype(np.float64)
    size: Floats = np.bincount(group, mass).astype(np.float64)
    return group, positives, size


def _kinds(positives: Floats, size: Floats) -> tuple[tuple[Floats, Bools], tuple[Floats, Bools]]:
    """Of groups that hold positives only these count, of the others all rows."""
    return (positives, positives > 0), (size, positives == 0)


def _sides(y: Bools, held: Sequence[Bools]) -> Sides:
    """The sides of held-out rows, each with both classes; the last list is of all rows."""
    fit = [*(_of_both_classes(y, ~side) for side in held), np.ones(len(y), dtype=bool)]
    return Sides(np.stack(fit), np.stack([_of_both_classes(y, side) for side in held]))


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


def _deal(size: npt.NDArray[Any], number: int) -> Ints:
    """A fold for each group: large ones first, to the fold that has least."""
    fold = np.empty(len(size), dtype=np.int64)
    least = [(0.0, k) for k in range(number)]
    for index in np.argsort(-size, kind="stable").tolist():
        mass, fold[index] = least[0]
        heapreplace(least, (mass + float(size[index]), int(fold[index])))
    return fold


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


class Parts(NamedTuple):
    """Distinct rows, and how many cases each of them is in every part."""

    x: Table  # [rows, columns]
    y: Bools  # [rows]
    fit: Floats  # [lists, rows], fitted on; the last list is for the result
    held: Floats  # [parts, rows], judged by

    @property
    def cases(self) -> tuple[Ints, Bools] | None:
        """The row of each case, and which cases [lists, cases] a list has.

        None where weights are no numbers of cases, or there are more than twice as many as rows.
        """
        most = self.fit.max(axis=0)
        if (self.fit != self.fit.round()).any() or most.sum() > 2 * len(most):
            return None
        times = most.astype(np.int64)
        row = np.repeat(np.arange(len(times)), times)
        copy = np.arange(len(row)) - np.repeat(times.cumsum() - times, times)
        return row, copy < self.fit[:, row]

    @property
    def whole(self) -> Rows:
        """The rows that the result is fitted on."""
        return self.rows(self.fit[-1])

    def rows(self, mass: Floats) -> Rows:
        """The rows of a list or of a part, with as much weight as they have there."""
        kept = mass > 0
        weight = None if (mass[kept] == 1).all() else mass[kept]
        if kept.all():
            return Rows(self.x, self.y, weight)
        return Rows(self.x[kept], self.y[kept], weight)


def distinct(rows: Rows, sides: Sides) -> Parts:
    """The rows with copies, of equal features and label, as one of their mass; sorted."""
    keys = _keys(rows.x, b"")
    order = np.lexsort((rows.y, keys))
    sorted_keys, y = keys[order], rows.y[order]
    first = np.append(True, (sorted_keys[1:] != sorted_keys[:-1]) | (y[1:] != y[:-1]))
    number = np.empty(len(keys), dtype=np.int64)
    number[order] = np.cumsum(first) - 1
    mass = np.ones(len(keys)) if rows.weight is None else rows.weight

    def masses(parts: Bools) -> Floats:
        return np.stack([np.bincount(number, mass * part, int(first.sum())) for part in parts])

    kept = order[first]
    return Parts(rows.x[kept], rows.y[kept], masses(sides.fit), masses(sides.held))


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
