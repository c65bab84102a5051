"""The plot: every arm against the control, tables as points."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib.lines import Line2D

from ..figures import BLUE, GREY, INK, ORANGE, new_figure, tidy
from .stats import Written, arms_of, compare, overall

MARKERS = "osD^vPX*"


def draw(written: Written, path: Path) -> None:
    """One panel per model; the mean over tables with its standard error."""
    models = [*written["protocol"]["models"]]
    figure = new_figure(10.6, 5.0)
    panels = figure.subplots(1, len(models), sharey=True)
    tables = [*written["results"]]
    for ax, model in zip(panels, models, strict=True):
        found = compare(written, model, "ap")
        arms = [arm for arm in arms_of(written, model) if arm != written["boosting"]]
        ax.axvline(0, color=INK, linewidth=1)
        for row, arm in enumerate(arms):
            colour = BLUE if arm in written["ours"] else ORANGE
            colour = GREY if arm == written["base"] else colour
            for marker, table in zip(MARKERS, tables, strict=False):
                ax.plot(
                    found[arm][table].mean, row + 0.22, marker, markersize=5, color=colour,
                    markerfacecolor="none", markeredgewidth=1.0,
                )  # fmt: skip
            whole = overall([on_table.mean for on_table in found[arm].values()])
            ends = [whole.mean - whole.error, whole.mean + whole.error]
            ax.plot(ends, [row - 0.1] * 2, color=colour, linewidth=2.4)
            ax.plot(whole.mean, row - 0.1, "o", color=colour, markersize=6.5)
        names = ["BCE, not continued" if arm == written["base"] else arm for arm in arms]
        ax.set_yticks(range(len(arms)), names)
        ax.set_title(model, fontsize=11, color=INK)
        tidy(ax, "test AP minus that of BCE continued, points", "")
    panels[0].invert_yaxis()
    hollow = {"color": INK, "markerfacecolor": "none", "linestyle": "", "markersize": 5}
    keys: dict[str, dict[str, Any]] = {
        table: {"marker": m, **hollow} for m, table in zip(MARKERS, tables, strict=False)
    }
    for label, colour in (("ours", BLUE), ("others", ORANGE)):
        style = {"color": colour, "marker": "o", "linewidth": 2.4}
        keys[f"{label}: mean ± s.e. over tables"] = style
    lines = [Line2D([], [], label=label, **style) for label, style in keys.items()]
    figure.legend(handles=lines, loc="outside lower center", ncols=4, frameon=False, fontsize=9)
    figure.savefig(path)
