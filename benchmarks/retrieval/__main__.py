"""Runs the benchmark, or draws what was run.

``python -m benchmarks.retrieval --data FOLDER`` (npz files with x and y) writes
``results/retrieval.json`` after every split, and its plot. A file of the same protocol is gone on
with, so that the run may be stopped, also by ``--minutes``; arms that have changed run anew.
``--report`` writes plot and page from that file, ``--quick`` runs all of it on a few made rows.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from .. import harness, report
from . import page
from .arms import FULL, NCA_ROWS, NCA_STEPS, QUICK, arms, run, step_times
from .data import SHARES, Cell, Rows, load, made, split

OUT = report.ROOT / report.RESULTS / "retrieval.json"
PEERS = ("pytorch_metric_learning", "sklearn")
# Splits of each cell, in the order in which they are run.
MAIN = {Cell(0.0, None): 10, Cell(0.2, None): 10}
MORE = {Cell(0.1, None): 4, Cell(0.4, None): 4, Cell(0.0, 20): 4, Cell(0.0, 5): 4}


def order(data: Sequence[str]) -> Iterator[tuple[Cell, str, int]]:
    """Split by split, so that a run that is stopped has all data sets alike."""
    for cells in (MAIN, MORE):
        for seed in range(max(cells.values())):
            for cell, count in cells.items():
                if seed < count:
                    yield from ((cell, name, seed) for name in data)


def protocol(data: dict[str, Rows], quick: bool) -> dict[str, Any]:
    effort = QUICK if quick else FULL
    return {
        "classes": "training / validation / test: {} / {} / {}".format(*SHARES),
        "selected_by": "mean average precision of the validation classes",
        "unit": "a split of the classes",
        "effort": effort._asdict(),
        "nca": {"rows": NCA_ROWS, "steps": NCA_STEPS},
        "arms": {name: arm.record() for name, arm in arms().items()},
        "cells": {cell.name: count for cells in (MAIN, MORE) for cell, count in cells.items()},
        "data": {
            name: {"rows": len(rows.y), "classes": len({*rows.y.tolist()})}
            for name, rows in data.items()
        },
    }  # fmt: skip


def begun(path: Path | None, wanted: dict[str, Any]) -> dict[str, Any]:
    """What the file holds of this protocol, without arms that have changed."""
    if path is None or not path.exists():
        return {}
    written: dict[str, Any] = json.loads(path.read_text())
    before, now = written["protocol"], wanted["arms"]
    if any(before.get(key) != wanted[key] for key in wanted if key != "arms"):
        raise SystemExit(f"{path.name} is of another protocol: move it away to start anew")
    for cells in written["results"].values():
        for cell in cells.values():
            for seed, found in cell.items():
                cell[seed] = {a: r for a, r in found.items() if before["arms"][a] == now.get(a)}
    return written


def publish(written: dict[str, Any], out: Path | None) -> None:
    """Print, and write the plot and the page."""
    print(page.block(written))
    if out is not None:
        page.draw(written, out.with_suffix(".png"))
    if out == OUT:
        page.PAGE.write_text(page.insert(page.PAGE.read_text(), written))


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.retrieval", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--data", type=Path, help="a folder of .npz files with x and y")
    parser.add_argument(
        "--minutes", type=float, help="stop after the split that passes so many CPU minutes"
    )
    parser.add_argument("--quick", action="store_true", help="a few made rows, to see it work")
    parser.add_argument(
        "--report", action="store_true", help="plot and page from the file, run nothing"
    )
    parser.add_argument("--out", type=Path, help="JSON file; without it, --quick writes none")
    args = parser.parse_args(argv)
    out = args.out or (None if args.quick else OUT)
    if args.report:
        publish(json.loads((out or OUT).read_text()), out)
        return 0
    versions = {package: harness.peer(package)[1] for package in PEERS}
    for package, version in versions.items():
        if version is None:
            raise SystemExit(f'{package} is missing: pip install -e ".[bench]"')
    if args.data is None and not args.quick:
        parser.error("--data FOLDER is needed, except with --quick")
    torch.set_num_threads(1)
    started = time.process_time()
    data = made() if args.quick else load(args.data)
    wanted = json.loads(json.dumps(protocol(data, args.quick)))
    before = begun(out, wanted)
    written = report.heading("retrieval", __doc__.splitlines()[0], versions) | {
        "quick": args.quick, "protocol": wanted,
        "step_ms": before.get("step_ms") or step_times(3 if args.quick else 15),
        "results": before.get("results", {}),
        "earlier_commits": [*before.get("earlier_commits", []), before["commit"]] if before else [],
        "cpu_s": before.get("cpu_s", 0.0),
    }  # fmt: skip
    for cell, name, seed in order(list(data)):
        found = written["results"].setdefault(name, {}).setdefault(cell.name, {})
        known = found.get(str(seed), {})
        if {*known} == {*wanted["arms"]} or (args.quick and seed > 1):
            continue
        begin = time.process_time()
        parts = split(data[name], cell, seed)
        found[str(seed)] = run(parts, QUICK if args.quick else FULL, known)
        written["cpu_s"] = round(written["cpu_s"] + time.process_time() - begin, 1)
        if out is not None:
            report.write(written, out)
        print(f"{name}, {cell.name}, split {seed}: {written['cpu_s']:.0f} CPU s", file=sys.stderr)
        if args.minutes is not None and time.process_time() - started > 60 * args.minutes:
            break
    if out is not None:
        report.write(written, out)
    publish(written, out)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
