"""Smooth reciprocal rank of the first positive."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .. import _numerics as num
from .._checks import check_defined
from .._ranks import How, Lists
from .._ranks.steps import first_rank, served
from ..distributed import ProcessGroup, all_reduce, all_reduce_with_grad, group_name
from ._record import Found, Metric, Settings, has_both, of_arguments


def smooth_mrr_defined(
    pos_mask: Tensor, valid_mask: Tensor | None = None, sample_weight: Tensor | None = None
) -> Tensor:
    """Which lists `smooth_mrr` is defined for: some positive (of weight > 0) and some negative.

    Args:
        pos_mask: [..., M] bool.
        valid_mask: [..., M] bool or None.
        sample_weight: [..., M] floating or None.

    Returns:
        [...] bool.

    Raises:
        TypeError: wrong dtypes.
        ValueError: shapes that do not fit.

    Example:
        >>> smooth_mrr_defined(torch.tensor([[True, False], [True, True]]))
        tensor([ True, False])
    """
    check_defined(pos_mask, valid_mask, sample_weight)
    return has_both(pos_mask, valid_mask, sample_weight)


def smooth_mrr(
    scores: Tensor,
    pos_mask: Tensor,
    tau: float | Tensor,
    *,
    valid_mask: Tensor | None = None,
    sample_weight: Tensor | None = None,
    group: ProcessGroup | None = None,
) -> Tensor:
    r"""Smooth reciprocal rank of the first positive, in (0, 1]; larger is better.

    ``RR = 1 / (1 + sum_j sigmoid((s_j - s+) / tau))`` over the negatives j, where
    ``s+ = tau log sum_i exp(s_i / tau)`` is the soft maximum of the positives; the mean over lists
    is MRR. Other positives never count against the first, and time is linear in M.

    Why this soft maximum: ``sigmoid((s_j - s+) / tau)`` is the probability that j comes before all
    positives when the list is drawn by scores / tau (Plackett-Luce), so the denominator is exactly
    the expected rank of the first positive, and the value a lower bound of the expected reciprocal
    rank (Jensen). With a single positive it is `smooth_ap`. Each positive gets the share
    ``exp((s_i - s+) / tau)`` of the gradient, the first the most; a sum of reciprocal ranks with
    these shares as weights would stay below the best one, a log-sum-exp of them exceed 1.

    As tau -> 0 it becomes 1 / (1 + negatives above the first positive). Of k positives and n
    negatives that tie for the first positive's place it counts n / (k + 1) negatives: the mean over
    random orders of the tie. Like 1 / rank it is flat where the first positive is far down the
    list: begin with a large tau.

    Args:
        scores: [..., M] floating; lists on the last axis, leading axes are a batch. Half
            precision is computed in, and returned as, float32.
        pos_mask: [..., M] bool, the positives.
        tau: temperature in units of the scores, > 0: a number, a 0-d tensor, or one value per
            list [...].
        valid_mask: [..., M] bool, rows that count; None means all. Rows that do not may hold
            anything, NaN included.
        sample_weight: [..., M] floating >= 0, how many a positive counts for in s+, times
            ``sum w / sum w^2`` over the positives: equal weights are none, the scale has no effect,
            and as tau -> 0 every weight > 0 is alike. Weights of negatives have no effect.
        group: as in `smooth_ap`.

    Returns:
        [...] in the dtype of scores (float32 for half input). A list without positives, without
        negatives or with zero weight on all positives gives 0 with zero gradient
        (`smooth_mrr_defined` tells which); a non-finite valid score gives NaN, and so does a
        tensor tau that is not > 0.

    Raises:
        TypeError: wrong dtypes.
        ValueError: shapes that do not fit, tau out of range, a group without this process.

    Example:
        >>> scores = torch.tensor([0.9, 0.8, 0.3, 0.1])
        >>> pos = torch.tensor([False, True, True, False])
        >>> smooth_mrr(scores, pos, 0.01)
        tensor(0.5000)

    Reference: Voorhees, "The TREC-8 Question Answering Track Report", TREC 1999; as an objective
    Shi et al., "CLiMF: Learning to Maximize Reciprocal Rank with Collaborative Less-is-More
    Filtering", RecSys 2012; the draw Plackett, "The Analysis of Permutations", Appl. Stat. 1975.
    """
    lists = Lists(scores, pos_mask, valid_mask, sample_weight)
    return of_arguments(MRR, lists, tau, {}, How(group=group)).value


def _evaluate(
    lists: Lists, tau: float | Tensor, settings: Settings, how: How, *, stats: bool
) -> Found:
    """The formula, over checked lists in full precision."""
    scores, pos, valid, given = lists[:4]
    name = group_name(how.group)
    if not stats and served(lists, tau, name):

        def again(lists: Lists, tau: float | Tensor) -> Tensor:
            return _evaluate(lists, tau, settings, how, stats=False).value

        return Found(*first_rank(lists, tau, again), {})
    pos, negative = num.sides(pos, valid)
    weight, some = num.positive_weight(pos, given, scores.dtype, name)
    some = some & all_reduce(negative.any(-1, keepdim=True), "max", name)
    cleaned, broken = num.clean_lists(scores, valid, some, name)
    width = num.in_all_lists(num.lift_tau(tau, scores, name), some)
    if isinstance(width, Tensor):  # a single number promotes once it has a list's shape
        width = width.to(scores.dtype)
    rank = _first_rank(cleaned, broken, negative, weight, some, width, name)[0]
    value = torch.where(some, rank.reciprocal().to(scores.dtype), 0.0)[..., 0]
    found = Found(value, some[..., 0], {})
    if not stats:
        return found
    plain = pos.to(scores.dtype)
    rank, above, _ = _first_rank(cleaned.detach(), broken, negative, plain, some, width, name)
    above = above.detach()
    slope = all_reduce((above * (1.0 - above)).sum(-1, keepdim=True), "sum", name)
    report = num.rank_stats(slope.expand(above.shape), pos.expand(above.shape), width, some, name)
    first = rank.detach().to(scores.dtype)
    report["first_rank"] = torch.where(some, first, math.nan)[..., 0]
    return found._replace(stats=report)


def _first_rank(
    scores: Tensor, broken: Tensor, negative: Tensor, weight: Tensor, some: Tensor,
    tau: float | Tensor, name: str,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The expected rank [..., 1] of the first positive, and how far rows [..., M] are in it.

    That is, how far a negative is above it, and the share of s+ that a positive has.
    """
    even = weight.dtype == torch.bool
    given = weight if even else weight != 0  # a NaN shows
    ranked = torch.where(given, scores, -math.inf)
    top = all_reduce(num.largest(ranked, -math.inf), "max", name)
    away = num.in_widths(scores - (torch.where(some, top, 0.0) + broken), tau)
    mass = torch.where(given, away, -math.inf).exp()
    if even:
        hit = all_reduce_with_grad(mass.sum(-1, keepdim=True, dtype=torch.float64), name)
        hit = inside = torch.where(some, hit, 1.0)
    else:
        mass = weight * mass
        parts = torch.broadcast_tensors(mass, weight, weight.square())
        sums = torch.stack([x.sum(-1, keepdim=True, dtype=torch.float64) for x in parts])
        hit, total, square = torch.where(some, all_reduce_with_grad(sums, name), 1.0).unbind()
        inside = hit * total / square
    shift = inside.log().to(away.dtype)  # of s+ from the top, in units of tau
    above = torch.where(negative, (away - shift).sigmoid(), 0.0)
    count = all_reduce_with_grad(above.sum(-1, keepdim=True, dtype=torch.float64), name)
    return 1.0 + count, above, mass / hit.to(mass.dtype)


MRR = Metric(
    name="smooth_mrr",
    module="MRRLoss",
    title="smooth reciprocal rank of the first positive",
    function=smooth_mrr,
    evaluate=_evaluate,
    defined=smooth_mrr_defined,
    table="reciprocal rank of the first positive",
    counts="have positives and negatives",
    note=(
        "Meant for lists of their own, as with `query_ids`: over a pool it looks at the best "
        "positive of the class alone."
    ),
    diagnostics=(
        "first_rank, the soft rank of the first positive; saturation, 1 where it has numerically "
        "no gradient (slopes that sum to less than 1e-4 of the steepest sigmoid's) and else 0; "
        "tau_eff, the temperature in units of the logits; pos_count, the positives ranked"
    ),
    loss_example="""
    >>> logits = torch.tensor([[2.0], [1.0], [0.0], [-1.0]])
    >>> loss, _ = smooth_mrr_loss(logits, torch.tensor([0, 1, 1, 0]), None, 0.01)
    >>> loss.item()
    0.5
    """,
    module_example="""
    >>> loss_fn = MRRLoss(num_classes=1, queue_size=0, temperature=0.05)
    >>> logits = torch.tensor([[2.0], [1.0], [1.5], [0.0]], requires_grad=True)
    >>> loss = loss_fn(logits, torch.tensor([0, 1, 1, 1]), query_ids=torch.tensor([0, 0, 1, 1]))
    >>> round(loss.item(), 3)  # one query ranks nothing but positives
    0.5
    """,
)  # fmt: skip
