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
from torch.nn import functional as F
from tqdm.auto import tqdm

from .. import recall_at_quantile, sigmoid_sums, smooth_ap
from ._rows import Bools, Floats, Parts, Rows, Table

METRICS = ("ap", "recall", "pauc", "enrichment")
RTOL = 1e-3  # of the soft metrics
_MOST_FOR_NEWTON = 500  # features; its Hessian is their square
_CELLS = 2**21  # scores of lists that are trained together

Score = Callable[[Floats, Bools, Floats | None], float]
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

    def enrichment(scores: Floats, y: Bools, weight: Floats | None) -> float:
        return recall(scores, y, weight) / quantile

    return {"ap": ap, "pauc": pauc, "recall": recall, "enrichment": enrichment}[metric]


def largest(metric: str, quantile: float) -> float:
    """What the metric is at most."""
    return 1.0 / quantile if metric == "enrichment" else 1.0


def soft_loss(
    metric: str, parts: Parts, tau: float, quantile: float, fpr: float, lists: slice
) -> Loss:
    """1 - the soft metric [lists, K] of scores [lists, K, rows], tau in units of the scores."""
    pos = torch.from_numpy(parts.y)
    fit = torch.from_numpy(parts.fit[lists])[:, None]
    valid = fit > 0
    smooth_ap_trains = metric in ("ap", "enrichment")

    def even(scores: Tensor) -> Tensor:
        inside = valid.expand(scores.shape)
        lists = (scores, pos.expand(scores.shape), tau)
        if smooth_ap_trains:
            return 1.0 - smooth_ap(*lists, valid_mask=inside, rtol=RTOL)
        return 1.0 - recall_at_quantile(*lists, quantile=quantile, valid_mask=inside)

    def weighted(scores: Tensor) -> Tensor:
        weight = fit.expand(scores.shape)
        if smooth_ap_trains:
            return 1.0 - _weighted_ap(scores, pos, weight, tau)
        if metric == "recall":
            return 1.0 - _weighted_recall(scores, pos, weight, tau, quantile)
        return 1.0 - _partial_auc(scores, pos, weight, tau, fpr)

    return even if parts.even and metric != "pauc" else weighted


def _weighted_ap(scores: Tensor, pos: Tensor, weight: Tensor, tau: float) -> Tensor:
    """Smooth-AP of lists in which each row stands for ``weight`` equal ones, negatives too.

    Equal positives all have the rank of the last of them, as in scikit-learn's AP.
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


def judge(weights: Floats, parts: Parts, score: Score, share: float) -> tuple[Floats, Floats]:
    """(held-out metric [K], what to choose by [K]) of weights [lists, K, columns + 1].

    The held-out rows of all parts, scored by the model of each, are ranked as one list. What to
    choose by has this share of the metric of the last list on its own rows in it.
    """
    sides = [parts.rows(mass) for mass in parts.held]
    scores = np.concatenate(
        [scores_of(w, rows.x) for w, rows in zip(weights, sides, strict=False)], axis=-1
    )
    y = np.concatenate([rows.y for rows in sides])
    weight = (
        None
        if all(rows.weight is None for rows in sides)
        else np.concatenate(
            [np.ones(len(rows.y)) if rows.weight is None else rows.weight for rows in sides]
        )
    )
    held = np.array([score(s, y, weight) for s in scores])
    if not share:
        return held, held
    whole = parts.whole
    own = [score(s, whole.y, whole.weight) for s in scores_of(weights[-1], whole.x)]
    return held, (1.0 - share) * held + share * np.array(own)


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
