"""What `LinearRanker` is made of: metrics, the logistic start, the ascent, the calibration."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from scipy.linalg import cho_solve, solve_triangular
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import average_precision_score, roc_auc_score, roc_curve
from sklearn.utils import check_array
from torch import Tensor
from tqdm.auto import tqdm

from .. import sigmoid_sums, smooth_ap
from ._rows import Bools, Floats, Rows, Table

METRICS = ("ap", "recall", "pauc")
EVERY = 10  # steps from one validation to the next
RTOL = 1e-6  # of the soft metrics
_MOST_FOR_NEWTON = 500  # features; its Hessian is their square

Score = Callable[[Floats, Bools, Floats | None], float]
Loss = Callable[[Tensor], Tensor]


class Linear(NamedTuple):
    """Scores ``x @ coef + intercept`` and what they reach on the validation rows."""

    coef: Floats
    intercept: float
    score: float

    def of(self, x: Table) -> Floats:
        scores: Floats = x @ self.coef + self.intercept
        return scores


def moments(values: Floats, weight: Floats | None) -> tuple[float, float]:
    """Mean and standard deviation."""
    mean = float(np.average(values, weights=weight))
    return mean, float(np.average((values - mean) ** 2, weights=weight)) ** 0.5


def exact(metric: str, quantile: float, fpr: float) -> Score:
    """The metric itself, not its soft form: (scores, y, weight) -> value."""

    def ap(scores: Floats, y: Bools, weight: Floats | None) -> float:
        return float(average_precision_score(y, scores, sample_weight=weight))

    def pauc(scores: Floats, y: Bools, weight: Floats | None) -> float:
        return float(roc_auc_score(y, scores, max_fpr=fpr, sample_weight=weight))

    def recall(scores: Floats, y: Bools, weight: Floats | None) -> float:
        false, true, _ = roc_curve(y, scores, sample_weight=weight, drop_intermediate=False)
        rate = np.average(y, weights=weight)
        top = false * (1.0 - rate) + true * rate
        return float(np.interp(quantile, top, true))  # tied rows share the last places

    return {"ap": ap, "pauc": pauc, "recall": recall}[metric]


def soft_loss(metric: str, rows: Rows, tau: float, quantile: float, fpr: float) -> Loss:
    """1 - the soft metric of the scores of these rows, tau in units of the scores."""
    pos = torch.from_numpy(rows.y)
    weight = None if rows.weight is None else torch.from_numpy(rows.weight)
    if metric == "ap" and weight is None:
        return lambda scores: 1.0 - smooth_ap(scores, pos, tau, rtol=RTOL)
    if weight is None:
        weight = torch.ones(len(pos), dtype=torch.float64)
    if metric == "ap":
        return lambda scores: 1.0 - _weighted_ap(scores, pos, weight, tau)
    # A threshold that wanders within twice the budget has a gradient; one at the quantile has none.
    among, top = (~pos, fpr) if metric == "pauc" else (torch.ones_like(pos), 2.0 * quantile)
    return lambda scores: 1.0 - _pairs_at_the_top(scores, pos, weight, among, top, tau)


def _weighted_ap(scores: Tensor, pos: Tensor, weight: Tensor, tau: float) -> Tensor:
    """Smooth-AP of a list in which each row stands for ``weight`` equal ones, negatives too.

    Equal positives all have the rank of the last of them, as in scikit-learn's AP.
    """
    both = torch.stack([weight, weight * pos])
    rank, among = sigmoid_sums(scores, both, pos, tau, rtol=RTOL)
    at_own = weight / 2.0  # the sum holds half of a row's own weight
    precision = torch.where(pos, (among + at_own) / torch.where(pos, rank + at_own, 1.0), 0.0)
    return (weight * precision).sum() / (weight * pos).sum()


def _pairs_at_the_top(
    scores: Tensor, pos: Tensor, weight: Tensor, among: Tensor, top: float, tau: float
) -> Tensor:
    """Soft share of the pairs of a positive and a negative in the top of ``among`` in order."""
    order = scores.detach().argsort(descending=True, stable=True)
    share = (weight * among)[order]
    share = (share.cumsum(0) - share) / share.sum()
    in_top = torch.zeros_like(pos).scatter(0, order, share < top) & ~pos
    against = weight * in_top
    above = sigmoid_sums(scores, against[None], pos, tau, rtol=RTOL)[0]  # 0 at the negatives
    total = (weight * pos).sum() * against.sum()
    return 1.0 - (weight * above).sum() / torch.where(total > 0, total, 1.0)


def _logistic(C: float, features: int) -> LogisticRegression:
    solver = "newton-cholesky" if features <= _MOST_FOR_NEWTON else "lbfgs"
    return LogisticRegression(C=C, solver=solver, max_iter=1000)


def checked_cs(Cs: Any) -> list[float]:
    """The penalties as numbers, if they are some."""
    values = check_array(
        Cs, ensure_2d=False, ensure_min_samples=0, dtype=np.float64, input_name="Cs"
    )
    if values.ndim != 1 or not len(values) or not (values > 0).all():
        raise ValueError(f"expected Cs to be a list of numbers above 0, got {Cs!r}")
    return [float(C) for C in values]


def select(rows: Rows, count: int | None) -> Bools:
    """Orthogonal matching pursuit of the labels by scaled features; [columns], True for picked.

    Fewer than ``count``, but one at least, where the others are linear combinations of those; all
    for None.
    """
    features = rows.x.shape[1]
    if count is None:
        return np.ones(features, dtype=bool)
    if count > features:
        raise ValueError(
            f"expected n_features of at most the {features} features of X, got {count}"
        )
    x, weight = rows.x, np.ones(len(rows.y)) if rows.weight is None else rows.weight
    mean = x.T @ weight / weight.sum()

    def products(values: Floats) -> Floats:
        """With all features, these centred."""
        total: Floats = x.T @ (weight * values) - mean * (weight @ values)
        return total

    target = rows.y - np.average(rows.y, weights=weight)
    whole, residual = products(target), target
    rounding = len(target) * np.finfo(np.float64).eps
    nothing = rounding * np.sqrt(weight.sum() * (weight @ target**2))  # for scaled features
    factor = np.zeros((count, count))  # of Cholesky, of the products of those picked
    found: list[int] = []
    while (k := len(found)) < count:
        gain = np.abs(products(residual))
        gain[found] = 0.0
        if gain.max() <= nothing:
            break
        best = int((gain >= gain.max() - nothing).argmax())  # the first of equal ones
        unit = np.zeros(features)
        unit[best] = 1.0
        column = products(x @ unit - mean[best])
        if k:  # older SciPy takes no empty matrix
            factor[k, :k] = solve_triangular(factor[:k, :k], column[found], lower=True)
        rest = column[best] - factor[k, :k] @ factor[k, :k]
        if rest <= rounding * column[best]:
            break
        factor[k, k] = np.sqrt(rest)
        found.append(best)
        coef = np.zeros(features)
        coef[found] = cho_solve((factor[: k + 1, : k + 1], True), whole[found])
        residual = target - (x @ coef - mean @ coef)
    picked = np.zeros(features, dtype=bool)
    picked[found or [0]] = True
    return picked


def warm_start(train: Rows, held: Rows, Cs: Sequence[float], score: Score) -> tuple[Linear, float]:
    """The logistic regression, and its C, that validates best; the smallest C of equal ones."""
    found: list[tuple[Linear, float]] = []
    for C in sorted(Cs):
        model = _logistic(C, train.x.shape[1]).fit(train.x, train.y, sample_weight=train.weight)
        linear = Linear(model.coef_[0], float(model.intercept_[0]), 0.0)
        value = score(linear.of(held.x), held.y, held.weight)
        found.append((linear._replace(score=value), float(C)))
    return max(found, key=lambda pair: pair[0].score)


def ascend(
    start: Linear,
    train: Rows,
    held: Rows,
    loss: Loss,
    score: Score,
    *,
    rate: float,
    steps: int,
    patience: int | None,
    tol: float,
    verbose: int = 0,
) -> tuple[Linear, int, int]:
    """The best validated point on the way of Adam from ``start``, its step, and the steps made.

    Scores start with standard deviation 1, whatever the penalty left of it. The start is
    eligible. The intercept stays: a ranking does not depend on it.
    """
    spread = moments(start.of(train.x), train.weight)[1]
    if not spread > 0 or steps == 0:
        return start, 0, 0
    best = start._replace(coef=start.coef / spread, intercept=start.intercept / spread)
    coef = torch.tensor(best.coef, requires_grad=True)
    optimizer = torch.optim.Adam([coef], lr=rate / len(coef) ** 0.5)
    best_step = step = 0
    with tqdm(total=steps, desc="LinearRanker", disable=not verbose) as bar:
        while step < steps and (patience is None or step - best_step < patience):
            step += 1
            now = best._replace(coef=coef.detach().numpy())
            scores = torch.from_numpy(now.of(train.x)).requires_grad_()
            loss(scores).backward()
            assert scores.grad is not None
            coef.grad = torch.from_numpy(train.x.T @ scores.grad.numpy())
            optimizer.step()
            bar.update()
            if step % EVERY and step < steps:
                continue
            now = best._replace(coef=coef.detach().numpy().copy())
            now = now._replace(score=score(now.of(held.x), held.y, held.weight))
            if now.score > best.score + tol:
                best, best_step = now, step
            bar.set_postfix(validation=f"{now.score:.4f}", best=f"{best.score:.4f}")
    return best if best_step else start, best_step, step


def calibrate(linear: Linear, held: Rows) -> Linear | None:
    """Scores as log-odds on the held-out rows; None where these contradict the scores."""
    scores = linear.of(held.x)
    middle, spread = moments(scores, held.weight)
    if not spread > 0:
        return None
    # A weak prior keeps the slope finite where the rows are separable.
    platt = LogisticRegression(C=100.0)
    platt.fit((scores[:, None] - middle) / spread, held.y, sample_weight=held.weight)
    slope = float(platt.coef_[0, 0]) / spread
    if not slope > 0:
        return None
    intercept = slope * (linear.intercept - middle) + float(platt.intercept_[0])
    return Linear(slope * linear.coef, intercept, linear.score)
