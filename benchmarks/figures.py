"""How all figures look."""

from __future__ import annotations

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

INK, GREY = "#333333", "#8a8a8a"
BLUE, ORANGE, GREEN, PURPLE = "#0b6e99", "#d9730d", "#3f7d20", "#7b4fa3"


def new_figure(width: float, height: float) -> Figure:
    figure = Figure(figsize=(width, height), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def tidy(ax: Axes, x: str, y: str) -> None:
    ax.set_xlabel(x, color=INK)
    ax.set_ylabel(y, color=INK)
    ax.spines[["top", "right"]].set_visible(False)
    ax.grid(True, which="major", color="#e6e6e6", linewidth=0.7)
    ax.tick_params(labelsize=9, colors=INK)
    ax.set_axisbelow(True)


def milliseconds(ax: Axes) -> None:
    """Plain numbers on a logarithmic axis of milliseconds."""
    ax.yaxis.set_major_formatter(lambda v, _: f"{v:,g}")
