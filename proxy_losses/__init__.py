"""Differentiable proxies of ranking metrics for imbalanced data.

A pure-functional core (`smooth_ap`, `recall_at_quantile`, `temp_at`, `blend_weight`, ...) with
explicit immutable state, and thin modules over it (`SmoothAPLoss`, `LossWarmupWrapper`, ...).
Metrics are values in [0, 1], larger is better (`smooth_auroc` has one without a floor); losses are
1 - value.

A list is a set of rows that are ranked against each other. In shapes M is the number of rows in a
list, N that of rows in a batch, and C that of classes; "..." are any leading axes. The examples
assume ``import torch`` and ``from proxy_losses import *``.

Further modules: `proxy_losses.nn` (what the losses share), `proxy_losses.distributed`, the
callbacks of `proxy_losses.integrations.lightning` and `proxy_losses.integrations.huggingface`, and
the estimators of `proxy_losses.integrations.sklearn`.
"""

from typing import Any

from ._lists import QueryLists, RetrievalLists, query_lists, retrieval_lists
from ._losses import (
    partial_auc_loss,
    precision_at_k_loss,
    recall_at_k_loss,
    recall_at_precision_loss,
    recall_at_quantile_loss,
    smooth_ap_loss,
    smooth_auroc_loss,
    smooth_mrr_loss,
    smooth_ndcg_loss,
)
from ._metrics.at_k import precision_at_k, recall_at_k
from ._metrics.at_precision import recall_at_precision
from ._metrics.focal import sigmoid_focal, softmax_focal
from ._metrics.partial_auc import partial_auc, partial_auc_defined
from ._metrics.recall import recall_at_quantile, recall_defined, recall_saturation
from ._metrics.smooth_ap import smooth_ap, smooth_ap_defined, smooth_ap_saturation
from ._metrics.smooth_auroc import smooth_auroc, smooth_auroc_defined
from ._metrics.smooth_mrr import smooth_mrr, smooth_mrr_defined
from ._metrics.smooth_ndcg import smooth_ndcg, smooth_ndcg_defined
from ._old_names import old_name
from ._quantiles import score_spread
from ._queue import QueueState, enqueue, init_queue, queue_rows, reset_queue
from ._ranks import SoftRanks, sigmoid_sums, soft_ranks
from ._retrieval import (
    MemoryState,
    enqueue_embeddings,
    init_memory,
    reset_memory,
    retrieval_loss,
)
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
from .distributed import all_gather_no_grad, all_gather_with_grad
from .nn import (
    AUROCLoss,
    LossWarmupWrapper,
    MRRLoss,
    NDCGLoss,
    PAUCAtBudgetLoss,
    PrecisionAtKLoss,
    RecallAtKLoss,
    RecallAtPrecisionLoss,
    RecallAtQuantileLoss,
    RetrievalLoss,
    SigmoidFocalLoss,
    SmoothAPLoss,
    SoftmaxFocalLoss,
    set_debug,
)

__version__ = "0.4.0"


def __getattr__(name: str) -> Any:
    return old_name(__name__, globals(), name)


__all__ = [
    "AUROCLoss",
    "MRRLoss",
    "NDCGLoss",
    "QueryLists",
    "LossWarmupWrapper",
    "MemoryState",
    "PAUCAtBudgetLoss",
    "PrecisionAtKLoss",
    "QueueState",
    "RecallAtKLoss",
    "RecallAtPrecisionLoss",
    "RecallAtQuantileLoss",
    "RetrievalLists",
    "RetrievalLoss",
    "Schedule",
    "ScheduleState",
    "SigmoidFocalLoss",
    "SmoothAPLoss",
    "SoftRanks",
    "SoftmaxFocalLoss",
    "__version__",
    "all_gather_no_grad",
    "all_gather_with_grad",
    "blend_weight",
    "enqueue",
    "enqueue_embeddings",
    "query_lists",
    "in_blend",
    "in_warmup",
    "init_memory",
    "init_queue",
    "init_schedule",
    "partial_auc",
    "partial_auc_defined",
    "partial_auc_loss",
    "precision_at_k",
    "precision_at_k_loss",
    "queue_rows",
    "recall_at_k",
    "recall_at_k_loss",
    "recall_at_precision",
    "recall_at_precision_loss",
    "recall_at_quantile",
    "recall_at_quantile_loss",
    "recall_defined",
    "recall_saturation",
    "reset_memory",
    "reset_queue",
    "score_spread",
    "set_debug",
    "retrieval_lists",
    "retrieval_loss",
    "sigmoid_focal",
    "sigmoid_sums",
    "smooth_ap",
    "smooth_ap_defined",
    "smooth_ap_loss",
    "smooth_ap_saturation",
    "smooth_auroc",
    "smooth_auroc_defined",
    "smooth_auroc_loss",
    "smooth_mrr",
    "smooth_mrr_defined",
    "smooth_mrr_loss",
    "smooth_ndcg",
    "smooth_ndcg_defined",
    "smooth_ndcg_loss",
    "soft_ranks",
    "softmax_focal",
    "start_epoch",
    "start_step",
    "state_temp",
    "state_weight",
    "temp_at",
]
