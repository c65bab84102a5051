"""Losses with query ids: a loop over queries, by every road."""

from __future__ import annotations

import pytest
import torch
from torch._dynamo.exc import Unsupported
from torch.func import grad_and_value, vmap

import proxy_losses as P

from .compiling import compile_fresh
from .test_step import LOSSES, TIGHT, every_loss

PAD, TAU = -100, 0.3
SHAPE = (8, 40)  # more than any pool here needs


def queries(seed: int, n: int = 40, kind: str = "classes"):
    """Logits, targets, weights and ids; sizes differ, and some queries lack a class."""
    g = torch.Generator().manual_seed(seed)
    c = 1 if kind == "binary" else 3
    logits = torch.randn(n, c, generator=g, dtype=torch.float64)
    if kind == "labels":
        targets = torch.rand(n, c, generator=g) < 0.3
    else:
        targets = torch.randint(0, max(c, 2), (n,), generator=g)
        targets[torch.rand(n, generator=g) < 0.1] = PAD
    weight = torch.rand(n, generator=g, dtype=torch.float64)
    # Ids -3, 5, 13, 21, ...: about a half, a quarter, an eighth of the rows.
    ids = torch.rand(n, generator=g, dtype=torch.float64).log2().neg().long().clamp(max=5)
    return logits, targets, weight, 8 * ids - 3


def by_query(name, logits, targets, weight, ids, iid=None) -> torch.Tensor:
    """[C]: the mean over the queries that count, each a batch of its own; NaN if none does."""
    loss_fn, _, kwargs = LOSSES[name]
    if iid is not None:
        kwargs = {**kwargs, "iid_mask": iid}
    valid = torch.ones_like(ids, dtype=torch.bool) if targets.dim() == 2 else targets != PAD
    each = []
    for q in ids[valid].unique():
        rows = valid & (ids == q)
        own = {k: v[rows] if isinstance(v, torch.Tensor) else v for k, v in kwargs.items()}
        loss, _ = loss_fn(
            logits[rows], targets[rows], None, TAU, sample_weight=weight[rows], reduction="none",
            **own,
        )  # fmt: skip
        each.append(loss)
    return torch.stack(each).nanmean(0)


@every_loss
@pytest.mark.parametrize("kind", ["binary", "classes", "labels"])
@pytest.mark.parametrize("shape", [None, SHAPE])
def test_is_the_mean_over_queries(name, kind, shape):
    loss_fn, _, kwargs = LOSSES[name]
    for seed in range(4):
        logits, targets, weight, ids = queries(seed, kind=kind)
        kwargs = {**kwargs, "sample_weight": weight, "query_ids": ids, "query_shape": shape}
        x, y = (logits.clone().requires_grad_() for _ in "ab")
        want = by_query(name, x, targets, weight, ids)
        assert want.isfinite().all()
        for reduction, expected in (
            ("none", want),
            ("sum", want.sum()),
            ("mean", want.mean()),
        ):
            loss, _ = loss_fn(y, targets, None, TAU, reduction=reduction, **kwargs)
            torch.testing.assert_close(loss, expected, **TIGHT)
        want.mean().backward()
        loss.backward()
        torch.testing.assert_close(y.grad, x.grad, **TIGHT)
        assert y.grad.any()


@every_loss
@pytest.mark.parametrize("shape", [None, SHAPE])
def test_stored_rows_join_their_query(name, shape):
    """Batches with ids, one without, and reading without ids, over a queue that wraps."""
    loss_fn, _, kwargs = LOSSES[name]
    kwargs = {**kwargs, "reduction": "none", "query_shape": shape}
    queue, stored = P.init_queue(60, 3, dtype=torch.float64), []
    for seed in range(6):
        logits, targets, weight, ids = queries(seed, 25)
        weight = weight.float().double()  # as it is stored
        live = (logits, targets, weight, ids)
        pool = [torch.cat(x) for x in zip(live, *stored, strict=True)]
        plain, _ = loss_fn(logits, targets, queue, TAU, sample_weight=weight, **kwargs)
        together = [*pool[:3], torch.zeros_like(pool[3])]
        torch.testing.assert_close(plain, by_query(name, *together), **TIGHT)
        if seed == 2:  # without ids: in the queue, in no query
            _, queue = loss_fn(logits, targets, queue, TAU, sample_weight=weight, **kwargs)
            live = (*live[:3], torch.full_like(ids, 2**40))
        else:
            known = pool[3] != 2**40
            want = by_query(name, *(x[known] for x in pool))
            loss, queue = loss_fn(
                logits, targets, queue, TAU, sample_weight=weight, query_ids=ids, **kwargs
            )
            torch.testing.assert_close(loss, want, **TIGHT)
        # The last 60 rows, newest batch first.
        stored = [live, *stored]
        keep = [min(25, 60 - 25 * k) for k in range(3)]
        stored = [tuple(x[-n:] for x in s) for s, n in zip(stored, keep, strict=False)]
    assert sorted(queue.query_ids.tolist()) == sorted(torch.cat([s[3] for s in stored]).tolist())


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32, torch.int64])
def test_stored_rows_without_an_id_are_in_no_query(dtype):
    """Whatever the integer type of the ids: the mark of those rows takes 64 bits."""
    logits, targets = torch.tensor([[2.0], [1.0], [0.0]]), torch.tensor([0, 1, 0])
    ids = torch.zeros(3, dtype=dtype)
    alone, _ = P.smooth_ap_loss(logits, targets, None, TAU)
    bare = P.init_queue(8, 1)
    with_room = P.enqueue(bare, logits[:0], targets[:0], query_ids=ids[:0])
    for queue in (bare, with_room):
        queue = P.enqueue(queue, torch.full((4, 1), 5.0), torch.zeros(4, dtype=torch.int64))
        assert P.smooth_ap_loss(logits, targets, queue, TAU, query_ids=ids)[0] == alone
        assert P.smooth_ap_loss(logits, targets, queue, TAU)[0] != alone


@every_loss
def test_the_order_of_the_rows_does_not_matter(name):
    loss_fn, _, kwargs = LOSSES[name]
    logits, targets, weight, ids = queries(0)
    order = torch.randperm(40, generator=torch.Generator().manual_seed(0))
    a, b = logits.clone().requires_grad_(), logits[order].clone().requires_grad_()
    # Nor do the ids themselves.
    renamed = -7 * ids[order] + 2**50
    first, _ = loss_fn(a, targets, None, TAU, query_ids=ids, sample_weight=weight, **kwargs)
    second, _ = loss_fn(
        b, targets[order], None, TAU, query_ids=renamed, sample_weight=weight[order], **kwargs
    )
    torch.testing.assert_close(first, second, **TIGHT)
    first.backward()
    second.backward()
    torch.testing.assert_close(a.grad[order], b.grad, **TIGHT)


@every_loss
@pytest.mark.parametrize("shape", [None, (1, 1), SHAPE])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_padding_alone_is_zero_and_stores_nothing(name, shape, reduction):
    loss_fn, _, kwargs = LOSSES[name]
    queue = P.enqueue(
        P.init_queue(8, 3), torch.zeros(0, 3), torch.arange(0), query_ids=torch.arange(0)
    )
    for n in (0, 6):
        logits = torch.full((n, 3), torch.nan, requires_grad=True)
        loss, new = loss_fn(
            logits, torch.full((n,), PAD), queue, TAU, reduction=reduction,
            query_ids=torch.zeros(n, dtype=torch.int64), query_shape=shape, **kwargs,
        )  # fmt: skip
        assert (loss == 0).all()
        loss.sum().backward()
        assert (logits.grad == 0).all()
        assert all(map(torch.equal, queue, new))


@every_loss
@pytest.mark.parametrize("shape", [(1, 1), (1, 40), (8, 1), (3, 40), (8, 12)])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_too_small_a_shape_is_not_a_number(name, shape, reduction):
    loss_fn, _, kwargs = LOSSES[name]
    logits, targets, _, ids = queries(0)
    sizes = ids[targets != PAD].unique(return_counts=True)[1]
    assert len(sizes) > 3
    assert sizes.max() > 12
    kwargs = {**kwargs, "reduction": reduction, "query_ids": ids, "query_shape": shape}
    assert loss_fn(logits, targets, None, TAU, **kwargs)[0].isnan().all()


@every_loss
def test_compiles_once_over_steps(name):
    loss_fn, _, kwargs = LOSSES[name]

    def step(logits, targets, ids, queue):
        return loss_fn(logits, targets, queue, TAU, query_ids=ids, query_shape=(6, 70), **kwargs)

    compiled, compiles = compile_fresh(grad_and_value(step, has_aux=True), "aot_eager")
    queue = P.init_queue(50, 3, dtype=torch.float64)
    for seed in range(5):
        logits, targets, _, ids = queries(seed, 25)
        if not seed:  # room for ids; a queue without compiles once more
            queue = P.enqueue(queue, logits, targets, query_ids=ids)
        want = grad_and_value(step, has_aux=True)(logits, targets, ids, queue)
        got = compiled(logits, targets, ids, queue)
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-13)
        without_shape, _ = loss_fn(logits, targets, queue, TAU, query_ids=ids, **kwargs)
        torch.testing.assert_close(got[1][0], without_shape, rtol=1e-10, atol=1e-13)
        queue = got[1][1]
    assert compiles() == 1


@every_loss
def test_vmap(name):
    loss_fn, _, kwargs = LOSSES[name]
    logits, targets, _, ids = (torch.stack(x) for x in zip(queries(0), queries(1), strict=True))

    def one(x, y, q):
        return loss_fn(x, y, None, TAU, query_ids=q, query_shape=SHAPE, **kwargs)[0]

    looped = [grad_and_value(one)(*args) for args in zip(logits, targets, ids, strict=True)]
    grads, losses = (torch.stack(x) for x in zip(*looped, strict=True))
    found = vmap(grad_and_value(one))(logits, targets, ids)
    torch.testing.assert_close(found, (grads, losses), **TIGHT)


def test_compiled_code_without_a_shape_says_what_it_needs():
    logits, targets, _, ids = queries(0)
    compiled, _ = compile_fresh(P.smooth_ap_loss, "eager")
    with pytest.raises(Unsupported, match=r"query_ids inside torch.compile need query_shape=\("):
        compiled(logits, targets, None, TAU, query_ids=ids)


@every_loss
@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        (
            {"query_ids": torch.zeros(5, dtype=torch.int64)},
            ValueError,
            "query_ids must match logits",
        ),
        (
            {"query_ids": torch.zeros(6, 1, dtype=torch.int64)},
            ValueError,
            "query_ids must match logits",
        ),
        ({"query_ids": torch.zeros(6)}, TypeError, "query_ids must be integer query ids"),
        ({"query_ids": torch.zeros(6).bool()}, TypeError, "query_ids must be integer query ids"),
        ({"query_ids": "abcdef"}, TypeError, "query_ids must be a tensor, got str"),
        ({"query_shape": (2,)}, ValueError, "query_shape must be None or"),
        ({"query_shape": 12}, ValueError, "query_shape must be None or"),
        ({"query_shape": (0, 6)}, ValueError, "query_shape, queries, must be >= 1"),
        ({"query_shape": (6, 0)}, ValueError, "query_shape, longest query, must be >= 1"),
        ({"query_shape": (6, 2.0)}, TypeError, "query_shape, longest query, must be an integer"),
    ],
)
def test_bad_arguments(name, change, error, says):
    args = {"query_ids": torch.arange(6), "query_shape": (6, 6)} | change
    with pytest.raises(error, match=says):
        LOSSES[name][0](torch.randn(6, 3), torch.arange(6) % 3, P.init_queue(4, 3), 0.1, **args)
