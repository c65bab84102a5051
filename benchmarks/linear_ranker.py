"""Linear scorecards fitted for a ranking metric, against logistic regression given the same.

``python -m benchmarks.linear_ranker --data DIR`` reads every binary table DIR/*.npz with few
positives (X [rows, features], y in {0, 1}), and writes ``results/linear_ranker.json``, after each
split too. All arms of a split share rows, features, start and what selects them, the metric on the
validation rows, which is that the ranker is fitted for:

- logistic: of several penalties the best;
- continued: from there as many steps of the same optimiser on the logistic loss, of the three
  weights of the positives 1, 10 and 0.1 the best: what more steps and more candidates are worth;
- ranker: `LinearRanker`.

The unit of the test is the table; a table's figure is the mean over its splits. Intervals over the
splits of one table are those of the corrected resampled t-test, since splits share rows.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import average_precision_score, roc_auc_score, roc_curve
from sklearn.preprocessing import StandardScaler
from torch import Tensor

from proxy_losses.integrations.sklearn import LinearRanker

from . import harness, report
from .real_data.data import CLIP, Array, Table, load, split
from .real_data.losses import scaled_bce
from .real_data.models import best_logistic
from .real_data.stats import overall, resampled
from .trainer import Arm, Budget, Part, Training, Weights, score_all

RAREST, COMMONEST = 1e-4, 0.1  # share of positives of a table that is used
# name -> metric and features of the arms
FIELDS: dict[str, tuple[str, int | None]] = {
    "ap, 5 features": ("ap", 5),
    "ap, all features": ("ap", None),
    "pauc, 5 features": ("pauc", 5),
}
ARMS = ("logistic", "continued", "ranker")
POS_WEIGHTS = (1.0, 10.0, 0.1)
QUANTILE = FPR = 0.005
EVERY = 10  # steps from one validation to the next, as `LinearRanker` does


def recall(y: Array, scores: Array) -> float:
    """Of the positives in the top `QUANTILE` of the rows; tied rows share the last places."""
    false, true, _ = roc_curve(y, scores, drop_intermediate=False)
    return float(np.interp(QUANTILE, false * (1.0 - y.mean()) + true * y.mean(), true))


METRICS: dict[str, Callable[[Array, Array], float]] = {
    "ap": average_precision_score, "recall": recall, "pauc": partial(roc_auc_score, max_fpr=FPR),
}  # fmt: skip


def scaled_parts(table: Table, seed: int) -> list[Part]:
    """Training, validation and test rows, in the scale that the estimator will choose itself."""
    rows = split(table, seed)
    known = StandardScaler().fit(table.x[rows.train])
    x = known.transform(table.x).clip(-CLIP, CLIP).astype(np.float64)
    x = StandardScaler().fit(x[rows.train]).transform(x)
    return [Part(torch.from_numpy(x[r])[None], torch.from_numpy(table.y[r])[None]) for r in rows]


def continued(
    start: LogisticRegression, train: Part, held: Part, metric: str, model: LinearRanker
) -> Weights:
    """The best of three logistic losses, minimised from the tuned one; with an intercept."""
    spread = torch.tensor([start.decision_function(train.x[0]).std()])
    weights = [torch.from_numpy(w)[None] / spread for w in (start.coef_.T, start.intercept_[None])]
    rates = (model.learning_rate / (train.x.shape[2] + 1) ** 0.5,) * len(POS_WEIGHTS)
    arm = Arm("continued", scaled_bce(spread), rates, "weight of positives", POS_WEIGHTS)
    budget = Budget(model.max_iter, EVERY, patience=model.n_iter_no_change)

    def judge(now: Weights) -> Tensor:
        found = score_all(now, held.x)[0].numpy()
        return torch.tensor(
            [[METRICS[metric](held.y[0].numpy(), s) for s in found]], dtype=torch.float64
        )

    return Training(train, arm, weights, budget).fit(judge, model.tol).choose()[1]


def one_split(parts: list[Part], metric: str, count: int | None) -> dict[str, Any]:
    """Test metrics of the arms."""
    (x, y), (x_val, y_val), (x_test, truth) = ((p.x[0].numpy(), p.y[0].numpy()) for p in parts)
    begin = time.process_time()
    model = LinearRanker(metric, n_features=count, quantile=QUANTILE, fpr=FPR)
    model.fit(x, y, X_val=x_val, y_val=y_val)
    seconds = time.process_time() - begin

    picked = model.support_
    start = best_logistic(
        x[:, picked], y, model.Cs,
        lambda m: METRICS[metric](y_val, m.decision_function(x_val[:, picked])),
    )  # fmt: skip
    train, held, test = (Part(p.x[..., torch.from_numpy(picked)], p.y) for p in parts)
    control = [w[:, None] for w in continued(start, train, held, metric, model)]
    scores = {
        "logistic": start.decision_function(test.x[0]),
        "continued": score_all(control, test.x)[0, 0].numpy(),
        "ranker": model.decision_function(x_test),
    }
    return {
        "improved": model.improved_, "best_iter": model.best_iter_, "fit_cpu_s": round(seconds, 2),
        "test": {
            arm: {name: float(of(truth, values)) for name, of in METRICS.items()}
            for arm, values in scores.items()
        },
    }  # fmt: skip


def over_splits(differences: Sequence[float]) -> dict[str, Any]:
    """Mean and 95 % interval over the splits of a table; null bounds of one."""
    if len(differences) < 2:
        return _bounds(differences[0], None)
    return _bounds(*resampled(differences)[:2])


def _bounds(mean: float, half: float | None) -> dict[str, Any]:
    bounds = (None, None) if half is None else (mean - half, mean + half)
    return {"mean": mean, "low": bounds[0], "high": bounds[1]}


def compare(found: dict[str, list[dict[str, Any]]], control: str, metric: str) -> dict[str, Any]:
    """The ranker less a control, x 100: by table over splits, and over tables."""
    by_table = {
        name: over_splits(
            [100 * (s["test"]["ranker"][metric] - s["test"][control][metric]) for s in splits]
        )
        for name, splits in found.items()
    }
    whole = overall([table["mean"] for table in by_table.values()])
    wins = sum(t["low"] is not None and t["low"] > 0 for t in by_table.values())
    losses = sum(t["high"] is not None and t["high"] < 0 for t in by_table.values())
    return {
        "tables": by_table,
        "overall": _bounds(whole.mean, whole.half), "up": whole.up, "down": whole.down,
        # a win or a loss: the interval over the splits leaves 0 out
        "wins": wins, "ties": len(found) - wins - losses, "losses": losses,
        "wilcoxon_p": whole.p,
    }  # fmt: skip


def compare_all(results: dict[str, Any]) -> dict[str, Any]:
    """Field -> control -> metric -> comparison."""
    return {
        field: {
            control: {metric: compare(found, control, metric) for metric in METRICS}
            for control in ARMS[:-1]
        }
        for field, found in results.items()
    }


def show(written: dict[str, Any]) -> str:
    """The metric x 100 that the ranker is fitted for by table, and the differences."""
    lines = []
    for field, found in written["results"].items():
        metric = FIELDS[field][0]
        compared = {c: written["compared"][field][c][metric] for c in ARMS[:-1]}
        header = [f"{field}, {metric} x 100", *ARMS, "- logistic", "- continued", "improved"]
        body = []
        for name, splits in found.items():
            means = [100 * np.mean([s["test"][arm][metric] for s in splits]) for arm in ARMS]
            gains = [_gain(compared[control]["tables"][name]) for control in ARMS[:-1]]
            improved = f"{sum(s['improved'] for s in splits)}/{len(splits)}"
            body.append([name, *(f"{m:.1f}" for m in means), *gains, improved])
        total = [_gain(compared[control]["overall"]) for control in ARMS[:-1]]
        body.append(["mean", "", "", "", *total, ""])
        for label, keys in (("up/down", ("up", "down")), ("w/t/l", ("wins", "ties", "losses"))):
            cells = ["/".join(str(compared[c][k]) for k in keys) for c in ARMS[:-1]]
            body.append([label, "", "", "", *cells, ""])
        p = [f"p {compared[control]['wilcoxon_p']:.3g}" for control in ARMS[:-1]]
        lines += [*report.align([header, *body, ["Wilcoxon", "", "", "", *p, ""]]), ""]
    return "\n".join(lines)


def _gain(found: dict[str, Any]) -> str:
    if found["low"] is None:
        return f"{found['mean']:+.2f}"
    return f"{found['mean']:+.2f} [{found['low']:+.2f}, {found['high']:+.2f}]"


def tables(folder: Path) -> dict[str, Table]:
    """The tables there whose positives are few."""
    found = load(str(folder)) if any(folder.glob("*.npz")) else []
    return {t.name: t for t in found if RAREST <= t.y.mean() <= COMMONEST}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="a folder of .npz tables")
    parser.add_argument("--seeds", type=int, default=10, help="splits of each table")
    parser.add_argument(
        "--out", type=Path, default=report.ROOT / report.RESULTS / "linear_ranker.json"
    )
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    data = tables(args.data)
    if not data:
        parser.error(f"no table with {RAREST:g} to {COMMONEST:g} positives in {args.data}")

    peers = {"sklearn": harness.peer("sklearn")[1]}
    written = report.heading("linear_ranker", __doc__.splitlines()[0], peers) | {
        "protocol": {
            "split": "60/20/20 by class, copies of a row on one side, standardised, clipped at 10",
            "seeds": args.seeds, "selected_by": "validation AP", "pos_weights": POS_WEIGHTS,
            "ranker": LinearRanker().get_params(), "quantile": QUANTILE, "fpr": FPR,
            "tables": {
                name: {"rows": t.x.shape[0], "features": t.x.shape[1],
                       "positives": int(t.y.sum())}
                for name, t in data.items()
            },
        },
        "results": {field: {} for field in FIELDS}, "compared": {},
    }  # fmt: skip
    for name, table in data.items():
        for seed in range(args.seeds):
            parts = scaled_parts(table, seed)
            for field, (metric, count) in FIELDS.items():
                if count is None or count < table.x.shape[1]:
                    found = written["results"][field].setdefault(name, [])
                    found.append(one_split(parts, metric, count))
            report.write(written, args.out)
            print(f"{name} {seed}: {time.process_time():.0f} s", file=sys.stderr, flush=True)
    written["results"] = {field: found for field, found in written["results"].items() if found}
    written["compared"] = compare_all(written["results"])
    written["cpu_s"] = round(time.process_time(), 1)
    report.write(written, args.out)
    print(show(written))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
