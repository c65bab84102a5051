"""Soft steps above a threshold: what the metrics of one have in common."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .. import _numerics as num
from .._ranks import How, Lists
from ..distributed import group_name


class Steps(NamedTuple):
    """Checked lists, ready for steps above a threshold."""

    scores: Tensor  # [..., M] as given
    pos: Tensor  # [..., M] bool, positives that count
    valid: Tensor | None  # [..., M] bool
    weight: Tensor  # [..., M] of the positives
    some: Tensor  # [..., 1] bool, lists that count
    cleaned: Tensor  # [..., M] scores without what must not reach a gradient
    broken: Tensor  # [..., 1] 0, or NaN where a score that counts is not finite
    width: float | Tensor  # tau
    name: str  # of the group

    def with_broken(self, cut: Tensor) -> Tensor:
        """Lists that count and have a cut, and those that are broken, whose steps show it."""
        bad = self.broken.isnan()
        if isinstance(self.width, Tensor):
            bad = bad | self.width.isnan()
        return (cut | bad) & self.some

    def slopes(self, theta: Tensor, cut: Tensor) -> Tensor:
        """[..., M]: of the steps above theta, 0 in lists without a cut; no gradient."""
        above = torch.sigmoid((self.cleaned.detach() - theta.detach()) / self.width)
        return torch.where(cut, above * (1.0 - above), 0.0).detach()

    def mean(self, theta: Tensor, cut: Tensor) -> Tensor:
        """[...]: of the positives' steps above theta in lists with a cut."""
        return num.step_means(
            self.scores, self.cleaned, theta, self.width, self.weight, cut, self.name
        )

    def stats(self, slopes: Tensor) -> dict[str, Tensor]:
        """Diagnostics of the positives' slopes."""
        return num.rank_stats(slopes, self.pos, self.width, self.some, self.name)


def steps_of(lists: Lists, tau: float | Tensor, how: How) -> Steps:
    """What all formulas of steps begin with."""
    scores, pos, valid, given = lists[:4]
    name = group_name(how.group)
    if valid is not None:
        pos = pos & valid
    weight, some = num.positive_weight(pos, given, scores.dtype, name)
    cleaned, broken = num.clean_lists(scores, valid, some, name)
    width = num.lift_tau(tau, scores, name)
    return Steps(scores, pos, valid, weight, some, cleaned, broken, width, name)
