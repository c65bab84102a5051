"""Soft steps above a threshold: what the metrics of one have in common."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _numerics as num
from .._ranks import How, Lists
from .._ranks import steps as kernels
from ..distributed import group_name


class Steps:
    """Checked lists, for steps above thresholds.

    Attributes:
        lists: as given, but for positives that do not count.
        name: of the group.
        fused: whether the means are left to a kernel. If not, there are also
        weight: [..., M] of the positives
        some: [..., 1] bool, lists that count
        cleaned: [..., M] scores without what must not reach a gradient
        broken: [..., 1] 0, or NaN where a score that counts is not finite
        width: tau, NaN unless it is > 0
    """

    def __init__(
        self, lists: Lists, tau: float | Tensor, how: How, *, fused: bool | None = None
    ) -> None:
        self.name = group_name(how.group)
        if lists.valid is not None:
            lists = lists._replace(pos=lists.pos & lists.valid)
        self.lists, self.tau, self.how = lists, tau, how
        self.fused = kernels.served(lists, tau, self.name) if fused is None else fused
        if not self.fused:
            scores, pos, valid, given = lists[:4]
            self.weight, self.some = num.positive_weight(pos, given, scores.dtype, self.name)
            self.cleaned, self.broken = num.clean_lists(scores, valid, self.some, self.name)
            self.width = num.lift_tau(tau, scores, self.name)

    def plain(self) -> Steps:
        """The same for torch."""
        return Steps(self.lists, self.tau, self.how, fused=False) if self.fused else self

    def shown(self, cut: Tensor | None) -> Tensor:
        """[..., 1]: lists that count and have a cut, and those that are broken, which show it."""
        if cut is None:
            return self.some
        bad = self.broken.isnan()
        if isinstance(self.width, Tensor):
            bad = bad | self.width.isnan()
        return (cut | bad) & self.some

    def slopes(self, theta: Tensor, cut: Tensor | None = None) -> Tensor:
        """[..., M]: of the steps above theta, 0 in lists without a cut; no gradient."""
        away = self.cleaned.detach() - (theta.detach() + self.broken)
        above = torch.sigmoid(away / self.width)
        return torch.where(self.shown(cut), above * (1.0 - above), 0.0).detach()

    def mean(
        self, theta: Tensor, moves: str, cut: Tensor | None = None, precision: float = 0.0
    ) -> tuple[Tensor, Tensor]:
        """Mean of the positives' steps above a threshold.

        Args:
            theta: [..., 1] without gradient.
            moves: what gradient it gets: "" for none, "quantile" or "precision".
            cut: [..., 1] bool, lists that have a threshold; in others all rows are in, and the
                mean is 1. None for all.
            precision: that of moves "precision".

        Returns:
            ([...], 0 in lists that do not count; [...] bool, lists that count).
        """
        lists, name = self.lists, self.name
        if self.fused:
            at, how = None, self.how
            if moves == "precision":
                at = torch.full((), precision, dtype=torch.float64, device=theta.device)

            def again(
                lists: Lists, tau: float | Tensor, theta: Tensor, cut: Tensor | None
            ) -> Tensor:
                return Steps(lists, tau, how, fused=False).mean(theta, moves, cut, precision)[0]

            found = kernels.mean_above(
                lists, self.tau, theta, again, cut=cut, precision=at, moves=moves
            )
            return found[0], found[1]
        shown, pos, valid = self.shown(cut), lists.pos, lists.valid
        given = self.cleaned, valid, self.width, shown, name
        if moves == "quantile":
            theta = num.with_implicit_grad(theta, *given)
        elif moves == "precision":
            theta = num.with_precision_grad(theta, given[0], pos, valid, precision, *given[2:])
        mean = num.step_means(
            self.cleaned, theta + self.broken, self.width, self.weight, shown, name
        )
        if cut is not None:
            mean = torch.where((self.some & ~shown)[..., 0], 1.0, mean)
        return mean, self.some[..., 0]

    def stats(self, slopes: Tensor) -> dict[str, Tensor]:
        """Diagnostics of the positives' slopes."""
        return num.rank_stats(slopes, self.lists.pos, self.width, self.some, self.name)
