"""Partial area under the ROC curve, over a band of false-positive rates."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from . import _numerics as num
from ._checks import (
    BUDGET_BASES,
    INTERPOLATIONS,
    POS_NUMERATORS,
    SURROGATES,
    TAU_SCALES,
    check_band,
    check_choice,
    check_lists,
    check_rtol,
    check_tau,
    common_shape,
)
from ._ranks import sigmoid_sums

ONE_SORT = 1 << 13  # rows up to which one sort beats three selections
MIN_SCALE = 1e-12  # spread of the reference scores below which no temperature can be set


class Band(NamedTuple):
    """Constants of the metric, fixed for a run."""

    alpha: float = 0.0
    beta: float = 0.005
    surrogate: str = "trapezoid"
    n_knots: int = 2
    tau_scale: str = "iqr"
    pos_numerator: str = "pool"
    budget_basis: str = "fpr"
    interpolation: str = "higher"


class PartialAUC(NamedTuple):
    """The metric and what it was made of; everything but the value is detached."""

    value: Tensor  # [...] floating, 0 where the list does not count
    counts: Tensor  # [...] bool
    degenerate: Tensor  # [...] bool, the scores of the reference do not spread
    stats: dict[str, Tensor]  # [...] each, as `PAUCAtBudgetLoss` reports them; empty unless asked


def check_band_options(band: Band) -> None:
    """Raise `ValueError` unless every field of the band is in its range."""
    check_band(band.alpha, band.beta, band.n_knots)
    check_choice("surrogate", band.surrogate, SURROGATES)
    check_choice("tau_scale", band.tau_scale, TAU_SCALES)
    check_choice("pos_numerator", band.pos_numerator, POS_NUMERATORS)
    check_choice("budget_basis", band.budget_basis, BUDGET_BASES)
    check_choice("interpolation", band.interpolation, INTERPOLATIONS)


def partial_auc(
    scores: Tensor,
    pos_mask: Tensor,
    tau: float | Tensor,
    *,
    alpha: float = 0.0,
    beta: float = 0.005,
    surrogate: str = "trapezoid",
    n_knots: int = 2,
    tau_scale: str = "iqr",
    pos_numerator: str = "pool",
    budget_basis: str = "fpr",
    interpolation: str = "higher",
    iid_mask: Tensor | None = None,
    live_mask: Tensor | None = None,
    valid_mask: Tensor | None = None,
    sample_weight: Tensor | None = None,
    rtol: float | None = None,
) -> Tensor:
    r"""Smooth partial AUC over the false-positive rates [alpha, beta], in [0, 1]; larger is better.

    The reference is the iid negatives; ``t(f)`` is their (1 - f) quantile and ``T`` is tau times
    their spread, both constants of the gradient.

    - trapezoid: the mean over n_knots false-positive rates f_k, evenly spaced over the band with
      the ends counted half, of ``mean over positives i of sigmoid((s_i - t(f_k)) / T)``. Only
      positives get a gradient.
    - pairwise: the mean over positives i and negatives j with ``t(beta) <= s_j <= t(alpha)`` of
      ``sigmoid((s_i - s_j) / T)``. Both get a gradient; near-linear in M.

    The value is normalised by beta - alpha, and does not change when all scores are shifted or
    scaled. As tau -> 0 pairwise becomes the area of tie-free scores: with alpha 0 and beta times
    the number of negatives whole, ``roc_auc_score(max_fpr=beta)`` before it is standardised, over
    beta.

    Args:
        scores: [..., M] floating; lists on the last axis, leading axes are a batch. Half
            precision is computed in, and returned as, float32.
        pos_mask: [..., M] bool, the positives.
        tau: temperature in units of the spread, > 0: a number, a 0-d tensor, or one value per
            list [...].
        alpha: lower false-positive rate, 0 <= alpha < beta; at 0 the band starts at the largest
            negative.
        beta: upper false-positive rate, at most 1; the budget. Needs about 1 / beta negatives.
        surrogate: "trapezoid" or "pairwise".
        n_knots: false-positive rates of the trapezoid, >= 2.
        tau_scale: the spread that tau multiplies: "iqr", the interquartile range of the
            reference, or "band", t(alpha) - t(beta).
        pos_numerator: "pool" for all positives, "live" for those of live_mask.
        budget_basis: the reference: "fpr" for the iid negatives, "population" for all iid rows,
            which makes beta a share of alerts.
        interpolation: as in `torch.quantile`.
        iid_mask: [..., M] bool, rows drawn as they come, which may set the band; None means all.
        live_mask: [..., M] bool, rows of the present batch; None means all.
        valid_mask: [..., M] bool, rows that count; None means all.
        sample_weight: [..., M] floating >= 0, weights of the mean over positives; negatives'
            weights and the band do not depend on it.
        rtol: accuracy asked of the pairwise sums, see `sigmoid_sums`.

    Returns:
        [...] in the dtype of scores (float32 for half input). 0 with zero gradient for a list
        without a positive in the numerator (of weight > 0), without iid negatives, with an empty
        band (pairwise), or whose reference scores do not spread; `partial_auc_counts` tells
        which. A non-finite valid score gives NaN.

    Raises:
        TypeError: wrong dtypes.
        ValueError: shapes that do not fit, an option out of range.

    Example:
        >>> scores = torch.arange(1000.0)
        >>> pos = torch.zeros(1000, dtype=torch.bool)
        >>> pos[[999, 500]] = True  # one above the band, one below
        >>> partial_auc(scores, pos, 1e-4, surrogate="pairwise")
        tensor(0.5000)

    Reference: McClish, "Analyzing a Portion of the ROC Curve", Medical Decision Making 1989; as a
    training objective Narasimhan and Agarwal, ICML 2013.
    """
    band = Band(
        alpha, beta, surrogate, n_knots, tau_scale, pos_numerator, budget_basis, interpolation
    )
    out: PartialAUC = partial_auc_and_stats(
        scores, pos_mask, tau, band, valid_mask, sample_weight, iid_mask, live_mask, rtol
    )
    return out.value


def partial_auc_counts(
    scores: Tensor,
    pos_mask: Tensor,
    *,
    valid_mask: Tensor | None = None,
    sample_weight: Tensor | None = None,
    iid_mask: Tensor | None = None,
    live_mask: Tensor | None = None,
    alpha: float = 0.0,
    beta: float = 0.005,
    surrogate: str = "trapezoid",
    tau_scale: str = "iqr",
    pos_numerator: str = "pool",
    budget_basis: str = "fpr",
    interpolation: str = "higher",
) -> Tensor:
    """Which lists `partial_auc` is defined for; the arguments are those of that function.

    Returns:
        [...] bool.

    Example:
        >>> tied = torch.zeros(5)  # no spread, no temperature
        >>> pos = torch.tensor([True, False, False, False, False])
        >>> partial_auc_counts(tied, pos), partial_auc_counts(torch.arange(5.0), pos)
        (tensor(False), tensor(True))
    """
    band = Band(alpha, beta, surrogate, 2, tau_scale, pos_numerator, budget_basis, interpolation)
    out: PartialAUC = partial_auc_and_stats(
        scores.detach(), pos_mask, 1.0, band, valid_mask, sample_weight, iid_mask, live_mask
    )
    return out.counts


def _levels(band: Band, like: Tensor) -> Tensor:
    """[K] quantile levels 1 - f_k; the ends as Python rounds them, not as linspace does."""
    ends = torch.tensor([1.0 - band.alpha, 1.0 - band.beta], dtype=like.dtype)
    if band.surrogate == "trapezoid" and band.n_knots > 2:
        knots = 1.0 - torch.linspace(band.alpha, band.beta, band.n_knots, dtype=like.dtype)
        ends = torch.cat([ends[:1], knots[1:-1], ends[1:]])
    return ends


def _reference(scores: Tensor, mask: Tensor, band: Band) -> tuple[Tensor, Tensor]:
    """Knots [..., K], the first t(alpha), the last t(beta), and spread [...], all detached."""

    def quantiles(levels: Tensor, reach: tuple[float, float]) -> Tensor:
        levels = levels.to(scores.device)
        return num.masked_quantiles(scores, levels, reach, band.interpolation, mask)

    levels, reach = _levels(band, scores), (1.0 - band.beta, 1.0 - band.alpha)
    if band.tau_scale == "band":
        knots = quantiles(levels, reach)
        return knots, knots[..., 0] - knots[..., -1]
    quartiles = torch.tensor([0.75, 0.25], dtype=scores.dtype)
    if scores.shape[-1] <= ONE_SORT:
        every = quantiles(
            torch.cat([levels, quartiles]), (min(reach[0], 0.25), max(reach[1], 0.75))
        )
        knots, upper, lower = every[..., :-2], every[..., -2], every[..., -1]
    else:
        knots = quantiles(levels, reach)
        upper = quantiles(quartiles[:1], (0.75, 0.75))[..., 0]
        lower = quantiles(quartiles[1:], (0.25, 0.25))[..., 0]
    return knots, upper - lower


@num.full_precision
def partial_auc_and_stats(
    scores: Tensor,
    pos_mask: Tensor,
    tau: float | Tensor,
    band: Band,
    valid_mask: Tensor | None = None,
    sample_weight: Tensor | None = None,
    iid_mask: Tensor | None = None,
    live_mask: Tensor | None = None,
    rtol: float | None = None,
    stats: bool = False,
) -> PartialAUC:
    """`partial_auc`, `partial_auc_counts` and, if asked, the statistics of the band."""
    check_band_options(band)
    check_rtol(rtol)
    check_lists(scores, pos_mask, valid_mask, sample_weight, iid_mask=iid_mask, live_mask=live_mask)
    masks = [m for m in (pos_mask, valid_mask, sample_weight, iid_mask, live_mask) if m is not None]
    shape = common_shape(scores.shape, *(m.shape for m in masks))
    check_tau(tau, shape[:-1])
    if isinstance(tau, Tensor):
        tau = tau.to(scores.device, scores.dtype)
    scores = num.clean(scores, valid_mask).expand(shape)
    sound = num.poison(scores)
    pos, negative = pos_mask, ~pos_mask
    if valid_mask is not None:
        pos, negative = pos & valid_mask, negative & valid_mask
    iid_negative = negative if iid_mask is None else negative & iid_mask
    among = iid_negative
    if band.budget_basis == "population":
        among = iid_negative | (pos if iid_mask is None else pos & iid_mask)
    knots, scale = _reference(scores, among.expand(shape), band)
    if band.pos_numerator == "live" and live_mask is not None:
        pos = pos & live_mask
    weight = num.positive_weight(pos, sample_weight, scores.dtype)
    usable = ~(weight.sum(-1) <= 0) & iid_negative.any(-1)
    # A list with a non-finite score counts, and is NaN.
    degenerate = usable & (scale <= MIN_SCALE) & ~sound.isnan()
    counts = usable & ~degenerate
    temperature = tau * scale.clamp(min=MIN_SCALE)

    def inside() -> Tensor:
        return (scores >= knots[..., -1:]) & (scores <= knots[..., :1])

    if band.surrogate == "trapezoid":
        each = _above_knots(scores, knots, temperature)
    else:
        in_band = negative & inside()
        each = _above_band(scores, pos, in_band, temperature, rtol)
        counts = counts & (in_band.any(-1) | sound.isnan())
    value = torch.where(counts, num.weighted_mean(each, weight) * sound, 0.0)
    out = PartialAUC(value, counts, degenerate, {})
    if not stats:
        return out
    each = each.detach()
    plain = pos.to(each.dtype)
    spread = num.weighted_mean((each - num.weighted_mean(each, plain)[..., None]).square(), plain)
    found = {"t_alpha": knots[..., 0], "t_beta": knots[..., -1]}
    found |= {"tau_eff": temperature.detach(), "pauc_var": spread}
    found = {name: torch.where(counts, x, torch.nan) for name, x in found.items()}
    found["band_neg_count"] = torch.where(counts, (iid_negative & inside()).sum(-1), 0)
    return out._replace(stats=found)


def _above_knots(scores: Tensor, knots: Tensor, temperature: Tensor) -> Tensor:
    """[..., M]: trapezoid mean over the knots of the soft step above each."""
    above = torch.sigmoid((scores[..., None, :] - knots[..., None]) / temperature[..., None, None])
    count = knots.shape[-1]
    if count == 2:
        return above.mean(-2)
    ends = 0.5 * (above[..., 0, :] + above[..., -1, :])
    return (ends + above[..., 1:-1, :].sum(-2)) / (count - 1)


def _above_band(
    scores: Tensor, pos: Tensor, in_band: Tensor, temperature: Tensor, rtol: float | None
) -> Tensor:
    """[..., M] at the positives: mean over the band's negatives of the soft step above each."""
    below = sigmoid_sums(scores, in_band[..., None, :], pos, temperature, rtol=rtol)[..., 0, :]
    return 1.0 - below / in_band.sum(-1, keepdim=True).clamp(min=1)
