"""RetrievalLoss over processes: the references of all, and the gradient of one process.

`test_distributed` runs this in eager code.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from proxy_losses import RetrievalLoss

from . import processes

SHARD = (5, 2)  # rows of each process, of the compiled run
WAYS = ("rows", "references", "relevance")


def whole(rows: int, seed: int) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    labels = torch.randint(2, (rows,), generator=g)
    labels[seed] = -100
    return torch.randn(rows, 4, generator=g, dtype=torch.float64), labels


def train(shard, rank: int | None, way: str, steps: int = 3, *, compiled: bool = False) -> dict:
    """Steps of one process with all rows (rank None), or of one rank with its own."""
    torch.manual_seed(0)
    model = nn.Linear(4, 3).double()
    net = model if rank is None else DistributedDataParallel(model)
    size = 0 if way == "relevance" else 9
    loss_fn = RetrievalLoss("auroc", temperature=0.5, memory_size=size, embedding_dim=3)
    call = torch.compile(loss_fn, fullgraph=True, backend="aot_eager") if compiled else loss_fn
    start = sum(shard[: rank or 0])
    mine = slice(None) if rank is None else slice(start, start + shard[rank])
    losses, grads = [], []
    for step in range(steps):
        (x, y), (r, z) = whole(sum(shard), step), whole(sum(shard), step + 3)
        ids = {"row_ids": torch.arange(sum(shard))[mine]}
        model.zero_grad()
        if way == "rows":
            loss = call(net(x[mine]), y[mine], **ids)
        else:
            both = net(torch.cat([x[mine], r if way == "relevance" else r[mine]]))
            queries, refs = both[: len(x[mine])], both[len(x[mine]) :]
            if way == "relevance":  # of references that all processes have
                loss = call(queries, y[mine, None] == z, refs)
            else:
                loss = call(queries, y[mine], refs, z[mine], **ids, ref_row_ids=ids["row_ids"] + 1)
        loss.backward()
        losses.append(loss.item())
        grads.append([p.grad.clone() for p in model.parameters()])
    memory = [] if loss_fn.memory is None else list(loss_fn.memory)
    return {"losses": losses, "grads": grads, "memory": memory}


def each(shard, rank: int, gather: bool | None) -> list[float]:
    """The losses of the queries of this process."""
    x, y = whole(sum(shard), 0)
    mine = slice(sum(shard[:rank]), sum(shard[: rank + 1]))
    loss_fn = RetrievalLoss(reduction="none", gather_distributed=gather)
    return loss_fn(x[mine], y[mine]).tolist()


def worker(rank: int) -> dict:
    return train(SHARD, rank, "rows", 2, compiled=True)


def assert_as_one_process(ranks: list[dict], shard, way: str, steps: int = 3) -> None:
    alone = train(shard, None, way, steps)
    for found in ranks:
        # Float64 sums of some dozen terms in another order: far below 1e-10 relative.
        torch.testing.assert_close(found["losses"], alone["losses"], rtol=1e-10, atol=0.0)
        for got, want in zip(found["grads"], alone["grads"], strict=True):
            scale = max(w.abs().max() for w in want).item()
            assert scale > 1e-4, "a gradient of zero would prove nothing"
            torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10 * scale)
        assert all(map(torch.equal, found["memory"], ranks[0]["memory"]))
        torch.testing.assert_close(found["memory"], alone["memory"], rtol=1e-6, atol=1e-6)


def assert_each_query_is_of_its_process(ranks: list[list[list[float]]], shard) -> None:
    """With "none": gathered, and by itself."""
    x, y = whole(sum(shard), 0)
    start = 0
    every = RetrievalLoss(reduction="none")(x, y)
    for found, n in zip(ranks, shard, strict=True):
        mine = slice(start, start + n)
        start += n
        own = RetrievalLoss(reduction="none")(x[mine], y[mine])
        for got, want in zip(found, (every[mine], own), strict=True):
            got = torch.tensor(got, dtype=torch.float64)
            torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12, equal_nan=True)


@pytest.mark.slow
def test_compiled_code_gathers_as_eager_code():
    assert_as_one_process(processes.run(2, worker), SHARD, "rows", 2)
