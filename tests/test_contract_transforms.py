"""The contract matrix, second half: vmap, func, compile, autocast, export."""

from __future__ import annotations

import pytest
import torch
from torch.func import grad, jacrev, vmap

from .compiling import compile_fresh
from .metrics import TAU, TIGHT, every_metric, lists


@every_metric
def test_transforms_agree(metric):
    scores, pos = lists(12, 3, 20)
    tau = torch.tensor(TAU, dtype=torch.float64)

    def one(s, p):
        return metric.fn(s, p, tau)

    s = scores.clone().requires_grad_()
    value = metric.fn(s, pos, tau)
    value.sum().backward()
    torch.testing.assert_close(vmap(one)(scores, pos), value, **TIGHT)
    torch.testing.assert_close(vmap(grad(one))(scores, pos), s.grad, **TIGHT)
    torch.testing.assert_close(vmap(one, in_dims=(0, None))(scores, pos[0])[0], value[0], **TIGHT)
    jac = jacrev(lambda x: metric.fn(x, pos, tau))(scores)
    torch.testing.assert_close(jac.sum(0), s.grad, **TIGHT)


@every_metric
def test_batched_gradients_keep_their_graph(metric):
    """Of autograd's own vmap, which loses the graph of a Function that does not know it."""
    scores, pos = lists(18, 2, 10)
    scores.requires_grad_()
    tau = torch.tensor(TAU, dtype=torch.float64, requires_grad=True)
    weight = torch.linspace(0.5, 1.5, 10, dtype=torch.float64, requires_grad=True)
    given = scores, tau, weight
    cotangents = torch.tensor([[1.0, 0.0], [0.5, -2.0]], dtype=torch.float64)

    def grads(out, *, batched, last=False):
        how = {"create_graph": not last, "retain_graph": True, "materialize_grads": True}
        if batched:
            return torch.autograd.grad(out, given, cotangents, is_grads_batched=True, **how)
        rows = [torch.autograd.grad(out, given, c, **how) for c in cotangents]
        return [torch.stack(x) for x in zip(*rows, strict=True)]

    found = []
    for batched in (False, True):
        value = metric.fn(scores, pos, tau, sample_weight=weight)
        first = grads(value, batched=batched)
        # Products, so that the second derivative depends on all of the first.
        second = grads(sum(x.square().reshape(2, -1).sum(1) for x in first), batched=batched)
        third = grads(
            sum(x.square().reshape(2, -1).sum(1) for x in second), batched=batched, last=True
        )
        found.append([*first, *second, *third])
    for want, got in zip(*found, strict=True):
        torch.testing.assert_close(got, want, **TIGHT)
    assert all(x.abs().max() > 0 for x in found[1][::3])
    value = vmap(lambda s, p: metric.fn(s, p, tau))(scores, pos)
    mapped = torch.autograd.grad(value, scores, cotangents, is_grads_batched=True)
    want = torch.autograd.grad(
        metric.fn(scores, pos, tau), scores, cotangents, is_grads_batched=True
    )
    torch.testing.assert_close(mapped, want, **TIGHT)


@every_metric
@pytest.mark.parametrize("mode", ["value", "backward", "grad", "vmap(grad)", "jacrev"])
def test_compiled_agrees(metric, mode):
    """Values, not absence of errors: compiled func.grad can silently drop a custom backward.

    What is traced does not depend on the backend; tests/test_inductor.py makes kernels of it.
    """
    scores, pos = lists(13, 3, 20)
    tau = torch.tensor(TAU, dtype=torch.float64)

    def total(s):
        return metric.fn(s, pos, tau).sum()

    fns = {
        "value": total,
        "backward": total,
        "grad": grad(total),
        "vmap(grad)": lambda s: vmap(grad(lambda x, p: metric.fn(x, p, tau)))(s, pos),
        "jacrev": jacrev(lambda s: metric.fn(s, pos, tau)),
    }
    compiled, _ = compile_fresh(fns[mode], "aot_eager")
    if mode == "backward":
        s = scores.clone().requires_grad_()
        compiled(s).backward()
        torch.testing.assert_close(s.grad, grad(total)(scores), **TIGHT)
    else:
        torch.testing.assert_close(compiled(scores), fns[mode](scores), **TIGHT)


@every_metric
def test_compiles_once_while_tau_varies(metric):
    scores, pos = lists(14, 3, 20)
    compiled, compiles = compile_fresh(lambda s, t: metric.fn(s, pos, t), "aot_eager")
    for k in range(1, 12):
        tau = torch.tensor(0.1 * k, dtype=torch.float64)
        torch.testing.assert_close(compiled(scores + k, tau), metric.fn(scores, pos, tau), **TIGHT)
    assert compiles() == 1


@every_metric
@pytest.mark.parametrize("compiled", [False, True])
def test_autocast_is_an_island(metric, compiled):
    scores, pos = lists(15, 3, 20, dtype=torch.float32)
    fn = compile_fresh(metric.fn, "aot_eager")[0] if compiled else metric.fn
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = fn(scores, pos, TAU)
    assert inside.dtype == torch.float32
    torch.testing.assert_close(inside, metric.fn(scores, pos, TAU), rtol=1e-6, atol=0)


@every_metric
def test_export(metric):
    class Module(torch.nn.Module):
        def forward(self, scores, pos, tau):
            return metric.fn(scores, pos, tau)

    scores, pos = lists(16, 3, 20)
    tau = torch.tensor(TAU, dtype=torch.float64)
    program = torch.export.export(Module(), (scores, pos, tau)).module()
    torch.testing.assert_close(program(scores, pos, tau), metric.fn(scores, pos, tau), **TIGHT)


@every_metric
def test_forward_mode_never_lies(metric):
    """A right tangent or an error: a silent zero is the known failure of opaque ops."""
    scores, pos = lists(17, 12)
    direction = torch.randn(12, dtype=torch.float64)

    def f(s):
        return metric.fn(s, pos, TAU)

    try:
        _, tangent = torch.func.jvp(f, (scores,), (direction,))
    except NotImplementedError:
        return
    torch.testing.assert_close(tangent, grad(f)(scores) @ direction, **TIGHT)
