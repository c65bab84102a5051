"""Partial area under the ROC curve, over a band of false-positive rates."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .. import _numerics as num
from .._checks import (
    BUDGET_BASES,
    INTERPOLATIONS,
    POS_NUMERATORS,
    SURROGATES,
    TAU_SCALES,
    as_tau,
    check_band,
    check_floating,
    check_floor,
    check_lists,
    check_rtol,
)
from .._quantiles import order_statistics, quantiles, spread_floor
from .._ranks import How, Lists, pairs_won, sigmoid_sums
from .._ranks import steps as kernels
from ..distributed import ProcessGroup, all_reduce, group_name
from ._record import THRESHOLD_GRAD, Found, Metric, Option, Settings, check_settings


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
    threshold_grad: str = "implicit",
    min_tpr: float = 0.0,
    iid_mask: Tensor | None = None,
    live_mask: Tensor | None = None,
    valid_mask: Tensor | None = None,
    sample_weight: Tensor | None = None,
    rtol: float | None = None,
    group: ProcessGroup | None = None,
) -> Tensor:
    r"""Smooth partial AUC over the false-positive rates [alpha, beta], in [0, 1]; larger is better.

    The reference is the iid negatives; ``t(f)`` is their (1 - f) quantile and ``T`` is tau times
    their spread, a constant of the gradient.

    - trapezoid: the mean over n_knots false-positive rates f_k, evenly spaced over the band with
      the ends counted half, of ``mean over positives i of sigmoid((s_i - t(f_k)) / T)``. In the
      gradient each t(f_k) moves with the reference scores around it, as if it held
      ``sum_j sigmoid((s_j - t) / T)`` over the reference: ``d t / d s_j`` is the slope of step j
      over the sum of slopes.
    - pairwise: the mean over positives i and negatives j with ``t(beta) <= s_j <= t(alpha)`` of
      ``sigmoid((s_i - s_j) / T)``. Both get a gradient; near-linear in M.

    With a floor ``min_tpr`` it is the two-way partial AUC, over the part of the band where the
    true-positive rate is above the floor, normalised by 1 - min_tpr: the means are over the
    hardest positives, the share 1 - min_tpr of them with the smallest scores. A positive that this
    share ends within counts in part, positives tied there in equal parts; so at least one counts.
    As tau -> 0 the pairwise surrogate becomes
    ``integral of max(TPR(f) - min_tpr, 0) df / ((1 - min_tpr) (beta - alpha))``.

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
        threshold_grad: of the trapezoid: "implicit" for the gradient above, with "live" over the
            reference rows of live_mask alone, so that pull and push balance there; "none" for
            thresholds that are constants of the gradient: then only positives get one, nothing
            holds the other scores down, and training needs a share of cross-entropy. The value is
            the same.
        min_tpr: floor of the true-positive rate, in [0, 1): 0.8 for the area above 80 %, over the
            hardest fifth of the positives. They are those of the numerator with a weight that is
            not 0, and their number is not weighted. Which ones they are is a constant of the
            gradient, and costs it nothing: a mean over the smallest values does not jump where
            others become the smallest. They bear all of the gradient, so it needs a pool with well
            over 1 / (1 - min_tpr) positives.
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
        which. A non-finite valid score gives NaN, and so does a tensor tau that is not > 0. A
        second derivative takes the slopes of the thresholds as constants.

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
    training objective Narasimhan and Agarwal, ICML 2013; two-way: Yang et al., "When All We Need is
    a Piece of the Pie", ICML 2021; the gradient of the thresholds: Kumar et
    al., "Implicit Rate-Constrained Optimization of Non-decomposable Objectives", ICML 2021.
    """
    lists = Lists(scores, pos_mask, valid_mask, sample_weight, iid_mask, live_mask)
    settings = _settings(
        alpha, beta, surrogate, n_knots=n_knots, tau_scale=tau_scale, pos_numerator=pos_numerator,
        budget_basis=budget_basis, interpolation=interpolation, threshold_grad=threshold_grad,
        min_tpr=min_tpr,
    )  # fmt: skip
    return _checked(lists, tau, settings, How(rtol, group=group)).value


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
    """Which lists `partial_auc` is defined for, whatever its `min_tpr`.

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
    check_floating("scores", scores)
    masks = valid_mask, sample_weight, iid_mask, live_mask
    settings = _settings(
        alpha, beta, surrogate, n_knots=2, tau_scale=tau_scale, pos_numerator=pos_numerator,
        budget_basis=budget_basis, interpolation=interpolation, threshold_grad="none",
        min_tpr=0.0,
    )  # fmt: skip
    return _checked(Lists(scores.detach(), pos_mask, *masks), 1.0, settings, How()).defined


def _settings(alpha: float, beta: float, surrogate: str, **others: object) -> Settings:
    return {"alpha": alpha, "beta": beta, "surrogate": surrogate, **others}


def _checked(lists: Lists, tau: float | Tensor, settings: Settings, how: How) -> Found:
    check_settings(PARTIAL_AUC, settings)
    check_rtol(how.rtol)
    scores, pos, valid, weight, iid, live = lists[:6]
    shape = check_lists(scores, pos, valid, weight, iid_mask=iid, live_mask=live)
    tau = as_tau(tau, shape[:-1])
    found: Found = num.full_precision(_evaluate)(lists, tau, settings, how, stats=False)
    return found


def _levels(settings: Settings) -> list[float]:
    """Quantile levels 1 - f_k of the knots, from alpha to beta."""
    alpha, beta = settings["alpha"], settings["beta"]
    between = settings["n_knots"] - 2 if settings["surrogate"] == "trapezoid" else 0
    inner = [1.0 - (alpha + (beta - alpha) * (k + 1) / (between + 1)) for k in range(between)]
    return [1.0 - alpha, *inner, 1.0 - beta]


def _evaluate(
    lists: Lists, tau: float | Tensor, settings: Settings, how: How, *, stats: bool
) -> Found:
    """The formula, over checked lists in full precision."""
    scores, pos, valid, given, iid, live = lists[:6]
    name = group_name(how.group)
    pos, negative = num.sides(pos, valid)
    reference = negative if iid is None else negative & iid
    among = reference
    if settings["budget_basis"] == "population":
        among = reference | (pos if iid is None else pos & iid)
    if settings["pos_numerator"] != "live":
        live = None
    pos = pos if live is None else pos & live
    if settings["min_tpr"] > 0.0:
        pos, given = _hardest(scores, pos, given, settings["min_tpr"], name)
    levels, iqr = _levels(settings), settings["tau_scale"] == "iqr"
    found = quantiles(
        scores, [*levels, 0.75, 0.25] if iqr else levels, settings["interpolation"], among, name,
        exact=True,
    )  # fmt: skip
    trapezoid = settings["surrogate"] == "trapezoid"
    moves = trapezoid and settings["threshold_grad"] == "implicit"
    if moves and live is not None:
        among = among & live  # stored rows would take the push that balances the pull
    ranked = Lists(scores, pos, valid, given)
    if trapezoid and not stats and kernels.served(ranked, tau, name, knots=len(levels)):

        def again(lists: Lists, tau: float | Tensor, *_: object) -> Tensor:
            return _evaluate(lists, tau, settings, how, stats=False).value

        count = len(levels)
        mean, defined, flat = kernels.mean_above(
            ranked, tau, found, again, lists, count=count, among=among, needs=reference,
            spread=(count, count + 1) if iqr else (0, count - 1),
            moves="quantile" if moves else "",
        )  # fmt: skip
        return Found(mean, defined, {}, flat)
    weight, some_positive = num.positive_weight(pos, given, scores.dtype, name)
    some_negative = reference.any(-1, keepdim=True)
    if name:
        some_negative = all_reduce(some_negative, "max", name)
    usable = some_positive & some_negative
    cleaned, broken = num.clean_lists(scores, valid, usable, name)
    each_level = found.chunk(found.shape[-1], -1)
    first, last = each_level[0], each_level[len(levels) - 1]  # t(alpha) and t(beta)
    upper, lower = each_level[-2:] if iqr else (first, last)
    # NaN in a list with a score that is not finite: it counts, and shows.
    scale = upper - lower + broken
    degenerate = usable & (scale <= spread_floor(upper, lower, scores.dtype))
    counts = usable ^ degenerate
    temperature = num.lift_tau(tau, scores, name) * torch.where(counts, scale, 1.0)
    temperature = temperature.clamp(min=torch.finfo(scores.dtype).tiny)  # of two small numbers
    if trapezoid:
        knots = found[..., : len(levels)]
        if moves:
            knots = num.with_implicit_grad(knots, cleaned, among, temperature, counts, name)
        mean = num.step_means(cleaned, knots, temperature, weight, counts, name)
        each = mean
        if stats:
            each = num.trapezoid(_above_knots(cleaned.detach(), knots, temperature).mT)
    else:
        temperature = num.in_all_lists(temperature, counts)
        band = negative & (scores >= last) & (scores <= first)
        size = all_reduce(band.sum(-1, keepdim=True), "sum", name)
        pairs = Lists(cleaned, pos, pos | band, None if given is None else weight)
        won, some = pairs_won(pairs, temperature[..., 0], how)
        poison = (cleaned * broken).sum(-1)  # of the gradient, too: there may be no band
        mean = won / size[..., 0].clamp(min=1)
        counts = counts & (some | poison.isnan())[..., None]
        mean = torch.where(counts[..., 0], mean + poison, 0.0)
        each = _above_band(cleaned, pos, band, temperature, size, how) if stats else mean
    defined = counts[..., 0]
    out = Found(mean, defined, {}, degenerate[..., 0])
    if not stats:
        return out
    each, plain = each.detach(), pos.to(each.dtype)
    center = num.mean_of(each, plain, name)[..., None]
    variance = num.mean_of((each - center).square(), plain, name)[..., None]
    floats = {
        "t_alpha": first, "t_beta": last, "tau_eff": temperature.detach(), "pauc_var": variance
    }  # fmt: skip
    report = {key: torch.where(counts, x, torch.nan)[..., 0] for key, x in floats.items()}
    inside = reference & (scores >= last) & (scores <= first)
    banded = all_reduce(inside.sum(-1, keepdim=True), "sum", name)
    report["band_neg_count"] = torch.where(counts, banded, 0)[..., 0]
    return out._replace(stats=report)


def _hardest(
    scores: Tensor, pos: Tensor, given: Tensor | None, min_tpr: float, name: str
) -> tuple[Tensor, Tensor]:
    """The positives below the floor, and their weights: those given, less where one is cut."""
    if given is not None:
        pos = pos & (given != 0)
    # What is no number has a place too; its list is broken, and shows.
    s, pos = torch.broadcast_tensors(torch.where(scores.isnan(), math.inf, scores.detach()), pos)
    count = all_reduce(pos.sum(-1, keepdim=True), "sum", name).double()
    wanted = count - count * min_tpr
    rank = wanted.floor().minimum(count - 1.0).clamp(min=0.0).long()
    edge = order_statistics(s, rank, pos, name)
    below, tied = pos & (s < edge), pos & (s == edge)
    sums = torch.stack([x.sum(-1, keepdim=True) for x in (below, tied)])
    under, ties = all_reduce(sums, "sum", name).double().unbind()
    part = ((wanted - under) / ties.clamp(min=1.0)).clamp(0.0, 1.0).to(s.dtype)
    share = torch.where(tied, part, below.to(s.dtype))
    return pos & (share > 0), share if given is None else given * share


def _above_knots(scores: Tensor, knots: Tensor, temperature: Tensor) -> Tensor:
    """[..., K, M]: the soft step of every row above each knot [..., K]."""
    each = scores[..., None, :] - knots[..., None]
    return torch.sigmoid(each / temperature[..., None])


def _above_band(
    scores: Tensor, pos: Tensor, band: Tensor, temperature: Tensor, size: Tensor, how: How
) -> Tensor:
    """[..., M] at the positives: mean over the band's negatives of the soft step above each."""
    # What is no temperature, or belongs to a broken list, is kept from the sums and shown after.
    sound = temperature > 0
    unit = torch.where(sound, temperature, 1.0)
    sums = sigmoid_sums(
        -torch.where(sound, scores, 0.0), band[..., None, :], pos, unit[..., 0],
        rtol=how.rtol, method=how.method, group=how.group,
    )  # fmt: skip
    return torch.where(sound, sums[..., 0, :] / size.clamp(min=1), torch.nan)


def _check(settings: Settings) -> None:
    check_band(settings["alpha"], settings["beta"], settings["n_knots"])
    check_floor(settings["min_tpr"])


PARTIAL_AUC = Metric(
    name="partial_auc",
    module="PAUCAtBudgetLoss",
    title="partial AUC over a band of false-positive rates",
    function=partial_auc,
    evaluate=_evaluate,
    defined=partial_auc_defined,
    options=(
        Option("alpha", 0.0, "float", "lower false-positive rate of the band, 0 <= alpha < beta."),
        Option(
            "beta", 0.005, "float",
            "upper false-positive rate, the budget, at most 1; 0.005 is 0.5 % of the negatives. "
            "The pool should hold well over 1 / beta of them.",
        ),
        Option(
            "surrogate", "trapezoid", "str",
            '"trapezoid" (thresholds at a few rates) or "pairwise" (every negative of the band).',
            choices=SURROGATES,
        ),
        Option("n_knots", 2, "int", "false-positive rates of the trapezoid, >= 2."),
        Option(
            "tau_scale", "iqr", "str",
            'the spread that the temperature multiplies, "iqr" or "band", see `partial_auc`.',
            choices=TAU_SCALES,
        ),
        Option(
            "pos_numerator", "pool", "str",
            '"pool" for all positives, "live" for those of the batch alone.',
            choices=POS_NUMERATORS,
        ),
        Option(
            "budget_basis", "fpr", "str",
            '"fpr" for a band of the iid negatives, "population" of all iid rows.',
            choices=BUDGET_BASES,
        ),
        Option(
            "interpolation", "higher", "str", "as in `torch.quantile`.",
            published="quantile_interpolation", late=True, choices=INTERPOLATIONS,
        ),
        THRESHOLD_GRAD._replace(kept="none", text=f"of the trapezoid. {THRESHOLD_GRAD.text}"),
        Option(
            "min_tpr", 0.0, "float",
            "floor of the true-positive rate, in [0, 1): 0.8 for the two-way partial AUC above "
            "80 %, over the hardest fifth of the positives. The pool should hold well over "
            "1 / (1 - min_tpr) of them.",
            keyword=True,
        ),
    ),
    check=_check,
    reads=lambda settings: ("iid", "live") if settings["pos_numerator"] == "live" else ("iid",),
    temperature=0.1,
    own_spread=True,
    examples=(
        {"alpha": 0.125, "beta": 0.625, "n_knots": 3, "threshold_grad": "implicit"},
        {"alpha": 0.125, "beta": 0.625, "n_knots": 3, "threshold_grad": "none", "min_tpr": 0.375},
        {"alpha": 0.0, "beta": 0.5, "surrogate": "pairwise"},
    ),
    table="partial AUC up to a false-positive budget",
    shown="beta",
    note=(
        "Every class has its own band and temperature, read off its iid negatives. Give the "
        'trapezoid threshold_grad="implicit" in new code. The default is "none", as published: '
        "only positives get a gradient then, nothing holds the others down, logits run away, and "
        "without a share of cross-entropy the loss does worse than cross-entropy alone, where the "
        "moving thresholds were ahead by 5 to 7 points of recall. At final_main_weight=0.75 of "
        "`LossWarmupWrapper`, which suits both, they were alike."
    ),
    diagnostics=(
        "t_alpha and t_beta, the ends of the band; tau_eff, the temperature in units of the "
        "logits; band_neg_count, the iid negatives in it; pauc_var, the unweighted variance of the "
        "share of the value of the positives that count"
    ),
    loss_example="""
    >>> logits = torch.arange(1000.0)[:, None]
    >>> targets = (torch.arange(1000) >= 999).long()
    >>> loss, _ = partial_auc_loss(logits, targets, None, 1e-4, surrogate="pairwise")
    >>> loss.item()
    0.0
    """,
    module_example="""
    >>> loss_fn = PAUCAtBudgetLoss(num_classes=1, beta=0.1, queue_size=0)
    >>> logits = torch.cat([torch.tensor([500.0]), torch.arange(100.0)])[:, None]
    >>> loss_fn(logits, (logits[:, 0] > 400).long()).item()
    0.0
    """,
)  # fmt: skip
