"""The metrics: one file each, and the roll of those that have a loss."""

from ._record import Example, Found, Metric, Option, examples, over_lists, table_row
from .at_k import PRECISION_AT_K, RECALL_AT_K
from .partial_auc import PARTIAL_AUC
from .recall import RECALL
from .smooth_ap import SMOOTH_AP
from .smooth_auroc import AUROC
from .smooth_mrr import MRR
from .smooth_ndcg import NDCG

__all__ = [
    "AUROC", "METRICS", "MRR", "NDCG", "PARTIAL_AUC", "PRECISION_AT_K", "RECALL", "RECALL_AT_K",
    "SMOOTH_AP", "Example", "Found", "Metric", "Option", "examples", "over_lists", "table_row",
]  # fmt: skip

# A new metric joins here.
METRICS = (SMOOTH_AP, RECALL, PARTIAL_AUC, PRECISION_AT_K, RECALL_AT_K, AUROC, MRR, NDCG)
