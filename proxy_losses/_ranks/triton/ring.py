"""Rows into the slots of a queue on a GPU, see `nn/_ring.py`."""

import torch
import triton
from torch import Tensor

from ..._checks import MAX_WEIGHT
from .kernels import judge_batch, place_rows, seal_count
from .launch import TYPES

BLOCK = 1024


def put_rows(
    buffer: Tensor, rows: Tensor | None, value: int, n: int, count: Tensor, where: Tensor
) -> None:
    """Launch `place_rows`."""
    capacity = buffer.shape[0]
    width, kept = buffer.numel() // capacity, min(n, capacity)
    given = buffer if rows is None else rows.contiguous()
    place_rows[(triton.cdiv(kept * width, BLOCK),)](
        _bytes(given), _bytes(buffer), count, _bytes(where), value, n - kept, kept, width, capacity,
        GIVEN=rows is not None, FRESH=n >= capacity, BLOCK=BLOCK,
    )  # fmt: skip


def count_rows(
    count: Tensor, seal: Tensor, mark: Tensor, before: Tensor, where: Tensor, n: int,
    capacity: int, constants: list[int],
) -> None:  # fmt: skip
    """Launch `seal_count`."""
    turn, factor, bits = constants
    seal_count[(1,)](
        count, seal, mark, before, _bytes(where), n, capacity, FRESH=n >= capacity, TURN=turn,
        FACTOR=factor, BITS=bits,
    )  # fmt: skip


def keeps(
    logits: Tensor, targets: Tensor, weight: Tensor | None, gains: Tensor | None, valid: Tensor,
    dtype: torch.dtype, ignore_index: int,
) -> Tensor:  # fmt: skip
    """Launch `judge_batch`."""
    keep = torch.empty((), dtype=torch.bool, device=logits.device)
    logits, valid = logits.contiguous(), _bytes(valid.contiguous())
    weighted, ids = weight is not None, targets.dim() == 1
    judge_batch[(1,)](
        logits, _bytes(targets.contiguous()) if ids else valid,
        valid if weight is None else weight.contiguous(),
        valid if gains is None else gains.contiguous(), valid, keep.view(torch.int8),
        *logits.shape, valid.shape[0], ignore_index, IDS=ids, WEIGHTED=weighted,
        GRADED=gains is not None, LIMIT=MAX_WEIGHT, DT=TYPES[dtype], BLOCK=4096, num_warps=8,
    )  # fmt: skip
    return keep


def _bytes(x: Tensor) -> Tensor:
    """Bools as bytes."""
    return x.view(torch.uint8) if x.dtype == torch.bool else x
