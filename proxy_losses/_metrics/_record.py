"""What the library knows of a metric: one record, from which its loss and module are made."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol

from torch import Tensor

from .._ranks import How, Lists

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
    reads: tuple[str, ...] = ()  # of Lists, beside scores, pos, valid and weight: "iid", "live"
    temperature: float = 0.01  # default of the module
    own_spread: bool = False  # tau multiplies a spread of the metric's own: no temperature_unit
    needs_negative: bool = True  # a list without negatives does not count
    examples: tuple[dict[str, Any], ...] = ({},)  # settings that tests and the doctor try
