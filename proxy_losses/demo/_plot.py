"""The demo's figure: the training trace, and the precision-recall curves on test."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter, StrMethodFormatter
from sklearn.metrics import precision_recall_curve

from ._measure import Array, class_lists, recall_at_top, top_count
from ._report import Result
from ._tables import Ints
from ._train import Arm, Epoch

OURS, THEIRS = "#0b6e99", "#d9730d"
PHASES = {"warmup": "#eeeeee", "blend": "#f8e7c0", "main": "#e2f0f6"}
PHASE_NAMES = {"warmup": "warmup", "blend": "blend", "main": "ranking loss"}
INK = "#333333"


def save_figure(result: Result, path: Path) -> None:
    """Draw the run and write it as a PNG."""
    figure = Figure(figsize=(11.5, 5.6), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplot_mosaic([["loss", "pr"], ["aucpr", "pr"]], width_ratios=[1.25, 1])
    _trace_loss(axes["loss"], result)
    _trace_aucpr(axes["aucpr"], result)
    _curves(axes["pr"], result)
    for ax in axes.values():
        _tidy(ax)
    figure.align_ylabels([axes["loss"], axes["aucpr"]])
    macro = "" if len(result.table.classes) == 2 else ", mean over classes"
    difference = result.difference
    figure.suptitle(
        f"{result.table.name}, seed {result.settings.seed}: test AUCPR{macro}  "
        f"{result.ranking.name} {result.ranking_test.aucpr:.4f}  |  "
        f"{result.plain.name} {result.plain_test.aucpr:.4f}  "
        f"(95 % interval of the difference {difference.low:+.3f} to {difference.high:+.3f})",
        fontsize=11,
        color=INK,
    )
    figure.savefig(path, format="png")


def _arms(result: Result) -> list[tuple[Arm, dict[str, Any]]]:
    ours = {"color": OURS, "linewidth": 2.0, "zorder": 3}
    theirs = {"color": THEIRS, "linewidth": 2.0, "linestyle": (0, (4, 1.5)), "zorder": 4}
    return [(result.plain, theirs), (result.ranking, ours)]


def _phases(ax: Axes, trace: tuple[Epoch, ...], *, label: bool) -> None:
    """Shade the ranking arm's phases; name them above the axes."""
    last = trace[-1].number
    ax.set_xlim(0.5, last + 0.5)
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    for phase, colour in PHASES.items():
        numbers = [epoch.number for epoch in trace if epoch.phase == phase]
        if not numbers:
            continue
        left, right = numbers[0] - 0.5, numbers[-1] + 0.5
        ax.axvspan(left, right, color=colour, linewidth=0, zorder=0)
        if label:
            ax.text(
                (left + right) / 2,
                1.02,
                PHASE_NAMES[phase],
                transform=ax.get_xaxis_transform(),
                ha="center",
                va="bottom",
                fontsize=9,
                color=INK,
            )


def _trace_loss(ax: Axes, result: Result) -> None:
    _phases(ax, result.ranking.trace, label=True)
    for arm, style in _arms(result):
        losses = [epoch.loss for epoch in arm.trace]
        ax.plot([epoch.number for epoch in arm.trace], losses, label=arm.name, **style)
    losses = [epoch.loss for arm, _ in _arms(result) for epoch in arm.trace]
    if min(losses) > 0:
        ax.set_yscale("log")
        wide = max(losses) > 1000 * min(losses)
        ax.yaxis.set_major_locator(LogLocator(subs=(1.0,) if wide else (1.0, 2.0, 5.0)))
        ax.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        ax.yaxis.set_minor_formatter(NullFormatter())
    ax.set_ylabel("training loss\n(each arm's own scale)")
    ax.tick_params(labelbottom=False)
    ax.legend(loc="best", fontsize=8.5, framealpha=0.9)


def _trace_aucpr(ax: Axes, result: Result) -> None:
    _phases(ax, result.ranking.trace, label=False)
    seen: list[float] = []
    for arm, style in _arms(result):
        values = [epoch.aucpr for epoch in arm.trace]
        ax.plot([epoch.number for epoch in arm.trace], values, **style)
        seen += values
        ax.plot(
            arm.best.number,
            arm.best.aucpr,
            marker="o",
            markersize=8,
            markerfacecolor="white",
            markeredgecolor=style["color"],
            markeredgewidth=2,
            linestyle="none",
            zorder=5,
            label=f"{arm.name}, best at {arm.best.number}",
        )
    low, high = np.quantile(seen, 0.1), max(seen)  # the first few epochs may run off the axis
    ax.set_ylim(low - 0.08 * (high - low) - 1e-3, high + 0.12 * (high - low) + 1e-3)
    ax.set_xlabel("epoch")
    ax.set_ylabel("validation AUCPR")
    ax.legend(loc="best", fontsize=8.5, framealpha=0.9)


def _curves(ax: Axes, result: Result) -> None:
    labels = result.split.test.labels
    binary = len(result.table.classes) == 2
    for (arm, style), test in zip(
        _arms(result), (result.plain_test, result.ranking_test), strict=True
    ):
        recall, precision = mean_curve(arm.test_scores, labels)
        name = f"{arm.name}, AUCPR {test.aucpr:.4f}"
        ax.plot(recall, precision, drawstyle="steps-pre", label=name, **style)
        if binary:
            positive = labels == 1
            at = recall_at_top(arm.test_scores[:, 0], positive)
            share = at * positive.sum() / top_count(len(labels))
            size = 6 if arm is result.ranking else 10  # both show where they coincide
            ax.plot(at, share, "D", color=style["color"], markersize=size, zorder=6, clip_on=False)
    if binary:
        rate = float((labels == 1).mean())
        ax.plot([], [], "D", color="#777777", label="cut at the top 0.5 %")
        ax.axhline(rate, color="#999999", linewidth=1, linestyle=":", label=f"chance, {rate:.3f}")
    ax.set_xlim(0, 1.01)
    ax.set_ylim(0, 1.03)
    ax.set_xlabel("recall")
    ax.set_ylabel("precision" if binary else "precision, mean over classes")
    ax.set_title(f"Precision-recall on {len(labels):,} test rows", fontsize=10, color=INK)
    high = result.plain_test.aucpr > 0.5
    ax.legend(loc="lower left" if high else "upper right", fontsize=8.5, framealpha=0.9)


def mean_curve(scores: Array, labels: Ints) -> tuple[Array, Array]:
    """Recall (rising) and precision; of several classes, the mean precision at each recall."""
    curves = []
    for list_scores, positive in class_lists(scores, labels):
        precision, recall, _ = precision_recall_curve(positive, list_scores)
        curves.append((recall[::-1], precision[::-1]))
    if len(curves) == 1:
        return curves[0]
    grid = np.linspace(0, 1, 501)
    # The precision where a recall is first reached, as average precision counts it.
    stacked = [
        precision[np.minimum(np.searchsorted(recall, grid), len(recall) - 1)]
        for recall, precision in curves
    ]
    return grid, np.mean(stacked, axis=0)


def _tidy(ax: Axes) -> None:
    ax.spines[["top", "right"]].set_visible(False)
    ax.tick_params(labelsize=9, colors=INK)
    ax.set_axisbelow(True)
