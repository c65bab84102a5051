"""Train the same model twice: with a ranking loss after a warmup, and without."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from proxy_losses import LossWarmupWrapper, SmoothAPLoss

from ._errors import DemoError
from ._measure import Array, aucpr
from ._settings import Settings
from ._tables import Part, Split, Table

Loss = Callable[[Tensor, Tensor], Tensor]


class Epoch(NamedTuple):
    """One line of the trace."""

    number: int  # from 1
    phase: str  # warmup, blend, main; of the plain arm bce or ce
    main_weight: float | None
    temperature: float | None
    loss: float  # the mean over the epoch's steps
    aucpr: float  # on the validation rows


class Arm(NamedTuple):
    """One trained model: its trace and the test scores of its best validation epoch."""

    name: str
    trace: tuple[Epoch, ...]
    best: Epoch
    steps: int
    test_scores: Array  # [rows, classes]; of two classes [rows, 1]


def binary_cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """BCE of logits [N, 1] and targets [N] in {0, 1}."""
    return F.binary_cross_entropy_with_logits(logits[:, 0], targets.to(logits.dtype))


def cross_entropy(log_probs: Tensor, targets: Tensor) -> Tensor:
    """CE of log-probabilities [N, C] and class ids [N]."""
    return F.nll_loss(log_probs, targets)


def build_model(columns: int, outputs: int, settings: Settings) -> nn.Module:
    """A linear model or one with a hidden layer; a seed gives the same weights every time.

    Of several classes the outputs are log-probabilities, so that a class is ranked, in
    training and in the test, by how probable it is.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        layers: list[nn.Module] = [nn.Linear(columns, settings.hidden or outputs)]
        if settings.hidden:
            layers += [nn.ReLU(), nn.Linear(settings.hidden, outputs)]
    return nn.Sequential(*layers, *([nn.LogSoftmax(dim=1)] if outputs > 1 else []))


def steps_per_epoch(rows: int, settings: Settings) -> int:
    """Optimiser steps in one pass over the training rows."""
    return math.ceil(rows / settings.batch_size)


def build_loss(classes: int, rows: int, settings: Settings) -> LossWarmupWrapper:
    """BCE or CE, then a blend, then Smooth-AP whose temperature falls until the last step."""
    after_switch = settings.total_epochs - settings.warmup_epochs
    decay_steps = after_switch * steps_per_epoch(rows, settings) - 1  # the last step: temp_end
    return LossWarmupWrapper(
        warmup_loss=cross_entropy if classes > 1 else binary_cross_entropy,
        main_loss=SmoothAPLoss(
            num_classes=classes,
            queue_size=settings.queue_size,
            temperature=settings.temp_start,
        ),
        warmup_epochs=settings.warmup_epochs,
        temp_start=settings.temp_start,
        temp_end=settings.temp_end,
        temp_decay_steps=max(1, decay_steps),
        blend_epochs=settings.blend_epochs,
    )


def batches(part: Part, settings: Settings) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """Per epoch, its shuffled batches; the seed alone decides the order."""
    features, labels = torch.from_numpy(part.features), torch.from_numpy(part.labels)
    generator = torch.Generator().manual_seed(settings.seed)
    for _ in range(settings.total_epochs):
        order = torch.randperm(len(labels), generator=generator)
        yield [(features[rows], labels[rows]) for rows in order.split(settings.batch_size)]


@torch.no_grad()
def score(model: nn.Module, part: Part) -> Array:
    """The model's outputs on one part, [rows, outputs]."""
    scores: Array = model(torch.from_numpy(part.features)).double().numpy()
    return scores


def train_arm(
    name: str,
    model: nn.Module,
    loss_fn: LossWarmupWrapper | Loss,
    split: Split,
    settings: Settings,
    on_epoch: Callable[[str, Epoch], None],
    on_step: Callable[[], object],
) -> Arm:
    """Train one model and keep the epoch with the best validation AUCPR (the first of equals)."""
    optimiser = torch.optim.Adam(model.parameters(), lr=settings.lr)
    wrapper = loss_fn if isinstance(loss_fn, LossWarmupWrapper) else None
    plain = "ce" if loss_fn is cross_entropy else "bce"
    trace: list[Epoch] = []
    step = 0
    test_scores: Array | None = None
    for index, epoch_batches in enumerate(batches(split.train, settings)):
        if wrapper is not None:
            wrapper.on_train_epoch_start(index)
        total = 0.0
        for features, labels in epoch_batches:
            if wrapper is not None:
                wrapper.on_train_batch_start(step)
            loss = loss_fn(model(features), labels)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            total += loss.item()
            step += 1
            on_step()
        mean_loss = total / len(epoch_batches)
        validation = score(model, split.validation)
        if not (math.isfinite(mean_loss) and math.isfinite(validation.sum())):
            raise DemoError(
                f"{name}: loss or scores are no longer finite in epoch {index + 1}: "
                "try a smaller --lr or higher temperatures"
            )
        epoch = Epoch(
            index + 1,
            phase_of(wrapper) if wrapper is not None else plain,
            float(wrapper.main_weight) if wrapper is not None else None,
            _temperature(wrapper) if wrapper is not None else None,
            mean_loss,
            aucpr(validation, split.validation.labels),
        )
        if test_scores is None or epoch.aucpr > max(past.aucpr for past in trace):
            test_scores = score(model, split.test)
        trace.append(epoch)
        on_epoch(name, epoch)
    assert test_scores is not None  # there is at least one epoch
    best = max(trace, key=lambda epoch: epoch.aucpr)
    return Arm(name, tuple(trace), best, step, test_scores)


def phase_of(wrapper: LossWarmupWrapper) -> str:
    """The name of the phase that the wrapper is in."""
    if wrapper.in_warmup:
        return "warmup"
    return "blend" if wrapper.in_blend else "main"


def _temperature(wrapper: LossWarmupWrapper) -> float | None:
    temperature = wrapper.current_temperature
    return None if temperature is None else float(temperature)


def train_arms(
    table: Table,
    split: Split,
    settings: Settings,
    on_epoch: Callable[[str, Epoch], None],
    on_step: Callable[[], object],
) -> tuple[Arm, Arm]:
    """The ranking arm and the plain arm, from the same weights and in the same batch order."""
    classes = len(table.classes)
    outputs = 1 if classes == 2 else classes
    rows, columns = split.train.features.shape
    plain_loss, plain_name = (
        (binary_cross_entropy, "BCE") if outputs == 1 else (cross_entropy, "CE")
    )
    arms = [
        ("Smooth-AP", build_loss(outputs, rows, settings)),
        (plain_name, plain_loss),
    ]
    with one_thread():
        ranking, plain = (
            train_arm(
                name,
                build_model(columns, outputs, settings),
                loss_fn,
                split,
                settings,
                on_epoch,
                on_step,
            )
            for name, loss_fn in arms
        )
    return ranking, plain


@contextmanager
def one_thread() -> Iterator[None]:
    """Tensors this small are slower on several threads, much slower on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
