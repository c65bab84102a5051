"""Made data for the map: a top that wants another direction, and rare classes on embeddings."""

from __future__ import annotations

import sys
import time
import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from ..trainer import Part
from .data import Array, Stack
from .stacked import Capacity, arms
from .train import Effort

ANGLES = (0, 15, 30, 45, 60, 75, 90)  # degrees
MODELS = (Capacity("linear"), Capacity("16 hidden", hidden=16))
ROWS = {"train": 8000, "val": 8000, "test": 20_000}
RATE = 0.03
DIGITS = tuple(range(10))
EMBEDDING = 32  # units
PROBE = {"train": 12, "val": 8}  # positives, among about 600 and 200 negatives


def contested(angle: float, rows: int, rng: np.random.Generator) -> tuple[Array, Array]:
    """Rows whose bulk and whose top are told by directions at this angle.

    Most positives lie 2 up the first axis, where decoys, a few negatives, lie 4 up. The other
    positives lie 4 up a direction at the angle to that axis. At 0 the two agree: nothing to
    choose. At 90 degrees the top is best told by the second axis alone.
    """
    y = rng.random(rows) < RATE
    x = rng.normal(size=(rows, 5))
    kind = rng.random(rows)
    radians = np.deg2rad(angle)
    x[y & (kind < 0.6), 0] += 2
    x[y & (kind >= 0.6), :2] += 4 * np.array([np.cos(radians), np.sin(radians)])
    x[~y & (kind < 0.03), 0] += 4
    return x, y


def stacked(parts: Sequence[Sequence[tuple[Array, Array]]]) -> Stack:
    """Train, validation and test rows of every seed, standardised by the training rows."""
    made = []
    scales = [(x.mean(0), np.where(x.std(0) > 0, x.std(0), 1.0)) for x, _ in parts[0]]
    for part in parts:
        x = [(x - mean) / std for (x, _), (mean, std) in zip(part, scales, strict=True)]
        y = torch.from_numpy(np.stack([y for _, y in part]))
        made.append(Part(torch.from_numpy(np.stack(x).astype(np.float32)), y))
    return Stack(*made)


def contested_tops(seeds: Sequence[int], effort: Effort) -> dict[str, Any]:
    """Angle -> model -> arm -> test AP [seeds]."""
    found = {}
    for angle in ANGLES:
        parts = [
            [contested(angle, rows, np.random.default_rng([seed, k])) for seed in seeds]
            for k, rows in enumerate(ROWS.values())
        ]
        made = stacked(parts)
        found[str(angle)] = {
            model.name: {name: ap.tolist() for name, ap in arms(made, model, effort).items()}
            for model in MODELS
        }
        _log(f"contested top, {angle} degrees")
    return found


def embedded(digit: int, seed: int) -> list[tuple[Array, Array]]:
    """Train, validation and test rows of one digit against the others.

    Half of the images train a network on the other nine digits; its hidden units embed all. Of
    the digit `PROBE` images are used there, and all of the other half.
    """
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split
    from sklearn.neural_network import MLPClassifier

    x, label = load_digits(return_X_y=True)
    x = x / 16.0
    known, test = train_test_split(
        np.arange(len(label)), test_size=0.5, stratify=label, random_state=seed
    )
    others = known[label[known] != digit]
    network = MLPClassifier((EMBEDDING,), max_iter=60, random_state=seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that 60 turns are not the end
        network.fit(x[others], label[others])
    hidden = np.maximum(x @ network.coefs_[0] + network.intercepts_[0], 0.0)
    own = known[label[known] == digit]
    cut = 3 * len(others) // 4
    first, second = PROBE["train"], PROBE["train"] + PROBE["val"]
    rows = (np.r_[own[:first], others[:cut]], np.r_[own[first:second], others[cut:]], test)
    return [(hidden[part], label[part] == digit) for part in rows]


def probes(seeds: Sequence[int], effort: Effort) -> dict[str, Any]:
    """Digit -> arm -> test AP [seeds] of linear probes."""
    found = {}
    for digit in DIGITS:
        drawn = [embedded(digit, seed) for seed in seeds]
        shortest = [min(len(split[k][0]) for split in drawn) for k in range(3)]
        # The digit's images come first but in the test part, which is shuffled.
        parts = [[(s[k][0][:n], s[k][1][:n]) for s in drawn] for k, n in enumerate(shortest)]
        ap = arms(stacked(parts), Capacity("linear"), effort)
        found[str(digit)] = {name: values.tolist() for name, values in ap.items()}
        _log(f"probe of digit {digit}")
    return found


def run(seeds: Sequence[int], effort: Effort) -> dict[str, Any]:
    return {"contested": contested_tops(seeds, effort), "probes": probes(seeds, effort)}


def _log(text: str) -> None:
    print(f"{text}: {time.process_time():.0f} s", file=sys.stderr, flush=True)
