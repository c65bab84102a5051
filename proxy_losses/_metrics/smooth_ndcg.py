"""Smooth NDCG: graded relevance over the logarithm of soft ranks."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .. import _numerics as num
from .._checks import check_defined, check_int, check_real
from .._effects import LIBRARY, register
from .._quantiles import between_places
from .._ranks import DISCOUNT, How, Lists, rank_mean, rank_slopes
from .._ranks.steps import relative_gains, served
from ..distributed import (
    ProcessGroup,
    all_reduce_with_grad,
    gather_counts,
    gather_known,
    group_name,
    rank_and_size,
)
from ._record import Found, Metric, Option, Settings, of_arguments

LIBRARY.define("sharded_places(Tensor gain, str group) -> Tensor")


def smooth_ndcg_defined(
    gains: Tensor, valid_mask: Tensor | None = None, sample_weight: Tensor | None = None
) -> Tensor:
    """Which lists `smooth_ndcg` is defined for: some gain > 0, and some row of lower gain.

    Args:
        gains: [..., M] of any real dtype.
        valid_mask: [..., M] bool or None.
        sample_weight: [..., M] floating or None.

    Returns:
        [...] bool; True for a list with a gain that is none.

    Raises:
        TypeError: wrong dtypes.
        ValueError: shapes that do not fit.

    Example:
        >>> smooth_ndcg_defined(torch.tensor([[2, 0, 1], [0, 0, 0], [1, 1, 1]]))
        tensor([ True, False, False])
    """
    check_defined(gains, valid_mask, sample_weight, graded=True)
    pos = gains != 0  # a NaN is one, and shows
    lists = Lists(gains, pos, valid_mask, sample_weight, gains=gains)
    return _relative(lists, torch.float32, "")[1][..., 0]


def smooth_ndcg(
    scores: Tensor,
    gains: Tensor,
    tau: float | Tensor,
    *,
    k: int | None = None,
    valid_mask: Tensor | None = None,
    sample_weight: Tensor | None = None,
    rtol: float | None = None,
    group: ProcessGroup | None = None,
) -> Tensor:
    r"""Smooth normalized discounted cumulative gain; larger is better.

    ``NDCG = sum_i gain_i / log2(1 + R_i) / ideal``, R_i the soft rank of row i among all valid
    rows, ``R_i = 1 + sum_{j != i} sigmoid((s_j - s_i) / tau)``, and ideal the same sum for rows in
    the order of their gains. Soft ranks lie in the convex hull of orders, where a discounted gain
    is convex: the value is in (0, 1]. As tau -> 0 it becomes NDCG for scores without ties.

    With k every gain counts by how far its row is in, ``sigmoid((s_i - theta) / tau)`` with theta
    halfway between the scores at places k and k + 1, as in `precision_at_k`: theta moves with the
    scores around it in the gradient. The ideal is that of the k largest gains, and the limit NDCG
    at k. At a tau that is wide against the scores more than k rows may be in, softly, and the value
    exceed 1.

    Args:
        scores: [..., M] floating; lists on the last axis, leading axes are a batch. Half
            precision is computed in, and returned as, float32.
        gains: [..., M] of any real dtype, >= 0, relevance grades or other gains, as they are: for
            the exponential gain of information retrieval pass ``2.0**grades - 1.0``. Their scale
            has no effect.
        tau: temperature in units of the scores, > 0: a number, a 0-d tensor, or one value per
            list [...].
        k: places that count, >= 1; None for all.
        valid_mask: [..., M] bool, rows that count; None means all. Rows that do not may hold
            anything, NaN included.
        sample_weight: [..., M] floating >= 0, factors of the gains.
        rtol: accuracy asked for, in (0, 1); None for what fits the dtype of the scores.
        group: as in `smooth_ap`.

    Returns:
        [...] in the dtype of scores (float32 for half input). A list without a gain > 0, or whose
        rows all have the same gain, has no order to prefer: it gives 0 with zero gradient
        (`smooth_ndcg_defined` tells which; scikit-learn says 1 where all gains are the same, and
        the formula would only push such rows apart). A non-finite valid score gives NaN, and so
        does a gain that is negative or not finite, and a tensor tau that is not > 0.

    Raises:
        TypeError: wrong dtypes, a k that is no integer.
        ValueError: shapes that do not fit, tau, k or rtol out of range, a group without this
            process.

    Example:
        >>> scores, grades = torch.tensor([3.0, 2.0, 1.0, 0.0]), torch.tensor([0, 2, 1, 0])
        >>> smooth_ndcg(scores, grades, 0.01), smooth_ndcg(scores, grades, 0.01, k=2)
        (tensor(0.6697), tensor(0.4796))

    Reference: Järvelin and Kekäläinen, "Cumulated Gain-Based Evaluation of IR Techniques", ACM
    TOIS 2002; with soft ranks Qin, Liu and Li, "A General Approximation Framework for Direct
    Optimization of Information Retrieval Measures", Information Retrieval 2010.
    """
    check_real("gains", gains)
    lists = Lists(scores, gains != 0, valid_mask, sample_weight, gains=gains)
    return of_arguments(NDCG, lists, tau, {"k": k}, How(rtol, group=group)).value


def _evaluate(
    lists: Lists, tau: float | Tensor, settings: Settings, how: How, *, stats: bool
) -> Found:
    """The formula, over checked lists in full precision."""
    scores, _, valid, *_ = lists
    name, k = group_name(how.group), settings["k"]
    if k is None and not stats and served(lists, name=name):
        gain, pos, defined, share = relative_gains(lists, scores.dtype)
        mean, _ = rank_mean(Lists(scores, pos, valid, gain), tau, DISCOUNT, how)
        return Found(mean * share, defined, {})
    gain, some = _relative(lists, scores.dtype, name)
    ideal = _ideal(gain, k, name)
    pos, weight, step = gain != 0, gain, None
    if k is not None:
        step = _first(lists, tau, k, some, name)
        weight = gain * step
    mean, _ = rank_mean(Lists(scores, pos, valid, weight), tau, DISCOUNT, how)
    total = all_reduce_with_grad(weight.sum(-1, dtype=torch.float64), name)
    # The largest gain is 1 in lists that count, the mean 0 in others.
    value = mean * (total / ideal.clamp(min=1.0)).to(mean.dtype)
    found = Found(value, some[..., 0].expand(value.shape), {})
    if not stats:
        return found
    slopes = rank_slopes(num.clean(scores, valid), pos, tau, valid_mask=valid, group=how.group)
    if step is not None:  # of the row's part in the sum
        step = step.detach()
        slopes = torch.where(pos, slopes * step + step * (1.0 - step), 0.0)
    if isinstance(tau, Tensor):
        tau = num.beside(tau, slopes, slopes.dtype)[..., None]
    counted = some.expand(*slopes.shape[:-1], 1)
    return found._replace(stats=num.rank_stats(slopes, pos, tau, counted, name))


def _relative(lists: Lists, dtype: torch.dtype, name: str) -> tuple[Tensor, Tensor]:
    """Gains in units of the list's largest, and which lists count.

    Returns:
        ([..., M], 0 in rows and in lists that do not count, NaN where a gain is none;
        [..., 1] bool).
    """
    _, pos, valid, weight, *_, gains = lists
    pos = pos if valid is None else pos & valid
    if gains is None:
        gain = pos.to(dtype)
    else:
        wide = gains.to(torch.promote_types(gains.dtype, dtype))
        sound = torch.nn.functional.threshold(wide, -torch.finfo(wide.dtype).tiny, math.nan)
        gain = torch.where(pos, sound, 0.0)
    if weight is not None:
        gain = gain * num.positive_weight(pos, weight, gain.dtype, name)[0]
    top = num.largest(gain)
    least = num.largest(-gain if valid is None else torch.where(valid, -gain, -math.inf), -math.inf)
    if name:
        top, least = (x.to(gain.dtype) for x in num.largest_over_group(name, top, least))
    # Not whether they are the same: a NaN shows, and so do gains that are all infinite. Where no
    # row counts the least is infinite.
    some = ~(top + least <= 0.0)
    return (gain / torch.where(some, top, math.inf)).to(dtype), some


def _first(lists: Lists, tau: float | Tensor, k: int, some: Tensor, name: str) -> Tensor:
    """[..., M]: how far rows are among the first k."""
    scores, valid = lists.scores, lists.valid
    cleaned, broken = num.clean_lists(scores, valid, some, name)
    width = num.in_all_lists(num.lift_tau(tau, scores, name), some)
    if isinstance(width, Tensor):  # a single number promotes once it has a list's shape
        width = width.to(scores.dtype)
    theta, cut = between_places(scores, [k], valid, name)
    cut = cut & some
    theta = num.with_implicit_grad(theta, cleaned, valid, width, cut, name) + broken
    away = num.in_widths(cleaned - torch.where(cut, theta, 0.0), width)
    return torch.where(cut, torch.sigmoid(away), 1.0)


# -- the ideal


def _ideal(gain: Tensor, k: int | None, name: str) -> Tensor:
    """[...] float64: the discounted sum of gains [..., M] in their own order, of the first k."""
    rows = gain.shape[-1]
    if name:
        lists, ordered = gain.shape[:-1], gain
        place: Tensor = torch.ops.proxy_losses.sharded_places(
            gain.detach().reshape(num.number(lists), rows), name
        )
        after = place.reshape(gain.shape).to(gain.dtype) + 1.0
    else:
        if k is not None and num.size_known(rows):
            ordered = gain.topk(min(k, rows), -1).values
        else:
            ordered = gain.sort(-1, descending=True).values
        # In integers: a size that a tracer leaves open has no float.
        after = torch.arange(ordered.shape[-1], device=gain.device).to(gain.dtype) + 2.0
    discounted = ordered / after.log2()
    if k is not None:
        discounted = torch.where(after < k + 1.5, discounted, 0.0)
    return all_reduce_with_grad(discounted.sum(-1, dtype=torch.float64), name)


def _places(gain: Tensor, group: str) -> Tensor:
    """[L, M] int64: places of the rows of this process in the order of all gains, the largest 1.

    Each process tells how many rows it has of each gain: of grades, a few numbers.
    """
    lists, rows = gain.shape
    ordered, order = gain.sort(-1, descending=True)
    starts = torch.ones_like(ordered, dtype=torch.bool)
    starts[:, 1:] = ordered[:, 1:] != ordered[:, :-1]
    first = starts.flatten().nonzero()[:, 0]
    size = torch.cat([first, first.new_full((1,), starts.numel())]).diff()
    own = torch.full_like(first, rank_and_size(group)[0])
    which = first.div(max(rows, 1), rounding_mode="floor")
    columns = which, -ordered.flatten()[first], size, own
    runs = torch.stack([x.double() for x in columns], 1)
    every = gather_known(runs, gather_counts(first.numel(), gain.device, group), group)
    every = every[every[:, 1].argsort(stable=True)]
    every = every[every[:, 0].argsort(stable=True)]
    which, size = every[:, 0].long(), every[:, 2].long()
    number = size.new_zeros(lists).index_add_(0, which, size)
    before = size.cumsum(0) - size - (number.cumsum(0) - number)[which]
    before = before[every[:, 3] == rank_and_size(group)[0]]  # in the order of `first`
    run = starts.flatten().cumsum(0) - 1
    place = 1 + before[run] + torch.arange(run.numel(), device=run.device) - first[run]
    return torch.empty_like(order).scatter_(1, order, place.view(lists, rows))


register(
    "sharded_places", _places,
    lambda gain, group: gain.new_empty(gain.shape, dtype=torch.int64),
)  # fmt: skip


def _check(settings: Settings) -> None:
    if settings["k"] is not None:
        check_int("k", settings["k"], 1)


NDCG = Metric(
    name="smooth_ndcg",
    module="NDCGLoss",
    title="smooth NDCG of graded relevance",
    function=smooth_ndcg,
    evaluate=_evaluate,
    defined=smooth_ndcg_defined,
    options=(Option("k", None, "int | None", "places that count, >= 1; None for all."),),
    check=_check,
    reads=("gains",),
    checks_ids=True,
    table="NDCG of graded relevance",
    counts="have rows of different gains",
    note=(
        "Targets are relevance grades: [N] of any real dtype for one class, [N, C] for several; "
        "class ids mean grades 1 and 0. Rows with a grade of ignore_index do not count, single "
        "grades that are unknown are for `label_mask`. Mostly for lists of their own, by query_ids."
    ),
    diagnostics=(
        "saturation, the share of rows with a gain whose part in the sum numerically has no "
        "gradient; tau_eff, the temperature in units of the logits; pos_count, the rows with a "
        "gain"
    ),
    loss_example="""
    >>> logits, grades = torch.tensor([[3.0], [2.0], [1.0]]), torch.tensor([2, 0, 1])
    >>> loss, _ = smooth_ndcg_loss(logits, grades, None, 0.01)
    >>> round(loss.item(), 3)
    0.05
    """,
    module_example="""
    >>> loss_fn = NDCGLoss(num_classes=1, queue_size=0, temperature=0.05)
    >>> logits = torch.tensor([[3.0], [2.0], [1.0], [0.0]], requires_grad=True)
    >>> grades, query = torch.tensor([2, 0, 0, 1]), torch.tensor([0, 0, 1, 1])
    >>> round(loss_fn(logits, grades, query_ids=query).item(), 3)
    0.185
    """,
)
