"""What the numbers of all seeds and tables say about an arm against the control."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from scipy import stats

from proxy_losses.demo._verdict import OVERLAP, resampled

LEVEL = 0.05

Written = dict[str, Any]


class OnTable(NamedTuple):
    """Arm - control on one table, in points (hundredths)."""

    mean: float
    half: float  # of the 95 % interval
    p: float  # before correction
    verdict: str  # win, tie or loss, after Holm's correction over arms and tables


class Overall(NamedTuple):
    """Arm - control over the tables, in points. The unit of the test is the table."""

    mean: float  # of the tables' means
    error: float | None  # its standard error; None of one table
    half: float | None  # of the 95 % interval of Student's t
    up: int  # tables above the control, by their mean
    down: int
    p: float  # Wilcoxon signed-rank over the tables


def holm(p: Sequence[float]) -> list[bool]:
    """Which hypotheses Holm's step-down procedure rejects."""
    order = sorted(range(len(p)), key=lambda i: p[i])
    rejected = [False] * len(p)
    for rank, i in enumerate(order):
        if p[i] > LEVEL / (len(p) - rank):
            break
        rejected[i] = True
    return rejected


def parts(written: Written) -> list[Written]:
    """The run, and those that added arms to it, each with a start and a control of its own."""
    return [written, *written.get("later", [])]


def part_of(written: Written, table: str, model: str, arm: str) -> dict[str, Any]:
    """All arms of a model that began where this one did."""
    found = (part["results"][table][model] for part in parts(written))
    return next(arms for arms in found if arm in arms)


def runs(written: Written, table: str, model: str, arm: str) -> dict[str, Any]:
    """The record of an arm; gradient boosting has no other model."""
    boosting = written["boosting"]
    if arm == boosting:
        return dict(written["results"][table][boosting][boosting])
    return dict(part_of(written, table, model, arm)[arm])


def arms_of(written: Written, model: str) -> list[str]:
    """All that are compared with the control: ours, others, the start and boosting."""
    start, control = written["base"], written["control"]
    found = [n for part in parts(written) for n in next(iter(part["results"].values()))[model]]
    names = [n for n in found if n not in (start, control)]
    ours = [n for n in names if n in written["ours"]]
    return [*ours, *(n for n in names if n not in ours), start, written["boosting"]]


def compare(
    written: Written, model: str, metric: str, overlap: float = OVERLAP
) -> dict[str, dict[str, OnTable]]:
    """Arm -> table -> its difference from the control of that model, of the same run."""
    keys, found = [], []
    for arm in arms_of(written, model):
        for table in written["results"]:
            mine = runs(written, table, model, arm)[metric]
            with_control = written["base"] if arm == written["boosting"] else arm
            control = part_of(written, table, model, with_control)[written["control"]][metric]
            apart = [100 * (a - b) for a, b in zip(mine, control, strict=True)]
            keys.append((arm, table))
            found.append(resampled(apart, overlap))
    out: dict[str, dict[str, OnTable]] = {}
    rejected = holm([p for _, _, p in found])
    for (arm, table), (mean, half, p), sure in zip(keys, found, rejected, strict=True):
        verdict = ("win" if mean > 0 else "loss") if sure else "tie"
        out.setdefault(arm, {})[table] = OnTable(mean, half, p, verdict)
    return out


def overall(means: Sequence[float]) -> Overall:
    """The tables as equals."""
    n, mean = len(means), float(np.mean(means))
    error = float(np.std(means, ddof=1)) / math.sqrt(n) if n > 1 else None
    half = None if error is None else float(stats.t.ppf(1 - LEVEL / 2, n - 1)) * error
    p = float(stats.wilcoxon(means).pvalue) if any(means) else 1.0
    return Overall(mean, error, half, sum(m > 0 for m in means), sum(m < 0 for m in means), p)


def record(on_tables: dict[str, OnTable]) -> str:
    """Wins / ties / losses."""
    verdicts = [t.verdict for t in on_tables.values()]
    return " / ".join(str(verdicts.count(v)) for v in ("win", "tie", "loss"))


def kept_start(written: Written, model: str, arm: str) -> float:
    """The share of runs whose best checkpoint is the one they started from."""
    steps = [s for t in written["results"] for s in runs(written, t, model, arm)["step"]]
    return steps.count(0) / len(steps)
