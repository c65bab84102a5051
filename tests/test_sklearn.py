"""The scorecard estimator keeps scikit-learn's contract and finds rankings logistic loss misses."""

import functools
import pickle

import numpy as np
import pytest
from sklearn import config_context
from sklearn.base import clone
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import average_precision_score, roc_auc_score
from sklearn.model_selection import GridSearchCV, KFold, StratifiedKFold, cross_val_predict
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import MinMaxScaler, StandardScaler
from sklearn.utils.estimator_checks import estimator_checks_generator

from proxy_losses.integrations import _scorecard as card
from proxy_losses.integrations import sklearn as ours
from proxy_losses.integrations.sklearn import LinearRanker

from .absent import import_without
from .scorecards import contested, fitted, same_for_both


def _id(value) -> str:
    name = value.func if isinstance(value, functools.partial) else type(value)
    return name.__name__


# Two folds and few steps: these are checks of the contract. One has a single negative row left.
@pytest.mark.filterwarnings("ignore:too few distinct rows of the negative class:UserWarning")
@pytest.mark.parametrize(
    ("estimator", "check"),
    list(estimator_checks_generator(LinearRanker(max_iter=5, cv=2))),
    ids=_id,
)
def test_scikit_learn_contract(estimator, check):
    check(estimator)


def test_a_table_of_one_feature():
    X, y = same_for_both()
    model = fitted(X[:, :1], y, n_features=1, max_iter=10)
    assert model.coef_.shape == (1, 1)
    assert model.coef_[0, 0] > 0


@pytest.mark.parametrize("metric", card.METRICS)
def test_beats_logistic_regression_where_that_cannot_be_best(metric):
    X, y = contested(8000, seed=0)
    new, label = contested(20_000, seed=1)
    few = {"cv": 1, "mix": (1.0, 0.5), "l2": (1.0,)}
    ours, logistic = (fitted(X, y, metric, **few, max_iter=steps) for steps in (150, 0))
    assert ours.improved_
    assert ours.best_iter_ == ours.n_iter_ == 150
    assert ours.shares_.shape == (2, 1)
    assert 0.25 <= ours.shares_.sum() <= 1.0
    assert not logistic.improved_
    np.testing.assert_array_equal(logistic.shares_, 0.0)
    assert ours.baseline_score_ == logistic.baseline_score_ == logistic.validation_score_
    assert ours.C_ == logistic.C_
    if metric == "enrichment":
        ours, logistic = (model.set_params(metric="recall") for model in (ours, logistic))
    value, before = (model.score(new, label) for model in (ours, logistic))
    # 800 positives: one standard error of any of these metrics is below sqrt(1/4 / 800) = 0.018
    assert value > before + 2 * 0.018


def test_keeps_the_logistic_regression_where_nothing_is_better():
    X, y = same_for_both()
    # A step this large leaves the slope of every sigmoid behind.
    model = fitted(X, y, learning_rate=1e6, max_iter=20, mix=[1.0], cv=1)
    logistic = fitted(X, y, max_iter=0, cv=1)
    assert not model.improved_
    assert (model.best_iter_, model.n_iter_) == (0, 20)
    assert model.validation_score_ == model.baseline_score_
    np.testing.assert_array_equal(model.coef_, logistic.coef_)
    np.testing.assert_array_equal(model.intercept_, logistic.intercept_)


def test_scores_that_contradict_the_held_out_rows_are_not_calibrated():
    one = np.ones((1, 20))
    parts = card.Parts(np.array([[0.0], [1.0]] * 10), np.array([True, False] * 10), one, one)
    for weights in (np.array([[1.0, 0.0]]), np.zeros((1, 2))):
        np.testing.assert_array_equal(card.calibrate(weights, parts), weights[0])
    X, y = same_for_both()
    model = LinearRanker(random_state=0).fit(X, y, X_val=X, y_val=1 - y)
    assert not model.improved_
    assert roc_auc_score(y, model.decision_function(X)) > 0.9


def test_a_table_that_tells_nothing():
    y = np.arange(40) % 4 == 0
    model = fitted(np.ones((40, 2)), y)
    assert not model.improved_
    np.testing.assert_array_equal(model.coef_, 0.0)


def test_probabilities_are_calibrated():
    X, y = contested(6000, seed=0)
    new, label = contested(20_000, seed=1)
    model = fitted(X, y, cv=3)
    assert model.improved_
    # Platt's intercept makes mean probability and rate equal on the held-out rows: 240 positives
    # there, 4 standard errors of their rate are 0.26 of it.
    assert model.predict_proba(new)[:, 1].mean() == pytest.approx(label.mean(), rel=0.26)
    np.testing.assert_array_equal(
        model.predict(new), model.classes_[(model.predict_proba(new)[:, 1] > 0.5).astype(int)]
    )


def test_same_seed_same_bits_other_seed_other_rows():
    X, y = contested(1500, seed=0)
    first, again, other = (fitted(X, y, random_state=s, cv=1, max_iter=30) for s in (0, 0, 1))
    np.testing.assert_array_equal(first.coef_, again.coef_)
    np.testing.assert_array_equal(first.intercept_, again.intercept_)
    assert not np.array_equal(first.coef_, other.coef_)


def test_picks_features_and_reports_them_in_their_own_units():
    pandas = pytest.importorskip("pandas")
    X, y = contested(3000, seed=0)
    noise = np.random.default_rng(1).normal(size=(3000, 12))
    units = 10.0 ** np.arange(-8, 8)  # a feature's unit must not decide
    frame = pandas.DataFrame(np.hstack([X, noise]) * units + units)
    frame.columns = [f"f{index}" for index in range(16)]
    model = fitted(frame, y, n_features=2, max_iter=50, cv=1)
    np.testing.assert_array_equal(np.flatnonzero(model.support_), [0, 1])
    np.testing.assert_array_equal(np.flatnonzero(model.coef_[0]), [0, 1])
    rows = model.scorecard()
    assert {row.feature for row in rows} == {"f0", "f1"}
    assert abs(rows[0].effect) >= abs(rows[1].effect)
    total = model.intercept_[0] + sum(row.weight * frame[row.feature].to_numpy() for row in rows)
    np.testing.assert_allclose(total, model.decision_function(frame), rtol=1e-12, atol=1e-12)
    part = model.scale_[model.support_]
    assert sorted(row.effect / row.weight for row in rows) == pytest.approx(sorted(part))
    # The same features alone give the same card, where they are validated on the same rows.
    own = {"X_val": frame[:1000], "y_val": y[:1000]}
    model = LinearRanker(n_features=2, max_iter=50).fit(frame, y, **own)
    few = frame[["f0", "f1"]]
    alone = LinearRanker(max_iter=50).fit(few, y, X_val=few[:1000], y_val=y[:1000])
    np.testing.assert_allclose(alone.coef_[0], model.coef_[0, :2], rtol=1e-6)
    assert fitted(frame.to_numpy(), y, n_features=1, max_iter=0).scorecard()[0].feature[0] == "x"


def test_a_weight_is_a_number_of_rows_in_any_order():
    X, y = contested(1500, seed=0)
    rng = np.random.default_rng(0)
    weight = rng.integers(0, 4, size=1500)
    rows = rng.permutation(np.repeat(np.arange(1500), weight))
    weighted = LinearRanker(random_state=0, cv=1, max_iter=30).fit(X, y, weight)
    repeated = LinearRanker(random_state=0, cv=1, max_iter=30).fit(X[rows], y[rows])
    np.testing.assert_array_equal(weighted.coef_, repeated.coef_)
    np.testing.assert_array_equal(weighted.intercept_, repeated.intercept_)
    assert not np.allclose(weighted.coef_, fitted(X, y, max_iter=30).coef_)
    assert weighted.score(X, y, weight) == pytest.approx(repeated.score(X[rows], y[rows]))


def test_validation_rows_of_ones_own():
    X, y = contested(2000, seed=0)
    other, label = contested(2000, seed=1)
    weight = np.random.default_rng(0).random(2000) + 0.5
    model = LinearRanker(max_iter=30).fit(X, y, X_val=other, y_val=label, sample_weight_val=weight)
    reached = average_precision_score(label, model.decision_function(other), sample_weight=weight)
    assert model.validation_score_ == pytest.approx(reached, abs=1e-12)
    again = LinearRanker(max_iter=30, random_state=7).fit(
        X, y, X_val=other, y_val=label, sample_weight_val=weight
    )
    np.testing.assert_array_equal(model.coef_, again.coef_)


def test_labels_of_any_kind():
    X, y = same_for_both()
    named = fitted(X, np.array(["good", "late"])[y], max_iter=0)
    np.testing.assert_array_equal(named.classes_, ["good", "late"])
    np.testing.assert_array_equal(
        named.decision_function(X), fitted(X, y, max_iter=0).decision_function(X)
    )
    assert set(named.predict(X)) == {"good", "late"}


def test_a_gain_within_tol_is_none():
    X, y = contested(2000, seed=0)
    assert fitted(X, y, cv=2).improved_
    assert not fitted(X, y, cv=2, tol=1e3, max_iter=10).improved_


def test_ways_to_hold_out(monkeypatch):
    X, y = contested(1500, seed=0)
    splitter = StratifiedKFold(3)
    by_splitter = fitted(X, y, cv=splitter, max_iter=10)
    by_list = fitted(X, y, cv=list(splitter.split(X, y)), max_iter=10)
    np.testing.assert_array_equal(by_splitter.coef_, by_list.coef_)
    # The held-out metric of a logistic regression: all parts, each scored by the others, as one.
    model = fitted(X, y, cv=splitter, max_iter=0, Cs=[1.0])
    new = cross_val_predict(
        make_pipeline(StandardScaler(), LogisticRegression()), X, y, cv=splitter,
        method="decision_function",
    )  # fmt: skip
    assert model.baseline_score_ == pytest.approx(average_precision_score(y, new), abs=0.01)
    few, one = (fitted(X, y, max_iter=0, cv=cv) for cv in (None, 1))
    monkeypatch.setattr(ours, "MANY", 10)
    many = fitted(X, y, max_iter=0)
    assert many.baseline_score_ == one.baseline_score_ != few.baseline_score_
    weight = (np.arange(1500) % 2).astype(float)
    some = fitted(X, y, cv=KFold(3), max_iter=0)
    half = LinearRanker(cv=KFold(3), max_iter=0).fit(X, y, weight)
    assert some.baseline_score_ != half.baseline_score_


def test_progress(capsys):
    X, y = same_for_both()
    fitted(X, y, max_iter=10)
    assert capsys.readouterr() == ("", "")
    fitted(X, y, max_iter=10, verbose=1)
    shown = capsys.readouterr().err
    assert "LinearRanker" in shown
    assert "10/10" in shown


def test_many_features_take_the_other_solver(monkeypatch):
    X, y = same_for_both()
    newton = fitted(X, y, max_iter=0)
    monkeypatch.setattr(card, "_MOST_FOR_NEWTON", 1)
    # lbfgs stops at a gradient of 1e-4 of the mean loss
    np.testing.assert_allclose(fitted(X, y, max_iter=0).coef_, newton.coef_, atol=0.01)


def test_score_is_the_metric():
    X, y = contested(2000, seed=0)
    names = np.array(["good", "late"])[y]
    model = LinearRanker(max_iter=10, random_state=0, cv=1).fit(X, names)
    score = model.decision_function(X)
    assert model.score(X, names) == average_precision_score(y, score)
    model.set_params(metric="pauc", fpr=0.1)
    expected = roc_auc_score(y, score, max_fpr=0.1)
    assert model.score(X, names) == pytest.approx(expected, rel=1e-11)  # other sums
    recall = model.set_params(metric="recall", quantile=0.1).score(X, names)
    assert model.set_params(metric="enrichment").score(X, names) == pytest.approx(10 * recall)
    with pytest.raises(ValueError, match="y of the classes good and late, got early too"):
        model.score(X[:2], ["late", "early"])
    with pytest.raises(ValueError, match="two classes, got one class"):
        model.score(X[:2], ["late", "late"])


def test_validation_rows_go_through_a_pipeline():
    X, y = contested(1000, seed=0)
    other, label = contested(1000, seed=1)
    scale = np.array([1.0, 10.0, 1e3, 1e-4])
    with config_context(enable_metadata_routing=True):
        last = LinearRanker(max_iter=10).set_fit_request(X_val=True, y_val=True)
        model = make_pipeline(MinMaxScaler(), last, transform_input=["X_val"])
        model.fit(X * scale, y, X_val=other * scale, y_val=label)
    reached = average_precision_score(label, model.decision_function(other * scale))
    assert model[-1].validation_score_ == pytest.approx(reached, abs=1e-12)


def test_without_its_extra(monkeypatch):
    with pytest.raises(ImportError, match=r"pip install '\.\[sklearn\]' in a clone"):
        import_without(monkeypatch, "sklearn", "sklearn.base")


def test_works_inside_scikit_learn():
    X, y = contested(1000, seed=0)
    model = make_pipeline(MinMaxScaler(), LinearRanker(max_iter=10, random_state=0, cv=1))
    search = GridSearchCV(
        model,
        {"linearranker__n_features": [1, 2]},
        cv=2,
        error_score="raise",
    ).fit(X, y)
    assert search.best_params_["linearranker__n_features"] in (1, 2)
    best = search.best_estimator_
    assert search.best_score_ < 0.9  # average precision; nearly all rows are negative
    restored = pickle.loads(pickle.dumps(best))
    np.testing.assert_array_equal(restored.decision_function(X), best.decision_function(X))
    copy = clone(best[-1])
    assert copy.get_params() == best[-1].get_params()
    assert not hasattr(copy, "coef_")
