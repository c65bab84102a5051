"""Runs the benchmark, or rewrites its page.

``python -m benchmarks.real_data --data FOLDER`` (npz files with X and y) or ``--data openml``
trains, prints and writes ``results/real_data.json``, its plot and the page. ``--report`` writes
plot and page from that file again, ``--times`` with the seconds per epoch measured anew. Runs on
different tables, at the same time perhaps, become one file with ``--join``. ``--later`` trains the
arms that the file lacks, and BCE and the control with them: where another machine rounds otherwise
these end elsewhere, so an arm is compared with the control of its own run.
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
from ..trainer import Arm, Budget, Fitted, missing, score_all
from . import boosting, timing
from .arms import ARMS, BASE, CONTROL, OURS, SCALE, of_model
from .data import CLIP, SHARES, Stack, Table, load, stack
from .losses import QUEUE
from .models import WIDTHS, initial
from .stats import arms_of
from .train import ENRICHED, METRICS, Effort, fit, metrics_of

OUT = report.ROOT / report.RESULTS / "real_data.json"
FULL = Effort(Budget(1600, 40, 512), Budget(240, 40, 512))
QUICK = Effort(Budget(6, 2, 64), Budget(4, 2, 64), Budget(4, 2), 1000)


def run_models(
    stacked: Stack,
    arms: Sequence[Arm],
    seeds: Sequence[int],
    effort: Effort,
    tick: Callable[..., Any],
) -> dict[str, Any]:
    """Model -> arm -> every seed's metrics on test, and what was tried and chosen."""
    found: dict[str, Any] = {}
    for model in WIDTHS:
        found[model] = {}
        start = initial(model, stacked.train.x.shape[2], seeds)
        for arm in (BASE, *arms):
            began = time.process_time()
            budget = effort.base if arm is BASE else effort.more
            fitted = fit(stacked, of_model(arm, model), start, seeds, budget, tick)
            chosen, weights = fitted.choose()
            test = score_all([w[:, None] for w in weights], stacked.test.x)[:, 0]
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
    tried = [[round(ap, 5) for ap in row] for row in fitted.value.tolist()]
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
    arms: Sequence[Arm], tables: int, seeds: Sequence[int], effort: Effort,
    boosters: Sequence[Any] = boosting.CONFIGURATIONS,
) -> dict[str, Any]:  # fmt: skip
    """All that was decided before the run."""
    tried = {
        model: {arm.name: of_model(arm, model).configurations() for arm in (BASE, *arms)}
        for model in WIDTHS
    }
    budget = effort.more._asdict() | {
        "base": effort.base._asdict(), "boosting": effort.boosting._asdict(),
        "most_train_rows": effort.most_train_rows,
    }  # fmt: skip
    per_table = sum(len(c) for of_model in tried.values() for c in of_model.values())
    per_table += len(boosters)
    made: dict[str, Any] = {
        "models": WIDTHS, "rate_scale": SCALE, "budget": budget, "seeds": [*seeds],
        "shares": SHARES, "clip": CLIP, "queue": QUEUE, "enriched": ENRICHED,
        "metrics": METRICS, "selected_by": "validation AP, the start of training included",
        "configurations": {**tried, boosting.NAME: [*boosters]},
        "configurations_per_table": per_table,
    }  # fmt: skip
    count(made, tables)
    return made


def run(args: argparse.Namespace, out: Path | None) -> dict[str, Any]:
    """Train all, table by table, smallest first; the file is written after each."""
    tables = sorted(load(args.data), key=lambda table: table.x.size)
    effort, seeds = (QUICK if args.quick else FULL), range(args.seeds)
    absent = {arm.name: reason for arm in ARMS if (reason := missing(arm))}
    arms = [arm for arm in ARMS if arm.name not in absent]
    for name, reason in absent.items():
        print(f"left out: {name}: {reason}", file=sys.stderr)
    peers = {p: harness.peer(p)[1] for p in ("sklearn", "imbalanced_losses", "libauc")}
    about = "ranking losses against BCE on real imbalanced tables"
    written = report.heading("real_data", about, peers) | {
        "quick": args.quick, "complete": False,
        "base": BASE.name, "control": CONTROL.name, "boosting": boosting.NAME,
        "ours": [arm.name for arm in OURS], "absent": absent,
        "protocol": protocol(arms, len(tables), seeds, effort),
        "tables": {}, "results": {}, "epochs": {},
    }  # fmt: skip
    steps = len(WIDTHS) * (effort.base.steps + len(arms) * effort.more.steps)
    trees = len(seeds) * len(boosting.CONFIGURATIONS)
    began, wall = time.process_time(), time.monotonic()
    with tqdm(total=len(tables) * (steps + trees), unit="step", mininterval=5) as bar:
        for table in tables:
            bar.set_description(table.name)
            stacked = stack(table, seeds, effort.most_train_rows)
            written["tables"][table.name] = describe(table, stacked)
            found = run_models(stacked, arms, seeds, effort, bar.update)
            boosted = boosting.fit(stacked, seeds, effort.boosting, bar.update)
            written["results"][table.name] = found | {boosting.NAME: {boosting.NAME: boosted}}
            written["cpu_s"] = round(time.process_time() - began)
            written["wall_s"] = round(time.monotonic() - wall)
            _write(written, out)
    written["complete"] = True
    time_epochs(written, table, args)
    _write(written, out)
    return written


def add(written: dict[str, Any], args: argparse.Namespace, out: Path | None) -> None:
    """Train the arms that the file lacks on its tables; it is written after each."""
    effort, seeds = (QUICK if args.quick else FULL), written["protocol"]["seeds"]
    known = {n for model in WIDTHS for n in arms_of(written, model)} | {CONTROL.name}
    arms = [arm for arm in ARMS if arm.name not in known and not missing(arm)]
    tables = {table.name: table for table in load(args.data) if table.name in written["results"]}
    if not arms or tables.keys() != written["results"].keys():
        raise SystemExit("expected the tables of the file, and an arm that it lacks")
    about = written["about"]
    part = report.heading("real_data", about) | {
        "protocol": protocol([CONTROL, *arms], len(tables), seeds, effort, ()), "results": {},
    }  # fmt: skip
    written["ours"] = [arm.name for arm in OURS]
    written.setdefault("later", []).append(part)
    began = time.process_time()
    for name in written["results"]:
        stacked = stack(tables[name], seeds, effort.most_train_rows)
        if describe(tables[name], stacked) != written["tables"][name]:
            raise SystemExit(f"{name} is another table than that of the file")
        part["results"][name] = run_models(
            stacked, [CONTROL, *arms], seeds, effort, lambda *_: None
        )
        part["cpu_s"] = round(time.process_time() - began)
        print(f"{name}: {part['cpu_s']} CPU s", file=sys.stderr, flush=True)
        _write(written, out)


def time_epochs(written: dict[str, Any], table: Table, args: argparse.Namespace) -> None:
    """Seconds per epoch of every arm that ran, on one table."""
    effort, repeats = (QUICK, harness.MIN_REPEATS) if args.quick else (FULL, 15)
    stacked = stack(table, [0], effort.most_train_rows)
    arms = (BASE, *(arm for arm in ARMS[1:] if arm.name not in written["absent"]))
    commit, dirty = report.checkout()
    written["epochs"] = {
        "table": table.name, "commit": commit, "dirty": dirty, "date": report.now(),
        "machine": report.machine(1), "repeats": repeats,
        "models": {m: timing.epochs(stacked, arms, m, effort.more, repeats) for m in WIDTHS},
    }  # fmt: skip


def join(files: Sequence[Path]) -> dict[str, Any]:
    """One file of several runs that differ in their tables alone; without times."""
    parts = [json.loads(path.read_text()) for path in files]
    whole: dict[str, Any] = parts[0] | {"runs": [], "tables": {}, "results": {}, "epochs": {}}
    for path, part in zip(files, parts, strict=True):
        for key in ("commit", "dirty", "versions", "absent", "quick"):
            if part[key] != whole[key]:
                raise SystemExit(f"{path.name} differs in {key}: {part[key]}, not {whole[key]}")
        if part["protocol"]["seeds"] != whole["protocol"]["seeds"]:
            raise SystemExit(f"{path.name} differs in its seeds")
        if twice := whole["results"].keys() & part["results"]:
            raise SystemExit(f"{path.name} has {', '.join(sorted(twice))} once more")
        for key in ("tables", "results"):
            whole[key] |= part[key]
        own = {key: part[key] for key in ("date", "machine", "cpu_s", "wall_s")}
        whole["runs"].append({"tables": [*part["results"]], **own})
    whole["cpu_s"] = sum(part["cpu_s"] for part in parts)
    whole["wall_s"] = max(part["wall_s"] for part in parts)
    count(whole["protocol"], len(whole["results"]))
    whole["complete"] = True
    return whole


def count(protocol: dict[str, Any], tables: int) -> None:
    """How much was tried."""
    tried = protocol["configurations_per_table"] * tables
    protocol["configurations_tried"] = tried
    protocol["models_trained"] = tried * len(protocol["seeds"])


def _write(written: dict[str, Any], out: Path | None) -> None:
    if out is not None:
        report.write(written, out, indent=None)


def publish(written: dict[str, Any], out: Path | None) -> None:
    """Print, and write the plot and the page."""
    from . import figure, page

    print(page.block(written))
    if out is not None:
        figure.draw(written, out.with_suffix(".png"))
    if out == OUT:
        page.PAGE.write_text(page.insert(page.PAGE.read_text(), written))


def main(argv: Sequence[str] | None = None) -> int:
    """The command line."""
    options = argparse.ArgumentParser(prog="python -m benchmarks.real_data")
    options.add_argument("--data", help='a folder of npz files with X and y, or "openml"')
    options.add_argument("--seeds", type=int, default=10)
    options.add_argument("--quick", action="store_true", help="few steps, to see that it works")
    options.add_argument("--report", action="store_true", help="page and plot again, train nothing")
    options.add_argument(
        "--times", action="store_true", help="measure the times again; with --data"
    )
    options.add_argument(
        "--later", action="store_true", help="add the arms that the file lacks; with --data"
    )
    options.add_argument("--join", nargs="+", type=Path, help="files of runs on different tables")
    options.add_argument("--out", type=Path, help="JSON file; without it, --quick writes none")
    args = options.parse_args(argv)
    if not (args.report or args.join or args.data):
        options.error("give --data FOLDER, --data openml, --report or --join")
    if args.seeds < 2:
        options.error("--seeds must be at least 2, for an interval")
    torch.set_num_threads(1)
    out = args.out or (None if args.quick else OUT)
    if args.join or args.report or args.times or args.later:
        written = join(args.join) if args.join else json.loads((out or OUT).read_text())
        if args.times:
            time_epochs(written, max(load(args.data), key=lambda table: table.x.size), args)
        if args.later:
            add(written, args, out)
        _write(written, out)
    else:
        written = run(args, out)
    publish(written, out)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
