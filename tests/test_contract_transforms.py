"""The contract matrix, second half: vmap, func, compile, autocast, export."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.func import grad, jacrev, vmap

import proxy_losses as P

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
    sizes = {0: torch.export.Dim("lists"), 1: torch.export.Dim("rows")}  # of any size
    program = torch.export.export(
        Module(), (scores, pos, tau), dynamic_shapes=(sizes, sizes, None)
    ).module()
    for some in (scores, pos), lists(17, 4, 9), lists(18, 2, 51):
        torch.testing.assert_close(program(*some, tau), metric.fn(*some, tau), **TIGHT)


@pytest.mark.parametrize("fn", [P.smooth_ap, P.partial_auc])
@pytest.mark.parametrize("kind", [np.float32, np.int64])
def test_a_number_of_numpy_is_a_temperature_in_compiled_code(fn, kind):
    scores, pos = lists(20, 3, 7)
    compiled, compiles = compile_fresh(lambda t: fn(scores, pos, t), "eager")
    for tau in map(kind, (1, 2, 3)):
        torch.testing.assert_close(compiled(tau), fn(scores, pos, tau), **TIGHT)
    assert compiles() == 1


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
