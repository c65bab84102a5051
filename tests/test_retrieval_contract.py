"""Retrieval lists under precision, transforms, odd rows and bad input; the published peer."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.func import grad, jacrev, vmap

from proxy_losses import retrieval_lists

from .compiling import compile_fresh
from .metrics import TIGHT
from .test_retrieval import TAU, ap, batch, kinds, loss, separable

BOOLS = torch.ones(6, 2, dtype=torch.bool)


@kinds
@pytest.mark.parametrize("with_refs", [False, True])
def test_gradcheck(kind, with_refs):
    x, y = batch(0, [3, 2, 1], width=3)
    r, z = batch(1, [2, 2], width=3)
    inputs = [x.requires_grad_()] + [r.requires_grad_()] * with_refs

    def f(queries, refs=None):
        more = {"ref_embeddings": refs, "ref_labels": z} if with_refs else {}
        return ap(retrieval_lists(queries, y, similarity=kind, **more))

    assert torch.autograd.gradcheck(f, inputs)
    assert torch.autograd.gradgradcheck(f, inputs)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_zero_rows(dtype):
    x, y = batch(2, [4, 4])
    x = x.to(dtype)
    x[0] = 0
    x.requires_grad_()
    lists = retrieval_lists(x, y)
    assert (lists.scores[0] == 0).all()
    assert (lists.scores[:, 0] == 0).all()
    loss(x, y).backward()
    assert torch.isfinite(x.grad).all()
    assert (x.grad[0] == 0).all()
    assert (x.grad[1:] != 0).any(-1).all()


@settings(max_examples=50, deadline=None)
@given(exponents=st.lists(st.integers(-60, 100), min_size=6, max_size=6))
def test_length_of_rows_does_not_matter(exponents):
    x, y = batch(3, [3, 3])
    x = (x / x.abs().amax(-1, keepdim=True)).float()
    scale = 2.0 ** torch.tensor(exponents).float()[:, None]  # scales without rounding
    a, b = x.clone().requires_grad_(), (scale * x).requires_grad_()
    u, v = loss(a, y), loss(b, y)
    assert u == v
    u.backward()
    v.backward()
    # |gradient| goes as 1 / |x|; 2^-60 to 2^100 keep both in range.
    torch.testing.assert_close(b.grad * scale, a.grad, rtol=1e-5, atol=1e-12)


def test_rows_whose_square_underflows_count_as_zero():
    x, y = batch(4, [3, 3])
    x = x.float()
    x[0] *= 1e-30
    x.requires_grad_()
    assert (retrieval_lists(x, y).scores[0] == 0).all()
    loss(x, y).backward()
    assert torch.isfinite(x.grad).all()


@kinds
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_a_non_finite_row_is_not_ranked_in_silence(kind, bad):
    x, y = batch(5, [3, 3])
    x[1, 0] = bad
    assert ap(retrieval_lists(x, y, similarity=kind)).isnan().all()


@kinds
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_dtypes(kind, dtype):
    x, y = batch(6, [5, 4])
    x = x.to(dtype).requires_grad_()
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    lists = retrieval_lists(x, y, similarity=kind)
    assert lists.scores.dtype == wide
    exact = retrieval_lists(x.detach().double(), y, similarity=kind)
    # Half input is exact in float32: what remains is the rounding of sums of 5 products.
    eps = torch.finfo(wide).eps
    torch.testing.assert_close(lists.scores.double(), exact.scores, rtol=10 * eps, atol=50 * eps)
    ap(lists).sum().backward()
    assert x.grad.dtype == dtype
    refs = {"ref_embeddings": x.detach().double(), "ref_labels": y}
    assert retrieval_lists(x, y, similarity=kind, **refs).scores.dtype == wide


@kinds
@pytest.mark.parametrize("compiled", [False, True])
def test_autocast_is_an_island(kind, compiled):
    x, y = batch(7, [5, 4])
    x = x.float()
    refs = {"ref_embeddings": x[:4].bfloat16(), "ref_labels": y[:4]}

    def scores(x):
        return [retrieval_lists(x, y, similarity=kind, **r).scores for r in ({}, refs)]

    fn = compile_fresh(scores)[0] if compiled else scores
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = fn(x)
        labels = torch.nn.functional.one_hot(y).bool()
        assert torch.equal(retrieval_lists(x, labels).pos_mask, retrieval_lists(x, y).pos_mask)
    for a, b in zip(inside, scores(x), strict=True):
        assert a.dtype == torch.float32
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


@kinds
def test_transforms_agree(kind):
    xs, ys = (torch.stack(t) for t in zip(*(batch(k, [4, 3, 1]) for k in range(3)), strict=True))

    def one(x, y):
        return loss(x, y, similarity=kind)

    a = xs.clone().requires_grad_()
    value = torch.stack([one(x, y) for x, y in zip(a, ys, strict=True)])
    value.sum().backward()
    torch.testing.assert_close(vmap(one)(xs, ys), value, **TIGHT)
    torch.testing.assert_close(vmap(grad(one))(xs, ys), a.grad, **TIGHT)
    torch.testing.assert_close(vmap(one, in_dims=(0, None))(xs, ys[0])[0], value[0], **TIGHT)
    jac = jacrev(lambda x: ap(retrieval_lists(x, ys, similarity=kind)))(xs)
    each = vmap(jacrev(lambda x, y: ap(retrieval_lists(x, y, similarity=kind))))(xs, ys)
    for k in range(3):
        torch.testing.assert_close(jac[k, :, k], each[k], **TIGHT)


@pytest.mark.parametrize("mode", ["value", "backward", "grad", "vmap(grad)"])
def test_compiled_agrees(mode):
    x, y = batch(8, [4, 3, 1])
    xs, ys = torch.stack([x, x.flip(0)]), torch.stack([y, y.flip(0)])

    def total(x):
        return loss(x, y)

    fns = {
        "value": (total, x),
        "backward": (total, x),
        "grad": (grad(total), x),
        "vmap(grad)": (lambda xs: vmap(grad(loss))(xs, ys), xs),
    }
    fn, at = fns[mode]
    compiled, _ = compile_fresh(fn)
    if mode == "backward":
        a = at.clone().requires_grad_()
        compiled(a).backward()
        torch.testing.assert_close(a.grad, grad(total)(at), **TIGHT)
    else:
        torch.testing.assert_close(compiled(at), fn(at), **TIGHT)


def test_compiles_once_over_steps():
    compiled, compiles = compile_fresh(loss)
    for k in range(1, 6):
        x, y = batch(k, [4, 3, 1])
        tau = torch.tensor(0.1 * k, dtype=torch.float64)
        torch.testing.assert_close(compiled(x, y, tau), loss(x, y, tau), **TIGHT)
    assert compiles() == 1


@pytest.mark.parametrize("make", [batch, separable])
def test_published_loss_where_it_is_right(make):
    """It needs sorted rows and as many classes as rows per class, and ranks the query itself."""
    losses = pytest.importorskip("pytorch_metric_learning.losses")
    x, y = make(9, [8] * 8)
    x, y = x[y.argsort()].float(), y.sort().values
    theirs = losses.SmoothAPLoss(temperature=TAU)(x, y).item()
    # Scores around 1 are rounded to eps / 2, the sigmoids' arguments to eps / tau.
    eps = torch.finfo(torch.float32).eps
    assert loss(x, y, ref_embeddings=x, ref_labels=y).item() == pytest.approx(
        theirs, abs=10 * eps / TAU
    )


@pytest.mark.parametrize(
    ("kwargs", "error", "says"),
    [
        ({"similarity": "l2"}, ValueError, r"similarity must be one of \['cosine', 'dot'\], got"),
        ({"embeddings": [[1.0]]}, TypeError, "embeddings must be a floating.*, got list"),
        ({"embeddings": torch.ones(6, 3).long()}, TypeError, "embeddings must be .*torch.int64"),
        ({"embeddings": torch.ones(6)}, ValueError, r"\[..., rows, D\] with D >= 1, got \[6\]"),
        ({"embeddings": torch.ones(6, 0)}, ValueError, r"D >= 1, got \[6, 0\]"),
        ({"labels": [0] * 6}, TypeError, "labels must be a tensor of integers .*, got list"),
        ({"embeddings": torch.ones(6, 3).numpy()}, TypeError, "got ndarray; torch.as_tensor makes"),
        ({"labels": torch.ones(6)}, TypeError, "integers .*torch.float32; pass labels.long"),
        ({"labels": torch.ones(6, 1).long()}, ValueError, r"pass labels\[:, 0\]"),
        ({"labels": torch.ones(6, 4).long()}, ValueError, r"pass labels.argmax\(1\)"),
        ({"labels": torch.ones(6) * 1j}, TypeError, "labels must be a tensor of .*complex"),
        ({"labels": torch.ones(5).long()}, ValueError, r"of embeddings \[6, 3\], got \[5\]"),
        ({"labels": torch.tensor(1)}, ValueError, r"got \[\] of torch.int64"),
        ({"labels": BOOLS[:, 0]}, ValueError, r"bool \[..., rows, L\].*got \[6\] of torch.bool"),
        ({"labels": torch.ones(2, 6).long(), "embeddings": torch.ones(3, 6, 3)}, ValueError,
         r"leading axes of embeddings \[3, 6, 3\], got \[2, 6\]"),
        ({"ref_labels": None}, ValueError, "must be given together, got no ref_labels"),
        ({"ref_embeddings": None}, ValueError, "must be given together, got no ref_embeddings"),
        ({"ref_embeddings": torch.ones(4)}, ValueError, "ref_embeddings must be"),
        ({"ref_embeddings": torch.ones(4, 2)}, ValueError, r"expected \[..., 3\], got \[4, 2\]"),
        ({"ref_labels": torch.ones(6).long()}, ValueError, r"ref_embeddings \[4, 3\], got \[6\]"),
        ({"ref_labels": BOOLS[:4]}, TypeError, "ref_labels must be of the kind of labels.*int64"),
        ({"labels": BOOLS, "ref_labels": BOOLS[:4, :1]}, ValueError,
         r"as many labels as labels: expected \[..., 2\], got \[4, 1\]"),
        ({"embeddings": torch.ones(2, 6, 3), "ref_embeddings": torch.ones(5, 4, 3)}, ValueError,
         r"leading axes of queries and references must broadcast, got \[2\] and \[5\]"),
    ],
)  # fmt: skip
def test_bad_arguments(kwargs, error, says):
    good = {
        "embeddings": torch.ones(6, 3), "labels": torch.arange(6),
        "ref_embeddings": torch.ones(4, 3), "ref_labels": torch.arange(4),
    }  # fmt: skip
    retrieval_lists(**good)
    with pytest.raises(error, match=says):
        retrieval_lists(**(good | kwargs))


def test_scores_train_a_model():
    """A few steps of gradient descent separate overlapping classes."""
    x, y = batch(10, [6, 6, 6])
    weight = torch.eye(5, dtype=torch.float64).requires_grad_()
    first = loss(x @ weight, y).item()
    for _ in range(60):
        (step,) = torch.autograd.grad(loss(x @ weight, y), weight)
        weight = (weight - step).detach().requires_grad_()
    assert loss(x @ weight, y).item() < first - 0.1
