"""The table, the paired comparison and the plot of `benchmarks.metric_learning`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from scipy import stats

from . import report
from .figures import BLUE, GREY, INK, ORANGE, new_figure, tidy

TIE = 1e-3  # closer than this is a tie

Results = dict[str, dict[str, list[float]]]  # arm -> metric -> value of every seed


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
    """Mean of every arm, and what we are ahead of it."""
    mine = results[ours]
    return {
        arm: {
            m: {"mean": interval(values), "ahead": None if arm == ours else paired(mine[m], values)}
            for m, values in found.items()
        }
        for arm, found in results.items()
    }


def show(written: dict[str, Any]) -> str:
    """Per question what was chosen, the means and the differences."""
    ours, seeds = written["ours"], len(written["protocol"]["seeds"])
    names = written["protocol"]["metrics"]
    tables = []
    for question, found in written["compared"].items():
        rows = [[f"{question}: chosen", "parameter", "rate", "steps", "mAP in tuning", "CPU s"]]
        for arm, tuned in written["tuning"][question].items():
            choice = tuned["chosen"]
            best = max(t["map"] for t in tuned["tried"])
            cost = tuned["tuning_cpu_s"] + tuned["training_cpu_s"]
            rows.append([
                arm, f"{tuned['parameter']} {choice['value']:g}", f"{choice['rate']:g}",
                str(choice["steps"]), f"{best:.4f}", f"{cost:.0f}",
            ])  # fmt: skip
        tables.append(report.align(rows))
        rows = [[f"{question}: mean", *names.values()]]
        rows += [
            [arm, *(f"{metrics[m]['mean']['mean']:.4f}" for m in names)]
            for arm, metrics in found.items()
        ]
        tables.append(report.align(rows))
        title = f"{ours} minus it, {seeds} paired seeds"
        rows = [[title, *(f"{m} [95 %] w/t/l" for m in names.values())]]
        rows += [
            [arm, *(_cell(metrics[m]["ahead"]) for m in names)]
            for arm, metrics in found.items()
            if arm != ours
        ]
        tables.append(report.align(rows))
    return "\n\n".join("\n".join(table) for table in tables)


def _cell(ahead: dict[str, Any]) -> str:
    low, high = ahead["interval"]
    count = f"{ahead['wins']}/{ahead['ties']}/{ahead['losses']}"
    return f"{ahead['mean']:+.4f} [{low:+.4f}, {high:+.4f}] {count}"


def draw(written: dict[str, Any], path: Path) -> None:
    """The mean average precision of every arm and seed, one panel per question."""
    figure = new_figure(10.4, 3.7)
    panels = figure.subplots(1, len(written["results"]), sharey=True)
    seeds = len(written["protocol"]["seeds"])
    for ax, (question, results) in zip(panels, written["results"].items(), strict=True):
        for row, (arm, found) in enumerate(results.items()):
            trained = ORANGE if arm in written["tuning"][question] else GREY
            colour = BLUE if arm == written["ours"] else trained
            mean = written["compared"][question][arm]["map"]["mean"]
            ax.plot(found["map"], [row + 0.2] * seeds, "|", color=colour, markersize=7, alpha=0.6)
            ax.plot(mean["interval"], [row, row], color=colour, linewidth=2.2)
            ax.plot(mean["mean"], row, "o", color=colour, markersize=5.5)
        ax.set_yticks(range(len(results)), list(results))
        ax.set_title(f"to rank {question}", fontsize=10, color=INK)
        tidy(ax, f"mAP; mean, 95 % interval and {seeds} seeds", "")
    panels[0].invert_yaxis()
    version = written["versions"]["pytorch_metric_learning"]
    figure.supxlabel(f"peer: pytorch-metric-learning {version}", fontsize=9, color=GREY)
    figure.savefig(path)
