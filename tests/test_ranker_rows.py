"""Held-out rows of the scorecard estimator: shares, copies, order."""

import warnings

import numpy as np
import pytest

from proxy_losses.integrations._rows import CROWDED, Rows, hold_out, merged, weighted_rows


def table(rows: int = 1000, rate: float = 0.1) -> Rows:
    rng = np.random.default_rng(0)
    return Rows(rng.normal(size=(rows, 3)), np.arange(rows) < rate * rows, None)


def held(rows: Rows, fraction: float = 0.2, seed: int = 0) -> tuple[Rows, Rows]:
    return hold_out(rows, fraction, np.random.RandomState(seed))


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
    for part, shuffled in zip(held(rows), held(rows.take(order)), strict=True):
        np.testing.assert_array_equal(part.x, shuffled.x)
        np.testing.assert_array_equal(part.y, shuffled.y)
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
    weighted = held(rows._replace(weight=count.astype(float)))
    for part, other in zip(map(merged, (train, validation)), map(merged, weighted), strict=True):
        np.testing.assert_array_equal(part.x, other.x)
        np.testing.assert_array_equal(part.y, other.y)
        np.testing.assert_array_equal(part.weight, other.weight)
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


def test_merging():
    x = np.array([[1.0, 0.0], [2.0, 0.0], [1.0, -0.0], [1.0, 0.0]])
    rows = Rows(x, np.array([True, False, True, False]), None)
    one = merged(rows)
    found = zip(one.x[:, 0].tolist(), one.y.tolist(), one.weight.tolist(), strict=True)
    assert set(found) == {(1.0, True, 2.0), (1.0, False, 1.0), (2.0, False, 1.0)}
    heavy = merged(rows._replace(weight=np.array([0.5, 1.0, 0.25, 3.0])))
    assert sorted(heavy.weight) == [0.75, 1.0, 3.0]
    assert merged(table()).weight is None


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
