"""Differentiable proxies of ranking metrics for imbalanced data.

A pure-functional core (`smooth_ap`, `recall_at_quantile`, `temp_at`, `blend_weight`, ...) with
explicit immutable state, and thin modules over it (`SmoothAPLoss`, `LossWarmupWrapper`, ...).
"""

from ._queue import QueueState, enqueue, init_queue, queue_rows, reset_queue
from ._ranks import SoftRanks, sigmoid_sums, soft_ranks
from ._recall import recall_at_quantile, recall_counts
from ._retrieval import RetrievalLists, retrieval_lists
from ._schedule import (
    Schedule,
    ScheduleState,
    blend_weight,
    in_blend,
    in_warmup,
    init_schedule,
    start_epoch,
    start_step,
    state_temp,
    state_weight,
    temp_at,
)
from ._smooth_ap import smooth_ap, smooth_ap_counts
from ._step import recall_at_quantile_loss, smooth_ap_loss
from .distributed import all_gather_no_grad, all_gather_with_grad
from .nn import LossWarmupWrapper, RecallAtQuantileLoss, SmoothAPLoss

__version__ = "0.2.0"

__all__ = [
    "LossWarmupWrapper",
    "QueueState",
    "RecallAtQuantileLoss",
    "RetrievalLists",
    "Schedule",
    "ScheduleState",
    "SmoothAPLoss",
    "SoftRanks",
    "__version__",
    "all_gather_no_grad",
    "all_gather_with_grad",
    "blend_weight",
    "enqueue",
    "in_blend",
    "in_warmup",
    "init_queue",
    "init_schedule",
    "queue_rows",
    "recall_at_quantile",
    "recall_at_quantile_loss",
    "recall_counts",
    "reset_queue",
    "retrieval_lists",
    "sigmoid_sums",
    "smooth_ap",
    "smooth_ap_counts",
    "smooth_ap_loss",
    "soft_ranks",
    "start_epoch",
    "start_step",
    "state_temp",
    "state_weight",
    "temp_at",
]
