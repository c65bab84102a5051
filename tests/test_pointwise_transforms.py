"""The contract matrix of the pointwise losses, second half: vmap, func, compile, autocast."""

from __future__ import annotations

import pytest
import torch
from torch.func import functional_call, grad, jacrev, jvp, vmap

from .compiling import compile_fresh
from .pointwise import TIGHT, batch, every_loss, every_option


@every_option
def test_transforms_agree(loss, options):
    x, t, w = batch(loss, 20, 15, 4)
    x, t, w = (a.reshape(3, 5, *a.shape[1:]) for a in (x, t, w))

    def one(x, t, w):
        return loss.fn(x, t, sample_weight=w, **options)

    leaf = x.clone().requires_grad_()
    values = torch.stack([one(leaf[k], t[k], w[k]) for k in range(3)])
    values.sum().backward()
    torch.testing.assert_close(vmap(one)(x, t, w), values, **TIGHT)
    torch.testing.assert_close(vmap(grad(one))(x, t, w), leaf.grad, **TIGHT)
    for k, dims in enumerate([(0, None, None), (None, 0, None), (None, None, 0)]):
        args = [a if d == 0 else a[1] for a, d in zip((x, t, w), dims, strict=True)]
        torch.testing.assert_close(vmap(one, in_dims=dims)(*args)[1], values[1], **TIGHT)
        assert args[k].dim() == (x, t, w)[k].dim()
    torch.testing.assert_close(jacrev(one)(x[0], t[0], w[0]), leaf.grad[0], **TIGHT)
    direction = torch.randn_like(x[0])
    _, tangent = jvp(lambda x: one(x, t[0], w[0]), (x[0],), (direction,))
    torch.testing.assert_close(tangent, (leaf.grad[0] * direction).sum(), **TIGHT)


@every_loss
def test_compiled_agrees(loss):
    """The default options are compiled below; here those that take most of the code."""
    (x, t, w), options = batch(loss, 21), loss.options[1]

    def total(x):
        return loss.fn(x, t, sample_weight=w, **options)

    def row(x, t):
        return loss.fn(x[None], t[None], **options)

    def everything(x):
        each = loss.fn(x, t, reduction="none", **options)
        return total(x), each, grad(total)(x), vmap(grad(row))(x, t), jacrev(total)(x)

    compiled, _ = compile_fresh(everything)  # one graph: each takes seconds
    for got, want in zip(compiled(x), everything(x), strict=True):
        torch.testing.assert_close(got, want, **TIGHT)


@every_loss
def test_backward_of_a_compiled_loss(loss):
    x, t, w = batch(loss, 26)
    compiled, _ = compile_fresh(loss.fn)
    leaf = x.clone().requires_grad_()
    compiled(leaf, t, sample_weight=w).backward()
    want = grad(lambda x: loss.fn(x, t, sample_weight=w))(x)
    torch.testing.assert_close(leaf.grad, want, **TIGHT)


@every_loss
def test_compiled_extremes_are_the_eager_ones(loss):
    """The compiler has its own formulas for what is below."""
    g = torch.Generator().manual_seed(22)
    x = torch.tensor([0.0, 30.0, 110.0, 1e4])[torch.randint(4, (40, 4), generator=g)]
    x *= torch.randint(-1, 2, (40, 4), generator=g)
    t = loss.targets(x, g)
    x[0] = torch.tensor([torch.inf, -torch.inf, torch.nan, 0.0])
    for gamma in (0.5, 2.0):

        def each(x, gamma=gamma):
            return loss.fn(x, t, gamma=gamma, reduction="none")

        compiled, _ = compile_fresh(each)
        # Logits of 30 have logarithms that 30 * eps moves.
        tol = {"rtol": 100 * torch.finfo(torch.float32).eps, "atol": 1e-37}
        a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
        got, want = compiled(a), each(b)
        torch.testing.assert_close(got, want, equal_nan=True, **tol)
        got[1:].sum().backward()
        want[1:].sum().backward()
        torch.testing.assert_close(a.grad[1:], b.grad[1:], **tol)
        assert a.grad[1:].isfinite().all()


@every_loss
def test_compiles_once_while_data_and_gamma_vary(loss):
    compiled, compiles = compile_fresh(
        lambda x, t, w, gamma: loss.fn(x, t, gamma=gamma, sample_weight=w)
    )
    for k in range(12):
        args = *batch(loss, k), torch.tensor(0.25 * k)
        want = loss.fn(*args[:2], sample_weight=args[2], gamma=args[3])
        torch.testing.assert_close(compiled(*args), want, **TIGHT)
    assert compiles() == 1
    for n in (9, 4, 11, 5):  # other sizes compile once more
        args = *batch(loss, n, n, 4), torch.tensor(0.5)
        want = loss.fn(*args[:2], sample_weight=args[2], gamma=args[3])
        torch.testing.assert_close(compiled(*args), want, **TIGHT)
    assert compiles() == 2


@every_loss
def test_a_compiled_module_is_the_eager_one(loss):
    module = loss.module()
    compiled, compiles = compile_fresh(module)
    for k in range(10):
        x, t, w = batch(loss, k)
        torch.testing.assert_close(
            compiled(x, t, sample_weight=w), module(x, t, sample_weight=w), **TIGHT
        )
    # The first call settles whether to gather.
    assert compiles() <= 2


@every_loss
def test_a_module_works_inside_vmap(loss):
    module = loss.module()
    x, t, w = batch(loss, 23, 15, 4)
    x, t, w = (a.reshape(3, 5, *a.shape[1:]) for a in (x, t, w))

    def call(x, t, w):
        return functional_call(module, {}, (x, t), {"sample_weight": w})

    want = torch.stack([call(x[k], t[k], w[k]) for k in range(3)])
    torch.testing.assert_close(vmap(call)(x, t, w), want, **TIGHT)


@every_loss
@pytest.mark.parametrize("compiled", [False, True])
def test_autocast_is_an_island(loss, compiled):
    x, t, w = batch(loss, 24, dtype=torch.float32)
    fn = compile_fresh(loss.fn)[0] if compiled else loss.fn
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = fn(x, t, sample_weight=w)
        half = fn(x.bfloat16(), t, sample_weight=w)
    for got, x_ in ((inside, x), (half, x.bfloat16().float())):
        assert got.dtype == torch.float32
        torch.testing.assert_close(got, loss.fn(x_, t, sample_weight=w), rtol=1e-6, atol=0)


@every_option
def test_export(loss, options):
    class Module(torch.nn.Module):
        def forward(self, x, t, w):
            return loss.fn(x, t, sample_weight=w, **options)

    args = batch(loss, 25)
    program = torch.export.export(Module(), args).module()
    torch.testing.assert_close(program(*args), Module()(*args), **TIGHT)
    module = torch.export.export(loss.module(), args[:2]).module()
    torch.testing.assert_close(module(*args[:2]), loss.module()(*args[:2]), **TIGHT)
