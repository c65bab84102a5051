"""What the demo prints: what it was given, a line per epoch, a table, and a verdict."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from ._measure import Interval, Measures, bootstrap_difference, measure, top_count
from ._settings import Settings
from ._tables import Ints, Split, Table
from ._train import Arm, Epoch, steps_per_epoch

RANKING, PLAIN_BCE, PLAIN_CE = "Smooth-AP", "BCE", "CE"


class Result(NamedTuple):
    """Everything a run found out."""

    table: Table
    settings: Settings
    split: Split
    ranking: Arm
    plain: Arm
    ranking_test: Measures
    plain_test: Measures
    difference: Interval  # ranking - plain, AUCPR on test


def conclude(table: Table, settings: Settings, split: Split, ranking: Arm, plain: Arm) -> Result:
    """Measure both arms on the test rows."""
    labels = split.test.labels
    return Result(
        table,
        settings,
        split,
        ranking,
        plain,
        measure(ranking.test_scores, labels),
        measure(plain.test_scores, labels),
        bootstrap_difference(ranking.test_scores, plain.test_scores, labels, settings.seed),
    )


def describe(table: Table, split: Split, settings: Settings) -> str:
    """The data, the split and the model, before training starts."""
    parts = (split.train, split.validation, split.test)
    counts = [_counts(part.labels, table) for part in parts]
    outputs = 1 if len(table.classes) == 2 else len(table.classes)
    sizes = [table.features.shape[1], *([settings.hidden] if settings.hidden else []), outputs]
    copies = f"; {split.copies:,} rows repeat another, and stay on its side" * bool(split.copies)
    return "\n".join(
        [
            f"data   {table.name}: {_counts(table.labels, table)}, {sizes[0]} features",
            f"split  train {counts[0]} | validation {counts[1]} | test {counts[2]}{copies}",
            f"model  {'-'.join(map(str, sizes))}, Adam, lr {settings.lr:g}, batches of "
            f"{settings.batch_size}, {steps_per_epoch(len(parts[0].labels), settings)} steps an "
            f"epoch, seed {settings.seed}",
        ]
    )


def _counts(labels: Ints, table: Table) -> str:
    if len(table.classes) > 2:
        return f"{len(labels):,} rows of {len(table.classes)} classes"
    positives = int(labels.sum())
    name = table.classes[1]
    named = "" if name == "1" else f" ({name!r})"
    rate = positives / len(labels)
    return f"{len(labels):,} rows, {positives:,} positive{named}, {100 * rate:.2f} %"


def epoch_line(arm: str, epoch: Epoch, total: int) -> str:
    """One line of the trace."""
    weight = "   -" if epoch.main_weight is None else f"{epoch.main_weight:4.2f}"
    temperature = "     -" if epoch.temperature is None else f"{epoch.temperature:6.4f}"
    return (
        f"{arm:<9}  epoch {epoch.number:>{len(str(total))}}/{total}  {epoch.phase:<6}  "
        f"main_weight {weight}  temperature {temperature}  loss {epoch.loss:.4f}  "
        f"validation AUCPR {epoch.aucpr:.4f}"
    )


def final_table(result: Result) -> str:
    """Test AUCPR and recall of both arms."""
    macro = "" if len(result.table.classes) == 2 else ", mean over classes"
    top = top_count(len(result.split.test.labels))
    top_rows = f"{top:,} rows" if top > 1 else "1 row"
    rows = [
        ("on the test rows" + macro, "AUCPR", f"recall in top 0.5 % ({top_rows})", "best epoch"),
        _row(result.ranking, result.ranking_test, " after warmup"),
        _row(result.plain, result.plain_test, ", as many steps"),
        ("attainable", "1.0000", f"{result.ranking_test.best_recall:.4f}", ""),
    ]
    return aligned(rows)


def _row(arm: Arm, test: Measures, remark: str) -> tuple[str, str, str, str]:
    best = f"{arm.best.number} ({arm.best.phase})"
    return arm.name + remark, f"{test.aucpr:.4f}", f"{test.recall:.4f}", best


def aligned(rows: Sequence[tuple[str, ...]]) -> str:
    """Columns of text, the first to the left, under a ruled head."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = [
        "  ".join(
            cell.ljust(width) if column == 0 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]
    rule = "-" * len(lines[0])
    return "\n".join([rule, lines[0], rule, *lines[1:], rule])


def verdict(result: Result) -> str:
    """Win, tie or loss, and how little one seed says."""
    difference, low, high = result.difference
    ours, theirs = result.ranking.name, result.plain.name
    if low > 0:
        outcome = f"a win for {ours}"
    elif high < 0:
        outcome = f"a loss for {ours}"
    else:
        outcome = "a tie"
    labels = result.split.test.labels
    fewest = int(np.unique(labels, return_counts=True)[1].min())
    few = "positives" if len(result.table.classes) == 2 else "rows in the smallest class"
    lines = [
        f"Measured: {outcome}. {ours} - {theirs} = {100 * difference:+.2f} AUCPR points on test "
        f"(95 % bootstrap interval {100 * low:+.2f} to {100 * high:+.2f}, {fewest:,} {few}).",
        "This is one seed and one split, and one seed's AUCPR moves by points: run several --seed "
        "before believing either.",
    ]
    if result.ranking.best.phase == "warmup":
        lines.append(
            f"{ours}'s best validation epoch lies in its warmup, where both arms train alike: "
            "the ranking loss was not used."
        )
    arms = (result.ranking, result.plain)
    rising = [arm.name for arm in arms if arm.best.number == arm.trace[-1].number]
    if rising:
        lines.append(
            f"The last epoch was the best of {' and of '.join(rising)}: more --total-epochs may "
            "change the outcome."
        )
    return "\n".join(lines)
