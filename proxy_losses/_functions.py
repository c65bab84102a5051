"""What the functions of autograd share: they work in compiled code, and with batched gradients."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

F = TypeVar("F", bound=Callable[..., Any])


def in_graph(function: type[torch.autograd.Function]) -> Callable[..., Any]:
    """Keep its backward where a gradient is taken inside a compiled function."""

    def apply(*args: Any) -> Any:
        return function.apply(*args)

    return torch.compiler.allow_in_graph(apply)  # type: ignore[no-any-return]


def takes_batches(backward: F) -> F:
    """Make the backward of a Function right for ``torch.autograd.grad(is_grads_batched=True)``.

    Torch runs it under its first vmap, which sits above autograd: the graph of what a Function
    returns there is lost without a word, and ops have no batching rule. That of torch.func has
    both. `jacobian` and `hessian` of torch.autograd.functional come here with ``vectorize=True``.
    """

    @functools.wraps(backward)
    def run(ctx: Any, *grads: Tensor | None) -> Any:
        batched = [x is not None and _is_legacy_batched(x) for x in grads]
        if not any(batched):
            return backward(ctx, *grads)
        flat: list[Any] = [
            torch._remove_batch_dim(x, 1, 1, 0) if b else x  # type: ignore[arg-type]
            for x, b in zip(grads, batched, strict=True)
        ]
        dims = tuple(0 if b else None for b in batched)
        given: list[bool] = []

        def each(*grads: Tensor | None) -> tuple[Tensor, ...]:
            found = backward(ctx, *grads)
            given[:] = [x is not None for x in found]
            return tuple(x for x in found if x is not None)

        found = iter(torch.func.vmap(each, in_dims=dims)(*flat))
        return tuple(torch._add_batch_dim(next(found), 0, 1) if x else None for x in given)

    return run  # type: ignore[return-value]


def _is_legacy_batched(x: Tensor) -> bool:
    return torch._C._functorch.is_legacy_batchedtensor(x)
