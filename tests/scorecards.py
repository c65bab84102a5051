"""Tables for the tests of the scorecard estimator."""

import numpy as np

from proxy_losses.integrations.sklearn import LinearRanker


def contested(rows: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Column 0 tells more positives, but its top is full of negatives; that of 1 is clean."""
    rng = np.random.default_rng(seed)
    y = rng.random(rows) < 0.04
    X = rng.normal(size=(rows, 4))
    clean = y & (rng.random(rows) < 0.4)
    X[y & ~clean, 0] += 2
    X[clean, 1] += 4
    decoy = ~y & (rng.random(rows) < 0.02)
    X[decoy] += [4, 1, 0, 0]
    return X, y.astype(int)


def same_for_both(rows: int = 1200) -> tuple[np.ndarray, np.ndarray]:
    """Two normal classes of one covariance: the logistic model is the truth."""
    rng = np.random.default_rng(0)
    y = (rng.random(rows) < 0.1).astype(int)
    return rng.normal(size=(rows, 3)) + y[:, None] * [2.0, 1.0, 0.0], y


def fitted(X, y, metric="ap", **options) -> LinearRanker:
    return LinearRanker(
        metric, **{"quantile": 0.02, "fpr": 0.02, "random_state": 0, **options}
    ).fit(X, y)
