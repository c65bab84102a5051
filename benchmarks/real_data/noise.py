"""Are ranking losses more robust to wrong labels? Linear models on real tables.

``python -m benchmarks.real_data.noise --data FOLDER`` (npz files with X and y) gives some training
and validation rows the other label, fits logistic regressions, and goes on from them on all rows
with BCE, Smooth-AP, or half of each; test labels stay as they are. It writes
``benchmarks/results/real_data_noise.json`` after each table and noise, and the section of
``README.md`` beside this file; ``--report`` that section alone.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import proxy_losses as pl

from .. import report
from ..trainer import Arm, Batch, Budget, Loss, Make, Part, Setup, Training, score_all
from .data import Stack, Table, load, stack
from .losses import scaled_bce
from .page import PAGE
from .stacked import PENALTIES, logistic
from .stats import Overall, overall
from .train import METRICS, metrics_of, validation_ap

OUT = report.ROOT / report.RESULTS / "real_data_noise.json"
MARK = "noise"
MOST_ROWS = 10_000  # of training
COMMONEST = 0.1  # share of positives of a table that is used
BUDGET = Budget(120, 10)
QUICK = Budget(4, 2)
CONTROL = "BCE continued"
RATES = {CONTROL: (0.01, 0.03, 0.1, 0.3)}  # in units of the spread of the scores
RANKING_RATES, TAUS = (0.03, 0.1, 0.03, 0.1), (0.1, 0.1, 0.25, 0.25)
SHARES = {"Smooth-AP": 1.0, "half Smooth-AP, half BCE": 0.5}


CELLS = {"0 %": 0.0, "5 %": 0.05, "10 %": 0.1, "20 %": 0.2}  # share of the positives


def noisy(y: Tensor, share: float, seeds: Sequence[int]) -> Tensor:
    """Labels [seeds, rows]: this share of the positives is missed, as many negatives are called.

    With a larger share the same rows, and more.
    """
    y = y.clone()
    for seed, labels in zip(seeds, y, strict=True):
        draw = torch.Generator().manual_seed(seed)
        positives, negatives = labels.nonzero()[:, 0], (~labels).nonzero()[:, 0]
        count = round(share * len(positives))
        order = torch.randperm(len(positives), generator=draw)[:count]
        others = torch.randperm(len(negatives), generator=draw)[:count]
        labels[positives[order]], labels[negatives[others]] = False, True
    return y


def ranking(share: float, scale: Tensor) -> Make:
    """This share of Smooth-AP, the rest BCE of scores times a scale [seeds]; values are tau."""

    def make(setup: Setup) -> Loss:
        plain = scaled_bce(scale)(setup._replace(values=()))
        tau = torch.tensor(setup.values)

        def loss(found: Tensor, batch: Batch) -> Tensor:
            pos = batch.y[:, None].expand(found.shape)
            soft = pl.smooth_ap(found, pos, tau.expand(found.shape[:2]), rtol=1e-4)
            return share * (1.0 - soft) + (1.0 - share) * plain(found, batch)

        return loss

    return make


def arms(scale: Tensor, features: int) -> list[Arm]:
    """All with four configurations. Scores have a spread of 1, and `scale` where BCE sees them."""

    def rates(of: tuple[float, ...]) -> tuple[float, ...]:
        return tuple(rate / features**0.5 for rate in of)

    return [
        Arm(CONTROL, scaled_bce(scale), rates(RATES[CONTROL])),
        *(
            Arm(name, ranking(share, scale), rates(RANKING_RATES), "tau / spread", TAUS)
            for name, share in SHARES.items()
        ),
    ]


def run(clean: Stack, share: float, seeds: Sequence[int], budget: Budget) -> dict[str, Any]:
    """Arm -> metric -> of every seed, with the clean labels of the test rows."""
    train, val = (Part(p.x, noisy(p.y, share, seeds)) for p in clean[:2])
    wrong = Stack(train, val, clean.test)
    start = logistic(wrong)
    spread = score_all([w[:, None] for w in start], train.x)[:, 0].std(-1)
    start = [w / spread[:, None, None] for w in start]
    weights = {"logistic": start}
    chosen: dict[str, list[int]] = {}
    for arm in arms(spread, train.x.shape[2]):
        training = Training(train, arm, start, budget)
        fitted = training.fit(lambda now: validation_ap(now, val))
        which, weights[arm.name] = fitted.choose()
        chosen[arm.name] = which.tolist()
    found: dict[str, Any] = {}
    for name, of_arm in weights.items():
        scores = score_all([w[:, None] for w in of_arm], clean.test.x)[:, 0]
        runs = metrics_of(scores, clean.test.y)
        found[name] = {metric: [round(one[metric], 5) for one in runs] for metric in METRICS}
        found[name] |= {"chosen": chosen[name]} if name in chosen else {}
    return found


def gains(written: dict[str, Any], cell: str, arm: str, metric: str = "ap") -> dict[str, float]:
    """Table -> arm less the control, in points, mean over seeds; of one noise."""
    found = {}
    for table, cells in written["results"].items():
        if cell in cells:
            apart = np.subtract(cells[cell][arm][metric], cells[cell][CONTROL][metric])
            found[table] = 100 * float(apart.mean())
    return found


def block(written: dict[str, Any]) -> str:
    """Markdown, without the marks."""
    names = list(SHARES)
    titles = [f"{name}: AP over the control" for name in names]
    first = names[0]
    rows = [["wrong labels", f"{CONTROL}: AP x 100", *titles, f"{first}: AP, less that at 0 %",
             f"{first}: recall in the top 0.5 %", f"{first}: pAUC"]]  # fmt: skip
    cells = written["protocol"]["cells"]
    clean = {name: gains(written, cells[0], name) for name in names}
    for cell in cells:
        found = {name: gains(written, cell, name) for name in names}
        tables = [of[cell][CONTROL]["ap"] for of in written["results"].values() if cell in of]
        row = [cell, f"{100 * np.mean(tables):.1f}"]
        row += [_gain(overall([*one.values()])) for one in found.values()]
        more = [g - clean[names[0]][t] for t, g in found[names[0]].items()]
        row.append("" if cell == cells[0] else _gain(overall(more)))
        row += [_gain(overall([*gains(written, cell, names[0], m).values()]))
                for m in ("recall", "pauc")]  # fmt: skip
        rows.append(row)
    tables = [["Smooth-AP, by table", *written["results"]]]
    for cell in cells:
        found = gains(written, cell, names[0])
        tables.append([cell, *(f"{found[t]:+.2f}" for t in written["results"])])
    where = written["machine"]
    text = (
        f"{len(written['results'])} tables, {written['protocol']['seeds']} paired seeds, commit "
        f"{(written['commit'] or 'none')[:12]}, {written['date'][:10]}, {where['cpu']}, 1 thread, "
        f"{written['cpu_s'] / 60:.0f} CPU minutes. {written['protocol']['configurations']} "
        "configurations a table, seed and noise, the same number for each loss."
    )
    return "\n\n".join([text, report.markdown(rows), report.markdown(tables)])


def _gain(found: Overall) -> str:
    return f"{found.mean:+.2f} ± {found.error or 0:.2f} ({found.up}/{found.down})"


def publish(written: dict[str, Any], page: Path) -> None:
    print(block(written))
    page.write_text(report.replaced(page.read_text(), block(written), MARK))


def read(source: str) -> list[Table]:
    """The tables with few positives, smallest first."""
    return sorted(
        (t for t in load(source) if t.y.mean() <= COMMONEST), key=lambda table: table.x.size
    )


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.real_data.noise")
    parser.add_argument("--data", help='a folder of npz files, or "openml"')
    parser.add_argument("--seeds", type=int, default=5, help="splits of each table")
    parser.add_argument("--quick", action="store_true", help="few steps, to see that it works")
    parser.add_argument("--report", action="store_true", help="the section again, train nothing")
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--page", type=Path, default=PAGE)
    args = parser.parse_args(argv)
    if args.report:
        publish(json.loads(args.out.read_text()), args.page)
        return 0
    if args.data is None:
        parser.error("give --data FOLDER, --data openml or --report")
    torch.set_num_threads(1)
    seeds, budget = range(args.seeds), QUICK if args.quick else BUDGET
    tables = read(args.data)
    tried = {arm.name: arm.configurations() for arm in arms(torch.ones(1), 1)}
    written = report.heading("real_data_noise", __doc__.splitlines()[0]) | {
        "quick": args.quick,
        "protocol": {
            "seeds": args.seeds, "most_train_rows": MOST_ROWS, "budget": budget._asdict(),
            "penalties": PENALTIES, "tried": tried, "control": CONTROL,
            "configurations": len(PENALTIES) + sum(map(len, tried.values())),
            "cells": [*CELLS],
            "tables": {
                t.name: {"rows": len(t.y), "features": t.x.shape[1], "positives": int(t.y.sum())}
                for t in tables
            },
        },
        "results": {}, "cpu_s": 0.0,
    }  # fmt: skip
    begin = time.process_time()
    for table in tables:
        clean = stack(table, seeds, MOST_ROWS)
        for cell, share in CELLS.items():
            of_table = written["results"].setdefault(table.name, {})
            of_table[cell] = run(clean, share, seeds, budget)
            written["cpu_s"] = round(time.process_time() - begin, 1)
            report.write(written, args.out)
            print(f"{table.name}, {cell}: {written['cpu_s']:.0f} CPU s", file=sys.stderr)
    publish(written, args.page)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
