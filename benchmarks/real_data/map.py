"""Where Smooth-AP beats more BCE: training rows against capacity, over real tables.

``python -m benchmarks.real_data.map --data FOLDER`` trains, for every cell and table, a model with
BCE to its best validated checkpoint, and from there as many steps with BCE and with Smooth-AP of
the whole training set, both with the same rates to choose from by validation AP. A cell shows the
test AP of the latter less that of the former. It writes ``benchmarks/results/real_data_map.json``
and ``.png``, and ``MAP.md`` beside this file.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .. import report
from . import made, map_page, stacked
from .data import Table, load, split, stack
from .stacked import EFFORT, Capacity, arms
from .stats import overall
from .train import Effort

SIZES: dict[str, int | None] = {"1k": 1000, "4k": 4000, "16k": 16000, "all": None}
CAPACITIES = (
    Capacity("linear, 3 features", features=3),
    Capacity("linear, 5", features=5),
    Capacity("linear, 10", features=10),
    Capacity("linear, all"),
    Capacity("4 hidden", hidden=4),
    Capacity("16 hidden", hidden=16),
    Capacity("64 hidden", hidden=64),
)
MOST_ROWS = 40_000  # "all" is no more than this
LEAST_POSITIVES = 20  # in the training rows, or the table is not in the cell
LEAST_TABLES = 3  # or the cell is empty
COMMONEST = 0.1  # share of positives of a table that is used


def rows_of(table: Table, size: int | None) -> int | None:
    """Training rows of a table in a row of the map; None where it has too few."""
    train = split(table, 0).train
    have = min(len(train), MOST_ROWS)
    rows = have if size is None else size
    if rows > have or round(rows * table.y[train].mean()) < LEAST_POSITIVES:
        return None
    return rows


def summary(differences: dict[str, Sequence[float]]) -> dict[str, Any]:
    """Over tables of the mean over seeds; AP x 100."""
    found = overall([float(np.mean(d)) for d in differences.values()])
    return {
        "tables": len(differences), "mean": found.mean, "se": found.error, "t95": found.half,
        "up": found.up, "down": found.down,
    }  # fmt: skip


def cells(found: dict[str, Any]) -> dict[str, Any]:
    """Size -> capacity -> summary, None where too few tables took part."""
    return {
        size: {
            c.name: None if len(found[size].get(c.name, {})) < LEAST_TABLES else {
                control: summary({
                    name: 100 * (np.array(ap["smooth_ap"]) - np.array(ap[control]))
                    for name, ap in found[size][c.name].items()
                }) for control in ("continued", "start")
            } for c in CAPACITIES
        } for size in found
    }  # fmt: skip


def run(
    tables: Sequence[Table], seeds: Sequence[int], effort: Effort, keep: Any = lambda found: None
) -> dict[str, Any]:
    """Size -> capacity -> table -> arm -> test AP [seeds]."""
    found: dict[str, Any] = {size: {} for size in SIZES}
    for table in tables:
        for size, count in SIZES.items():
            rows = rows_of(table, count)
            if rows is None:
                continue
            parts = stack(table, seeds, rows)
            for capacity in CAPACITIES:
                if (capacity.features or 0) > table.x.shape[1]:
                    continue
                begin = time.process_time()
                ap = arms(parts, capacity, effort)
                row = found[size].setdefault(capacity.name, {})
                row[table.name] = {name: values.tolist() for name, values in ap.items()} | {
                    "rows": parts.train.x.shape[1],
                    "positives": int(parts.train.y[0].sum()),
                    "cpu_s": round(time.process_time() - begin, 1),
                }
                gain = 100 * (ap["smooth_ap"] - ap["continued"]).mean()
                print(f"{table.name}, {size}, {capacity.name}: {gain:+.2f}, "
                      f"{time.process_time():.0f} s", file=sys.stderr, flush=True)  # fmt: skip
            keep(found)
    return found


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True, help='a folder of npz files, or "openml"')
    parser.add_argument("--seeds", type=int, default=5, help="splits of each table")
    parser.add_argument("--out", type=Path, default=report.ROOT / report.RESULTS)
    parser.add_argument("--page", type=Path, default=Path(__file__).parent / "MAP.md")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    tables = [t for t in load(args.data) if t.y.mean() <= COMMONEST]
    seeds = range(args.seeds)
    written = report.heading("real_data_map", __doc__.splitlines()[0]) | {
        "protocol": {
            "seeds": args.seeds, "most_rows": MOST_ROWS,
            "least_positives": LEAST_POSITIVES, "least_tables": LEAST_TABLES,
            "budget": EFFORT.more._asdict() | {"base": EFFORT.base._asdict()} | {
                name.lower(): getattr(stacked, name) for name in stacked.SETTINGS
            },
        },
        "tables": {
            t.name: {"rows": len(t.y), "features": t.x.shape[1], "positives": int(t.y.sum())}
            for t in tables
        },
    }  # fmt: skip
    path = args.out / "real_data_map.json"

    def keep(found: dict[str, Any]) -> None:
        report.write(written | {"found": found}, path)

    written["made"] = made.run(seeds, EFFORT)
    written["found"] = run(tables, seeds, EFFORT, keep)
    written["cells"] = cells(written["found"])
    written["cpu_s"] = round(time.process_time(), 1)
    report.write(written, path)
    map_page.draw(written, args.out / "real_data_map.png")
    args.page.write_text(map_page.text(written))
    print(args.page.read_text())
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
