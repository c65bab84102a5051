"""A training program that is killed and started again: ``python -m tests.resume_program``.

It trains all VARIANTS side by side, so that one kill hits every one of them in a phase of its own.
Every few steps all are saved to one file, which replaces the last at once; the loss of every step
goes to a log, to the bit. ``--die STEP:WHERE`` ends it there as a power cut would, by SIGKILL.
"""

from __future__ import annotations

import argparse
import os
import signal
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import proxy_losses as P

EVERY = 5  # steps from checkpoint to checkpoint
PER_EPOCH = 4
ROWS = 12
END = "."  # of a line of the log that is whole
RAMP = {"temp_start": 0.5, "temp_end": 0.05}
EPOCHS = {"warmup_epochs": 3, "blend_epochs": 3, "temp_decay_steps": 20}
STEPS = {"warmup_steps": 9, "blend_steps": 10, "temp_decay_steps": 25}
FEW = {"queue_size": 30, "temperature": 0.4}


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    return nn.functional.cross_entropy(logits, targets)


def bce(logits: Tensor, targets: Tensor) -> Tensor:
    return nn.functional.binary_cross_entropy_with_logits(logits[:, 0], targets.to(logits.dtype))


def bce_of_labels(logits: Tensor, targets: Tensor) -> Tensor:
    return nn.functional.binary_cross_entropy_with_logits(logits, targets.to(logits.dtype))


def focal(logits: Tensor, targets: Tensor) -> Tensor:
    return P.sigmoid_focal(logits[:, 0], targets.to(logits.dtype))


def wrapped(warmup: Any, main: nn.Module, mode: dict, **more: Any) -> P.LossWarmupWrapper:
    return P.LossWarmupWrapper(warmup, main, **RAMP, **mode, **more)


def data(step: int, classes: int, labels: bool) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """The batch of a step, from its number alone."""
    g = torch.Generator().manual_seed(step)
    x = torch.randn(ROWS, 4, generator=g)
    noise = torch.randn(ROWS, max(classes, 2), generator=g)
    if labels:
        targets = x[:, :classes] + noise > 0.5
    elif classes > 1:
        targets = (x[:, :classes] + noise).argmax(1)
    else:
        targets = (x[:, 0] + noise[:, 0] > 0.8).long()
    rows = {
        "sample_weight": torch.rand(ROWS, generator=g),
        "iid_mask": torch.rand(ROWS, generator=g) < 0.7,
        "query_ids": torch.randint(step % 2, 3, (ROWS,), generator=g),
    }
    return x, targets, rows


class Modules:
    """A model, its optimiser and a loss module, driven as the README does."""

    def __init__(self, loss: nn.Module, classes: int, *given: str, labels: bool = False) -> None:
        torch.manual_seed(len(given) + classes)
        self.model, self.loss = nn.Linear(4, classes), loss
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=0.05)
        self.classes, self.given, self.labels = classes, given, labels

    def step(self, step: int) -> Tensor:
        if isinstance(self.loss, P.LossWarmupWrapper):
            if step % PER_EPOCH == 0:
                self.loss.on_train_epoch_start(step // PER_EPOCH)
            self.loss.on_train_batch_start(step)
        elif step % 7 == 6:  # a schedule by hand
            self.loss.temperature = self.loss.temperature * 0.8
        x, targets, rows = data(step, self.classes, self.labels)
        loss = self.loss(self.model(x), targets, **{name: rows[name] for name in self.given})
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return loss.detach()

    def parts(self) -> tuple[Any, ...]:
        return self.model, self.optimizer, self.loss

    def save(self) -> Any:
        return [part.state_dict() for part in self.parts()]

    def load(self, saved: Any) -> None:
        for part, state in zip(self.parts(), saved, strict=True):
            part.load_state_dict(state)


class Functions:
    """Parameters, a `QueueState` and a `ScheduleState`, passed from step to step by hand."""

    def __init__(self, function: Any, classes: int, clock: str, as_tuple: bool, *given: str):
        g = torch.Generator().manual_seed(classes)
        self.weight = torch.randn(4, classes, generator=g) * 0.1
        self.function, self.classes, self.clock = function, classes, clock
        self.as_tuple, self.given = as_tuple, given
        unit = 3 if clock == "epoch" else 9
        self.sched = P.Schedule(unit, unit, **RAMP, temp_decay_steps=25)
        self.queue = P.init_queue(30, classes)
        self.state = P.init_schedule(self.sched)

    def step(self, step: int) -> Tensor:
        if step % PER_EPOCH == 0:
            _, self.state = P.start_epoch(
                self.state, step // PER_EPOCH, self.sched, clock=self.clock
            )
        reset, self.state = P.start_step(self.state, step, self.sched, clock=self.clock)
        if reset:
            self.queue = P.reset_queue(self.queue)
        tau = P.state_temp(self.state, self.sched)
        main = P.state_weight(self.state, self.sched, clock=self.clock).float()
        x, targets, rows = data(step, self.classes, False)

        def objective(weight: Tensor) -> tuple[Tensor, P.QueueState]:
            logits = x @ weight
            warm = (cross_entropy if self.classes > 1 else bce)(logits, targets)
            loss, queue = self.function(
                logits, targets, self.queue, tau, **{name: rows[name] for name in self.given}
            )
            return (1.0 - main) * warm + main * loss, queue

        grad, (loss, self.queue) = torch.func.grad_and_value(objective, has_aux=True)(self.weight)
        self.weight = self.weight - 0.05 * grad
        return loss

    def save(self) -> Any:
        if self.as_tuple:
            return self.weight, tuple(self.queue), tuple(self.state)
        return self.weight, self.queue._asdict(), self.state._asdict()

    def load(self, saved: Any) -> None:
        self.weight, queue, state = saved
        if self.as_tuple:
            self.queue, self.state = P.QueueState(*queue), P.ScheduleState(*state)
        else:
            self.queue, self.state = P.QueueState(**queue), P.ScheduleState(**state)


def recall(*args: Any, **kwargs: Any) -> Any:
    return P.recall_at_quantile_loss(*args, quantile=0.2, **kwargs)


def pairwise(*args: Any, **kwargs: Any) -> Any:
    return P.partial_auc_loss(*args, beta=0.5, surrogate="pairwise", **kwargs)


def band(classes: int, **more: Any) -> nn.Module:
    return P.PAUCAtBudgetLoss(classes, beta=0.5, **FEW, **more)


VARIANTS = {  # made anew at every start
    "epochs": lambda: Modules(
        wrapped(cross_entropy, P.SmoothAPLoss(3, **FEW), EPOCHS, reset_queue_each_epoch=True), 3
    ),
    "query_ids, steps": lambda: Modules(
        wrapped(bce, P.SmoothAPLoss(1, **FEW), STEPS, final_main_weight=0.8), 1, "query_ids"
    ),
    "capped, steps": lambda: Modules(
        wrapped(focal, P.SmoothAPLoss(1, max_pool_size=25, **FEW), STEPS), 1, "sample_weight"
    ),
    "labels, epochs": lambda: Modules(
        wrapped(bce_of_labels, P.SmoothAPLoss(3, temperature_unit="spread", **FEW), EPOCHS), 3,
        labels=True,
    ),
    "recall, epochs": lambda: Modules(
        wrapped(P.SoftmaxFocalLoss(), P.RecallAtQuantileLoss(3, quantile=0.2, **FEW), EPOCHS), 3,
        "sample_weight",
    ),
    "recall, capped": lambda: Modules(
        wrapped(bce, P.RecallAtQuantileLoss(1, 0.2, max_pool_size=25, **FEW), STEPS), 1
    ),
    "band, epochs": lambda: Modules(wrapped(focal, band(1), EPOCHS), 1, "iid_mask"),
    "band, steps": lambda: Modules(
        wrapped(bce, band(1, surrogate="pairwise", max_pool_size=25), STEPS), 1,
        "iid_mask", "sample_weight", "query_ids",
    ),
    "no wrapper": lambda: Modules(P.SmoothAPLoss(3, **FEW), 3),
    "functions, epochs": lambda: Functions(P.smooth_ap_loss, 3, "epoch", False),
    "functions, query_ids": lambda: Functions(P.smooth_ap_loss, 1, "step", True, "query_ids"),
    "functions, recall": lambda: Functions(recall, 3, "step", False, "sample_weight"),
    "functions, band": lambda: Functions(pairwise, 1, "epoch", True, "iid_mask"),
}  # fmt: skip


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def save(state: Any, file: Path, dies: bool = False) -> None:
    """Replace the file at once; what was begun is never seen."""
    begun = file.with_suffix(".begun")
    with begun.open("wb") as f:
        torch.save(state, f)
        f.flush()
        os.fsync(f.fileno())
    if dies:
        die()
    os.replace(begun, file)


def run(folder: Path, steps: int, death: tuple[int, str] | None = None) -> None:
    """Train to the end, from the last checkpoint if there is one."""
    runs, file, first = {name: make() for name, make in VARIANTS.items()}, folder / "last", 0
    if file.exists():
        first, saved = torch.load(file, weights_only=True)
        for name, one in runs.items():
            one.load(saved[name])
    at, where = death or (-1, "")
    with (folder / "log").open("a") as log:
        print(file=log)  # ends a line that was torn
        for step in range(first, steps):
            if at == step and where == "before":
                die()
            for k, (name, one) in enumerate(runs.items()):
                loss = one.step(step)
                print(step, name, loss.item().hex(), END, sep="\t", file=log, flush=True)
                if at == step and where == "between" and k == step % len(runs):
                    die()
            os.fsync(log.fileno())
            if (step + 1) % EVERY == 0 or step + 1 == steps:
                state = (step + 1, {name: one.save() for name, one in runs.items()})
                save(state, file, dies=at <= step and where == "saving")
    os.replace(file, folder / "end")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("steps", type=int)
    parser.add_argument("--die", default=None, help="STEP:before, STEP:between or STEP:saving")
    args = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    step, _, where = (args.die or "-1:").partition(":")
    run(args.folder, args.steps, (int(step), where) if args.die else None)


if __name__ == "__main__":
    main()
