"""A loss inside the module that DistributedDataParallel wraps: its buffers are broadcast."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import proxy_losses as P

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


def worker(rank: int, folder: str, how: str, broadcast: bool) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/meet", rank=rank, world_size=2)
    model = DistributedDataParallel(Trained(how), broadcast_buffers=broadcast)
    told = ""
    try:
        for step in range(STEPS):
            torch.manual_seed(10 * step + rank)
            model(torch.randn(5, 3, dtype=torch.float64), torch.arange(5) % 2).backward()
    except RuntimeError as error:
        told = str(error)
    stored = model.module.loss._queue.state.logits
    torch.save((told, stored), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def run(how: str, broadcast: bool):
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(worker, (folder, how, broadcast), nprocs=2)
        return [torch.load(Path(folder, f"{r}.pt"), weights_only=True) for r in range(2)]


@pytest.mark.slow
@pytest.mark.parametrize("broadcast", [True, False])
def test_gathered_queues_are_alike_so_a_broadcast_changes_nothing(broadcast):
    (told, first), (_, second) = run("gather", broadcast)
    assert told == ""
    assert torch.equal(first, second)


def test_a_sharded_queue_that_was_overwritten_raises_on_every_process():
    for told, _ in run("shard", True):
        assert "broadcast_buffers=False" in told


def test_a_sharded_queue_without_broadcast_is_each_process_own():
    (told, first), (_, second) = run("shard", False)
    assert told == ""
    assert not torch.equal(first, second)
