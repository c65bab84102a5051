"""The tables of the guide to choosing settings, from the committed run.

``python -m benchmarks.choosing_page`` writes them anew between the marks of
``proxy_losses/guide/choosing.md``.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from . import report
from .choosing_runs import Setting

PAGE = report.ROOT / "proxy_losses" / "guide" / "choosing.md"
RUN = report.ROOT / report.RESULTS / "choosing.json"


class Row(NamedTuple):
    """A row of a table: an arm, in words and as its question and the fields that it sets."""

    label: str
    question: str
    fields: Mapping[str, Any] = MappingProxyType({})
    shown: str = "over_usual"


def _at_the_top(label: str, loss: str, weight: float, **fields: Any) -> Row:
    fields |= {"loss": loss, "main": weight}
    if loss != "recall":
        fields["unit"] = "spread"
    return Row(f"{label} | {weight:g}", "weight at the top", fields, "recall_gain")


RECALL = {"loss": "recall", "main": 0.5}
TABLES: dict[str, tuple[str, list[Row]]] = {
    "usual": (
        "gain in average precision",
        [Row("the usual settings", "tau", shown="ap_gain")],
    ),
    "temperature": (
        "temperature in spreads",
        [
            *(Row(f"{tau:g}", "tau", {"tau": tau}) for tau in (0.03, 0.1, 0.5, 1.0, 2.0, 4.0)),
            Row("0.25, measured anew each step", "tau", {"unit": "spread"}),
            Row("1, measured anew each step", "tau", {"unit": "spread", "tau": 1.0}),
            Row("falling from 1.1 to 0.06", "tau over time", {"unit": "decay"}),
        ],
    ),
    "queue": (
        "queue",
        [
            Row("Smooth-AP, none", "queue", {"queue": 0}),
            Row("Smooth-AP, 4 batches", "queue", {"queue": 512}),
            Row("Smooth-AP, 64 batches", "queue", {"queue": 8192}),
            Row("recall, none", "queue of recall", {**RECALL, "queue": 0}),
            Row("recall, 4 batches", "queue of recall", {**RECALL, "queue": 512}),
            Row("recall, 64 batches", "queue of recall", {**RECALL, "queue": 8192}),
        ],
    ),
    "schedule": (
        "schedule",
        [
            Row("60 % warmup", "warmup", {"warmup": 0.6}),
            Row("10 % warmup", "warmup", {"warmup": 0.1}),
            Row("no warmup", "warmup", {"warmup": 0.0}),
            Row(
                "no warmup, the spread measured anew each step",
                "warmup",
                {"warmup": 0.0, "unit": "spread"},
            ),
            Row("30 % warmup, then a blend over 20 %", "warmup", {"warmup": 0.3, "blend": 0.2}),
            Row("60 % warmup, then a blend over 20 %", "warmup", {"warmup": 0.6, "blend": 0.2}),
        ],
    ),
    "weight": (
        "weight of Smooth-AP",
        [Row(f"{weight:g}", "weight", {"main": weight}) for weight in (0.75, 0.5, 0.25, 0.1)],
    ),
    "top": (
        "loss | weight",
        [
            *(
                _at_the_top(f"{name}, {words}", loss, weight, grad=grad)
                for loss, name in (("recall", "recall"), ("trapezoid", "partial AUC, trapezoid"))
                for grad, words in (
                    ("none", "thresholds held constant"),
                    ("implicit", "thresholds that move"),
                )
                for weight in (0.75, 1.0)
            ),
            *(_at_the_top("partial AUC, pairwise", "pairwise", weight) for weight in (0.5, 1.0)),
        ],
    ),
}


def arm_of(world: Mapping[str, Any], row: Row) -> dict[str, Any] | None:
    """The record of a row, if the run has it; fields that it does not set are the usual ones."""
    usual = {**Setting()._asdict(), "grad": "none", **row.fields}
    for arm in world["questions"][row.question]:
        if all({"grad": "none", **arm}[key] == value for key, value in usual.items()):
            return dict(arm)
    return None


def cell(found: Mapping[str, Any]) -> str:
    """A mean and its interval in points."""
    mean, low, high = (100 * x for x in (found["mean"], *found["interval"]))
    return f"{mean:+.1f} [{low:.1f}, {high:.1f}]"


def table(name: str, run: Mapping[str, Any]) -> str:
    """A table in Markdown, a column for each world."""
    head, rows = TABLES[name]
    worlds = list(run["worlds"].values())
    columns = ["MLP" if world["hidden"] else "linear" for world in worlds]
    lines = [f"| {head} | {' | '.join(columns)} |", "|---" * (head.count("|") + 3) + "|"]
    for row in rows:
        arms = [arm_of(world, row) for world in worlds]
        if None not in arms:
            cells = (cell(arm[row.shown]) for arm in arms if arm is not None)
            lines.append(f"| {row.label} | {' | '.join(cells)} |")
    return "\n".join(lines)


def filled(text: str, run: Mapping[str, Any]) -> str:
    """The page with the tables of a run between its marks."""
    for name in TABLES:
        text = report.replaced(text, table(name, run), name)
    return text


def main(page: Path = PAGE) -> int:
    """Write the page."""
    page.write_text(filled(page.read_text(), json.loads(RUN.read_text())))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
