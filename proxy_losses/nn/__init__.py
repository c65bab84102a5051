"""Stateful adapters: `torch.nn.Module` shims over the functional core."""

from ._batch import ScheduledLoss
from ._late import set_debug
from ._pointwise import SigmoidFocalLoss, SoftmaxFocalLoss
from ._queue import MemoryQueue
from ._ranking import (
    AUROCLoss,
    MRRLoss,
    NDCGLoss,
    PAUCAtBudgetLoss,
    PrecisionAtKLoss,
    RankingLoss,
    RecallAtKLoss,
    RecallAtQuantileLoss,
    SmoothAPLoss,
)
from ._retrieval import RetrievalLoss
from ._wrapper import LossWarmupWrapper

__all__ = [
    "AUROCLoss",
    "LossWarmupWrapper",
    "MRRLoss",
    "NDCGLoss",
    "MemoryQueue",
    "PAUCAtBudgetLoss",
    "PrecisionAtKLoss",
    "RankingLoss",
    "RecallAtKLoss",
    "RecallAtQuantileLoss",
    "RetrievalLoss",
    "ScheduledLoss",
    "SigmoidFocalLoss",
    "SmoothAPLoss",
    "SoftmaxFocalLoss",
    "set_debug",
]
