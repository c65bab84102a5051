"""Recall in the top fraction of the scores."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from . import _numerics as num
from ._checks import check_lists, check_quantile, check_tau, common_shape
from ._select import mean_over_group, sharded_quantiles
from .distributed import average_grad, group_name

if TYPE_CHECKING:
    from .distributed import ProcessGroup


def recall_defined(
    pos_mask: Tensor, valid_mask: Tensor | None = None, sample_weight: Tensor | None = None
) -> Tensor:
    """Which lists `recall_at_quantile` is defined for: those with a positive of weight > 0.

    Args:
        pos_mask: [..., M] bool.
        valid_mask: [..., M] bool or None.
        sample_weight: [..., M] floating or None.

    Returns:
        [...] bool.

    Example:
        >>> recall_defined(torch.tensor([[True, False], [False, False]]))
        tensor([ True, False])
    """
    pos = pos_mask if valid_mask is None else pos_mask & valid_mask
    if sample_weight is not None:
        pos = pos & (sample_weight > 0)
    return pos.any(-1)


def recall_at_quantile(
    scores: Tensor,
    pos_mask: Tensor,
    tau: float | Tensor,
    *,
    quantile: float = 0.005,
    interpolation: str = "higher",
    valid_mask: Tensor | None = None,
    sample_weight: Tensor | None = None,
    group: ProcessGroup | None = None,
) -> Tensor:
    r"""Smooth recall among the top fraction `quantile` of the scores, in [0, 1]; larger is better.

    ``theta`` is the (1 - quantile) quantile of all valid scores, a constant of the gradient;
    ``recall = mean over positives i of sigmoid((s_i - theta) / tau)``. Only positives get a
    gradient.

    Args:
        scores: [..., M] floating; lists on the last axis, leading axes are a batch. Half
            precision is computed in, and returned as, float32.
        pos_mask: [..., M] bool, the positives.
        tau: temperature in units of the scores, > 0: a number, a 0-d tensor, or one value per
            list [...].
        quantile: the top fraction, in (0, 1): 0.005 is the top 0.5 % of the scores (the q of
            `torch.quantile` is 1 - quantile).
        interpolation: "linear", "lower", "higher", "midpoint" or "nearest", as in
            `torch.quantile`, whose value this equals wherever that function works; there is no
            limit on M here.
        valid_mask: [..., M] bool, rows that count; None means all.
        sample_weight: [..., M] floating >= 0, weights of the mean over positives; the threshold
            is never weighted.
        group: as in `smooth_ap`; the threshold is that of the whole lists, to the bit.

    Returns:
        [...] in the dtype of scores (float32 for half input). A list without positives, or with
        zero weight on all of them, gives 0 with zero gradient (`recall_defined` tells which); one
        without negatives counts. A non-finite valid score gives NaN.

    Raises:
        TypeError: wrong dtypes.
        ValueError: shapes that do not fit, tau, quantile or interpolation out of range, a group
            without this process.

    Example:
        >>> scores = torch.arange(100.0)
        >>> pos = scores >= 90  # ten positives, two of them in the top 2 %
        >>> recall_at_quantile(scores, pos, 0.01, quantile=0.02)
        tensor(0.1500)

        The row on the threshold counts half.

    Reference: the surrogate of Boyd et al., "Accuracy at the Top", NeurIPS 2012, with a sigmoid in
    place of the hinge.
    """
    out: tuple[Tensor, Tensor] = recall_and_counts(
        scores, pos_mask, tau, quantile, interpolation, valid_mask, sample_weight, group
    )
    return out[0]


@num.full_precision
def recall_and_counts(
    scores: Tensor,
    pos_mask: Tensor,
    tau: float | Tensor,
    quantile: float,
    interpolation: str,
    valid_mask: Tensor | None,
    sample_weight: Tensor | None,
    group: ProcessGroup | None = None,
) -> tuple[Tensor, Tensor]:
    """`recall_at_quantile` and `recall_defined`."""
    check_lists(scores, pos_mask, valid_mask, sample_weight)
    name = group_name(group)
    above = _above(scores, pos_mask, tau, quantile, interpolation, valid_mask, name)
    pos = pos_mask if valid_mask is None else pos_mask & valid_mask
    weight = num.positive_weight(pos, sample_weight, above.dtype)
    sound = num.poison(num.clean(scores, valid_mask))
    counts = recall_defined(pos_mask, valid_mask, sample_weight)
    if name:
        recall, counts = mean_over_group(above, weight, counts, sound, name)
    else:
        recall = num.weighted_mean(above, weight) * sound
    return torch.where(counts, recall, 0.0), counts


def _above(
    scores: Tensor,
    pos_mask: Tensor,
    tau: float | Tensor,
    quantile: float,
    interpolation: str,
    valid_mask: Tensor | None,
    name: str = "",
) -> Tensor:
    """[..., M]: the soft step of every row above the threshold of its list."""
    check_quantile(quantile, interpolation)
    lists = common_shape(
        scores.shape, pos_mask.shape, scores.shape if valid_mask is None else valid_mask.shape
    )[:-1]
    check_tau(tau, lists)
    if isinstance(tau, Tensor):
        tau = average_grad(tau.to(scores.device, scores.dtype), name)[..., None]
    scores = num.clean(scores, valid_mask)
    if name or not num.size_known(scores.shape[-1]):
        level = torch.full((1,), 1.0 - quantile, dtype=torch.float64, device=scores.device)
        theta = sharded_quantiles(scores, level, interpolation, valid_mask, name)[..., 0]
    else:
        theta = num.masked_quantile(scores, 1.0 - quantile, interpolation, valid_mask)
    return torch.sigmoid((scores - theta[..., None]) / tau)


@num.full_precision
def recall_saturation(
    scores: Tensor,
    pos_mask: Tensor,
    tau: float | Tensor,
    *,
    quantile: float = 0.005,
    interpolation: str = "higher",
    valid_mask: Tensor | None = None,
    group: ProcessGroup | None = None,
) -> Tensor:
    """Share of positives more than about 10 tau from the threshold: numerically no gradient.

    A positive counts as saturated when ``p_i * (1 - p_i)``, with ``p_i = sigmoid((s_i - theta) /
    tau)`` as in `recall_at_quantile`, is under 1e-4 of the 1/4 that it is at the threshold.

    Args:
        scores: [..., M] floating.
        pos_mask: [..., M] bool, the positives.
        tau: temperature as in `recall_at_quantile`.
        quantile: as in `recall_at_quantile`.
        interpolation: as in `recall_at_quantile`.
        valid_mask: [..., M] bool, rows that count; None means all.
        group: as in `smooth_ap`.

    Returns:
        [...] in [0, 1], detached; 0 for a list without positives.

    Raises:
        TypeError: wrong dtypes.
        ValueError: shapes that do not fit, tau, quantile or interpolation out of range.

    Example:
        >>> scores, pos = torch.tensor([3.0, 1.0, 0.0]), torch.tensor([True, True, False])
        >>> recall_saturation(scores, pos, 0.05, quantile=0.5)  # the threshold is 1
        tensor(0.5000)
    """
    check_lists(scores, pos_mask, valid_mask)
    name = group_name(group)
    above = _above(scores.detach(), pos_mask, tau, quantile, interpolation, valid_mask, name)
    above = above.detach()
    pos = pos_mask if valid_mask is None else pos_mask & valid_mask
    return num.saturated_share(above * (1.0 - above), pos, name)
