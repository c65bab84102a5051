"""From a pool to a loss: the metric of every class, its reduction, and the queue's next state."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from . import _numerics as num
from . import _ranks
from ._checks import (
    MAX_WEIGHT,
    REDUCTIONS,
    TEMPERATURE_UNITS,
    check_choice,
    check_int,
    check_list_shape,
    check_tau,
)
from ._groups import every_list
from ._metrics import _record
from ._metrics.partial_auc import PARTIAL_AUC
from ._metrics.recall import RECALL
from ._pool import Batch, Pool, make_pool, take_rows, valid_rows
from ._queue import QueueState, enqueue
from ._smooth_ap import smooth_ap_and_counts, smooth_ap_saturation
from .distributed import all_reduce, group_name

if TYPE_CHECKING:
    from .distributed import ProcessGroup


class Options(NamedTuple):
    """What all losses take beside the arguments of their metric."""

    stats: bool = False  # report diagnostics
    query_shape: tuple[int, int] | None = None  # (queries, longest query), for compiled code
    tau_unit: str = "score"  # "spread": tau multiplies `score_spread` of the pool
    group: ProcessGroup | None = None  # processes that hold the pool together


PLAIN = Options()


class ClassLosses(NamedTuple):
    """The losses of all classes, before reduction."""

    per_class: Tensor  # [C] floating, NaN where the class does not count
    counts: Tensor  # [C] bool
    some_valid: Tensor  # [] bool, False when the pool holds padding alone
    degenerate: Tensor | None  # [C] bool, classes left out for scores that do not spread
    stats: dict[str, Tensor]  # [C] each; empty unless asked for


class Found(NamedTuple):
    """A metric over lists."""

    value: Tensor  # [...] floating
    counts: Tensor  # [...] bool
    degenerate: Tensor | None  # [...] bool
    stats: dict[str, Tensor]  # [...] each


class Lists(NamedTuple):
    """Arguments of a metric: everything in the shape of the scores, and the temperature."""

    scores: Tensor  # [C, M], or [C, Q, L] with query_ids
    pos_mask: Tensor
    tau: float | Tensor  # a number, [] or one per list
    valid_mask: Tensor
    sample_weight: Tensor | None
    iid_mask: Tensor | None
    live_mask: Tensor | None


Metric = Callable[[Lists], Found]


def check_options(options: Options, *, unit_name: str = "tau_unit") -> None:
    """Raise unless the options are in range."""
    check_list_shape("query_shape", options.query_shape)
    check_choice(unit_name, options.tau_unit, TEMPERATURE_UNITS)


def reduce_classes(losses: ClassLosses, reduction: str) -> Tensor:
    """'mean' or 'sum' over the classes that count (exact 0 if none does), or 'none' [C].

    'none' keeps NaN for classes that do not count, but gives zeros for a pool of padding alone.
    """
    check_choice("reduction", reduction, REDUCTIONS)
    per_class, counts = losses.per_class, losses.counts
    if reduction == "none":
        return torch.where(losses.some_valid, per_class, 0.0)
    if counts.numel() == 1:
        return torch.where(counts, per_class, 0.0).reshape(())
    total = torch.where(counts, per_class, 0.0).sum()
    return total / counts.sum().clamp(min=1) if reduction == "mean" else total


def smooth_ap_classes(pool: Pool, tau: float | Tensor, options: Options = PLAIN) -> ClassLosses:
    """1 - smooth_ap of every class of the pool."""

    def metric(x: Lists) -> Found:
        value, counts = smooth_ap_and_counts(
            x.scores, x.pos_mask, x.tau, x.valid_mask, x.sample_weight, group=options.group
        )
        if not options.stats:
            return Found(value, counts, None, {})
        share = smooth_ap_saturation(
            x.scores, x.pos_mask, x.tau, valid_mask=x.valid_mask, group=options.group
        )
        return Found(value, counts, None, _rank_stats(x, share, counts, options))

    return _every_class(metric, pool, tau, options)


def recall_classes(
    pool: Pool,
    tau: float | Tensor,
    options: Options = PLAIN,
    *,
    quantile: float = 0.005,
    interpolation: str = "higher",
) -> ClassLosses:
    """1 - recall_at_quantile of every class of the pool."""
    settings = {"quantile": quantile, "interpolation": interpolation}
    return _every_class(_metric(RECALL, settings, options), pool, tau, options)


def partial_auc_classes(
    pool: Pool,
    tau: float | Tensor,
    options: Options = PLAIN,
    *,
    settings: _record.Settings,
) -> ClassLosses:
    """1 - partial_auc of every class of the pool."""
    return _every_class(_metric(PARTIAL_AUC, settings, options), pool, tau, options)


def _metric(record: _record.Metric, settings: _record.Settings, options: Options) -> Metric:
    if record.check is not None:
        record.check(settings)
    evaluate = num.full_precision(record.evaluate)

    def metric(x: Lists) -> Found:
        lists = _ranks.Lists(
            x.scores, x.pos_mask, x.valid_mask, x.sample_weight, x.iid_mask, x.live_mask
        )
        how = _ranks.How(group=options.group)
        found = evaluate(lists, x.tau, settings, how, stats=options.stats)
        return Found(found.value, found.defined, found.degenerate, found.stats)

    return metric


def _rank_stats(
    x: Lists, saturation: Tensor, counts: Tensor, options: Options
) -> dict[str, Tensor]:
    tau = torch.as_tensor(x.tau, dtype=saturation.dtype, device=saturation.device)
    floats = {"saturation": saturation, "tau_eff": tau.detach().expand(saturation.shape)}
    stats = {name: torch.where(counts, v, torch.nan) for name, v in floats.items()}
    found = (x.pos_mask & x.valid_mask).sum(-1)
    return {**stats, "pos_count": all_reduce(found, "sum", group_name(options.group))}


def _every_class(metric: Metric, pool: Pool, tau: float | Tensor, options: Options) -> ClassLosses:
    """The metric of every class; with query_ids its mean over the queries that count."""
    check_tau(tau, pool.scores.shape[:-1])
    name = group_name(options.group)
    if name and pool.query_ids is not None:
        raise ValueError("query_ids need the whole pool on every process: distributed='gather'")
    if options.tau_unit == "spread":
        spread = num.spread_over_group(pool.scores, pool.valid_mask, name)
        tau = tau * torch.where(spread.isfinite(), spread, 1.0)  # the metric reports what is not
    if pool.query_ids is None or not pool.query_ids.numel():
        found = metric(_lists(pool, tau))
    else:
        lists = every_list(pool.query_ids, pool.valid_mask, options.query_shape)
        parts = [
            metric(_lists(take_rows(pool, x.rows)._replace(valid_mask=x.valid_mask), tau))
            for x in lists
        ]
        found = _mean_over_lists(parts)
        if options.query_shape is not None:  # rows without a place must not pass unnoticed
            fits = lists[0].fits
            found = found._replace(
                value=torch.where(fits, found.value, torch.nan), counts=found.counts | ~fits
            )
    # The value of a class that does not count is 0 with zero gradient: a graph, not a NaN.
    return ClassLosses(
        torch.where(found.counts, 1.0 - found.value, torch.nan),
        found.counts,
        all_reduce(pool.valid_mask.any(), "max", name),
        found.degenerate,
        found.stats,
    )


def _lists(pool: Pool, tau: float | Tensor) -> Lists:
    shape = pool.scores.shape
    if isinstance(tau, Tensor) and tau.dim():  # one per class
        tau = tau.reshape(-1, *[1] * (len(shape) - 2))
    masks = (
        None if x is None else x.expand(shape)
        for x in (pool.valid_mask, pool.sample_weight, pool.iid_mask, pool.live_mask)
    )
    return Lists(pool.scores, pool.pos_mask, tau, *masks)  # type: ignore[arg-type]


def _mean_over_lists(parts: list[Found]) -> Found:
    """[C] from parts of [C, Q]: means over the lists that count, sums of what is counted."""
    counts = torch.cat([p.counts for p in parts], -1)
    number = counts.sum(-1)

    def mean(x: list[Tensor]) -> Tensor:
        return torch.where(counts, torch.cat(x, -1), 0.0).sum(-1) / number.clamp(min=1)

    stats = {}
    for name, first in parts[0].stats.items():
        each = [p.stats[name] for p in parts]
        if first.is_floating_point():
            stats[name] = torch.where(number > 0, mean(each), torch.nan)
        else:
            stats[name] = torch.cat(each, -1).sum(-1)
    flags = [p.degenerate for p in parts if p.degenerate is not None]
    degenerate = torch.cat(flags, -1).any(-1) & (number == 0) if flags else None
    return Found(mean([p.value for p in parts]), number > 0, degenerate, stats)


def step(
    classes: Callable[[Pool], ClassLosses],
    batch: Batch,
    queue: QueueState | None,
    *,
    ignore_index: int,
    store: bool = True,
    group: ProcessGroup | None = None,
) -> tuple[ClassLosses, QueueState | None]:
    """Losses of the pool, then the queue with the live rows stored.

    A batch with a non-finite number in a row that counts is not stored: its loss is NaN, and the
    next one does not hear of it. (Where the number only is too large for the dtype of the queue,
    or lies in a class that does not count, the loss is that of the rest.)
    """
    check_int("ignore_index", ignore_index)
    losses = classes(make_pool(batch, queue, ignore_index=ignore_index))
    if queue is None or not store:
        return losses, queue
    sound = is_sound(batch, queue.logits.dtype, ignore_index=ignore_index)
    sound = all_reduce(sound, "min", group_name(group))
    new_queue = enqueue(
        queue, batch.logits, batch.targets, sample_weight=batch.sample_weight,
        iid_mask=batch.iid_mask, query_ids=batch.query_ids, where=losses.some_valid & sound,
    )  # fmt: skip
    return losses, new_queue


def is_sound(batch: Batch, dtype: torch.dtype, *, ignore_index: int) -> Tensor:
    """[] bool: the numbers of all rows that count are finite in the dtype they are stored in."""
    sound = batch.logits.detach().to(dtype).isfinite().all(-1)
    if batch.sample_weight is not None:
        sound = sound & (batch.sample_weight.detach().abs() < MAX_WEIGHT)
    return (sound | ~valid_rows(batch.targets, ignore_index)).all()
