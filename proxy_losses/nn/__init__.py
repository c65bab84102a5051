"""Stateful adapters: `torch.nn.Module` shims over the functional core."""

from ._late import set_debug
from ._pointwise import SigmoidFocalLoss, SoftmaxFocalLoss
from ._queue import MemoryQueue
from ._ranking import (
    AUROCLoss,
    MRRLoss,
    PAUCAtBudgetLoss,
    PrecisionAtKLoss,
    RankingLoss,
    RecallAtKLoss,
    RecallAtPrecisionLoss,
    RecallAtQuantileLoss,
    SmoothAPLoss,
)
from ._wrapper import LossWarmupWrapper

__all__ = [
    "AUROCLoss",
    "LossWarmupWrapper",
    "MRRLoss",
    "MemoryQueue",
    "PAUCAtBudgetLoss",
    "PrecisionAtKLoss",
    "RankingLoss",
    "RecallAtKLoss",
    "RecallAtPrecisionLoss",
    "RecallAtQuantileLoss",
    "SigmoidFocalLoss",
    "SmoothAPLoss",
    "SoftmaxFocalLoss",
    "set_debug",
]
