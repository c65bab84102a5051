"""The metrics: one file each, and the roll of those that have a loss."""

from ._record import Example, Found, Metric, Option, examples, over_lists, table_row
from .partial_auc import PARTIAL_AUC
from .recall import RECALL
from .smooth_ap import SMOOTH_AP

__all__ = [
    "METRICS", "PARTIAL_AUC", "RECALL", "SMOOTH_AP", "Example", "Found", "Metric", "Option",
    "examples", "over_lists", "table_row",
]  # fmt: skip

METRICS = (SMOOTH_AP, RECALL, PARTIAL_AUC)  # a new metric joins here
