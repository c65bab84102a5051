"""A linear map of embeddings fitted for retrieval, as a scikit-learn transformer."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from itertools import islice
from numbers import Integral, Real
from typing import Any, ClassVar

import numpy as np
import torch
from sklearn.base import (
    BaseEstimator,
    ClassNamePrefixFeaturesOutMixin,
    TransformerMixin,
    _fit_context,
)
from sklearn.utils import check_array, check_random_state
from sklearn.utils._param_validation import Interval
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import check_is_fitted, validate_data
from torch import Tensor
from tqdm.auto import tqdm

from .. import retrieval_lists, smooth_ap, smooth_ap_defined
from ._classes import (
    MOST_QUERIES,
    Affine,
    Array,
    Batches,
    Floats,
    Judge,
    Labelled,
    hold_out,
    leading,
    unit_rows,
    whitenings,
)
from ._common import validates

EVERY = 20  # steps from one validation to the next
_DTYPES = (np.float32, np.float64)


class LinearEmbedder(ClassNamePrefixFeaturesOutMixin, TransformerMixin, BaseEstimator):
    r"""Linear map of embeddings after which rows of a class find each other, also of new classes.

    For embeddings of a frozen encoder, if some rows have labels and later searches may be among
    other classes. Rows are divided by their norms, since cosine similarity is what counts. `fit`

    1. holds out `validation_fraction` of the classes, whole;
    2. centres and whitens within classes: with the mean squared deviation :math:`S` of the rows
       from the mean of their class, in units of its mean eigenvalue, the map is
       :math:`W_a (x - m)`, :math:`W_a = ((1 - a) S + a I)^{-1/2}`, for several shrinkages a.
       Of these and the raw embeddings it takes what has the best mean average precision on the
       held-out classes: each row of them, or 512 drawn at random, ranks all others;
    3. from there runs Adam on one minus Smooth-AP, in batches of `batch_classes` classes by
       `class_rows` rows, and keeps the step whose held-out mean average precision is best, the
       start included: so far nothing is worse on the held-out classes than the raw or the whitened
       embeddings;
    4. does the same again with all classes: that shrinkage and that many steps. Where the raw
       embeddings were best, they are the result.

    A row that is alone in its class has nothing to find: in training it is left out of the batches,
    and when held out it is only there to be ranked. With fewer than four classes of two rows or
    more, rows are held out instead of classes, or none where not two classes have four rows. There
    is no `sample_weight`.

    Args:
        n_components: features of the result, at most those of X; None means as many. With fewer,
            each map of step 2, the raw one too, is followed by a projection on the directions in
            which its unit rows are longest (an uncentred PCA).
        normalize: whether `transform` divides rows by their norms, so that a dot product is the
            cosine similarity.
        tau: temperature of Smooth-AP, in units of cosine similarity.
        shrinkages: the a of step 2 to choose from, in (0, 1]; 1 only centres.
        batch_classes: most classes of a batch, drawn evenly of those of two rows or more.
        class_rows: most rows of each.
        learning_rate: of Adam: entries of the map move up to learning_rate / sqrt(features) a
            step.
        max_iter: most steps of Adam; 0 leaves the whitening.
        n_iter_no_change: stop after so many steps without a better held-out mean average precision
            (it is looked at every 20 steps, and before stopping); None never stops early.
        tol: by how much it must grow to count as better.
        validation_fraction: share of the classes held out, in (0, 1). Not used with `X_val`.
        refit: whether to make step 4. Not used with `X_val`.
        device: where training and validation run, such as "cpu"; None is "cuda" where torch has
            it.
        random_state: seed of the held-out classes and of the batches: an int, a RandomState or
            None.
        verbose: above 0 shows a progress bar.

    Attributes:
        components_: [n_components, features]; a unit row x becomes ``components_ @ (x - mean_)``.
        mean_: [features], 0 where step 2 kept the raw embeddings.
        shrinkage_: the a of step 2, 1.0 too where it kept the raw embeddings.
        improved_: whether step 3 found better than the raw embeddings on the held-out classes.
        baseline_score_: held-out mean average precision of the raw embeddings, of full width.
        whitened_score_: that of the best of `shrinkages`; `baseline_score_` if there are none.
        validation_score_: that of step 3. It was selected by it: measure on other classes.
        n_iter_: steps of Adam made.
        best_iter_: step that was best, 0 for the map of step 2.
        n_features_in_: number of features.
        feature_names_in_: their names, where X has any.

    Example:
        >>> rng = np.random.default_rng(0)
        >>> y = np.arange(600) % 30
        >>> X = rng.normal(size=(30, 8))[y] + rng.normal(size=(600, 8)) * [4, 4, 1, 1, 1, 1, 1, 1]
        >>> model = LinearEmbedder(max_iter=60, random_state=0).fit(X[y < 20], y[y < 20])
        >>> model.improved_
        True
        >>> raw = LinearEmbedder(shrinkages=(), max_iter=0, random_state=0).fit(X, y)
        >>> new = y >= 20
        >>> bool(model.score(X[new], y[new]) > raw.score(X[new], y[new]) + 0.1)
        True

    Reference: Hatch, Kajarekar and Stolcke, "Within-Class Covariance Normalization for SVM-based
    Speaker Recognition", Interspeech 2006; Brown et al., "Smooth-AP: Smoothing the Path Towards
    Large-Scale Image Retrieval", ECCV 2020, arXiv:2007.12163.
    """

    _parameter_constraints: ClassVar[dict[str, list[Any]]] = {
        "n_components": [Interval(Integral, 1, None, closed="left"), None],
        "normalize": ["boolean"],
        "tau": [Interval(Real, 0, None, closed="neither")],
        "shrinkages": ["array-like"],
        "batch_classes": [Interval(Integral, 2, None, closed="left")],
        "class_rows": [Interval(Integral, 2, None, closed="left")],
        "learning_rate": [Interval(Real, 0, None, closed="neither")],
        "max_iter": [Interval(Integral, 0, None, closed="left")],
        "n_iter_no_change": [Interval(Integral, 1, None, closed="left"), None],
        "tol": [Interval(Real, 0, None, closed="left")],
        "validation_fraction": [Interval(Real, 0, 1, closed="neither")],
        "refit": ["boolean"],
        "device": [str, torch.device, None],
        "random_state": ["random_state"],
        "verbose": ["verbose"],
    }

    def __init__(
        self,
        n_components: int | None = None,
        *,
        normalize: bool = True,
        tau: float = 0.05,
        shrinkages: Sequence[float] = (0.3, 0.6, 0.8, 0.9, 0.95, 1.0),
        batch_classes: int = 16,
        class_rows: int = 8,
        learning_rate: float = 0.005,
        max_iter: int = 500,
        n_iter_no_change: int | None = 100,
        tol: float = 0.0,
        validation_fraction: float = 0.25,
        refit: bool = True,
        device: str | torch.device | None = None,
        random_state: Any = None,
        verbose: int = 0,
    ) -> None:
        self.n_components = n_components
        self.normalize = normalize
        self.tau = tau
        self.shrinkages = shrinkages
        self.batch_classes = batch_classes
        self.class_rows = class_rows
        self.learning_rate = learning_rate
        self.max_iter = max_iter
        self.n_iter_no_change = n_iter_no_change
        self.tol = tol
        self.validation_fraction = validation_fraction
        self.refit = refit
        self.device = device
        self.random_state = random_state
        self.verbose = verbose

    @_fit_context(prefer_skip_nested_validation=True)  # type: ignore[untyped-decorator]
    def fit(self, X: Any, y: Any, *, X_val: Any = None, y_val: Any = None) -> LinearEmbedder:
        """Fit the map.

        Args:
            X: [rows, features] finite numbers; float64 is kept, others become float32.
            y: [rows], the class of each, of any kind.
            X_val: [rows, features] to validate on, best of other classes; None holds out classes
                of X. A Pipeline transforms it if its ``transform_input`` says so.
            y_val: [rows], given with X_val.

        Returns:
            The estimator.

        Raises:
            ValueError: bad parameters or data; one class alone, or none of two rows.

        Warns:
            UserWarning: there are too few classes to hold some out.
        """
        shrinkages = _checked(self.shrinkages)
        device = _device(self.device)
        rng = check_random_state(self.random_state)
        train, held, whole = self._parts(X, y, X_val, y_val, rng)
        width = self.n_components or self.n_features_in_
        if width > self.n_features_in_:
            raise ValueError(
                f"expected n_components of at most the {self.n_features_in_} features of X, "
                f"got {width}"
            )
        judge = Judge(held, device, rng, MOST_QUERIES)

        raw = Affine(np.eye(self.n_features_in_), np.zeros(self.n_features_in_))
        self.baseline_score_ = judge(raw)
        tried: list[tuple[float, float | None, Affine]] = []
        for a, full in [(None, raw), *whitenings(train, shrinkages)]:
            found = leading(full, train.x, width)
            tried.append((self.baseline_score_ if found is raw else judge(found), a, found))
        self.whitened_score_ = max((value for value, *_ in tried[1:]), default=self.baseline_score_)
        value, shrinkage, start = max(tried, key=lambda one: one[0])
        self.shrinkage_ = 1.0 if shrinkage is None else shrinkage

        self.validation_score_, best, self.best_iter_, self.n_iter_ = self._ascend(
            value, start, train, judge, rng, device
        )
        self.improved_ = self.validation_score_ > self.baseline_score_
        if whole is not None:
            full = raw if shrinkage is None else whitenings(whole, [shrinkage])[0][1]
            best = self._repeat(leading(full, whole.x, width), whole, rng, device)
        self.components_, self.mean_ = (of.astype(train.x.dtype) for of in best)
        return self

    def transform(self, X: Any) -> Array:
        """Embeddings [rows, n_components], float32 or float64 as X is, of unit norm if asked to."""
        check_is_fitted(self)
        X = validate_data(self, X, reset=False, dtype=_DTYPES)
        mapped = self._map().of(unit_rows(X))
        return unit_rows(mapped) if self.normalize else mapped

    def score(self, X: Any, y: Any) -> float:
        """Mean average precision of every row of X ranking the others, of those with a positive."""
        check_is_fitted(self)
        return Judge(self._labelled(X, y, reset=False), torch.device("cpu"))(self._map())

    def _map(self) -> Affine:
        return Affine(self.components_, self.mean_)

    @property
    def _n_features_out(self) -> int:
        return int(self.components_.shape[0])

    def _parts(
        self, X: Any, y: Any, X_val: Any, y_val: Any, rng: np.random.RandomState
    ) -> tuple[Labelled, Labelled, Labelled | None]:
        """Rows to learn from, rows to validate on, and those to fit again on, if any."""
        rows = self._labelled(X, y, ensure_min_samples=2)
        sizes = np.bincount(rows.y)
        if len(sizes) < 2 or sizes.max() < 2:
            raise ValueError(
                "expected y of two classes or more, one of them of two rows or more, "
                f"got {len(sizes)} of at most {sizes.max()}"
            )
        if not validates(X_val, y_val):
            return *hold_out(rows, self.validation_fraction, rng), rows if self.refit else None
        held = self._labelled(X_val, y_val, reset=False)
        if not held.y.any():
            raise ValueError("expected y_val of two classes or more, got one")
        return rows, held, None

    def _labelled(self, X: Any, y: Any, **checks: Any) -> Labelled:
        """Unit rows and the numbers of their classes."""
        X, y = validate_data(self, X, y, dtype=_DTYPES, **checks)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "The number of unique classes", UserWarning)
            check_classification_targets(y)
        return Labelled(unit_rows(X), np.unique(y, return_inverse=True)[1])

    def _ascend(
        self,
        value: float,
        start: Affine,
        train: Labelled,
        judge: Judge,
        rng: np.random.RandomState,
        device: torch.device,
    ) -> tuple[float, Affine, int, int]:
        """The best validated map on the way of Adam, its value, its step, and the steps made."""
        best, best_step, step, patience = start, 0, 0, self.n_iter_no_change
        steps = islice(self._steps(start, train, rng, device), self.max_iter)
        with tqdm(total=self.max_iter, desc="LinearEmbedder", disable=not self.verbose) as bar:
            for step, weight in enumerate(steps, 1):
                bar.update()
                last = step == self.max_iter or (patience and step - best_step >= patience)
                if step % EVERY and not last:
                    continue
                now = start._replace(weight=_array(weight))
                reached = judge(now)
                if reached > value + self.tol:
                    value, best, best_step = reached, now, step
                bar.set_postfix(validation=f"{reached:.4f}", best=f"{value:.4f}")
                if last and best_step < step:
                    break
        return value, best, best_step, step

    def _repeat(
        self, start: Affine, rows: Labelled, rng: np.random.RandomState, device: torch.device
    ) -> Affine:
        """As many steps as were best, with all rows."""
        if not self.best_iter_:
            return start
        steps = islice(self._steps(start, rows, rng, device), self.best_iter_)
        bar = tqdm(steps, "LinearEmbedder, all rows", self.best_iter_, disable=not self.verbose)
        *_, weight = bar
        return start._replace(weight=_array(weight))

    def _steps(
        self, start: Affine, rows: Labelled, rng: np.random.RandomState, device: torch.device
    ) -> Iterator[Tensor]:
        """The map's weight after each step of Adam, without end; one tensor, written in place.

        No step where one class alone has two rows: there is nothing to tell them from.
        """
        x = torch.from_numpy(rows.x - start.mean).to(device, torch.float32)
        y = torch.from_numpy(rows.y).to(device)
        batches = Batches(rows.y, self.batch_classes, self.class_rows, rng)
        weight = torch.tensor(start.weight, dtype=torch.float32, device=device, requires_grad=True)
        optimizer = torch.optim.Adam([weight], lr=self.learning_rate / len(start.mean) ** 0.5)
        while len(batches.members) > 1:
            drawn = torch.from_numpy(batches.draw()).to(device)
            optimizer.zero_grad()
            self._loss(x[drawn] @ weight.T, y[drawn]).backward()
            optimizer.step()
            yield weight

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.target_tags.required = True
        tags.transformer_tags.preserves_dtype = ["float64", "float32"]
        return tags

    def _loss(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        """1 - the mean Smooth-AP of the rows that have a positive."""
        lists = retrieval_lists(embeddings, labels)
        value = smooth_ap(lists.scores, lists.pos_mask, self.tau, valid_mask=lists.valid_mask)
        counts = smooth_ap_defined(lists.pos_mask, lists.valid_mask)
        return 1.0 - value.sum() / counts.sum()


def _array(weight: Tensor) -> Floats:
    array: Floats = weight.detach().cpu().double().numpy()
    return array


def _checked(shrinkages: Any) -> list[float]:
    """The shrinkages as numbers, if they are some."""
    values = check_array(
        shrinkages, ensure_2d=False, ensure_min_samples=0, dtype=np.float64,
        input_name="shrinkages",
    )  # fmt: skip
    if values.ndim != 1 or not ((values > 0) & (values <= 1)).all():
        raise ValueError(
            f"expected shrinkages to be a list of numbers in (0, 1], got {shrinkages!r}"
        )
    return [float(a) for a in values]


def _device(name: str | torch.device | None) -> torch.device:
    """The device, if torch has it."""
    if name is None:
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(0, device=device).cpu()  # not on the meta device
    except (RuntimeError, AssertionError) as error:  # torch without CUDA asserts
        raise ValueError(f"expected a device that torch has here, got {name!r}") from error
    return device
