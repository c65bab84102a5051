"""What all ranking losses keep: the queue and the temperature, and no mathematics."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from torch import Tensor

from .. import _step
from .._checks import (
    DISTRIBUTED,
    REDUCTIONS,
    as_number,
    check_batch,
    check_choice,
    check_flag,
    check_int,
    check_optional_flag,
    check_row_extras,
    check_temperature,
    warn_user,
)
from .._pool import Batch, Pool, positives, subsample_pool, valid_rows
from .._queue import QueueState
from .._step import ClassLosses, Options
from ..distributed import default_group, group_name
from ._batch import BatchLoss, as_floating
from ._published import PublishedNames
from ._queue import MemoryQueue, never_narrow
from ._saved import number_problems, queue_problems, refuse

LossOutput: TypeAlias = Tensor | tuple[Any, ...]
STRAY = torch.iinfo(torch.int64).max  # a class id that no class has


class RankingLoss(PublishedNames, BatchLoss):
    """What the ranking losses share: pooling, queue, reduction, gather."""

    def __init__(
        self,
        num_classes: int,
        queue_size: int,
        temperature: float,
        reduction: str,
        ignore_index: int,
        update_queue_in_eval: bool,
        gather_distributed: bool | None,
        max_pool_size: int | None,
        query_shape: tuple[int, int] | None,
        distributed: str,
        temperature_unit: str = "score",
    ) -> None:
        super().__init__()
        check_int("num_classes", num_classes, 1)
        check_int("queue_size", queue_size, 0)
        check_int("ignore_index", ignore_index)
        check_choice("reduction", reduction, REDUCTIONS)
        check_flag("update_queue_in_eval", update_queue_in_eval)
        check_optional_flag("gather_distributed", gather_distributed)
        if max_pool_size is not None:
            check_int("max_pool_size", max_pool_size, 1)
        check_choice("distributed", distributed, DISTRIBUTED)
        if distributed == "shard" and max_pool_size is not None:
            raise ValueError("max_pool_size needs distributed='gather', got 'shard'")
        _step.check_options(
            Options(False, query_shape, temperature_unit), unit_name="temperature_unit"
        )
        self.num_classes = num_classes
        self.queue_size = queue_size
        self.reduction = reduction
        self.ignore_index = ignore_index
        self.update_queue_in_eval = update_queue_in_eval
        self.gather_distributed = gather_distributed
        self.max_pool_size = max_pool_size
        self.query_shape = query_shape
        self.distributed = distributed
        self.temperature_unit = temperature_unit
        self._tau: Tensor
        self.register_buffer("_tau", torch.zeros((), dtype=torch.float64))
        self.temperature = temperature
        self._queue = MemoryQueue(queue_size, num_classes, ignore_index) if queue_size else None
        self._subsample_warned = False
        self._want_diag = False  # a published name: whether the last call asked for diagnostics
        if max_pool_size is not None:
            self._draws: Tensor
            self.register_buffer("_draws", torch.zeros((), dtype=torch.int64))

    @property
    def temperature(self) -> float:
        """Temperature in units of the logits; writable, and saved with the queue.

        Compiled code reads it as a tensor. A checkpoint that has none leaves it as it is.
        """
        return self._temperature

    @temperature.setter
    def temperature(self, value: float) -> None:
        value = as_number("temperature", value)
        check_temperature("temperature", value)
        self._temperature = float(value)
        self._tau.fill_(self._temperature)

    def reset_queue(self) -> None:
        """Empty the queue."""
        if self._queue is not None:
            self._queue.reset()

    def forward(
        self,
        logits: Tensor,
        targets: Tensor,
        iid_mask: Tensor | bool | None = None,
        return_per_class: bool = False,
        return_diagnostics: bool = False,
        *,
        sample_weight: Tensor | None = None,
        query_ids: Tensor | None = None,
    ) -> LossOutput:
        """Loss of the batch against itself and the queue; in training, the batch is then stored.

        Args:
            logits: [N, C] floating.
            targets: [N] or [N, 1] class ids; with C > 1 also [N, C] labels, bool or 0/1 floats.
            iid_mask: [N] bool or None for all, stored with the rows; the rows that may set the
                band of `PAUCAtBudgetLoss`, not read by the other losses. A bool here means
                return_per_class, as it did in proxy-losses 0.1.1.
            return_per_class: also return the losses of the classes and which of them count.
            return_diagnostics: also return a dict of [C] tensors, see the class; they leave the
                loss as it is.
            sample_weight: [N] floating >= 0, finite, or None for 1; weighs the mean over
                positives.
            query_ids: [N] integer query ids or None; each query is ranked by itself, see
                `smooth_ap_loss`.

        Returns:
            loss, or a tuple of it and, as asked for, per_class [C] with NaN where invalid and
            valid [C] bool, and the diagnostics.

        Raises:
            TypeError, ValueError: wrong dtypes, shapes or values; nothing is stored then.
        """
        if isinstance(iid_mask, bool):
            return_per_class, iid_mask = iid_mask, None
        sample_weight = as_floating(sample_weight)
        targets = self._as_targets(targets)
        check_batch(logits, targets, self.num_classes)
        local = Batch(logits, targets, sample_weight, iid_mask, query_ids)
        check_row_extras(logits.shape[0], sample_weight, iid_mask, query_ids)
        several = self._gathers()
        group = default_group() if several and self.distributed == "shard" else None
        batch = local if group is not None else Batch(*self._gather(*local))
        if group is not None and self._queue is not None and not torch.compiler.is_compiling():
            self._queue.check_owner(group_name(group))
        if not torch.compiler.is_compiling():
            self._check_values(batch)  # on all rows: every process raises, or none
        store = self.training or self.update_queue_in_eval
        self._want_diag = return_diagnostics
        options = Options(return_diagnostics, self.query_shape, self.temperature_unit, group)
        losses, queue = _step.step(
            lambda pool: self._capped_classes(pool, options),
            batch,
            self._queue.state if self._queue is not None else None,
            ignore_index=self.ignore_index,
            store=store,
            group=group,
        )
        out: list[Any] = [_step.reduce_classes(losses, self.reduction)]
        if return_per_class:
            out += [losses.per_class, losses.counts]
        if return_diagnostics:
            valid = valid_rows(targets, self.ignore_index)
            live = (positives(targets, self.num_classes) & valid).sum(-1)
            out.append({**losses.stats, "grad_pos_count": live})
        if store:  # last: nothing can fail any more
            self._store(queue, batch, losses)
        return out[0] if len(out) == 1 else tuple(out)

    def _store(self, queue: QueueState | None, batch: Batch, losses: ClassLosses) -> None:
        if queue is not None and self._queue is not None:
            self._queue.store(queue)
        if self.max_pool_size is not None and batch.logits.shape[0]:
            dtype = batch.logits.dtype if queue is None else queue.logits.dtype
            sound = _step.is_sound(batch, dtype, ignore_index=self.ignore_index)
            self._draws += (losses.some_valid & sound).to(self._draws.device)

    def _classes(self, pool: Pool, options: Options) -> ClassLosses:
        raise NotImplementedError

    def _capped_classes(self, pool: Pool, options: Options) -> ClassLosses:
        cap = self.max_pool_size
        if cap is not None and pool.valid_mask.numel() > cap:
            rows = int(pool.valid_mask.sum())
            if rows <= cap:
                return self._classes(pool, options)
            if not self._subsample_warned:
                self._subsample_warned = True
                warn_user(
                    f"{type(self).__name__}: the pool of {rows} rows is above max_pool_size="
                    f"{cap} and is subsampled; the soft ranks here need no such cap"
                )
            # A counter instead of a generator: equal on every rank, and resumed with the state.
            pool = subsample_pool(pool, cap, seed=int(self._draws))
        return self._classes(pool, options)

    def _as_targets(self, targets: Tensor) -> Tensor:
        """[N, 1] to [N]; class ids, floats as BCE takes them included, to int64; labels to bool."""
        if not isinstance(targets, Tensor):
            return targets
        if targets.dim() == 2 and targets.shape[1] == 1:
            targets = targets[:, 0]
        if targets.is_complex() or targets.dtype == torch.bool:
            return targets
        floating = targets.is_floating_point()
        if targets.dim() == 1 and floating:
            wide = targets.to(torch.float64)
            ids = wide.to(torch.int64)
            return torch.where(ids == wide, ids, STRAY)  # 0.9 or NaN must not become a class
        if targets.dim() == 2 and floating and self.num_classes > 1:
            return targets.to(torch.float32) > 0.5
        return targets.to(torch.int64) if targets.dim() == 1 else targets

    def _check_values(self, batch: Batch) -> None:
        if self.num_classes == 1:
            self._warn_binary(batch.targets)
        self._check_weight(batch.sample_weight)

    def _warn_binary(self, targets: Tensor) -> None:
        if targets.dtype == torch.bool or not targets.numel():
            return
        low, high = targets.aminmax()
        if low >= 0 and high <= 1:
            return
        stray = (targets != 0) & (targets != 1) & (targets != self.ignore_index)
        if stray.any():
            warn_user(
                f"{type(self).__name__} with num_classes=1 expects targets in {{0, 1}}; "
                f"{int(stray.sum())} other values count as positive"
            )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> RankingLoss:
        # The queue guards its own buffers; the wide temperature is guarded here.
        super()._apply(never_narrow(fn), recurse)  # type: ignore[no-untyped-call]
        return self

    def problems_with(self, state_dict: dict[str, Any], prefix: str) -> list[str]:
        """What keeps a checkpoint from being loaded; gives its queue the present names."""
        for key in [k for k in state_dict if k.startswith(prefix + "_q_")]:  # proxy-losses 0.1.1
            state_dict[prefix + "_queue." + key[len(prefix) :]] = state_dict.pop(key)
        problems = number_problems(state_dict, prefix + "_tau", check_temperature)
        if self.max_pool_size is not None:
            problems += number_problems(state_dict, prefix + "_draws", check_int)
        if self._queue is not None:
            problems += queue_problems(self._queue.state, state_dict, prefix + "_queue.")
        return problems

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        """Accept checkpoints without a temperature, and a changed max_pool_size."""
        refuse(self, self.problems_with(state_dict, prefix))
        if self.max_pool_size is None:
            state_dict.pop(prefix + "_draws", None)
        else:
            state_dict.setdefault(prefix + "_draws", self._draws)
        tau = state_dict.setdefault(prefix + "_tau", self._tau)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        if not tau.is_meta:
            self._temperature = float(tau)
