"""Several processes against one: gradients through DistributedDataParallel, and the queues."""

from __future__ import annotations

import itertools
import json
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from .. import QueueState, _losses, enqueue, init_queue
from .. import nn as losses
from .._metrics import METRICS, examples

STEPS, FEATURES = 3, 4
TAU = 0.3


class Kind(NamedTuple):
    """A module, the function it must agree with, and the settings of each."""

    module: Callable[..., Any]
    function: Callable[..., tuple[Tensor, QueueState | None]]
    arguments: dict[str, Any]
    settings: dict[str, Any]


KINDS = {
    example.label: Kind(
        getattr(losses, example.metric.module),
        getattr(_losses, f"{example.metric.name}_loss"),
        example.arguments,
        example.settings,
    )
    for example in examples(METRICS)
}


class Case(NamedTuple):
    """One run of STEPS optimiser steps."""

    kind: str
    distributed: str  # "gather" or "shard"
    rows: tuple[int, ...]  # of each process, in every step
    queue: int = 0  # gather: of the whole; shard: of each process
    weighted: bool = False
    share: float = 1.0  # of the ranking loss; the rest is a locally averaged BCE
    accumulate: int = 1  # backward passes per step
    classes: int = 1


class Result(NamedTuple):
    """Worst over steps and processes."""

    gradient: float  # relative difference from one process
    loss: float  # absolute difference
    queue: float  # absolute difference of anything stored


def cases(world: int, kinds: Sequence[str] = tuple(KINDS)) -> list[Case]:
    """Every loss, both ways, over even, uneven and empty shards and the extras one by one."""
    even = (16,) * world
    uneven = tuple(9 + 14 * (r % 3) for r in range(world))
    empty = (0, *(21,) * (world - 1)) if world > 1 else (21,)
    found = []
    for kind, how in itertools.product(kinds, ("gather", "shard")):
        found += [
            Case(kind, how, even),
            Case(kind, how, uneven, queue=24, weighted=True, classes=3),
            Case(kind, how, empty, queue=24, share=0.6),
            Case(kind, how, uneven, queue=16, accumulate=2),
        ]
    return found


def _rows(case: Case, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Features, targets and weights of all processes; row 2 is padding."""
    gen = torch.Generator().manual_seed(seed)
    n = sum(case.rows)
    x = torch.randn(n, FEATURES, generator=gen, dtype=torch.float64)
    targets = torch.randint(0, max(case.classes, 2), (n,), generator=gen)
    targets[torch.arange(n) == 2] = -100
    return x, targets, torch.rand(n, generator=gen, dtype=torch.float64) + 0.1


def _bce(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean over the rows here, 0 without any."""
    hit = (targets == 1).to(logits)
    each = nn.functional.binary_cross_entropy_with_logits(logits[:, 0], hit, reduction="sum")
    return each / max(targets.numel(), 1)


class _OneProcess:
    """The same training without processes, from the pure functions."""

    def __init__(self, case: Case, model: nn.Module) -> None:
        self.case, self.model, self.kind = case, model, KINDS[case.kind]
        count = len(case.rows) if case.distributed == "shard" else 1
        make = [init_queue(case.queue, case.classes) for _ in range(count if case.queue else 0)]
        self.queues: list[QueueState] = make

    def _stored(self) -> QueueState | None:
        """One queue of all rows that the processes hold."""
        if len(self.queues) < 2:
            return self.queues[0] if self.queues else None
        whole = init_queue(self.case.queue * len(self.queues), self.case.classes)
        for q in self.queues:
            filled = min(int(q.enqueued), self.case.queue)
            whole = enqueue(
                whole, q.logits[:filled], q.targets[:filled],
                sample_weight=q.sample_weight[:filled], iid_mask=q.iid_mask[:filled],
            )  # fmt: skip
        return whole

    def loss(self, seed: int) -> Tensor:
        """The blended loss of the whole batch; stores it as the processes do."""
        case, kind = self.case, self.kind
        x, targets, weight = _rows(case, seed)
        weights = {"sample_weight": weight} if case.weighted else {}
        logits = self.model(x)
        loss, _ = kind.function(logits, targets, self._stored(), TAU, **kind.settings, **weights)
        parts = case.rows if case.distributed == "shard" else (sum(case.rows),)
        for k, part in enumerate(_slices(parts) if self.queues else []):
            extra = {"sample_weight": weight[part]} if case.weighted else {}
            self.queues[k] = enqueue(self.queues[k], logits.detach()[part], targets[part], **extra)
        local = [_bce(logits[part], targets[part]) for part in _slices(case.rows)]
        return case.share * loss + (1 - case.share) * torch.stack(local).mean()


def _slices(rows: Sequence[int]) -> list[slice]:
    ends = list(itertools.accumulate(rows))
    return [slice(end - n, end) for n, end in zip(rows, ends, strict=True)]


def _model(case: Case, device: torch.device) -> nn.Module:
    torch.manual_seed(1)
    return nn.Linear(FEATURES, case.classes).double().to(device)


def _grad(p: Tensor) -> Tensor:
    assert p.grad is not None
    return p.grad


def check(case: Case, rank: int, device: torch.device) -> Result:
    """Train with all processes and, beside it, alone."""
    mine = _slices(case.rows)[rank]
    alone = _OneProcess(case, _model(case, device))
    model = DistributedDataParallel(_model(case, device))
    loss_fn = KINDS[case.kind].module(
        case.classes, queue_size=case.queue, temperature=TAU, distributed=case.distributed,
        **KINDS[case.kind].arguments,
    ).to(device)  # fmt: skip
    worst = Result(0.0, 0.0, 0.0)
    for step in range(STEPS):
        for part in range(case.accumulate):
            seed = step * case.accumulate + part
            x, targets, weight = (t[mine].to(device) for t in _rows(case, seed))
            logits = model(x)
            weights = {"sample_weight": weight} if case.weighted else {}
            loss = case.share * loss_fn(logits, targets, **weights)
            loss = loss + (1 - case.share) * _bce(logits, targets)
            loss.backward()
            wanted = alone.loss(seed)
            wanted.backward()
            if case.share == 1.0:  # a local mean differs from process to process
                off = abs(loss.item() - wanted.item())
                worst = worst._replace(loss=max(worst.loss, off))
        pairs = list(zip(model.parameters(), alone.model.parameters(), strict=True))
        # Of all parameters together: ranks do not depend on the bias, whose gradient is noise.
        grads = [(_grad(found), _grad(expected)) for found, expected in pairs]
        scale = max(float(expected.abs().max()) for _, expected in grads)
        off = max(float((found - expected).abs().max()) for found, expected in grads)
        worst = worst._replace(gradient=max(worst.gradient, off / max(scale, 1e-12)))
        for p in itertools.chain.from_iterable(pairs):
            with torch.no_grad():
                p.sub_(0.5 * _grad(p))
            p.grad = None
    if case.queue:
        state = loss_fn._queue.state
        mirror = alone.queues[rank if case.distributed == "shard" else 0]
        off = max(
            float((a.double() - b.double()).abs().max())
            for a, b in zip(state, mirror, strict=True)
            if a.numel() and b.numel()  # a module has room for what no batch brought
        )
        worst = worst._replace(queue=off)
    return worst


def _process(rank: int, world: int, backend: str, folder: str, todo: list[Case]) -> None:
    torch.set_num_threads(1)
    device = torch.device("cpu")
    if backend == "nccl":
        device = torch.device("cuda", rank)
        torch.cuda.set_device(device)
    dist.init_process_group(
        backend, init_method=f"file://{folder}/store", rank=rank, world_size=world
    )
    try:
        results = [check(case, rank, device) for case in todo]
    finally:
        dist.destroy_process_group()
    Path(folder, f"{rank}.json").write_text(json.dumps(results))


PROCESS = _process  # what every process runs


def prove(world: int, todo: list[Case], backend: str = "gloo") -> list[Result]:
    """The worst over the processes, case by case."""
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(  # type: ignore[attr-defined, no-untyped-call]
            PROCESS, (world, backend, folder, todo), nprocs=world
        )
        by_rank = [json.loads(Path(folder, f"{r}.json").read_text()) for r in range(world)]
    return [Result(*map(max, zip(*each, strict=True))) for each in zip(*by_rank, strict=True)]
