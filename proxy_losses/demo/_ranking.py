"""Warmup, blend, ranking loss; beside BCE that goes on; over paired seeds."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from proxy_losses import LossWarmupWrapper, SmoothAPLoss

from ._common import (
    COUNT,
    EPOCHS_VARIABLE,
    INK,
    OURS,
    POSITIVE,
    SEED,
    SEVERAL,
    THEIRS,
    TIE,
    DemoError,
    Interval,
    Parser,
    interval,
    number,
    shortened,
    tidy,
    writable,
)
from ._tables import MADE, Array, Part, Split, load_table, make_split, split_table, synthetic, thin

DESCRIPTION = """\
Does a ranking loss rank your positives higher than BCE does? This trains small models twice, from
the same weights and in the same batch order: once with BCE (binary cross-entropy) throughout, and
once with BCE that blends into Smooth-AP, a differentiable average precision. Either keeps its best
epoch on validation rows and is judged by average precision (AP) on test rows. All of it is done
anew for several seeds; the difference is printed with its 95 % interval, win or not, and drawn.

Without flags the rows are made on the spot, 1 % of them positive: a table whose top is contested,
where a linear model cannot have top and bulk right at once, and one with smooth odds, which BCE
fits as well. With --data FILE they are yours.

"proxy-losses-demo retrieval" tunes embeddings for retrieval instead; see its own --help.
"""
EPILOG = f"""\
What to expect: a win of 3 to 4 points for a linear model on the contested top; elsewhere ties, or
gains that other seeds and more epochs may take away; on most real tables ties. A tie means that
these seeds cannot tell the two apart. Each interval is a 95 % one by itself, so that of many one
may miss. {EPOCHS_VARIABLE} = N shortens any run to N epochs.
"""
STEPS = 1000  # of an arm, for which the default number of epochs is chosen
EPOCHS = (20, 40)  # the fewest and the most of that default
FEW_POSITIVES = 3  # of the rarest class in a batch, on average: below, a queue is used
T_OVERLAP = 0.2 / 0.6  # test rows over training rows: splits of one table share rows


class Case(NamedTuple):
    """One line of the table: rows and a model."""

    name: str
    split: Callable[[int], Split]  # of a seed
    hidden: int
    overlap: float  # of the splits of two seeds, 0 if each has its own rows


class Run(NamedTuple):
    """What one seed of a case found."""

    validation: dict[str, list[float]]  # arm -> AP of each epoch
    test: dict[str, float]  # arm -> AP on test of its best epoch
    switch: int  # epochs before the ranking loss has any weight


class Outcome(NamedTuple):
    """What all seeds of a case found, in points."""

    case: Case
    runs: list[Run]
    difference: Array  # [seeds]
    gain: Interval


def build_parser() -> Parser:
    """The flags, their defaults in their help."""
    parser = Parser("proxy-losses-demo", DESCRIPTION, EPILOG)
    add = parser.add_argument
    add(
        "--data",
        help="made (two made tables), synthetic (classes made by scikit-learn), digits (bundled "
        "with it), or a .csv, .parquet or .npz file; an .npz holds X and y (default: made; digits "
        "with --multiclass)",
    )
    add("--target", metavar="COLUMN", help="the label's column; of two values that are not 0 and "
        "1 the rarer is the positive; text columns beside it become one-hot")  # fmt: skip
    add("--multiclass", action="store_true", help="rank every class against the rest, beside "
        "CE (default: two classes; digits: 8 against the rest)")  # fmt: skip
    rate = number(float, 1e-6, 0.999)
    add("--pos-rate", type=rate, metavar="RATE", help="share of positives: of made rows (default: "
        "0.01; synthetic: 0.005), or to thin those of a table to (default: all)")  # fmt: skip
    flags: list[tuple[str, Any, Any, str]] = [
        ("--hidden", COUNT, None, "hidden units, 0 for a linear model (default: both 0 and 16)"),
        ("--seeds", number(int, 1, 1000), 5, "how many seeds (default: %(default)s)"),
        ("--seed", SEED, 0, "the first of them (default: %(default)s)"),
        ("--total-epochs", SEVERAL, None, f"epochs of an arm (default: about {STEPS} steps, from "
         "{} to {})".format(*EPOCHS)),
        ("--warmup-epochs", COUNT, None, "epochs of BCE alone (default: 4/10 of the total)"),
        ("--blend-epochs", COUNT, None, "epochs of both losses (default: 1/10 of the total)"),
        ("--batch-size", SEVERAL, 256, "rows of a training step (default: %(default)s)"),
        ("--queue-size", COUNT, None, "earlier rows that Smooth-AP ranks too (default: 8 batches "
         f"where a batch has fewer than {FEW_POSITIVES} positives, else 0)"),
        ("--temp-start", POSITIVE, 0.25, "Smooth-AP's temperature, in standard deviations of the "
         "scores (default: %(default)s)"),
        ("--temp-end", POSITIVE, None, "that of the last step (default: no change)"),
        ("--lr", POSITIVE, 0.02, "Adam's learning rate, for both arms (default: %(default)s)"),
    ]  # fmt: skip
    for flag, kind, default, note in flags:
        add(flag, type=kind, default=default, metavar="N", help=note)
    parser.add_out("demo.png")
    return parser


def plan_epochs(args: argparse.Namespace, steps: int) -> tuple[int, int, int]:
    """Warmup, blend and total epochs, after the defaults and the environment's shortening."""
    total = args.total_epochs or min(max(round(STEPS / steps), EPOCHS[0]), EPOCHS[1])
    warmup = 4 * total // 10 if args.warmup_epochs is None else args.warmup_epochs
    blend = total // 10 if args.blend_epochs is None else args.blend_epochs
    if warmup + blend >= total:
        raise DemoError(
            f"warmup and blend take {warmup} + {blend} epochs of {total}: raise --total-epochs "
            "above their sum"
        )
    cap = min(total, shortened() or total)
    # In proportion, but a phase that was asked for stays while there is room for the last.
    warmup = min(cap - 1, max(min(warmup, 1), warmup * cap // total))
    return warmup, min(cap - 1 - warmup, max(min(blend, 1), blend * cap // total)), cap


def cases_of(args: argparse.Namespace) -> list[Case]:
    """Every table with every model."""
    data = args.data or ("digits" if args.multiclass else "made")
    if args.multiclass and (args.pos_rate or data == "made"):
        raise DemoError("--multiclass is not for made rows, and not with --pos-rate")
    if args.target and data in ("made", "synthetic", "digits"):
        raise DemoError(f"--target is for files with named columns; {data} has none")
    splits: dict[str, Callable[[int], Split]]
    if data == "made":
        splits = {name: partial(make_split, name, args.pos_rate or 0.01) for name in MADE}
    elif data == "synthetic":
        rate = args.pos_rate or 0.005
        splits = {data: lambda seed: split_table(synthetic(seed, rate, args.multiclass), seed)}
    else:
        table = load_table(data, args.target, args.multiclass)
        table = thin(table, args.pos_rate, args.seed) if args.pos_rate else table
        splits = {table.name: partial(split_table, table)}
    overlap = 0.0 if data in ("made", "synthetic") else T_OVERLAP
    models = [0, 16] if args.hidden is None else [args.hidden]
    return [Case(name, split, h, overlap) for name, split in splits.items() for h in models]


def build_model(columns: int, hidden: int, outputs: int, seed: int) -> nn.Module:
    """A linear model or one with a hidden layer.

    Of several classes it gives log-probabilities, so that a class is ranked, in training and in
    the test, by how probable it is.
    """
    torch.manual_seed(seed)
    layers: list[nn.Module] = [nn.Linear(columns, hidden or outputs)]
    if hidden:
        layers += [nn.ReLU(), nn.Linear(hidden, outputs)]
    return nn.Sequential(*layers, *([nn.LogSoftmax(dim=1)] if outputs > 1 else []))


def cross_entropy(outputs: Tensor, targets: Tensor) -> Tensor:
    """BCE of logits [N, 1], or CE of log-probabilities [N, C]."""
    if outputs.shape[1] == 1:
        return F.binary_cross_entropy_with_logits(outputs[:, 0], targets.to(outputs.dtype))
    return F.nll_loss(outputs, targets)


@torch.no_grad()
def average_precision(model: nn.Module, part: Part) -> float:
    """In points; of several classes the mean over classes."""
    from sklearn.metrics import average_precision_score

    scores = model(torch.from_numpy(part.x)).numpy()
    if not np.isfinite(scores).all():
        raise DemoError("the scores are no longer finite: try a smaller --lr")
    truth = part.y if scores.shape[1] == 1 else np.eye(scores.shape[1])[part.y]
    return 100 * float(average_precision_score(truth, scores))


def train_pair(
    case: Case, seed: int, args: argparse.Namespace, on_epoch: Callable[[str], None] | None
) -> Run:
    """Both arms, from the same weights and in the same batch order."""
    split = case.split(seed)
    x, y = (torch.from_numpy(array) for array in split.train)
    classes = int(y.max()) + 1
    outputs = 1 if classes == 2 else classes
    steps = -(-len(y) // args.batch_size)
    warmup, blend, total = plan_epochs(args, steps)
    queue_size = args.queue_size
    if queue_size is None:
        rarest = args.batch_size * int(y.bincount().min()) / len(y)
        queue_size = 8 * args.batch_size if rarest < FEW_POSITIVES else 0
    ranking = LossWarmupWrapper(
        warmup_loss=cross_entropy,
        main_loss=SmoothAPLoss(outputs, queue_size=queue_size, temperature_unit="spread"),
        warmup_epochs=warmup,
        blend_epochs=blend,
        temp_start=args.temp_start,
        temp_end=args.temp_end or args.temp_start,
        temp_decay_steps=max(1, (total - warmup) * steps - 1),
    )
    losses: dict[str, Any] = {"BCE" if outputs == 1 else "CE": cross_entropy, "Smooth-AP": ranking}
    models = {arm: build_model(x.shape[1], case.hidden, outputs, seed) for arm in losses}
    optimizers = {arm: torch.optim.Adam(m.parameters(), lr=args.lr) for arm, m in models.items()}
    run = Run({arm: [] for arm in losses}, {}, warmup)
    draw, step = torch.Generator().manual_seed(seed), 0
    for epoch in range(total):
        ranking.on_train_epoch_start(epoch)
        sums = dict.fromkeys(losses, 0.0)
        for rows in torch.randperm(len(y), generator=draw).split(args.batch_size):
            ranking.on_train_batch_start(step)
            for arm, loss_fn in losses.items():
                loss = loss_fn(models[arm](x[rows]), y[rows])
                optimizers[arm].zero_grad()
                loss.backward()
                optimizers[arm].step()
                sums[arm] += loss.item() / steps
            step += 1
        for arm, model in models.items():
            value = average_precision(model, split.validation)
            if value > max(run.validation[arm], default=-1.0):
                run.test[arm] = average_precision(model, split.test)
            run.validation[arm].append(value)
        phase = "warmup" if ranking.in_warmup else "blend" if ranking.in_blend else "ranking"
        if on_epoch is not None:
            seen = [f"{sums[arm]:7.4f}  {run.validation[arm][-1]:6.2f}" for arm in losses]
            on_epoch(
                f"{epoch + 1:>3}/{total:<3}   {phase:<7}  {ranking.main_weight:5.2f}      "
                + "        ".join(seen)
            )
    return run


def model_name(hidden: int) -> str:
    return f"MLP of {hidden} units" if hidden else "linear model"


def name_of(case: Case) -> str:
    return f"{case.name} ({model_name(case.hidden)})"


def table_row(found: Outcome) -> str:
    """One line of the result."""
    means = [np.mean([run.test[arm] for run in found.runs]) for arm in found.runs[0].test]
    up = f"{int((found.difference > 0).sum())}/{len(found.runs)}"
    return (
        f"{found.case.name:<16.16}  {model_name(found.case.hidden):<15}  {means[0]:6.2f}  "
        f"{means[1]:9.2f}  {found.gain!s:>22}  {up:<4}  {found.gain.verdict}"
    )


def verdict(outcomes: Sequence[Outcome], plain: str) -> str:
    """What was measured in words."""
    lines = []
    for word in ("win", "loss", "tie"):
        where = [name_of(o.case) for o in outcomes if o.gain.verdict == word]
        if where:
            lines.append(f"A {word} for Smooth-AP over {plain}: {', '.join(where)}.")
    if any(o.gain.verdict == "tie" for o in outcomes):
        lines.append(
            "A tie: the interval holds 0, so these seeds cannot tell the two apart; it may still "
            "hide a gain or a loss as large as its ends."
        )
    if np.isnan(outcomes[0].gain.half):
        lines.append("One seed says nothing: it moves by points. Raise --seeds.")
    runs = [run for o in outcomes for run in o.runs]
    unused = sum(int(np.argmax(run.validation["Smooth-AP"])) < run.switch for run in runs)
    if unused:
        lines.append(
            f"In {unused} of {len(runs)} runs the best validation epoch of Smooth-AP lies in its "
            "warmup: there the ranking loss was not used."
        )
    rising = []
    for found in outcomes:
        traces = [trace for run in found.runs for trace in run.validation.values()]
        last = sum(trace[-1] == max(trace) for trace in traces)
        if 2 * last > len(traces):
            rising.append(f"{name_of(found.case)} in {last} of {len(traces)} trainings")
    if rising:
        lines.append(
            f"The last epoch was the best of {', '.join(rising)}: more --total-epochs may change "
            "the outcome."
        )
    if shortened():
        lines.append(f"{EPOCHS_VARIABLE} shortened the run: do not conclude from it.")
    return "\n".join(lines)


def run(argv: Sequence[str]) -> list[Outcome]:
    """Parse, load, train, print, draw."""
    args = build_parser().parse_args(argv)
    from tqdm import tqdm

    cases = cases_of(args)
    split = cases[0].split(args.seed)
    steps = -(-len(split.train.y) // args.batch_size)
    warmup, blend, total = plan_epochs(args, steps)
    out = writable(args.out)
    plain = "BCE" if split.train.y.max() == 1 else "CE"
    sizes = [
        f"{name} {len(part.y):,} rows" + f" ({part.y.sum():,} positive)" * (plain == "BCE")
        for name, part in zip(Split._fields, split, strict=True)
    ]
    print(
        f"{cases[0].name}: {', '.join(sizes)}, {split.train.x.shape[1]} features\n"
        f"{steps} steps an epoch, of {args.batch_size} rows; epochs: {warmup} of {plain} alone, "
        f"{blend} of both, {total - warmup - blend} of Smooth-AP\n\n"
        f"Seed {args.seed}, {model_name(cases[0].hidden)}: training loss, and AP x 100 on "
        f"validation rows\nepoch     phase    weight     {plain:<18}     Smooth-AP",
        flush=True,
    )
    outcomes: list[Outcome] = []
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # tensors this small are slower on several
    try:
        with tqdm(total=len(cases) * args.seeds, unit="run", disable=None, leave=False) as bar:
            tell = partial(bar.write, file=sys.stdout)
            for case in cases:
                runs: list[Run] = []
                for seed in range(args.seed, args.seed + args.seeds):
                    runs.append(train_pair(case, seed, args, None if outcomes or runs else tell))
                    bar.update()
                tests = np.array([[*run.test.values()] for run in runs])
                apart = tests[:, 1] - tests[:, 0]
                if not outcomes:
                    tell(
                        f"\nAP x 100 on test rows, mean of {args.seeds} paired seeds\n"
                        f"{'rows':<16}  {'model':<15}  {plain:>6}  Smooth-AP    "
                        "gain, 95 % interval  up    verdict"
                    )
                outcomes.append(Outcome(case, runs, apart, interval(apart, case.overlap)))
                tell(table_row(outcomes[-1]))
    finally:
        torch.set_num_threads(threads)
    print(f"\n{verdict(outcomes, plain)}")
    save_figure(outcomes, warmup, blend, plain, out)
    print(f"picture: {out}", flush=True)
    return outcomes


def save_figure(
    outcomes: Sequence[Outcome], warmup: int, blend: int, plain: str, path: Path
) -> None:
    """The first seed's training, and the differences of all."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.4), dpi=130, layout="constrained")
    left, right = figure.subplots(1, 2)
    first = outcomes[0]
    traces = first.runs[0].validation
    total = len(traces[plain])
    left.axvspan(0.5, warmup + 0.5, color="#eeeeee", linewidth=0)
    left.axvspan(warmup + 0.5, warmup + blend + 0.5, color="#f8e7c0", linewidth=0)
    phases = {f"{plain} alone": (0, warmup), "both": (warmup, warmup + blend)}
    for text, (start, end) in (phases | {"Smooth-AP": (warmup + blend, total)}).items():
        if end > start:
            at = left.get_xaxis_transform()
            middle = (start + end + 1) / 2
            left.text(middle, 1.01, text, transform=at, ha="center", color=INK, fontsize=9)
    for arm, colour in ((plain, THEIRS), ("Smooth-AP", OURS)):
        style = "--" if arm == plain else "-"
        left.plot(range(1, total + 1), traces[arm], style, color=colour, linewidth=2, label=arm)
    left.set_xlim(0.5, total + 0.5)
    left.xaxis.get_major_locator().set_params(integer=True)
    left.set_xlabel("epoch")
    left.set_ylabel("AP x 100, validation rows")
    left.set_title(f"{first.case.name}, {model_name(first.case.hidden)}, one seed", pad=18)
    left.legend(loc="best", frameon=False)

    colours = {"win": OURS, "loss": THEIRS}
    for at, found in enumerate(outcomes):
        colour = colours.get(found.gain.verdict, TIE)
        right.errorbar(found.gain.mean, at, xerr=found.gain.half, color=colour, fmt="o",
                       markersize=9, linewidth=3)  # fmt: skip
        right.plot(found.difference, np.full(len(found.runs), at + 0.2), "o", color=colour,
                   markersize=4, alpha=0.5)  # fmt: skip
    right.axvline(0, color=INK, linewidth=1)
    names = [f"{o.case.name},\n{model_name(o.case.hidden)}" for o in outcomes]
    right.set_yticks(range(len(outcomes)), names)
    right.set_ylim(len(outcomes) - 0.5, -0.5)
    right.set_xlabel(f"Smooth-AP minus {plain}, AP points on test rows")
    right.set_title(
        f"{len(first.runs)} paired seeds: each, mean, 95 % interval (grey: a tie)", pad=18
    )
    for ax in (left, right):
        tidy(ax)
        ax.title.set_fontsize(10.5)
    figure.savefig(path)
