"""Virtual screening: which loss puts actives of new scaffolds at the top?

``python -m benchmarks.screening --data FILE.npz`` reads a screen (bits [molecules, bytes] packed, y
in {0, 1}, scaffold [molecules]), trains and tests on splits of the scaffolds, and writes
``results/screening.json`` after every piece, its plot and the page. A file of the same protocol is
gone on with. ``--report`` writes plot and page from the file, ``--quick`` runs all of it on a few
made molecules.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import sklearn
import torch

from .. import report
from ..linear_ranker_tables import Screen, read_screen
from . import page
from .arms import CONTROL, FIELDS, LOGISTIC, MODES, TOP, Cs, Field, arm_of, arms, quick, run
from .data import SHARES, made, split
from .metrics import ALPHA, METRICS

OUT = report.ROOT / report.RESULTS / "screening.json"


def protocol(screen: Screen, fields: dict[str, Field], splits: int) -> dict[str, Any]:
    """All that was decided before the run."""
    tried = {
        model: {
            mode: {name: arm_of(name, model, mode, 1.0, field).configurations()
                   for name in arms(mode)}
            for mode in MODES
        } for model, field in fields.items()
    }  # fmt: skip
    return {
        "molecules": len(screen.scaffold), "actives": int(screen.rows.y.sum()),
        "scaffolds": len({*screen.scaffold.tolist()}), "splits": splits,
        "shares": SHARES, "selected_by": "validation average precision, the start included",
        "metrics": METRICS, "alpha": ALPHA, "top": TOP, "control": CONTROL, LOGISTIC: Cs,
        "budgets": {
            model: {mode: budget._asdict() for mode, budget in field.budget.items()}
            for model, field in fields.items()
        },
        "configurations": tried,
        "configurations_per_split": len(Cs) + sum(
            len(one) for of in tried.values() for mode in of.values() for one in mode.values()
        ),
    }  # fmt: skip


def publish(written: dict[str, Any], out: Path | None) -> None:
    """Print, and write the plot and the page."""
    print(page.block(written))
    if out is not None:
        page.draw(written, out.with_suffix(".png"))
    if out == OUT:
        page.PAGE.write_text(report.replaced(page.PAGE.read_text(), page.block(written)))


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.screening", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--data", type=Path, help="an .npz file with bits, y and scaffold")
    parser.add_argument("--splits", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="a few made molecules")
    parser.add_argument("--report", action="store_true", help="plot and page from the file")
    parser.add_argument("--out", type=Path, help="JSON file; without it, --quick writes none")
    args = parser.parse_args(argv)
    out = args.out or (None if args.quick else OUT)
    if args.report:
        publish(json.loads((out or OUT).read_text()), out)
        return 0
    if args.data is None and not args.quick:
        parser.error("--data FILE.npz is needed, except with --quick")
    if args.splits < 2:
        parser.error("--splits must be at least 2, for an interval")
    torch.set_num_threads(1)
    fields = {m: quick(f) for m, f in FIELDS.items()} if args.quick else FIELDS
    screen = made() if args.quick else read_screen(args.data)
    written = report.heading("screening", __doc__.splitlines()[0], {"sklearn": sklearn.__version__})
    written |= {
        "quick": args.quick,
        "protocol": json.loads(json.dumps(protocol(screen, fields, args.splits))),
        "results": {}, "cpu_s": 0.0, "earlier_commits": [],
    }  # fmt: skip
    if out is not None and out.exists():
        before = json.loads(out.read_text())
        if before["protocol"] != written["protocol"]:
            raise SystemExit(f"{out.name} is of another protocol: move it away to start anew")
        written |= {key: before[key] for key in ("results", "cpu_s")}
        written["earlier_commits"] = [*before["earlier_commits"], before["commit"]]
    for seed in range(args.splits):
        if page.whole(written["results"].get(str(seed), {}), written["protocol"]):
            continue
        found = written["results"][str(seed)] = {}
        begin, so_far = time.process_time(), written["cpu_s"]
        for model, mode, of_arms in run(split(screen, seed), seed, fields):
            found.setdefault(model, {})[mode] = of_arms
            written["cpu_s"] = round(so_far + time.process_time() - begin, 1)
            if out is not None:
                report.write(written, out)
            print(f"split {seed}, {model}, {mode}: {written['cpu_s']:.0f} CPU s", file=sys.stderr)
    publish(written, out)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
