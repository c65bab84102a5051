"""Draws the figures of the ranks.

``python -m benchmarks.rank_figures`` measures and writes ``error.png`` and ``time.png`` beside the
code of the ranks; ``python -m benchmarks.ranks --plot`` draws its own results with `draw_speed`.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from proxy_losses import sigmoid_sums, smooth_ap, soft_ranks

from . import report
from .figures import BLUE, GREEN, GREY, INK, ORANGE, milliseconds, new_figure, tidy
from .harness import OURS
from .report import Report
from .smooth_ap import PEER, TAU, make_list, value_and_grad

FOLDER = report.ROOT / "proxy_losses" / "_ranks"
RATES = {0.005: "-", 0.05: (0, (4, 1.5))}
RTOLS = tuple(10.0 ** -(k / 2) for k in range(4, 27))
SINGLE = 32  # rows that are the only source of a list
TIME_ROWS = tuple(round(1000 * 2 ** (k / 2)) for k in range(-2, 13))
MOST_PAIRS = 1 << 26  # the dense method is left out above


class Errors(NamedTuple):
    """Largest errors of the grid at one rtol, against float64 brute force."""

    rtol: float
    pair: float  # of the sigmoid of a single pair, relative to 1/2 more than it
    rank: float  # of a soft rank, relative to it


class Timed(NamedTuple):
    """Milliseconds of soft ranks and their gradient by either method, and of Smooth-AP."""

    rows: int
    rate: float
    dense: float | None
    grid: float
    smooth_ap: float


def precision(scores: Tensor, pos: Tensor, tau: float, **how: Any) -> Tensor:
    """Smooth-AP from soft ranks, by a method of one's choice."""
    rank, rank_pos = soft_ranks(scores, pos, tau, **how)[:2]
    return (rank_pos / rank)[pos].mean()


def errors(rtols: Sequence[float] = RTOLS, rows: int = 3000) -> list[Errors]:
    """Of single sources and of ranks, on a wide list; tau is 1."""
    gen = torch.Generator().manual_seed(0)
    scores = 12.0 * torch.randn(rows, generator=gen, dtype=torch.float64)
    every = torch.ones(rows, dtype=torch.bool)
    single = torch.eye(rows, dtype=torch.float64)[:SINGLE]
    pairs = torch.sigmoid(scores[:, None] - scores)  # [source, target]
    rank, pairs = pairs.sum(0) + 0.5, pairs[:SINGLE]
    found = []
    for rtol in rtols:
        how: dict[str, Any] = {"rtol": rtol, "method": "grid"}
        sums = sigmoid_sums(scores, single, every, 1.0, **how)
        ranks = soft_ranks(scores, every, 1.0, **how)[0]
        pair = ((sums - pairs).abs() / (0.5 + pairs)).max().item()
        found.append(Errors(rtol, pair, ((ranks - rank).abs() / rank).max().item()))
    return found


def cpu_ms(run: Callable[[], object], repeats: int) -> float:
    """Best of several runs."""
    run()
    best = math.inf
    for _ in range(repeats):
        begin = time.thread_time()
        run()
        best = min(best, time.thread_time() - begin)
    return 1e3 * best


def times(rows: int, rate: float, repeats: int) -> Timed:
    """CPU time of value and gradient."""
    scores, pos = make_list(rows, rate)

    def ms(metric: Callable[[Tensor, Tensor], Tensor]) -> float:
        return cpu_ms(partial(value_and_grad, metric, scores, pos), repeats)

    few = int(pos.sum()) * rows <= MOST_PAIRS
    dense = ms(partial(precision, tau=TAU, method="dense")) if few else None
    grid = ms(partial(precision, tau=TAU, method="grid"))
    return Timed(rows, rate, dense, grid, ms(partial(smooth_ap, tau=TAU)))


def draw_error(found: Sequence[Errors], path: Path) -> None:
    """What is reached against what is asked for."""
    figure = new_figure(6.6, 4.4)
    ax = figure.subplots()
    rtols = [e.rtol for e in found]
    ax.plot(rtols, rtols, color=GREY, linestyle="--", label="what is asked for")
    ax.plot(rtols, [e.pair for e in found], "o", color=ORANGE, label="one pair, of 1/2 more")
    ax.plot(rtols, [e.rank for e in found], "_", color=BLUE, markersize=9, label="soft rank, of it")
    ax.set_xscale("log")
    ax.set_yscale("log")
    ax.invert_xaxis()
    tidy(ax, "rtol", "largest relative error")
    ax.legend(fontsize=8.5, frameon=False, loc="lower left")
    figure.savefig(path)


def draw_time(points: Sequence[Timed], path: Path) -> None:
    """Dense, grid and Smooth-AP, which chooses, against M."""
    figure = new_figure(6.6, 4.4)
    ax = figure.subplots()
    kinds = (("dense", ORANGE, "dense soft_ranks"), ("grid", BLUE, "grid soft_ranks"),
             ("smooth_ap", GREEN, "smooth_ap"))  # fmt: skip
    for rate, style in RATES.items():
        line = [t for t in points if t.rate == rate]
        for kind, colour, name in kinds:
            part = [(t.rows, ms) for t in line if (ms := getattr(t, kind))]
            x, y = zip(*part, strict=True)
            label = f"{name}, {100 * rate:g} % positives"
            ax.plot(x, y, "o", color=colour, linestyle=style, lw=1.5, markersize=3.5, label=label)
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
    found = errors(RTOLS[::8], 600) if args.quick else errors()
    draw_error(found, args.out / "error.png")
    rows = TIME_ROWS[::7] if args.quick else TIME_ROWS
    points = [times(m, rate, 3 if args.quick else 9) for rate in RATES for m in rows]
    draw_time(points, args.out / "time.png")
    record = {
        "errors": [e._asdict() for e in found],
        "times": [t._asdict() for t in points],
        "machine": report.machine(1), "versions": report.versions(),
    }  # fmt: skip
    json.dump(record, sys.stdout, indent=1)
    print()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
