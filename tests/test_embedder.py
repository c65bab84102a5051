"""The embedder keeps scikit-learn's contract, finds new classes better, and never does worse."""

import functools
import pickle

import numpy as np
import pytest
import torch
from sklearn import config_context
from sklearn.base import clone
from sklearn.metrics import average_precision_score
from sklearn.model_selection import GridSearchCV, GroupKFold
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import MinMaxScaler, normalize
from sklearn.utils.estimator_checks import estimator_checks_generator

from proxy_losses.integrations import _classes, _embedder
from proxy_losses.integrations.sklearn import LinearEmbedder

WIDTH = 12


def made(classes, rows, seed=0, noisy=6):
    """Classes that differ everywhere, in rows that scatter widely in some directions."""
    rng = np.random.default_rng(seed)
    y = np.repeat(np.arange(classes), rows)
    scatter = np.where(np.arange(WIDTH) < noisy, 2.5, 0.7)
    x = rng.normal(size=(classes, WIDTH))[y] + rng.normal(size=(len(y), WIDTH)) * scatter
    return x + 1.0, y


def fitted(x, y, **options):
    batch = {"batch_classes": 8, "class_rows": 4}
    return LinearEmbedder(**{"random_state": 0, "max_iter": 40, **batch, **options}).fit(x, y)


def precision(x, y):
    """Mean average precision by cosine, of scikit-learn's, query by query."""
    x = x.astype(np.float64) / np.linalg.norm(x, axis=1, keepdims=True)
    values = []
    for q in range(len(y)):
        others = np.arange(len(y)) != q
        if (y[others] == y[q]).any():
            values.append(average_precision_score(y[others] == y[q], x[others] @ x[q]))
    return np.mean(values)


def _id(value) -> str:
    name = value.func if isinstance(value, functools.partial) else type(value)
    return name.__name__


# Most of the checks have three classes or fewer.
@pytest.mark.filterwarnings("ignore:fewer than 4 classes of two rows or more:UserWarning")
@pytest.mark.parametrize(
    ("estimator", "check"), list(estimator_checks_generator(LinearEmbedder(max_iter=20))), ids=_id
)
def test_scikit_learn_contract(estimator, check):
    check(estimator)


def test_finds_new_classes_better():
    x, y = made(60, 12)
    new, label = made(60, 12, seed=1)
    model = fitted(x, y, max_iter=80)
    assert model.improved_
    assert 0 < model.best_iter_ <= model.n_iter_ <= 80
    assert model.baseline_score_ < model.whitened_score_ < model.validation_score_
    raw, whitened = precision(new, label), fitted(x, y, max_iter=0).score(new, label)
    # Mean average precision of 720 queries: its standard error is below sqrt(1/4 / 720) = 0.019
    assert whitened > raw + 2 * 0.019
    assert model.score(new, label) > raw + 2 * 0.019


def test_score_is_that_of_the_rows_it_makes():
    x, y = made(10, 6)
    y = np.append(y, [100, 101])  # nothing to find, but to be ranked
    x = np.vstack([x, x[:2]])  # ties
    model = fitted(x, y)
    found = model.transform(x)
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1.0, rtol=1e-12)
    # float64 products of equal rows may differ in their last digits, which parts ties
    assert model.score(x, y) == pytest.approx(precision(found.round(12), y), abs=1e-3)
    plain = clone(model).set_params(normalize=False).fit(x, y).transform(x)
    np.testing.assert_allclose(
        plain / np.linalg.norm(plain, axis=1, keepdims=True), found, rtol=1e-9
    )
    np.testing.assert_allclose(model.transform(3.0 * x), found, rtol=1e-9)


def test_precision_of_ties_is_that_of_scikit_learn():
    scores = np.random.default_rng(0).integers(0, 8, size=60).astype(np.float32)
    mine = np.arange(60) // 20 == 1
    rest = np.arange(60) != 27
    expected = average_precision_score(mine[rest], scores[rest])
    scores[27] = -np.inf
    found = _classes._precision(scores, np.sort(scores), (20, 40))
    assert found == pytest.approx(expected, abs=1e-12)


def test_whitening_is_the_formula():
    x, y = made(5, 7)
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    within = np.zeros((WIDTH, WIDTH))
    for label in range(5):
        for row in x[y == label]:
            apart = row - x[y == label].mean(0)
            within += np.outer(apart, apart)
    within /= np.linalg.eigvalsh(within).mean()
    rows = _classes.Labelled(x, 2 * y)  # labels may have gaps
    for a, found in _classes.whitenings(rows, [0.2, 1.0]):
        np.testing.assert_allclose(found.mean, x.mean(0), atol=1e-12)
        inverse = found.weight @ found.weight
        np.testing.assert_allclose(
            inverse @ ((1 - a) * within + a * np.eye(WIDTH)), np.eye(WIDTH), atol=1e-9
        )


def test_keeps_the_raw_embeddings_where_nothing_is_better():
    x, y = made(30, 6, noisy=0)
    x -= 1.0
    options = {"learning_rate": 1e6, "max_iter": 20}  # a step this large forgets the start
    model = fitted(x, y, shrinkages=(), **options)
    assert not model.improved_
    assert (model.best_iter_, model.n_iter_, model.shrinkage_) == (0, 20, 1.0)
    assert model.validation_score_ == model.baseline_score_ == model.whitened_score_
    np.testing.assert_array_equal(model.components_, np.eye(WIDTH))
    np.testing.assert_array_equal(model.mean_, 0.0)
    # and the whitening where the steps are worse
    x, y = made(30, 6)
    model = fitted(x, y, **options)
    assert model.improved_
    assert model.validation_score_ == model.whitened_score_ > model.baseline_score_


def test_holds_out_whole_classes():
    x, y = made(20, 5)
    x, y = np.vstack([x, x[:4]]), np.append(y, range(90, 94))
    rows = _classes.Labelled(x, np.unique(y, return_inverse=True)[1])
    train, held = _classes.hold_out(rows, 0.25, np.random.RandomState(0))
    assert not set(train.y) & set(held.y)
    assert (np.bincount(held.y) == 5).sum() == 5
    assert (np.bincount(held.y) == 1).sum() == 1  # of the four
    assert len(train.y) + len(held.y) == len(y)


def test_few_classes():
    x, y = made(3, 8)
    with pytest.warns(UserWarning, match="rows are held out instead of classes"):
        model = fitted(x, y)
    assert 0 < model.validation_score_ <= 1
    rows = _classes.Labelled(x, y)
    with pytest.warns(UserWarning, match="rows are held out"):
        train, held = _classes.hold_out(rows, 0.25, np.random.RandomState(0))
    assert np.bincount(held.y).tolist() == [2, 2, 2]
    assert np.bincount(train.y).tolist() == [6, 6, 6]
    with pytest.warns(UserWarning, match="training and for validation alike"):
        fitted(*made(2, 3))


def test_one_class_alone_is_never_held_out():
    """Nor trained: it has nothing to be told from, and all maps would be as good."""
    x, y = made(4, 6)
    some = (y == 0) | (np.arange(len(y)) % 6 < 1)  # six rows of one class, one of the others
    with pytest.warns(UserWarning, match="training and for validation alike"):
        model = fitted(x[some], y[some])
    assert model.n_iter_ == 0
    assert model.baseline_score_ < model.validation_score_ == model.score(x[some], y[some])


def test_a_map_that_is_not_finite_is_worse_than_all():
    rows = _classes.Labelled(*made(3, 4))
    judge = _classes.Judge(rows, torch.device("cpu"))
    assert np.isnan(judge(_classes.Affine(np.full((2, WIDTH), np.inf), np.zeros(WIDTH))))
    assert np.isfinite(fitted(*made(6, 4), learning_rate=1e30).components_).all()


def test_batches_hold_rows_that_have_something_to_find():
    y = np.array([0] * 9 + [1] * 3 + [2] + [3] * 2 + [5])
    batches = _classes.Batches(y, 2, 4, np.random.RandomState(0))
    seen = set()
    for _ in range(40):
        rows = batches.draw()
        assert len(set(rows)) == len(rows)
        counts = dict(zip(*np.unique(y[rows], return_counts=True), strict=True))
        assert len(counts) == 2
        assert all(n == {0: 4, 1: 3, 3: 2}[label] for label, n in counts.items())
        seen |= set(counts)
    assert seen == {0, 1, 3}


def test_fewer_components():
    x, y = made(40, 10)
    model = fitted(x, y, n_components=4)
    assert model.components_.shape == (4, WIDTH)
    assert model.transform(x).shape == (len(x), 4)
    assert list(model.get_feature_names_out())[-1] == "linearembedder3"
    # Raw rows are then projected on their leading directions, as by a singular value decomposition.
    raw = fitted(x, y, n_components=4, shrinkages=(), max_iter=0)
    unit = x / np.linalg.norm(x, axis=1, keepdims=True)
    leading = np.linalg.svd(unit)[2][:4]
    np.testing.assert_allclose(raw.components_.T @ raw.components_, leading.T @ leading, atol=1e-9)
    assert raw.validation_score_ != raw.baseline_score_
    full = fitted(x, y, shrinkages=(), max_iter=0)
    assert raw.baseline_score_ == full.validation_score_


def test_fits_again_with_all_classes():
    x, y = made(30, 6)
    unit = x / np.linalg.norm(x, axis=1, keepdims=True)
    whitened = fitted(x, y, max_iter=0)
    again = dict(_classes.whitenings(_classes.Labelled(unit, y), [whitened.shrinkage_]))
    np.testing.assert_allclose(
        whitened.components_, again[whitened.shrinkage_].weight, rtol=1e-9, atol=1e-12
    )
    model, kept = fitted(x, y), fitted(x, y, refit=False)
    assert model.best_iter_ == kept.best_iter_ > 0
    assert model.validation_score_ == kept.validation_score_
    np.testing.assert_allclose(model.mean_, unit.mean(0), atol=1e-12)
    assert np.abs(kept.mean_ - unit.mean(0)).max() > 1e-3
    # Adam moves an entry by a rate in its first step, and by (1 - 0.9) / sqrt(1 - 0.999) = 3.2
    # rates at most in any.
    moved = np.abs(model.components_ - whitened.components_).max()
    assert 0.001 / WIDTH**0.5 < moved < 3.2 * model.best_iter_ * 0.005 / WIDTH**0.5


def test_same_seed_same_bits():
    x, y = made(30, 6)
    first, again, other = (fitted(x, y, random_state=s) for s in (0, 0, 1))
    np.testing.assert_array_equal(first.components_, again.components_)
    assert not np.array_equal(first.components_, other.components_)


def test_kinds_of_input():
    x, y = made(12, 6)
    names = np.array([f"class {label}" for label in y])
    wide, narrow = fitted(x, y), fitted(x.astype(np.float32), y)
    assert wide.transform(x).dtype == np.float64
    assert narrow.components_.dtype == narrow.mean_.dtype == np.float32
    assert narrow.transform(x.astype(np.float32)).dtype == np.float32
    assert fitted(x.astype(np.float16), y).transform(x.astype(np.float16)).dtype == np.float32
    order = np.argsort([f"class {label}" for label in range(12)])
    relabelled = fitted(x, np.argsort(order)[y])
    np.testing.assert_array_equal(fitted(x, names).components_, relabelled.components_)
    zero = wide.transform(np.vstack([x[:1], 0 * x[:1]]))
    assert np.isfinite(zero).all()


def test_equal_rows_in_every_class():
    x, y = made(6, 1)
    model = fitted(np.repeat(x, 3, axis=0), np.repeat(y, 3))
    assert model.validation_score_ == model.baseline_score_ == 1.0
    assert not model.improved_
    assert (
        _classes.whitenings(_classes.Labelled(np.full((20, 7), 0.1), np.arange(20) % 2), [1]) == []
    )


@pytest.mark.parametrize(("dtype", "exponents"), [("f4", [-120, 120]), ("f8", [-900, 900])])
def test_length_of_rows_does_not_matter(dtype, exponents):
    x = made(3, 4)[0].astype(dtype)
    for exponent in exponents:
        scaled = _classes.unit_rows(np.ldexp(x, exponent))
        np.testing.assert_array_equal(scaled, normalize(x))


def test_validation_rows_of_ones_own():
    x, y = made(20, 6)
    other, label = made(15, 6, seed=1)
    names = label.astype(str)
    model = LinearEmbedder(max_iter=40).fit(x, y, X_val=other, y_val=names)
    assert model.validation_score_ == pytest.approx(model.score(other, names), abs=1e-6)
    scale = np.arange(1.0, WIDTH + 1)
    with config_context(enable_metadata_routing=True):
        last = LinearEmbedder(max_iter=20).set_fit_request(X_val=True, y_val=True)
        pipe = make_pipeline(MinMaxScaler(), last, transform_input=["X_val"])
        pipe.fit(x * scale, y, X_val=other * scale, y_val=label)
    assert pipe[-1].validation_score_ == pytest.approx(pipe.score(other * scale, label), abs=1e-6)


def test_few_queries_stand_for_many(monkeypatch):
    monkeypatch.setattr(_embedder, "MOST_QUERIES", 30)
    monkeypatch.setattr(_classes, "_QUERIES", 7)
    x, y = made(12, 10)
    model = fitted(x, y, max_iter=0, validation_fraction=0.5)
    monkeypatch.undo()
    whole = fitted(x, y, max_iter=0, validation_fraction=0.5)
    assert model.baseline_score_ != whole.baseline_score_
    assert model.baseline_score_ == pytest.approx(whole.baseline_score_, abs=0.2)


def test_stops_after_steps_without_gain():
    x, y = made(12, 5)
    assert fitted(x, y, learning_rate=1e6, n_iter_no_change=20, max_iter=90).n_iter_ == 20
    assert fitted(x, y, n_iter_no_change=None, max_iter=25).n_iter_ == 25
    assert fitted(x, y, tol=1.0).best_iter_ == 0
    assert fitted(x, y, n_iter_no_change=3).best_iter_ > 0  # it looks before it stops


def test_progress(capsys):
    x, y = made(12, 5)
    fitted(x, y)
    assert capsys.readouterr() == ("", "")
    fitted(x, y, verbose=1)
    shown = capsys.readouterr().err
    assert "LinearEmbedder" in shown
    assert "40/40" in shown
    assert "validation=0." in shown


def test_works_inside_scikit_learn():
    pandas = pytest.importorskip("pandas")
    x, y = made(16, 5)
    frame = pandas.DataFrame(x, columns=[f"f{k}" for k in range(WIDTH)])
    search = GridSearchCV(
        LinearEmbedder(max_iter=20, random_state=0),
        {"n_components": [4, None]},
        cv=GroupKFold(2),
        error_score="raise",
    ).fit(frame, y, groups=y)
    best = search.best_estimator_.set_output(transform="pandas")
    found = best.transform(frame)
    assert list(found.columns) == list(best.get_feature_names_out())
    restored = pickle.loads(pickle.dumps(best))
    np.testing.assert_array_equal(restored.transform(frame), found)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n_components": 0}, "'n_components' parameter"),
        ({"n_components": WIDTH + 1}, "n_components of at most the 12 features"),
        ({"normalize": "l2"}, "'normalize' parameter"),
        ({"tau": 0.0}, "'tau' parameter"),
        ({"shrinkages": [0.5, 0.0]}, r"shrinkages to be a list of numbers in \(0, 1\]"),
        ({"shrinkages": [1.5]}, r"shrinkages to be a list of numbers in \(0, 1\]"),
        ({"shrinkages": 0.5}, "'shrinkages' parameter|shrinkages to be a list"),
        ({"batch_classes": 1}, "'batch_classes' parameter"),
        ({"class_rows": 1}, "'class_rows' parameter"),
        ({"learning_rate": 0}, "'learning_rate' parameter"),
        ({"max_iter": -1}, "'max_iter' parameter"),
        ({"n_iter_no_change": 0}, "'n_iter_no_change' parameter"),
        ({"tol": -1.0}, "'tol' parameter"),
        ({"validation_fraction": 1.0}, "'validation_fraction' parameter"),
        ({"refit": "yes"}, "'refit' parameter"),
        ({"device": "nowhere"}, "a device that torch has here, got 'nowhere'"),
        ({"device": "meta"}, "a device that torch has here, got 'meta'"),
        ({"device": 3}, "'device' parameter"),
        ({"verbose": -1}, "'verbose' parameter"),
    ],
)
def test_bad_parameters(options, message):
    with pytest.raises(ValueError, match=message):
        fitted(*made(6, 4), **options)


def test_bad_data():
    x, y = made(6, 4)
    model = LinearEmbedder()
    with pytest.raises(ValueError, match="two classes or more, one of them of two rows or more"):
        model.fit(x, np.zeros(len(x)))
    with pytest.raises(ValueError, match="got 24 of at most 1"):
        model.fit(x, np.arange(len(x)))
    with pytest.raises(ValueError, match="Unknown label type: continuous"):
        model.fit(x, x[:, 0])
    with pytest.raises(ValueError, match="X_val needs y_val"):
        model.fit(x, y, X_val=x)
    with pytest.raises(ValueError, match="y_val needs X_val"):
        model.fit(x, y, y_val=y)
    for bad, message in (
        (np.arange(len(x)), "of which two share a class"), (0 * y, "y_val of two classes or more"),
        (x[:, 0], "Unknown label type: continuous"), (np.nan * y, "Input y contains NaN"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            model.fit(x, y, X_val=x, y_val=bad)
    model = fitted(x, y, max_iter=0)
    with pytest.raises(ValueError, match="of which two share a class"):
        model.score(x[:2], [0, 1])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_on_a_gpu():
    x, y = made(30, 6)
    model, there = fitted(x, y, device="cpu"), fitted(x, y)
    assert there.validation_score_ == pytest.approx(model.validation_score_, abs=0.05)
