"""What `LinearRanker` is made of: metrics, the logistic start, the ascent, the calibration."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from scipy.linalg import cho_solve, solve_triangular
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_curve
from sklearn.utils import check_array
from torch import Tensor
from torch.nn import functional as F
from tqdm.auto import tqdm

from .. import recall_at_quantile, sigmoid_sums, smooth_ap
from ._rows import Bools, Floats, Ints, Parts, Rows, Table

METRICS = ("ap", "recall", "pauc", "enrichment")
RTOL = 1e-3  # of the soft metrics
_MOST_FOR_NEWTON = 500  # features; its Hessian is their square
_CELLS = 2**21  # scores of lists that are trained together
STEPS = (0.25, 0.5, 0.75, 1.0)  # of the way from the logistic regression to what was trained
TINY = np.finfo(np.float64).tiny

Score = Callable[[Floats, Bools, Floats | None], float]
OfPositives = Callable[[Floats, Bools, Floats | None], Floats]
Loss = Callable[[Tensor], Tensor]


def scores_of(weights: Floats, x: Table) -> Floats:
    """Scores [..., rows] of weights [..., columns + 1], the intercept last."""
    flat = weights.reshape(-1, weights.shape[-1])
    scores: Floats = np.ascontiguousarray((x @ flat[:, :-1].T).T) + flat[:, -1:]
    return scores.reshape(*weights.shape[:-1], -1)


def moments(values: Floats, weight: Floats | None) -> tuple[float, float]:
    """Mean and standard deviation."""
    mean = float(np.average(values, weights=weight))
    return mean, float(np.average((values - mean) ** 2, weights=weight)) ** 0.5


def of_positives(metric: str, quantile: float, fpr: float) -> OfPositives:
    """(scores, y, weight) -> what each positive row adds to the metric, which is their mean.

    Precision at its place, whether it is in the top, or its area under the ROC curve.
    """

    def places(scores: Floats, y: Bools, weight: Floats | None) -> tuple[Floats, Floats, Ints]:
        """False and true positive rates of all thresholds, and that of each positive."""
        false, true, thresholds = roc_curve(
            y, scores, sample_weight=weight, drop_intermediate=False
        )
        return false, true, np.searchsorted(-thresholds, -scores[y])

    def ap(scores: Floats, y: Bools, weight: Floats | None) -> Floats:
        false, true, at = places(scores, y, weight)
        rate = np.average(y, weights=weight)
        above = true[at] * rate
        precision: Floats = above / (above + false[at] * (1.0 - rate))
        return precision

    def pauc(scores: Floats, y: Bools, weight: Floats | None) -> Floats:
        false, _, at = places(scores, y, weight)
        first, last = false[at - 1], false[at]
        inside = np.clip(fpr - first, 0.0, last - first)  # tied rows rise together
        area = np.maximum(fpr - last, 0.0) + inside**2 / (2.0 * np.maximum(last - first, TINY))
        chance = fpr**2 / 2.0
        scaled: Floats = 0.5 * (1.0 + (area - chance) / (fpr - chance))
        return scaled

    def recall(scores: Floats, y: Bools, weight: Floats | None) -> Floats:
        false, true, at = places(scores, y, weight)
        rate = np.average(y, weights=weight)
        top = false * (1.0 - rate) + true * rate
        size = np.maximum(top[at] - top[at - 1], TINY)
        found: Floats = np.clip((quantile - top[at - 1]) / size, 0.0, 1.0)  # ties share the end
        return found

    def enrichment(scores: Floats, y: Bools, weight: Floats | None) -> Floats:
        return recall(scores, y, weight) / quantile

    return {"ap": ap, "pauc": pauc, "recall": recall, "enrichment": enrichment}[metric]


def exact(metric: str, quantile: float, fpr: float) -> Score:
    """The metric itself, not its soft form: (scores, y, weight) -> value."""
    values = of_positives(metric, quantile, fpr)

    def score(scores: Floats, y: Bools, weight: Floats | None) -> float:
        weight_of = None if weight is None else weight[y]
        return float(np.average(values(scores, y, weight), weights=weight_of))

    return score


def soft_loss(
    metric: str, parts: Parts, tau: float, quantile: float, fpr: float, lists: slice
) -> Loss:
    """1 - the soft metric [lists, K] of scores [lists, K, rows], tau in units of the scores."""
    pos = torch.from_numpy(parts.y)
    fit = torch.from_numpy(parts.fit[lists])[:, None]
    smooth_ap_trains = metric in ("ap", "enrichment")

    def weighted(scores: Tensor) -> Tensor:
        weight = fit.expand(scores.shape)
        if smooth_ap_trains:
            return 1.0 - _weighted_ap(scores, pos, weight, tau)
        if metric == "recall":
            return 1.0 - _weighted_recall(scores, pos, weight, tau, quantile)
        return 1.0 - _partial_auc(scores, pos, weight, tau, fpr)

    cases = None if metric == "pauc" else parts.cases
    if cases is None:
        return weighted
    row, inside = (torch.from_numpy(array) for array in cases)
    single = len(row) == len(pos)

    def of_cases(scores: Tensor) -> Tensor:
        scores = scores if single else scores[..., row]
        valid = inside[lists, None].expand(scores.shape)
        pool = (scores, pos[row].expand(scores.shape), tau)
        if smooth_ap_trains:
            return 1.0 - smooth_ap(*pool, valid_mask=valid, rtol=RTOL)
        return 1.0 - recall_at_quantile(*pool, quantile=quantile, valid_mask=valid)

    return of_cases


def _weighted_ap(scores: Tensor, pos: Tensor, weight: Tensor, tau: float) -> Tensor:
    """Smooth-AP of lists in which each row stands for ``weight`` equal ones, negatives too.

    Equal positives all have the rank of the last of them, as in scikit-learn's AP. It takes some
    three times as long as Smooth-AP of so many cases.
    """
    pos = pos & (weight > 0)
    both = torch.stack([weight, weight * pos], -2)
    rank, among = sigmoid_sums(scores, both, pos, tau, rtol=RTOL).unbind(-2)
    at_own = weight / 2.0  # the sum holds half of a row's own weight
    precision = torch.where(pos, (among + at_own) / torch.where(pos, rank + at_own, 1.0), 0.0)
    return (weight * precision).sum(-1) / (weight * pos).sum(-1)


def _weighted_recall(
    scores: Tensor, pos: Tensor, weight: Tensor, tau: float, quantile: float
) -> Tensor:
    """`recall_at_quantile` of rows that stand for ``weight`` equal ones each."""
    ordered, order = scores.detach().sort(dim=-1, descending=True, stable=True)
    share = weight.gather(-1, order).cumsum(-1) / weight.sum(-1, keepdim=True)
    at = (share < quantile).sum(-1, keepdim=True).clamp(max=scores.shape[-1] - 1)
    theta = ordered.gather(-1, at)
    far = ((scores.detach() - theta) / tau).abs()
    slope = (weight.log() + 2.0 * F.logsigmoid(far) - far).softmax(-1)
    moved = (slope * scores).sum(-1, keepdim=True)  # the implicit gradient of the threshold
    above = torch.sigmoid((scores - (theta + moved - moved.detach())) / tau)
    return (weight * pos * above).sum(-1) / (weight * pos).sum(-1)


def _partial_auc(scores: Tensor, pos: Tensor, weight: Tensor, tau: float, fpr: float) -> Tensor:
    """Soft share of the pairs of a positive and one of the top negatives that are in order."""
    order = scores.detach().argsort(dim=-1, descending=True, stable=True)
    share = (weight * ~pos).gather(-1, order)
    share = (share.cumsum(-1) - share) / share.sum(-1, keepdim=True)
    against = (
        weight * ~pos * torch.zeros_like(pos.expand(scores.shape)).scatter(-1, order, share < fpr)
    )
    pos = pos & (weight > 0)
    above = sigmoid_sums(scores, against[..., None, :], pos, tau, rtol=RTOL)[..., 0, :]
    total = (weight * pos).sum(-1) * against.sum(-1)
    return 1.0 - (weight * above).sum(-1) / torch.where(total > 0, total, 1.0)


def _logistic(C: float, features: int) -> LogisticRegression:
    solver = "newton-cholesky" if features <= _MOST_FOR_NEWTON else "lbfgs"
    return LogisticRegression(C=C, solver=solver, max_iter=1000)


def checked(name: str, given: Any, share: bool) -> list[float]:
    """A parameter's candidates as numbers, if they are some: above 0, or shares from 0 to 1."""
    values = check_array(
        given, ensure_2d=False, ensure_min_samples=0, dtype=np.float64, input_name=name
    )
    allowed = (values >= 0) & (values <= 1) if share else values > 0
    if values.ndim != 1 or not len(values) or not allowed.all():
        range_ = "from 0 to 1" if share else "above 0"
        raise ValueError(f"expected {name} to be a list of numbers {range_}, got {given!r}")
    return [float(value) for value in values]


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


def logistics(parts: Parts, Cs: Sequence[float]) -> Floats:
    """Logistic regressions [lists, Cs, columns + 1]."""
    found = np.empty((len(parts.fit), len(Cs), parts.x.shape[1] + 1))
    for of_list, mass in zip(found, parts.fit, strict=True):
        rows = parts.rows(mass)
        for of_C, C in zip(of_list, Cs, strict=True):
            model = _logistic(C, rows.x.shape[1]).fit(rows.x, rows.y, rows.weight)
            of_C[:-1], of_C[-1] = model.coef_[0], model.intercept_[0]
    return found


class Verdict(NamedTuple):
    """How models do."""

    each: Floats  # [K, positives] what each held-out positive adds to the metric
    mass: Floats  # [positives] its share of it
    own: Floats  # [K] metric of the last list on its own rows

    @property
    def held(self) -> Floats:
        """The held-out metric [K]."""
        mean: Floats = self.each @ self.mass
        return mean

    def total(self, share: float) -> Floats:
        """What to choose by [K]: the held-out metric, and this share of that on own rows."""
        mixed: Floats = (1.0 - share) * self.held + share * self.own
        return mixed

    def only(self, k: int) -> Verdict:
        """Of one of the models."""
        return Verdict(self.each[k : k + 1], self.mass, self.own[k : k + 1])

    def gain(self, start: Verdict, share: float, errors: float) -> Floats:
        """How much more than the one start's is left [K] after so many standard errors; or 0.

        Of the paired difference over the held-out positives, which are what is rare.
        """
        more = self.each - start.each
        mean = more @ self.mass
        count = len(self.mass)
        if count < 2:  # it has no standard error
            return np.zeros(len(mean))
        variance = count / (count - 1) * ((more - mean[:, None]) ** 2 @ self.mass**2)
        sure = mean - errors * np.sqrt(variance)
        left = (1.0 - share) * sure + share * (self.own - start.own)
        found: Floats = np.where(mean > 0, np.maximum(left, 0.0), 0.0)
        return found


def judge(weights: Floats, parts: Parts, values: OfPositives) -> Verdict:
    """The metric that ``values`` adds up to, of weights [lists, K, columns + 1] in `units`.

    The held-out rows of all parts, scored by the model of each, are ranked as one list. A row that
    is held out more than once counts by the mean.
    """
    where = [np.flatnonzero(mass > 0) for mass in parts.held]
    row, mass = np.concatenate(where), np.concatenate([m[m > 0] for m in parts.held])
    scores = np.concatenate(
        [scores_of(w, parts.x[r]) for w, r in zip(weights, where, strict=False)], axis=-1
    )
    y = parts.y[row]
    of, index = np.unique(row[y], return_inverse=True)
    total = np.bincount(index, mass[y])
    weight = None if (mass == 1).all() else mass
    each = np.array([
        np.bincount(index, mass[y] * values(s, y, weight), len(of)) / total for s in scores
    ])  # fmt: skip
    whole = parts.whole
    positive = None if whole.weight is None else whole.weight[whole.y]
    own = [
        np.average(values(scores_of(w, whole.x), whole.y, whole.weight), weights=positive)
        for w in weights[-1]
    ]
    return Verdict(each, total / total.sum(), np.array(own))


def units(weights: Floats, parts: Parts) -> Floats:
    """Weights [lists, K, columns + 1] with scores of spread 1 on the rows that they were fitted on.

    So that models can be averaged, and rows of several parts be ranked together. Those without
    spread stay as they are.
    """
    spread = np.stack([[unit or 1.0 for _, unit in all_moments(w, parts)]
                       for w in weights.transpose(1, 0, 2)], axis=1)  # fmt: skip
    found: Floats = weights / spread[..., None]
    return found


def between(start: Floats, ends: Floats) -> Floats:
    """Averages of start [lists, columns + 1] and ends [lists, K, columns + 1], `STEPS` by end."""
    step = np.array(STEPS)[:, None]
    found: Floats = (1.0 - step) * start[:, None, None] + step * ends[:, :, None]
    return found.reshape(len(start), -1, start.shape[-1])


class Plan(NamedTuple):
    """What is trained from every start."""

    mix: Floats  # [K] weight of the ranking loss
    l2: Floats  # [K] penalty, in units of the start's
    C: float  # of the start
    rate: float  # of Adam, in standard deviations of the scores
    steps: int


def all_moments(weights: Floats, parts: Parts) -> list[tuple[float, float]]:
    """Mean and standard deviation of the scores of weights [lists, columns + 1], by list."""
    scores = scores_of(weights, parts.x)
    return [moments(s, mass) for s, mass in zip(scores, parts.fit, strict=True)]


def ascend(
    starts: Floats, parts: Parts, plan: Plan, loss: Callable[[slice], Loss], verbose: int = 0
) -> Floats:
    """Where Adam gets from starts [lists, columns + 1]: [lists, K, columns + 1].

    Every start is trained by the plan on the rows of its list, all at once in one batch, on
    ``mix * ranking loss + (1 - mix) * logistic loss + l2 / (2 C n) * |coef|^2``. Scores are in
    units of their spread at the start, whatever the penalty left of it. What does not stay finite
    ends at the start.
    """
    kinds, columns = len(plan.mix), starts.shape[1]
    together = max(1, _CELLS // (kinds * len(parts.y)))
    blocks = [slice(k, k + together) for k in range(0, len(starts), together)]
    spread = np.array([deviation for _, deviation in all_moments(starts, parts)])
    mix = torch.from_numpy(plan.mix)
    target = torch.from_numpy(parts.y).double()
    found = np.empty((len(starts), kinds, columns))
    with tqdm(total=len(blocks) * plan.steps, desc="LinearRanker", disable=not verbose) as bar:
        for block in blocks:
            unit = torch.from_numpy(spread[block])[:, None, None]
            fit = torch.from_numpy(parts.fit[block])[:, None]
            mass = fit.sum(-1, keepdim=True)
            penalty = torch.from_numpy(plan.l2)[:, None] / (plan.C * mass) * unit**2
            ranking = loss(block)
            begin = torch.from_numpy(starts[block])[:, None] / unit
            weights = begin.repeat(1, kinds, 1).requires_grad_()
            optimizer = torch.optim.Adam([weights], lr=plan.rate / columns**0.5)
            for _ in range(plan.steps):
                now = weights.detach().numpy()
                scores = torch.from_numpy(scores_of(now, parts.x)).requires_grad_()
                logits = scores * unit
                bce = ((F.softplus(logits) - target * logits) * fit).sum(-1) / mass[..., 0]
                both = mix * ranking(scores) + (1.0 - mix) * bce if plan.mix.any() else bce
                both.sum().backward()
                assert scores.grad is not None
                grad = scores.grad.flatten(0, 1).numpy()
                slopes = np.concatenate([(parts.x.T @ grad.T).T, grad.sum(1)[:, None]], axis=1)
                weights.grad = torch.from_numpy(slopes).view(weights.shape)
                weights.grad[..., :-1] += penalty * weights.detach()[..., :-1]
                optimizer.step()
                bar.update()
            found[block] = (weights.detach() * unit).numpy()
    sound = np.isfinite(found).all(axis=(0, 2), keepdims=True)
    return np.where(sound, found, starts[:, None])


def calibrate(weights: Floats, parts: Parts) -> Floats:
    """The last of weights [lists, columns + 1] with scores that are log-odds, by Platt's method.

    Learned from the scores of each part's model on its held-out rows, in standard deviations from
    the mean. As it was where the held-out rows contradict the scores.
    """
    result: Floats = weights[-1].copy()
    found = all_moments(weights, parts)
    if not all(spread > 0 for _, spread in found):
        return result
    units, y, mass = [], [], []
    for (middle, spread), model, weight in zip(found, weights, parts.held, strict=False):
        rows = parts.rows(weight)
        units.append((scores_of(model, rows.x) - middle) / spread)
        y.append(rows.y)
        mass.append(weight[weight > 0])
    # A weak prior keeps the slope finite where the rows are separable.
    platt = LogisticRegression(C=100.0)
    platt.fit(np.concatenate(units)[:, None], np.concatenate(y), np.concatenate(mass))
    middle, spread = found[-1]
    slope = float(platt.coef_[0, 0]) / spread
    if slope > 0:
        result *= slope
        result[-1] += float(platt.intercept_[0]) - slope * middle
    return result
