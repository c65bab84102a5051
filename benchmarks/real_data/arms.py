"""The arms: a loss, and the three configurations it may be tuned over."""

from __future__ import annotations

from typing import Any

from ..trainer import Arm
from . import losses

SCALE = {"linear": 10.0, "MLP": 1.0}  # of the learning rates
BASE_RATES = (1e-3, 3e-3, 1e-2)
RATES = (3e-4, 1e-3, 3e-3)  # of all that continue
SPREAD = "tau / spread at the start"
RANGE = "tau / interquartile range of the negatives"


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
    Arm("partial_auc", losses.whole_pauc, RATES, RANGE, _values(0.25, 0.05)),
    Arm("recall_at_quantile, implicit", losses.moving_recall, RATES, SPREAD, _values(0.25, 0.05)),
    Arm("partial_auc, implicit", losses.moving_pauc, RATES, RANGE, _values(0.25, 0.05)),
)
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


def of_model(arm: Arm, model: str) -> Arm:
    """The arm at the learning rates of this model."""
    return arm._replace(rates=tuple(rate * SCALE[model] for rate in arm.rates))
