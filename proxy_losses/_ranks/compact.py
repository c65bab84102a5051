"""Leaves out rows that neither give nor take, as when a few positives meet a narrow band."""

from __future__ import annotations

import torch
from torch import Tensor

WORTH = 0.25  # share of rows kept below which copying them pays


def busy_rows(weights: Tensor, at: Tensor) -> Tensor | None:
    """[L, K] row numbers that hold all sources and targets of each list, or None if many do."""
    busy = (weights != 0).any(1) | at.any(1)
    count = int(busy.sum(1).max())
    if count > WORTH * busy.shape[1]:
        return None
    # Busy rows first; lists with fewer are filled up with idle ones, which add nothing.
    return busy.to(torch.uint8).topk(max(count, 1), dim=1).indices


def take(x: Tensor, rows: Tensor) -> Tensor:
    """Take x [L, M] or [L, G, M] at these rows."""
    index = rows if x.dim() == 2 else rows[:, None].expand(-1, x.shape[1], -1)
    return x.gather(-1, index)


def put(x: Tensor, rows: Tensor, length: int) -> Tensor:
    """Put x [L, G, K] back on an axis of this length, 0 elsewhere."""
    return x.new_zeros(*x.shape[:2], length).scatter_(-1, rows[:, None].expand_as(x), x)
