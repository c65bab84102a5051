"""A model sharded by FSDP2, the loss outside of it: the gradient of one process."""

from __future__ import annotations

import pytest
import torch
from torch.distributed.fsdp import fully_shard

import proxy_losses as P

from . import processes

CUTS = [(0, 7), (7, 20)]  # rows of each process


def net() -> torch.nn.Sequential:
    torch.manual_seed(0)
    layers = torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1)
    return torch.nn.Sequential(*layers).double()


def off(how: str, mine: slice) -> float:
    """The largest difference of a gradient from that of one process, over the largest gradient."""
    model, alone = net(), net()
    for layer in (model[0], model[2], model):
        fully_shard(layer)
    x, targets = torch.randn(20, 4, dtype=torch.float64), torch.arange(20) % 3 // 2
    P.SmoothAPLoss(1, queue_size=0, temperature=0.3, distributed=how)(
        model(x[mine]), targets[mine]
    ).backward()
    P.smooth_ap_loss(alone(x), targets, None, 0.3)[0].backward()
    pairs = zip(model.parameters(), alone.parameters(), strict=True)
    each = [float((p.grad.full_tensor() - q.grad).abs().max()) for p, q in pairs]
    return max(each) / max(float(q.grad.abs().max()) for q in alone.parameters())


def worker(rank: int) -> dict[str, float]:
    return {how: off(how, slice(*CUTS[rank])) for how in ("gather", "shard")}


@pytest.mark.slow
def test_the_gradient_is_that_of_one_process():
    for found in processes.run(2, worker):
        # Float64 sums of 20 rows, sharded ranks within rtol 1e-12.
        assert all(value < 1e-11 for value in found.values()), found
