"""The tables and the plot of what was measured."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from ..figures import BLUE, GREY, INK, ORANGE, new_figure, tidy
from ..real_data.stats import OVERLAP, holm, resampled
from ..report import markdown
from .arms import CONTROL, LOGISTIC, MODES
from .metrics import METRICS, SCALE

PAGE = Path(__file__).with_name("README.md")
OURS = ("Smooth-AP", "half")  # how the names of our losses begin

Written = dict[str, Any]


def whole(of_split: dict[str, Any], protocol: Written) -> bool:
    """Whether all of a split was run."""
    return all({*MODES} <= {*of_split.get(m, {})} for m in protocol["configurations"])


def splits(written: Written) -> list[dict[str, Any]]:
    """Those that were run to their end."""
    return [s for s in written["results"].values() if whole(s, written["protocol"])]


def values(written: Written, model: str, mode: str, arm: str, metric: str) -> list[float]:
    """Of every split, in points; enrichment as it is."""
    return [SCALE[metric] * one[model][mode][arm][metric] for one in splits(written)]


def compare(
    written: Written, model: str, mode: str, arms: list[str], metric: str
) -> dict[str, dict[str, Any]]:
    """Arms less the control of that model and mode; the start of the linear model among them."""
    control = values(written, model, mode, CONTROL, metric)
    found = {}
    for arm in arms:
        mine = values(written, model, "start" if arm == LOGISTIC else mode, arm, metric)
        apart = [a - b for a, b in zip(mine, control, strict=True)]
        mean, half, p = resampled(apart, OVERLAP)
        up, down = sum(d > 0 for d in apart), sum(d < 0 for d in apart)
        found[arm] = {"mean": mean, "half": half, "p": p, "up": up, "down": down, "apart": apart}
    for one, sure in zip(found.values(), holm([f["p"] for f in found.values()]), strict=True):
        one["sure"] = sure
    return found


def shown(written: Written, model: str, mode: str) -> list[str]:
    """The arms of a table, without the control."""
    others = [arm for arm in written["protocol"]["configurations"][model][mode] if arm != CONTROL]
    return [LOGISTIC, *others] if model == "linear" else others


def table(written: Written, model: str, mode: str) -> str:
    """Every metric of the control, and by how much the others differ from it."""
    rows = [[f"{model}, {mode}", *METRICS.values()]]
    means = [np.mean(values(written, model, mode, CONTROL, metric)) for metric in METRICS]
    rows.append([f"{CONTROL}, the control", *(f"{mean:.1f}" for mean in means)])
    arms = shown(written, model, mode)
    found = {metric: compare(written, model, mode, arms, metric) for metric in METRICS}
    for arm in arms:
        rows.append([arm, *(_gain(found[metric][arm]) for metric in METRICS)])
    return markdown(rows)


def _gain(one: dict[str, Any]) -> str:
    star = "*" if one["sure"] else ""
    return f"{one['mean']:+.2f} ± {one['half']:.2f}{star} ({one['up']}/{one['down']})"


def block(written: Written) -> str:
    """Markdown, without the marks."""
    protocol, machine = written["protocol"], written["machine"]
    done, tried = len(splits(written)), protocol["configurations_per_split"]
    text = (
        f"{protocol['molecules']:,} molecules, {protocol['actives']:,} active, "
        f"{protocol['scaffolds']:,} scaffolds, {done} splits; commit "
        f"{(written['commit'] or 'none')[:12]}, {written['date'][:10]}, {machine['cpu']}, "
        f"1 thread, {written['cpu_s'] / 60:.0f} CPU minutes. "
        f"{tried} configurations a split, {tried * done} fitted."
    )
    models = [(model, mode) for model in protocol["configurations"] for mode in MODES]
    return "\n\n".join([text, *(table(written, model, mode) for model, mode in models)])


def draw(written: Written, path: Path) -> None:
    """Enrichment at 1 % less that of the control, split by split."""
    models = [*written["protocol"]["configurations"]]
    figure = new_figure(11.0, 6.4)
    panels = figure.subplots(len(MODES), len(models), sharex=True)
    for row, mode in zip(panels, MODES, strict=True):
        for ax, model in zip(row, models, strict=True):
            arms = shown(written, model, mode)
            found = compare(written, model, mode, arms, "ef1")
            ax.axvline(0, color=INK, linewidth=1)
            for k, arm in enumerate(arms):
                colour = BLUE if arm.startswith(OURS) else GREY if arm == LOGISTIC else ORANGE
                one = found[arm]
                ends = [one["mean"] - one["half"], one["mean"] + one["half"]]
                ax.plot(ends, [k, k], color=colour, linewidth=2)
                ax.plot(one["mean"], k, "o", color=colour, markersize=6)
                ax.plot(one["apart"], [k + 0.25] * len(one["apart"]), "|", color=colour,
                        markersize=7)  # fmt: skip
            ax.set_yticks(range(len(arms)), arms)
            ax.invert_yaxis()
            level = np.mean(values(written, model, mode, CONTROL, "ef1"))
            ax.set_title(f"{model}, {mode}; {CONTROL}: {level:.1f}", fontsize=10, color=INK)
            tidy(ax, "enrichment at 1 % less the control's; ticks are splits", "")
    figure.savefig(path)
