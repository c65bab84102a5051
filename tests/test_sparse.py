"""`LinearRanker` on sparse tables: the fit of the dense one, in the memory of the sparse one."""

import tracemalloc

import numpy as np
import pytest
from scipy import sparse
from sklearn.compose import ColumnTransformer
from sklearn.linear_model import orthogonal_mp
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import OneHotEncoder, StandardScaler

from proxy_losses.integrations import _rows
from proxy_losses.integrations import _scorecard as card
from proxy_losses.integrations.sklearn import LinearRanker

from .scorecards import contested

EPS = np.finfo(np.float64).eps
SIZES = (3, 8, 30)  # of the categories


def one_hot(rows: int = 1500, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Three categories and two numbers far from 0, and labels that are linear in them."""
    rng = np.random.default_rng(seed)
    parts = [np.eye(size)[rng.integers(0, size, rows)] for size in SIZES]
    x = np.hstack([*parts, rng.normal([2000.0, 40.0], [10.0, 5.0], (rows, 2))])
    weight = 2 * np.random.default_rng(9).normal(size=x.shape[1])
    weight[-2:] = 0.05, 0.1
    scores = x @ weight
    return x, (scores + rng.logistic(size=rows) > np.quantile(scores, 0.92)).astype(int)


def shuffled_indices(x: np.ndarray) -> sparse.csr_matrix:
    """In another form: columns out of order, values in two parts, zeros that are stored."""
    half = sparse.coo_array(x / 2)
    rows, columns = half.coords
    zero = np.zeros(3)
    back = slice(None, None, -1)
    data = np.concatenate([zero, half.data[back], half.data])
    place = (
        np.concatenate([[0, 1, 2], rows[back], rows]),
        np.concatenate([[1, 1, 1], columns[back], columns]),
    )
    order = np.argsort(place[0], kind="stable")
    ends = np.append(0, np.bincount(place[0], minlength=len(x)).cumsum())
    return sparse.csr_matrix((data[order], place[1][order], ends), shape=x.shape)


def with_64_bits(x: np.ndarray) -> sparse.csr_array:
    found = sparse.csr_array(x)
    found.indices, found.indptr = found.indices.astype("i8"), found.indptr.astype("i8")
    return found


KINDS = {
    **{f"{name}_{kind}": getattr(sparse, f"{name}_{kind}")
       for name in ("csr", "csc", "coo") for kind in ("matrix", "array")},
    "64 bits": with_64_bits, "shuffled": shuffled_indices,
}  # fmt: skip


def assert_same(one: LinearRanker, two: LinearRanker) -> None:
    for name in ("coef_", "intercept_", "support_", "scale_", "C_", "best_iter_", "n_iter_",
                 "validation_score_", "baseline_score_"):  # fmt: skip
        np.testing.assert_array_equal(getattr(one, name), getattr(two, name), name)


def rounding(model: LinearRanker, x: np.ndarray) -> np.ndarray:
    """Bound on the difference of scores whose products were added up in two orders."""
    size = abs(x) @ abs(model.coef_[0]) + abs(model.intercept_[0])
    return 2 * (x.shape[1] + 1) * EPS * size


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_gives_the_dense_fit_to_the_bit(kind):
    x, y = one_hot()
    dense = LinearRanker(random_state=0, cv=1, max_iter=30).fit(x, y)
    table = KINDS[kind](x)
    before = table.copy()
    model = LinearRanker(random_state=0, cv=1, max_iter=30).fit(table, y)
    assert_same(model, dense)
    for part in ("data", "indices", "indptr"):  # the user's table is as it was
        if hasattr(table, part):
            np.testing.assert_array_equal(getattr(table, part), getattr(before, part))
    difference = abs(model.decision_function(table) - dense.decision_function(x))
    assert (difference <= rounding(dense, x)).all()
    np.testing.assert_array_equal(model.predict(table), dense.predict(x))
    assert model.predict_proba(table).shape == (len(y), 2)
    assert model.score(table, y) == pytest.approx(dense.score(x, y), abs=1e-12)


@pytest.mark.parametrize(
    "options",
    [{"metric": "recall", "quantile": 0.05}, {"metric": "pauc", "fpr": 0.1}, {"n_features": 6}],
    ids=str,
)
def test_every_metric_and_selection(options):
    x, y = one_hot()
    weight = np.random.default_rng(0).integers(0, 3, len(y))
    options = {"random_state": 0, "cv": 1, "max_iter": 30, **options}
    dense = LinearRanker(**options).fit(x, y, weight)
    assert_same(LinearRanker(**options).fit(sparse.csr_array(x), y, weight), dense)
    assert dense.support_.sum() == options.get("n_features", x.shape[1])


@pytest.mark.parametrize("table", [np.asarray, sparse.csc_array])
@pytest.mark.parametrize("other", [np.asarray, sparse.coo_matrix])
def test_validation_rows_of_another_kind(table, other):
    x, y = one_hot()
    held, label = one_hot(seed=1)
    want = LinearRanker(max_iter=10).fit(x, y, X_val=held, y_val=label)
    model = LinearRanker(max_iter=10).fit(table(x), y, X_val=other(held), y_val=label)
    assert_same(model, want)


def test_a_pipeline_of_categories():
    pandas = pytest.importorskip("pandas")
    rng = np.random.default_rng(0)
    frame = pandas.DataFrame(
        {"age": rng.normal(40, 10, 1000), "city": rng.choice([f"t{i}" for i in range(30)], 1000)}
    )
    y = rng.random(1000) < 0.05 + 0.3 * (frame.city == "t3")

    def scores(sparse_output):
        columns = ColumnTransformer(
            [("city", OneHotEncoder(sparse_output=sparse_output), ["city"])],
            remainder="passthrough",
        )
        model = make_pipeline(columns, LinearRanker(random_state=0, cv=1, max_iter=20)).fit(
            frame, y
        )
        table = model[:-1].transform(frame)
        assert sparse.issparse(table) == sparse_output
        return model.decision_function(frame), model[-1], table

    (found, model, _), (want, dense, x) = scores(True), scores(False)
    assert_same(model, dense)
    assert (abs(found - want) <= rounding(dense, x)).all()


def test_memory_is_that_of_the_sparse_table():
    rows, columns, each = 20_000, 20_000, 20
    rng = np.random.default_rng(0)
    places = np.sort(rng.integers(0, columns // each, (rows, each))
                     + np.arange(each) * (columns // each))  # fmt: skip
    x = sparse.csr_array(
        (rng.random(rows * each) + 0.5, places.ravel(), np.arange(rows + 1) * each),
        shape=(rows, columns),
    )
    scores = x @ rng.normal(size=columns)
    y = scores > np.quantile(scores, 0.95)
    size = x.data.nbytes + x.indices.nbytes + x.indptr.nbytes
    tracemalloc.start()
    try:
        LinearRanker(max_iter=10, n_features=10, random_state=0, cv=1).fit(x, y)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    # Three parts of it at once, their hashes as Python objects, vectors of rows and of columns.
    assert peak < 4 * size < 8 * rows * columns / 50


def test_what_is_filled_decides():
    x, _ = one_hot(200)
    assert sparse.issparse(_rows.as_table(x))
    filled = np.where(np.random.default_rng(0).random((200, 8)) < 0.25, 0.0, 1.0)
    assert _rows.as_table(filled) is filled
    np.testing.assert_array_equal(_rows.as_table(sparse.coo_array(filled)), filled)


def test_a_filled_table_that_is_too_large_stays_sparse(monkeypatch):
    x, y = contested(1500, seed=0)
    dense = LinearRanker(random_state=0, cv=1, max_iter=0).fit(x, y)
    monkeypatch.setattr(_rows, "BLOCK", 100)
    assert sparse.issparse(_rows.as_table(sparse.csr_array(x)))
    model = LinearRanker(random_state=0, cv=1, max_iter=0).fit(sparse.csr_array(x), y)
    # Newton's method takes the same steps, each of sums in another order: measured 1e-15.
    np.testing.assert_allclose(model.coef_, dense.coef_, rtol=1e-10)
    np.testing.assert_allclose(model.intercept_, dense.intercept_, rtol=1e-10)
    assert model.C_ == dense.C_


@pytest.mark.parametrize("weighted", [False, True])
def test_scaling(weighted):
    x, y = one_hot(400)
    weight = np.random.default_rng(0).random(400) + 0.5 if weighted else None
    # None of the first three is filled in more than half of the rows; the last two everywhere.
    x[:, 0] = 7.0 * (np.arange(400) % 2)
    expected = StandardScaler().fit(x, sample_weight=weight)
    for kind in (np.array, sparse.csr_array):
        rows = _rows.Rows(kind(x), y, weight)
        by = _rows.scaling(rows)
        np.testing.assert_allclose(by.scale, expected.scale_, rtol=1e-12)
        np.testing.assert_array_equal(np.flatnonzero(by.shift[::-1]), [0, 1])
        np.testing.assert_allclose(by.shift[-2:], expected.mean_[-2:], rtol=1e-12)
        scaled = by.apply(rows).x
        scaled = scaled.toarray() if sparse.issparse(scaled) else scaled
        np.testing.assert_array_equal(scaled, (x - by.shift) / by.scale)
        if not weighted:  # the promise of the class
            assert abs(scaled.mean(0)).max() <= 1 + 1e-12


def test_rows_are_known_by_what_they_hold():
    x = np.array([[0.0, 1.0, 0.0], [1.0, 0.0, 0.0], [-0.0, 1.0, 0.0], [1.0, 2.0, 3.0]])
    dense = _rows._keys(x, b"seed")
    np.testing.assert_array_equal(dense, _rows._keys(sparse.csr_array(x), b"seed"))
    assert dense[0] == dense[2]
    assert len(set(dense)) == 3
    assert not np.array_equal(dense, _rows._keys(x, b"other"))


def test_blocks_of_rows_do_not_matter(monkeypatch):
    x, _ = contested(100, seed=0)
    whole = _rows._keys(x, b"")
    monkeypatch.setattr(_rows, "BLOCK", 9)  # two rows of four
    np.testing.assert_array_equal(_rows._keys(x, b""), whole)


@pytest.mark.parametrize("weighted", [False, True])
def test_selection_is_orthogonal_matching_pursuit(weighted):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(500, 20)) @ rng.normal(size=(20, 20))
    y = x[:, 3] + 2 * x[:, 7] - x[:, 11] + rng.normal(size=500) > 4
    weight = rng.random(500) + 0.5 if weighted else np.ones(500)
    root = np.sqrt(weight)[:, None]
    for count in (1, 4, 12):
        centred = x - np.average(x, axis=0, weights=weight)
        target = (y - np.average(y, weights=weight)) * root[:, 0]
        want = orthogonal_mp(centred * root, target, n_nonzero_coefs=count) != 0
        for table in (x, sparse.csr_array(x)):
            rows = card.Rows(table, y, weight if weighted else None)
            np.testing.assert_array_equal(card.select(rows, count), want)


def test_of_equal_features_the_first_is_picked():
    x = np.eye(2)[np.arange(400) % 2]  # each is 1 minus the other
    y = np.arange(400) % 10 == 0
    for table in (x, sparse.csr_array(x)):
        np.testing.assert_array_equal(card.select(card.Rows(table, y, None), 2), [True, False])
    nothing = card.Rows(np.zeros((400, 3)), y, None)
    np.testing.assert_array_equal(card.select(nothing, 2), [True, False, False])


@pytest.mark.parametrize("columns", [1, 3])
def test_a_table_of_zeros(columns):
    y = np.arange(40) % 4 == 0
    model = LinearRanker(random_state=0, n_features=1).fit(sparse.csr_array((40, columns)), y)
    np.testing.assert_array_equal(model.coef_, np.zeros((1, columns)))
    assert not model.improved_


def test_bad_sparse_data():
    x, y = one_hot(200)
    model = LinearRanker(random_state=0, cv=1, max_iter=0).fit(sparse.csr_array(x), y)
    with pytest.raises(ValueError, match="X has 3 features, but LinearRanker is expecting 43"):
        model.decision_function(sparse.csr_array(x[:, :3]))
    with pytest.raises(ValueError, match="n_features of at most the 43 features of X, got 44"):
        LinearRanker(n_features=44).fit(sparse.csr_array(x), y)
    x[0, 0] = np.nan
    with pytest.raises(ValueError, match="Input X contains NaN"):
        LinearRanker().fit(sparse.csr_array(x), y)
