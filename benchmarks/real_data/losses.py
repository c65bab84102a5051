"""The losses, each for a whole stack of networks.

Logits [seeds, configurations, rows] go in, one loss per network comes out. What a loss remembers
it remembers for every network apart.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import proxy_losses as pl

from ..trainer import Batch, Loss, Make, Queued, Setup, each

QUEUE = 2048  # rows, ours and the peer's
MIX_TAU = 0.25


def _bce(logits: Tensor, y: Tensor, pos_weight: Tensor | None = None) -> Tensor:
    """[seeds, configurations, rows]."""
    target = y[:, None].expand(logits.shape).to(logits.dtype)
    return F.binary_cross_entropy_with_logits(
        logits, target, pos_weight=pos_weight, reduction="none"
    )


def tau_of(setup: Setup, values: Tensor | None = None) -> Tensor:
    """[seeds, configurations]: the values in units of the spread at the start, frozen."""
    spread = pl.score_spread(setup.before())
    return spread[:, None] * (torch.tensor(setup.values) if values is None else values)


def bce(setup: Setup) -> Loss:
    return lambda logits, batch: _bce(logits, batch.y).mean(-1)


def scaled_bce(scale: Tensor) -> Make:
    """Of scores times a scale [seeds]; the values, if any, are weights of the positives."""

    def make(setup: Setup) -> Loss:
        weight = torch.tensor(setup.values)[:, None].to(scale.dtype) if setup.values else None

        def loss(logits: Tensor, batch: Batch) -> Tensor:
            return _bce(logits * scale[:, None, None], batch.y, weight).mean(-1)

        return loss

    return make


def weighted_bce(setup: Setup) -> Loss:
    """Positives weigh (negatives / positives) ** value."""
    positives = setup.y.sum(-1, keepdim=True)
    odds = (setup.y.shape[-1] - positives) / positives
    weight = odds ** torch.tensor(setup.values)  # [seeds, configurations]

    def loss(logits: Tensor, batch: Batch) -> Tensor:
        weights = torch.where(batch.y[:, None], weight[..., None], 1.0)
        return (weights * _bce(logits, batch.y)).mean(-1)

    return loss


def focal(setup: Setup) -> Loss:
    """The value is gamma; alpha is the default."""

    def loss(logits: Tensor, batch: Batch) -> Tensor:
        y = batch.y.to(logits.dtype)
        each = (
            pl.sigmoid_focal(logits[:, k], y, gamma=gamma, reduction="none").mean(-1)
            for k, gamma in enumerate(setup.values)
        )
        return torch.stack([*each], 1)

    return loss


def hard_negatives(setup: Setup) -> Loss:
    """BCE of the positives and of the value's share of the negatives, those of highest score."""

    def loss(logits: Tensor, batch: Batch) -> Tensor:
        each = []
        for k, share in enumerate(setup.values):
            row = logits[:, k]
            kept = round(share * row.shape[-1])
            hidden = row.detach().masked_fill(batch.y, -torch.inf)
            keep = batch.y.scatter(-1, hidden.topk(kept).indices, True)
            each.append((_bce(row[:, None], batch.y)[:, 0] * keep).sum(-1) / keep.sum(-1))
        return torch.stack(each, 1)

    return loss


def _queued(fn: Callable[..., Any], tau: Tensor) -> Loss:
    """A loss of ours over the batch and a queue of every network."""
    ranking = Queued(fn, QUEUE, tau.numel(), tau.dtype)

    def loss(logits: Tensor, batch: Batch) -> Tensor:
        y = batch.y[:, None].expand(logits.shape).flatten(0, 1)
        return ranking(logits.flatten(0, 1), y, tau.flatten()).view(tau.shape)

    return loss


def queue_ap(setup: Setup) -> Loss:
    return _queued(pl.smooth_ap_loss, tau_of(setup))


def mixed_ap(setup: Setup) -> Loss:
    """For good: the value's share of `queue_ap`, the rest BCE."""
    values = torch.tensor(setup.values)
    tau = tau_of(setup, torch.full_like(values, MIX_TAU))
    ranking = _queued(pl.smooth_ap_loss, tau)

    def loss(logits: Tensor, batch: Batch) -> Tensor:
        return values * ranking(logits, batch) + (1 - values) * _bce(logits, batch.y).mean(-1)

    return loss


def _whole(setup: Setup, metric: Callable[..., Tensor], tau: Tensor) -> Loss:
    """1 - metric over the last score of every training row, those of the batch live."""
    lists = setup.before()[:, None].expand(*tau.shape, -1)
    y = setup.y[:, None].expand(lists.shape)

    def loss(logits: Tensor, batch: Batch) -> Tensor:
        nonlocal lists
        live = lists.scatter(-1, batch.rows[:, None].expand(logits.shape), logits)
        lists = live.detach()
        return 1 - metric(live, y, tau)

    return loss


def whole_ap(setup: Setup) -> Loss:
    return _whole(setup, pl.smooth_ap, tau_of(setup))


def _recall(threshold_grad: str, setup: Setup) -> Loss:
    metric = partial(pl.recall_at_quantile, threshold_grad=threshold_grad)
    return _whole(setup, metric, tau_of(setup))


def _pauc(threshold_grad: str, setup: Setup) -> Loss:
    """The value is in units of the interquartile range already."""
    tau = torch.tensor(setup.values).expand(len(setup.y), -1)
    return _whole(setup, partial(pl.partial_auc, threshold_grad=threshold_grad), tau)


whole_recall, whole_pauc = partial(_recall, "none"), partial(_pauc, "none")
moving_recall, moving_pauc = partial(_recall, "implicit"), partial(_pauc, "implicit")


class _Bce(nn.Module):
    def forward(self, logits: Tensor, targets: Tensor) -> Tensor:
        return F.binary_cross_entropy_with_logits(logits[:, 0], targets.to(logits.dtype))


def _imbalanced_losses(value: tuple[float, float], setup: Setup) -> Callable[..., Tensor]:
    """Its Smooth-AP in its wrapper; the value is its first and last temperature.

    Its warmup is the BCE training before; it blends over an eighth of the steps, and the
    temperature falls over two thirds.
    """
    from imbalanced_losses import LossWarmupWrapper, SmoothAPLoss

    wrapper = LossWarmupWrapper(
        _Bce(), SmoothAPLoss(num_classes=1, queue_size=QUEUE), warmup_steps=0,
        blend_steps=setup.steps // 8, temp_start=value[0], temp_end=value[1],
        temp_decay_steps=max(1, 2 * setup.steps // 3),
    )  # fmt: skip

    def call(logits: Tensor, y: Tensor, rows: Tensor, step: int) -> Tensor:
        wrapper.on_train_batch_start(step)
        out: Tensor = wrapper(logits[:, None], y.long())
        return out

    return call


def _libauc(gamma: float, setup: Setup) -> Callable[..., Tensor]:
    """Its APLoss on probabilities."""
    from libauc.losses import APLoss

    module = APLoss(gamma=gamma, data_len=setup.y.shape[-1], device="cpu")

    def call(logits: Tensor, y: Tensor, rows: Tensor, step: int) -> Tensor:
        out: Tensor = module(logits.float().sigmoid(), y.long(), rows)
        return out

    return call


imbalanced_losses, libauc = each(_imbalanced_losses), each(_libauc)
