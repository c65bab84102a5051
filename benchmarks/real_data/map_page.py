"""The map as a figure and as a page, from its JSON."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from ..report import markdown
from .stats import resampled

INK, GREY, LINEAR, NETWORK = "#222222", "#777777", "#1b7837", "#762a83"
CONTROL = "continued"


def _gains(arms: dict[str, list[float]], control: str = CONTROL) -> np.ndarray[Any, Any]:
    """AP x 100 over seeds."""
    return 100 * (np.array(arms["smooth_ap"]) - np.array(arms[control]))


def _mean_se(values: np.ndarray[Any, Any]) -> tuple[float, float]:
    if len(values) < 2:
        return float(values.mean()), 0.0
    return float(values.mean()), float(values.std(ddof=1) / len(values) ** 0.5)


def _clear(cell: dict[str, Any]) -> bool:
    """Whether the 95 % interval over tables leaves 0 out."""
    return cell["t95"] is not None and abs(cell["mean"]) > cell["t95"]


def draw(written: dict[str, Any], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 8.6), dpi=150, layout="constrained")
    grid = figure.add_gridspec(2, 2, height_ratios=(1.25, 1))
    _heat(figure, figure.add_subplot(grid[0, :]), written["cells"])
    _contested(figure.add_subplot(grid[1, 0]), written["made"]["contested"])
    _probes(figure.add_subplot(grid[1, 1]), written["made"]["probes"])
    figure.savefig(path)


def _heat(figure: Any, axes: Any, cells: dict[str, Any]) -> None:
    sizes, names = list(cells), list(next(iter(cells.values())))
    means = np.full((len(sizes), len(names)), np.nan)
    for i, size in enumerate(sizes):
        for j, name in enumerate(names):
            cell = cells[size][name]
            if cell is None:
                axes.text(j, i, "too few\ntables", ha="center", va="center", color=GREY, size=8)
                continue
            cell = cell[CONTROL]
            means[i, j] = cell["mean"]
            error = "" if cell["se"] is None else f" ± {cell['se']:.1f}"
            axes.text(
                j, i - 0.08, f"{cell['mean']:+.1f}{error}", ha="center", va="center", color=INK,
                size=10, weight="bold" if _clear(cell) else "normal",
            )  # fmt: skip
            axes.text(
                j, i + 0.24, f"{cell['up']} up, {cell['down']} down", ha="center", va="center",
                color=INK, size=7,
            )  # fmt: skip
    finite = means[np.isfinite(means)]
    limit = max(1.0, 1.4 * float(np.abs(finite).max())) if finite.size else 1.0
    image = axes.imshow(means, cmap="PRGn", vmin=-limit, vmax=limit, aspect="auto")
    axes.set_xticks(range(len(names)), [name.replace(", ", ",\n") for name in names])
    axes.set_yticks(range(len(sizes)), sizes)
    axes.set_ylabel("training rows")
    axes.set_title(
        "Real tables: test AP of Smooth-AP fine-tuning - BCE continued, points\n"
        "mean ± standard error over tables; bold where the 95 % interval leaves 0 out",
        size=10,
    )
    for side in axes.spines.values():
        side.set_visible(False)
    axes.tick_params(length=0)
    figure.colorbar(image, ax=axes, label="AP points", shrink=0.9)


def _contested(axes: Any, found: dict[str, Any]) -> None:
    angles = [float(angle) for angle in found]
    for model, colour in zip(next(iter(found.values())), (LINEAR, NETWORK), strict=False):
        values = np.array([_mean_se(_gains(models[model])) for models in found.values()])
        axes.errorbar(
            angles, values[:, 0], values[:, 1], color=colour, marker="o", ms=4, capsize=2,
            label=model,
        )  # fmt: skip
    axes.axhline(0, color=GREY, lw=0.8)
    axes.set_xticks(angles)
    axes.set_xlabel("angle between what the top and the bulk want, degrees")
    axes.set_ylabel("AP points over BCE continued")
    axes.set_title("Made tables with a contested top\nmean ± standard error over seeds", size=10)
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)


def _probes(axes: Any, found: dict[str, Any]) -> None:
    values = np.array([_mean_se(_gains(arms)) for arms in found.values()])
    axes.errorbar(range(len(found)), values[:, 0], values[:, 1], color=LINEAR, fmt="o", ms=4,
                  capsize=2)  # fmt: skip
    axes.axhline(0, color=GREY, lw=0.8)
    mean, error = _mean_se(values[:, 0])
    axes.set_xticks(range(len(found)), list(found))
    axes.set_xlabel("rare digit")
    axes.set_ylabel("AP points over BCE continued")
    axes.set_title(
        "Linear probes of a rare digit on an embedding of the others\n"
        f"mean ± standard error over seeds; over digits {mean:+.1f} ± {error:.1f}", size=10,
    )  # fmt: skip
    axes.spines[["top", "right"]].set_visible(False)


def _shown(cell: dict[str, Any] | None, control: str) -> str:
    if cell is None:
        return ""
    mean, half, up, down = (cell[control][key] for key in ("mean", "t95", "up", "down"))
    bounds = "" if half is None else f" [{mean - half:+.1f}, {mean + half:+.1f}]"
    return f"{mean:+.2f}{bounds}, {up}/{down}"


def _by_model(found: dict[str, Any]) -> list[list[str]]:
    models = list(next(iter(found.values())))
    rows = [["angle", *(f"{m}: {what}" for m in models
                        for what in ("BCE", "continued", "Smooth-AP - continued"))]]  # fmt: skip
    for angle, by_model in found.items():
        row = [angle]
        for arms in by_model.values():
            mean, error = _mean_se(_gains(arms))
            row += [f"{100 * np.mean(arms[name]):.1f}" for name in ("start", CONTROL)]
            row.append(f"{mean:+.2f} ± {error:.2f}")
        rows.append(row)
    return rows


def _by_table(written: dict[str, Any]) -> list[list[str]]:
    sizes = [size for size, row in written["found"].items() if row]
    rows = [["table", "capacity", *sizes]]
    names = list(next(iter(written["cells"].values())))
    for name in written["tables"]:
        for capacity in names:
            cells = []
            for size in sizes:
                arms = written["found"][size].get(capacity, {}).get(name)
                mean, half = (0.0, 0.0) if arms is None else resampled(_gains(arms))[:2]
                cells.append("" if arms is None else f"{mean:+.1f} ± {half:.1f}")
            if any(cells):
                rows.append([name, capacity, *cells])
    return rows


def text(written: dict[str, Any]) -> str:
    """The page."""
    cells, made, protocol = written["cells"], written["made"], written["protocol"]
    budget = protocol["budget"]
    names = list(next(iter(cells.values())))
    clear = [
        f"{size} rows, {name} ({cell[CONTROL]['mean']:+.1f})"
        for size, row in cells.items() for name, cell in row.items()
        if cell is not None and _clear(cell[CONTROL])
    ]  # fmt: skip
    filled = sum(cell is not None for row in cells.values() for cell in row.values())
    probes = [np.mean(_gains(arms)) for arms in made["probes"].values()]
    mean, error = _mean_se(np.array(probes))

    def grid(control: str) -> str:
        rows = [[size, *(_shown(cells[size][n], control) for n in names)] for size in cells]
        return markdown([["training rows", *names], *rows])

    return "\n".join([
        "# Where does Smooth-AP beat more cross-entropy? Training rows against capacity",
        "",
        "`python -m benchmarks.real_data.map --data FOLDER` writes this page from "
        "`benchmarks/results/real_data_map.json`. *BCE* is cross-entropy. AP is average precision, "
        "and a point is a hundredth of it.",
        "",
        "![map](../results/real_data_map.png)",
        "",
        "A model is trained with BCE to its best validated checkpoint. From there it makes "
        f"{budget['steps']} steps over all training rows, with BCE or with Smooth-AP, from the "
        "same start, with the same two learning rates to choose from. Validation AP chooses "
        "between the start and every tenth step. Linear models start from a logistic regression "
        "whose penalty is chosen by validation. Identical rows are on one side of a split. "
        f"There are {protocol['seeds']} splits per table, and no setting was tuned on this map. "
        "The unit is the table: one takes part in a cell if it has "
        f"{protocol['least_positives']} positives to train on, and a cell needs "
        f"{protocol['least_tables']} tables.",
        "",
        "## Smooth-AP minus BCE continued, in points of test AP",
        "",
        "Each cell is the mean over tables [95 % interval], and the tables that are up/down.",
        "",
        grid(CONTROL),
        "",
        f"Cells whose interval leaves 0 out: {'; '.join(clear) or 'none'}. Of {filled} cells one "
        "in twenty does so by chance.",
        "",
        "## Smooth-AP minus its start, the model trained with BCE",
        "",
        grid("start"),
        "",
        "## By table",
        "",
        "Smooth-AP minus BCE continued: the mean ± half of the 95 % interval over splits "
        "(corrected resampled t-test, since splits share rows).",
        "",
        markdown(_by_table(written)),
        "",
        "## Made tables with a contested top",
        "",
        "Most positives lie along one direction, with a few negatives above them. The other "
        "positives lie far out in another direction, at the angle of the row (`made.py`). The "
        "table has AP x 100 on test rows; ± is the standard error over seeds.",
        "",
        markdown(_by_model(made["contested"])),
        "",
        "## Linear probes of a rare class",
        "",
        "A network is trained on nine of ten digits, and a linear model then learns the tenth from "
        "its hidden units, with 12 images of it among about 600. Smooth-AP minus BCE continued: "
        f"{mean:+.2f} ± {error:.2f} over the ten digits, {sum(p > 0 for p in probes)} up, "
        f"{sum(p < 0 for p in probes)} down.",
        "",
    ])  # fmt: skip
