"""Long compiled runs across step 2^24: no leak, no recompile, counters and temperature right."""

from __future__ import annotations

import ctypes
import gc
import math
import sys

import pytest
import torch
from torch import Tensor, nn

import proxy_losses as P

from .compiling import compile_fresh

pytestmark = pytest.mark.slow

EXACT = 2**24  # float32 counts no further
ROWS = 8
STEPS = 8_000  # half of them before it
# The least that one tensor kept per step would take: the allocator hands out lines of 64 bytes.
LEAK = 64
MALLINFO = getattr(ctypes.CDLL(None), "mallinfo2", None)  # of glibc


class Heap(ctypes.Structure):
    """What malloc says of itself; `uordblks` and `hblkhd` are bytes in use."""

    _fields_ = [
        (name, ctypes.c_size_t)
        for name in (
            "arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks",
            "fordblks", "keepcost",
        )
    ]  # fmt: skip


if MALLINFO:
    MALLINFO.restype = Heap
counts_memory = pytest.mark.skipif(not MALLINFO, reason="malloc does not say what is in use")


def batches(count: int = 7) -> list[tuple[Tensor, Tensor]]:
    g = torch.Generator().manual_seed(0)
    out = []
    for _ in range(count):
        x = torch.randn(ROWS, 4, generator=g)
        out.append((x, (x[:, 0] > x[:, 0].median()).long()))
    return out


class Watch:
    """Memory in use from now on: of tensors and what else malloc gives, and of Python's objects."""

    def __init__(self) -> None:
        self.bytes, self.objects = self.used()

    @staticmethod
    def used() -> tuple[int, int]:
        gc.collect()
        heap = MALLINFO()
        return heap.uordblks + heap.hblkhd, sys.getallocatedblocks()

    def flat(self, steps: int) -> None:
        used, objects = self.used()
        assert used - self.bytes < LEAK * steps / 10
        assert objects - self.objects < steps / 10


@counts_memory
def test_the_watch_sees_one_tensor_in_five_steps():
    watch, kept = Watch(), []
    for k in range(500):
        kept += [torch.zeros(1)] if k % 5 == 0 else []
    with pytest.raises(AssertionError):
        watch.flat(500)


def geometric(start: float, end: float, share: float) -> float:
    return math.exp((1.0 - share) * math.log(start) + share * math.log(end))


@counts_memory
def test_a_compiled_function_over_many_steps():
    steps, settled, first, warmup, blend = STEPS, 2_000, EXACT - STEPS // 2, 2_000, 1_000
    sched = P.Schedule(first + warmup, blend, 0.5, 0.05, 2 * steps)

    def objective(weight, x, y, queue, step):
        logits = x @ weight
        warm = nn.functional.binary_cross_entropy_with_logits(logits[:, 0], y.float())
        tau = P.temp_at(step, sched)
        loss, queue = P.smooth_ap_loss(logits, y, queue, tau)
        main = P.blend_weight(step, sched).float()
        return (1.0 - main) * warm + main * loss, (queue, tau, main)

    def train_step(weight, x, y, queue, step):
        grad, (loss, (queue, tau, main)) = torch.func.grad_and_value(objective, has_aux=True)(
            weight, x, y, queue, step
        )
        return loss, weight - 0.01 * grad, queue, step + 1, tau, main

    compiled, compiles = compile_fresh(train_step)
    weight, queue = torch.zeros(4, 1), P.init_queue(20, 1)
    step = torch.full((), first)
    previous, watch, data = math.inf, None, batches()
    for k in range(steps):
        if k == settled:
            watch = Watch()
        loss, weight, queue, step, tau, main = compiled(weight, *data[k % 7], queue, step)
        if k % 499 == 0 and first + k > EXACT:  # each step has a temperature of its own
            assert tau < previous
            previous = tau.item()
            assert P.temp_at(first + k + 1, sched) < previous
    watch.flat(steps - settled)
    assert compiles() == 1
    assert step == first + steps
    assert queue.enqueued == ROWS * steps
    share = (steps - 1 - warmup) / (2 * steps)
    # Float64 throughout: a dozen roundings, times the exponent's condition of log(10).
    assert tau.item() == pytest.approx(geometric(0.5, 0.05, share), rel=1e-13)
    assert main == 1.0
    assert loss.isfinite()


@counts_memory
def test_a_compiled_module_over_many_steps():
    steps, settled, first, warmup, blend = STEPS, 2_500, EXACT - STEPS // 2, 1_000, 1_000
    torch.manual_seed(0)
    model, main = nn.Linear(4, 1), P.SmoothAPLoss(1, queue_size=20, temperature=0.7)

    def bce(logits, targets):
        return nn.functional.binary_cross_entropy_with_logits(logits[:, 0], targets.float())

    wrapper = P.LossWarmupWrapper(
        bce, main, temp_start=0.5, temp_end=0.05, temp_decay_steps=2 * steps,
        warmup_steps=first + warmup, blend_steps=blend,
    )  # fmt: skip
    optimizer, data = torch.optim.SGD(model.parameters(), lr=0.01), batches()
    main.eval()(model(data[0][0]), data[0][1])  # whether to gather is decided at the first call
    main.train()
    compiled, compiles = compile_fresh(lambda x, y: wrapper(model(x), y))
    watch, graphs = None, 0
    for k in range(steps):
        if k == settled:
            watch, graphs = Watch(), compiles()
        before = main.temperature
        wrapper.on_train_batch_start(first + k)
        loss = compiled(*data[k % 7])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if k > warmup:
            assert main.temperature < before  # also where float32 would skip every other step
        else:
            assert main.temperature == (0.7 if k < warmup else 0.5)
    watch.flat(steps - settled)
    # Warmup, the first blend step, every other blend step, the main phase.
    assert compiles() == graphs <= 4
    share = (steps - 1 - warmup) / (2 * steps)
    assert main.temperature == pytest.approx(geometric(0.5, 0.05, share), rel=1e-13)
    assert main.temperature == float(main._tau)
    assert wrapper.main_weight == 1.0
    assert main._queue.state.enqueued == ROWS * (steps - warmup)  # emptied at the switch
    assert wrapper._global_step == first + steps - 1
    assert loss.isfinite()
