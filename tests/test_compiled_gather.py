"""Modules that gather, with a queue, inside compiled code: unequal shards, each compiled apart."""

from __future__ import annotations

import pytest
import torch

import proxy_losses as P

from . import processes

ROWS = (5, 3)  # of each process; a size that changes is compiled anew
LOSSES = {
    "SmoothAPLoss": {},
    "RecallAtQuantileLoss": {"quantile": 0.3},
    "PAUCAtBudgetLoss": {"beta": 0.3},
}


def worker(rank: int) -> dict:
    out = {}
    for name, kwargs in LOSSES.items():
        make = getattr(P, name)
        eager, twin = (make(1, queue_size=12, temperature=0.3, **kwargs) for _ in "ab")
        compiled = torch.compile(twin, fullgraph=True, backend="aot_eager")
        off = 0.0
        for step in range(4):
            torch.manual_seed(2 * step + rank)
            x, targets = torch.randn(ROWS[rank], 1), torch.arange(ROWS[rank]) % 2
            a, b = (x.clone().requires_grad_() for _ in "ab")
            wanted, found = eager(a, targets), compiled(b, targets)
            wanted.backward()
            found.backward()
            off = max(off, float((wanted - found).detach().abs()))
            off = max(off, float((a.grad - b.grad).abs().max()))
        same = map(torch.equal, eager._queue.state, twin._queue.state)
        out[name] = off, all(same)
    return out


@pytest.mark.slow
def test_compiled_modules_with_a_queue_gather_as_eager_ones():
    for out in processes.run(2, worker):
        for name, (off, same) in out.items():
            assert off <= 1e-6, name  # float32, a dozen terms in another order
            assert same, name
