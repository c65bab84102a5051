"""Retrieval lists: which rows they hold, their scores, and Smooth-AP over them."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import average_precision_score
from torch import Tensor

from proxy_losses import RetrievalLists, retrieval_lists, smooth_ap, smooth_ap_defined

from . import reference
from .metrics import TIGHT

TAU = 0.1
kinds = pytest.mark.parametrize("kind", ["cosine", "dot"])
SIZES = [[10] * 6, [6] * 10, [1, 2, 3, 17, 30, 1, 5]]


def batch(seed: int, sizes: list[int], width: int = 5) -> tuple[Tensor, Tensor]:
    """Rows in random order, classes of these sizes."""
    g = torch.Generator().manual_seed(seed)
    labels = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
    labels = labels[torch.randperm(len(labels), generator=g)]
    return torch.randn(len(labels), width, generator=g, dtype=torch.float64), labels


def separable(seed: int, sizes: list[int]) -> tuple[Tensor, Tensor]:
    """Every class near its own axis."""
    noise, labels = batch(seed, sizes, width=len(sizes))
    return torch.eye(len(sizes), dtype=torch.float64)[labels] + 0.01 * noise, labels


def ap(lists: RetrievalLists, tau: float | Tensor = TAU) -> Tensor:
    return smooth_ap(lists.scores, lists.pos_mask, tau, valid_mask=lists.valid_mask)


def loss(embeddings: Tensor, labels: Tensor, tau: float | Tensor = TAU, **kwargs) -> Tensor:
    lists = retrieval_lists(embeddings, labels, **kwargs)
    counts = smooth_ap_defined(lists.pos_mask, lists.valid_mask)
    return 1 - ap(lists, tau).sum() / counts.sum().clamp(min=1)


def by_loops(embeddings, labels, kind, refs=None, ref_labels=None) -> Tensor:
    plain = reference.retrieval(embeddings, labels, refs, ref_labels, kind)
    return torch.tensor([reference.smooth_ap(s, p, TAU) for s, p in plain], dtype=torch.float64)


@kinds
@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**16),
    sizes=st.lists(st.integers(0, 5), min_size=1, max_size=5),
    width=st.integers(1, 4),
    refs=st.none() | st.lists(st.integers(0, 4), min_size=1, max_size=6),
)
def test_lists_are_the_loops(kind, seed, sizes, width, refs):
    x, y = batch(seed, sizes, width)
    if refs is None:
        lists = retrieval_lists(x, y, similarity=kind)
        expected = reference.retrieval(x.tolist(), y.tolist(), kind=kind)
    else:
        r, z = batch(seed + 1, refs, width)
        lists = retrieval_lists(x, y, ref_embeddings=r, ref_labels=z, similarity=kind)
        expected = reference.retrieval(x.tolist(), y.tolist(), r.tolist(), z.tolist(), kind)
    assert len(lists.scores) == len(expected)
    for scores, pos, valid, (s, p) in zip(*lists, expected, strict=True):
        torch.testing.assert_close(scores[valid], scores.new_tensor(s), **TIGHT)
        assert pos[valid].tolist() == p
    if kind == "cosine":
        assert (lists.scores.abs() <= 1 + 1e-14).all()
    value = ap(lists)
    expected_ap = [reference.smooth_ap(s, p, TAU) for s, p in expected]
    # An error of eps in the scores, divided by tau, moves the value by about 10 eps.
    torch.testing.assert_close(value, value.new_tensor(expected_ap), rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("shared", [True, False], ids=["itself", "references"])
def test_limit_is_average_precision(sizes, shared):
    x, y = batch(0, sizes)
    r, z = (x, y) if shared else batch(1, [7, 2, 9])
    refs = {} if shared else {"ref_embeddings": r, "ref_labels": z}
    lists = retrieval_lists(x, y, **refs)
    counts = smooth_ap_defined(lists.pos_mask, lists.valid_mask)
    cosine = torch.nn.functional.cosine_similarity(x[:, None], r[None], dim=-1)
    value = ap(lists, 1e-12)  # gaps between scores are far above 40 tau
    assert counts.any()
    for q in range(len(y)):
        kept = torch.arange(len(z)) != q if shared else torch.ones(len(z), dtype=torch.bool)
        pos = (z == y[q])[kept]
        assert counts[q] == (pos.any() and not pos.all())
        if counts[q]:
            exact = average_precision_score(pos.numpy(), cosine[q, kept].numpy())
            assert value[q].item() == pytest.approx(exact, rel=1e-12)


@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_separable_classes_have_no_loss(sizes):
    x, y = separable(0, sizes)
    for tau in (0.1, 0.03, 0.01):
        lists = retrieval_lists(x, y)
        least = lists.scores[lists.pos_mask].min()
        gap = least - lists.scores[~lists.pos_mask].max()
        assert gap > 0.8
        # 1 - R+/R is at most the sum over negatives, each under sigmoid(-gap / tau).
        bound = len(y) * torch.sigmoid(-gap / tau).item()
        assert -1e-12 <= loss(x, y, tau).item() <= bound + 1e-12
    assert bound < 1e-30


@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_row_order_does_not_matter(sizes):
    x, y = batch(2, sizes)
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(3))
    a, b = x.clone().requires_grad_(), x[order].clone().requires_grad_()
    u, v = loss(a, y), loss(b, y[order])
    torch.testing.assert_close(u, v, **TIGHT)
    u.backward()
    v.backward()
    torch.testing.assert_close(a.grad[order], b.grad, rtol=1e-11, atol=1e-13)
    renamed = torch.randperm(99, generator=torch.Generator().manual_seed(4))[y].to(torch.int32)
    torch.testing.assert_close(loss(x, renamed), u.detach(), rtol=0, atol=0)


@kinds
def test_the_query_is_removed_from_its_list(kind):
    x, y = batch(5, [4, 1, 6])
    a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
    masked = ap(retrieval_lists(a, y, similarity=kind))
    removed = []
    for q in range(len(y)):
        others = torch.arange(len(y)) != q
        lists = retrieval_lists(
            b[q][None], y[q][None], ref_embeddings=b[others], ref_labels=y[others], similarity=kind
        )
        assert lists.valid_mask.all()
        removed.append(ap(lists))
    torch.testing.assert_close(masked, torch.cat(removed), **TIGHT)
    masked.sum().backward()
    torch.cat(removed).sum().backward()
    torch.testing.assert_close(a.grad, b.grad, rtol=1e-11, atol=1e-13)


def test_a_narrower_mask_removes_references():
    x, y = batch(6, [4, 5])
    keep = torch.arange(9) < 7
    lists = retrieval_lists(x, y)
    lists = lists._replace(valid_mask=lists.valid_mask & keep)
    torch.testing.assert_close(ap(lists)[:7], ap(retrieval_lists(x[:7], y[:7])), **TIGHT)


def test_queries_without_positives_do_not_count():
    x, y = batch(7, [5, 4, 1, 1])
    lists = retrieval_lists(x, y)
    counts = smooth_ap_defined(lists.pos_mask, lists.valid_mask)
    assert counts.tolist() == (y < 2).tolist()
    value = ap(lists)
    assert (value[~counts] == 0).all()
    torch.testing.assert_close(loss(x, y), 1 - value[counts].mean(), **TIGHT)
    alone = x.clone().requires_grad_()
    loss(alone, torch.arange(11)).backward()  # nobody has a positive
    assert (alone.grad == 0).all()


def test_multi_label():
    x, _ = batch(8, [12])
    labels = torch.rand(12, 3, generator=torch.Generator().manual_seed(0)) < 0.4
    labels[0] = False
    sets = [set(row.nonzero()[:, 0].tolist()) for row in labels]
    value = ap(retrieval_lists(x, labels))
    torch.testing.assert_close(value, by_loops(x.tolist(), sets, "cosine"), **TIGHT)
    assert value[0] == 0
    assert (value > 0).sum() >= 6
    y = torch.arange(12) % 4
    one_hot = y[:, None] == torch.arange(4)
    for a, b in zip(retrieval_lists(x, y), retrieval_lists(x, one_hot), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)
    refs = {"ref_embeddings": x[:5], "ref_labels": labels[:5]}
    assert torch.equal(
        retrieval_lists(x, labels, **refs).pos_mask, retrieval_lists(x, labels).pos_mask[:, :5]
    )


def test_leading_axes():
    x, y = batch(9, [4, 3, 5])
    xs = torch.stack([x, x.flip(0), 2 * x + 1])
    ys = torch.stack([y, y.flip(0), y])
    batched = retrieval_lists(xs, ys)
    assert {t.shape for t in batched} == {(3, 12, 12)}
    for k in range(3):
        for a, b in zip(batched, retrieval_lists(xs[k], ys[k]), strict=True):
            torch.testing.assert_close(a[k], b, **TIGHT)
    shared = retrieval_lists(xs, y, ref_embeddings=x, ref_labels=y)  # labels and refs broadcast
    assert {t.shape for t in shared} == {(3, 12, 12)}
    torch.testing.assert_close(
        shared.scores[2], retrieval_lists(xs[2], y, ref_embeddings=x, ref_labels=y).scores, **TIGHT
    )
    assert {t.shape for t in retrieval_lists(x, ys)} == {(3, 12, 12)}


@pytest.mark.parametrize(("queries", "refs"), [(0, None), (0, 4), (4, 0), (1, None)])
def test_empty(queries, refs):
    x = torch.zeros(queries, 3, requires_grad=True)
    y = torch.zeros(queries, dtype=torch.int64)
    more = {}
    if refs is not None:
        more = {"ref_embeddings": torch.zeros(refs, 3), "ref_labels": y.new_zeros(refs)}
    assert retrieval_lists(x, y, **more).scores.shape == (
        queries,
        queries if refs is None else refs,
    )
    value = loss(x, y, **more)
    assert value == 1
    value.backward()
    assert (x.grad == 0).all()
