"""One look at the lists: all that a plan needs of the data, in one pass and one read.

Several processes that share the lists look together: one reduction, after which all of them know
the same numbers. A single process is the group of one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..distributed import rank_and_size, reduce_now
from .plan import AGREED


class Census(NamedTuple):
    """Numbers on the host; the lists of numbers have an entry per list."""

    low: list[float]  # smallest score; 0 where broken
    high: list[float]
    middle: list[float]  # a typical score: cells are measured from here, so outliers cost no digits
    tau: list[float]  # 1 where broken
    broken: list[bool]  # a non-finite score, or a tau that is not > 0: the list is NaN
    counts: list[list[int]]  # of each mask asked for; of the process that has most
    rows: tuple[int, ...]  # rows per list of each process

    @property
    def spans(self) -> list[float]:
        """Range of every list in units of tau; infinite where it overflows."""
        each = zip(self.low, self.high, self.tau, strict=True)
        return [
            (high - low) / tau if high - low < math.inf else math.inf for low, high, tau in each
        ]

    def broken_lists(self, device: torch.device) -> Tensor | None:
        """[L] bool, or None if there are none."""
        return torch.tensor(self.broken, device=device) if any(self.broken) else None


def look(
    scores: Tensor, tau: Tensor, counts: Sequence[Tensor], group: str = "", *, typical: bool = True
) -> Census:
    """Range, typical score, tau and counts of every list.

    Args:
        scores: [L, M].
        tau: [L] float64.
        counts: [L] integers each, of whatever the plan asks for.
        group: name of the processes that share the lists.
        typical: whether a typical score is asked for; else it is the smallest.
    """
    lists, rows = scores.shape
    if not rows:
        low = scores.new_full((lists,), torch.inf, dtype=torch.float64)
        high, middle = -low, low
    elif lists == 1:  # much faster than along a dimension
        low, high = torch.aminmax(scores)
        middle = scores[0, :: max(1, rows // 8)].median() if typical else low
    else:
        low, high = scores.amin(1), scores.amax(1)
        middle = scores[:, :: max(1, rows // 8)].median(dim=1).values if typical else low
    if group:
        scale = [x.double().view(-1) for x in (low, high, middle)]
        return _agree(scale, tau, counts, rows, group)
    # Joined by dtype first: numbers of several are copied one by one.
    span, sizes = torch.stack((low, high, middle)), torch.cat([n.view(-1) for n in counts])
    columns = torch.cat([span.double().view(-1), tau, sizes.double()]).view(-1, lists).tolist()
    lows, highs, middles, taus = columns[:4]
    broken = [
        not (a > -math.inf and b < math.inf and t > 0.0)
        for a, b, t in zip(lows, highs, taus, strict=True)
    ]
    if any(broken):
        lows, highs, middles = (
            [0.0 if bad else x for x, bad in zip(column, broken, strict=True)]
            for column in (lows, highs, middles)
        )
        taus = [1.0 if bad else t for t, bad in zip(taus, broken, strict=True)]
    found = [[int(n) for n in column] for column in columns[4:]]
    return Census(lows, highs, middles, taus, broken, found, (rows,))


def _agree(
    scale: Sequence[Tensor], tau: Tensor, counts: Sequence[Tensor], rows: int, group: str
) -> Census:
    """`look` of all processes: everything travels so that the smallest number wins."""
    low, high, middle = scale
    lists = low.shape[0]
    sound = tau > 0.0
    if rows:
        sound = sound & (low > -torch.inf) & (high < torch.inf)
    # No NaN may travel: what the smaller of it and a number is depends on the backend.
    columns = [torch.where(sound, x, 0.0) for x in (low, -high, middle)]
    unit = torch.where(tau > 0.0, tau, 1.0)
    columns += [unit, -unit, sound.double(), *(-n.double() for n in counts)]
    rank, world = rank_and_size(group)
    own = [0.0] * world
    own[rank] = -float(rows)
    table = reduce_now(torch.cat([*columns, torch.tensor(own).to(low)]), "min", group).tolist()
    found = [table[k * lists : (k + 1) * lists] for k in range(len(columns))]
    lows, highs, middles, taus, negative, sounds = found[:AGREED]
    if any(a != -b for a, b in zip(taus, negative, strict=True)):
        raise ValueError("tau differs between the processes of the group")
    return Census(
        lows, [-x for x in highs], middles, taus, [not s for s in sounds],
        [[-int(n) for n in column] for column in found[AGREED:]],
        tuple(-int(n) for n in table[len(columns) * lists :]),
    )  # fmt: skip
