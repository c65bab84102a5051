"""What fuzz tests draw: values of every kind for an argument, tensors with something wrong."""

from __future__ import annotations

import decimal
import fractions
import math
import traceback
from typing import Any

import numpy as np
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from torch import Tensor

from .makers import PAD

FUZZ = settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)

# Sizes stay small (or beyond 64 bits): what is too large for the memory is not checked.
NUMBERS = st.one_of(
    st.integers(-3, 40), st.sampled_from([2**63, -(2**70), 10**400]), st.floats(),
    st.sampled_from([0.5, 1.0, -0.0, 1e-300, 1e300, 5e-324, math.nan, math.inf]),
    st.sampled_from([np.float32(0.25), np.int64(3), np.bool_(True), np.float16(0.5)]),
    st.sampled_from([fractions.Fraction(1, 3), decimal.Decimal("0.5"), 1j, True, False]),
)  # fmt: skip
TENSORS = st.sampled_from([
    torch.tensor(0.5), torch.tensor(3), torch.tensor(True), torch.tensor(math.nan), torch.ones(2),
    torch.ones(0), torch.tensor(1j), np.ones(2),
])  # fmt: skip
WORDS = st.sampled_from([
    "mean", "sum", "none", "higher", "linear", "nearest", "trapezoid", "pairwise", "iqr", "band",
    "pool", "live", "fpr", "population", "score", "spread", "", "Mean", b"mean",
])  # fmt: skip
OTHERS = st.sampled_from([None, [], (), (2, 3), [2, 3], (2, 0), (2, 3, 4), {}, object(), len, int])
ANYTHING = st.one_of(NUMBERS, TENSORS, WORDS, OTHERS)


def documented(error: Exception, name: str = "") -> None:
    """Raised by a check of ours, not deep inside, and it names what is wrong."""
    last = traceback.extract_tb(error.__traceback__)[-1].filename
    assert "proxy_losses" in last, f"from the depths: {error!r}"
    assert name in str(error)


DTYPES = [
    torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.int8, torch.uint8,
    torch.int16, torch.int32, torch.int64, torch.uint16, torch.uint32, torch.uint64, torch.bool,
    torch.complex64, torch.float8_e4m3fn,
]  # fmt: skip
FLOATS = DTYPES[:4]
SPECIAL = [math.nan, math.inf, -math.inf, 1e38, -1e38, 3.4e38, 1e300, 1e-45, 0.0, 70000.0]
SHAPES = [(), (0,), (1,), (4, 1), (1, 4), (4, 3, 2), (5,), (2, 4)]
NO_TENSOR = [None, 1.0, True, "x", [0, 1, 0, 1], np.zeros(4)]


def maybe(data, name: str, usual: Tensor | None, odds: int = 6) -> Any:
    """The usual value, or now and then one of a wrong dtype, shape, content or kind."""
    kind = data.draw(st.integers(0, odds), name)
    if usual is None or kind > 3:
        return usual
    if kind == 0:
        return usual.to(data.draw(st.sampled_from(DTYPES), f"{name}: dtype"))
    if kind == 1:
        return torch.zeros(data.draw(st.sampled_from(SHAPES)), dtype=usual.dtype)
    if kind == 2:
        return data.draw(st.sampled_from(NO_TENSOR), f"{name}: kind")
    out = usual.double() if usual.is_floating_point() else usual.clone()
    if out.numel():
        spot = data.draw(st.integers(0, out.numel() - 1), f"{name}: where")
        fill = SPECIAL if usual.is_floating_point() else [-1, 7, PAD, -(2**31)]
        out.view(-1)[spot] = data.draw(st.sampled_from(fill), f"{name}: what")
    return out.to(usual.dtype)


def a_batch(data, classes: int) -> dict[str, Any]:
    """Arguments of a call, most of them good."""
    torch.manual_seed(data.draw(st.integers(0, 99), "seed"))
    n = data.draw(st.sampled_from([0, 1, 2, 4, 4, 9]), "rows")
    logits = torch.randn(n, classes, dtype=data.draw(st.sampled_from([torch.float32, *FLOATS])))
    targets = torch.randint(0, max(classes, 2), (n,))
    if n > 2:
        targets[n // 2] = PAD
    if classes > 1 and data.draw(st.integers(0, 9), "labels") == 0:
        targets = torch.rand(n, classes) < 0.5
    rows = {
        "sample_weight": torch.rand(n), "iid_mask": torch.rand(n) < 0.8,
        "query_ids": torch.randint(0, 2, (n,)), "label_mask": torch.rand(n, classes) < 0.7,
    }  # fmt: skip
    given_rows = data.draw(st.sets(st.sampled_from(list(rows))))
    call = {"logits": logits, "targets": targets, **{k: rows[k] for k in sorted(given_rows)}}
    return {name: maybe(data, name, x) for name, x in call.items()}
