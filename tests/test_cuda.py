"""On a GPU: the same numbers as on the CPU, no waiting, captured graphs, the doctor."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

if not torch.cuda.is_available():
    pytest.skip("needs a GPU", allow_module_level=True)

import proxy_losses as P
from benchmarks.gpu import captured
from proxy_losses._ranks import PRECISION, How, Lists, rank_mean
from proxy_losses._retrieval import BY_NAME
from proxy_losses.doctor.__main__ import main as doctor

from . import exact
from .metrics import EXAMPLES

SCHEDULE = P.Schedule(
    warmup_steps=2, blend_steps=2, temp_start=0.5, temp_end=0.1, temp_decay_steps=4
)
examples = pytest.mark.parametrize("example", EXAMPLES.values(), ids=EXAMPLES.keys())


def module(example: Any, classes: int = 1, **more: Any) -> Any:
    cls = getattr(P, example.metric.module)
    return cls(classes, **{"queue_size": 64, "temperature": 0.2, **example.arguments, **more})


def batch(seed: int, rows: int = 48, classes: int = 1) -> tuple[Tensor, Tensor]:
    gen = torch.Generator().manual_seed(seed)
    logits = torch.randn(rows, classes, generator=gen)
    targets = torch.randint(max(classes, 2), (rows,), generator=gen)
    targets[3] = -100
    return logits, targets


@contextmanager
def no_host_read() -> Iterator[None]:
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@examples
@pytest.mark.parametrize("rows", [70, 20_000])
@pytest.mark.parametrize("masked", [False, True])
def test_functions_are_those_of_the_cpu(example: Any, rows: int, masked: bool) -> None:
    gen = torch.Generator().manual_seed(rows)
    scores, pos = torch.randn(3, rows, generator=gen), torch.rand(3, rows, generator=gen) < 0.1
    more = {}
    if masked:
        more = {
            "valid_mask": torch.rand(3, rows, generator=gen) < 0.8,
            "sample_weight": torch.rand(3, rows, generator=gen),
        }
    found = []
    for device in ("cuda", "cpu"):
        x = scores.to(device, torch.float32 if device == "cuda" else torch.float64)
        x.requires_grad_()
        here = {name: mask.to(device) for name, mask in more.items()}
        value = example.metric.function(x, pos.to(device), 0.1, **here, **example.settings)
        found.append((value, *torch.autograd.grad(value.sum(), x)))
    (value, g), (wanted, wanted_g) = found
    # Values 1e-6, with thresholds as float32 has them; gradients 3e-6 of the norm.
    torch.testing.assert_close(value.cpu().double(), wanted.double(), rtol=1e-5, atol=2e-6)
    off = (g.cpu().double() - wanted_g).norm(dim=1)
    assert (off <= 1e-5 * wanted_g.norm(dim=1).clamp(min=1e-3)).all()


@pytest.mark.parametrize("kind", ["normal", "ties", "clump", "outliers", "shifted", "scattered"])
@pytest.mark.parametrize("method", ["dense", "grid"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(
    ("lists", "rows", "tau"), [(1, 30_000, 0.05), (2, 5_000, 0.003), (5, 300, 1.0)]
)
def test_stress_against_float64(
    kind: str, method: str, dtype: torch.dtype, lists: int, rows: int, tau: float
) -> None:
    gen = torch.Generator().manual_seed(rows)
    s = torch.randn(lists, rows, generator=gen, dtype=torch.float64)
    some = torch.rand(lists, rows, generator=gen)
    s = {
        "normal": s, "ties": (s * 4).round() / 4,
        "clump": torch.where(some < 0.5, s * 1e-3, s * 50.0),
        "outliers": torch.where(some < 1e-3, s * 1e20, s), "shifted": s * 0.1 + 50.0,
        "scattered": some.double() * rows * 20 * tau,
    }[kind].to(dtype)  # fmt: skip
    pos = torch.rand(lists, rows, generator=gen) < 0.05
    valid = torch.rand(lists, rows, generator=gen) < 0.9
    x = s.cuda().requires_grad_()
    mean, _ = rank_mean(Lists(x, pos.cuda(), valid.cuda()), tau, PRECISION, How(method=method))
    (g,) = torch.autograd.grad(mean.sum(), x)
    rtol = exact.RTOL[dtype]
    for k in range(lists):
        wanted = exact.smooth_ap(s[k], pos[k], tau, valid[k])
        assert abs(float(mean[k]) - wanted.value) <= rtol + exact.ULP[dtype]
        off = torch.linalg.norm(g[k].cpu().double() - torch.as_tensor(wanted.grad))
        assert float(off) <= 3 * rtol * wanted.natural


@examples
def test_same_bits_from_run_to_run(example: Any) -> None:
    gen = torch.Generator().manual_seed(0)
    scores = torch.randn(2, 40_000, generator=gen).cuda()
    pos = torch.rand(2, 40_000, generator=gen).cuda() < 0.05
    runs = []
    for _ in range(3):
        x = scores.clone().requires_grad_()
        value = example.metric.function(x, pos, 0.05, **example.settings)
        runs.append((value, *torch.autograd.grad(value.sum(), x)))
    for run in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(run, runs[0], strict=True))


@examples
@pytest.mark.parametrize("classes", [1, 10])
def test_modules_are_those_of_the_cpu_and_wait_for_nothing(example: Any, classes: int) -> None:
    here = module(example, classes)
    there = copy.deepcopy(here).cuda()
    for step in range(5):
        logits, targets = batch(step, classes=classes)
        x, z = logits.clone().requires_grad_(), logits.cuda().requires_grad_()
        y = targets.cuda()
        with no_host_read():
            loss = there(z, y)
            loss.backward()
        wanted = here(x, targets)
        wanted.backward()
        torch.testing.assert_close(loss.cpu(), wanted, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(z.grad.cpu(), x.grad, rtol=1e-3, atol=1e-6)
    for name, buffer in here.state_dict().items():
        if isinstance(buffer, Tensor) and buffer.is_floating_point():
            torch.testing.assert_close(there.state_dict()[name].cpu(), buffer, rtol=0, atol=0)


@pytest.mark.parametrize("memory", [0, 64])
@pytest.mark.parametrize("metric", BY_NAME)
def test_retrieval_is_that_of_the_cpu_and_waits_for_nothing(metric: str, memory: int) -> None:
    here = P.RetrievalLoss(metric, memory_size=memory, embedding_dim=8 if memory else None)
    there = copy.deepcopy(here).cuda()
    gen = torch.Generator().manual_seed(0)
    for _ in range(3):
        x, ids = torch.randn(40, 8, generator=gen), torch.randint(5, (40,), generator=gen)
        a, b, there_ids = x.clone().requires_grad_(), x.cuda().requires_grad_(), ids.cuda()
        with no_host_read():
            loss = there(b, there_ids)
            loss.backward()
        wanted = here(a, ids)
        wanted.backward()
        torch.testing.assert_close(loss.cpu(), wanted, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(b.grad.cpu(), a.grad, rtol=1e-2, atol=1e-5)


@examples
def test_functions_wait_for_nothing(example: Any) -> None:
    scores = torch.randn(2, 5_000, device="cuda", requires_grad=True)
    pos = torch.rand(2, 5_000, device="cuda") < 0.05
    tau = torch.tensor(0.1, device="cuda", requires_grad=True)
    weight = torch.rand(2, 5_000, device="cuda", requires_grad=True)
    plain = tau.detach(), weight.detach()  # kernels may give what has no other gradient
    for unit, rated in ((tau, weight), plain) * 2:  # the first call compiles kernels
        with no_host_read():
            value = example.metric.function(
                scores, pos, unit, sample_weight=rated, **example.settings
            )
            inputs = [x for x in (scores, unit, rated) if x.requires_grad]
            torch.autograd.grad(value.sum(), inputs)


@examples
def test_a_captured_module_step_is_an_eager_one(example: Any) -> None:
    eager, graphed = module(example).cuda(), module(example).cuda()
    z, y = (x.cuda() for x in batch(0))
    z.requires_grad_()

    def step() -> tuple[Tensor, Tensor]:
        loss = graphed(z, y)
        return loss, torch.autograd.grad(loss, z)[0]

    graph, out = captured(step)
    eager.load_state_dict(graphed.state_dict())
    for turn in range(1, 6):
        logits, targets = (x.cuda() for x in batch(turn))
        with torch.no_grad():
            z.copy_(logits)
            y.copy_(targets)
        graph.replay()
        x = logits.clone().requires_grad_()
        loss = eager(x, targets)
        (g,) = torch.autograd.grad(loss, x)
        assert torch.equal(out[0], loss)
        assert torch.equal(out[1], g)


@examples
def test_reduce_overhead_is_eager(example: Any) -> None:
    eager, graphed = module(example).cuda(), module(example).cuda()
    compiled = torch.compile(graphed, mode="reduce-overhead", fullgraph=True)
    for turn in range(6):
        z, y = (x.cuda() for x in batch(turn))
        z.requires_grad_()
        torch.compiler.cudagraph_mark_step_begin()
        loss = compiled(z, y)
        (g,) = torch.autograd.grad(loss, z)
        x = z.detach().clone().requires_grad_()
        wanted = eager(x, y)
        (wanted_g,) = torch.autograd.grad(wanted, x)
        torch.testing.assert_close(loss, wanted, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(g, wanted_g, rtol=1e-3, atol=1e-6)


def test_the_functional_step_of_the_readme() -> None:
    def step(logits: Tensor, targets: Tensor, queue: Any, at: Tensor) -> tuple[Tensor, Any]:
        tau = P.temp_at(at, SCHEDULE)
        return P.smooth_ap_loss(logits, targets, queue, tau)

    fast = torch.compile(step, mode="reduce-overhead", fullgraph=True)
    queues = [P.init_queue(64, 1, device="cuda") for _ in range(2)]
    for turn in range(6):
        logits, targets = (x.cuda() for x in batch(turn))
        at = torch.tensor(turn, device="cuda")
        torch.compiler.cudagraph_mark_step_begin()
        x = logits.clone().requires_grad_()
        loss, new = fast(x, targets, queues[0], at)
        (g,) = torch.autograd.grad(loss, x)
        queues[0] = P.QueueState(*(field.clone() for field in new))
        z = logits.clone().requires_grad_()
        wanted, queues[1] = step(z, targets, queues[1], at)
        (wanted_g,) = torch.autograd.grad(wanted, z)
        torch.testing.assert_close(loss, wanted, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(g, wanted_g, rtol=1e-3, atol=1e-6)


def test_autocast_vmap_and_grad() -> None:
    scores = torch.randn(4, 300, device="cuda")
    pos = torch.rand(4, 300, device="cuda") < 0.2
    value = P.smooth_ap(scores, pos, 0.1)
    with torch.autocast("cuda"):
        torch.testing.assert_close(P.smooth_ap(scores, pos, 0.1), value, rtol=0, atol=0)
    each = torch.func.vmap(torch.func.grad(lambda s, p: P.smooth_ap(s, p, 0.1)))(scores, pos)
    (g,) = torch.autograd.grad(P.smooth_ap(scores.requires_grad_(), pos, 0.1).sum(), scores)
    torch.testing.assert_close(each, g, rtol=1e-6, atol=1e-8)


def test_the_doctor_finds_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    one = ["--device", "cuda", "--processes", "1", "--backend", "nccl"]
    assert doctor(one) == 0, capsys.readouterr().out
