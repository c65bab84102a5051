"""Smooth NDCG: grades of any kind, its limit, what counts, and how gains travel."""

from __future__ import annotations

import math
import pickle
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import ndcg_score
from torch import Tensor
from torch.func import grad, jacrev, vmap

import proxy_losses as P
from proxy_losses._ranks import DISCOUNT, How, Lists, rank_mean

from . import reference
from .compiling import compile_fresh
from .launches import watched
from .makers import PAD, same_rows, warned
from .metrics import TIGHT, moving
from .test_grid import SHAPES, draw


def graded(seed: int, *shape: int) -> tuple[Tensor, Tensor]:
    """Scores without ties, and grades of which the first two differ."""
    g = torch.Generator().manual_seed(seed)
    scores = torch.randn(*shape, generator=g, dtype=torch.float64)
    grades = torch.randint(0, 5, shape, generator=g)
    grades[..., :1], grades[..., 1:2] = 4, 0
    return scores, grades


# -- the value


@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_any_list_is_the_formula(data):
    """With ties, masks, weights, gains of any kind and lists shorter than k."""
    pick = data.draw
    m, g = pick(st.integers(1, 25)), torch.Generator().manual_seed(pick(st.integers(0, 2**16)))
    scores = torch.randint(-20, 20, (2, m), generator=g).double() / 8
    gains = {
        "grades": torch.randint(0, 4, (2, m), generator=g),
        "above 0": torch.rand(2, m, generator=g, dtype=torch.float64) + 0.1,
        "wide": 2.0 ** torch.randint(-30, 30, (2, m), generator=g),
        "bytes": torch.randint(0, 3, (2, m), generator=g).to(torch.uint8),
    }[pick(st.sampled_from(["grades", "above 0", "wide", "bytes"]))]
    valid = torch.rand(2, m, generator=g) < 0.8
    weight = torch.rand(2, m, generator=g, dtype=torch.float64) if pick(st.booleans()) else None
    k, tau = pick(st.sampled_from([None, 1, 2, 5, 30])), pick(st.floats(1e-3, 10))
    value = P.smooth_ndcg(scores, gains, tau, k=k, valid_mask=valid, sample_weight=weight)
    want = [
        reference.smooth_ndcg(scores[i].tolist(), gains[i].tolist(), tau, valid[i].tolist(),
                              None if weight is None else weight[i].tolist(), k=k)
        for i in range(2)
    ]  # fmt: skip
    torch.testing.assert_close(value, torch.tensor(want, dtype=torch.float64), **TIGHT)
    counts = P.smooth_ndcg_defined(gains, valid, weight)
    assert counts.tolist() == [x > 0 for x in want]
    assert k is not None or (value <= 1.0 + 1e-12).all()


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**16), m=st.integers(2, 50), k=st.sampled_from([None, 1, 3, 10, 60]))
def test_limit_is_that_of_sklearn(seed, m, k):
    scores, grades = graded(seed, m)
    scores = scores.argsort().argsort().double()  # gaps of 1
    want = ndcg_score([grades.numpy()], [scores.numpy()], k=k)
    assert P.smooth_ndcg(scores, grades, 1e-5, k=k).item() == pytest.approx(want, rel=1e-12)
    exponential = 2.0**grades - 1.0
    want = ndcg_score([exponential.numpy()], [scores.numpy()], k=k)
    assert P.smooth_ndcg(scores, exponential, 1e-5, k=k).item() == pytest.approx(want, rel=1e-12)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**16), m=st.integers(2, 30), scale=st.floats(1e-20, 1e20))
def test_what_does_not_matter_and_what_does(seed, m, scale):
    """Scale of the gains, a shift, the order of rows; exchanging two rows towards the ideal."""
    scores, grades = graded(seed, m)
    value = P.smooth_ndcg(scores, grades, 0.2)
    order = torch.randperm(m, generator=torch.Generator().manual_seed(seed))
    for s, g in (
        (scores, grades * scale), (scores + 8.0, grades), (scores[order], grades[order]),
        (scores, (grades * scale).float()),
    ):  # fmt: skip
        exact = g.dtype != torch.float32 or scale == 1.0
        close = TIGHT if exact else {"rtol": 1e-6, "atol": 1e-7}
        torch.testing.assert_close(P.smooth_ndcg(s, g, 0.2), value, **close)
    low, high = sorted((0, 1), key=lambda i: scores[i].item())
    better = grades.clone()
    better[high], better[low] = 4, 0
    worse = better.clone()
    worse[[low, high]] = better[[high, low]]
    assert P.smooth_ndcg(scores, better, 1e-6) > P.smooth_ndcg(scores, worse, 1e-6)


@pytest.mark.parametrize("k", [None, 3])
def test_gradients_also_where_all_rows_have_gains(k):
    scores, grades = graded(1, 2, 6)
    weight = torch.rand(2, 6, dtype=torch.float64) + 0.5
    tau = torch.tensor(0.4, dtype=torch.float64)
    leaves = [x.requires_grad_() for x in (scores, weight, tau)]

    def value(s, w, t):
        return P.smooth_ndcg(s, grades + 1, t, k=k, sample_weight=w)

    if k is None:
        assert torch.autograd.gradcheck(value, leaves)
        assert torch.autograd.gradgradcheck(value, leaves)
        return
    assert torch.autograd.gradcheck(lambda w: value(scores.detach(), w, 0.4), leaves[1:2])


def test_the_gradient_at_k_has_a_threshold_that_moves():
    """By every way to a gradient, against plain torch with the slopes of the threshold held."""
    (scores, grades), tau = graded(2, 2, 9), 0.4
    ordered, k = scores.sort(descending=True).values, 3
    middle = (ordered[..., k - 1 : k] + ordered[..., k : k + 1]) / 2
    at = moving(middle, scores, torch.ones_like(scores, dtype=torch.bool), tau)
    places = torch.arange(2.0, k + 2, dtype=torch.float64)
    ideal = (grades.double().topk(k).values / places.log2()).sum(-1)

    def by_hand(s):
        rank = 0.5 + torch.sigmoid((s[..., None, :] - s[..., :, None]) / tau).sum(-1)
        return (grades * torch.sigmoid((s - at(s)) / tau) / (1.0 + rank).log2()).sum(-1) / ideal

    def value(s, g=grades):
        return P.smooth_ndcg(s, g, tau, k=k)

    close = {"rtol": 1e-10, "atol": 1e-12}
    for of in (jacrev, lambda f: jacrev(jacrev(f))):
        torch.testing.assert_close(of(value)(scores), of(by_hand)(scores), **close)
    want = jacrev(lambda s: by_hand(s).sum())(scores)
    torch.testing.assert_close(vmap(grad(value))(scores, grades), want, **close)
    compiled, _ = compile_fresh(grad(lambda s: value(s).sum()), "aot_eager")
    torch.testing.assert_close(compiled(scores), want, **close)


def test_nothing_waits_for_a_device():
    s = torch.empty(3, 20, device="meta", requires_grad=True)
    gains, valid = torch.empty(3, 20, device="meta"), torch.empty(20, device="meta").bool()
    with watched():
        for k in (None, 5, 50):
            P.smooth_ndcg(s, gains, 0.1, k=k, valid_mask=valid).sum().backward()
        P.smooth_ndcg_defined(gains, valid)


def test_lists_that_do_not_count():
    scores = torch.randn(5, 6, dtype=torch.float64, requires_grad=True)
    gains = torch.zeros(5, 6)
    gains[1], gains[2], gains[3:] = 2.0, torch.tensor([1.0, 1, 1, 1, 1, 0]), torch.arange(6.0)
    valid = torch.ones(5, 6, dtype=torch.bool)
    valid[2, 5] = False  # the one row of lower gain
    weight = torch.ones(5, 6)
    weight[3] = 0.0
    for k in (None, 2, 6):
        given = {"valid_mask": valid, "sample_weight": weight, "k": k}
        value = P.smooth_ndcg(scores, gains, 0.3, **given)
        assert (value > 0).tolist() == [False] * 4 + [True]
        assert P.smooth_ndcg_defined(gains, valid, weight).tolist() == (value > 0).tolist()
        (slope,) = torch.autograd.grad(value.sum(), scores)
        assert (slope != 0).any(1).tolist() == (value > 0).tolist()
        broken = torch.where(torch.arange(5)[:, None] < 4, torch.nan, scores)
        assert torch.equal(P.smooth_ndcg(broken, gains, 0.3, **given), value)


@pytest.mark.parametrize("k", [None, 2])
@pytest.mark.parametrize("bad", [-1.0, math.nan, math.inf])
def test_a_gain_that_is_none_makes_its_list_nan(bad, k):
    scores, grades = graded(2, 2, 6)
    gains = grades.double()
    gains[0, 3] = bad
    assert P.smooth_ndcg(scores, gains, 0.3, k=k).isnan().tolist() == [True, False]
    assert P.smooth_ndcg_defined(gains).all()
    valid = torch.ones(2, 6, dtype=torch.bool)
    valid[0, 3] = False
    assert P.smooth_ndcg(scores, gains, 0.3, k=k, valid_mask=valid).isfinite().all()
    gains[0] = bad  # the same in all rows
    assert P.smooth_ndcg(scores, gains, 0.3, k=k).isnan().tolist() == [True, False]
    assert P.smooth_ndcg_defined(gains).all()


def test_all_rows_are_in_where_there_is_no_place_beyond():
    scores, grades = graded(3, 10)
    plain = P.smooth_ndcg(scores, grades, 0.3)
    for k in (10, 11, 10**9):
        assert torch.equal(P.smooth_ndcg(scores, grades, 0.3, k=k), plain)
    assert P.smooth_ndcg(scores, grades, torch.tensor(-1.0), k=10).isnan()


@pytest.mark.parametrize(
    ("given", "error", "says"),
    [
        ({"k": 0}, ValueError, "k must be >= 1, got 0"),
        ({"k": 2.0}, TypeError, "k must be an integer, got float"),
        ({"k": [1, 2]}, TypeError, "k must be an integer, got list"),
    ],
)
def test_bad_options(given, error, says):
    eighth = torch.arange(5).to(torch.float8_e4m3fn)
    with pytest.raises(TypeError, match="gains must be a floating-point tensor of 16 bits"):
        P.smooth_ndcg(torch.randn(5), eighth, 0.1)
    with pytest.raises(error, match=says):
        P.smooth_ndcg(torch.randn(5), torch.arange(5), 0.1, **given)
    with pytest.raises(error, match=says):
        P.NDCGLoss(1, **given)


# -- the error of its phi


def errors(scores: Tensor, pos: Tensor, weight: Tensor, tau: float, rtol: float):
    """Of the mean, relative, and of its gradient in units of what a row may pull."""
    x = scores.clone().requires_grad_()
    mean, _ = rank_mean(Lists(x, pos, None, weight), tau, DISCOUNT, How(rtol, "grid"))
    (found,) = torch.autograd.grad(mean.sum(), x)
    s, share = scores.double(), weight.double() * pos
    share = share / share.sum(1, keepdim=True)
    up = torch.sigmoid((s[:, None, :] - s[:, :, None]) / tau)  # [L, i, j]
    past = up.sum(-1) + 1.5
    value, b = math.log(2) / past.log(), -math.log(2) * share / (past * past.log() ** 2)
    pull = b[:, :, None] * up * (1 - up)
    gradient = (pull.sum(1) - pull.sum(2)) / tau
    natural = torch.maximum(gradient.norm(dim=1), b.norm(dim=1) / (4 * tau)) + 1e-300
    want = (share * value).sum(1)
    off = ((mean.detach().double() - want).abs() / want).max()
    return float(off), float(((found.double() - gradient).norm(dim=1) / natural).max())


@pytest.mark.parametrize("shape", SHAPES)
def test_discounts_in_bins_keep_the_promise_of_precisions(shape):
    g = torch.Generator().manual_seed(SHAPES.index(shape))
    for rows, tau, rtol, dtype in (
        (700, 0.05, 1e-4, torch.float64), (40, 1.0, 1e-8, torch.float64),
        (1500, 0.003, 1e-12, torch.float64), (900, 0.3, 1e-6, torch.float32),
        (300, 5.0, 1e-4, torch.float32),
    ):  # fmt: skip
        scores = draw(shape, 1, rows, tau, g).to(dtype)
        pos = torch.rand(1, rows, generator=g) < 0.4
        pos[:, 0] = True
        weight = torch.rand(1, rows, generator=g, dtype=torch.float64).to(dtype)
        value, gradient = errors(scores, pos, weight, tau, rtol)
        # As in test_mean_precision: output rounding, and the rounding of one coordinate.
        limit = max(rtol, 4e-7 if dtype == torch.float32 else 1e-15)
        if dtype == torch.float64:
            limit += 4.0 * 2.0**-52 * float(scores.abs().max()) / tau
        assert value <= limit
        assert gradient <= 3.0 * limit


# -- grades as targets


def as_kinds(grades: Tensor) -> list[Tensor]:
    return [grades, grades.to(torch.uint8), grades.double(), grades[:, None].to(torch.bfloat16)]


def test_grades_of_one_class_of_any_dtype():
    scores, grades = graded(4, 12)
    want = 1 - P.smooth_ndcg(scores, grades, 0.2)
    for targets in as_kinds(grades):
        loss = P.NDCGLoss(1, queue_size=0, temperature=0.2)(scores[:, None], targets)
        torch.testing.assert_close(loss, want, **TIGHT)
    loss, _ = P.smooth_ndcg_loss(scores[:, None], grades, None, 0.2, k=3)
    torch.testing.assert_close(loss, 1 - P.smooth_ndcg(scores, grades, 0.2, k=3), **TIGHT)


@pytest.mark.parametrize("ignore_index", [PAD, -1, 0, 1, 3])
@pytest.mark.parametrize("floating", [False, True])
def test_a_grade_of_ignore_index_drops_its_row(ignore_index, floating):
    scores, grades = graded(5, 20)
    if ignore_index < 0:
        grades[::4] = ignore_index
    keep = grades != ignore_index
    want = 1 - P.smooth_ndcg(scores[keep], grades[keep], 0.2)
    targets = grades.float() if floating else grades
    loss_fn = P.NDCGLoss(1, queue_size=20, temperature=0.2, ignore_index=ignore_index)
    assert warned(lambda: loss_fn(scores[:, None], targets)) == []
    from_queue = loss_fn.eval()(scores[:0, None].float(), targets[:0])
    torch.testing.assert_close(from_queue, want.float())
    fn = P.smooth_ndcg_loss(scores[:, None], targets, None, 0.2, ignore_index=ignore_index)[0]
    torch.testing.assert_close(fn, want, **TIGHT)


def test_grades_of_several_classes_ids_and_labels():
    scores, grades = graded(6, 3, 15)
    logits, targets = scores.T, grades.T
    want = torch.stack([1 - P.smooth_ndcg(s, g, 0.2) for s, g in zip(scores, grades, strict=True)])
    loss_fn = P.NDCGLoss(3, queue_size=0, temperature=0.2, reduction="none")
    for kind in (targets, targets.double()):
        torch.testing.assert_close(loss_fn(logits, kind), want, **TIGHT)
    known = torch.rand(15, 3) < 0.8
    known[:2] = True
    holes = torch.where(known, targets.double(), torch.nan)
    want = P.smooth_ndcg(scores, grades, 0.2, valid_mask=known.T)
    torch.testing.assert_close(loss_fn(logits, holes, label_mask=known), 1 - want, **TIGHT)
    ids = torch.arange(15) % 3
    hot = torch.nn.functional.one_hot(ids, 3)
    found = [loss_fn(logits, kind) for kind in (ids, hot, hot.bool())]
    assert torch.equal(found[1], found[0])
    assert torch.equal(found[2], found[0])
    with pytest.raises(ValueError, match="targets contain class ids outside"):
        loss_fn(logits, ids + 1)
    with pytest.raises(ValueError, match=r"targets must be relevance grades .*, got \[15, 2\]"):
        loss_fn(logits, targets[:, :2])


def test_queries_are_lists():
    scores, grades = graded(7, 40)
    query = torch.arange(40) % 3
    loss_fn = P.NDCGLoss(1, k=4, queue_size=0, temperature=0.2)
    each = [
        P.smooth_ndcg(scores[query == q], grades[query == q], 0.2, k=4).float() for q in range(3)
    ]
    found = loss_fn(scores.float()[:, None], grades, query_ids=query)
    torch.testing.assert_close(found, 1 - torch.stack(each).mean())


# -- gains in the queue


@pytest.mark.parametrize("classes", [1, 3])
def test_a_queue_of_grades_is_a_longer_list(classes):
    """By module, by function, saved and loaded, over batches that wrap around."""
    loss_fn = P.NDCGLoss(classes, queue_size=13, temperature=0.2)
    queue, past = P.init_queue(13, classes), graded(0, classes, 0)
    for k in range(4):
        scores, grades = graded(k, classes, 5)
        new = scores.float(), grades / 2.0
        logits, targets = new[0].T, new[1].T if classes > 1 else new[1][0]
        rows = [torch.cat([x, y[:, -13:]], 1) for x, y in zip(new, past, strict=True)]
        found = loss_fn(logits, targets)
        torch.testing.assert_close(found, (1 - P.smooth_ndcg(*rows, 0.2).mean()).float())
        past = [torch.cat([y, x], 1) for x, y in zip(new, past, strict=True)]
        by_hand, queue = P.smooth_ndcg_loss(logits, targets, queue, 0.2)
        assert torch.equal(found, by_hand)
        assert same_rows(loss_fn, queue)
    assert queue.gains.shape == (13, classes)
    assert loss_fn.state_dict()["_queue._q_gains"].shape == (13, classes)
    fresh = P.NDCGLoss(classes, queue_size=13, temperature=0.2)
    fresh.load_state_dict(loss_fn.state_dict())
    assert torch.equal(fresh(logits, targets), loss_fn(logits, targets))
    assert (P.reset_queue(queue).gains == 1).all()
    loss_fn.reset_queue()
    assert (loss_fn._queue.state.gains == 1).all()


def test_other_losses_have_no_room_for_gains_and_their_checkpoints_load():
    logits, ids = torch.randn(6, 1), torch.arange(6) % 2
    plain, graded_loss = P.SmoothAPLoss(1, queue_size=8), P.NDCGLoss(1, queue_size=8)
    plain(logits, ids)
    assert not any("gains" in name for name in plain.state_dict())
    assert plain._queue.state.gains.shape == (0,)
    graded_loss(logits, ids * 3)
    graded_loss.load_state_dict(plain.state_dict())
    assert (graded_loss._queue.state.gains == 1).all()
    graded_loss(logits, ids * 3)
    plain.load_state_dict(graded_loss.state_dict())  # which rows have a gain
    assert torch.equal(plain._queue.state.targets[:6], ids)


def test_states_saved_before_there_were_gains_load():
    queue = P.enqueue(P.init_queue(4, 2), torch.randn(3, 2), torch.tensor([0, 1, 1]))
    old = P.QueueState(*queue[:8])
    assert old.gains.shape == (0,)
    assert old._asdict().keys() == queue._asdict().keys()
    grades = torch.tensor([[2.0, 0.0], [0.0, 1.0]])
    for state in (old, pickle.loads(pickle.dumps(old))):
        loss, after = P.smooth_ndcg_loss(torch.randn(2, 2), grades > 0, state, 0.3)
        assert loss.isfinite()
        assert after.gains.shape == (0,)


def test_gains_into_a_queue():
    queue, logits = P.init_queue(4, 1), torch.randn(2, 1)
    ids, gains = torch.tensor([1, 0]), torch.tensor([[2.5], [1.0]], dtype=torch.float64)
    queue = P.enqueue(queue, logits, ids, gains=gains)
    queue = P.enqueue(queue, logits, ids)  # none is 1
    assert queue.gains[:, 0].tolist() == [2.5, 1.0, 1.0, 1.0]
    assert queue.gains.dtype == torch.float32
    with pytest.raises(TypeError, match="gains must be a floating-point tensor"):
        P.enqueue(queue, logits, ids, gains=ids[:, None])
    with pytest.raises(ValueError, match=r"gains must be \[N, C\] = \[2, 1\], got \[2\]"):
        P.enqueue(queue, logits, ids, gains=gains[:, 0])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_stored_gains_and_weights_keep_their_range_beside_those_of_half_precision(dtype):
    logits, ones = torch.randn(4, 1, generator=torch.Generator().manual_seed(0)), torch.ones(4)
    first, then = torch.tensor([1e5, 0.0, 1001.0, 3.0]), torch.tensor([2.0, 0.0, 1.0, 0.0])
    found = []
    for kind in (dtype, torch.float32):
        loss_fn = P.NDCGLoss(1, queue_size=8, temperature=0.3)
        loss_fn(logits, first, sample_weight=first)
        found.append(loss_fn(logits.flip(0), then.to(kind), sample_weight=ones.to(kind)))
    assert torch.equal(*found)


BAD = {"negative": -1.0, "nan": math.nan, "infinite": math.inf, "too large": 2.0**100}


@pytest.mark.parametrize("bad", BAD.values(), ids=BAD)
def test_bad_grades_raise_and_are_not_stored(bad):
    logits, grades = torch.randn(5, 1), torch.tensor([0.0, 2.0, 1.0, 0.0, 3.0])
    grades[3] = bad
    loss_fn, queue = P.NDCGLoss(1, queue_size=8), P.init_queue(8, 1)
    with pytest.raises(ValueError, match="relevance grades, must be finite and >= 0"):
        loss_fn(logits, grades)
    assert loss_fn._queue.state.enqueued == 0
    loss, after = P.smooth_ndcg_loss(logits, grades, queue, 0.1)
    assert loss.isnan() or bad == 2.0**100
    assert after.enqueued == 0


def test_a_capped_pool_keeps_its_gains():
    grades = graded(8, 300)[1]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loss_fn = P.NDCGLoss(1, queue_size=0, temperature=1e-5, max_pool_size=299)
        ranks = torch.linspace(1, -1, 300)[:, None]
        assert loss_fn(ranks, grades.sort(descending=True).values).item() < 1e-6
