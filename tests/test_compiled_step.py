"""One compiled training step: model, loss, queue, schedule and optimiser, for many steps."""

from __future__ import annotations

import pytest
import torch
from torch.func import functional_call, grad_and_value

import proxy_losses as P
from proxy_losses._checks import is_labels

from .compiling import compile_fresh
from .test_step import LOSSES, every_loss

SCHED = P.Schedule(
    warmup_steps=5, blend_steps=6, temp_start=0.5, temp_end=0.05, temp_decay_steps=12
)


def make_step(model: torch.nn.Module, lr: float = 0.1):
    def objective(params, x, y, queue, step):
        logits = functional_call(model, params, (x,))
        bce = torch.nn.functional.binary_cross_entropy_with_logits(logits[:, 0], y.to(logits))
        loss, queue = P.smooth_ap_loss(logits, y, queue, P.temp_at(step, SCHED))
        w = P.blend_weight(step, SCHED).to(loss.dtype)
        return (1 - w) * bce + w * loss, queue

    def train_step(params, x, y, queue, step):
        grads, (loss, queue) = grad_and_value(objective, has_aux=True)(params, x, y, queue, step)
        params = {k: p - lr * grads[k] for k, p in params.items()}
        return loss, params, queue, step + 1

    return train_step


def data(k: int, n: int = 16):
    g = torch.Generator().manual_seed(k)
    x = torch.randn(n, 4, generator=g, dtype=torch.float64)
    return x, (x[:, 0] + 0.5 * torch.randn(n, generator=g, dtype=torch.float64) > 1).long()


@pytest.mark.parametrize("steps", [24])
def test_one_compile_equal_to_eager(steps):
    torch.manual_seed(0)
    model = torch.nn.Linear(4, 1, dtype=torch.float64)
    eager = make_step(model)
    compiled, compiles = compile_fresh(make_step(model))
    runs = []
    for train_step in (eager, compiled):
        params = {k: p.detach().clone() for k, p in model.named_parameters()}
        queue = P.init_queue(40, 1, dtype=torch.float64)
        step = torch.zeros((), dtype=torch.int64)
        losses = []
        for k in range(steps):
            loss, params, queue, step = train_step(params, *data(k), queue, step)
            losses.append(loss)
        runs.append((torch.stack(losses), params, queue, step))
    assert compiles() == 1
    (l0, p0, q0, s0), (l1, p1, q1, s1) = runs
    # Fused kernels may round differently in each of a few hundred operations.
    torch.testing.assert_close(l0, l1, rtol=1e-10, atol=1e-12)
    for k in p0:
        torch.testing.assert_close(p0[k], p1[k], rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(q0.logits, q1.logits, rtol=1e-10, atol=1e-12)
    assert torch.equal(q0.targets, q1.targets)
    assert q0.enqueued == q1.enqueued == 16 * steps
    assert s0 == s1 == steps
    assert type(q1) is P.QueueState
    assert l0[-1] < l0[SCHED.warmup_steps + SCHED.blend_steps]  # it learns


def test_ragged_batches_settle():
    """A smaller last batch compiles once more, then every size is served."""
    model = torch.nn.Linear(4, 1, dtype=torch.float64)
    compiled, compiles = compile_fresh(make_step(model))
    params = {k: p.detach().clone() for k, p in model.named_parameters()}
    queue, step = P.init_queue(40, 1, dtype=torch.float64), torch.zeros((), dtype=torch.int64)
    for k, n in enumerate((16, 16, 9, 16, 12, 7, 16, 11)):
        _, params, queue, step = compiled(params, *data(k, n), queue, step)
    assert compiles() <= 2


def test_integer_steps_settle():
    compiled, compiles = compile_fresh(lambda k: (P.temp_at(k, SCHED), P.blend_weight(k, SCHED)))
    for k in range(12):
        temp, weight = compiled(k)
        torch.testing.assert_close(temp, P.temp_at(k, SCHED), rtol=1e-12, atol=0)
        torch.testing.assert_close(weight, P.blend_weight(k, SCHED), rtol=1e-12, atol=0)
    assert compiles() <= 3  # 0 and 1 are special to the compiler, then any integer


def test_backward_of_a_compiled_loss():
    """Of one; every module under inductor: `doctor._local.compiled`."""
    loss_fn, _, kwargs = LOSSES["smooth_ap"]
    logits = torch.randn(20, 3, dtype=torch.float64)
    targets = torch.arange(20) % 3
    queue = P.init_queue(32, 3, dtype=torch.float64)
    compiled, _ = compile_fresh(loss_fn)
    grads = []
    for fn in (loss_fn, compiled):
        x = logits.clone().requires_grad_()
        fn(x, targets, queue, torch.tensor(0.3), **kwargs)[0].backward()
        grads.append(x.grad)
    torch.testing.assert_close(*grads, rtol=1e-10, atol=1e-13)


@every_loss
def test_a_loss_compiles_once_over_steps(name):
    """With weights and gradients, over a queue that fills and wraps."""
    loss_fn, _, kwargs = LOSSES[name]

    def step(logits, targets, weight, queue, tau):
        return loss_fn(logits, targets, queue, tau, sample_weight=weight, **kwargs)

    compiled, compiles = compile_fresh(grad_and_value(step, has_aux=True), "aot_eager")
    queue = P.init_queue(40, 3, dtype=torch.float64)
    for k in range(5):
        g = torch.Generator().manual_seed(k)
        logits = torch.randn(16, 3, generator=g, dtype=torch.float64)
        weight = torch.rand(16, generator=g, dtype=torch.float64)
        args = logits, torch.arange(16) % 3, weight, queue, torch.tensor(0.5 / (k + 1))
        grads, (loss, new) = compiled(*args)
        want_grads, (want, queue) = grad_and_value(step, has_aux=True)(*args)
        torch.testing.assert_close((grads, loss), (want_grads, want), rtol=1e-10, atol=1e-13)
        assert all(map(torch.equal, new, queue))
    assert compiles() == 1


def test_kinds_of_targets_are_compared_where_classes_are_symbols():
    """As of a batch and a queue, after modules of several numbers of classes were compiled."""

    def same(a, b):
        return a.sum() if is_labels(a) == is_labels(b) else b.sum()

    torch.compiler.reset()
    compiled = torch.compile(same, fullgraph=True, backend="eager", dynamic=True)
    for classes in (3, 5):
        a, b = torch.ones(2, classes).bool(), torch.ones(2, classes + 3).bool()
        assert compiled(a, b) == 2 * classes
        assert compiled(a, torch.ones(7)) == 7


def test_numpy_steps():
    import numpy as np

    for k in (0, 7, 20):
        assert P.temp_at(np.int64(k), SCHED) == P.temp_at(k, SCHED)
        assert P.blend_weight(np.int32(k), SCHED) == P.blend_weight(k, SCHED)
