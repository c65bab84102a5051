"""The band of false-positive rates behind `partial_auc`, and the value over it."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

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
from ._select import mean_over_group, sharded_quantiles
from .distributed import all_reduce, average_grad, group_name

if TYPE_CHECKING:
    from .distributed import ProcessGroup

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


def _levels(band: Band, like: Tensor) -> Tensor:
    """[K] quantile levels 1 - f_k; the ends as Python rounds them, not as linspace does."""
    ends = torch.tensor([1.0 - band.alpha, 1.0 - band.beta], dtype=like.dtype)
    if band.surrogate == "trapezoid" and band.n_knots > 2:
        knots = 1.0 - torch.linspace(band.alpha, band.beta, band.n_knots, dtype=like.dtype)
        ends = torch.cat([ends[:1], knots[1:-1], ends[1:]])
    return ends


def _reference(scores: Tensor, mask: Tensor, band: Band, name: str) -> tuple[Tensor, Tensor]:
    """Knots [..., K], the first t(alpha), the last t(beta), and spread [...], all detached."""
    selects = bool(name) or not num.size_known(scores.shape[-1])

    def quantiles(levels: Tensor, reach: tuple[float, float]) -> Tensor:
        levels = levels.to(scores.device)
        if selects:
            return sharded_quantiles(scores, levels, band.interpolation, mask, name)
        return num.masked_quantiles(scores, levels, reach, band.interpolation, mask)

    levels, reach = _levels(band, scores), (1.0 - band.beta, 1.0 - band.alpha)
    if band.tau_scale == "band":
        knots = quantiles(levels, reach)
        return knots, knots[..., 0] - knots[..., -1]
    quartiles = torch.tensor([0.75, 0.25], dtype=scores.dtype)
    if selects or scores.shape[-1] <= ONE_SORT:
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
    group: ProcessGroup | None = None,
) -> PartialAUC:
    """`partial_auc`, `partial_auc_defined` and, if asked, the statistics of the band."""
    check_band_options(band)
    check_rtol(rtol)
    check_lists(scores, pos_mask, valid_mask, sample_weight, iid_mask=iid_mask, live_mask=live_mask)
    masks = [m for m in (pos_mask, valid_mask, sample_weight, iid_mask, live_mask) if m is not None]
    shape = common_shape(scores.shape, *(m.shape for m in masks))
    check_tau(tau, shape[:-1])
    name = group_name(group)
    if isinstance(tau, Tensor):
        tau = average_grad(tau.to(scores.device, scores.dtype), name)
    scores = num.clean(scores, valid_mask).expand(shape)
    sound = num.poison(scores)
    pos, negative = pos_mask, ~pos_mask
    if valid_mask is not None:
        pos, negative = pos & valid_mask, negative & valid_mask
    iid_negative = negative if iid_mask is None else negative & iid_mask
    among = iid_negative
    if band.budget_basis == "population":
        among = iid_negative | (pos if iid_mask is None else pos & iid_mask)
    knots, scale = _reference(scores, among.expand(shape), band, name)
    if band.pos_numerator == "live" and live_mask is not None:
        pos = pos & live_mask
    weight = num.positive_weight(pos, sample_weight, scores.dtype)
    has_pos, has_negative, broken = _any_rank(
        name, ~(weight.sum(-1) <= 0), iid_negative.any(-1).expand(shape[:-1]), sound.isnan()
    )
    usable = has_pos & has_negative
    # A list with a non-finite score or weight counts, and is NaN.
    degenerate = usable & (scale <= MIN_SCALE) & ~broken
    counts = usable & ~degenerate
    temperature = tau * scale.clamp(min=MIN_SCALE)

    def inside() -> Tensor:
        return (scores >= knots[..., -1:]) & (scores <= knots[..., :1])

    if band.surrogate == "trapezoid":
        each = _above_knots(scores, knots, temperature)
    else:
        in_band = negative & inside()
        size = all_reduce(in_band.sum(-1), "sum", name)
        each = _above_band(scores, pos, in_band, temperature, size, rtol, group)
        counts = counts & ((size > 0) | broken)

    def mean(values: Tensor, by: Tensor) -> Tensor:
        if name:
            return mean_over_group(values, by, counts, sound, name)[0]
        return num.weighted_mean(values, by) * sound

    value = torch.where(counts, mean(each, weight), 0.0)
    out = PartialAUC(value, counts, degenerate, {})
    if not stats:
        return out
    each, plain = each.detach(), pos.to(each.dtype)
    spread = mean((each - mean(each, plain)[..., None]).square(), plain)
    found = {"t_alpha": knots[..., 0], "t_beta": knots[..., -1]}
    found |= {"tau_eff": temperature.detach(), "pauc_var": spread}
    found = {name: torch.where(counts, x, torch.nan) for name, x in found.items()}
    banded = all_reduce((iid_negative & inside()).sum(-1), "sum", name)
    found["band_neg_count"] = torch.where(counts, banded, 0)
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
    scores: Tensor,
    pos: Tensor,
    in_band: Tensor,
    temperature: Tensor,
    size: Tensor,
    rtol: float | None,
    group: ProcessGroup | None,
) -> Tensor:
    """[..., M] at the positives: mean over the band's negatives of the soft step above each."""
    below = sigmoid_sums(scores, in_band[..., None, :], pos, temperature, rtol=rtol, group=group)
    return 1.0 - below[..., 0, :] / size[..., None].clamp(min=1)


def _any_rank(name: str, *flags: Tensor) -> tuple[Tensor, ...]:
    """Whether each flag [...] holds on some process."""
    if not name:
        return flags
    return all_reduce(torch.stack(flags), "max", name).unbind()
