"""What `linear_ranker` found, for the pages that tell it."""

from __future__ import annotations

import json
from typing import Any

import numpy as np

from . import report

PAGE = report.ROOT / "benchmarks/linear_ranker.md"
FILES = {  # mark of the page -> file of the run
    "tables": "linear_ranker", "screen": "linear_ranker_screen", "made": "linear_ranker_made",
    "folder": "linear_ranker_tables",
}  # fmt: skip
GROUPS = {"tuned on": "those tuned on", "judged on": "the others", "all": "all"}
ARMS = {
    "ranker": "LinearRanker", "logistic": "logistic", "weighted": "class weights",
    "focal": "focal loss", "continued": "continued",
}  # fmt: skip


def interval(overall: dict[str, Any], times: float = 1.0) -> str:
    """A mean with its 95 % interval, where there is one."""
    if overall["low"] is None:
        return f"{times * overall['mean']:+.2f}"
    low, high = (times * overall[bound] for bound in ("low", "high"))
    return f"{times * overall['mean']:+.2f} [{low:+.2f}, {high:+.2f}]"


def differences(written: dict[str, Any]) -> str:
    """AP of an arm less another, over tables."""
    rows = [["features", "tables", "difference", "mean [95 %]", "up / down", "Wilcoxon p"]]
    for field, groups in written["compared"].items():
        for group, pairs in groups.items():
            for pair, metrics in pairs.items():
                if group != [*groups][-1] and pair != "ranker - logistic":
                    continue
                found, (arm, control) = metrics["ap"], pair.split(" - ")
                rows.append([
                    field.split()[0], f"{len(found['tables'])}, {GROUPS[group]}",
                    f"{ARMS[arm]} - {ARMS[control]}", interval(found["overall"]),
                    f"{found['up']} / {found['down']}", f"{found['wilcoxon_p']:.2g}",
                ])  # fmt: skip
    return report.markdown(rows)


def by_table(written: dict[str, Any], field: str) -> str:
    """Test AP x 100 of the arms, and what the ranker gains."""
    found, tuned = written["results"][field], written["protocol"]["tuned_on"]
    arms = ["logistic", "weighted", "focal", "ranker"]
    rows = [["table", *(ARMS[arm] for arm in arms), "- logistic"]]
    for name, splits in found.items():
        means = [100 * np.mean([s["test"][arm]["ap"] for s in splits]) for arm in arms]
        mark = "*" if name in tuned else ""
        rows.append([name + mark, *(f"{m:.1f}" for m in means), f"{means[-1] - means[0]:+.2f}"])
    return report.markdown(rows)


def cost(written: dict[str, Any]) -> str:
    """Times of the ranker in those of the tuned logistic regression."""
    times = [
        split["cpu_s"]["ranker"] / split["cpu_s"]["logistic"]
        for tables in written["results"].values()
        for splits in tables.values()
        for split in splits
    ]
    return (
        f"A fit costs {np.median(times):.0f} times the tuned logistic regression in the median and "
        f"{max(times):.0f} times at most. The run took {written['cpu_s'] / 60:.0f} minutes of one "
        "core."
    )


def screen(written: dict[str, Any]) -> str:
    """What changes in a screen."""
    found = written["compared"]["ranker"]
    gain, ap, splits = found["enrichment"], found["ap"], len(written["results"]["screen"])
    return (
        f"{written['protocol']['molecules']:,} molecules, {written['protocol']['actives']:,} "
        f"active, {splits} random splits by scaffold, {written['cpu_s'] / 60:.0f} minutes of one "
        f"core. The enrichment at 1 % changes from {gain['logistic']:.1f} by "
        f"{interval(gain['overall'])} ({gain['up']} splits up, {gain['down']} down; interval "
        f"corrected for the rows that splits share, p {gain['p']:.2g}), and AP from "
        f"{100 * ap['logistic']:.1f} by {interval(ap['overall'], 100)} points. The logistic loss "
        "continued alike changes the enrichment by "
        f"{interval(written['compared']['continued']['enrichment']['overall'])}."
    )


def tables(written: dict[str, Any]) -> str:
    """All of a run on tables."""
    field = next(iter(written["results"]))
    note = " (* tuned on)" if written["protocol"]["tuned_on"] else ""
    title = f"Test AP x 100, {field}{note}:"
    return "\n\n".join([differences(written), cost(written), title, by_table(written, field)])


def blocks() -> dict[str, str]:
    """What stands between the page's marks, from the committed runs."""
    found = {}
    for mark, name in FILES.items():
        path = report.ROOT / report.RESULTS / f"{name}.json"
        if path.exists():
            found[mark] = (screen if mark == "screen" else tables)(json.loads(path.read_text()))
    return found


def write() -> None:
    """Fill the page."""
    page = PAGE.read_text()
    for mark, block in blocks().items():
        page = report.replaced(page, block, mark)
    PAGE.write_text(page)
