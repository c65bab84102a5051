"""The map of the guide "does it help?", from the committed runs.

``python -m benchmarks.help_page`` writes its tables between the marks of
``proxy_losses/guide/does_it_help.md``, and draws ``results/does_it_help.png``.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from . import choosing_page, report
from .figures import BLUE, GREY, INK, ORANGE, new_figure, tidy
from .real_data import noise
from .real_data.stats import arms_of, compare, overall, parts, resampled
from .report import markdown
from .retrieval import page as retrieval_page
from .screening import page as screening_page

PAGE = report.ROOT / "proxy_losses" / "guide" / "does_it_help.md"
PICTURE = report.ROOT / report.RESULTS / "does_it_help.png"
LEAST_ANGLE = 30  # degrees, from which on a made top is contested
SCORECARDS = "../../benchmarks/linear_ranker.md"
# Command, the file that it writes, and where that is read.
RUNS = {
    "choosing": ("benchmarks.choosing", "choosing.md"),
    "real_data": ("benchmarks.real_data --data TABLES", "../../benchmarks/real_data/README.md"),
    "real_data_noise": (
        "benchmarks.real_data.noise --data TABLES",
        "../../benchmarks/real_data/README.md#with-wrong-labels",
    ),
    "real_data_map": (
        "benchmarks.real_data.map --data TABLES", "../../benchmarks/real_data/MAP.md",
    ),
    "linear_ranker": ("benchmarks.linear_ranker --data keel --splits 4", SCORECARDS),
    "linear_ranker_made": ("benchmarks.linear_ranker --data made --features all", SCORECARDS),
    "linear_ranker_tables": (
        "benchmarks.linear_ranker --data TABLES --rows 20000", SCORECARDS,
    ),
    "linear_ranker_screen": (
        "benchmarks.linear_ranker --data SCREEN.npz --splits 10", SCORECARDS,
    ),
    "retrieval": (
        "benchmarks.retrieval --data EMBEDDINGS", "../../benchmarks/retrieval/README.md",
    ),
    "screening": (
        "benchmarks.screening --data SCREEN.npz", "../../benchmarks/screening/README.md",
    ),
}  # fmt: skip

Written = dict[str, Any]


class Gain(NamedTuple):
    """What a loss gave over its control, in points, with a 95 % interval."""

    label: str
    mean: float
    low: float
    high: float
    up: int  # tables, splits or seeds
    down: int

    def __str__(self) -> str:
        interval = f"{self.mean:+.1f} [{self.low:+.1f}, {self.high:+.1f}]"
        label = self.label and f"{self.label}: "
        text = f"{label}{interval}, {self.up}/{self.down}"
        return text.replace(" ", "\N{NO-BREAK SPACE}")  # a line of a narrow column


class Row(NamedTuple):
    """A row of the map."""

    where: str
    over: str  # the control
    unit: str  # of the gains
    run: str  # of RUNS
    gains: Callable[[Written], Sequence[Gain]]
    do: str


def gain(label: str, apart: Sequence[float], overlap: float = 0.0) -> Gain:
    """Of paired differences over seeds or splits, whose tests overlap so much."""
    mean, half, _ = resampled(apart, overlap)
    up, down = sum(d > 0 for d in apart), sum(d < 0 for d in apart)
    return Gain(label, mean, mean - half, mean + half, up, down)


def over_tables(label: str, means: Sequence[float]) -> Gain:
    found = overall(means)
    half = found.half or 0.0
    return Gain(label, found.mean, found.mean - half, found.mean + half, found.up, found.down)


def contested(model: str) -> Callable[[Written], list[Gain]]:
    """The mean over the angles, of every seed."""

    def gains(written: Written) -> list[Gain]:
        found = [
            np.subtract(of_angle[model]["smooth_ap"], of_angle[model]["continued"])
            for angle, of_angle in written["made"]["contested"].items()
            if float(angle) >= LEAST_ANGLE
        ]
        return [gain("", (100 * np.mean(found, axis=0)).tolist())]

    return gains


def in_map(capacity: str) -> Callable[[Written], list[Gain]]:
    def gains(written: Written) -> list[Gain]:
        cell = written["cells"]["all"][capacity]["continued"]
        bounds = cell["mean"] - cell["t95"], cell["mean"] + cell["t95"]
        return [Gain("", cell["mean"], *bounds, cell["up"], cell["down"])]

    return gains


def ranker(field: str) -> Callable[[Written], list[Gain]]:
    def gains(written: Written) -> list[Gain]:
        found = []
        groups = written["compared"][field]
        for group, label in (("judged on", "tables not tuned on"), ("all", "all tables")):
            if group not in groups:
                continue
            one = groups[group]["ranker - logistic"]["ap"]
            bounds = (one["overall"][key] for key in ("mean", "low", "high"))
            found.append(Gain(label, *bounds, one["up"], one["down"]))
        return found

    return gains


def ranker_in_screen(written: Written) -> list[Gain]:
    one = written["compared"]["ranker"]["enrichment"]
    bounds = (one["overall"][key] for key in ("mean", "low", "high"))
    return [Gain("", *bounds, one["up"], one["down"])]


def on_tables(
    model: str, labels: dict[str, str], metric: str = "ap"
) -> Callable[[Written], list[Gain]]:
    """Arm -> label."""

    def gains(written: Written) -> list[Gain]:
        found = compare(written, model, metric)
        return [
            over_tables(label, [t.mean for t in found[arm].values()])
            for arm, label in labels.items()
        ]

    return gains


def wrong_labels(written: Written) -> list[Gain]:
    return [
        over_tables(cell, [*noise.gains(written, cell, "Smooth-AP").values()])
        for cell in written["protocol"]["cells"]
    ]


def retrieval(control: str, noises: Sequence[int]) -> Callable[[Written], list[Gain]]:
    def gains(written: Written) -> list[Gain]:
        found = []
        for share in noises:
            for data, cells in written["results"].items():
                cell = cells.get(f"{share} % noise, all rows a class")
                if cell and len(cell) > 1:
                    one = retrieval_page.compare(cell)[control]
                    bounds = one["mean"] - one["half"], one["mean"] + one["half"]
                    label = data if len(noises) == 1 else f"{data}, {share} %"
                    found.append(Gain(label, one["mean"], *bounds, one["up"], one["down"]))
        return found

    return gains


def screen(metric: str, arm: str) -> Callable[[Written], list[Gain]]:
    def gains(written: Written) -> list[Gain]:
        found = []
        for model in written["protocol"]["configurations"]:
            arms = screening_page.shown(written, model, "continued")
            one = screening_page.compare(written, model, "continued", arms, metric)[arm]
            bounds = one["mean"] - one["half"], one["mean"] + one["half"]
            found.append(Gain(model, one["mean"], *bounds, one["up"], one["down"]))
        return found

    return gains


def thresholds(written: Written) -> list[Gain]:
    """Over the same loss with its threshold held constant, both at weight 1."""
    found = []
    for row in choosing_page.TABLES["top"][1]:
        if (row.fields.get("grad"), row.fields["main"]) != ("implicit", 1.0):
            continue
        name = row.label.split(",")[0]
        for world in written["worlds"].values():
            arm = choosing_page.arm_of(world, row)
            assert arm is not None
            one = arm["over_still"]
            mean, low, high = (100 * x for x in (one["mean"], *one["interval"]))
            model = "MLP" if world["hidden"] else "linear"
            found.append(Gain(f"{name}, {model}", mean, low, high, one["wins"], one["losses"]))
    return found


AP = "average precision"
CONTINUED = "cross-entropy continued"
ROWS = [
    Row(
        "A linear model on a contested top, 30 to 90 degrees apart (made-up tables)", CONTINUED, AP,
        "real_data_map", contested("linear"),
        "`LinearRanker`, which starts Smooth-AP from the tuned logistic regression",
    ),
    Row(
        "Seven made-up tables, top and bulk 0 to 90 degrees apart", "tuned logistic regression", AP,
        "linear_ranker_made", ranker("all features"), "`LinearRanker`",
    ),
    Row(
        "Embeddings of a frozen encoder, classes never seen", "whitening", "mean " + AP,
        "retrieval", retrieval("whitened", (0,)),
        "`LinearEmbedder`; or [whiten, then Smooth-AP](retrieval.md)",
    ),
    Row(
        "The same, with a share of the labels wrong", "MultiSimilarity", "mean " + AP, "retrieval",
        retrieval("MultiSimilarity", (0, 10, 20, 40)),
        "the same: wrong labels cost Smooth-AP least",
    ),
    Row(
        "Virtual screening by fingerprints, new scaffolds", CONTINUED, "enrichment at 1 %",
        "screening", screen("ef1", "half Smooth-AP, half BCE"),
        "a tuned logistic regression; then try half Smooth-AP from there, beside the control",
    ),
    Row(
        "The same screen, with `LinearRanker`",
        "tuned logistic regression", "enrichment at 1 %", "linear_ranker_screen",
        ranker_in_screen, '`metric="enrichment"` and `quantile=0.01`, beside `max_iter=0`',
    ),
    Row(
        "Recall or partial AUC at weight 1 (made-up rows)", "a threshold held constant",
        "recall of the top 0.5 %", "choosing", thresholds,
        '`threshold_grad="implicit"`: it makes these losses as good as Smooth-AP, not better',
    ),
    Row(
        "A linear model on 5 features, five tables", CONTINUED, AP, "real_data_map",
        in_map("linear, 5"), "`LinearRanker`, with `max_iter=0` beside it as the control",
    ),
    Row(
        "`LinearRanker` on all features of the five tables",
        "tuned logistic regression", AP, "linear_ranker_tables", ranker("all features"),
        "`LinearRanker`, and that control",
    ),
    Row(
        "Scorecards on 5 features, 29 public tables", "tuned logistic regression", AP,
        "linear_ranker", ranker("5 features"), "`LinearRanker(n_features=5)`, and that control",
    ),
    Row(
        "Linear models on all features of these", "tuned logistic regression", AP,
        "linear_ranker", ranker("all features"), "the tuned logistic regression",
    ),
    Row(
        "A linear model on five tables, with a share of the labels wrong", CONTINUED, AP,
        "real_data_noise", wrong_labels,
        "nothing: wrong labels are no reason for a ranking loss here",
    ),
    Row(
        "A network on five tables", CONTINUED, AP, "real_data",
        on_tables("MLP", {"Smooth-AP, whole training set": "Smooth-AP"}),
        "boosting or a larger model first, then Smooth-AP from its best checkpoint",
    ),
    Row(
        "A network of 16 units on a contested top (made-up tables)", CONTINUED, AP, "real_data_map",
        contested("16 hidden"), "nothing: cross-entropy finds such a top by itself",
    ),
    Row(
        "Boosting in place of the network, five tables", CONTINUED, AP, "real_data",
        on_tables("MLP", {"gradient boosting": ""}), "try it before any loss",
    ),
]  # fmt: skip


def map_table(runs: dict[str, Written]) -> str:
    rows = [["where", "compared with", "gain [95 % interval], up/down", "what to do"]]
    for row in ROWS:
        found = "<br>".join(str(one) for one in row.gains(runs[row.run]))
        cell = f"{row.unit}<br>{found}<br>([run]({RUNS[row.run][1]}))"
        rows.append([row.where, row.over, cell, row.do])
    return markdown(rows)


def losses(written: Written, metric: str, arms: Sequence[str]) -> str:
    """What these arms gave on the five tables, with every model."""
    found = {model: compare(written, model, metric) for model in written["protocol"]["models"]}
    rows = [["loss", *found]]
    for arm in arms:
        cells = [overall([t.mean for t in of_arm[arm].values()]) for of_arm in found.values()]
        rows.append([arm, *(f"{one.mean:+.2f} ± {one.error:.2f}" for one in cells)])
    return markdown(rows)


def ordinary(runs: dict[str, Written]) -> str:
    """Average precision of every loss."""
    written = runs["real_data"]
    arms = arms_of(written, next(iter(written["protocol"]["models"])))
    return losses(written, "ap", [arm for arm in arms if arm != written["base"]])


def top(runs: dict[str, Written]) -> str:
    """Recall in the top fraction of the losses that one may take for it."""
    written = runs["real_data"]
    arms = arms_of(written, next(iter(written["protocol"]["models"])))
    return losses(written, "recall", [arm for arm in written["ours"] if arm in arms])


def commands(runs: dict[str, Written]) -> str:
    """Every run, with its CPU minutes."""
    rows, total = [["command", "file", "commit", "CPU minutes"]], 0.0
    for name, written in runs.items():
        minutes = sum(part["cpu_s"] for part in parts(written)) / 60
        total += minutes
        command = f"`python -m {RUNS[name][0]}`"
        file = f"[{name}.json](../../benchmarks/results/{name}.json)"
        rows.append([command, file, (written["commit"] or "none")[:12], f"{minutes:.0f}"])
    rows.append(["together", "", "", f"{total:.0f}"])
    return markdown(rows)


BLOCKS = {"map": map_table, "ordinary": ordinary, "top": top, "commands": commands}


def filled(text: str, runs: dict[str, Written]) -> str:
    """The page with its tables between the marks."""
    for mark, block in BLOCKS.items():
        text = report.replaced(text, block(runs), mark)
    return text


def read() -> dict[str, Written]:
    """All runs."""
    return {
        name: json.loads((report.ROOT / report.RESULTS / f"{name}.json").read_text())
        for name in RUNS
    }


def draw(runs: dict[str, Written], path: Path) -> None:
    """Every gain of the map with its interval."""
    lines = [(row, one) for row in ROWS for one in row.gains(runs[row.run])]
    figure = new_figure(11.0, 1.0 + 0.26 * len(lines))
    ax = figure.subplots()
    ax.axvline(0, color=INK, linewidth=1)
    labels, least, most = [], -5.0, 10.0
    for k, (row, one) in enumerate(lines):
        colour = BLUE if one.low > 0 else ORANGE if one.high < 0 else GREY
        ax.plot([max(one.low, least), min(one.high, most)], [k, k], color=colour, linewidth=2)
        ax.plot(one.mean, k, "o", color=colour, markersize=5)
        same = k and lines[k - 1][0] is row
        where = "" if same else f"{row.where.split(' (made')[0].split(':')[0]}, over {row.over}"
        labels.append(", ".join(part for part in (where, one.label) if part).replace("`", ""))
    ax.set_yticks(range(len(lines)), labels)
    ax.set_xlim(least, most)
    ax.invert_yaxis()
    tidy(ax, "points; blue: above 0", "")
    figure.savefig(path)


def main(page: Path = PAGE, picture: Path = PICTURE) -> int:
    """Write the page and the picture."""
    runs = read()
    page.write_text(filled(page.read_text(), runs))
    draw(runs, picture)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
