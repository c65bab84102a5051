"""The two ops on a GPU, in Triton. Imported only where it runs."""

from .launch import pair_sums, rank_mean

__all__ = ["pair_sums", "rank_mean"]
