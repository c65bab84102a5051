"""A loss inside the module that DistributedDataParallel wraps: its buffers are broadcast."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import proxy_losses as P

from . import processes

STEPS = 3


class Trained(nn.Module):
    """A model that returns its own loss."""

    def __init__(self, how: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Linear(3, 1).double()
        self.loss = P.SmoothAPLoss(1, queue_size=16, temperature=0.3, distributed=how)

    def forward(self, x, targets):
        return self.loss(self.net(x), targets)


def trained(rank: int, how: str, broadcast: bool) -> tuple[str, torch.Tensor]:
    """The error, if any, and the logits that are stored afterwards."""
    model = DistributedDataParallel(Trained(how), broadcast_buffers=broadcast)
    told = ""
    try:
        for step in range(STEPS):
            torch.manual_seed(10 * step + rank)
            model(torch.randn(5, 3, dtype=torch.float64), torch.arange(5) % 2).backward()
    except RuntimeError as error:
        told = str(error)
    return told, model.module.loss._queue.state.logits


def worker(rank: int, *cases: tuple[str, bool]) -> list[tuple[str, torch.Tensor]]:
    return [trained(rank, *case) for case in cases]


def run(*cases: tuple[str, bool]):
    """Of each case what both processes found."""
    return zip(*processes.run(2, worker, *cases), strict=True)


def test_a_sharded_queue_that_was_overwritten_raises_on_every_process():
    (found,) = run(("shard", True))
    for told, _ in found:
        assert "broadcast_buffers=False" in told


@pytest.mark.slow
def test_gathered_queues_are_alike_and_sharded_ones_each_process_own():
    """A broadcast changes nothing of the former; the latter need to go without."""
    *gathered, shard = run(("gather", True), ("gather", False), ("shard", False))
    for (told, first), (_, second) in gathered:
        assert told == ""
        assert torch.equal(first, second)
    (told, first), (_, second) = shard
    assert told == ""
    assert not torch.equal(first, second)
