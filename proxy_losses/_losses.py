"""The losses of a training step: lists and a metric, class by class, reduced; the queue's next."""

from __future__ import annotations

import inspect
import textwrap
from typing import Any, NamedTuple, Protocol, TypeAlias, cast

import torch
from torch import Tensor

from . import _metrics as records
from ._checks import (
    MAX_WEIGHT,
    REDUCTIONS,
    TEMPERATURE_UNITS,
    as_list_shape,
    as_tau,
    check_choice,
    check_int,
)
from ._lists import (
    Batch,
    Pool,
    QueryLists,
    every_list,
    from_grades,
    make_pool,
    padding_rows,
    rows_of,
    some_valid,
)
from ._metrics._record import (
    Found,
    Metric,
    Option,
    Settings,
    check_settings,
    defaults_of,
    over_lists,
    reads_gains,
    reads_of,
)
from ._old_names import takes_old_names
from ._quantiles import spread_over_group
from ._queue import QueueState, enqueue
from ._ranks import How, Lists
from .distributed import ProcessGroup, all_reduce, group_name


class Options(NamedTuple):
    """What all losses take beside the arguments of their metric."""

    stats: bool = False  # report diagnostics
    query_shape: tuple[int, int] | None = None  # (queries, longest query), for compiled code
    tau_unit: str = "score"  # "spread": tau multiplies `score_spread` of the pool
    group: ProcessGroup | None = None  # processes that hold the pool together


class LossFunction(Protocol):
    """A loss as a pure function; `inspect.signature` tells the keywords of each."""

    __name__: str

    def __call__(
        self, logits: Tensor, targets: Tensor, queue: QueueState | None, tau: float | Tensor,
        **settings: Any,
    ) -> tuple[Tensor, QueueState | None]: ...  # fmt: skip


# -- the metric of every class


def over_classes(
    metric: Metric, pool: Pool, tau: float | Tensor, settings: Settings, options: Options
) -> Found:
    """[C] each: the metric of every class; with query_ids its mean over the queries that count."""
    lists, ids = pool
    tau = as_tau(tau, lists.scores.shape[:-1])
    name = group_name(options.group)
    if name and ids is not None:
        raise ValueError("query_ids need the whole pool on every process: distributed='gather'")
    if options.tau_unit == "spread":
        tau = tau * _spread(pool, name)
    how = How(group=options.group)
    if ids is None or not ids.numel():
        return over_lists(metric, lists, tau, settings, how, stats=options.stats)
    assert lists.valid is not None
    places = every_list(ids, rows_of(lists.valid), options.query_shape)
    if isinstance(tau, Tensor) and tau.dim():  # one per class
        tau = tau[:, None]
    found = _mean_over_lists([
        over_lists(metric, _placed(pool, p), tau, settings, how, stats=options.stats)
        for p in places
    ])  # fmt: skip
    if options.query_shape is None:
        return found
    fits = places[0].fits  # rows without a place must not pass unnoticed
    value = torch.where(fits, found.value, torch.nan)
    return found._replace(value=value, defined=found.defined | ~fits)


def _placed(pool: Pool, places: QueryLists) -> Lists:
    """[C, Q, L]: the rows of the pool in their queries."""
    lists = pool.take(places.rows).lists
    if lists.valid is None or lists.valid.dim() == 2:  # rows that do not count have no place
        return lists._replace(valid=places.valid_mask)
    return lists._replace(valid=lists.valid & places.valid_mask)


def _spread(pool: Pool, name: str) -> Tensor:
    scores, valid = pool.lists.scores, pool.lists.valid
    spread = spread_over_group(scores, valid, name)
    return torch.where(spread.isfinite(), spread, 1.0)  # the metric reports what is not


def _mean_over_lists(parts: list[Found]) -> Found:
    """[C] from parts of [C, Q]: means over the lists that count, sums of what is counted."""
    defined = torch.cat([p.defined for p in parts], -1)
    number = defined.sum(-1)

    def mean(x: list[Tensor]) -> Tensor:
        return torch.where(defined, torch.cat(x, -1), 0.0).sum(-1) / number.clamp(min=1)

    stats = {}
    for name, first in parts[0].stats.items():
        each = [p.stats[name] for p in parts]
        if first.is_floating_point():
            stats[name] = torch.where(number > 0, mean(each), torch.nan)
        else:
            stats[name] = torch.cat(each, -1).sum(-1)
    flags = [p.degenerate for p in parts if p.degenerate is not None]
    degenerate = torch.cat(flags, -1).any(-1) & (number == 0) if flags else None
    return Found(mean([p.value for p in parts]), number > 0, stats, degenerate)


# -- reduction


def per_class(found: Found) -> Tensor:
    """[C] losses, NaN where the class does not count."""
    # The value of such a class is 0 with zero gradient: a graph, not a NaN.
    return torch.where(found.defined, 1.0 - found.value, torch.nan)


def reduce_classes(found: Found, reduction: str, pool: Pool, name: str = "") -> Tensor:
    """'mean' or 'sum' over the classes that count (exact 0 if none does), or 'none' [C].

    'none' keeps NaN for classes that do not count, but gives zeros for a pool of padding alone.
    """
    check_choice("reduction", reduction, REDUCTIONS)
    if reduction == "none":
        return torch.where(all_reduce(some_valid(pool), "max", name), per_class(found), 0.0)
    losses = torch.add(found.defined, found.value, alpha=-1)  # 0 - 0 where it does not count
    total = losses.sum()  # of one class too: no view, which FSDP2 warns of
    if losses.numel() == 1 or reduction == "sum":
        return total
    return total / found.defined.sum().clamp(min=1)


# -- the queue


def is_sound(batch: Batch, dtype: torch.dtype, *, ignore_index: int) -> Tensor:
    """[] bool: the numbers of all rows that count are finite in the dtype they are stored in."""
    zeros = batch.logits.detach().to(dtype) * 0.0  # NaN where they are not finite
    if batch.gains is not None:
        gains = batch.gains.detach()
        zeros = torch.where((gains >= 0.0) & (gains < MAX_WEIGHT), zeros, torch.nan)
    if batch.label_mask is not None:
        zeros = torch.where(batch.label_mask, zeros, 0.0)
    sound = (zeros.squeeze(-1) if zeros.shape[-1] == 1 else zeros.sum(-1)) == 0.0
    if batch.sample_weight is not None:
        sound = sound & (batch.sample_weight.detach().abs() < MAX_WEIGHT)
    padding = padding_rows(batch.targets, ignore_index)
    if batch.label_mask is not None:
        none = ~batch.label_mask.any(-1)
        padding = none if padding is None else padding | none
    return (sound if padding is None else sound | padding).all()


def keeps(
    batch: Batch, pool: Pool, dtype: torch.dtype, *, ignore_index: int, name: str = ""
) -> Tensor:
    """[] bool, whether to store the batch, the same on all processes.

    A batch with a non-finite number in a row that counts is not stored: its loss is NaN, and the
    next one does not hear of it. (Where the number only is too large for the dtype of the queue,
    or lies in a class that does not count, the loss is that of the rest.) Nor is one whose pool
    is padding alone.
    """
    sound = all_reduce(is_sound(batch, dtype, ignore_index=ignore_index), "min", name)
    return all_reduce(some_valid(pool), "max", name) & sound


def stored(queue: QueueState, batch: Batch, where: Tensor) -> QueueState:
    """The queue after the batch, if `where` says so."""
    return enqueue(
        queue, batch.logits, batch.targets, sample_weight=batch.sample_weight,
        iid_mask=batch.iid_mask, query_ids=batch.query_ids, label_mask=batch.label_mask,
        gains=batch.gains, where=where,
    )  # fmt: skip


# -- loss functions


def loss_function(metric: Metric) -> LossFunction:
    """``(logits, targets, queue, tau, ...) -> (loss, new queue)`` of a metric."""
    defaults = defaults_of(metric)
    arguments = _arguments(metric)
    known = {o.name for o in arguments[1]}

    def loss(
        logits: Tensor, targets: Tensor, queue: QueueState | None, tau: float | Tensor, *,
        reduction: str = "mean", ignore_index: int = -100, sample_weight: Tensor | None = None,
        query_ids: Tensor | None = None, query_shape: tuple[int, int] | None = None,
        label_mask: Tensor | None = None, **more: Any,
    ) -> tuple[Tensor, QueueState | None]:  # fmt: skip
        for name in more:
            if name not in known:
                raise TypeError(f"{metric.name}_loss() got an unexpected keyword argument {name!r}")
        check_choice("reduction", reduction, REDUCTIONS)
        shape = as_list_shape("query_shape", query_shape)
        options = Options(False, shape, more.get("tau_unit", "score"))
        check_choice("tau_unit", options.tau_unit, TEMPERATURE_UNITS)
        settings = {name: more.get(name, default) for name, default in defaults.items()}
        check_settings(metric, settings)
        check_int("ignore_index", ignore_index)
        reads, gains = reads_of(metric, settings), None
        if "gains" in reads:
            targets, gains = from_grades(logits, targets, ignore_index)
        extras = sample_weight, more.get("iid_mask"), query_ids, label_mask, gains
        batch = Batch(logits, targets, *extras)
        pool = make_pool(batch, queue, ignore_index=ignore_index, reads=reads)
        found = over_classes(metric, pool, tau, settings, options)
        value = reduce_classes(found, reduction, pool)
        if queue is None:
            return value, None
        where = keeps(batch, pool, queue.logits.dtype, ignore_index=ignore_index)
        return value, stored(queue, batch, where)

    loss.__name__ = f"{metric.name}_loss"
    loss.__doc__ = _document(metric)
    result = "tuple[Tensor, QueueState | None]"
    return cast(LossFunction, takes_old_names(dressed(loss, loss.__name__, arguments, result)))


REQUIRED = inspect.Parameter.empty
Arguments: TypeAlias = tuple[list[Option], list[Option]]  # positional ones, keyword-only ones

TARGETS = """[N] class ids (C > 1: one-vs-rest; C = 1: {0, 1}, any other id counts as positive),
    or [N, C] bool labels when C > 1."""
GRADES = """relevance grades >= 0, any real dtype: [N] when C = 1, [N, C] otherwise. With C > 1 also
    [N] class ids (the gain is 1 in the row's class and 0 in others). Gains are the grades as given:
    for 2^grade - 1, pass that."""
UNIT = """"score" for tau in units of the logits, "spread" to multiply it by the detached
    `score_spread` of the pool, class by class, so that it keeps its meaning as logits grow."""
QUERY_IDS = """[N] integer query ids, or None. Each query is a list of its own, and the value of a
    class is the mean over the queries that count. With a queue ids must mean the same query from
    step to step; stored rows without one are left out."""
QUERY_SHAPE = """(queries, longest query), at least what the pool holds: needed with query_ids
    inside `torch.compile`, `torch.vmap` and CUDA graphs; the loss is NaN if it does not suffice.
    None reads it off the data, for which a device has to be waited for."""
LABEL_MASK = """[N, C] bool, labels that are known, or None for all; stored with the rows. A row is
    in the lists of those classes alone whose label is known: elsewhere it is neither positive nor
    negative, and its target and logit may be anything."""


def _arguments(metric: Metric) -> Arguments:
    own = " in units of the reference's spread" if metric.own_spread else ""
    data = [
        Option("logits", REQUIRED, "Tensor", "[N, C] floating."),
        Option("targets", REQUIRED, "Tensor", GRADES if reads_gains(metric) else TARGETS),
        Option(
            "queue", REQUIRED, "QueueState | None",
            "`QueueState` of rows seen before, or None. It has its own ignore_index.",
        ),
        Option(
            "tau", REQUIRED, "float | Tensor",
            f"temperature > 0{own}; a 0-d tensor when it varies inside a compiled function.",
        ),
    ]  # fmt: skip
    rest = [
        Option(
            "reduction", "mean", "str",
            f'"mean" or "sum" over the classes that {metric.counts}, or "none" for [C] with NaN '
            f"where a class does not (`{metric.defined.__name__}` says which do).",
        ),
        Option("ignore_index", -100, "int",
               "class id of rows that do not count; they take slots in the queue."),
        Option("sample_weight", None, "Tensor | None",
               f"[N] floating >= 0, or None for 1; see `{metric.name}`."),
        Option("iid_mask", None, "Tensor | None",
               "[N] bool, rows that may set the band, or None for all; stored with the rows."),
        Option("query_ids", None, "Tensor | None", QUERY_IDS),
        Option("query_shape", None, "tuple[int, int] | None", QUERY_SHAPE),
        Option("label_mask", None, "Tensor | None", LABEL_MASK),
    ]  # fmt: skip
    if "iid" not in reads_of(metric, defaults_of(metric)):
        rest = [o for o in rest if o.name != "iid_mask"]
    unit = [] if metric.own_spread else [Option("tau_unit", "score", "str", UNIT)]
    return data, [*metric.options, *unit, *rest]


def paragraph(text: str, indent: int, hanging: int = 0) -> str:
    """The text in lines of 100, indented."""
    first, more = " " * indent, " " * (indent + hanging)
    return textwrap.fill(
        " ".join(text.split()), 100, initial_indent=first, subsequent_indent=more,
        break_on_hyphens=False, break_long_words=False,
    )  # fmt: skip


def example(text: str) -> str:
    """A doctest of a record as a section of a docstring, if there is one."""
    lines = textwrap.indent(textwrap.dedent(text).strip("\n "), "    ")
    return f"Example:\n{lines}" if lines else ""


def sections(*parts: str) -> str:
    """A docstring of the parts that are not empty."""
    return "\n\n".join(part for part in parts if part)


def entries(arguments: Arguments) -> str:
    """The arguments as a section of a docstring."""
    each = [paragraph(f"{o.name}: {o.text}", 4, 4) for options in arguments for o in options]
    return "\n".join(["Args:", *each])


def dressed(
    function: Any, name: str, arguments: Arguments, result: str, *own: inspect.Parameter
) -> Any:
    """The function with this qualified name and signature, its own parameters first."""
    kinds = inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY
    taken = [
        inspect.Parameter(o.name, kind, default=o.default, annotation=o.kind)
        for kind, options in zip(kinds, arguments, strict=True)
        for o in options
    ]
    function.__qualname__ = name
    function.__annotations__ = {p.name: p.annotation for p in taken} | {"return": result}
    function.__signature__ = inspect.Signature([*own, *taken], return_annotation=result)
    return function


def _document(metric: Metric) -> str:
    name = metric.name
    formula = (
        f"``loss = mean over classes c that count of 1 - {name}(scores_c, pos_c)``, each class "
        f"against the rest, over the rows of the batch and of the queue; see `{name}`."
    )
    returns = (
        "(loss, new queue). The loss is exactly 0 with zero gradient when no class counts; a pool "
        "of padding alone leaves the queue as it was, and so does a batch with a number that is "
        "not finite in a row that counts. To leave it as it was in other cases, as in a second "
        "pass over a batch or in validation, go on with the old queue."
    )
    return sections(
        f"1 - `{name}` of every class over the batch and the queue, and the new queue.",
        paragraph(formula, 0),
        entries(_arguments(metric)),
        "Returns:\n" + paragraph(returns, 4),
        "Raises:\n    TypeError, ValueError: wrong dtypes, shapes or ranges.",
        example(metric.loss_example),
    )


smooth_ap_loss = loss_function(records.SMOOTH_AP)
recall_at_quantile_loss = loss_function(records.RECALL)
partial_auc_loss = loss_function(records.PARTIAL_AUC)
precision_at_k_loss = loss_function(records.PRECISION_AT_K)
recall_at_k_loss = loss_function(records.RECALL_AT_K)
recall_at_precision_loss = loss_function(records.RECALL_AT_PRECISION)
smooth_auroc_loss = loss_function(records.AUROC)
smooth_mrr_loss = loss_function(records.MRR)
smooth_ndcg_loss = loss_function(records.NDCG)
