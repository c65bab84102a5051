"""Compile whole functions and count how often that happened."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch._dynamo.utils


def compile_fresh(
    fn: Callable[..., Any], backend: str = "inductor"
) -> tuple[Callable[..., Any], Callable[[], int]]:
    """(fn compiled as one graph, a function that says how many graphs were compiled since)."""
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()

    def compiles() -> int:
        return int(torch._dynamo.utils.counters["stats"]["unique_graphs"])

    return torch.compile(fn, fullgraph=True, backend=backend), compiles
