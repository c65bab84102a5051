"""The ranking losses: what all of them keep, the queue and the temperature, and one class each."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, TypeAlias

import torch
from torch import Tensor

from .. import _lists, _losses
from .. import _metrics as records
from .. import _numerics as num
from .._checks import (
    DISTRIBUTED,
    REDUCTIONS,
    TEMPERATURE_UNITS,
    as_list_shape,
    check_batch,
    check_choice,
    check_flag,
    check_int,
    check_row_extras,
    check_temperature,
    warn_user,
)
from .._lists import NOTHING, Batch, Known, Pool
from .._losses import REQUIRED, Arguments, Options
from .._metrics._record import (
    Found,
    Metric,
    Option,
    Settings,
    check_settings,
    reads_gains,
    reads_of,
)
from .._numerics import lift
from .._old_names import takes_old_names
from ..distributed import ProcessGroup, default_group, group_name
from . import _late
from ._batch import ScheduledLoss, as_flags, as_floating, check_class_ids, judge_class_ids, readable
from ._published import PublishedNames
from ._queue import (
    ONES,
    MemoryQueue,
    check_kind,
    number_problems,
    queue_problems,
    refuse,
)
from ._ring import keeps
from ._seal import AVERAGED
from ._state import guard

LossOutput: TypeAlias = Tensor | tuple[Any, ...]
STRAY = torch.iinfo(torch.int64).max  # a class id that no class has


class RankingLoss(PublishedNames, ScheduledLoss):
    """What the ranking losses share: pooling, queue, reduction, gather.

    ``class MyLoss(RankingLoss, metric=MY_METRIC)`` makes a loss from the record of a metric:
    constructor, signature and docstring.
    """

    _metric: ClassVar[Metric]

    def __init_subclass__(cls, metric: Metric | None = None, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if metric is not None:
            cls._metric = metric
            cls.__doc__ = _document(metric)
            cls.__init__ = _constructor(metric)  # type: ignore[method-assign]

    def __init__(self, *args: Any, **given: Any) -> None:
        super().__init__()
        if args or not hasattr(self, "_metric"):
            raise TypeError(f"{type(self).__name__} needs a metric: derive it from a loss")
        metric = self._metric
        settings = {o.name: given[o.attribute] for o in metric.options}
        check_settings(metric, settings, published=True)
        check_int("num_classes", given["num_classes"], 1)
        check_int("queue_size", given["queue_size"], 0)
        check_int("ignore_index", given["ignore_index"])
        check_choice("reduction", given["reduction"], REDUCTIONS)
        check_flag("update_queue_in_eval", given["update_queue_in_eval"])
        check_flag("gather_distributed", given["gather_distributed"], optional=True)
        if given["max_pool_size"] is not None:
            check_int("max_pool_size", given["max_pool_size"], 1)
        check_choice("distributed", given["distributed"], DISTRIBUTED)
        check_flag("multi_label", given["multi_label"], optional=True)
        if given["multi_label"] is not None:
            given["multi_label"] = bool(given["multi_label"])
        if given["multi_label"] and given["num_classes"] == 1:
            raise ValueError("multi_label=True needs num_classes > 1: one class has class ids 0, 1")
        if given["distributed"] == "shard" and given["max_pool_size"] is not None:
            raise ValueError("max_pool_size needs distributed='gather', got 'shard'")
        given = {"temperature_unit": "score", **given}
        given["query_shape"] = as_list_shape("query_shape", given["query_shape"])
        check_choice("temperature_unit", given["temperature_unit"], TEMPERATURE_UNITS)
        for o in metric.options:  # a plain number, whatever kind was given
            if isinstance(o.default, float):
                given[o.attribute] = float(given[o.attribute])
        self.num_classes: int
        self.queue_size: int
        self.reduction: str
        self.ignore_index: int
        self.update_queue_in_eval: bool
        self.gather_distributed: bool | None
        self.max_pool_size: int | None
        self.query_shape: tuple[int, int] | None
        self.distributed: str
        self.temperature_unit: str
        self.multi_label: bool | None
        self.add_temperature(given["temperature"])
        for name, value in given.items():
            setattr(self, name, value)
        size, kind = self.queue_size, (self.num_classes, self.ignore_index, self.multi_label)
        self._graded = reads_gains(metric)  # targets are relevance grades
        self._queue = MemoryQueue(size, *kind, gains=self._graded) if size else None
        self._subsample_warned = self._degenerate_warned = False
        self._want_diag = False  # a published name: whether the last call asked for diagnostics
        if self.max_pool_size is not None:
            self._draws: Tensor
            self.add_state("_draws", (), torch.int64)
        self.fill()

    def fill(self) -> None:
        """The temperature of the constructor, and no draw yet."""
        super().fill()
        if self.max_pool_size is not None:
            self._draws.zero_()

    def _forget_warnings(self) -> None:
        super()._forget_warnings()
        self._subsample_warned = self._degenerate_warned = self._unstored_warned = False

    @takes_old_names
    def forward(
        self, logits: Tensor, targets: Tensor, iid_mask: Tensor | bool | None = None,
        return_per_class: bool = False, return_diagnostics: bool = False, *,
        sample_weight: Tensor | None = None, query_ids: Tensor | None = None,
        label_mask: Tensor | None = None, store: bool = True,
    ) -> LossOutput:  # fmt: skip
        """Loss of the batch against itself and the queue; in training, the batch is then stored.

        Args:
            logits: [N, C] floating.
            targets: [N] or [N, 1] class ids; with C > 1 also [N, C] labels, bool or 0/1 floats. Of
                `NDCGLoss` relevance grades, [N] or [N, 1] with C = 1, else [N, C].
            iid_mask: [N] bool, or integers 0 and 1, or None for all, stored with the rows; the rows
                that may set the band of `PAUCAtBudgetLoss`, not read by the other losses. A Python
                bool here means return_per_class, as it did in proxy-losses 0.1.1.
            return_per_class: also return the losses of the classes and which of them count.
            return_diagnostics: also return a dict of [C] tensors, see the class; they leave the
                loss as it is.
            sample_weight: [N] floating >= 0, finite, or None for 1; weighs the mean over
                positives. It gets no gradient.
            query_ids: [N] integer query ids or None; each query is ranked by itself, see
                `smooth_ap_loss`.
            label_mask: [N, C] bool, labels that are known, or None for all; with one class [N]
                too. Stored with the rows. Where False, the row is neither positive nor negative
                of that class, and its target and logit may be anything.
            store: False leaves the queue as it is, for all calls on a batch but the last, as in
                SAM and in closures of L-BFGS, and for validation in training mode.

        Returns:
            loss, or a tuple of it and, as asked for, per_class [C] with NaN where invalid and
            valid [C] bool, and the diagnostics.

        Raises:
            TypeError, ValueError: wrong dtypes, shapes or values, such as float labels other than
                0 and 1; nothing is stored then. Values are looked at in eager code; off the CPU a
                fault is raised at a later forward, see `set_debug`.
            RuntimeError: a backward calls this again, as torch.utils.checkpoint does, and rows
                would be stored twice (compiled code does not ask).

        Warns:
            UserWarning: once each, when a batch with a finite loss is not stored because a logit of
                a row that counts is not finite (-inf for a class without positives), and when rows
                are stored in training mode while gradients are disabled.
        """
        if isinstance(iid_mask, bool):
            return_per_class, iid_mask = iid_mask, None
        gains = None
        if self._graded:
            targets, gains = _lists.from_grades(logits, _narrow(targets), self.ignore_index)
        given, targets = targets, self._as_targets(targets)
        check_batch(logits, targets, self.num_classes)
        check_kind(self.multi_label, targets)
        check_flag("store", store)
        if self.num_classes == 1 and isinstance(label_mask, Tensor) and label_mask.dim() == 1:
            label_mask = label_mask[:, None]
        extras = as_floating(sample_weight), as_flags(iid_mask), query_ids, label_mask, gains
        check_row_extras(logits.shape, *extras)
        if gains is not None and label_mask is not None:  # what is unknown may be anything
            extras = *extras[:4], torch.where(label_mask, gains, 1.0)
        self._begin(logits)
        targets, floats = self._true_targets(targets, given, label_mask)
        local = Batch(logits, targets, *extras, floats)
        stores = store and (self.training or self.update_queue_in_eval)
        if stores and (self._queue is not None or self.max_pool_size is not None):
            self._refuse_recompute()
        group, batch = self._all_rows(local)
        if batch.sample_weight is not None:
            batch = batch._replace(sample_weight=batch.sample_weight.detach())
        queue, settings = self._queue, self._settings()
        state, known, reads = None, NOTHING, reads_of(self._metric, settings)
        if queue is not None:
            state = queue.view(targets)
            # Processes that share a pool must ask alike, whatever rows each has.
            ones = queue.ones() if group is None else ()
            known = Known(queue.ignore_index == self.ignore_index, ones)
        pool = _lists.join(batch, state, self.ignore_index, reads, known)
        # Setting attributes of a module takes time; reading this one would guard compiled code.
        if torch.compiler.is_compiling() or self._want_diag != return_diagnostics:
            self._want_diag = return_diagnostics
        options = Options(return_diagnostics, self.query_shape, self.temperature_unit, group)
        drawn, rows = self._capped(pool)
        found = _losses.over_classes(self._metric, drawn, self._tau, settings, options)
        if queue is not None and (sound := queue.doubts()) is not None:
            found = found._replace(value=guard(found.value, sound, AVERAGED))
        out: list[Any] = [_losses.reduce_classes(found, self.reduction, pool, group_name(group))]
        if return_per_class:
            out += [_losses.per_class(found), found.defined]
        if return_diagnostics:
            valid = _lists.valid_rows(targets, self.ignore_index)
            live = _lists.positives(targets, self.num_classes)
            live = live if label_mask is None else live & label_mask.T
            count = (live if valid is None else live & valid).sum(-1)
            out.append({**found.stats, "grad_pos_count": count})
        keep = self._look(batch, pool, found, known, group, stores=stores)
        self._warn_capped(rows)
        if stores:  # last: nothing can fail any more
            if keep is not False and not self.update_queue_in_eval:
                self._warn_no_grad(batch.logits.shape[0])
            self._store(batch, pool, group, keep)
            if keep is False and self._queue is not None and not self._unstored_warned:
                sound = self._is_sound(batch)
                if self._unstored(sound, found):
                    self._warn_unstored(self._queue.dtype)
        return out[0] if len(out) == 1 else tuple(out)

    def _all_rows(self, local: Batch) -> tuple[ProcessGroup | None, Batch]:
        """The group that holds the pool together, if any, and the rows of this process's pool."""
        if not self._gathers():
            return None, local
        if self.distributed != "shard":
            return None, Batch(*self._gather(*local))
        group = default_group()
        if self._queue is not None and not torch.compiler.is_compiling():
            self._queue.check_owner(group_name(group))
        return group, local

    def _settings(self) -> Settings:
        found = {o.name: getattr(self, o.attribute) for o in self._metric.options}
        if not torch.compiler.is_compiling() and found != self._checked_settings:
            check_settings(self._metric, found, published=True)
            self._checked_settings = found
        return found

    _checked_settings: Settings | None = None

    def _capped(self, pool: Pool) -> tuple[Pool, int]:
        """A draw of a pool above the cap and how many rows it had; the pool and 0 otherwise.

        Where nobody can know how many rows count, the draw has all of them if they are few.
        """
        cap, rows = self.max_pool_size, pool.lists.pos.shape[-1]
        if cap is None or rows <= cap:
            return pool, 0
        valid = pool.lists.valid
        told = valid is None or (readable(valid) and _late.at_once(valid))
        if valid is not None and told:
            rows = int(_lists.rows_of(valid).sum())
        if rows <= cap:
            return pool, 0
        # A counter instead of a generator: equal on every rank, and resumed with the state.
        draw = _lists.subsample_pool(pool, cap, seed=self._draws)
        return draw, rows if told else 0

    def _warn_capped(self, rows: int, at: str = "") -> None:
        if rows and not self._subsample_warned:
            self._subsample_warned = True
            warn_user(
                f"{at}{type(self).__name__}: the pool of {rows} rows is above max_pool_size="
                f"{self.max_pool_size} and is subsampled; the soft ranks here need no such cap"
            )

    def _as_targets(self, targets: Tensor) -> Tensor:
        """[N, 1] to [N]; class ids, floats as BCE takes them included, to int64; labels to bool.

        What a float is that is neither, `_true_targets` tells.
        """
        if not isinstance(targets, Tensor):
            return targets
        targets = _narrow(targets)
        if targets.is_complex() or targets.dtype == torch.bool:
            return targets
        floating = targets.is_floating_point()
        if targets.dim() == 1 and floating:
            wide = targets.to(torch.float64)
            ids = wide.to(torch.int64)
            return torch.where(ids == wide, ids, STRAY)  # 0.9 or NaN must not become a class
        if targets.dim() == 2 and floating and self.num_classes > 1:
            return targets == 1
        return targets.to(torch.int64) if targets.dim() == 1 else targets

    def _true_targets(
        self, targets: Tensor, given: Tensor, label_mask: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """Targets with 0 where no label is known, and `Batch.floats` likewise."""
        floats, known = None, label_mask
        if known is not None:
            known = known if targets.dim() == 2 else known.any(-1)
            targets = targets & known if targets.dtype == torch.bool else targets * known
        # With one class what is no id is a positive, with a warning, as published.
        asks = given.is_floating_point() and self.num_classes > 1
        if asks and not torch.compiler.is_compiling():
            floats = lift(given.detach().reshape(targets.shape))
            if known is not None:
                floats = torch.where(known, floats, 0.0)
            if floats.dim() == 2 and self._gathers():  # the worst of a row: least, or largest
                low, high = torch.where(floats == 1, 0.0, floats).aminmax(dim=-1)
                floats = torch.where(low != 0, low, high)
        return targets, floats

    # -- what the values say

    def _look(
        self, batch: Batch, pool: Pool, found: Found, known: Known, group: ProcessGroup | None, *,
        stores: bool,
    ) -> bool | Tensor | None:  # fmt: skip
        """Raise and warn as the values ask, read all at once; whether to store the batch.

        On the CPU, in eager code: elsewhere the answers are heard later, and whether to store is a
        [] bool, or None where it was not asked.
        """
        logits = batch.logits
        if not readable(logits):
            return None
        now = _late.at_once(logits)
        if not now and not self._may_ask(logits):
            return None
        asked = self._questions(batch, pool, found, known, stores=stores, now=now)
        if not now:
            keep = None
            if stores and self._queue is not None and group is None:
                keep = self._keeps(batch, pool, None)
                if not self._unstored_warned:
                    asked["unstored"] = self._unstored(keep, found)
            self._ask(logits, asked, self._judge)
            return keep
        if not asked:
            return False
        if not num.plainly_eager() and not all(map(readable, asked.values())):
            return None
        said = {name: x.item() for name, x in asked.items()}
        self._judge(said, batch=batch)
        if self._queue is not None:
            self._queue.see_ones(*(field for field in ONES if said.get(field)))
        if "least logit" not in said:
            return False
        sound = math.isfinite(said["least logit"]) and math.isfinite(said["largest logit"])
        if not sound:  # in the padding it does no harm
            sound = bool(self._is_sound(batch))
        return sound and (said.get("some row") != 0 or bool(_lists.some_valid(pool)))

    def _judge(self, said: Mapping[str, float], at: str = "", batch: Batch | None = None) -> None:
        """Raise and warn; at names the forward that this is about, if it is not this one."""
        name, classes = f"{at}{type(self).__name__}", max(self.num_classes, 2)
        targets = None if batch is None else batch.targets
        self._judge_floats(said, batch, at)
        stray = "least id" in said and not 0 <= said["least id"] <= said["largest id"] < classes
        if stray and self.num_classes == 1:
            self._warn_binary(said, name, targets)
        if "least weight" in said:
            self._judge_weight(said, at)
        if "least gain" in said:
            self._judge_gains(said, at)
        if stray and self.num_classes > 1 and targets is not None:
            check_class_ids(targets, self.num_classes, self.ignore_index)
        elif stray and self.num_classes > 1:
            judge_class_ids(said, self.num_classes, self.ignore_index, at)
        if self.max_pool_size is not None and said.get("pool rows", 0) > self.max_pool_size:
            self._warn_capped(int(said["pool rows"]), at)
        if said.get("degenerate") and not self._degenerate_warned:
            self._degenerate_warned = True
            warn_user(
                f"{name}: the reference scores of at least one class have no "
                "dispersion (all equal, or too few for this band), so no temperature can be set; "
                "the class is left out. A longer queue or a wider band helps."
            )
        if said.get("unstored") and not self._unstored_warned and self._queue is not None:
            self._warn_unstored(self._queue.dtype, at)

    def _questions(
        self, batch: Batch, pool: Pool, found: Found, known: Known, *, stores: bool, now: bool
    ) -> dict[str, Tensor]:
        """[] each: what the checks and, if answered now, the decision to store ask of values."""
        targets, weight, queue, ask = batch.targets, batch.sample_weight, self._queue, {}
        stores = now and stores and (queue is not None or self.max_pool_size is not None)
        if n := batch.logits.shape[0]:
            ids = targets.dim() == 1 and targets.dtype != torch.bool and batch.gains is None
            ids = ids and (self.num_classes == 1 or self._metric.checks_ids)
            counted, padded = None, pool.lists.valid is not None
            told = now and num.plainly_eager() and batch.query_ids is batch.label_mask is None
            if ids and (told or not padded):
                ask["least id"], ask["largest id"] = low, high = targets.aminmax()
                padded = padded and low.item() <= self.ignore_index <= high.item()
            if padded and pool.lists.valid is not None and (stores or ids):
                counted = _lists.rows_of(pool.lists.valid[..., :n])
                if ids:  # 0 in the padding
                    ask["least id"], ask["largest id"] = (targets * counted).aminmax()
            x = batch.floats
            if x is not None and x.dtype.itemsize == 1:  # few operations take such
                x = x.float()
            if x is not None and targets.dim() == 1:  # 0 where it is an id
                ask["least rest of id"], ask["largest rest of id"] = (x - targets).aminmax()
            elif x is not None:  # 0 for labels 0 and 1 alone
                rest = torch.addcmul(x, x, x, value=-1)
                ask["least rest of label"], ask["largest rest of label"] = rest.aminmax()
            if weight is not None:
                ask["least weight"], ask["largest weight"] = weight.aminmax()
            if batch.gains is not None:
                ask["least gain"], ask["largest gain"] = batch.gains.detach().aminmax()
            if stores:
                rows = batch.logits.detach().to(self._stored_dtype(batch))
                ask["least logit"], ask["largest logit"] = rows.aminmax()
                if counted is not None:
                    ask["some row"] = counted.any()
        # What was learnt once need not be read again. A forward that a checkpoint computes anew
        # must know as much as it did at first.
        if queue is not None and now and (stores or not torch.is_grad_enabled()):
            for field in ONES:
                if (
                    field in queue.rows
                    and field not in known.ones
                    and getattr(batch, field) is None
                ):
                    ask[field] = (getattr(queue.state, field) == 1).all()
        capped = self.max_pool_size is not None and not self._subsample_warned
        if capped and not now and pool.lists.valid is not None:
            ask["pool rows"] = pool.lists.valid.sum()
        if found.degenerate is not None and not self._degenerate_warned:
            ask["degenerate"] = found.degenerate.any()
        return ask

    def _judge_floats(
        self, said: Mapping[str, float], batch: Batch | None = None, at: str = ""
    ) -> None:
        """Raise if targets that were given as floats are neither labels nor class ids."""
        kind = "label" if "least rest of label" in said else "id"
        if said.get(f"least rest of {kind}", 0) == 0 == said.get(f"largest rest of {kind}", 0):
            return
        got, mask = "others", f"label_mask=, [N, C={self.num_classes}] bool, False"
        if batch is not None and (x := batch.floats) is not None:
            wrong = x != batch.targets if kind == "id" else (x != 0) & (x != 1)
            got = str(x[wrong][:5].tolist())
        if kind == "label":
            expected = "labels 0 and 1"
            hint = f"where a label is missing (often NaN, -1 or -100) pass {mask} there"
        else:
            expected = "class ids, which are whole numbers"
            hint = f"rows without a class have ignore_index={self.ignore_index}, or {mask} there"
        name = f"{at}{type(self).__name__}"
        raise ValueError(f"{name}: targets must be {expected}, got {got}; {hint}")

    _unstored_warned = False

    def _unstored(self, sound: Tensor, found: Found) -> Tensor:
        """[] bool: some row that counts keeps the batch from being stored, and no NaN says so."""
        return ~sound & found.value.isfinite().all()

    def _warn_unstored(self, dtype: torch.dtype, at: str = "") -> None:
        self._unstored_warned = True
        warn_user(
            f"{at}{type(self).__name__}: a batch was not stored in the queue, because a row that "
            f"counts has a logit that is not finite in {dtype}; no such batch is. If logits are "
            f"-inf on purpose, as of classes not seen yet, pass label_mask=, "
            f"[N, C={self.num_classes}] bool, that is False there."
        )

    def _warn_binary(self, said: Mapping[str, float], name: str, targets: Tensor | None) -> None:
        others = f"values from {said['least id']:.0f} to {said['largest id']:.0f}; all but 0"
        if targets is not None:
            stray = (targets != 0) & (targets != 1) & (targets != self.ignore_index)
            others = f"{int(stray.sum())} other values"
        warn_user(
            f"{name} with num_classes=1 expects targets in {{0, 1}}; {others} count as positive"
        )

    def _stored_dtype(self, batch: Batch) -> torch.dtype:
        return batch.logits.dtype if self._queue is None else self._queue.dtype

    def _is_sound(self, batch: Batch) -> Tensor:
        dtype = self._stored_dtype(batch)
        return _losses.is_sound(batch, dtype, ignore_index=self.ignore_index)

    def _keeps(self, batch: Batch, pool: Pool, group: ProcessGroup | None) -> Tensor:
        dtype, name = self._stored_dtype(batch), group_name(group)
        return keeps(batch, pool, dtype, ignore_index=self.ignore_index, name=name)

    def _store(
        self, batch: Batch, pool: Pool, group: ProcessGroup | None, keep: bool | Tensor | None
    ) -> None:
        queue, n = self._queue, batch.logits.shape[0]
        if isinstance(keep, bool) and group is None:
            if keep and queue is not None:
                queue.write(batch)
            if keep and self.max_pool_size is not None:
                self._draws += 1
            return
        where = keep if isinstance(keep, Tensor) else self._keeps(batch, pool, group)
        if queue is not None and group is None and num.plainly_eager():
            queue.write(batch, where)
        elif queue is not None:
            queue.store(_losses.stored(queue.view(batch.targets), batch, where), batch, where)
        if self.max_pool_size is not None and n:
            self._draws += where.to(self._draws.device)

    # -- loading

    def problems_with(self, state_dict: dict[str, Any], prefix: str) -> list[str]:
        """What keeps a checkpoint from being loaded; gives its queue the present names."""
        for key in [k for k in state_dict if k.startswith(prefix + "_q_")]:  # proxy-losses 0.1.1
            state_dict[prefix + "_queue." + key[len(prefix) :]] = state_dict.pop(key)
        problems = number_problems(state_dict, prefix + "_tau", check_temperature)
        if self.max_pool_size is not None:
            problems += number_problems(state_dict, prefix + "_draws", check_int)
        if self._queue is not None:
            problems += queue_problems(self._queue, state_dict, prefix + "_queue.")
        return problems

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        """Accept checkpoints without a temperature, and a changed max_pool_size."""
        refuse(self, self.problems_with(state_dict, prefix))
        if self.max_pool_size is None:
            state_dict.pop(prefix + "_draws", None)
        tau = torch.full((), self._first_temperature, dtype=torch.float64, device="cpu")
        none_drawn = torch.zeros((), dtype=torch.int64, device="cpu")
        for name, start in ("_tau", tau), ("_draws", none_drawn):
            now = self._buffers.get(name)
            if now is not None:  # on the meta device it has no value yet
                state_dict.setdefault(prefix + name, start if now.is_meta else now)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)


def _narrow(targets: Any) -> Any:
    """[N, 1] to [N]."""
    if isinstance(targets, Tensor) and targets.dim() == 2 and targets.shape[1] == 1:
        return targets[:, 0]
    return targets


# -- from the record of a metric to the class


def _arguments(metric: Metric) -> Arguments:
    """Arguments of the constructor, in the published order."""
    unit = "that spread" if metric.own_spread else "the logits"
    own = [o.of_module for o in metric.options if not o.keyword]
    positional = [
        Option("num_classes", REQUIRED, "int",
               "C; 1 for binary, with targets in {0, 1}."),
        *(o for o in own if not o.late),
        Option("queue_size", 1024, "int", "past rows kept, 0 for none."),
        Option("temperature", metric.temperature, "float",
               f"in units of {unit}, > 0; smaller is closer to the metric, with sharper "
               "gradients."),
        Option("reduction", "mean", "str",
               f'"mean" or "sum" over the classes that {metric.counts}, or "none".'),
        Option("ignore_index", -100, "int", "class id of rows that do not count."),
        Option("update_queue_in_eval", False, "bool", "store rows in eval mode too."),
        Option("gather_distributed", None, "bool | None",
               "gather the rows of all processes before ranking and storing: None and True when "
               "there are several, False never."),
        *(o for o in own if o.late),
        Option("max_pool_size", None, "int | None",
               "rank a subsample of at most this many rows, with a quota for rare classes. Kept "
               "for compatibility: nothing here needs a cap."),
    ]  # fmt: skip
    ours = [
        Option("temperature_unit", "score", "str",
               '"score" for a temperature in units of the logits, as published; "spread" to '
               "multiply it by the detached spread of the pool (`score_spread`), class by class, "
               "so that it keeps its meaning as the logits grow."),
        Option("query_shape", None, "tuple[int, int] | None",
               "(queries, longest query), bounds that compiled code needs for `query_ids`."),
        Option("multi_label", None, "bool | None",
               "whether targets are [N, C] labels (True) or class ids (False). None takes both, "
               "with room for both in the queue: rows of one kind give way to the other."),
        Option("distributed", "gather", "str",
               'what several processes do when they gather: "gather" every row to all, or "shard", '
               "where each keeps its rows and a queue of its own, only sums travel, and the loss "
               "is the same exact one of the whole pool (see the guide)."),
    ]  # fmt: skip
    named = [o.of_module for o in metric.options if o.keyword]
    return positional, [*named, *ours[metric.own_spread :]]


def _document(metric: Metric) -> str:
    called = (
        "Called with logits [N, C] and targets, see `proxy_losses.nn.RankingLoss.forward`, "
        f"one-vs-rest; formula and limits are those of `{metric.name}`. {metric.note}"
    )
    told = (
        f"Diagnostics (return_diagnostics), [C] each: {metric.diagnostics}; grad_pos_count, the "
        "positives of this batch. NaN or 0 for a class that does not count."
    )
    warns = (
        "Warns:\n    UserWarning: once, when a class is left out because its reference scores "
        "have no\n        dispersion to set a temperature by."
    )
    raises = "ValueError, TypeError: an argument out of range" + (
        ", or, in forward, a class id outside [0, num_classes)." if metric.checks_ids else "."
    )
    return _losses.sections(
        f"1 - {metric.title}, over the batch and a memory queue.",
        _losses.paragraph(called, 0),
        _losses.entries(_arguments(metric)),
        _losses.paragraph(told, 0) if metric.diagnostics else "",
        warns if metric.own_spread else "",
        "Raises:\n" + _losses.paragraph(raises, 4, 4),
        _losses.example(metric.module_example),
    )


def _constructor(metric: Metric) -> Callable[..., None]:
    """``__init__`` with the arguments of the metric's loss, in the published order."""

    def __init__(*args: Any, **kwargs: Any) -> None:
        try:
            given = signature.bind(*args, **kwargs)
        except TypeError as error:  # as Python says it of a function
            raise TypeError(f"{metric.module}.__init__() {error}") from None
        given.apply_defaults()
        RankingLoss.__init__(**given.arguments)

    own = inspect.Parameter("self", inspect.Parameter.POSITIONAL_OR_KEYWORD)
    name = f"{metric.module}.__init__"
    made: Callable[..., None] = _losses.dressed(__init__, name, _arguments(metric), "None", own)
    signature = inspect.signature(made)
    return takes_old_names(made)


class SmoothAPLoss(RankingLoss, metric=records.SMOOTH_AP): ...


class RecallAtQuantileLoss(RankingLoss, metric=records.RECALL): ...


class PAUCAtBudgetLoss(RankingLoss, metric=records.PARTIAL_AUC): ...


class PrecisionAtKLoss(RankingLoss, metric=records.PRECISION_AT_K): ...


class RecallAtKLoss(RankingLoss, metric=records.RECALL_AT_K): ...


class RecallAtPrecisionLoss(RankingLoss, metric=records.RECALL_AT_PRECISION): ...


class AUROCLoss(RankingLoss, metric=records.AUROC): ...


class MRRLoss(RankingLoss, metric=records.MRR): ...


class NDCGLoss(RankingLoss, metric=records.NDCG): ...
