"""Ops that talk to other processes, kept in their order when compiled.

Ranks whose shards differ in size are compiled apart. Without care a compiler drops a collective
whose result an empty shard does not need, or exchanges two of them to save memory, on one rank and
not on the other: then all wait for ever. So collectives are registered as ordered side effects.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch._higher_order_ops.effects import _EffectType as EffectType
from torch._higher_order_ops.effects import _register_effectful_op

LIBRARY = torch.library.Library("proxy_losses", "FRAGMENT")


def _keep_order(op: Any) -> None:
    """Have inductor run this op after the collective before it, once inductor is loaded.

    2.13 notes that dependency under the name of a buffer; its scheduler asks for the operation.
    """
    lowering = sys.modules.get("torch._inductor.lowering")
    if lowering is None or op in lowering.lowerings:
        return
    plain = lowering.fallback_handler(op, add_to_fallback_set=False)

    def lower(*args: Any) -> Any:
        graph, effect = lowering.V.graph, EffectType.ORDERED
        after = getattr(graph, "additional_star_deps", None)  # not in every version
        known, last = len(graph.operations), graph.effectful_ops.get(effect)
        out = plain(*args)
        for new in graph.operations[known:]:
            new.has_side_effects = lambda: True
            if last and after is not None:
                after[new.get_operation_name()].add(last.get_name())
            graph.effectful_ops[effect] = new
        return out

    lowering.lowerings[op] = lower


def register(
    name: str, function: Callable[..., Any], fake: Callable[..., Any], *, collective: bool = True,
    effect: bool = True,
) -> None:  # fmt: skip
    """Register an op with its fake. An effect may not have a size that only its result tells."""
    for device in ("CPU", "CUDA"):
        LIBRARY.impl(name, function, device)
    op = getattr(torch.ops.proxy_losses, name).default

    def traced(*args: Any) -> Any:
        if collective:
            _keep_order(op)
        return fake(*args)

    torch.library.register_fake(f"proxy_losses::{name}", traced, lib=LIBRARY)
    if collective and effect:
        _register_effectful_op(op, EffectType.ORDERED)
