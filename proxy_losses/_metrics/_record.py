"""What the library knows of a metric: one record, from which its loss and module are made."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol

from torch import Tensor

from .. import _numerics as num
from .._checks import THRESHOLD_GRADS, as_tau, check_choice, check_lists, check_rtol
from .._ranks import How, Lists, default_rtol

Settings = Mapping[str, Any]  # option name -> value


class Found(NamedTuple):
    """A metric over lists."""

    value: Tensor  # [...] floating, 0 where the list does not count
    defined: Tensor  # [...] bool, lists that count
    stats: dict[str, Tensor]  # [...] each, detached; empty unless asked for
    degenerate: Tensor | None = None  # [...] bool, lists left out for scores that do not spread


class Evaluate(Protocol):
    """The metric over lists that were checked; scores are float32 or float64, outside autocast."""

    def __call__(
        self, lists: Lists, tau: float | Tensor, settings: Settings, how: How, *, stats: bool
    ) -> Found: ...


class Option(NamedTuple):
    """A setting of its own that a metric takes beside scores, masks and tau."""

    name: str  # as an argument of the function and of the loss function
    default: Any
    kind: str  # annotation
    text: str  # its entry in docstrings
    published: str = ""  # its name in the published constructor, where that differs
    late: bool = False  # published constructors have it after gather_distributed
    choices: tuple[str, ...] = ()  # all that it may be
    keyword: bool = False  # constructors take it by keyword alone
    kept: Any = ...  # its default in the published constructor, where that differs

    @property
    def attribute(self) -> str:
        """Its name as an argument and attribute of the module."""
        return self.published or self.name

    @property
    def of_module(self) -> Option:
        """The option as the constructor has it."""
        return self._replace(
            name=self.attribute, default=self.default if self.kept is ... else self.kept
        )


THRESHOLD_GRAD = Option(
    "threshold_grad", "implicit", "str",
    '"implicit": the threshold moves with the scores that set it, so what pulls positives up '
    "pushes these down, and the gradient sums to zero over the rows; "
    '"none": the threshold is a constant of the gradient, and only positives get one. The value is '
    "the same.",
    choices=THRESHOLD_GRADS, keyword=True,
)  # fmt: skip


class Metric(NamedTuple):
    """A metric: everything that its loss function, module, tests and docs are made from."""

    name: str  # of the function; the loss function is <name>_loss
    module: str  # class of the loss
    title: str  # "Smooth-AP (Brown et al., ECCV 2020)"
    function: Callable[..., Tensor]  # the public function of lists
    evaluate: Evaluate
    defined: Callable[..., Tensor]  # the public function that says which lists count
    options: tuple[Option, ...] = ()
    check: Callable[[Settings], None] | None = None  # raises for options out of range
    # Of Lists, beside scores, pos, valid and weight: "iid", "live", "gains"; or what the settings
    # ask for.
    reads: tuple[str, ...] | Callable[[Settings], tuple[str, ...]] = ()
    temperature: float = 0.01  # default of the module
    own_spread: bool = False  # tau multiplies a spread of the metric's own: no temperature_unit
    needs_negative: bool = True  # a list without negatives does not count
    examples: tuple[dict[str, Any], ...] = ({},)  # settings that tests and the doctor try
    checks_ids: bool = False  # the module refuses ids of no class
    table: str = ""  # what it measures, as the README's table says it
    shown: str = ""  # the option that the table shows
    counts: str = "count"  # classes that ..., for docstrings
    note: str = ""  # of the module's docstring
    diagnostics: str = ""  # of the module, beside grad_pos_count
    loss_example: str = ""  # doctest of the loss function
    module_example: str = ""  # doctest of the module


def reads_of(metric: Metric, settings: Settings) -> tuple[str, ...]:
    """What the metric reads of `Lists`, with these settings, beside what all do."""
    return metric.reads(settings) if callable(metric.reads) else metric.reads


def defaults_of(metric: Metric) -> dict[str, Any]:
    """Settings that nobody chose."""
    return {o.name: o.default for o in metric.options}


def reads_gains(metric: Metric) -> bool:
    """Whether it is of graded relevance: targets of its loss are grades."""
    return "gains" in reads_of(metric, defaults_of(metric))


def check_settings(metric: Metric, settings: Settings, *, published: bool = False) -> None:
    """Raise unless every option is in its range; errors name those of the module if published."""
    for o in metric.options:
        if o.choices:
            check_choice(o.attribute if published else o.name, settings[o.name], o.choices)
    if metric.check is not None:
        metric.check(settings)


def has_both(pos_mask: Tensor, valid_mask: Tensor | None, sample_weight: Tensor | None) -> Tensor:
    """[...] bool, lists with some positive (of weight > 0) and some negative."""
    pos, negative = num.sides(pos_mask, valid_mask)
    if sample_weight is not None:
        pos = pos & (sample_weight > 0)
    return pos.any(-1) & negative.any(-1)


def over_lists(
    metric: Metric, lists: Lists, tau: float | Tensor, settings: Settings, how: How, *,
    stats: bool = False,
) -> Found:  # fmt: skip
    """The metric of scores of any floating dtype, inside or outside of autocast."""
    if how.rtol is None:  # that of the scores as given
        how = how._replace(rtol=default_rtol(lists.scores.dtype))
    evaluate = num.full_precision(metric.evaluate)
    return evaluate(lists, tau, settings, how, stats=stats)


def of_arguments(
    metric: Metric, lists: Lists, tau: float | Tensor, settings: Settings, how: How, *,
    stats: bool = False,
) -> Found:  # fmt: skip
    """`over_lists` of what a caller of the metric's function gives: all of it is checked first."""
    check_settings(metric, settings)
    check_rtol(how.rtol)
    tau = as_tau(tau, check_lists(*lists[:4], gains=lists.gains)[:-1])
    return over_lists(metric, lists, tau, settings, how, stats=stats)


def table_row(metric: Metric) -> str:
    """The metric's row in the README's table of pieces."""
    shown = "".join(f", {o.name}={o.default!r}" for o in metric.options if o.name == metric.shown)
    labels = "gains" if reads_gains(metric) else "pos_mask"
    call = f"`{metric.name}(scores, {labels}, tau{shown})`"
    return f"| {metric.table} | {call} | `{metric.module}` |"


class Example(NamedTuple):
    """A metric with settings: what tests and the doctor run."""

    label: str
    metric: Metric
    settings: dict[str, Any]  # of the function and of the loss function

    @property
    def arguments(self) -> dict[str, Any]:
        """The settings as arguments of the module."""
        names = {o.name: o.attribute for o in self.metric.options}
        return {names[name]: x for name, x in self.settings.items()}


def examples(metrics: tuple[Metric, ...]) -> list[Example]:
    """Every example of every metric, under the name of the module and of what it chooses."""
    return [
        Example(", ".join([m.module, *(x for x in s.values() if isinstance(x, str))]), m, dict(s))
        for m in metrics
        for s in m.examples
    ]
