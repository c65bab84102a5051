"""The tables and the plot of what was measured."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from .. import report
from ..figures import BLUE, GREY, INK, ORANGE, new_figure, tidy
from ..real_data.stats import holm, resampled
from .arms import OURS
from .data import OVERLAP

PAGE = Path(__file__).with_name("README.md")

Written = dict[str, Any]


def insert(page: str, written: Written) -> str:
    """The page with its tables written anew."""
    return report.replaced(page, block(written))


def values(cell: dict[str, Any], arm: str, metric: str = "map") -> list[float]:
    """Of every split, in points."""
    return [100 * split[arm][metric] for split in cell.values()]


def compare(cell: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Ours minus every other arm: mean and 95 % interval over splits, which share classes."""
    found = {}
    mine = values(cell, OURS)
    names = [arm for arm in next(iter(cell.values())) if arm != OURS]
    for arm in names:
        apart = [a - b for a, b in zip(mine, values(cell, arm), strict=True)]
        mean, half, p = resampled(apart, OVERLAP) if len(apart) > 1 else (apart[0], np.inf, 1.0)
        up = sum(d > 0 for d in apart)
        found[arm] = {"mean": mean, "half": half, "p": p, "up": up, "down": len(apart) - up}
    for one, sure in zip(found.values(), holm([f["p"] for f in found.values()]), strict=True):
        one["sure"] = sure
    return found


def cells(written: Written) -> dict[str, dict[str, Any]]:
    """All that were run, by their names: data set and cell."""
    return {
        f"{data}, {name}": cell
        for data, of_data in written["results"].items()
        for name, cell in of_data.items()
        if cell
    }


def table(written: Written) -> list[list[str]]:
    """Mean average precision of every arm, in points; in brackets ours minus it."""
    found = cells(written)
    names = list(written["protocol"]["arms"])
    rows = [["unseen classes, mAP", "splits", *names]]
    for title, cell in found.items():
        apart = compare(cell)
        row = [title, str(len(cell))]
        for arm in names:
            text = f"{np.mean(values(cell, arm)):.1f}"
            if arm in apart:
                text += f" ({apart[arm]['mean']:+.1f}{'*' if apart[arm]['sure'] else ''})"
            row.append(text)
        rows.append(row)
    return rows


def differences(written: Written) -> list[list[str]]:
    """Ours minus every arm, with intervals and the splits in which it is ahead."""
    rows = [["LinearEmbedder minus", *cells(written)]]
    found = [compare(cell) for cell in cells(written).values()]
    for arm in written["protocol"]["arms"]:
        if arm != OURS:
            rows.append([arm, *(_gain(of[arm]) for of in found)])
    return rows


def _gain(one: dict[str, Any]) -> str:
    return f"{one['mean']:+.1f} ± {one['half']:.1f} ({one['up']}/{one['down']})"


def recall(written: Written) -> list[list[str]]:
    rows = [["unseen classes, R@1", *(names := list(written["protocol"]["arms"]))]]
    for title, cell in cells(written).items():
        rows.append([title, *(f"{np.mean(values(cell, a, 'recall_at_1')):.1f}" for a in names)])
    return rows


def times(written: Written) -> list[list[str]]:
    """Milliseconds of a loss with its gradient."""
    sizes = list(next(iter(written["step_ms"].values())))
    rows = [["CPU ms a step", *(f"{size} rows" for size in sizes)]]
    return rows + [
        [arm, *(f"{ms:.1f}" for ms in found.values())] for arm, found in written["step_ms"].items()
    ]


def tried(written: Written) -> str:
    """How many configurations were fitted."""
    per_split = sum(len(arm["values"]) for arm in written["protocol"]["arms"].values())
    splits = sum(len(cell) for cell in cells(written).values())
    return f"{per_split} configurations a split, {splits} splits, {per_split * splits} fitted."


def block(written: Written) -> str:
    """Markdown, without the marks."""
    tables = (table(written), differences(written), recall(written), times(written))
    return "\n\n".join([*map(report.markdown, tables), tried(written)])


def draw(written: Written, path: Path) -> None:
    """Mean average precision of every arm, of cells without and with noise, split by split."""
    found = cells(written)
    arms = list(written["protocol"]["arms"])
    shown = {title: cell for title, cell in found.items() if "all rows" in title} or found
    shown = dict(list(shown.items())[:4])
    figure = new_figure(11.0, 0.6 + 3.1 * ((len(shown) + 1) // 2))
    panels = np.atleast_1d(figure.subplots((len(shown) + 1) // 2, min(2, len(shown)))).ravel()
    for ax in panels[len(shown) :]:
        ax.set_axis_off()
    for ax, (title, cell) in zip(panels, shown.items(), strict=False):
        apart = compare(cell)
        for row, arm in enumerate(arms):
            of_arm = values(cell, arm)
            colour = BLUE if arm == OURS else GREY if arm in ("raw", "whitened") else ORANGE
            ax.plot(of_arm, [row] * len(of_arm), "|", color=colour, markersize=9, alpha=0.45)
            ax.plot(np.mean(of_arm), row, "o", color=colour, markersize=6)
            label = f"{np.mean(of_arm):.1f}"
            if arm in apart:
                label += f"  ({OURS} {apart[arm]['mean']:+.1f})"
            ax.annotate(label, (1.01, row), xycoords=("axes fraction", "data"), fontsize=8,
                        va="center", color=INK)  # fmt: skip
        ax.set_yticks(range(len(arms)), arms)
        ax.invert_yaxis()
        ax.set_title(f"{title}, {len(cell)} splits", fontsize=10, color=INK)
        tidy(ax, "mAP on unseen classes, points; ticks are splits", "")
    figure.savefig(path)
