"""The tables and the plot of what was measured."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .. import report
from ..figures import BLUE, GREEN, GREY, INK, ORANGE, PURPLE, new_figure, tidy
from ..real_data.stats import holm, resampled
from .arms import OURS
from .data import OVERLAP

PAGE = Path(__file__).with_name("README.md")
COLOURS = {
    "MultiSimilarity": ORANGE, "SupCon": GREEN, "ProxyAnchor": PURPLE,
    "normalised softmax": "#b03a5b", "whitened": INK, "raw": GREY,
}  # fmt: skip

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
        f"{data}, {name}": of_data[name]
        for data, of_data in written["results"].items()
        for name in sorted(of_data, key=_place)
        if of_data[name]
    }


def _place(name: str) -> tuple[float, float]:
    """(rows a class, per cent of noise) of a cell by its name; infinite for all rows."""
    noise, rows = re.findall(r"([\d.]+) %.*, (\w+) rows", name)[0]
    return float("inf" if rows == "all" else rows), float(noise)


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
    arms = [arm for arm in written["protocol"]["arms"] if arm != OURS]
    rows = [["LinearEmbedder minus", *arms]]
    for title, cell in cells(written).items():
        found = compare(cell)
        rows.append([title, *(_gain(found[arm]) for arm in arms)])
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


def curves(written: Written, names: Sequence[str], data: str, arm: str) -> list[float]:
    """Mean average precision in each of these cells, over the splits that all of them have."""
    found = [written["results"][data][name] for name in names]
    seeds = set.intersection(*(set(cell) for cell in found))
    return [float(np.mean([100 * cell[seed][arm]["map"] for seed in seeds])) for cell in found]


def draw(written: Written, path: Path) -> None:
    """Mean average precision of the arms by noise, and by rows a class."""
    sets = [*written["results"]]
    figure = new_figure(11.0, 7.6)
    panels = figure.subplots(2, len(sets), squeeze=False)
    for data, column in zip(sets, panels.T, strict=True):
        have = [name for name in sorted(written["results"][data], key=_place)
                if written["results"][data][name]]  # fmt: skip
        noise = [name for name in have if _place(name)[0] == np.inf]
        clean = [name for name in have if _place(name)[1] == 0]
        for ax, names, key, what in (
            (column[0], noise, 1, "% of the labels wrong"),
            (column[1], clean, 0, "rows a class, labels as they are"),
        ):
            ticks = ["all" if _place(n)[key] == np.inf else f"{_place(n)[key]:g}" for n in names]
            for arm in (OURS, *COLOURS):
                ours = arm == OURS
                ax.plot(
                    range(len(names)), curves(written, names, data, arm), "o-", label=arm,
                    markersize=6 if ours else 4, linewidth=2.4 if ours else 1.3,
                    color=BLUE if ours else COLOURS[arm],
                )  # fmt: skip
            ax.set_xticks(range(len(names)), ticks)
            count = len(set.intersection(*(set(written["results"][data][n]) for n in names)))
            ax.set_title(f"{data}, {count} splits", fontsize=10, color=INK)
            tidy(ax, what, "mAP on unseen classes, points")
    handles, labels = panels[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False, fontsize=9)
    figure.savefig(path)
