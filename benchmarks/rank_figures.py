"""Draws the figures of the soft ranks.

``python -m benchmarks.rank_figures`` measures and writes ``error.png`` and ``time.png`` beside the
code of the ranks; ``python -m benchmarks.ranks --plot`` draws its own results with `draw_speed`.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from proxy_losses import _ranks
from proxy_losses._ranks import bins, plan
from proxy_losses._ranks.cells import Rows
from proxy_losses._ranks.layout import Block, Ranges, direct_layout, place

from . import report
from .plan_constants import RTOL, nanoseconds
from .report import Report
from .smooth_ap import OURS, PEER, TAU, make_list

FOLDER = Path(_ranks.__file__).parent
INK, GREY = "#333333", "#8a8a8a"
BLUE, ORANGE, GREEN, PURPLE = "#0b6e99", "#d9730d", "#3f7d20", "#7b4fa3"
WIDTHS = {4.0: PURPLE, 2.0: ORANGE, 1.0: GREEN, 0.5: BLUE}  # bins, in units of tau
RATES = {0.005: "-", 0.05: (0, (4, 1.5))}
TIME_ROWS = tuple(round(1000 * 2 ** (k / 2)) for k in range(-2, 13))
MOST_PAIRS = 1 << 26  # the dense method is left out above


class Timed(NamedTuple):
    """Milliseconds of both methods, and what the plan would choose."""

    rows: int
    rate: float
    dense: float | None
    grid: float
    chosen: str


class Errors(NamedTuple):
    """Largest errors for 3, 4, .. nodes per bin of one width."""

    pair: list[float]  # of a single pair, relative to its sigmoid
    rank: list[float]  # of a soft rank, relative to it


def errors(width: float, most: int = plan.MAX_NODES, rows: int = 3000) -> Errors:
    """Grid against float64 brute force, 32 single sources and all rows as sources."""
    gen = torch.Generator().manual_seed(0)
    scores = 12.0 * torch.randn(1, rows, generator=gen, dtype=torch.float64)  # in units of tau
    weights = torch.eye(rows, dtype=torch.float64)[None, :32]
    weights = torch.cat([weights, torch.ones(1, 1, rows, dtype=torch.float64)], 1)
    apart = scores[0, :, None] - scores[0]  # [source, target]
    exact = weights[0] @ torch.sigmoid(apart)
    exact[-1] += 0.5  # the rank; the others are single pairs
    shown = apart[:32].abs() < 20.0
    count = math.ceil(45.0 / width)  # cells so wide that the cut-off adds nothing
    ranges = Ranges([float(scores.min())], [float(scores.max())], [0.0], [1.0])
    every = Rows(None, tuple(range(33)), ())
    found = Errors([], [])
    for nodes in range(plan.MIN_NODES, most + 1):
        chosen = plan.Plan("grid", nodes, count, count * width, width, 0.0, 0.0)
        layout = direct_layout(ranges, chosen, scores.device)
        moments = bins.moments_of(layout, scores, weights, [every])
        (table,) = bins.products(layout, moments, ["value"])
        where = place(layout, scores, Block(slice(0, 1), slice(0, rows)))
        sums = torch.stack([bins.clenshaw(table, group, where) for group in every.sources])
        sums[-1] += 0.5
        relative = (sums - exact).abs() / exact
        found.pair.append(float(relative[:32][shown].max()))
        found.rank.append(float(relative[-1].max()))
    return found


def times(rows: int, rate: float, repeats: int) -> Timed:
    """CPU time of mean precision and its gradient."""
    scores, pos = make_list(rows, rate)
    pairs = int(pos.sum()) * rows
    span = float(scores.max() - scores.min()) / TAU
    chosen = plan.plan([plan.fused_work(1, rows, True)], span, RTOL, pairs=pairs)
    scores.requires_grad_()

    def run(method: str) -> None:
        mean, _ = _ranks.mean_precision(scores, pos, None, TAU, rtol=RTOL, method=method)
        torch.autograd.grad(mean, scores)

    grid = 1e-6 * nanoseconds(partial(run, "grid"), repeats)
    dense = None if pairs > MOST_PAIRS else 1e-6 * nanoseconds(partial(run, "dense"), repeats)
    return Timed(rows, rate, dense, grid, chosen.method)


def crossing(points: Sequence[Timed]) -> tuple[float, float] | None:
    """Rows and milliseconds at which both methods take the same time, by log-log lines."""
    both = [(math.log(t.rows), math.log(t.dense), math.log(t.grid)) for t in points if t.dense]
    for (x0, dense0, grid0), (x1, dense1, grid1) in pairwise(both):
        if dense0 <= grid0 and dense1 > grid1:
            part = (grid0 - dense0) / (dense1 - dense0 - grid1 + grid0)
            return math.exp(x0 + part * (x1 - x0)), math.exp(grid0 + part * (grid1 - grid0))
    return None


def new_figure(width: float, height: float) -> Figure:
    figure = Figure(figsize=(width, height), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def tidy(ax: Axes, x: str, y: str) -> None:
    ax.set_xlabel(x, color=INK)
    ax.set_ylabel(y, color=INK)
    ax.spines[["top", "right"]].set_visible(False)
    ax.grid(True, which="major", color="#e6e6e6", linewidth=0.7)
    ax.tick_params(labelsize=9, colors=INK)
    ax.set_axisbelow(True)


def milliseconds(ax: Axes) -> None:
    """Plain numbers on a logarithmic axis of milliseconds."""
    ax.yaxis.set_major_formatter(lambda v, _: f"{v:,g}")


def draw_error(found: dict[float, Errors], path: Path) -> None:
    """Error against p for fixed bin widths, and the law."""
    figure = new_figure(6.6, 4.4)
    ax = figure.subplots()
    for width, values in found.items():
        colour = WIDTHS[width]
        nodes = range(plan.MIN_NODES, plan.MIN_NODES + len(values.pair))
        law = [plan.interpolation_error(p, width) for p in nodes]
        ax.plot(nodes, law, color=colour, linewidth=1.1, linestyle="--")
        ax.plot(nodes, values.pair, "o", color=colour, markersize=5, label=f"h = {width:g} tau")
        ax.plot(nodes, values.rank, "_", color=colour, markersize=9, markeredgewidth=1.8)
    constant = plan.INTERPOLATION_CONSTANT
    ax.plot([], [], color=GREY, linestyle="--", label=rf"the law, {constant:g} $\rho^{{-p}}$")
    ax.plot([], [], "o", color=GREY, markersize=5, label="one pair, of its sigmoid")
    ax.plot([], [], "_", color=GREY, markersize=9, markeredgewidth=1.8, label="soft rank, of it")
    ax.set_yscale("log")
    ax.set_ylim(3e-17, 9)
    ax.set_xticks(nodes)
    tidy(ax, "nodes per bin, p", "largest relative error")
    ax.legend(fontsize=8.5, frameon=False, loc="lower left", ncols=2)
    figure.savefig(path)


def draw_time(points: Sequence[Timed], path: Path) -> None:
    """Dense and grid against M; filled where the plan would take them."""
    figure = new_figure(6.6, 4.4)
    ax = figure.subplots()
    for rate, style in RATES.items():
        line = [t for t in points if t.rate == rate]
        for method, colour in (("dense", ORANGE), ("grid", BLUE)):
            part = [(t.rows, ms, t.chosen) for t in line if (ms := getattr(t, method))]
            label = f"{method}, {100 * rate:g} % positives"
            x, y = zip(*((rows, ms) for rows, ms, _ in part), strict=True)
            ax.plot(x, y, color=colour, linestyle=style, linewidth=1.5, label=label)
            for rows, ms, chosen in part:
                face = colour if chosen == method else "white"
                ax.plot(rows, ms, "o", color=colour, markersize=4.5, mfc=face)
        if (meet := crossing(line)) is not None:
            ax.plot(*meet, "D", color=INK, markersize=9, mfc="none", mew=1.4, zorder=5)
    ax.plot([], [], "D", color=INK, mfc="none", mew=1.4, label="measured crossing")
    ax.plot([], [], "o", color=GREY, markersize=4.5, label="filled: the plan's choice")
    ax.set_xscale("log")
    ax.set_yscale("log")
    milliseconds(ax)
    tidy(ax, "rows in the list, M", "value and gradient, CPU ms")
    ax.legend(fontsize=8.5, frameon=False, loc="upper left")
    figure.savefig(path)


def draw_speed(measured: Report, path: Path) -> None:
    """Time against M of all contenders of the suite `benchmarks.ranks`, one panel per rate."""
    figure = new_figure(9.6, 4.4)
    panels = figure.subplots(1, 2, sharex=True, sharey=True)
    styles: dict[str, dict[str, Any]] = {
        PEER: {"color": ORANGE, "label": f"{PEER} (P x M pairs)", "marker": "s"},
        "torch.sort": {"color": GREY, "label": "torch.sort of M scores", "linestyle": "--"},
        OURS: {"color": BLUE, "label": f"{OURS}.smooth_ap", "marker": "o", "linewidth": 2.2},
    }
    for ax, rate in zip(panels, RATES, strict=True):
        cases = [
            case
            for case in measured["cases"]
            if case["name"].startswith("smooth_ap, normal")
            and (case["sizes"]["positive_rate"], case["sizes"]["tau"]) == (rate, TAU)
            and case["sizes"]["M"] <= 1_000_000
        ]
        for name, style in styles.items():
            found = [
                (case["sizes"]["M"], entry)
                for case in cases
                if (entry := case["contenders"].get(name)) and entry["median_s"] is not None
            ]
            if not found:
                continue
            x, entries = zip(*found, strict=True)
            y = [1e3 * (entry["median_s"] or 0.0) for entry in entries]
            ax.plot(x, y, **{"markersize": 4.5, "linewidth": 1.6, **style})
            ratio = entries[-1]["ratio"]
            if name == PEER and ratio is not None:
                note = f"{ratio:,.0f} x"
                every = (case["contenders"].get(name) for case in cases)
                if any(entry and entry["status"] == "skipped" for entry in every):
                    note += f",\nthen > {measured['options']['max_gb']:g} GB"
                ax.annotate(note, (x[-1], y[-1]), xytext=(7, 0), textcoords="offset points",
                            color=ORANGE, va="center", fontsize=9)  # fmt: skip
        ax.set_xscale("log")
        ax.set_yscale("log")
        milliseconds(ax)
        ax.set_title(f"{100 * rate:g} % positives", fontsize=10, color=INK)
        tidy(ax, "rows in the list, M", "forward and backward, ms" if ax is panels[0] else "")
    panels[0].legend(fontsize=9, frameon=False, loc="upper left")
    where = measured["machine"]
    figure.suptitle(f"Smooth-AP, float32, tau {TAU:g}, {where['threads']} CPU thread"
                    f"{'s' * (where['threads'] > 1)}", fontsize=11, color=INK)  # fmt: skip
    figure.savefig(path)


def main(argv: Sequence[str] | None = None) -> int:
    options = argparse.ArgumentParser(prog="python -m benchmarks.rank_figures")
    options.add_argument("--quick", action="store_true", help="fewer sizes, to see that it works")
    options.add_argument("--out", type=Path, default=FOLDER, help="folder of the figures")
    args = options.parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    few = {"most": 6, "rows": 600} if args.quick else {}
    found = {width: errors(width, **few) for width in WIDTHS}
    draw_error(found, args.out / "error.png")
    rows = TIME_ROWS[::7] if args.quick else TIME_ROWS
    points = [times(m, rate, 3 if args.quick else 9) for rate in RATES for m in rows]
    draw_time(points, args.out / "time.png")
    record = {
        "errors": {width: values._asdict() for width, values in found.items()},
        "times": [t._asdict() for t in points],
        "crossings": {rate: crossing([t for t in points if t.rate == rate]) for rate in RATES},
        "machine": report.machine(1), "versions": report.versions(),
    }  # fmt: skip
    json.dump(record, sys.stdout, indent=1)
    print()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
