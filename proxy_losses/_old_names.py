"""Names of 0.4 that still work, with a `DeprecationWarning`. Nothing else knows them."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any, TypeVar

import torch

from ._checks import warn_user

ARGUMENTS = {"groups": "query_ids", "group_shape": "query_shape"}
NAMES = {
    "GroupLists": "QueryLists",
    "group_lists": "query_lists",
    "partial_auc_counts": "partial_auc_defined",
    "recall_counts": "recall_defined",
    "smooth_ap_counts": "smooth_ap_defined",
}

F = TypeVar("F", bound=Callable[..., Any])


def takes_old_names(function: F, *, passes_to: str = "") -> F:
    """The function, which also takes the old names of its arguments, as keywords.

    A method may name an attribute that gets its arguments: what that declares is no old name.
    """
    names = {k: v for k, v in ARGUMENTS.items() if v in inspect.signature(function).parameters}

    @functools.wraps(function)
    def with_old_names(*args: Any, **kwargs: Any) -> Any:
        for old, new in names.items():
            if old in kwargs and not (passes_to and _declares(getattr(args[0], passes_to), old)):
                if new in kwargs:
                    raise TypeError(f"{old}= is the old name of {new}=: expected one, got both")
                kwargs[new] = kwargs.pop(old)
                _warn(f"{old}= is deprecated: its name is {new}= now")
        return function(*args, **kwargs)

    return with_old_names  # type: ignore[return-value]


def old_name(module: str, names: dict[str, Any], name: str) -> Any:
    """What a module has under a new name, for its ``__getattr__``."""
    if name not in NAMES:
        raise AttributeError(f"module {module!r} has no attribute {name!r}")
    _warn(f"{module}.{name} is deprecated: its name is {NAMES[name]} now")
    return names[NAMES[name]]


def _declares(function: Callable[..., Any], name: str) -> bool:
    """Whether a function, or a module's forward, has a parameter of this name."""
    try:
        return name in inspect.signature(getattr(function, "forward", function)).parameters
    except (TypeError, ValueError):  # nothing is known of some built-in functions
        return False


def _warn(message: str) -> None:
    if not torch.compiler.is_compiling():  # a warning would break the graph
        warn_user(message, DeprecationWarning)
