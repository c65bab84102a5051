"""Gathering over processes, and data-parallel training against one process."""

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.functional import one_hot
from torch.nn.parallel import DistributedDataParallel

import proxy_losses as P

from . import processes
from . import test_retrieval_processes as retrieval

# Rows of each rank: even, uneven, and with an empty rank.
SHARDS = {2: [(4, 4), (5, 2), (0, 6)], 3: [(3, 3, 3), (4, 1, 6), (2, 0, 5)]}
DTYPES = [torch.bool, torch.uint8, torch.int32, torch.int64, torch.float32, torch.float64]
LOSSES = {
    "ap": lambda **kw: P.SmoothAPLoss(3, queue_size=9, temperature=0.5, **kw),
    "recall": lambda **kw: P.RecallAtQuantileLoss(3, 0.3, queue_size=9, temperature=0.5, **kw),
    "pauc": lambda **kw: P.PAUCAtBudgetLoss(
        3, beta=0.5, queue_size=9, temperature=0.5, quantile_interpolation="linear", **kw
    ),
    "pauc_pairs": lambda **kw: LOSSES["pauc"](surrogate="pairwise", pos_numerator="live", **kw),
    "queries": lambda **kw: LOSSES["ap"](**kw),
    "capped": lambda **kw: P.SmoothAPLoss(3, 9, temperature=0.5, max_pool_size=7, **kw),
}
POINTWISE = {
    "softmax": lambda **kw: P.SoftmaxFocalLoss([0.5, 1.0, 2.0], reduction="mean_positive", **kw),
    "sigmoid": lambda **kw: P.SigmoidFocalLoss(**kw),
}
# A class of a small shard may have a single iid negative.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*max_pool_size"),
    pytest.mark.filterwarnings("ignore:.*dispersion"),
]


def whole(rows: int, seed: int = 0):
    """The concatenated batch, alike in all processes: inputs, targets, weights, flags."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, 4, generator=g, dtype=torch.float64)
    targets = torch.randint(3, (rows,), generator=g)
    targets[torch.randperm(rows, generator=g)[0]] = -100
    weight = torch.rand(rows, generator=g, dtype=torch.float64)
    return x, targets, weight, weight > 0.2


def new_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Linear(4, 3).double()


def own_rows(shard, rank) -> slice:
    start = sum(shard[:rank])
    return slice(start, start + shard[rank])


def gather_all(shard, rank) -> dict:
    """What the two helpers return on this rank, and the gradient of a loss that differs by rank."""
    mine, out = own_rows(shard, rank), {}
    for dtype in DTYPES:
        x = (whole(sum(shard))[0] * 3).to(dtype)[mine]
        out[str(dtype)] = P.all_gather_no_grad(x)
        out[f"{dtype}, no columns"] = P.all_gather_no_grad(x[:, :0])
        out[f"{dtype}, expanded"] = P.all_gather_no_grad(x.new_ones(()).expand(len(x), 1))
    x = whole(sum(shard))[0][mine].requires_grad_()
    gathered = P.all_gather_with_grad(x)
    coefficients = torch.arange(gathered.numel()).view_as(gathered) + 100.0 * rank
    (gathered * coefficients).sum().backward()
    out.update(gathered=gathered.detach(), grad=x.grad)
    out["cut"] = P.all_gather_no_grad(x.detach().requires_grad_()).requires_grad
    return out


def train(name: str, shard, rank: int | None, *, weighted: bool, gather=None) -> dict:
    """Two steps of one process with all rows (rank None), or of one rank with its own."""
    model, loss_fn = new_model(), {**LOSSES, **POINTWISE}[name](gather_distributed=gather).double()
    net = model if rank is None else DistributedDataParallel(model)
    losses, grads = [], []
    for step in range(2):
        x, targets, weight, flags = whole(sum(shard), seed=step)
        rows = slice(None) if rank is None else own_rows(shard, rank)
        if name == "sigmoid":
            targets, weight = one_hot(targets.clamp(min=0), 3), weight[:, None]
        extra = {"sample_weight": weight[rows]} if weighted else {}
        if name in LOSSES and weighted:
            extra["iid_mask"] = flags[rows]
        if name == "queries":
            extra["query_ids"] = (torch.arange(len(x)) % 2)[rows]
        model.zero_grad()
        loss = loss_fn(net(x[rows]), targets[rows], **extra)
        loss.backward()
        losses.append(loss.item())
        grads.append([p.grad.clone() for p in model.parameters()])
    queue = list(loss_fn._queue.state) if name in LOSSES else []
    return {"losses": losses, "grads": grads, "queue": queue}


def before_the_group() -> tuple[P.SmoothAPLoss, P.SmoothAPLoss]:
    """A module that was made, and one that was called."""
    made, called = (P.SmoothAPLoss(3, queue_size=64) for _ in range(2))
    x, targets, *_ = whole(5)
    called(new_model()(x[:3]), targets[:3])
    return made, called


def worker(rank: int, modules: tuple[P.SmoothAPLoss, P.SmoothAPLoss], world: int) -> dict:
    x, targets, *_ = whole(5)
    for loss_fn in modules:
        loss_fn(new_model()(x), targets)
    out = {"rows": [int(loss_fn._queue.state.enqueued) for loss_fn in modules]}
    for shard in SHARDS[world]:
        out["gather", shard] = gather_all(shard, rank)
        for name in (*LOSSES, *POINTWISE):
            for weighted in (False, True):
                out[name, shard, weighted] = train(name, shard, rank, weighted=weighted)
        for way in retrieval.WAYS:
            out["retrieval", shard, way] = retrieval.train(shard, rank, way)
        out["each", shard] = [retrieval.each(shard, rank, gather) for gather in (None, False)]
    shard = SHARDS[world][0]
    out["local"] = train("ap", shard, rank, weighted=False, gather=False)
    return out


@pytest.fixture(scope="module", params=SHARDS, ids=lambda world: f"{world}_processes")
def ranks(request) -> list[dict]:
    """What each process of a group found."""
    return processes.run(request.param, worker, request.param, before=before_the_group)


def test_rows_arrive_in_rank_order_in_their_dtype(ranks):
    for shard in SHARDS[len(ranks)]:
        x = whole(sum(shard))[0]
        for rank, out in enumerate(ranks):
            found = out["gather", shard]
            for dtype in DTYPES:
                want = (x * 3).to(dtype)
                assert found[str(dtype)].dtype == dtype
                assert torch.equal(found[str(dtype)], want)
                none = found[f"{dtype}, no columns"]
                assert none.dtype == dtype
                assert none.shape == (len(want), 0)
                assert torch.equal(found[f"{dtype}, expanded"], torch.ones_like(want[:, :1]))
            assert torch.equal(found["gathered"], x)
            assert found["cut"] is False
            # The adjoint of a gather: the sum over the ranks of their coefficients, at own rows.
            n, world = x.numel(), len(ranks)
            total = world * torch.arange(n, dtype=x.dtype) + 100.0 * sum(range(world))
            assert torch.equal(found["grad"], total.view_as(x)[own_rows(shard, rank)])


@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "weighted"])
@pytest.mark.parametrize("name", [*LOSSES, *POINTWISE])
def test_gradients_are_those_of_one_process(ranks, name, weighted):
    for shard in SHARDS[len(ranks)]:
        alone = train(name, shard, None, weighted=weighted)
        for out in ranks:
            found = out[name, shard, weighted]
            # Float64 sums of some dozen terms in another order: far below 1e-10 relative.
            torch.testing.assert_close(found["losses"], alone["losses"], rtol=1e-10, atol=0.0)
            for got, want in zip(found["grads"], alone["grads"], strict=True):
                scale = max(w.abs().max() for w in want)
                assert scale > 1e-4, "a gradient of zero would prove nothing"
                torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10 * scale.item())


@pytest.mark.parametrize("way", retrieval.WAYS)
def test_embeddings_are_ranked_as_in_one_process(ranks, way):
    for shard in SHARDS[len(ranks)]:
        found = [out["retrieval", shard, way] for out in ranks]
        retrieval.assert_as_one_process(found, shard, way)
        each = [out["each", shard] for out in ranks]
        retrieval.assert_each_query_is_of_its_process(each, shard)


@pytest.mark.parametrize("name", LOSSES)
def test_every_rank_stores_the_same_rows(ranks, name):
    for shard in SHARDS[len(ranks)]:
        queues = [out[name, shard, True]["queue"] for out in ranks]
        alone = train(name, shard, None, weighted=True)["queue"]
        for queue in queues:
            assert all(map(torch.equal, queue, queues[0]))  # to the bit
            for got, want in zip(queue, alone, strict=True):
                torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


def test_without_gathering_each_rank_keeps_its_own(ranks):
    shard = SHARDS[len(ranks)][0]
    assert len({out["local"]["losses"][0] for out in ranks}) == len(ranks)
    for rank, out in enumerate(ranks):
        model, loss_fn = new_model(), LOSSES["ap"]().double()
        for step in range(2):
            x, targets, *_ = whole(sum(shard), seed=step)
            rows = own_rows(shard, rank)
            assert loss_fn(model(x[rows]), targets[rows]).item() == out["local"]["losses"][step]
        assert all(map(torch.equal, out["local"]["queue"], loss_fn._queue.state))


def test_whether_to_gather_is_decided_at_the_first_call(ranks):
    # Made before the group and called after; called on either side of it.
    assert [out["rows"] for out in ranks] == [[5 * len(ranks), 3 + 5]] * len(ranks)


HELPERS = pytest.mark.parametrize("gather", [P.all_gather_with_grad, P.all_gather_no_grad])


@HELPERS
def test_without_a_group_the_helpers_raise(gather):
    with pytest.raises(RuntimeError, match="not initialized"):
        gather(torch.zeros(2))


@pytest.fixture
def group_of_one(tmp_path):
    dist.init_process_group("gloo", f"file://{tmp_path}/meet", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@HELPERS
@pytest.mark.usefixtures("group_of_one")
def test_a_group_of_one_gives_the_same_tensor_back(gather):
    x = torch.zeros(2, 3, requires_grad=True)
    assert gather(x) is x
    with pytest.raises(ValueError, match="0-d"):
        gather(torch.zeros(()))


@pytest.mark.usefixtures("group_of_one")
@pytest.mark.parametrize("gather", [None, True, False])
def test_a_group_of_one_changes_nothing(gather):
    x, targets, *_ = whole(8)
    logits = new_model()(x)
    alone, grouped = LOSSES["ap"](), LOSSES["ap"](gather_distributed=gather)
    assert torch.equal(grouped(logits, targets), alone(logits, targets))
