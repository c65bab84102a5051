"""The primitive under every metric: pairwise sigmoid sums, and soft ranks from them."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .._checks import (
    as_tau,
    check_bool,
    check_choice,
    check_floating,
    check_lists,
    check_real,
    check_rtol,
    check_same_list,
    check_tau,
    common_shape,
)
from .._numerics import lift, number
from ..distributed import ProcessGroup, group_name
from . import op, shard  # noqa: F401  shard registers its ops
from .lists import METHODS, How, Lists, Pairs
from .phi import DISCOUNT, OUTRANKED, PRECISION, Phi

__all__ = [
    "DISCOUNT", "PRECISION", "How", "Lists", "Phi", "SoftRanks", "default_rtol", "pairs_won",
    "rank_mean", "rank_slopes", "sigmoid_sums", "soft_ranks", "softplus_sums",
]  # fmt: skip


def default_rtol(dtype: torch.dtype) -> float:
    """Accuracy that fits the precision of the scores as given, before any lifting."""
    return {torch.float64: 1e-12, torch.float32: 1e-6}.get(dtype, 1e-4)


class SoftRanks(NamedTuple):
    """Soft ranks at the positives, 1 for the largest score; 0 in all other rows.

    Example:
        >>> pos = torch.tensor([True, False, True])
        >>> ranks = soft_ranks(torch.tensor([1.0, 2.0, 3.0]), pos, 0.01)
        >>> (ranks.pos[pos] / ranks.all[pos]).mean()  # average precision
        tensor(0.8333)
    """

    all: Tensor  # [..., M] floating, rank among all valid rows
    pos: Tensor  # [..., M] floating, rank among the positives


def sigmoid_sums(
    scores: Tensor, weights: Tensor, at: Tensor, tau: float | Tensor, *, rtol: float | None = None,
    method: str = "auto", group: ProcessGroup | None = None,
) -> Tensor:  # fmt: skip
    r"""Pairwise sigmoid sums, the primitive that every soft rank is made of.

    ``out[g, i] = sum_j weights[g, j] * sigmoid((scores[j] - scores[i]) / tau)`` for the rows i
    in ``at``, 0 elsewhere; j runs over all rows, i included (its own term is weights / 2).

    Differentiable in scores, weights and tau, twice; the second derivative takes
    O(M^2) memory, everything else O(M). Sums accumulate in float64.

    With a group, M counts the rows of this process: sources are the rows of all its processes,
    targets the local ones; differentiable once. See proxy_losses/_ranks/README.md, "Shards".

    Args:
        scores: [..., M] floating. Half precision is computed in, and returned as, float32.
        weights: [..., G, M] floating or bool.
        at: [..., M] bool.
        tau: temperature > 0: a number, a 0-d tensor or one value per list [...].
        rtol: accuracy asked for, in (0, 1), see proxy_losses/_ranks/README.md; None is 1e-6 for
            float32, 1e-12 for float64 and 1e-4 for half-precision scores.
        method: "auto", or "dense" (exact pairs) or "grid" (near-linear) to have that one.
        group: processes that share the lists, None for this one alone. All of them call alike, with
            equal leading axes and tau; M may differ, or be 0.

    Returns:
        [..., G, M] in the dtype of scores (float32 for half input). A list with a non-finite
        score, or a tensor tau that is not > 0, is NaN at its targets.

    Raises:
        TypeError: wrong dtypes.
        ValueError: shapes that do not fit; tau, rtol or method out of range; tau that differs
            between processes; a group without this process.

    Example:
        >>> s = torch.tensor([2.0, 0.0])
        >>> sigmoid_sums(s, torch.ones(1, 2), torch.tensor([True, True]), 1.0)
        tensor([[0.6192, 1.3808]])
    """
    check_floating("scores", scores)
    check_real("weights", weights)
    check_bool("at", at)
    check_rtol(rtol)
    check_choice("method", method, METHODS)
    if weights.dim() < 2 or scores.dim() < 1:
        raise ValueError(
            f"expected scores [..., M] and weights [..., G, M], got {list(scores.shape)} "
            f"and {list(weights.shape)}"
        )
    m = scores.shape[-1]
    if not at.dim() or not (weights.shape[-1] == m == at.shape[-1]):
        raise ValueError(
            f"scores, weights and at must share their last axis, got {list(scores.shape)}, "
            f"{list(weights.shape)} and {list(at.shape)}"
        )
    check_same_list("at", at, scores)
    check_same_list("weights", weights[..., 0, :] if weights.shape[-2] else weights, scores)
    lists = common_shape(scores.shape[:-1], weights.shape[:-2], at.shape[:-1])
    tau = as_tau(tau, lists)
    rtol = default_rtol(scores.dtype) if rtol is None else rtol
    scores = lift(scores)
    groups, n = weights.shape[-2], number(lists)
    pairs = Pairs(
        scores.expand(*lists, m).reshape(n, m),
        weights.expand(*lists, groups, m).reshape(n, groups, m),
        at.expand(*lists, m).reshape(n, 1, m),
        op.flat_tau(tau, scores, lists, group_name(group)),
    )
    out = op.sigmoid_sums(pairs, rtol, method, group_name(group))
    return out.reshape(*lists, groups, m)


def soft_ranks(
    scores: Tensor, pos_mask: Tensor, tau: float | Tensor, *, valid_mask: Tensor | None = None,
    rtol: float | None = None, method: str = "auto", group: ProcessGroup | None = None,
) -> SoftRanks:  # fmt: skip
    r"""Soft rank of every positive among all valid rows, and among the positives.

    ``R_i = 1 + sum_{j != i} sigmoid((s_j - s_i) / tau)`` over the valid rows j, R+ over the
    positives (Brown et al., ECCV 2020).

    Args:
        scores: [..., M] floating. Half precision is computed in, and returned as, float32. Rows
            that are not valid must hold finite numbers.
        pos_mask: [..., M] bool; positives that are not valid do not count.
        tau: temperature > 0: a number, a 0-d tensor or one value per list [...].
        valid_mask: [..., M] bool or None for all.
        rtol: see `sigmoid_sums`.
        method: see `sigmoid_sums`.
        group: see `sigmoid_sums`.

    Returns:
        `SoftRanks` of [..., M].

    Raises:
        TypeError, ValueError: as `sigmoid_sums`.

    Example:
        >>> ranks = soft_ranks(
        ...     torch.tensor([3.0, 1.0, 2.0]), torch.tensor([True, False, True]), 0.01
        ... )
        >>> ranks.all, ranks.pos
        (tensor([1., 0., 2.]), tensor([1., 0., 2.]))
    """
    check_lists(scores, pos_mask, valid_mask)
    valid = torch.ones_like(pos_mask) if valid_mask is None else valid_mask
    pos = pos_mask & valid
    groups = torch.stack(torch.broadcast_tensors(valid, pos), dim=-2)
    sums = sigmoid_sums(scores, groups, pos, tau, rtol=rtol, method=method, group=group)
    # The row's own sigmoid(0) = 1/2 is in the sum already.
    ranks = torch.where(pos[..., None, :], sums + 0.5, 0.0)
    return SoftRanks(*ranks.unbind(-2))


def rank_slopes(
    scores: Tensor, pos_mask: Tensor, tau: float | Tensor, *, valid_mask: Tensor | None = None,
    group: ProcessGroup | None = None, mates: bool = True,
) -> Tensor:  # fmt: skip
    """How fast the soft rank of every positive falls with its score, in units of 1 / tau.

    Args, Raises: as `soft_ranks`. mates: whether the rank is among positives too.

    Returns:
        [..., M], ``sum_{j != i} sigmoid'((s_j - s_i) / tau)`` at the valid positives i, 0
        elsewhere; a row at the same score adds 1/4. Detached.
    """
    scores = scores.detach()
    valid = torch.ones_like(pos_mask) if valid_mask is None else valid_mask
    scores, pos, valid = torch.broadcast_tensors(scores, pos_mask & valid, valid)
    lists, m = scores.shape[:-1], scores.shape[-1]
    check_tau(tau, lists)
    n = number(lists)
    among = valid if mates else valid & ~pos
    slopes = op.sums_over(group_name(group))(
        scores.reshape(n, m), among.reshape(n, 1, m), pos.reshape(n, 1, m),
        op.flat_tau(tau, scores, lists, "").detach(), "slope", default_rtol(scores.dtype), "auto",
    )[0]  # fmt: skip
    own = torch.where(pos & among, 0.25, 0.0).to(scores.dtype)
    without: Tensor = slopes.reshape(scores.shape) - own
    return without.clamp(min=0.0)


def rank_mean(
    lists: Lists, tau: float | Tensor, phi: Phi, how: How | None = None
) -> tuple[Tensor, Tensor]:
    """Weighted mean over positives of a function of their soft ranks (R, R+).

    Args:
        lists: scores [..., M] float32 or float64 and what goes with them; iid and live are not
            read.
        tau: temperature > 0: a number, a 0-d tensor or one value per list [...].
        phi: the function, such as `PRECISION` for R+ / R.
        how: accuracy, method and processes.

    Returns:
        (mean [...], defined [...] bool). A list counts if it has a positive of weight > 0 and, if
        phi needs one, a negative; otherwise its mean is 0.
    """
    how = how or How()
    scores, pos, valid, weight, *_ = lists
    shape = common_shape(scores.shape, *(x.shape for x in (pos, valid, weight) if x is not None))
    leading = shape[:-1]
    check_tau(tau, leading)
    name = group_name(how.group)

    def flat(x: Tensor | None) -> Tensor | None:
        if x is None or (len(leading) == 1 and x.shape == shape):
            return x
        if len(leading) == 1:
            return x.expand(shape)
        return x.expand(shape).reshape(number(leading), shape[-1]) if leading else x[None]

    pool = Lists(*map(flat, (scores, pos if valid is None else pos & valid, valid, weight)))  # type: ignore[arg-type]
    rtol = default_rtol(scores.dtype) if how.rtol is None else how.rtol
    units = op.flat_tau(tau, scores, leading, name)
    mean, defined = op.mean_of(pool, units, phi.name, rtol, how.method, name)
    if len(leading) == 1:
        return mean, defined
    return mean.reshape(leading), defined.reshape(leading)


def pairs_won(lists: Lists, tau: float | Tensor, how: How | None = None) -> tuple[Tensor, Tensor]:
    """Weighted mean over positives of the negatives below each, softly counted.

    Args, Returns: as `rank_mean`, of ``sum_j sigmoid((s_i - s_j) / tau)`` over the negatives j.
    """
    # Upside down, those below are those that outrank.
    return rank_mean(lists._replace(scores=-lists.scores), tau, OUTRANKED, how)


def softplus_sums(
    scores: Tensor, sources: Tensor, at: Tensor, tau: float | Tensor, how: How | None = None
) -> Tensor:
    """``out[i] = sum_j softplus((s_j - s_i) / tau)`` over the sources j, 0 off the targets.

    Differentiable in scores and tau, twice; the derivative by scores is made of `sigmoid_sums`.

    Args:
        scores: [..., M] float32 or float64; rows that neither give nor take must be finite.
        sources: [..., M] bool, rows that give.
        at: [..., M] bool, rows that take.
        tau: temperature > 0: a number, a 0-d tensor or one value per list [...].
        how: accuracy, method and processes.

    Returns:
        [..., M] in the dtype of scores, NaN at the targets of lists as in `sigmoid_sums`. Within
        about ``rtol * (1 + out)``, and the rounding of ``s / tau`` to float64.
    """
    how = how or How()
    scores, sources, at = torch.broadcast_tensors(scores, sources, at)
    leading, m = scores.shape[:-1], scores.shape[-1]
    check_tau(tau, leading)
    n, name = number(leading), group_name(how.group)
    masks = sources.reshape(n, 1, m), at.reshape(n, 1, m)
    pairs = Pairs(scores.reshape(n, m), *masks, op.flat_tau(tau, scores, leading, name))
    rtol = default_rtol(scores.dtype) if how.rtol is None else how.rtol
    return op.softplus_sums(pairs, rtol, how.method, name).reshape(scores.shape)
