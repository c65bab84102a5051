"""Draws the figures of the soft ranks.

``python -m benchmarks.rank_figures`` measures and writes ``error.png`` and ``time.png`` beside the
code of the ranks; ``python -m benchmarks.ranks --plot`` draws its own results with `draw_speed`.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import Tensor

from proxy_losses import _ranks
from proxy_losses._ranks import bins, plan
from proxy_losses._ranks.cells import Rows
from proxy_losses._ranks.layout import Block, Ranges, direct_layout, place

from . import harness, report
from .report import Report
from .smooth_ap import OURS, PEER, TAU, make_list

FOLDER = Path(_ranks.__file__).parent
INK, GREY = "#333333", "#8a8a8a"
BLUE, ORANGE, GREEN, PURPLE = "#0b6e99", "#d9730d", "#3f7d20", "#7b4fa3"
WIDTHS = {4.0: PURPLE, 2.0: ORANGE, 1.0: GREEN, 0.5: BLUE}  # bins, in units of tau
RATES = {0.005: "-", 0.05: (0, (4, 1.5))}
TIME_ROWS = tuple(round(1000 * 2 ** (k / 2)) for k in range(-2, 13))
RTOL = 1e-6
SLOW_PAIRS = 1 << 27  # exact pairs above which the dense method is left out


class Timed(NamedTuple):
    """Seconds of both methods, and what the plan would choose."""

    rows: int
    rate: float
    dense: float | None
    grid: float
    chosen: str


def errors(width: float, most: int = plan.MAX_NODES, rows: int = 4000) -> list[float]:
    """Largest relative error of the soft ranks for 3 .. most nodes per bin of this width."""
    gen = torch.Generator().manual_seed(0)
    scores = 12.0 * torch.randn(1, rows, generator=gen, dtype=torch.float64)  # in units of tau
    exact = torch.sigmoid(scores[:, None, :] - scores[:, :, None]).sum(-1)
    count = math.ceil(45.0 / width)  # cells so wide that the cut-off adds nothing
    ranges = Ranges([float(scores.min())], [float(scores.max())], [0.0], [1.0])
    every = Block(slice(0, 1), slice(0, rows))
    found = []
    for nodes in range(plan.MIN_NODES, most + 1):
        chosen = plan.Plan("grid", nodes, count, count * width, width, 0.0, 0.0)
        layout = direct_layout(ranges, chosen, scores.device)
        weights = torch.ones(1, 1, rows, dtype=torch.float64)
        moments = bins.moments_of(layout, scores, weights, [Rows(None, (0,), ())])
        (table,) = bins.products(layout, moments, ["value"])
        sums = bins.clenshaw(table, 0, place(layout, scores, every))
        found.append(float(((sums - exact[0]) / (exact[0] + 0.5)).abs().max()))
    return found


def times(rows: int, rate: float, repeats: int) -> Timed:
    """Median seconds of mean precision and its gradient, methods in turn."""
    scores, pos = make_list(rows, rate)
    pairs = int(pos.sum()) * rows

    def run(method: str) -> tuple[Tensor, ...]:
        leaf = scores.clone().requires_grad_()
        mean, _ = _ranks.mean_precision(leaf, pos, None, TAU, rtol=RTOL, method=method)
        return torch.autograd.grad(mean, leaf)

    calls = {m: (partial(run, m), 1) for m in ("dense", "grid")}
    if pairs > SLOW_PAIRS:
        del calls["dense"]
    for call, _ in calls.values():
        call()
    samples = harness.rounds(calls, repeats)
    seconds = {m: statistics.median(s) for m, s in samples.items()}
    span = float(scores.max() - scores.min()) / TAU
    chosen = plan.plan([plan.fused_work(1, rows, True)], span, RTOL, pairs=pairs)
    return Timed(rows, rate, seconds.get("dense"), seconds["grid"], chosen.method)


def crossing(points: Sequence[Timed]) -> float | None:
    """Rows at which both methods take the same time, on straight lines in the logarithms."""
    known = [(math.log(t.rows), math.log(t.dense / t.grid)) for t in points if t.dense]
    below = [i for i, (_, y) in enumerate(known) if y <= 0.0]
    if not below or below[-1] + 1 == len(known):
        return None
    (x0, y0), (x1, y1) = known[below[-1] : below[-1] + 2]
    return math.exp(x0 - y0 * (x1 - x0) / (y1 - y0))


def new_figure(width: float, height: float) -> Figure:
    figure = Figure(figsize=(width, height), dpi=110, layout="constrained")
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


def draw_error(found: dict[float, list[float]], path: Path) -> None:
    """Error against p for fixed bin widths, and the law."""
    figure = new_figure(6.6, 4.2)
    ax = figure.subplots()
    for width, values in found.items():
        nodes = range(plan.MIN_NODES, plan.MIN_NODES + len(values))
        law = [plan.interpolation_error(p, width) for p in nodes]
        ax.plot(nodes, law, color=WIDTHS[width], linewidth=1.2, linestyle="--")
        ax.plot(nodes, values, "o", color=WIDTHS[width], markersize=5, label=f"h = {width:g} tau")
    ax.plot([], [], color=GREY, linestyle="--",
            label=rf"law {plan.INTERPOLATION_CONSTANT:g} $\rho^{{-p}}$")  # fmt: skip
    ax.set_yscale("log")
    ax.set_ylim(3e-17, 3)
    ax.set_xticks(nodes)
    tidy(ax, "nodes per bin, p", "largest relative error of a soft rank")
    ax.legend(fontsize=9, frameon=False, loc="lower left")
    figure.savefig(path)


def draw_time(points: Sequence[Timed], path: Path) -> None:
    """Dense and grid against M; filled where the plan would take them."""
    figure = new_figure(6.6, 4.2)
    ax = figure.subplots()
    for rate, style in RATES.items():
        line = [t for t in points if t.rate == rate]
        for method, colour in (("dense", ORANGE), ("grid", BLUE)):
            part = [(t.rows, 1e3 * s, t.chosen) for t in line if (s := getattr(t, method))]
            label = f"{method}, {100 * rate:g} % positives"
            x, y = zip(*((rows, ms) for rows, ms, _ in part), strict=True)
            ax.plot(x, y, color=colour, linestyle=style, linewidth=1.6, label=label)
            for rows, ms, chosen in part:
                face = colour if chosen == method else "white"
                ax.plot(rows, ms, "o", color=colour, markersize=4.5, mfc=face)
        if (x0 := crossing(line)) is not None:
            y0 = 10 ** statistics.fmean(map(math.log10, _around(line, x0)))
            ax.plot(x0, y0, "D", color=INK, markersize=7, mfc="none", mew=1.5, zorder=5)
    ax.plot([], [], "D", color=INK, mfc="none", mew=1.5, label="measured crossing")
    ax.plot([], [], "o", color=GREY, markersize=4.5, label="filled: the plan's choice")
    ax.set_xscale("log")
    ax.set_yscale("log")
    milliseconds(ax)
    tidy(ax, "rows in the list, M", "value and gradient, ms")
    ax.legend(fontsize=8.5, frameon=False, loc="upper left")
    figure.savefig(path)


def _around(line: Sequence[Timed], rows: float) -> list[float]:
    """Milliseconds of the points nearest to a number of rows."""
    near = sorted(line, key=lambda t: abs(math.log(t.rows / rows)))[:2]
    return [1e3 * t.grid for t in near]


def draw_speed(measured: Report, path: Path) -> None:
    """Time against M of all contenders of the suite `benchmarks.ranks`, one panel per rate."""
    figure = new_figure(9.6, 4.4)
    panels = figure.subplots(1, 2, sharey=True)
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
            note = entries[-1]["ratio"]
            if name == PEER and note is not None:
                ax.annotate(f"{note:,.0f} x", (x[-1], y[-1]), xytext=(6, 0), color=ORANGE,
                            textcoords="offset points", va="center", fontsize=9)  # fmt: skip
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
    torch.set_num_threads(1)
    found = {width: errors(width, 6 if args.quick else plan.MAX_NODES) for width in WIDTHS}
    draw_error(found, args.out / "error.png")
    rows = TIME_ROWS[::7] if args.quick else TIME_ROWS
    points = [times(m, rate, 3 if args.quick else harness.MIN_REPEATS)
              for rate in RATES for m in rows]  # fmt: skip
    draw_time(points, args.out / "time.png")
    record = {
        "error": found, "time": [t._asdict() for t in points],
        "crossings": {rate: crossing([t for t in points if t.rate == rate]) for rate in RATES},
        "machine": report.machine(1), "versions": report.versions(),
    }  # fmt: skip
    json.dump(record, sys.stdout, indent=1)
    print()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
