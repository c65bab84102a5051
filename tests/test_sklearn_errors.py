"""The scorecard estimator says what it expected and what it got."""

import numpy as np
import pytest
from scipy.sparse import csr_array

from proxy_losses.integrations.sklearn import LinearRanker

from .scorecards import fitted, same_for_both


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"metric": "auc"}, "'metric' parameter"),
        ({"quantile": 0.0}, "'quantile' parameter"),
        ({"fpr": 1.0}, "'fpr' parameter"),
        ({"n_features": 0}, "'n_features' parameter"),
        ({"n_features": 4}, "n_features of at most the 3 features"),
        ({"tau": 0.0}, "'tau' parameter"),
        ({"Cs": 1.0}, "'Cs' parameter|Cs to be a list"),
        ({"Cs": [1.0, 0.0]}, "Cs to be a list of numbers above 0"),
        ({"Cs": []}, "Cs to be a list of numbers above 0"),
        ({"learning_rate": 0}, "'learning_rate' parameter"),
        ({"max_iter": -1}, "'max_iter' parameter"),
        ({"mix": [0.5, 1.5]}, "mix to be a list of numbers from 0 to 1"),
        ({"mix": []}, "mix to be a list of numbers from 0 to 1"),
        ({"l2": [0.0]}, "l2 to be a list of numbers above 0"),
        ({"cv": 0}, "'cv' parameter"),
        ({"tol": -1.0}, "'tol' parameter"),
        ({"validation_fraction": 1.0}, "'validation_fraction' parameter"),
        ({"verbose": -1}, "'verbose' parameter"),
    ],
)
def test_bad_parameters(options, message):
    X, y = same_for_both(100)
    with pytest.raises(ValueError, match=message):
        fitted(X, y, **options)


def test_common_positives_of_text_are_said():
    X, y = same_for_both(100)
    y = np.arange(100) % 10 == 0
    model = LinearRanker(max_iter=0, cv=1)
    says = "'ok', which 90.0% of the rows are of.*y == 'fraud'"
    with pytest.warns(UserWarning, match=says) as found:
        model.fit(X, np.where(y, "fraud", "ok"))
    assert found[0].filename == __file__
    model.fit(X, np.where(y, "ok", "fine"))  # rare
    model.fit(X, ~y)  # not text


def test_bad_data():
    X, y = same_for_both(100)
    model = LinearRanker()
    with pytest.raises(ValueError, match="Only binary classification is supported"):
        model.fit(X, np.arange(100) % 3)
    with pytest.raises(ValueError, match="Unknown label type: continuous"):
        model.fit(X, X[:, 0])
    with pytest.raises(ValueError, match=r"X to be numbers, but .*'FR': .* pandas.get_dummies"):
        model.fit(np.full((100, 1), "FR", dtype=object), y)
    with pytest.raises(ValueError, match="two classes, got one class"):
        model.fit(X, np.zeros(100))
    with pytest.raises(ValueError, match="among those of sample_weight above 0, got one class"):
        model.fit(X, y, 1 - y)
    large = X.copy()
    large[3, 1] = -1e300  # finite, but not its square
    for kind in (np.asarray, csr_array):
        says = "features of at most 1e\\+150 in size, got 1e\\+300 in column 1: give it another"
        with pytest.raises(ValueError, match=says):
            model.fit(kind(large), y)
        with pytest.raises(ValueError, match=says):
            model.fit(X, y, X_val=kind(large), y_val=y)
    with pytest.raises(ValueError, match="X_val needs y_val"):
        model.fit(X, y, X_val=X)
    with pytest.raises(ValueError, match="y_val needs X_val"):
        model.fit(X, y, y_val=y)
    with pytest.raises(ValueError, match="sample_weight_val needs X_val"):
        model.fit(X, y, sample_weight_val=y)
    with pytest.raises(ValueError, match="y_val of the classes 0 and 1, got 2 too"):
        model.fit(X, y, X_val=X, y_val=y + 1)
    with pytest.raises(ValueError, match="among those of sample_weight_val above 0"):
        model.fit(X, y, X_val=X, y_val=y, sample_weight_val=y)
