"""RetrievalLoss over processes: the references of all, and the gradient of one process."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from proxy_losses import RetrievalLoss

from . import shards

SHARDS = [(4, 4), (5, 2), (0, 6)]  # rows of each process
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
    x, y = whole(sum(shard), 0)
    mine = slice(sum(shard[:rank]), sum(shard[: rank + 1]))
    loss_fn = RetrievalLoss(reduction="none", gather_distributed=gather)
    return loss_fn(x[mine], y[mine]).tolist()


def worker(rank: int, world: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/meet", rank=rank, world_size=world)
    out = {(shard, way): train(shard, rank, way) for shard in SHARDS for way in WAYS}
    out["each"] = [each(SHARDS[0], rank, gather) for gather in (None, False)]
    torch.save(out, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def compiled_worker(rank: int, world: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/meet", rank=rank, world_size=world)
    found = train(SHARDS[1], rank, "rows", 2, compiled=True)
    torch.save({(SHARDS[1], "rows"): found}, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def assert_as_one_process(ranks: list[dict], shard, way: str, steps: int = 3) -> None:
    alone = train(shard, None, way, steps)
    for out in ranks:
        found = out[shard, way]
        # Float64 sums of some dozen terms in another order: far below 1e-10 relative.
        torch.testing.assert_close(found["losses"], alone["losses"], rtol=1e-10, atol=0.0)
        for got, want in zip(found["grads"], alone["grads"], strict=True):
            scale = max(w.abs().max() for w in want).item()
            assert scale > 1e-4, "a gradient of zero would prove nothing"
            torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10 * scale)
        assert all(map(torch.equal, found["memory"], ranks[0][shard, way]["memory"]))
        torch.testing.assert_close(found["memory"], alone["memory"], rtol=1e-6, atol=1e-6)


def test_gradients_are_those_of_one_process(tmp_path):
    ranks = shards.run(2, tmp_path, worker)
    for shard in SHARDS:
        for way in WAYS:
            assert_as_one_process(ranks, shard, way)
    shard, nan = SHARDS[0], {"equal_nan": True}
    x, y = whole(sum(shard), 0)
    every = RetrievalLoss(reduction="none")(x, y)
    gathered = torch.tensor([v for out in ranks for v in out["each"][0]])
    torch.testing.assert_close(gathered.double(), every, rtol=1e-6, atol=1e-6, **nan)
    for k, out in enumerate(ranks):
        mine = slice(4 * k, 4 * k + 4)
        own = RetrievalLoss(reduction="none")(x[mine], y[mine])
        torch.testing.assert_close(torch.tensor(out["each"][1]).double(), own, **nan,
                                   rtol=1e-6, atol=1e-6)  # fmt: skip


@pytest.mark.slow
def test_compiled_code_gathers_as_eager_code(tmp_path):
    assert_as_one_process(shards.run(2, tmp_path, compiled_worker), SHARDS[1], "rows", 2)
