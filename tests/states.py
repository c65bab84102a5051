"""Losses with a state worth keeping, and whether two of them go on alike."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import proxy_losses as P

CLASSES = {"ids": 3, "labels": 3, "queries": 1}  # kind of batch -> classes
KINDS = list(CLASSES)
ROWS = 10
SCHEDULE = {
    "warmup_steps": 2, "blend_steps": 3, "temp_start": 0.5, "temp_end": 0.1, "temp_decay_steps": 9,
}  # fmt: skip


def rows(kind: str, seed: int) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Features, targets and what goes with them."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(ROWS, 4, generator=g, dtype=torch.float32, device="cpu")
    if kind == "labels":
        noise = torch.rand(ROWS, 3, generator=g, dtype=torch.float32, device="cpu")
        return x, noise < 0.4, {}
    ids = torch.randint(0, max(CLASSES[kind], 2), (ROWS,), generator=g, device="cpu")
    if kind == "ids":
        ids[seed % ROWS] = -100
        return x, ids, {}
    return x, ids, {"query_ids": torch.arange(ROWS, device="cpu") % 2}


def warm(logits: Tensor, targets: Tensor) -> Tensor:
    """A warmup loss for every kind of targets."""
    positive = targets if targets.dim() == 2 else (targets > 0)[:, None].expand_as(logits)
    return nn.functional.binary_cross_entropy_with_logits(logits, positive.to(logits))


class Net(nn.Module):
    """A model that holds its loss, wrapped or not."""

    def __init__(self, kind: str, wrapped: bool = True, **options: Any) -> None:
        super().__init__()
        self.kind, self.wrapped = kind, wrapped
        self.head = nn.Linear(4, CLASSES[kind], dtype=torch.float32)
        loss = P.SmoothAPLoss(CLASSES[kind], queue_size=16, temperature=0.5, **options)
        self.loss = P.LossWarmupWrapper(warm, loss, **SCHEDULE) if wrapped else loss

    @property
    def main(self) -> P.SmoothAPLoss:
        return self.loss.main_loss if self.wrapped else self.loss

    def forward(self, x: Tensor, targets: Tensor, **more: Tensor) -> Tensor:
        return self.loss(self.head(x), targets, **more)


def step(net: Net, k: int) -> Tensor:
    """Step k of a training without an optimizer: the model stays, its loss moves on."""
    if net.wrapped:
        net.loss.on_train_batch_start(k)
    x, targets, more = rows(net.kind, k)
    return net(x, targets, **more).detach()


def trained(kind: str, wrapped: bool = True, steps: int = 4, **options: Any) -> Net:
    torch.manual_seed(0)
    net = Net(kind, wrapped, **options)
    for k in range(steps):
        step(net, k)
    return net


def says(net: Net) -> dict[str, Any]:
    """What a user reads off it."""
    found = {"temperature": net.main.temperature}
    if net.wrapped:
        names = ("main_weight", "in_warmup", "in_blend", "current_temperature")
        found |= {name: getattr(net.loss, name) for name in names}
    return found


def going_on(net: Net, first: int = 4, steps: int = 4) -> list[float]:
    """The next losses: the first as an evaluation, the others as training."""
    x, targets, more = rows(net.kind, 99)
    net.eval()
    values = [float(net(x, targets, **more).detach())]
    net.train()
    return values + [float(step(net, k)) for k in range(first, first + steps)]


def assert_alike(one: Net, other: Net) -> None:
    """Both say the same, and go on with the same losses to the bit."""
    assert says(one) == says(other)
    losses = going_on(one)
    assert losses == going_on(other)
    assert len(set(losses)) == len(losses)  # they are of different states
