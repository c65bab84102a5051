"""The ops on a GPU, in Triton. Imported only where it runs."""

from .launch import pair_sums, rank_mean
from .ring import count_rows, keeps, put_rows

__all__ = ["count_rows", "keeps", "pair_sums", "put_rows", "rank_mean"]
