"""What the contract matrix runs over: every example of every metric's record.

A new metric joins by its record and a function of its name in `reference`. What `MORE` tells of it
is optional: the metric it becomes as tau -> 0, and a plain form of its gradient.
"""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from sklearn.metrics import average_precision_score, ndcg_score, roc_auc_score
from torch import Tensor

from proxy_losses._metrics import METRICS as RECORDS
from proxy_losses._metrics import Example, examples
from proxy_losses._metrics._record import reads_gains

from . import reference


class Metric(NamedTuple):
    """An example of a metric, as the tests call it."""

    name: str
    fn: Callable[..., Tensor]  # (scores, pos, tau, *, valid_mask, sample_weight)
    reference: Callable[..., float]  # (scores, pos, tau, valid, weight) of one list
    counts: Callable[..., Tensor]  # (scores, pos, valid, weight)
    needs_negative: bool
    tau_of_spread: bool  # tau multiplies a spread of the scores
    graded: bool  # its second argument are gains
    exact: Callable[..., float] | None = None  # (scores, pos): the metric it becomes as tau -> 0
    perfect: float = 1.0  # value as tau -> 0 when all positives lead
    worst: float = 0.1  # above its value as tau -> 0 when 4 positives come last among 40 rows
    least: float = 0.0  # below which it never is
    most: float = 1.0  # above which it never is
    # (scores, pos, weight) -> value of any scores in plain torch, at TAU, with what is a constant
    # of the gradient taken from the given scores; None where there is no such thing
    frozen: Callable[..., Callable[[Tensor], Tensor]] | None = None


EXAMPLES = {  # by name of the function and what the settings choose
    "_".join([e.metric.name, *e.label.split(", ")[1:]]): e for e in examples(RECORDS)
}
QUANTILE = 0.3


def exact_recall(scores: np.ndarray, pos: np.ndarray) -> float:
    """Positives above the threshold, the one on it (a score of the list) counted half."""
    theta = np.quantile(scores, 1 - QUANTILE, method="higher")
    return float(((scores > theta) + 0.5 * (scores == theta))[pos].mean())


Threshold = Callable[[Tensor], Tensor]  # [..., 1] of scores [..., M]


def still(theta: Tensor, scores: Tensor, among: Tensor, tau: float | Tensor) -> Threshold:
    """A threshold that is a constant."""
    return lambda s: theta


def moving(theta: Tensor, scores: Tensor, among: Tensor, tau: float | Tensor) -> Threshold:
    """A threshold with the slopes of its rows, over their sum, as constant first derivatives."""
    steps = torch.sigmoid((scores - theta) / tau)
    slopes = torch.where(among, steps * (1 - steps), 0.0)
    share = slopes / slopes.sum(-1, keepdim=True)
    return lambda s: theta + (share * (s - scores)).sum(-1, keepdim=True)


def frozen_recall(threshold, scores: Tensor, pos: Tensor, weight: Tensor) -> Threshold:
    theta = torch.quantile(scores, 1 - QUANTILE, dim=-1, keepdim=True, interpolation="higher")
    at, w = threshold(theta, scores, torch.ones_like(pos), TAU), torch.where(pos, weight, 0.0)
    return lambda s: (w * torch.sigmoid((s - at(s)) / TAU)).sum(-1) / w.sum(-1)


def at_levels(scores: Tensor, among: Tensor, levels: list[float]) -> Tensor:
    """[K, ...]: quantiles of the scores in a mask."""
    ranked = scores.where(among, torch.nan)
    return torch.nanquantile(ranked, scores.new_tensor(levels), dim=-1, interpolation="higher")


def frozen_trapezoid(threshold, scores: Tensor, pos: Tensor, weight: Tensor) -> Threshold:
    low, high = at_levels(scores, ~pos, [0.25, 0.75])
    knots = at_levels(scores, ~pos, [0.875, 0.625, 0.375])
    temperature, w = TAU * (high - low)[..., None], torch.where(pos, weight, 0.0)
    each = [threshold(t[..., None], scores, ~pos, temperature) for t in knots]

    def value(s: Tensor) -> Tensor:
        above = torch.stack([torch.sigmoid((s - at(s)) / temperature) for at in each])
        area = torch.trapezoid(above, dim=0) / (len(knots) - 1)
        return (w * area).sum(-1) / w.sum(-1)

    return value


def frozen_pairwise(scores: Tensor, pos: Tensor, weight: Tensor) -> Callable[[Tensor], Tensor]:
    low, high, least = at_levels(scores, ~pos, [0.25, 0.75, 0.5])[..., None]
    temperature, w = TAU * (high - low), torch.where(pos, weight, 0.0)
    band = ~pos & (scores >= least)

    def value(s: Tensor) -> Tensor:
        steps = torch.sigmoid((s[..., :, None] - s[..., None, :]) / temperature[..., None])
        pairs = w[..., :, None] * band[..., None, :]
        return (pairs * steps).sum((-1, -2)) / pairs.sum((-1, -2))

    return value


def exact_trapezoid(scores: np.ndarray, pos: np.ndarray) -> float:
    """Trapezoids of the exact true-positive rates at the knots."""
    negatives = scores[~pos]
    if len(negatives) < 3:  # "higher" puts both quartiles on the same score
        return 0.0
    knots = np.quantile(negatives, 1 - np.linspace(0.125, 0.625, 3), method="higher")
    rates = (scores[pos][:, None] > knots).mean(0)
    return float((rates[1:] + rates[:-1]).mean() / 2)


def exact_pairwise(scores: np.ndarray, pos: np.ndarray) -> float:
    """Area up to the whole number of negatives that the band holds, before standardisation."""
    count = int((~pos).sum())
    if count < 3:
        return 0.0
    max_fpr = (count - math.ceil(0.5 * (count - 1))) / count
    standard = roc_auc_score(pos, scores, max_fpr=max_fpr)
    least = max_fpr**2 / 2  # of a random order
    return float(least + (2 * standard - 1) * (max_fpr - least)) / max_fpr


def exact_at(scores: np.ndarray, pos: np.ndarray, *, ks: tuple[int, ...], over: str) -> float:
    """Positives among the first k."""
    first, number = pos[np.argsort(-scores)], int(pos.sum())
    each = {"k": lambda k: k, "positives": lambda k: number, "min": lambda k: min(k, number)}[over]
    return float(np.mean([first[:k].sum() / each(k) for k in ks]))


def frozen_at(scores, pos, weight, *, ks: tuple[int, ...], over: str) -> Threshold:
    w, number = torch.where(pos, weight, 0.0), pos.sum(-1)
    ordered, every = scores.sort(descending=True).values, torch.ones_like(pos)
    middles = {k: (ordered[..., k - 1 : k] + ordered[..., k : k + 1]) / 2 for k in ks}
    at = {k: moving(t, scores, every, TAU) for k, t in middles.items()}
    of = {"k": lambda k: k, "positives": lambda k: number, "min": lambda k: number.clamp(max=k)}

    def value(s: Tensor) -> Tensor:
        means = {k: (w * torch.sigmoid((s - at[k](s)) / TAU)).sum(-1) / w.sum(-1) for k in ks}
        return torch.stack([means[k] * number / of[over](k) for k in ks]).mean(0)

    return value


def of_places(ks: tuple[int, ...], over: str) -> dict[str, Any]:
    forms = {"exact": exact_at, "frozen": frozen_at}
    return {what: functools.partial(form, ks=ks, over=over) for what, form in forms.items()}


MORE: dict[str, dict[str, Any]] = {
    # Four positives lead in the test of what is perfect.
    "precision_at_k": {**of_places((3,), "k"), "most": math.inf},
    "recall_at_k": {**of_places((3,), "positives"), "perfect": 0.75},
    "precision_at_k_min": {**of_places((2, 7), "min"), "most": math.inf},
    "recall_at_k_min": {**of_places((2, 7), "min"), "most": math.inf},
    "smooth_ap": {"exact": lambda s, p: average_precision_score(p, s)},
    "smooth_auroc": {"exact": lambda s, p: roc_auc_score(p, s)},
    "smooth_auroc_logistic": {"least": -math.inf},
    "smooth_ndcg": {"exact": lambda s, p: ndcg_score([p], [s]), "worst": 0.3},
    "smooth_mrr": {"exact": lambda s, p: 1.0 / (1 + (s[~p] > s[p].max()).sum())},
    **{
        f"{name}_{how}": {"exact": exact, "frozen": functools.partial(frozen, threshold)}
        for how, threshold in {"implicit": moving, "none": still}.items()
        for name, exact, frozen in (
            ("recall_at_quantile", exact_recall, frozen_recall),
            ("partial_auc", exact_trapezoid, frozen_trapezoid),
        )
    },
    "partial_auc_pairwise": {"exact": exact_pairwise, "frozen": frozen_pairwise},
}
# What these forms are written for; dyadic, so that levels and knots are exact in any order.
for _how in ("implicit", "none"):
    _recall, _pauc = (EXAMPLES[f"{n}_{_how}"] for n in ("recall_at_quantile", "partial_auc"))
    assert _recall.settings == {"quantile": QUANTILE, "threshold_grad": _how}
    assert _pauc.settings.items() >= {"alpha": 0.125, "beta": 0.625, "n_knots": 3}.items()
assert EXAMPLES["partial_auc_pairwise"].settings["beta"] == 0.5


def of_value(settings: dict[str, Any]) -> dict[str, Any]:
    """The settings that a value depends on."""
    return {k: x for k, x in settings.items() if k != "threshold_grad"}


def as_tested(name: str, example: Example) -> Metric:
    record, settings = example.metric, example.settings
    known = inspect.signature(record.defined).parameters
    options = {k: x for k, x in settings.items() if k in known}

    def counts(scores, pos, valid, weight) -> Tensor:
        first = (scores, pos) if "scores" in known else (pos,)
        return record.defined(*first, valid_mask=valid, sample_weight=weight, **options)

    return Metric(
        name,
        functools.partial(record.function, **settings),
        functools.partial(getattr(reference, record.name), **of_value(settings)),
        counts,
        record.needs_negative,
        record.own_spread,
        reads_gains(record),
        **MORE.get(name, {}),
    )


METRICS = [as_tested(name, example) for name, example in EXAMPLES.items()]

every_metric = pytest.mark.parametrize("metric", METRICS, ids=lambda m: m.name)
TAU = 0.3
# Both sides sum at most a few dozen terms in float64.
TIGHT = {"rtol": 1e-12, "atol": 1e-14}


def lists(
    seed: int, *shape: int, rate: float = 0.3, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor]:
    """Random scores and masks in which every list has a positive and a negative."""
    g = torch.Generator().manual_seed(seed)
    scores = torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype)
    pos = torch.rand(*shape, generator=g) < rate
    pos[..., 0], pos[..., 1] = True, False
    return scores, pos
