"""The ops on a GPU, in Triton. Imported only where it runs."""

from .launch import pair_sums, rank_mean
from .ring import count_rows, keeps, put_rows
from .steps import first_rank, ideal_share, mean_above, precision_place, relative_gains

__all__ = [
    "count_rows", "first_rank", "ideal_share", "keeps", "mean_above", "pair_sums",
    "precision_place", "put_rows", "rank_mean", "relative_gains",
]  # fmt: skip
