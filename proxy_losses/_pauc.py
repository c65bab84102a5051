"""Partial area under the ROC curve, over a band of false-positive rates."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from ._band import Band, PartialAUC, partial_auc_and_stats

if TYPE_CHECKING:
    from .distributed import ProcessGroup


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
    group: ProcessGroup | None = None,
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
    beta: ``beta / 2 + (2 * S - 1) * (1 - beta / 2)`` of the standardised S.

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
        group: as in `smooth_ap`; the band is that of the whole lists.

    Returns:
        [...] in the dtype of scores (float32 for half input). 0 with zero gradient for a list
        without a positive in the numerator (of weight > 0), without iid negatives, with an empty
        band (pairwise), or whose reference scores do not spread; `partial_auc_defined` tells
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
        scores,
        pos_mask,
        tau,
        band,
        valid_mask,
        sample_weight,
        iid_mask,
        live_mask,
        rtol,
        group=group,
    )
    return out.value


def partial_auc_defined(
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
    """Which lists `partial_auc` is defined for.

    Those with a positive in the numerator (of weight > 0), iid negatives, reference scores that
    spread and, for "pairwise", a negative in the band.

    Args:
        scores: [..., M] floating.
        pos_mask: [..., M] bool.
        valid_mask: this and all other arguments as in `partial_auc`.
        sample_weight: [..., M] floating >= 0.
        iid_mask: [..., M] bool.
        live_mask: [..., M] bool.
        alpha: lower false-positive rate.
        beta: upper false-positive rate.
        surrogate: "trapezoid" or "pairwise".
        tau_scale: "iqr" or "band".
        pos_numerator: "pool" or "live".
        budget_basis: "fpr" or "population".
        interpolation: as in `torch.quantile`.

    Returns:
        [...] bool.

    Raises:
        TypeError: wrong dtypes.
        ValueError: shapes that do not fit, an option out of range.

    Example:
        >>> tied = torch.zeros(5)  # no spread, no temperature
        >>> pos = torch.tensor([True, False, False, False, False])
        >>> partial_auc_defined(tied, pos), partial_auc_defined(torch.arange(5.0), pos)
        (tensor(False), tensor(True))
    """
    band = Band(alpha, beta, surrogate, 2, tau_scale, pos_numerator, budget_basis, interpolation)
    out: PartialAUC = partial_auc_and_stats(
        scores.detach(), pos_mask, 1.0, band, valid_mask, sample_weight, iid_mask, live_mask
    )
    return out.counts
