"""The part of README.md that is written from the JSON file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..report import markdown, replaced
from .stats import (
    OnTable,
    Written,
    arms_of,
    compare,
    kept_start,
    overall,
    parts,
    record,
    runs,
)

PAGE = Path(__file__).with_name("README.md")
MARK = {"win": " **win**", "loss": " **loss**", "tie": ""}
METRICS = {"ap": "AP", "recall": "recall", "pauc": "pAUC"}


def block(written: Written) -> str:
    """Markdown, without the marks."""
    parts = [_run(written), _data(written)]
    for model in written["protocol"]["models"]:
        parts += [f"### {model}, against the control", _arms(written, model)]
        parts.append(_plain(written, model))
        parts += [f"AP by table, {model}:", _tables(written, model)]
    if written["epochs"]:
        parts += ["### Time", _times(written)]
    parts += ["### What was tried", _tried(written)]
    return "\n\n".join(parts)


def insert(page: str, written: Written) -> str:
    """The page with its block written anew."""
    return replaced(page, block(written))


def _run(written: Written) -> str:
    versions, where = written["versions"], written["machine"]
    names = {"torch": "torch", "sklearn": "scikit-learn", "imbalanced_losses": "imbalanced-losses",
             "libauc": "LibAUC"}  # fmt: skip
    shown = ", ".join(f"{name} {versions[key]}" for key, name in names.items() if versions[key])
    lines = [
        f"{len(written['results'])} tables, {len(written['protocol']['seeds'])} paired seeds, "
        f"commit {(written['commit'] or 'none')[:12]}, {written['date'][:10]}, {shown}; "
        f"{where['cpu']}, 1 thread, {written['cpu_s'] / 60:.0f} CPU minutes "
        f"({written['wall_s'] / 60:.0f} by the clock, beside other work)."
    ]
    lines += [f"Left out: {name} ({reason})." for name, reason in written["absent"].items()]
    if not written["complete"]:
        lines.append("The run did not complete.")
    return "\n".join([*lines, *(_later(written, part) for part in written.get("later", []))])


def _later(written: Written, part: Written) -> str:
    """What ran later, and how far the BCE training that it began with is from that before."""
    base, control = written["base"], written["control"]
    apart, arms = [], []
    for model in written["protocol"]["models"]:
        arms = [n for n in next(iter(part["results"].values()))[model] if n not in (base, control)]
        far = max(
            abs(a - b)
            for table, found in part["results"].items()
            for a, b in zip(
                found[model][base]["ap"], written["results"][table][model][base]["ap"], strict=True
            )
        )
        apart.append(f"by at most {100 * far:.2f} points for the {model}")
    return (
        f"{' and '.join(f'*{arm}*' for arm in arms)} ran later: commit "
        f"{(part['commit'] or 'none')[:12]}, {part['date'][:10]}, {part['machine']['cpu']}, "
        f"{part['cpu_s'] / 60:.0f} CPU minutes, on the same splits, with BCE and the control "
        f"trained once more, with which they are compared. The test AP of BCE differs from that "
        f"of the run before {' and '.join(apart)}: processors round differently."
    )


def _data(written: Written) -> str:
    rows = [["table", "rows", "features", "positives", "rows with a copy",
             "train / validation / test rows used (positives)"]]  # fmt: skip
    for name, t in written["tables"].items():
        used = " / ".join(f"{p['rows']:,} ({p['positives']})" for p in t["used"].values())
        share = f"{t['positives']:,} ({100 * t['positives'] / t['rows']:.1f} %)"
        copies = f"{t['rows_with_a_copy']:,}"
        rows.append([name, f"{t['rows']:,}", str(t["features"]), share, copies, used])
    return markdown(rows)


def _arms(written: Written, model: str) -> str:
    rows = [["arm", "AP points", "tables up / down", "p over tables", "wins / ties / losses",
             "recall points", "pAUC points", "kept its start"]]  # fmt: skip
    by_metric = {metric: compare(written, model, metric) for metric in METRICS}
    for arm in arms_of(written, model):
        found = {
            metric: overall([t.mean for t in of_arm[arm].values()])
            for metric, of_arm in by_metric.items()
        }
        shown = {m: f"{o.mean:+.2f} ± {o.error:.2f}" for m, o in found.items()}
        ap, boosting = found["ap"], arm == written["boosting"]
        kept = "" if boosting else f"{100 * kept_start(written, model, arm):.0f} %"
        name = f"**{arm}**" if arm in written["ours"] else arm
        if arm == written["base"]:
            name, kept = "BCE, not continued", ""
        rows.append([
            name, shown["ap"], f"{ap.up} / {ap.down}", f"{ap.p:.2f}", record(by_metric["ap"][arm]),
            shown["recall"], shown["pauc"], kept,
        ])  # fmt: skip
    return markdown(rows)


def _plain(written: Written, model: str) -> str:
    """What the wins and losses would be, were the splits independent."""
    found = compare(written, model, "ap", 0.0)
    shown = [name for name in found if name != written["boosting"]]
    verdicts = [on_table.verdict for name in shown for on_table in found[name].values()]
    counts = " / ".join(str(verdicts.count(v)) for v in ("win", "tie", "loss"))
    return (
        f"With a plain paired t-test over seeds, as if splits were independent, the {len(shown)} "
        f"arms but boosting have {counts} wins / ties / losses in AP together, after the same "
        "correction."
    )


def _tables(written: Written, model: str) -> str:
    names = [*written["results"]]
    control = [100 * _mean(written, name, model, written["control"]) for name in names]
    rows = [["arm", *names], [f"{written['control']}: AP x 100", *(f"{c:.1f}" for c in control)]]
    for arm, on_tables in compare(written, model, "ap").items():
        name = "BCE, not continued" if arm == written["base"] else arm
        rows.append([name, *(_cell(on_tables[t]) for t in names)])
    return markdown(rows)


def _mean(written: Written, table: str, model: str, arm: str) -> float:
    values = runs(written, table, model, arm)["ap"]
    return float(sum(values) / len(values))


def _cell(on_table: OnTable) -> str:
    return f"{on_table.mean:+.1f} ± {on_table.half:.1f}{MARK[on_table.verdict]}"


def _times(written: Written) -> str:
    epochs = written["epochs"]
    models = [*epochs["models"]]
    rows = [["arm", *(f"{m}: time / time of BCE (s per epoch)" for m in models)]]
    for arm in epochs["models"][models[0]]:
        cells = (epochs["models"][m][arm] for m in models)
        rows.append([arm, *(f"{c['ratio']:.2f} ({c['seconds']:.3g})" for c in cells)])
    rows_used = written["tables"][epochs["table"]]["used"]["train"]["rows"]
    batch = written["protocol"]["budget"]["batch"]
    note = (
        f"One network, {epochs['table']}, {rows_used:,} rows in batches of {batch}, medians of "
        f"{epochs['repeats']} interleaved epochs, commit {(epochs['commit'] or 'none')[:12]}:"
    )
    return f"{note}\n\n{markdown(rows)}"


def _tried(written: Written) -> str:
    protocols = [part["protocol"] for part in parts(written)]
    protocol, total = protocols[0], {
        key: sum(p[key] for p in protocols)
        for key in ("configurations_per_table", "configurations_tried", "models_trained")
    }  # fmt: skip
    model = [*protocol["models"]][-1]
    later = {arm: c for p in protocols for arm, c in p["configurations"][model].items()}
    configurations = protocol["configurations"] | {model: later}
    scales = (
        f"{scale:g} times that for the {m}"
        for m, scale in protocol["rate_scale"].items()
        if scale != 1
    )
    return (
        f"{total['configurations_per_table']} configurations per table, "
        f"{total['configurations_tried']} in all, {total['models_trained']:,} models trained "
        f"on {len(protocol['seeds'])} seeds. Every arm has the same number. Rates are those of the "
        f"{model}, {', '.join(scales)}:\n\n{_space(configurations, model)}"
    )


def _space(configurations: dict[str, Any], model: str) -> str:
    rows = [["arm", "learning rates", "own parameter", "its values"]]
    for arm, tried in configurations[model].items():
        rates = ", ".join(f"{c['rate']:g}" for c in tried)
        own = next((key for key in tried[0] if key != "rate"), "")
        rows.append([arm, rates, own, ", ".join(_value(c[own]) for c in tried) if own else ""])
    for name in (key for key in configurations if isinstance(configurations[key], list)):
        tried = configurations[name]
        rates = ", ".join(f"{c['learning_rate']:g}" for c in tried)
        rows.append(
            [name, rates, "max_leaf_nodes", ", ".join(f"{c['max_leaf_nodes']}" for c in tried)]
        )
    return markdown(rows)


def _value(x: Any) -> str:
    return " to ".join(f"{v:g}" for v in x) if isinstance(x, (list, tuple)) else f"{x:g}"
