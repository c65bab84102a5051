"""Pools split over processes, what is asked of them, and a process that asks."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import proxy_losses as P
from proxy_losses import _quantiles, _ranks
from proxy_losses._ranks import plan, shard
from proxy_losses.distributed import all_reduce_with_grad, group_name

RTOL = 1e-12
# Rows of each rank: even, uneven, and with an empty rank.
CUTS = {
    2: [(20, 20), (41, 6), (0, 33)],
    3: [(15, 15, 15), (40, 0, 23)],
    4: [(30, 1, 0, 14)],
}
KINDS = ("normal", "ties", "wide", "far")
METHODS = {
    "sums": ("auto", "grid", "dense"), "ranks": ("grid",), "precision": ("auto", "grid"),
    "softplus": ("grid",),
}  # fmt: skip
INTERPOLATIONS = ("linear", "lower", "higher", "midpoint", "nearest")


class Pool(NamedTuple):
    scores: Tensor  # [L, M]
    pos: Tensor
    valid: Tensor
    weight: Tensor
    tau: Tensor

    def shard(self, cuts: Sequence[int], rank: int | None) -> Pool:
        """The rows of one rank, or all of them."""
        if rank is None:
            return self
        own = slice(sum(cuts[:rank]), sum(cuts[: rank + 1]))
        return Pool(*(x[:, own] for x in self[:4]), self.tau)


def make_pool(rows: int, kind: str = "normal", *, lists=2, dtype=torch.float64, seed=0) -> Pool:
    """One pool, alike in all processes."""
    g = torch.Generator().manual_seed(seed)
    scores = torch.randn(lists, rows, generator=g, dtype=torch.float64)
    weight, spread = torch.rand(2, lists, rows, generator=g, dtype=torch.float64)
    if kind == "ties":
        scores = (2.0 * scores).round() / 2.0
    elif kind in ("wide", "far"):  # most cells empty; too many for a table
        scores = scores * 10.0 ** (spread * {"wide": 3.0, "far": 12.0}[kind])
    pos, valid = (torch.rand(lists, rows, generator=g) < share for share in (0.4, 0.8))
    tau = torch.linspace(0.1, 0.3, lists, dtype=torch.float64)
    return Pool(scores.to(dtype), pos & valid, valid, weight.to(dtype), tau)


def sums(pool: Pool, method: str, group: Any) -> Tensor:
    weights = torch.stack([pool.weight - 0.5, pool.valid.to(pool.weight)], 1)
    return P.sigmoid_sums(pool.scores, weights, pool.pos, pool.tau, rtol=RTOL, method=method,
                          group=group)  # fmt: skip


def ranks(pool: Pool, method: str, group: Any) -> Tensor:
    found = P.soft_ranks(pool.scores, pool.pos, pool.tau, valid_mask=pool.valid, rtol=RTOL,
                         method=method, group=group)  # fmt: skip
    return torch.stack(found, 1)


def precision(pool: Pool, method: str, group: Any) -> Tensor:
    lists = _ranks.Lists(pool.scores, pool.pos, pool.valid, pool.weight)
    how = _ranks.How(RTOL, method, group)
    return _ranks.rank_mean(lists, pool.tau, _ranks.PRECISION, how)[0]


def softplus(pool: Pool, method: str, group: Any) -> Tensor:
    how = _ranks.How(RTOL, method, group)
    return _ranks.softplus_sums(pool.scores, pool.valid, pool.pos, pool.tau, how)[:, None]


def auroc(surrogate: str) -> Callable[[Pool, str, Any], Tensor]:
    return lambda pool, method, group: P.smooth_auroc(
        pool.scores, pool.pos, pool.tau, surrogate=surrogate, valid_mask=pool.valid, rtol=RTOL,
        sample_weight=pool.weight, group=group,
    )  # fmt: skip


def mrr(pool: Pool, method: str, group: Any) -> Tensor:
    return P.smooth_mrr(pool.scores, pool.pos, pool.tau, valid_mask=pool.valid,
                        sample_weight=pool.weight, group=group)  # fmt: skip


def ndcg(k: int | None) -> Callable[[Pool, str, Any], Tensor]:
    """Grades with ties across processes, each of other rows."""
    return lambda pool, method, group: P.smooth_ndcg(
        pool.scores, pool.pos * (1 + pool.scores.detach().abs().floor().long() % 3), pool.tau, k=k,
        valid_mask=pool.valid, sample_weight=pool.weight, rtol=RTOL, group=group,
    )  # fmt: skip


def smooth_ap(pool: Pool, method: str, group: Any) -> Tensor:
    return P.smooth_ap(pool.scores, pool.pos, pool.tau, valid_mask=pool.valid, rtol=RTOL,
                       group=group)  # fmt: skip


def recall(pool: Pool, method: str, group: Any) -> Tensor:
    return P.recall_at_quantile(pool.scores, pool.pos, pool.tau, quantile=0.3, group=group,
                                interpolation="linear", valid_mask=pool.valid,
                                sample_weight=pool.weight)  # fmt: skip


def trapezoid(pool: Pool, method: str, group: Any) -> Tensor:
    return P.partial_auc(pool.scores, pool.pos, pool.tau, beta=0.4, n_knots=3, group=group,
                         interpolation="linear", valid_mask=pool.valid, min_tpr=0.3,
                         sample_weight=pool.weight)  # fmt: skip


def at_k(pool: Pool, method: str, group: Any) -> Tensor:
    return P.recall_at_k(pool.scores, pool.pos, pool.tau, k=(3, 10), group=group, normalize="min",
                         valid_mask=pool.valid, sample_weight=pool.weight)  # fmt: skip


def at_precision(pool: Pool, method: str, group: Any) -> Tensor:
    return P.recall_at_precision(pool.scores, pool.pos, pool.tau, precision=0.4, group=group,
                                 valid_mask=pool.valid, sample_weight=pool.weight)  # fmt: skip


LOCAL = {"sums": sums, "ranks": ranks, "softplus": softplus}  # values at the rows of each rank
SHARED = {  # alike on all ranks
    "precision": precision, "smooth_ap": smooth_ap, "recall": recall, "trapezoid": trapezoid,
    "at_k": at_k, "mrr": mrr, "ndcg": ndcg(None), "ndcg_at_k": ndcg(7),
    "at_precision": at_precision, "auroc": auroc("sigmoid"), "logistic": auroc("logistic"),
}  # fmt: skip
ASKED: dict[str, Callable[[Pool, str, Any], Tensor]] = {**LOCAL, **SHARED}


def cases(world: int) -> list[tuple[tuple[int, ...], str, str, str]]:
    """Shards, kind of pool, what is asked and by which method."""
    return [
        (cuts, kind, name, method)
        for cuts in CUTS[world]
        for kind in KINDS
        for name in ASKED
        for method in METHODS.get(name, ("auto",))
    ]


def value_and_grads(name: str, pool: Pool, cuts=(), rank=None, *, method="auto", group=None):
    """The value, and the gradient of an uneven sum of it, by scores, weight and tau."""
    mine = pool.shard(cuts, rank)
    leaves = [x.detach().clone().requires_grad_() for x in (mine.scores, mine.weight, mine.tau)]
    value = ASKED[name](Pool(leaves[0], mine.pos, mine.valid, *leaves[1:]), method, group)
    if name in LOCAL:
        uneven = torch.linspace(-1.0, 1.0, pool.scores.shape[1], dtype=value.dtype).expand(2, -1)
        uneven = pool._replace(weight=uneven).shard(cuts, rank).weight
        loss = all_reduce_with_grad((value * uneven[:, None]).sum(), group_name(group))
    else:
        loss = (value * torch.arange(1.0, 3.0, dtype=value.dtype)).sum()
    grads = torch.autograd.grad(loss, leaves, allow_unused=True)
    return value.detach(), [torch.zeros_like(x) if g is None else g
                            for g, x in zip(grads, leaves, strict=True)]  # fmt: skip


class Counted:
    """Bytes that this process hands to collectives while it is open."""

    def __enter__(self) -> Counted:
        self.reduced = self.gathered = self.messages = 0
        self._kept = dist.all_reduce, dist.all_gather

        def all_reduce(x, *args, **kwargs):
            self.reduced += x.numel() * x.element_size()
            self.messages += 1
            return self._kept[0](x, *args, **kwargs)

        def all_gather(parts, x, *args, **kwargs):
            self.gathered += x.numel() * x.element_size()
            self.messages += 1
            return self._kept[1](parts, x, *args, **kwargs)

        dist.all_reduce, dist.all_gather = all_reduce, all_gather
        return self

    def __exit__(self, *_: Any) -> None:
        dist.all_reduce, dist.all_gather = self._kept


def quantiles(rank: int, world: int, group: Any) -> dict:
    levels = torch.tensor([0.0, 0.003, 0.3, 0.5, 0.77, 1.0], dtype=torch.float64)
    out = {}
    for cuts in CUTS[world]:
        for kind in KINDS:
            for dtype in (torch.float32, torch.float64):
                pool = make_pool(sum(cuts), kind, dtype=dtype).shard(cuts, rank)
                for interpolation in INTERPOLATIONS:
                    for masked in (False, True):
                        found = _quantiles.quantiles(
                            pool.scores, levels.tolist(), interpolation,
                            pool.valid if masked else None, group_name(group),
                        )  # fmt: skip
                        out[cuts, kind, str(dtype), interpolation, masked] = found
    return out


class Net(nn.Module):
    """Scores from features, and a temperature that learns."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(4, 1).double()
        self.tau = nn.Parameter(torch.tensor(0.3, dtype=torch.float64))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.linear(x)[:, 0], self.tau


def train(cuts: Sequence[int], rank: int | None, group: Any, *, compiled: bool = False):
    """Loss and parameter gradients of one process with all rows, or of DDP over shards."""
    pool = make_pool(sum(cuts), lists=1).shard(cuts, rank)
    g = torch.Generator().manual_seed(5)
    x = torch.randn(sum(cuts), 4, generator=g, dtype=torch.float64)
    x = Pool(x.T, *[x.T] * 3, pool.tau).shard(cuts, rank).scores.T
    net = Net()
    model = net if rank is None else DistributedDataParallel(net, process_group=group)

    def loss_of(scores: Tensor, tau: Tensor) -> Tensor:
        extra = {"valid_mask": pool.valid[0], "group": group}
        ap = P.smooth_ap(scores, pool.pos[0], tau, sample_weight=pool.weight[0], **extra)
        # A threshold that moves with the scores leaves no gradient to a bias.
        top = P.recall_at_quantile(
            scores, pool.pos[0], tau, quantile=0.2, threshold_grad="none", **extra
        )
        first = P.recall_at_k(scores, pool.pos[0], tau, k=5, **extra)
        precise = P.recall_at_precision(scores, pool.pos[0], tau, precision=0.6, **extra)
        return 4.0 - ap - top - first - precise

    loss = (torch.compile(loss_of, fullgraph=True) if compiled else loss_of)(*model(x))
    loss.backward()
    return loss.detach(), [p.grad for p in net.parameters()]


# Rows of a rank, kind of pool, and how they should be shared.
WIRES = [(50, "normal", "gather"), (60_000, "normal", "direct"), (60_000, "wide", "occupied"),
         (2_000, "far", "gather")]  # fmt: skip


def wire(rank: int, world: int, group: Any) -> dict:
    """(reduced, gathered) bytes and messages: counted, and foreseen for the way that was taken."""
    plain, asked, out = shard.share, [], {}

    def spied(pool: Any, *args: Any, **kwargs: Any) -> Any:
        asked.append((pool, kwargs.get("most_cells", 0), plain(pool, *args, **kwargs)))
        return asked[-1][2]

    shard.share = spied
    for rows, kind, _ in WIRES:
        cuts = [rows + 10 * k for k in range(world)]
        mine = make_pool(sum(cuts), kind, lists=1, dtype=torch.float32).shard(cuts, rank)
        for call in (P.soft_ranks, P.smooth_ap):
            asked.clear()
            with torch.no_grad(), Counted() as counted:
                call(mine.scores, mine.pos, mine.tau, group=group)
            pool, cells, share = asked[-1]
            # Asked once, or again with the cells counted, or a third time with them exchanged.
            exchanged = [None, 0, cells][len(asked) - 1]
            foreseen = plan.payload(pool, share, most_cells=exchanged)
            found = counted.reduced, counted.gathered, counted.messages
            out[call.__name__, rows, kind] = found, tuple(foreseen), share.how
    shard.share = plain
    return out


def gathers(rank: int, group: Any) -> dict:
    """Several tensors in one call, twice differentiated."""
    x = torch.arange(3.0, dtype=torch.float64)[: 3 - rank % 2, None].requires_grad_()
    rows, flags = P.all_gather_with_grad(x, x[:, 0] > 0, group=group)
    (first,) = torch.autograd.grad((rows**3).sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), x)
    return {"rows": rows.detach(), "flags": flags, "first": first.detach(), "second": second}


def message(call: Callable[[], Any]) -> str:
    try:
        call()
    except (ValueError, NotImplementedError) as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def errors(rank: int, group: Any) -> dict:
    pool = make_pool(5)
    out = {"tau": message(lambda: smooth_ap(pool._replace(tau=pool.tau + rank), "auto", group))}
    scores = pool.scores.clone().requires_grad_()
    for name in ("sums", "precision"):
        loss = ASKED[name](pool._replace(scores=scores), "auto", group).sum()
        (first,) = torch.autograd.grad(loss, scores, create_graph=True)
        out[f"twice {name}"] = message(lambda first=first: first.sum().backward())
    return out


def broken(rank: int, world: int, group: Any) -> dict:
    """A NaN in the first list of the last rank."""
    cuts, out = CUTS[world][0], {}
    pool = make_pool(sum(cuts))
    pool.valid[:, -1] = pool.pos[:, -1] = True
    pool.scores[0, -1] = math.nan
    for name in ASKED:
        for method in ("auto", "grid"):
            out[name, method] = value_and_grads(name, pool, cuts, rank, method=method, group=group)
    return out


def all_of(rank: int, world: int, group: Any) -> dict:
    """What one process of a group of this size finds."""
    out: dict[Any, Any] = {"quantiles": quantiles(rank, world, group), "found": {}}
    for cuts, kind, name, method in cases(world):
        pool = make_pool(sum(cuts), kind)
        out["found"][cuts, kind, name, method] = value_and_grads(
            name, pool, cuts, rank, method=method, group=group
        )
    for cuts in CUTS[world]:
        out["train", cuts] = train(cuts, rank, group)
    out["wire"], out["broken"] = wire(rank, world, group), broken(rank, world, group)
    out["errors"], out["gathers"] = errors(rank, group), gathers(rank, group)
    return out


def worker(rank: int) -> dict:
    """One process of all groups of at least its rank."""
    out: dict[Any, Any] = {}
    for world in CUTS:
        group = dist.new_group(list(range(world)))
        if rank < world:
            out[world] = all_of(rank, world, group)
        else:
            out["outside"] = message(lambda group=group: smooth_ap(make_pool(5), "auto", group))
    return out
