"""Measures the constants of ``proxy_losses/_ranks/plan.py`` on this machine and prints JSON.

``python -m benchmarks.plan_constants [--quick]``

Times are CPU time of one thread, the best of several runs, in nanoseconds. The constants in the
plan are rounded by hand from a run of this script; they steer a choice and need no more digits
than that.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from proxy_losses import _ranks
from proxy_losses._ranks import bins, cells, plan
from proxy_losses._ranks.cells import Rows
from proxy_losses._ranks.exact import add_exact_pairs
from proxy_losses._ranks.layout import Ranges, cell_axis, direct_layout

from . import report
from .ranks import student_list
from .smooth_ap import make_list

RTOL = 1e-6
CPU = torch.device("cpu")
SOURCES = [Rows(None, (0,), ())]  # all rows give to one group


def nanoseconds(run: Callable[[], object], repeats: int = 15) -> float:
    """Best of several runs."""
    run()
    best = float("inf")
    for _ in range(repeats):
        begin = time.thread_time()
        run()
        best = min(best, time.thread_time() - begin)
    return 1e9 * best


def precision_and_gradient(method: str, rows: int, rate: float) -> Callable[[], object]:
    """What `smooth_ap` runs, operators and autograd included."""
    scores, pos = make_list(rows, rate)
    scores.requires_grad_()

    def run() -> None:
        mean, _ = _ranks.mean_precision(scores, pos, None, 1.0, rtol=RTOL, method=method)
        torch.autograd.grad(mean, scores)

    return run


def dense(rows: int) -> tuple[float, float]:
    """Per call, and per pair of a row and a positive."""
    sizes, rate = (250, rows), 0.01
    small, large = (nanoseconds(precision_and_gradient("dense", m, rate)) for m in sizes)
    few, many = (round(rate * m) * m for m in sizes)
    pair = (large - small) / (many - few)
    return small - pair * few, pair


def sums_on_grid(scores: Tensor, pos: Tensor, tau: float) -> Callable[[], object]:
    """The ranks without a gradient."""
    groups = torch.stack([torch.ones_like(pos), pos])
    how = {"rtol": RTOL, "method": "grid"}
    return lambda: _ranks.sigmoid_sums(scores, groups, pos, tau, **how)


def calls() -> tuple[float, float]:
    """Per call of the sums, and of mean precision with its gradient, on the grid: few rows."""
    sums = sums_on_grid(*make_list(256, 0.1), 1.0)
    return nanoseconds(sums, 30), nanoseconds(precision_and_gradient("grid", 256, 0.1), 30)


def visits(rows: int) -> tuple[float, float]:
    """Per row, and per row and node: a pass of moments for two numbers of nodes."""
    scores, weights = torch.randn(1, rows), torch.ones(1, 1, rows)
    ranges = Ranges([float(scores.min())], [float(scores.max())], [0.0], [1.0])
    cost = {}
    for nodes in (4, 12):
        chosen = plan.Plan("grid", nodes, 40, 40.0, 1.0, 0.0, 0.0)
        layout = direct_layout(ranges, chosen, CPU)
        run = partial(bins.moments_of, layout, scores, weights, SOURCES)
        cost[nodes] = nanoseconds(run) / rows
    node = (cost[12] - cost[4]) / 8
    return cost[4] - 4 * node, node


def lookup(rows: int) -> float:
    """Per row: finding its cell in a table and counting it there."""
    scores = torch.randn(1, rows)
    ranges = Ranges([float(scores.min())], [float(scores.max())], [0.0], [1e-4])
    axis = cell_axis(ranges, 25.0, CPU)
    return nanoseconds(lambda: cells.survey(scores, SOURCES, axis, 1 << 22, 8)) / rows


def products(count: int) -> tuple[float, float]:
    """Per multiply-add between cells, and per entry of a kernel block."""
    nodes, per_cell = 8, 16
    ranges = Ranges([0.0], [count * per_cell - 0.5], [0.0], [1.0])
    chosen = plan.Plan("grid", nodes, per_cell, float(per_cell), 1.0, 0.0, 0.0)
    layout = direct_layout(ranges, chosen, CPU)
    moments = bins.moments_of(layout, torch.rand(1, 64), torch.ones(1, 1, 64), SOURCES)
    product = nanoseconds(lambda: bins.products(layout, moments, ["value"]))
    kernel = nanoseconds(lambda: bins._kernel.__wrapped__(4, 100, 1.0, True, "value"))
    return product / (3 * (nodes * per_cell) ** 2 * count), kernel / (3 * 400**2)


def exact_pairs(rows: int) -> tuple[float, float]:
    """Per pair of sparse cells and two kernels, and per row that takes part."""
    weights, at = torch.ones(1, 1, rows), torch.ones(1, 1, rows, dtype=torch.bool)
    tau, parts = torch.ones(1, dtype=torch.float64), [Rows(None, (0,), (0,))]
    outs = [(kind, torch.zeros(1, 1, rows)) for kind in ("value", "slope")]
    order, cost, pairs = torch.randperm(rows), [], []
    for gap in (4.0, 1.0):
        scores = (torch.arange(rows) * gap)[order][None]
        ranges = Ranges([0.0], [rows * gap], [0.0], [1.0])
        axis = cell_axis(ranges, 20.0, CPU)
        found, census = cells.survey(scores, parts, axis, 1 << 22, 64)
        pairs.append(census.pairs)
        run = partial(add_exact_pairs, outs, scores, weights, at, tau, parts, found)
        cost.append(nanoseconds(run))
    pair = (cost[1] - cost[0]) / (pairs[1] - pairs[0])
    return pair, (cost[0] - pair * pairs[0]) / rows


def scattered_row(rows: int) -> float:
    """Per row of heavy tails on a long axis, beyond what its crowded middle costs."""
    scores, pos = student_list(rows, 0.05)
    tau = 0.001
    work = plan.Work(1, rows, rows, int(pos.sum()), 2, 1)
    span = float(scores.max() - scores.min()) / tau
    few = plan.grid_plan(work, span, RTOL, cells=plan.DIRECT_CELLS, looked_up=True)
    return (nanoseconds(sums_on_grid(scores, pos, tau)) - few.cost) / rows


def constants(scale: int) -> dict[str, float]:
    """Every constant of the plan that is a time."""
    found: dict[str, float] = {}
    found["NS_DENSE_CALL"], found["NS_DENSE_PAIR"] = dense(16_000 // scale)
    found["NS_GRID_CALL"], found["NS_FUSED_CALL"] = calls()
    found["NS_ROW"], found["NS_ROW_NODE"] = visits((1 << 20) // scale)
    found["NS_LOOKUP"] = lookup((1 << 20) // scale)
    found["NS_MAC"], found["NS_KERNEL"] = products(512 // scale)
    found["NS_EXACT_PAIR"], found["NS_EXACT_ROW"] = exact_pairs((1 << 15) // scale)
    found["NS_SCATTERED_ROW"] = scattered_row(200_000 // scale)
    return found


def main(argv: Sequence[str] | None = None) -> int:
    options = argparse.ArgumentParser(prog="python -m benchmarks.plan_constants")
    options.add_argument("--quick", action="store_true", help="small sizes, to see that it works")
    quick = options.parse_args(argv).quick
    torch.set_num_threads(1)
    torch.manual_seed(0)
    commit, dirty = report.checkout()
    found = {
        "measured": {name: float(f"{x:.3g}") for name, x in constants(8 if quick else 1).items()},
        "in use": {name: x for name, x in vars(plan).items() if name.startswith("NS_")},
        "quick": quick, "commit": commit, "dirty": dirty, "date": report.now(),
        "versions": report.versions(), "machine": report.machine(1),
    }  # fmt: skip
    print(json.dumps(found, indent=1))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
