"""Checks within one process."""

from __future__ import annotations

import functools
import io
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .. import LossWarmupWrapper, SmoothAPLoss, nn, smooth_ap
from .._metrics import METRICS, examples
from ._outcome import Outcome, bounded

LOSSES: dict[str, Callable[..., Any]] = {
    example.label: functools.partial(
        getattr(nn, example.metric.module), 1, temperature=0.2, **example.arguments
    )
    for example in examples(METRICS)
}


def batch(
    seed: int, rows: int = 64, device: str = "cpu", dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    """Logits [rows, 1] and targets, 20 % positives."""
    gen = torch.Generator().manual_seed(seed)
    targets = (torch.rand(rows, generator=gen) < 0.2).long()
    logits = torch.randn(rows, 1, generator=gen, dtype=torch.float64) + targets[:, None]
    return logits.to(device, dtype), targets.to(device)


def accuracy(device: str) -> Outcome:
    """Value and gradient of smooth_ap on a pool long enough for the near-linear method."""
    logits, targets = batch(0, 6_000, device)
    scores, pos = logits[:, 0].requires_grad_(), targets.bool()
    value = smooth_ap(scores, pos, 0.05)
    (grad,) = torch.autograd.grad(value, scores)
    exact = scores.detach().double().requires_grad_()
    pairs = torch.sigmoid((exact - exact[pos, None]) / 0.05)
    above, above_pos = pairs.sum(1) + 0.5, pairs[:, pos].sum(1) + 0.5
    expected = (above_pos / above).mean()
    (expected_grad,) = torch.autograd.grad(expected, exact)
    error = float((value.double() - expected).detach().abs() / expected.detach())
    slope = float((grad.double() - expected_grad).abs().max() / expected_grad.abs().max())
    return bounded("ranks against float64 pairs", max(error, slope), 1e-5, "relative error")


def determinism(device: str) -> Outcome:
    """Two calls, bit for bit."""
    worst = 0.0
    for make in LOSSES.values():
        results = []
        for _ in range(2):
            loss_fn, (logits, targets) = make(queue_size=128).to(device), batch(1, 512, device)
            logits.requires_grad_()
            loss = loss_fn(logits, targets)
            results.append((loss.detach(), torch.autograd.grad(loss, logits)[0]))
        worst = max(worst, *(float((a - b).abs().max()) for a, b in zip(*results, strict=True)))
    return bounded("same inputs, same bits", worst, 0.0, "largest difference")


def autocast(device: str) -> Outcome:
    """bfloat16 logits under autocast against the same numbers in float32."""
    worst = 0.0
    for make in LOSSES.values():
        logits, targets = batch(2, 256, device)
        half = logits.bfloat16()
        with torch.autocast(device, dtype=torch.bfloat16):
            inside = make(queue_size=0).to(device)(half, targets)
        outside = make(queue_size=0).to(device)(half.float(), targets)
        if inside.dtype != torch.float32:
            return Outcome("autocast", False, f"the loss is {inside.dtype}")
        worst = max(worst, float((inside - outside).abs()))
    return bounded("autocast", worst, 0.0, "difference from float32")


def compiled(device: str) -> Outcome:
    """Compiled modules against eager ones, over steps with a changing temperature."""
    worst = 0.0
    for make in LOSSES.values():
        torch.compiler.reset()  # modules of one class share a limit of compilations
        eager, twin = make(queue_size=96).to(device), make(queue_size=96).to(device)
        fn: Callable[..., Tensor] = torch.compile(twin, fullgraph=True)
        for step in range(4):
            logits, targets = batch(step, 64, device)
            eager.temperature = twin.temperature = 0.2 / (step + 1)
            a, b = (logits.clone().requires_grad_() for _ in "ab")
            wanted, found = eager(a, targets), fn(b, targets)
            wanted.backward()
            found.backward()
            worst = max(worst, float((wanted - found).detach().abs()))
            worst = max(worst, float((a.grad - b.grad).abs().max()))  # type: ignore[operator]
    return bounded("torch.compile(fullgraph=True)", worst, 1e-5, "difference from eager")


def _train(loss_fn: Any, model: torch.nn.Module, steps: range, device: str) -> list[float]:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    losses = []
    for step in steps:
        loss_fn.on_train_batch_start(step)
        x, targets = batch(step, 32, device)
        loss = loss_fn(model(x), targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def resume(device: str) -> Outcome:
    """Checkpoints in warmup, blend and decay, each continued in a new process's stead."""

    def fresh() -> tuple[LossWarmupWrapper, torch.nn.Module]:
        torch.manual_seed(0)
        main = SmoothAPLoss(1, queue_size=48)
        warm = torch.nn.MSELoss()
        wrapper = LossWarmupWrapper(
            lambda x, y: warm(x[:, 0], y.to(x)), main, warmup_steps=3, blend_steps=3,
            temp_start=0.5, temp_end=0.1, temp_decay_steps=6,
        )  # fmt: skip
        return wrapper.to(device), torch.nn.Linear(1, 1).to(device)

    whole = _train(*fresh(), range(14), device)
    off = 0
    for cut in (2, 4, 8, 12):
        loss_fn, model = fresh()
        _train(loss_fn, model, range(cut), device)
        file = io.BytesIO()
        torch.save((loss_fn.state_dict(), model.state_dict()), file)
        file.seek(0)
        states = torch.load(file, weights_only=True)
        for module, state in zip(fresh_pair := fresh(), states, strict=True):
            module.load_state_dict(state)
        off += _train(*fresh_pair, range(cut, 14), device) != whole[cut:]
    return Outcome("resume, bit for bit", off == 0, f"{4 - off} of 4 checkpoints continued exactly")


def bad_batch(device: str) -> Outcome:
    """A batch with NaN must not be heard of again."""
    heard = 0
    for make in LOSSES.values():
        spoilt, clean = make(queue_size=96).to(device), make(queue_size=96).to(device)
        logits, targets = batch(0, 64, device)
        bad = logits.clone()
        bad[5] = torch.nan
        loss = spoilt(bad, targets)
        heard += not loss.isnan()
        heard += not torch.equal(spoilt(logits, targets), clean(logits, targets))
    return Outcome("a NaN batch is not stored", heard == 0, f"{heard} losses changed by it")


CHECKS: dict[str, Callable[[str], Outcome]] = {
    "ranks against float64 pairs": accuracy,
    "same inputs, same bits": determinism,
    "autocast": autocast,
    "torch.compile(fullgraph=True)": compiled,
    "resume, bit for bit": resume,
    "a NaN batch is not stored": bad_batch,
}
