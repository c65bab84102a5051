"""Functions of soft ranks that kernels know: value, d / dR, d / dR+, as in `_ranks/phi.py`."""

import triton
import triton.language as tl


@triton.jit
def _precision(rank, rank_pos):
    inverse = 1.0 / rank
    value = rank_pos * inverse
    return value, -value * inverse, inverse


@triton.jit
def _outranked(rank, rank_pos):
    one = tl.zeros_like(rank) + 1.0
    return rank - rank_pos, one, -one


TWINS = {"precision": _precision, "outranked": _outranked}
