"""The tables and the plot of `benchmarks.choosing`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.lines import Line2D

from . import report
from .figures import BLUE, GREY, INK, ORANGE, new_figure, tidy

COLOURS = (ORANGE, BLUE)  # of the worlds
DASHED: Any = (0, (4, 1.5))
DOTTED: Any = (0, (1, 1.5))
DASHDOT: Any = (0, (5, 1.5, 1, 1.5))
FLOOR = 0.005  # where the logarithmic axis of shares ends
ALL: dict[str, tuple[Any, Callable[[Any], bool]]] = {"all": ("-", lambda arm: True)}
KEYS = ("loss", "tau", "unit", "queue", "keep", "warmup", "blend", "main", "grad")

Records = list[dict[str, Any]]


def show(written: dict[str, Any]) -> str:
    """Every measurement of every world."""
    tables = []
    for name, world in written["worlds"].items():
        control = world["control"]
        tables.append([
            f"== {name}: {100 * world['positives']:.2f} % positives; cross-entropy to the end: "
            f"AP {_cell(control['ap'])}, recall {_cell(control['recall'])}"
        ])  # fmt: skip
        rows = [["tau / spread", "saturation", "|smooth AP - AP|", "smooth AP - AP"]]
        rows += [
            [f"{t['tau']:g}", *(_cell(t[key]) for key in ("saturation", "error", "bias"))]
            for t in world["temperatures"]
        ]
        tables.append(report.align(rows))
        rows = [["rows of the pool", "positives", "none", "bias", "sd"]]
        rows += [
            [str(p["rows"]), f"{p['positives']:.1f}", f"{p['without']:.2f}", _cell(p["bias"]),
             _cell(p["sd"])]
            for p in world["pools"]
        ]  # fmt: skip
        tables.append(report.align(rows))
        for question, arms in world["questions"].items():
            rows = [[question, *KEYS, "AP gain [95 %] w/t/l", "recall gain [95 %]",
                     "over the usual arm", "over a still threshold", "saturation", "drift",
                     "stale"]]  # fmt: skip
            for arm in arms:
                gain = arm["ap_gain"]
                wins = f" {gain['wins']}/{gain['ties']}/{gain['losses']}"
                extra = [
                    _cell(arm[k]) if k in arm else ""
                    for k in ("over_still", "saturation", "drift", "stale")
                ]
                rows.append([
                    "", *(f"{arm[key]}" for key in KEYS), _cell(gain) + wins,
                    _cell(arm["recall_gain"]), _cell(arm["over_usual"]), *extra,
                ])  # fmt: skip
            tables.append(report.align(rows))
    return "\n\n".join("\n".join(table) for table in tables)


def _cell(value: dict[str, Any]) -> str:
    low, high = value["interval"]
    return f"{value['mean']:.4f} [{low:.4f}, {high:.4f}]"


def _line(
    ax: Axes, x: Sequence[float], values: Sequence[dict[str, Any]], scale: float, colour: str,
    style: Any = "-",
) -> None:  # fmt: skip
    """Means with their 95 % intervals."""
    low, high = zip(*(value["interval"] for value in values), strict=True)
    mean = [scale * value["mean"] for value in values]
    band = [[scale * v for v in ends] for ends in (low, high)]
    ax.fill_between(x, *band, color=colour, alpha=0.13, lw=0)
    ax.plot(x, mean, "o", linestyle=style, color=colour, markersize=3.5, lw=1.6)


def _each(written: dict[str, Any]) -> list[tuple[str, dict[str, Any], str]]:
    return [
        (name, world, colour)
        for (name, world), colour in zip(written["worlds"].items(), COLOURS, strict=True)
    ]


def _key(ax: Axes, styles: dict[str, Any], where: str = "best") -> None:
    """What the line styles mean; colours are those of the worlds."""
    handles = [Line2D([], [], color=INK, linestyle=style, lw=1.4) for style in styles.values()]
    ax.legend(handles, list(styles), fontsize=8.5, frameon=False, handlelength=2.6, loc=where)


def _logarithmic(axis: Axis) -> None:
    axis.axes.set(**{f"{axis.axis_name}scale": "log"})
    axis.set_major_formatter(lambda v, _: f"{v:,g}")


def draw(written: dict[str, Any], path: Path) -> None:
    """Rows of panels: temperature, queue, schedule."""
    figure = new_figure(13.2, 11.2)
    panels = figure.subplots(3, 3)
    for row, of in zip(panels, (_temperature, _queue, _schedule), strict=True):
        of(written, row)
    for ax in (panels[0, 1], *panels[1, 1:], *panels[2]):
        ax.axhline(0.0, color=GREY, lw=1.0, zorder=0)
    seeds = written["protocol"]["seeds"]
    handles = [Line2D([], [], color=colour, lw=3) for *_, colour in _each(written)]
    names = [f"{name}: {world['about']}" for name, world, _ in _each(written)]
    figure.legend(handles, names, loc="outside upper center", ncols=2, frameon=False, fontsize=10)
    figure.supxlabel(
        "Gains: over cross-entropy for all steps, on held-out rows. "
        f"Means and 95 % intervals of {seeds} paired seeds.",
        fontsize=9.5, color=GREY,
    )  # fmt: skip
    figure.savefig(path)


def _lines(
    ax: Axes, written: dict[str, Any], question: str, gain: str, x: Callable[[Any], float],
    styles: dict[str, tuple[Any, Callable[[Any], bool]]] = ALL, where: str = "best",
) -> None:  # fmt: skip
    """The gain of every arm against a setting; one line for each world and each choice of arms."""
    for _, world, colour in _each(written):
        for style, chosen in styles.values():
            arms = sorted(filter(chosen, world["questions"][question]), key=x)
            _line(ax, [x(a) for a in arms], [a[gain] for a in arms], 100, colour, style)
    if len(styles) > 1:
        _key(ax, {label: style for label, (style, _) in styles.items()}, where)


def _temperature(written: dict[str, Any], panels: Sequence[Axes]) -> None:
    styles = {"saturation": "-", "error": DASHED}
    for _, world, colour in _each(written):
        found = world["temperatures"]
        for key, style in styles.items():
            _line(panels[0], [t["tau"] for t in found], [t[key] for t in found], 100, colour, style)
    ranked = written["protocol"]["ranked"]
    texts = (f"positives without gradient, {ranked} rows, %", "|smooth AP - AP|, points")
    _key(panels[0], dict(zip(texts, styles.values(), strict=True)), "upper center")
    panels[0].set_title("saturation and error at the end of cross-entropy", fontsize=10)
    tidy(panels[0], "tau / spread of the scores", "")
    _lines(panels[1], written, "tau", "ap_gain", lambda a: a["tau"], {
        "spread at the switch": ("-", lambda a: a["unit"] == "frozen"),
        "spread of the pool": (DASHED, lambda a: a["unit"] == "spread"),
    }, "upper left")  # fmt: skip
    panels[1].set_title("AP after training, by temperature", fontsize=10)
    tidy(panels[1], "tau / spread of the scores", "AP gain, points")
    for ax in panels[:2]:
        _logarithmic(ax.xaxis)
    _modes(written, panels[2])


def _modes(written: dict[str, Any], ax: Axes) -> None:
    labels: list[str] = []
    for at, (_, world, colour) in enumerate(_each(written)):
        arms = world["questions"]["tau over time"]
        labels = [f"{a['unit']}, {'after warmup' if a['warmup'] else 'from scratch'}" for a in arms]
        for row, arm in enumerate(arms):
            y = row + 0.2 * at - 0.1
            ax.plot([100 * v for v in arm["ap_gain"]["interval"]], [y, y], color=colour, lw=2.0)
            ax.plot(100 * arm["ap_gain"]["mean"], y, "o", color=colour, markersize=5)
    ax.set_yticks(range(len(labels)), labels)
    ax.invert_yaxis()
    ax.axvline(0.0, color=GREY, lw=1.0, zorder=0)
    ax.set_title("AP after training, by temperature over time", fontsize=10)
    tidy(ax, "AP gain, points", "")


def _queue(written: dict[str, Any], panels: Sequence[Axes]) -> None:
    styles = {"sd": "-", "bias": DASHED}
    for _, world, colour in _each(written):
        found = world["pools"]
        for key, style in styles.items():
            shares = [
                {"mean": p[key]["mean"] / p["ap"],
                 "interval": [max(v / p["ap"], FLOOR) for v in p[key]["interval"]]}
                for p in found
            ]  # fmt: skip
            _line(panels[0], [p["positives"] for p in found], shares, 100, colour, style)
    _key(panels[0], styles)
    panels[0].set_title("smooth AP of a random pool around that of all rows", fontsize=10)
    tidy(panels[0], "positives in the pool", "% of the value of all rows")
    _logarithmic(panels[0].yaxis)
    panels[0].set_ylim(bottom=100 * FLOOR)
    batch, quantile = (written["protocol"][key] for key in ("batch", "quantile"))
    _lines(panels[1], written, "queue", "ap_gain", lambda a: a["queue"] + batch)
    panels[1].set_title(f"AP after training, by pool (batches of {batch})", fontsize=10)
    tidy(panels[1], "rows of queue and batch", "AP gain, points")
    _lines(panels[2], written, "queue of recall", "recall_gain",
           lambda a: (a["queue"] + batch) * quantile, {
        "threshold that moves": ("-", lambda a: a["grad"] == "implicit"),
        "constant threshold": (DOTTED, lambda a: a["grad"] == "none"),
    })  # fmt: skip
    panels[2].set_title(f"recall in the top {100 * quantile:g} %, by pool", fontsize=10)
    tidy(panels[2], "rows of queue and batch, in units of 1 / quantile", "recall gain, points")
    for ax in panels:
        _logarithmic(ax.xaxis)


def _schedule(written: dict[str, Any], panels: Sequence[Axes]) -> None:
    _lines(panels[0], written, "warmup", "ap_gain", lambda a: 100 * a["warmup"], {
        "spread at the switch": ("-", lambda a: a["unit"] == "frozen" and not a["blend"]),
        "the same, 20 % blend": (DOTTED, lambda a: a["blend"] > 0),
        "spread of the pool": (DASHED, lambda a: a["unit"] == "spread"),
    })  # fmt: skip
    panels[0].set_title("AP after training, by warmup", fontsize=10)
    tidy(panels[0], "% of the steps in warmup", "AP gain, points")
    _lines(panels[1], written, "weight", "ap_gain", lambda a: a["main"])
    _lines(panels[2], written, "weight at the top", "recall_gain", lambda a: a["main"], {
        "recall": ("-", lambda a: (a["loss"], a["grad"]) == ("recall", "implicit")),
        "recall, constant threshold": (
            DOTTED, lambda a: (a["loss"], a["grad"]) == ("recall", "none")
        ),
        "partial AUC, trapezoid": (
            DASHED, lambda a: (a["loss"], a["grad"]) == ("trapezoid", "implicit")
        ),
        "partial AUC, pairwise": (DASHDOT, lambda a: a["loss"] == "pairwise"),
    })  # fmt: skip
    for ax, loss, metric in (
        (panels[1], "AP loss", "AP"),
        (panels[2], "losses of the top", "recall"),
    ):
        ax.set_title(f"{metric} by the weight of the {loss}", fontsize=10)
        tidy(ax, "weight of the ranking loss, the rest cross-entropy", f"{metric} gain, points")
