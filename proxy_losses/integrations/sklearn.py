"""Linear models fitted for a ranking metric, as scikit-learn estimators."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from functools import partial
from itertools import product
from numbers import Integral, Real
from typing import Any, ClassVar, NamedTuple

import numpy as np
import numpy.typing as npt

try:
    from sklearn.base import BaseEstimator, ClassifierMixin, _fit_context
    from sklearn.model_selection import check_cv
    from sklearn.utils import check_random_state
    from sklearn.utils._param_validation import HasMethods, Interval, StrOptions
    from sklearn.utils.multiclass import type_of_target
    from sklearn.utils.validation import check_is_fitted, validate_data

    from . import _scorecard as card
    from ._embedder import LinearEmbedder
except ImportError as error:
    raise ImportError(
        "proxy_losses.integrations.sklearn needs scikit-learn >= 1.6 and tqdm: "
        "pip install '.[sklearn]' in a clone of this library"
    ) from error
from ._common import validates
from ._rows import (
    Parts,
    Rows,
    Sides,
    as_table,
    beside,
    count_positives,
    distinct,
    folds,
    hold_out,
    positives,
    scaling,
    split_by,
    weighted_rows,
)

__all__ = ["LinearEmbedder", "LinearRanker", "ScorecardRow"]

Array = npt.NDArray[Any]

FOLDS = 5
COMMON = 0.8  # share of a named class above which it is hardly meant to be the positive
FEW, MANY = 100, 3000  # positives: below folds are drawn twice, from there one part tells enough
TRAINED = 0.2  # share of the rows of the refit in what is chosen by


class ScorecardRow(NamedTuple):
    """One line of `LinearRanker.scorecard`."""

    feature: str
    weight: float  # log-odds per unit of the feature
    effect: float  # log-odds per standard deviation of the feature


class LinearRanker(ClassifierMixin, BaseEstimator):
    r"""Linear classifier whose coefficients maximise a metric of the top of the ranking.

    For scorecards and rare positives, where a logistic regression spends its coefficients on rows
    that nobody will look at. `fit`

    1. holds out rows: five folds, drawn twice where there are fewer than 100 positives, and from
       3,000 positives on `validation_fraction` of each class; copies of a row stay together. `cv`
       and `X_val` change that;
    2. scales the features, and picks `n_features` of them, if asked to, by orthogonal matching
       pursuit: one by one that which correlates most with what a linear fit of the labels on the
       others leaves;
    3. fits logistic regressions for all `Cs`, and keeps the one whose metric is best, which is here
       and in step 5 four fifths that of the held-out rows and one fifth that of all rows, which it
       was fitted on; with `X_val` it is that of its rows alone;
    4. from there trains all pairs of `mix` and `l2` at once, on every part and on all rows, each by
       `max_iter` steps of Adam on ``mix * (1 - soft metric) + (1 - mix) * log loss + l2 / (2 C n) *
       |coef|^2`` of its n rows;
    5. averages, in units of the spread of their scores, what is better than the logistic
       regression: from there to each trained model a quarter, half, three quarters and the whole
       way are judged, and each weighs by how much its metric grows after `tol` standard errors of
       that growth (over the held-out positives) are taken off. Where nothing is left of any, the
       logistic regression is the result, and `improved_` is False;
    6. rescales the scores to log-odds by the held-out rows (Platt), which changes no ranking.

    `decision_function` is the score to rank by, and `score` the metric. `predict` is probability
    above 1/2, which among rare positives is often nothing: for a budget take the top scores.
    There is no ``class_weight``: the metric says what a rare positive is worth. `sample_weight` is
    how many rows each stands for. The order of the rows does not matter.

    Sparse matrices and arrays are taken as they are, such as OneHotEncoder makes, and fitted as
    the dense table would be, in some three times their memory. A table of which less than a quarter
    is filled is computed with as a sparse one, however it came.

    Args:
        metric: "ap", average precision; "recall", recall in the top `quantile` of the rows;
            "enrichment", that recall over `quantile`, trained by Smooth-AP; or "pauc", area under
            the ROC curve up to the false-positive rate `fpr`, as `roc_auc_score(max_fpr=fpr)`
            scales it: 0.5 for chance.
        quantile: the top fraction, in (0, 0.5]: 0.005 is the top 0.5 %. For "recall" and
            "enrichment" only.
        fpr: false-positive rate, in (0, 1). For "pauc" only.
        n_features: how many features get a weight, fewer where the rest adds nothing; None means
            all.
        tau: temperature in standard deviations of the training scores of step 3; it stays as it is
            then.
        Cs: inverse strengths of the L2 penalty in step 3.
        mix: weights of the ranking loss to try, each in [0, 1]; 0 is the log loss alone.
        l2: penalties to try, in units of that of the logistic regression.
        learning_rate: of Adam, in standard deviations of the scores: coefficients of k scaled
            features move up to learning_rate / sqrt(k + 1) a step.
        max_iter: steps of Adam; 0 leaves the logistic regression.
        tol: standard errors of the held-out metric's growth that do not count. 0 believes every
            growth, which on few positives is mostly chance.
        cv: None as in step 1; 1 for one held-out part; a number of folds, drawn once; or what
            scikit-learn takes for cv, a splitter or a list of (training, held-out) row numbers,
            which sees no copies; one that needs groups goes as its list,
            ``[*GroupKFold(5).split(X, y, groups)]``.
        validation_fraction: share of each class held out where it is one part, in (0, 1).
        random_state: seed of the held-out rows: an int, a RandomState or None.
        verbose: above 0 shows a progress bar.

    Attributes:
        coef_: [1, features] weights in the features' own units, 0 for features not picked.
        intercept_: [1].
        classes_: [2]; the second, in sorted order, is the positive class.
        support_: [features] bool, the features picked.
        scale_: [features] standard deviations on the training rows.
        improved_: whether the ranking metric's solution was kept.
        baseline_score_: held-out metric of the logistic regression; of all parts ranked together.
        validation_score_: held-out metric of the result. It was selected by it: measure on others.
        C_: the C picked.
        shares_: [mix, l2] how much of the result is of each pair; the rest, to 1, is the logistic
            regression.
        n_iter_: steps of Adam made.
        best_iter_: those behind the result, 0 for the logistic regression.
        n_features_in_: number of features.
        feature_names_in_: their names, where X has any.

    Example:
        >>> from sklearn.datasets import make_classification
        >>> X, y = make_classification(3000, weights=[0.97], random_state=0)
        >>> model = LinearRanker(metric="ap", n_features=3, random_state=0).fit(X, y)
        >>> len(model.scorecard())
        3
        >>> model.validation_score_ >= model.baseline_score_
        True

    Reference: Brown et al., "Smooth-AP: Smoothing the Path Towards Large-Scale Image Retrieval",
    ECCV 2020, arXiv:2007.12163; Platt, "Probabilistic Outputs for Support Vector Machines", 1999.
    """

    _parameter_constraints: ClassVar[dict[str, list[Any]]] = {
        "metric": [StrOptions(set(card.METRICS))],
        "quantile": [Interval(Real, 0, 0.5, closed="right")],
        "fpr": [Interval(Real, 0, 1, closed="neither")],
        "n_features": [Interval(Integral, 1, None, closed="left"), None],
        "tau": [Interval(Real, 0, None, closed="neither")],
        "Cs": ["array-like"],
        "mix": ["array-like"],
        "l2": ["array-like"],
        "learning_rate": [Interval(Real, 0, None, closed="neither")],
        "max_iter": [Interval(Integral, 0, None, closed="left")],
        "tol": [Interval(Real, 0, None, closed="left")],
        "cv": [
            Interval(Integral, 1, None, closed="left"),
            HasMethods(["split"]),
            "array-like",
            None,
        ],
        "validation_fraction": [Interval(Real, 0, 1, closed="neither")],
        "random_state": ["random_state"],
        "verbose": ["verbose"],
    }

    def __init__(
        self,
        metric: str = "ap",
        *,
        quantile: float = 0.005,
        fpr: float = 0.005,
        n_features: int | None = None,
        tau: float = 0.25,
        Cs: Sequence[float] = (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0, 100.0, 1000.0),
        mix: Sequence[float] = (1.0, 0.5, 0.25),
        l2: Sequence[float] = (1.0, 10.0, 100.0),
        learning_rate: float = 0.1,
        max_iter: int = 150,
        tol: float = 1.5,
        cv: Any = None,
        validation_fraction: float = 0.2,
        random_state: Any = None,
        verbose: int = 0,
    ) -> None:
        self.metric = metric
        self.quantile = quantile
        self.fpr = fpr
        self.n_features = n_features
        self.tau = tau
        self.Cs = Cs
        self.mix = mix
        self.l2 = l2
        self.learning_rate = learning_rate
        self.max_iter = max_iter
        self.cv = cv
        self.tol = tol
        self.validation_fraction = validation_fraction
        self.random_state = random_state
        self.verbose = verbose

    @_fit_context(prefer_skip_nested_validation=True)  # type: ignore[untyped-decorator]
    def fit(
        self,
        X: Any,
        y: Any,
        sample_weight: Any = None,
        *,
        X_val: Any = None,
        y_val: Any = None,
        sample_weight_val: Any = None,
    ) -> LinearRanker:
        """Fit the scorecard.

        Args:
            X: [rows, features] finite numbers, an array, data frame or sparse matrix.
            y: [rows], two classes. The one that sorts second is the positive, which of "fraud" and
                "ok" is "ok": pass ``y == "fraud"``.
            sample_weight: [rows] >= 0, how many rows each stands for, negatives too.
            X_val: [rows, features] to validate on, of any kind too, such as later months, or other
                people; None holds out rows of X. A Pipeline transforms it if its
                ``transform_input`` says so.
            y_val: [rows], given with X_val.
            sample_weight_val: [rows], for X_val.

        Returns:
            The estimator.

        Raises:
            ValueError: bad parameters or data, not exactly two classes.

        Warns:
            UserWarning: a class has too few distinct rows to hold some out; or labels are text and
                over 80 % of the rows are positives.
        """
        Cs, mixes, multiples = (
            card.checked(name, getattr(self, name), share=name == "mix")
            for name in ("Cs", "mix", "l2")
        )
        parts, trained_share = self._parts(X, y, sample_weight, X_val, y_val, sample_weight_val)
        scale = scaling(parts.whole)
        parts = parts._replace(x=scale.apply(Rows(parts.x, parts.y, None)).x)
        self.scale_ = scale.scale
        self.support_ = card.select(parts.whole, self.n_features)
        if not self.support_.all():
            parts = parts._replace(x=parts.x[:, self.support_])

        values = card.of_positives(self.metric, self.quantile, self.fpr)
        logistic = card.logistics(parts, sorted(Cs))
        scaled = card.units(logistic, parts)
        found = card.judge(scaled, parts, values)
        first = int(found.total(trained_share).argmax())  # the smallest C of equal ones
        self.C_, best = sorted(Cs)[first], logistic[:, first]
        self.baseline_score_ = self.validation_score_ = float(found.held[first])
        self.shares_ = np.zeros((len(mixes), len(multiples)))
        self.best_iter_ = self.n_iter_ = 0
        told = all(spread > 0 for _, spread in card.all_moments(best, parts))
        if self.max_iter and told:
            pairs = np.array([*product(mixes, multiples)])
            trained = card.ascend(
                best, parts,
                card.Plan(pairs[:, 0], pairs[:, 1], self.C_, self.learning_rate, self.max_iter),
                partial(card.soft_loss, self.metric, parts, self.tau, self.quantile, self.fpr),
                self.verbose,
            )  # fmt: skip
            self.n_iter_ = self.max_iter
            way = card.between(scaled[:, first], card.units(trained, parts))
            judged = card.judge(way, parts, values)
            gain = judged.gain(found.only(first), trained_share, self.tol)
            if gain.any():
                weight = gain / gain.sum()
                mixed = np.einsum("k,lkd->ld", weight, way)
                after = float(card.judge(mixed[:, None], parts, values).held[0])
                if after > self.baseline_score_:
                    best, self.best_iter_, self.validation_score_ = mixed, self.max_iter, after
                    by_pair = weight.reshape(*self.shares_.shape, -1)
                    self.shares_ = by_pair @ np.array(card.STEPS)
        self.improved_ = self.best_iter_ > 0
        result = card.calibrate(best, parts)

        self.coef_ = np.zeros((1, self.n_features_in_))
        self.coef_[0, self.support_] = result[:-1] / scale.scale[self.support_]
        self.intercept_ = np.array([result[-1] - float(self.coef_[0] @ scale.shift)])
        return self

    def decision_function(self, X: Any) -> Array:
        """Scores [rows], larger for the positive class; log-odds."""
        check_is_fitted(self)
        X = validate_data(self, X, reset=False, dtype=np.float64, accept_sparse="csr")
        scores: Array = X @ self.coef_[0] + self.intercept_[0]
        return scores

    def predict(self, X: Any) -> Array:
        """Classes [rows]: the second one where the score is above 0."""
        above = self.decision_function(X) > 0
        labels: Array = self.classes_[above.astype(np.intp)]
        return labels

    def predict_proba(self, X: Any) -> Array:
        """Probabilities [rows, 2], Platt-scaled on the held-out rows; two parameters, no more."""
        positive = np.exp(-np.logaddexp(0.0, -self.decision_function(X)))
        return np.stack([1.0 - positive, positive], axis=1)

    def score(self, X: Any, y: Any, sample_weight: Any = None) -> float:
        """The metric, not its soft form, of the ranking of X by `decision_function`."""
        scores = self.decision_function(X)
        positive = positives(y, self.classes_, scores, "y")
        rows = weighted_rows(scores[:, None], positive, sample_weight, "sample_weight")
        return self._metric()(rows.x[:, 0], rows.y, rows.weight)

    def scorecard(self) -> list[ScorecardRow]:
        """The features picked, the one of the largest effect first; add `intercept_`."""
        check_is_fitted(self)
        names = getattr(self, "feature_names_in_", None)
        rows = [
            ScorecardRow(
                f"x{index}" if names is None else str(names[index]),
                float(self.coef_[0, index]),
                float(self.coef_[0, index] * self.scale_[index]),
            )
            for index in np.flatnonzero(self.support_)
        ]
        return sorted(rows, key=lambda row: -abs(row.effect))

    def _metric(self) -> card.Score:
        return card.exact(self.metric, self.quantile, self.fpr)

    def _parts(
        self, X: Any, y: Any, weight: Any, X_val: Any, y_val: Any, weight_val: Any
    ) -> tuple[Parts, float]:
        """What is fitted on and judged by, and the share of the former in the judgement."""
        try:
            X, y = validate_data(
                self, X, y, dtype=np.float64, ensure_min_samples=2, accept_sparse="csr"
            )
        except ValueError as error:
            if "could not convert string" not in str(error):
                raise
            raise ValueError(
                f"expected X to be numbers, but {error}: leave columns of names out, and turn "
                "categories into numbers, as pandas.get_dummies(X, dtype=float) does"
            ) from error
        kind = type_of_target(y, input_name="y", raise_unknown=True)
        if kind not in ("binary", "multiclass"):
            raise ValueError(f"Unknown label type: {kind}. Expected two classes.")
        self.classes_ = np.unique(y)
        if len(self.classes_) > 2:
            raise ValueError(
                f"Only binary classification is supported. The type of the target is {kind}."
            )
        rare, common = self.classes_[[0, -1]].tolist()
        share = (y == common).mean()
        if isinstance(common, str) and COMMON < share < 1:
            warnings.warn(
                f"the positive class is the one that sorts second, {common!r}, which "
                f"{share:.1%} of the rows are of; to rank {rare!r} first pass "
                f"y == {rare!r}",
                UserWarning,
                stacklevel=4,
            )
        given = as_table(X)
        rows = weighted_rows(given, y == self.classes_[-1], weight, "sample_weight")
        if not validates(X_val, y_val, weight_val):
            return distinct(rows, self._sides(rows, y, weight)), TRAINED
        X_val = validate_data(self, X_val, reset=False, dtype=np.float64, accept_sparse="csr")
        positive = positives(y_val, self.classes_, X_val, "y_val")
        held = weighted_rows(as_table(X_val), positive, weight_val, "sample_weight_val")
        return distinct(*beside(rows, held)), 0.0

    def _sides(self, rows: Rows, y: Array, weight: Any) -> Sides:
        """Who is held out."""
        rng = check_random_state(self.random_state)
        found = None
        if self.cv is None and (count := count_positives(rows)) < MANY:
            found = folds(rows, FOLDS, 2 if count < FEW else 1, rng)
        elif isinstance(self.cv, Integral) and int(self.cv) > 1:
            found = folds(rows, int(self.cv), 1, rng)
        elif self.cv is not None and self.cv != 1:
            kept = np.broadcast_to(1 if weight is None else weight, len(y)) > 0
            return split_by(check_cv(self.cv, y, classifier=True), rows, y, kept)
        return hold_out(rows, self.validation_fraction, rng) if found is None else found

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.classifier_tags.multi_class = False
        tags.input_tags.sparse = True
        return tags
