"""A picture of every loss for its page: ``python -m benchmarks.pictures``.

The gradient of the metric with respect to each score of one list, drawn against that score: what
the loss pulls up and what it pushes down. Of the focal losses, which look at one row at a time, the
gradient of that row.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from scipy.stats import norm
from torch import Tensor

import proxy_losses as P
from proxy_losses._metrics import METRICS, Metric

from . import figures

PAGES = Path(P.__file__).parent / "guide" / "losses"
ROWS, POSITIVES, TAU = 400, 20, 0.25
# Settings that show something on a list of this length, of the options that a metric has.
SHOWN = {"quantile": 0.05, "beta": 0.05, "k": 20}


def the_list() -> tuple[Tensor, Tensor]:
    """Scores [400] float64 and positives [400]: the quantiles of two normal heaps."""
    heaps = [norm.ppf((np.arange(n) + 0.5) / n) for n in (ROWS - POSITIVES, POSITIVES)]
    scores = np.concatenate([heaps[0], 1.3 + 0.9 * heaps[1]])
    return torch.tensor(scores), torch.arange(ROWS) >= ROWS - POSITIVES


def settings_of(metric: Metric) -> dict[str, Any]:
    """What the picture sets; an option that is off by default stays off."""
    return {
        o.name: SHOWN[o.name] for o in metric.options if o.name in SHOWN and o.default is not None
    }


def pushes(metric: Metric) -> tuple[Tensor, Tensor, Tensor]:
    """Scores, positives and the gradient of the metric's value with respect to each score."""
    scores, pos = the_list()
    scores.requires_grad_()
    value = metric.function(scores, pos, TAU, **settings_of(metric))
    (gradient,) = torch.autograd.grad(value, scores)
    return scores.detach(), pos, gradient


def draw_pushes(ax: Axes, metric: Metric) -> None:
    """Sticks up for rows that the loss pulls up, down for those that it pushes down."""
    scores, pos, gradient = pushes(metric)
    height = gradient / gradient.abs().max()
    for rows, colour, name in (
        (~pos, figures.BLUE, "a negative"),
        (pos, figures.ORANGE, "a positive"),
    ):
        ax.vlines(scores[rows], 0, height[rows], color=colour, lw=0.9)
        ax.plot(scores[rows], height[rows], "o", color=colour, ms=2.6, label=name)
    ax.axhline(0, color=figures.INK, lw=0.7)
    ax.set_ylim(min(-0.5, 1.1 * float(height.min())), 1.1)
    figures.tidy(ax, "score of the row", "pull up (> 0) or push down\n(largest = 1)")
    ax.legend(loc="upper left", frameon=False, fontsize=9)
    shown = "".join(f", {name} {x:g}" for name, x in settings_of(metric).items())
    ax.set_title(
        f"{metric.table}: {ROWS} rows, {POSITIVES} positives, temperature {TAU:g}{shown}",
        fontsize=9.5,
        color=figures.INK,
        loc="left",
    )


def draw_focal(ax: Axes) -> None:
    """The gradient of one row against its logit."""
    logit = torch.linspace(-5, 5, 401, dtype=torch.float64, requires_grad=True)
    sides = (0.0, figures.BLUE, "negative"), (1.0, figures.ORANGE, "positive")
    for gamma, style in ((0.0, ":"), (2.0, "-")):
        for label, colour, name in sides:
            loss = P.sigmoid_focal(
                logit, torch.full_like(logit, label), alpha=-1, gamma=gamma, reduction="sum"
            )
            (gradient,) = torch.autograd.grad(loss, logit)
            what = f"a {name}, gamma {gamma:g}" + (" (cross-entropy)" if gamma == 0 else "")
            ax.plot(logit.detach(), -gradient, color=colour, ls=style, lw=1.8, label=what)
    ax.axhline(0, color=figures.INK, lw=0.7)
    figures.tidy(ax, "logit of the row", "pull up (> 0) or push down")
    ax.legend(loc="lower left", frameon=False, fontsize=8.5)
    title = "focal loss: what is already right hardly moves"
    ax.set_title(title, fontsize=9.5, color=figures.INK, loc="left")


def draw(folder: Path, metrics: Sequence[Metric | None] = (*METRICS, None)) -> list[Path]:
    """One PNG for each metric; None stands for the focal losses, which have no record."""
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for metric in metrics:
        figure = figures.new_figure(7.2, 3.0)
        ax = figure.add_subplot()
        if metric is None:
            draw_focal(ax)
        else:
            draw_pushes(ax, metric)
        written.append(folder / f"{metric.name if metric else 'focal'}.png")
        figure.savefig(written[-1], metadata={"Software": None})
    return written


def main(argv: Sequence[str] | None = None) -> int:
    """The command line."""
    options = argparse.ArgumentParser(prog="python -m benchmarks.pictures", description=__doc__)
    options.add_argument("--out", type=Path, default=PAGES, help="folder of the pictures")
    print(*draw(options.parse_args(argv).out), sep="\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
