"""Every loss as a module, against the same class of imbalanced-losses, for 1 to 1,000 classes.

``python -m benchmarks.losses [--quick] [--out FILE]``; the peer is optional.
"""

from __future__ import annotations

import argparse
from typing import Any, NamedTuple

import torch

from . import harness
from .harness import OURS, Case, Fn, Skip, Suite
from .ranks import Batch, Steps
from .smooth_ap import value_and_grad

MODULE = "benchmarks.losses"
PEER = "imbalanced_losses"
CLASSES = (1, 10, 1_000)
TOLERANCE = 1e-3  # of the gate; the peer's float32 slopes lose digits where sigmoids saturate


class Kind(NamedTuple):
    """A loss, and its arguments beside num_classes."""

    cls: str
    kwargs: dict[str, Any]
    queue: bool = True


KINDS = {
    "SmoothAPLoss": Kind("SmoothAPLoss", {"temperature": 0.05}),
    "RecallAtQuantileLoss": Kind("RecallAtQuantileLoss", {"quantile": 0.05, "temperature": 0.05}),
    "PAUCAtBudgetLoss": Kind("PAUCAtBudgetLoss", {"beta": 0.05}),
    "PAUCAtBudgetLoss, pairwise": Kind("PAUCAtBudgetLoss", {"beta": 0.05, "surrogate": "pairwise"}),
    "SigmoidFocalLoss": Kind("SigmoidFocalLoss", {}, False),
    "SoftmaxFocalLoss": Kind("SoftmaxFocalLoss", {}, False),
}


def batches(classes: int, rows: int, count: int) -> list[Batch]:
    """Normal logits, raised at the target; 5 % positives when binary."""
    gen = torch.Generator().manual_seed(classes)
    found = []
    for _ in range(count):
        logits = torch.randn(rows, classes, generator=gen)
        if classes == 1:
            targets = (torch.rand(rows, generator=gen) < 0.05).long()
            logits += targets[:, None]
        else:
            targets = torch.randint(classes, (rows,), generator=gen)
            logits += torch.nn.functional.one_hot(targets, classes)
        found.append((logits, targets))
    return found


def contender(package: Any, kind: Kind, classes: int, rows: int, queue: int) -> Fn:
    cls = getattr(package, kind.cls)
    if kind.queue:
        # As many batches as fill the queue: it holds the same rows before and after a round.
        steps = batches(classes, rows, queue // rows + 1)
        return Steps(lambda: cls(classes, queue_size=queue, **kind.kwargs), steps)
    loss = cls(**kind.kwargs)
    ((logits, targets),) = batches(classes, rows, 1)
    if kind.cls == "SigmoidFocalLoss":
        targets = (targets[:, None] == torch.arange(classes)).float() if classes > 1 else targets
        targets = targets.reshape(logits.shape).float()
    return lambda: value_and_grad(loss, logits, targets)


def suite(args: argparse.Namespace) -> Suite:
    """Batches of 512 rows, ranked against a queue of 1,024."""
    package, version = harness.peer(PEER)
    packages: dict[str, Any] = {**harness.packages(args), PEER: package}
    rows, queue = (64, 128) if args.quick else (512, 1_024)
    cases = []
    for classes in CLASSES[:2] if args.quick else CLASSES:
        for name, kind in KINDS.items():
            if kind.cls == "SoftmaxFocalLoss" and classes == 1:
                continue  # a softmax of one class is constant
            sizes = {"classes": classes, "rows": rows, "queue": queue if kind.queue else 0}
            contenders = {
                whose: contender(found, kind, classes, rows, queue)
                if found
                else Skip("absent", f"{whose} is not installed")
                for whose, found in packages.items()
            }
            cases.append(Case(f"{name}, {classes} class{'es' * (classes > 1)}", sizes, contenders))
    about = (
        "forward and backward of one step, eager, float32; ranking losses with a full queue, three "
        "steps a call; focal losses one step"
    )
    return Suite("losses", about, OURS, cases, TOLERANCE, {PEER: version})


if __name__ == "__main__":
    raise SystemExit(harness.main(MODULE, suite))
