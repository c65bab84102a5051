"""Stateful adapters: `torch.nn.Module` shims over the functional core."""

from ._base import RankingLoss
from ._losses import PAUCAtBudgetLoss, RecallAtQuantileLoss, SmoothAPLoss
from ._pointwise import SigmoidFocalLoss, SoftmaxFocalLoss
from ._queue import MemoryQueue
from ._wrapper import LossWarmupWrapper

__all__ = [
    "LossWarmupWrapper",
    "MemoryQueue",
    "PAUCAtBudgetLoss",
    "RankingLoss",
    "RecallAtQuantileLoss",
    "SigmoidFocalLoss",
    "SmoothAPLoss",
    "SoftmaxFocalLoss",
]
