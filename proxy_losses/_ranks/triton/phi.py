"""Functions of soft ranks that kernels know: value, d / dR, d / dR+, as in `_ranks/phi.py`."""

import triton
import triton.language as tl

LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def _precision(rank, rank_pos):
    inverse = 1.0 / rank
    value = rank_pos * inverse
    return value, -value * inverse, inverse


@triton.jit
def _outranked(rank, rank_pos):
    one = tl.zeros_like(rank) + 1.0
    return rank - rank_pos, one, -one


@triton.jit
def _discount(rank, rank_pos):
    past = rank + 1.0
    value = LN2 / tl.log(past)
    return value, -value * value / (LN2 * past), 0.0 * rank


TWINS = {"precision": _precision, "outranked": _outranked, "discount": _discount}
