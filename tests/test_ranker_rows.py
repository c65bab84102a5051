"""Held-out rows of the scorecard estimator: shares, copies, order."""

import warnings

import numpy as np
import pytest
from sklearn.model_selection import KFold, check_cv

from proxy_losses.integrations._rows import (
    CROWDED,
    Parts,
    Rows,
    Sides,
    beside,
    count_positives,
    distinct,
    folds,
    hold_out,
    split_by,
    weighted_rows,
)


def table(rows: int = 1000, rate: float = 0.1) -> Rows:
    rng = np.random.default_rng(0)
    return Rows(rng.normal(size=(rows, 3)), np.arange(rows) < rate * rows, None)


def held(rows: Rows, fraction: float = 0.2, seed: int = 0) -> tuple[Rows, Rows]:
    sides = hold_out(rows, fraction, np.random.RandomState(seed))
    assert sides.fit[-1].all()
    return rows.take(sides.fit[0]), rows.take(sides.held[0])


def whole(rows: Rows) -> Sides:
    everything = np.ones((1, len(rows.y)), dtype=bool)
    return Sides(everything, everything)


def texts(rows: Rows) -> set[bytes]:
    return {row.tobytes() for row in rows.x}


@pytest.mark.parametrize("fraction", [0.01, 0.2, 0.3, 0.99])
def test_shares_of_each_class(fraction):
    train, validation = held(table(), fraction)
    assert not texts(train) & texts(validation)
    assert len(texts(train) | texts(validation)) == 1000
    assert validation.y.sum() == 100 * fraction
    assert (~validation.y).sum() == 900 * fraction


def test_another_seed_other_rows_the_same_seed_the_same_in_any_order():
    rows = table()
    order = np.random.default_rng(1).permutation(1000)
    sides = (hold_out(r, 0.2, np.random.RandomState(0)) for r in (rows, rows.take(order)))
    for one, other in zip(*sides, strict=True):
        np.testing.assert_array_equal(one[:, order], other)
    overlap = texts(held(rows)[1]) & texts(held(rows, seed=1)[1])
    # 200 of 1000, twice: 40 in common are expected, with a deviation of 5
    assert 15 < len(overlap) < 65


def test_copies_stay_together_and_weights_count():
    rows = table(300)
    count = np.random.default_rng(0).integers(1, 4, size=300)
    count[:2] = 20  # of 30 positives the weight of 2 is more than the share: they cannot be held
    copied = rows.take(np.repeat(np.arange(300), count))
    train, validation = held(copied)
    assert not texts(train) & texts(validation)
    weighted = rows._replace(weight=count.astype(float))
    for split in (lambda r, rng: hold_out(r, 0.2, rng), lambda r, rng: folds(r, 3, 2, rng)):
        one, other = (distinct(r, split(r, np.random.RandomState(0))) for r in (copied, weighted))
        for mine, theirs in zip(one, other, strict=True):
            np.testing.assert_array_equal(mine, theirs)
    share = validation.y.sum() / copied.y.sum()
    assert 0.1 < share <= 0.2


def test_rows_of_few_values_are_cases_of_their_own():
    rng = np.random.default_rng(0)
    x = rng.integers(0, 2, size=(CROWDED * 80, 3)).astype(float)  # 8 distinct rows
    rows = Rows(x, rng.random(len(x)) < 0.25, None)
    train, validation = held(rows)
    assert len(texts(train)) == len(texts(validation)) == 8
    assert validation.y.sum() == int(0.2 * rows.y.sum())
    assert (~validation.y).sum() == int(0.2 * (~rows.y).sum())


def test_folds_share_out_every_class_and_keep_copies_together():
    copied = table(300).take(np.repeat(np.arange(300), np.arange(300) % 3 + 1))
    sides = folds(copied, 5, 2, np.random.RandomState(0))
    assert sides.fit.shape == (11, len(copied.y))
    assert sides.held.shape == (10, len(copied.y))
    np.testing.assert_array_equal(sides.fit[:-1], ~sides.held)
    assert sides.fit[-1].all()
    for drawn in (sides.held[:5], sides.held[5:]):
        np.testing.assert_array_equal(drawn.sum(0), 1)
        for label in (True, False):
            share = (drawn & (copied.y == label)).sum(1)
            assert np.ptp(share) <= 3  # the largest group of copies
    assert not np.array_equal(sides.held[:5], sides.held[5:])
    for part in sides.held:
        assert not texts(copied.take(part)) & texts(copied.take(~part))
    assert count_positives(copied) == 30


def test_fewer_folds_where_a_class_is_small():
    rows = table(50)._replace(y=np.arange(50) < 3)
    assert folds(rows, 5, 1, np.random.RandomState(0)).held.shape == (3, 50)
    assert folds(rows._replace(y=np.arange(50) < 1), 5, 1, np.random.RandomState(0)) is None


def test_distinct_rows():
    x = np.array([[1.0, 0.0], [2.0, 0.0], [1.0, -0.0], [1.0, 0.0]])
    rows = Rows(x, np.array([True, False, True, False]), None)

    def found(rows: Rows) -> set[tuple[float, bool, float]]:
        one = distinct(rows, whole(rows))
        np.testing.assert_array_equal(one.fit, one.held)
        return set(zip(one.x[:, 0].tolist(), one.y.tolist(), one.fit[0].tolist(), strict=True))

    assert found(rows) == {(1.0, True, 2.0), (1.0, False, 1.0), (2.0, False, 1.0)}
    heavy = rows._replace(weight=np.array([0.5, 1.0, 0.25, 3.0]))
    assert found(heavy) == {(1.0, True, 0.75), (1.0, False, 3.0), (2.0, False, 1.0)}
    assert distinct(heavy, whole(heavy)).cases is None
    plain = distinct(table(), whole(table()))
    row, inside = plain.cases
    np.testing.assert_array_equal(row, np.arange(1000))
    assert inside.all()
    assert plain.whole.weight is None
    some = plain.rows(np.where(np.arange(1000) < 10, 2.0, 0.0))
    np.testing.assert_array_equal(some.x, plain.x[:10])
    np.testing.assert_array_equal(some.weight, np.full(10, 2.0))


def test_rows_that_are_several_cases():
    fit = np.array([[1.0, 0.0, 2.0], [0.0, 1.0, 3.0]])
    parts = Parts(np.zeros((3, 1)), np.array([True, False, False]), fit, fit)
    row, inside = parts.cases
    np.testing.assert_array_equal(row, [0, 1, 2, 2, 2])
    np.testing.assert_array_equal(inside, [[1, 0, 1, 1, 0], [0, 1, 1, 1, 1]])
    assert parts._replace(fit=2.0 * fit).cases is None  # ten cases of three rows
    assert parts._replace(fit=0.5 * fit).cases is None


def test_rows_of_ones_own_beside_others():
    rows, other = table(50), table(20)._replace(weight=np.full(20, 2.0))
    both, sides = beside(rows, other)
    np.testing.assert_array_equal(both.x[sides.fit[0]], rows.x)
    np.testing.assert_array_equal(both.x[sides.held[0]], other.x)
    np.testing.assert_array_equal(both.weight, np.repeat([1.0, 2.0], [50, 20]))


def test_a_splitter_sees_the_rows_as_they_were_given():
    y = np.arange(40) % 4 == 0
    kept = np.arange(40) >= 8
    rows = Rows(np.arange(40.0)[kept, None], y[kept], None)
    sides = split_by(KFold(2), rows, y, kept)  # the first half of all 40 are the first part
    np.testing.assert_array_equal(sides.held[0], np.arange(32) < 12)
    np.testing.assert_array_equal(sides.fit[:2], ~sides.held)
    assert sides.fit[2].all()
    with pytest.raises(ValueError, match="both sides of each part of cv, got one class or none"):
        split_by(KFold(40), rows, y, kept)
    with pytest.raises(ValueError, match="cv of one part or more, got none"):
        split_by(check_cv([]), rows, y, kept)


@pytest.mark.parametrize(("label", "name"), [(True, "positive"), (False, "negative")])
def test_a_class_of_one_row_is_on_both_sides(label, name):
    rows = table(50)._replace(y=(np.arange(50) == 3) == label)
    with pytest.warns(UserWarning, match=f"too few distinct rows of the {name} class"):
        train, validation = held(rows)
    alone = rows.x[3].tobytes()
    assert alone in texts(train)
    assert alone in texts(validation)
    assert texts(train) & texts(validation) == {alone}


def test_two_rows_of_a_class_are_one_each():
    rows = table(50)._replace(y=np.arange(50) < 2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train, validation = held(rows, 0.9)
    assert train.y.sum() == validation.y.sum() == 1


def test_rows_without_weight_are_dropped():
    rows = weighted_rows(np.eye(4), np.arange(4) > 1, np.array([1, 0, 0, 2]), "w")
    np.testing.assert_array_equal(rows.x, np.eye(4)[[0, 3]])
    np.testing.assert_array_equal(rows.weight, [1.0, 2.0])
