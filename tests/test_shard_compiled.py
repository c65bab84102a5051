"""Compiled functions over a group, on ranks whose shards differ and are compiled apart."""

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import proxy_losses as P

from . import processes, shards
from .test_shard import assert_near

CUTS = (0, 33)


def worker(rank: int) -> dict:
    """Compiled losses over a group, and a compiled gather."""
    out: dict[Any, Any] = {}
    out["train"] = shards.train(CUTS, rank, dist.group.WORLD, compiled=True)

    def gathered(x: Tensor, weight: Tensor) -> Tensor:
        rows, mass = P.all_gather_with_grad(x, weight)
        return (torch.sigmoid(rows[:, None] - rows) * mass).sum()

    x = torch.arange(5.0)[: 3 + rank].requires_grad_()
    for name, fn in (("eager", gathered), ("compiled", torch.compile(gathered, fullgraph=True))):
        loss = fn(x, x.detach() + 1.0)
        out[name] = loss.detach(), torch.autograd.grad(loss, x)[0]
    return out


@pytest.mark.slow
def test_compiled_losses_and_gathers_are_those_of_eager_code():
    """Two independent losses, one rank without rows: the order of collectives must hold."""
    found = processes.run(2, worker)
    loss, grads = shards.train(CUTS, None, None)
    for out in found:
        assert_near(out["train"][0], loss, loss)
        for got, want in zip(out["train"][1], grads, strict=True):
            assert_near(got, want, want)
        for got, want in zip(out["compiled"], out["eager"], strict=True):
            # float32 sums of a few dozen terms in another order.
            torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
