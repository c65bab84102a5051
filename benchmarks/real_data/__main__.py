"""Runs the benchmark, or rewrites its page.

``python -m benchmarks.real_data --data FOLDER`` (npz files with X and y) or ``--data openml``
trains, prints and writes ``results/real_data.json``, its plot and the page; ``--report`` writes
plot and page from that file again.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from .. import harness, report
from . import boosting, timing
from .arms import ARMS, BASE, CONTROL, OURS, SCALE, Arm, missing
from .data import CLIP, SHARES, Stack, Table, load, stack
from .losses import QUEUE
from .models import WIDTHS, initial
from .train import ENRICHED, METRICS, Budget, Fitted, choose, fit, metrics_of, part_scores

OUT = report.ROOT / report.RESULTS / "real_data.json"
QUICK = Budget(6, 4, 2, 64, 1000, 4, 2)


def run_models(
    stacked: Stack,
    arms: Sequence[Arm],
    seeds: Sequence[int],
    budget: Budget,
    tick: Callable[..., Any],
) -> dict[str, Any]:
    """Model -> arm -> every seed's metrics on test, and what was tried and chosen."""
    found: dict[str, Any] = {}
    for model in WIDTHS:
        found[model] = {}
        start = initial(model, stacked.train.x.shape[2], seeds)
        for arm in (BASE, *arms):
            began = time.process_time()
            fitted = fit(stacked, arm, model, start, seeds, budget, tick)
            chosen, weights = choose(fitted)
            test = part_scores([w[:, None] for w in weights], stacked.test)[:, 0]
            runs = metrics_of(test, stacked.test.y)
            found[model][arm.name] = {
                **{m: [round(run[m], 5) for run in runs] for m in METRICS},
                **_tried(fitted, chosen),
                "cpu_s": round(time.process_time() - began, 1),
            }
            if arm is BASE:
                start = weights
    return found


def _tried(fitted: Fitted, chosen: torch.Tensor) -> dict[str, Any]:
    picked = fitted.step.gather(1, chosen[:, None])[:, 0]
    tried = [[round(ap, 5) for ap in row] for row in fitted.ap.tolist()]
    return {"chosen": chosen.tolist(), "step": picked.tolist(), "tried": tried}


def describe(table: Table, stacked: Stack) -> dict[str, Any]:
    """What the table holds, and how much of it was used."""
    copies = np.bincount(table.group)[table.group]
    return {
        "source": table.source, "rows": len(table.y), "features": table.x.shape[1],
        "positives": int(table.y.sum()), "rows_with_a_copy": int((copies > 1).sum()),
        "used": {
            name: {"rows": p.y.shape[1], "positives": round(p.y.sum().item() / len(p.y))}
            for name, p in stacked._asdict().items()
        },
    }  # fmt: skip


def protocol(
    arms: Sequence[Arm], tables: int, seeds: Sequence[int], budget: Budget
) -> dict[str, Any]:
    tried = {
        model: {arm.name: arm.configurations(model) for arm in (BASE, *arms)} for model in WIDTHS
    }
    per_table = sum(len(c) for of_model in tried.values() for c in of_model.values())
    per_table += len(boosting.CONFIGURATIONS)
    return {
        "models": WIDTHS, "rate_scale": SCALE, "budget": budget._asdict(), "seeds": [*seeds],
        "shares": SHARES, "clip": CLIP, "queue": QUEUE, "enriched": ENRICHED,
        "metrics": METRICS, "selected_by": "validation AP, the start of training included",
        "configurations": {**tried, boosting.NAME: list(boosting.CONFIGURATIONS)},
        "configurations_per_table": per_table,
        "configurations_tried": per_table * tables,
        "models_trained": per_table * tables * len(seeds),
    }  # fmt: skip


def run(args: argparse.Namespace, out: Path | None) -> dict[str, Any]:
    """Train all, table by table, smallest first; the file is written after each."""
    tables = sorted(load(args.data), key=lambda table: table.x.size)
    budget, seeds = (QUICK if args.quick else Budget()), range(args.seeds)
    absent = {arm.name: reason for arm in ARMS if (reason := missing(arm))}
    arms = [arm for arm in ARMS if arm.name not in absent]
    for name, reason in absent.items():
        print(f"left out: {name}: {reason}", file=sys.stderr)
    commit, dirty = report.checkout()
    peers = {p: harness.peer(p)[1] for p in ("sklearn", "imbalanced_losses", "libauc")}
    written: dict[str, Any] = {
        "suite": "real_data", "about": "ranking losses against BCE on real imbalanced tables",
        "quick": args.quick, "complete": False, "date": report.now(), "commit": commit,
        "dirty": dirty, "versions": report.versions() | peers, "machine": report.machine(1),
        "base": BASE.name, "control": CONTROL.name, "boosting": boosting.NAME,
        "ours": [arm.name for arm in OURS], "absent": absent,
        "protocol": protocol(arms, len(tables), seeds, budget),
        "tables": {}, "results": {}, "epochs": {},
    }  # fmt: skip
    steps = len(WIDTHS) * (budget.base_steps + len(arms) * budget.steps)
    trees = len(seeds) * len(boosting.CONFIGURATIONS)
    began, wall = time.process_time(), time.monotonic()
    with tqdm(total=len(tables) * (steps + trees), unit="step", mininterval=5) as bar:
        for table in tables:
            bar.set_description(table.name)
            stacked = stack(table, seeds, budget.most_train_rows)
            written["tables"][table.name] = describe(table, stacked)
            found = run_models(stacked, arms, seeds, budget, bar.update)
            boosted = boosting.fit(stacked, seeds, budget, bar.update)
            written["results"][table.name] = found | {boosting.NAME: {boosting.NAME: boosted}}
            written["cpu_s"] = round(time.process_time() - began)
            written["wall_s"] = round(time.monotonic() - wall)
            _write(written, out)
    repeats = 3 if args.quick else harness.MIN_REPEATS
    for model in WIDTHS:
        written["epochs"][model] = timing.epochs(stacked, (BASE, *arms[1:]), model, budget, repeats)
    written["epochs_table"] = table.name
    written["complete"] = True
    _write(written, out)
    return written


def _write(written: dict[str, Any], out: Path | None) -> None:
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(written, indent=None, separators=(", ", ": ")) + "\n")


def main(argv: Sequence[str] | None = None) -> int:
    options = argparse.ArgumentParser(prog="python -m benchmarks.real_data")
    options.add_argument("--data", help='a folder of npz files with X and y, or "openml"')
    options.add_argument("--seeds", type=int, default=10)
    options.add_argument("--quick", action="store_true", help="few steps, to see that it works")
    options.add_argument("--report", action="store_true", help="page and plot again, train nothing")
    options.add_argument("--out", type=Path, help="JSON file; without it, --quick writes none")
    args = options.parse_args(argv)
    if not args.report and not args.data:
        options.error("give --data FOLDER, --data openml or --report")
    torch.set_num_threads(1)
    out = args.out or (None if args.quick else OUT)
    if not args.report:
        run(args, out)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
