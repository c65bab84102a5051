"""Measures what temperature, queue and schedule do to small models trained on random rows.

``python -m benchmarks.choosing`` trains and measures, and writes ``results/choosing.json`` and its
plot. Every arm of a seed has the same rows, first weights, batches and number of steps; gains are
over cross-entropy for all of these steps, on held-out rows and with the last weights of each run.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from typing import Any

import torch
from scipy import stats
from torch import Tensor

import proxy_losses as P

from . import choosing_figures, report
from .choosing_runs import (
    CONTROL,
    DECAY,
    INPUTS,
    QUANTILE,
    WORLDS,
    Data,
    Outcome,
    Scale,
    Setting,
    make_data,
    train,
)  # fmt: skip
from .trainer import average_precision

FULL = Scale(seeds=10, steps=1000, batch=128, rows=20_000, held_out=40_000, pools=40, every=1)
QUICK = Scale(seeds=2, steps=6, batch=64, rows=2000, held_out=2000, pools=6, every=4)

TINY_TAUS = (1e-4, 3e-4, 1e-3, 3e-3)  # read off, not trained with
TAUS = (0.01, 0.03, 0.1, 0.25, 0.5, 1.0, 2.0, 4.0)
QUEUES = (0, 128, 512, 2048, 8192)
WARMUPS = (0.0, 0.1, 0.3, 0.6)
WEIGHTS = (0.1, 0.25, 0.5, 0.75, 1.0)
POOLS = (128, 256, 512, 1024, 2048, 4096, 8192)
RANKED = 2048  # rows of the pool whose saturation is shown
ANCHORED = 0.5  # weight of the recall loss where the queue is varied
USUAL = Setting(), Setting("recall", main=ANCHORED)  # what other arms are held against
TIE = 1e-3  # closer than this is a tie


def interval(values: Sequence[float]) -> dict[str, Any]:
    """Mean and 95 % t interval of the mean over seeds."""
    mean = sum(values) / len(values)
    if max(values) == min(values):  # no spread, hence no t
        return {"mean": mean, "interval": [mean, mean]}
    low, high = stats.ttest_1samp(values, 0.0).confidence_interval(0.95)
    return {"mean": mean, "interval": [float(low), float(high)]}


def paired(mine: Sequence[float], theirs: Sequence[float]) -> dict[str, Any]:
    """Mine - theirs on the same seeds."""
    apart = [a - b for a, b in zip(mine, theirs, strict=True)]
    wins, losses = sum(d > TIE for d in apart), sum(d < -TIE for d in apart)
    record = {"wins": wins, "ties": len(apart) - wins - losses, "losses": losses}
    return {**interval(apart), **record}


def questions(every: int) -> dict[str, list[Setting]]:
    """The arms of every question; a smaller run has some settings of each axis."""
    taus, queues, warmups, weights = (
        axis[::every] for axis in (TAUS, QUEUES, WARMUPS, WEIGHTS[::-1])
    )
    return {
        "tau": [Setting(tau=tau, unit=unit) for unit in ("frozen", "spread") for tau in taus],
        "tau over time": [
            Setting(unit=unit, warmup=warmup)
            for warmup in (Setting().warmup, 0.0)
            for unit in ("frozen", "decay", "spread")
        ],
        "queue": [Setting(queue=rows) for rows in queues],
        "queue kept at the switch": [Setting(), Setting(keep=True)],
        "queue of recall": [Setting("recall", queue=rows, main=ANCHORED) for rows in queues],
        "warmup": [
            Setting(unit=unit, warmup=share, blend=ramp)
            for unit, ramp in (("frozen", 0.0), ("frozen", 0.2), ("spread", 0.0))
            for share in warmups
        ],
        "weight": [Setting("ap", main=weight) for weight in weights],
        "weight at the top": [
            Setting(loss, unit=unit, main=weight)
            for loss, unit in (
                ("recall", "frozen"),
                ("trapezoid", "spread"),
                ("pairwise", "spread"),
            )
            for weight in weights
        ],
    }


def record(arm: Setting, found: Outcome, control: Outcome, usual: Outcome) -> dict[str, Any]:
    """An arm with all its seeds, and what it gains over cross-entropy and over the usual arm."""
    ap, recall = found.ap.tolist(), found.recall.tolist()
    judged = "ap" if arm.loss == "ap" else "recall"
    written = arm._asdict() | {
        "ap": ap, "recall": recall,
        "ap_gain": paired(ap, control.ap.tolist()),
        "recall_gain": paired(recall, control.recall.tolist()),
        "over_usual": paired(getattr(found, judged).tolist(), getattr(usual, judged).tolist()),
    }  # fmt: skip
    if arm.queue:
        for name in ("saturation", "drift", "stale") if arm.loss == "ap" else ("drift",):
            written[name] = interval(getattr(found, name).tolist())
    return written


def temperatures(scores: Tensor, y: Tensor, taus: Sequence[float]) -> list[dict[str, Any]]:
    """At each tau, in spreads: share of positives without gradient, and |smooth AP - AP|."""
    spread, exact = P.score_spread(scores), average_precision(scores[:, None], y)[:, 0]
    found = []
    for tau in taus:
        smooth = P.smooth_ap(scores, y, tau * spread)
        pool, pos = scores[:, :RANKED], y[:, :RANKED]
        found.append({
            "tau": tau,
            "saturation": interval(P.smooth_ap_saturation(pool, pos, tau * spread).tolist()),
            "error": interval((smooth - exact).abs().tolist()),
            "bias": interval((smooth - exact).tolist()),
        })  # fmt: skip
    return found


def pools(scores: Tensor, y: Tensor, sizes: Sequence[int], draws: int) -> list[dict[str, Any]]:
    """Smooth AP of random pools around that of all rows, at the default tau."""
    tau = Setting().tau * P.score_spread(scores)
    whole, draw = P.smooth_ap(scores, y, tau), torch.Generator().manual_seed(0)
    found = []
    for size in sizes:
        if size > scores.shape[1] / 2:
            continue
        rows = torch.stack(
            [torch.randperm(scores.shape[1], generator=draw)[:size] for _ in range(draws)]
        )
        some, pos = scores[:, rows], y[:, rows]
        value = P.smooth_ap(some, pos, tau[:, None].expand(some.shape[:2]))
        counts = P.smooth_ap_defined(pos)
        apart = torch.where(counts, value - whole[:, None], torch.nan)
        found.append({
            "rows": size,
            "positives": pos.sum(-1).double().mean().item(),
            "without": 1 - counts.double().mean().item(),
            "bias": interval(apart.nanmean(1).tolist()),
            "sd": interval([row[~row.isnan()].std().item() for row in apart]),
            "ap": whole.mean().item(),
        })  # fmt: skip
    return found


def answer(data: Data, world: Any, scale: Scale) -> dict[str, Any]:
    """All questions about one world."""
    asked = questions(scale.every)
    arms = [CONTROL, *USUAL, *(arm for arms in asked.values() for arm in arms)]
    found = dict(zip(arms, train(world, arms, data), strict=True))
    control = found[CONTROL]
    return {
        "positives": data.learnt.y.double().mean().item(),
        "control": {
            "ap": interval(control.ap.tolist()),
            "recall": interval(control.recall.tolist()),
        },
        "temperatures": temperatures(
            control.scores, data.learnt.y, (*TINY_TAUS, *TAUS)[:: scale.every]
        ),
        "pools": pools(control.scores, data.learnt.y, POOLS[:: scale.every], scale.pools),
        "questions": {
            name: [record(arm, found[arm], control, found[USUAL[arm.loss != "ap"]]) for arm in arms]
            for name, arms in asked.items()
        },
    }


def measure(quick: bool) -> report.Written:
    scale = QUICK if quick else FULL
    start = time.process_time()
    written = report.heading("choosing", __doc__.splitlines()[0]) | {
        "quick": quick,
        "protocol": {
            **scale._asdict(), "inputs": INPUTS, "quantile": QUANTILE, "optimizer": "Adam",
            "default": Setting()._asdict(), "control": CONTROL._asdict(), "decay": DECAY,
            "ranked": RANKED,
        },
        "worlds": {},
    }  # fmt: skip
    for name, world in WORLDS.items():
        print(name, file=sys.stderr, flush=True)
        about = {"about": world.about, "hidden": world.hidden, "rate": world.rate}
        written["worlds"][name] = about | answer(make_data(world, scale), world, scale)
    written["cpu_s"] = round(time.process_time() - start, 1)
    return written


def main(argv: Sequence[str] | None = None) -> int:
    return report.main("choosing", argv, measure, choosing_figures.show, choosing_figures.draw)


if __name__ == "__main__":
    raise SystemExit(main())
