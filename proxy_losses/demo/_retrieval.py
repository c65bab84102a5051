"""Embeddings tuned for the retrieval of classes that no label was given for."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from sklearn.preprocessing import normalize
from torch import Tensor

from proxy_losses import RetrievalLoss
from proxy_losses.integrations.sklearn import LinearEmbedder

from ._common import (
    EPOCHS_VARIABLE,
    INK,
    OURS,
    SEED,
    SEVERAL,
    THEIRS,
    DemoError,
    Parser,
    file_of,
    interval,
    number,
    read_npz,
    shortened,
    tidy,
    writable,
)

DESCRIPTION = """\
Do your embeddings find rows of the same class, also of classes that nobody labelled? This fits
linear maps of embeddings on the rows of some classes, and asks every row of other classes for its
like: R@1 is how often the nearest row is of its class, mAP the mean average precision of the rows
ranked by cosine similarity. Compared are the raw embeddings; LinearEmbedder's whitening within
classes, a closed form; LinearEmbedder, which goes on from there with Smooth-AP; and the same start
and steps in a plain loop with RetrievalLoss, and with a contrastive loss (SupCon). All of it is
done once with the given labels, and once with a share of them drawn at random, as in labels by
hand or by heuristics.

Without flags the embeddings are made on the spot. With --data FILE they are yours: an .npz with x
[rows, width], from any frozen encoder, and y [rows], the class of each.
"""
EPILOG = f"""\
What to expect: whitening gains over the raw embeddings, and tuning over whitening, much on the made
embeddings, a few points on those of real encoders. With clean labels the two losses are mostly
alike; with wrong ones RetrievalLoss loses less on the made embeddings, and on others it may. The
demo prints what it measured. {EPOCHS_VARIABLE} = N shortens any run to N epochs.
"""
SHARES = (0.4, 0.15)  # of the classes, to learn from and to select by; the rest is judged
CLASSES, ROWS = 16, 8  # of a batch
STEPS = 20  # of an epoch: from one validation to the next
TEMPERATURES = (0.1, 0.2)  # that either loss is tuned with, to keep the better
MADE = 60, 24, 64  # classes, rows of each, width
ARMS = ("raw", "whitened", "contrastive loss", "RetrievalLoss", "LinearEmbedder")

Array = npt.NDArray[Any]


class Rows(NamedTuple):
    """Embeddings of some classes."""

    x: Array  # [rows, width] float32
    y: Array  # [rows]


def build_parser() -> Parser:
    """The flags, their defaults in their help."""
    parser = Parser("proxy-losses-demo retrieval", DESCRIPTION, EPILOG)
    add = parser.add_argument
    add("--data", metavar="FILE", help="an .npz with x and y (default: made embeddings)")
    flags: list[tuple[str, Any, float, str]] = [
        ("--noise", number(float, 0, 1), 0.2, "share of the labels that are drawn at random"),
        ("--seeds", number(int, 1, 1000), 5, "how often the classes are split anew"),
        ("--seed", SEED, 0, "the first of these seeds"),
        ("--total-epochs", SEVERAL, 15, f"epochs of tuning, of {STEPS} steps each"),
    ]
    for flag, kind, default, note in flags:
        add(flag, type=kind, default=default, metavar="N", help=f"{note} (default: %(default)s)")
    parser.add_out("demo-retrieval.png")
    return parser


def made(seed: int) -> Rows:
    """Classes that differ on few directions, among others that vary a lot within every class."""
    classes, rows, width = MADE
    rng = np.random.default_rng(seed)
    y = np.repeat(np.arange(classes), rows)
    centres = rng.normal(size=(classes, width)) * np.r_[np.ones(16), np.full(width - 16, 0.2)]
    within = np.r_[np.full(16, 0.8), np.linspace(2.0, 0.2, width - 16)]
    spread = rng.gamma(2.0, 0.5, size=(len(y), 1))  # some rows lie far out
    x = centres[y] + spread * within * rng.normal(size=(len(y), width))
    return Rows((x @ np.linalg.qr(rng.normal(size=(width, width)))[0]).astype(np.float32), y)


def load(data: str) -> Rows:
    """The embeddings of a file."""
    path = file_of(data, (".npz",))
    x, y = read_npz(path, "xy")
    if x.ndim != 2 or x.dtype.kind not in "fiu" or y.shape != x.shape[:1]:
        raise DemoError(
            f"{path}: x must be numbers [rows, width] and y [rows], got {x.dtype} {list(x.shape)} "
            f"and {list(y.shape)}"
        )
    x = x.astype(np.float32)
    if not np.isfinite(x).all():
        raise DemoError(f"{path}: x holds NaN or infinite numbers")
    return Rows(x, np.unique(y, return_inverse=True)[1])


def split_classes(rows: Rows, seed: int) -> list[Rows]:
    """Rows to learn from, to select by, and to be judged on; no class is in two of them."""
    usable = np.flatnonzero(np.bincount(rows.y) > 1)
    if len(usable) < 10:
        raise DemoError(
            f"there are {len(usable)} classes of two rows or more: at least 10 are needed, to "
            "learn from some and to be judged on others"
        )
    order = np.random.default_rng(seed).permutation(usable)
    ends = [round(SHARES[0] * len(order)), round(sum(SHARES) * len(order))]
    ends[1] = max(ends[1], ends[0] + 2)
    parts = [np.isin(rows.y, classes) for classes in np.split(order, ends)]
    return [Rows(rows.x[part], rows.y[part]) for part in parts]


def with_noise(rows: Rows, share: float, rng: np.random.Generator) -> Rows:
    """A share of the labels drawn anew, at the rate of the classes."""
    wrong = rng.random(len(rows.y)) < share
    return rows._replace(y=np.where(wrong, rng.choice(rows.y, len(rows.y)), rows.y))


def contrastive(embeddings: Tensor, labels: Tensor, temperature: float) -> Tensor:
    """Supervised contrastive loss (Khosla et al., 2020): each positive against all other rows."""
    z = torch.nn.functional.normalize(embeddings)
    itself = torch.eye(len(z), dtype=torch.bool)
    logits = (z @ z.T / temperature).masked_fill(itself, -torch.inf)
    positive = (labels[:, None] == labels) & ~itself
    apart = (logits.logsumexp(1, keepdim=True) - logits).where(positive, torch.zeros(()))
    count = positive.sum(1)
    return (apart.sum(1) / count.clamp(min=1)).sum() / (count > 0).sum().clamp(min=1)


def tune(
    start: LinearEmbedder,
    losses: Sequence[Callable[[Tensor, Tensor], Tensor]],
    train: Rows,
    held: Rows,
    epochs: int,
    seed: int,
) -> LinearEmbedder:
    """The best map, by mAP on the held-out classes, on the way of Adam from the whitened one."""
    x = torch.from_numpy(normalize(train.x) - start.mean_)
    y = torch.from_numpy(train.y)
    members = [np.flatnonzero(train.y == k) for k in np.unique(train.y)]
    best, reached = start, start.score(*held)
    for loss_fn in losses:
        weight = torch.from_numpy(start.components_.copy()).requires_grad_()
        optimizer = torch.optim.Adam([weight], lr=start.learning_rate / x.shape[1] ** 0.5)
        rng = np.random.default_rng(seed)
        for step in range(1, epochs * STEPS + 1):
            drawn = rng.permutation(len(members))[:CLASSES]
            rows = np.concatenate([rng.permutation(members[k])[:ROWS] for k in drawn])
            optimizer.zero_grad()
            loss_fn(x[rows] @ weight.T, y[rows]).backward()
            optimizer.step()
            if step % STEPS == 0:
                now = copy.copy(start)
                now.components_ = weight.detach().numpy().copy()
                if (value := now.score(*held)) > reached:
                    best, reached = now, value
    return best


def judge(model: LinearEmbedder, test: Rows) -> tuple[float, float]:
    """R@1 and mAP in points."""
    z = model.transform(test.x)
    right = 0
    for start in range(0, len(z), 1024):
        near = z[start : start + 1024] @ z.T
        near[np.arange(len(near)), start + np.arange(len(near))] = -2.0
        right += int((test.y[near.argmax(1)] == test.y[start : start + 1024]).sum())
    return 100 * right / len(z), 100 * model.score(*test)


def compare(parts: Sequence[Rows], noise: float, epochs: int, seed: int) -> Array:
    """R@1 and mAP [arms, 2] on the unseen classes, in the order of `ARMS`."""
    rng = np.random.default_rng(seed)
    train, held = (with_noise(part, noise, rng) for part in parts[:2])

    def embedder(**settings: Any) -> LinearEmbedder:
        model = LinearEmbedder(random_state=seed, device="cpu", **settings)
        model.fit(train.x, train.y, X_val=held.x, y_val=held.y)
        return model

    whitened = embedder(max_iter=0)
    ours = [RetrievalLoss(temperature=tau) for tau in TEMPERATURES]
    theirs = [partial(contrastive, temperature=tau) for tau in TEMPERATURES]
    models = [
        embedder(max_iter=0, shrinkages=()),
        whitened,
        tune(whitened, theirs, train, held, epochs, seed),
        tune(whitened, ours, train, held, epochs, seed),
        embedder(max_iter=epochs * STEPS, n_iter_no_change=None),
    ]
    return np.array([judge(model, parts[2]) for model in models])


def run(argv: Sequence[str]) -> Array:
    """Parse, load, tune, print, draw."""
    args = build_parser().parse_args(argv)
    from tqdm import tqdm

    rows = load(args.data) if args.data else None
    epochs = min(args.total_epochs, shortened() or args.total_epochs)
    first = split_classes(rows or made(args.seed), args.seed)
    out = writable(args.out)
    sizes = [f"{len(np.unique(part.y))} classes ({len(part.y):,} rows)" for part in first]
    print(
        f"{args.data or 'made embeddings'}, width {first[0].x.shape[1]}: learnt from {sizes[0]}, "
        f"selected by {sizes[1]}, judged on {sizes[2]}\n"
        f"batches of {CLASSES} classes by {ROWS} rows, {epochs * STEPS} steps; the classes split "
        f"anew for each of {args.seeds} seeds, once with these labels and once with "
        f"{100 * args.noise:g} % of them drawn at random\n",
        flush=True,
    )
    found = []
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # tensors this small are slower on several
    try:
        with tqdm(total=2 * args.seeds, unit="fit", disable=None, leave=False) as bar:
            for seed in range(args.seed, args.seed + args.seeds):
                parts = split_classes(rows or made(seed), seed)
                for noise in (0.0, args.noise):
                    found.append(compare(parts, noise, epochs, seed))
                    bar.update()
    finally:
        torch.set_num_threads(threads)
    values = np.stack(found).reshape(args.seeds, 2, len(ARMS), 2)
    print(report(values, args.noise, len(first[2].y) / len(first[0].y) if rows else 0.0))
    save_figure(values, args.noise, out)
    print(f"picture: {out}", flush=True)
    return values


def report(values: Array, noise: float, overlap: float) -> str:
    """The table of [splits, clean or noisy, arms, R@1 or mAP], and what follows from it."""
    noisy = f"{100 * noise:g} % of labels random"
    lines = [
        f"On unseen classes, x 100{'':<4}{'labels as given':^17}   {noisy}",
        f"{'':<22}{'R@1':>11}{'mAP':>9}{'R@1':>11}{'mAP':>9}",
    ]
    for k, arm in enumerate(ARMS):
        cells = values.mean(0)[:, k].reshape(-1)
        lines.append(
            f"{arm:<22}" + "".join(f"{c:{w}.2f}" for c, w in zip(cells, (11, 9) * 2, strict=True))
        )
    lines.append("")
    for at, labels in enumerate(("labels as given", noisy)):
        for ours, theirs in ((4, 0), (4, 1), (3, 2)):
            gain = interval(values[:, at, ours, 1] - values[:, at, theirs, 1], overlap)
            lines.append(f"{labels}: {ARMS[ours]} - {ARMS[theirs]}: mAP {gain}: {gain.verdict}")
    if len(values) > 1:
        lines.append("(95 % intervals over the seeds. A tie: these cannot tell the two apart.)")
    if shortened():
        lines.append(f"{EPOCHS_VARIABLE} shortened the run: do not conclude from it.")
    return "\n".join(lines)


def save_figure(values: Array, noise: float, path: Path) -> None:
    """A line for each arm, from labels as given to noisy ones."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 3.9), dpi=130, layout="constrained")
    colours = ("#888888", "#888888", THEIRS, OURS, OURS)
    means = values.mean(0)
    axes = figure.subplots(1, 2, sharey=True)
    for ax, metric, name in zip(axes, (1, 0), ("mAP", "R@1"), strict=True):
        for k, colour in enumerate(colours):
            clean, noisy = means[:, k, metric]
            ax.plot([noisy, clean], [k, k], color=colour, linewidth=2, alpha=0.6, zorder=1)
            ax.plot(noisy, k, "o", color=colour, markerfacecolor="white", markersize=9)
            ax.plot(clean, k, "o", color=colour, markersize=9)
        ax.plot([], [], "o", color=INK, label="labels as given")
        ax.plot([], [], "o", color=INK, markerfacecolor="white", label=f"{100 * noise:g} % random")
        ax.set_yticks(range(len(ARMS)), ARMS)
        ax.set_ylim(len(ARMS) - 0.5, -0.5)
        low, high = means[:, :, metric].min(), means[:, :, metric].max()
        if high - low < 2:  # small differences look small
            ax.set_xlim((low + high) / 2 - 1.2, (low + high) / 2 + 1.2)
        ax.set_xlabel(f"{name} x 100 on unseen classes, mean over seeds ({len(values)})")
        ax.grid(axis="x", color="#dddddd")
        tidy(ax)
    axes[0].legend(loc="lower left", frameon=False, fontsize=9)
    figure.savefig(path)
