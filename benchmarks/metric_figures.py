"""The table, the paired comparison and the plot of `benchmarks.metric_learning`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from scipy import stats

from . import report
from .metric_learning import METRICS
from .rank_figures import BLUE, GREY, INK, ORANGE, new_figure, tidy

TIE = 1e-3  # closer than this is a tie

Results = dict[str, dict[str, list[float]]]  # arm -> metric -> value of each seed


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


def compare(results: Results, ours: str) -> dict[str, Any]:
    mine = results[ours]
    return {
        "tie": TIE,
        "summary": {
            name: {m: interval(values) for m, values in arm.items()}
            for name, arm in results.items()
        },
        "paired": {
            name: {m: paired(mine[m], values) for m, values in arm.items()}
            for name, arm in results.items()
            if name != ours
        },
    }


def show(written: dict[str, Any]) -> str:
    """Both tables."""
    rows = [["mean on the unseen classes", *METRICS.values()]]
    for name, arm in written["summary"].items():
        rows.append([name, *(f"{arm[m]['mean']:.4f}" for m in METRICS)])
    seeds = len(written["protocol"]["seeds"])
    title = f"{written['ours']} minus it, {seeds} paired seeds"
    apart = [[title, *(f"{m} [95 %] w/t/l" for m in METRICS.values())]]
    for name, arm in written["paired"].items():
        cells = []
        for m in METRICS:
            found = arm[m]
            low, high = found["interval"]
            count = f"{found['wins']}/{found['ties']}/{found['losses']}"
            cells.append(f"{found['mean']:+.4f} [{low:+.4f}, {high:+.4f}] {count}")
        apart.append([name, *cells])
    chosen = [["chosen", "parameter", "rate", "steps", "mAP on held-out classes", "CPU s"]]
    for name, tuned in written["tuning"].items():
        choice = tuned["chosen"]
        best = max(t["map"] for t in tuned["tried"])
        cost = tuned["tuning_cpu_s"] + tuned["training_cpu_s"]
        chosen.append([
            name, f"{tuned['parameter']} {choice['value']:g}", f"{choice['rate']:g}",
            str(choice["steps"]), f"{best:.4f}", f"{cost:.0f}",
        ])  # fmt: skip
    tables = (report.align(rows), report.align(apart), report.align(chosen))
    return "\n\n".join("\n".join(table) for table in tables)


def draw(written: dict[str, Any], path: Path) -> None:
    """Left the mean average precision of every seed, right the paired differences."""
    figure = new_figure(10.4, 3.9)
    left, right = figure.subplots(1, 2, width_ratios=(1.15, 1), sharey=True)
    names = list(written["results"])
    for row, name in enumerate(names):
        colour = BLUE if name == written["ours"] else ORANGE if name.startswith("peer") else GREY
        values = written["results"][name]["map"]
        left.plot(values, [row + 0.16] * len(values), "|", color=colour, markersize=7, alpha=0.6)
        bar(left, written["summary"][name]["map"], row, colour)
        if name in written["paired"]:
            bar(right, written["paired"][name]["map"], row, colour)
    left.set_yticks(range(len(names)), names)
    left.invert_yaxis()
    right.axvline(0.0, color=INK, linewidth=0.9)
    seeds = len(written["protocol"]["seeds"])
    tidy(left, f"mAP on the digits 6-9; mean, 95 % interval, {seeds} seeds", "")
    tidy(right, f"mAP of {written['ours']} minus it, paired by seed", "")
    right.tick_params(labelleft=False)
    figure.savefig(path)


def bar(ax: Any, found: dict[str, Any], row: int, colour: str) -> None:
    """Mean and interval."""
    ax.plot(found["interval"], [row, row], color=colour, linewidth=2.2)
    ax.plot(found["mean"], row, "o", color=colour, markersize=5.5)
