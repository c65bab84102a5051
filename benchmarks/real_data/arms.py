"""The arms: a loss, and the three configurations it may be tuned over."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import torch

from . import losses
from .losses import Make

SCALE = {"linear": 10.0, "MLP": 1.0}  # of the learning rates
BASE_RATES = (1e-3, 3e-3, 1e-2)
RATES = (3e-4, 1e-3, 3e-3)  # of all that continue
SPREAD = "tau / spread at the start"


class Arm(NamedTuple):
    """A row of the results."""

    name: str
    make: Make
    rates: tuple[float, ...]  # of the MLP, one per configuration; see SCALE
    parameter: str | None  # what the values are
    values: tuple[Any, ...]  # one per configuration
    modules: tuple[str, ...] = ()  # of a peer, to import
    batches: Literal["plain", "enriched"] = "plain"  # enriched: a fifth are positives
    optimizer: Literal["Adam", "SOAP"] = "Adam"

    def configurations(self, model: str) -> list[dict[str, Any]]:
        """What is tried, in words and numbers."""
        own = [{} if self.parameter is None else {self.parameter: v} for v in self.values]
        return [
            {"rate": rate * SCALE[model], **named}
            for rate, named in zip(self.rates, own, strict=True)
        ]


def _values(first: Any, other: Any) -> tuple[Any, ...]:
    """One value at the outer rates, the other at the middle one."""
    return (first, other, first)


BASE = Arm("BCE", losses.bce, BASE_RATES, None, (None,) * 3)
CONTROL = Arm("BCE continued", losses.bce, RATES, None, (None,) * 3)
ODDS = "exponent of negatives / positives"
OURS = (
    Arm("Smooth-AP, queue", losses.queue_ap, RATES, SPREAD, _values(0.25, 0.05)),
    Arm("Smooth-AP, whole training set", losses.whole_ap, RATES, SPREAD, _values(0.25, 0.05)),
    Arm("Smooth-AP + BCE", losses.mixed_ap, RATES, "weight of Smooth-AP", _values(0.5, 0.9)),
    Arm("recall_at_quantile", losses.whole_recall, RATES, SPREAD, _values(0.25, 0.05)),
    Arm(
        "partial_auc", losses.whole_pauc, RATES, "tau / interquartile range of the negatives",
        _values(0.25, 0.05),
    ),
)  # fmt: skip
OTHERS = (
    Arm("BCE, pos_weight", losses.weighted_bce, RATES, ODDS, _values(1.0, 0.5)),
    Arm("focal", losses.focal, RATES, "gamma", _values(2.0, 1.0)),
    Arm(
        "BCE, hard negatives", losses.hard_negatives, RATES, "share of the negatives",
        _values(0.1, 0.3),
    ),
    Arm(
        "imbalanced-losses Smooth-AP", losses.imbalanced_losses, RATES,
        "first and last temperature", _values((0.35, 0.01), (1.0, 0.1)), ("imbalanced_losses",),
    ),
    Arm(
        "LibAUC APLoss", losses.libauc, RATES, "gamma", _values(0.9, 0.1),
        ("libauc.losses", "libauc.optimizers"), "enriched", "SOAP",
    ),
)  # fmt: skip
ARMS = (CONTROL, *OURS, *OTHERS)  # all start from the best checkpoint of BASE


def missing(arm: Arm) -> str | None:
    """Why a peer's arm cannot run, None if it can."""
    for module in arm.modules:
        try:
            importlib.import_module(module)
        except Exception as error:  # a peer's import may fail in any way
            return f"{module} cannot be imported: {type(error).__name__}: {error}"
    return None


def optimizer(arm: Arm) -> Callable[..., torch.optim.Optimizer]:
    """Takes parameter groups."""
    if arm.optimizer == "Adam":
        return torch.optim.Adam
    from libauc.optimizers import SOAP

    return lambda groups: SOAP(groups, mode="adam", verbose=False, device="cpu")
