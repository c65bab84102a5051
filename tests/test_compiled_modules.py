"""Modules under torch.compile: one graph while the temperature, the queue and the phase change."""

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters

import proxy_losses as P

from .makers import MAKERS, batch, smooth
from .test_wrapper import STEPS, drive


@pytest.mark.parametrize("make", MAKERS)
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])  # inductor: `doctor._local.compiled`
def test_a_compiled_module_follows_its_temperature(make, backend):
    torch.compiler.reset()
    counters.clear()
    module, eager = make(num_classes=3), make(num_classes=3)
    for m in (module, eager):
        m(*batch(0, classes=3))  # whether to gather is decided at the first call
    compiled = torch.compile(module, fullgraph=True, backend=backend)
    exact = {"rtol": 0.0, "atol": 0.0} if backend == "eager" else {}
    for step in range(1, 9):
        module.temperature = eager.temperature = 0.5 / step
        (a, targets), (b, _) = batch(step, classes=3), batch(step, classes=3)
        got, want = compiled(a, targets), eager(b, targets)
        (got + want).backward()
        torch.testing.assert_close((got, a.grad), (want, b.grad), **exact)
        assert all(map(torch.equal, module._queue.state, eager._queue.state))
    assert counters["stats"]["unique_graphs"] == 1


@pytest.mark.parametrize("make", MAKERS)
def test_a_compiled_module_with_queries_and_diagnostics(make):
    torch.compiler.reset()
    counters.clear()
    module, eager = (make(num_classes=3, query_shape=(4, 30)) for _ in "ab")
    query_ids = torch.arange(20) % 3
    for m in (module, eager):  # the queue takes room for ids at the first call
        m(*batch(0, 20, 3), query_ids=query_ids)
    compiled = torch.compile(module, fullgraph=True, backend="eager")
    for step in range(1, 5):
        args = *batch(step, 20, 3), None, True, True
        got = compiled(*args, query_ids=query_ids.roll(step))
        want = eager(*args, query_ids=query_ids.roll(step))
        torch.testing.assert_close(got, want, rtol=0.0, atol=0.0, equal_nan=True)
        assert all(map(torch.equal, module._queue.state, eager._queue.state))
    assert counters["stats"]["unique_graphs"] == 1


def test_a_compiled_wrapper_goes_through_its_phases():
    torch.compiler.reset()
    counters.clear()
    pair = [
        P.LossWarmupWrapper(nn.CrossEntropyLoss(), smooth(num_classes=3), **STEPS) for _ in "ab"
    ]
    compiled = torch.compile(pair[0], fullgraph=True, backend="eager")
    for step, _ in zip(*(drive(wrapper, range(20)) for wrapper in pair), strict=True):
        assert torch.equal(compiled(*batch(step, classes=3)), pair[1](*batch(step, classes=3)))
    # Warmup, the first blend step, every other blend step, the main phase.
    assert counters["stats"]["unique_graphs"] <= 4
