"""Warmup, blend, ranking loss; beside BCE that goes on; over paired seeds."""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from sklearn.metrics import average_precision_score
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from proxy_losses import LossWarmupWrapper, SmoothAPLoss

from ._common import (
    EPOCHS_VARIABLE,
    GREY,
    OURS,
    THEIRS,
    DemoError,
    Flag,
    Gain,
    Parser,
    gain_of,
    number,
    picture,
    shortened,
)
from ._tables import MADE, Array, Rows, load_table, make_split, split_table, synthetic, thin

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
STEPS = 1000  # of an arm, for which the default number of epochs is chosen, within EPOCHS
EPOCHS = (20, 40)
FEW_POSITIVES = 3  # of the rarest class in a batch, on average: below, a queue is used
T_OVERLAP = 0.2 / 0.6  # test rows over training rows: splits of one table share rows


COUNT, SEVERAL, POSITIVE = number(int, 0), number(int, 1), number(float, 1e-9, 1e9)
FLAGS: list[Flag] = [
    ("--data", "DATA", str, None, "made (two made tables), synthetic (classes made by "
     "scikit-learn), digits (bundled with it), or a .csv, .parquet or .npz file; an .npz holds X "
     "and y (default: made; digits with --multiclass)"),
    ("--target", "COLUMN", str, None, "the label's column; of two values that are not 0 and 1 the "
     "rarer is the positive; text columns beside it become one-hot"),
    ("--multiclass", "", bool, None, "rank every class against the rest, beside CE (default: two "
     "classes; digits: 8 against the rest)"),
    ("--pos-rate", "RATE", number(float, 1e-6, 0.999), None, "share of positives: of made rows "
     "(default: 0.01; synthetic: 0.005), or to thin those of a table to (default: all)"),
    ("--hidden", "N", COUNT, None, "hidden units, 0 for a linear model (default: both 0 and 16)"),
    ("--seeds", "N", number(int, 1, 1000), 5, "how many seeds"),
    ("--seed", "N", number(int, 0, 2**31), 0, "the first of them"),
    ("--total-epochs", "N", SEVERAL, None, f"epochs of an arm (default: about {STEPS} steps, from "
     "{} to {})".format(*EPOCHS)),
    ("--warmup-epochs", "N", COUNT, None, "epochs of BCE alone (default: 4/10 of the total)"),
    ("--blend-epochs", "N", COUNT, None, "epochs of both losses (default: 1/10 of the total)"),
    ("--batch-size", "N", SEVERAL, 256, "rows of a training step"),
    ("--queue-size", "N", COUNT, None, "earlier rows that Smooth-AP ranks too (default: 8 batches "
     f"where a batch has fewer than {FEW_POSITIVES} positives, else 0)"),
    ("--temp-start", "N", POSITIVE, 0.25, "Smooth-AP's temperature, in standard deviations of the "
     "scores"),
    ("--temp-end", "N", POSITIVE, None, "that of the last step (default: no change)"),
    ("--lr", "N", POSITIVE, 0.02, "Adam's learning rate, for both arms"),
    ("--out", "PNG", Path, Path("demo.png"), "where to draw the picture"),
]  # fmt: skip


class Case(NamedTuple):
    """One line of the result: rows and a model."""

    rows: str
    split: Callable[[int], list[Rows]]  # of a seed, to train, to validate and to test
    overlap: float  # of the splits of two seeds, 0 if each has its own rows
    hidden: int  # units, 0 for a linear model

    @property
    def model(self) -> str:
        return f"MLP of {self.hidden} units" if self.hidden else "linear model"


class Outcome(NamedTuple):
    """What all seeds of a case found, in points of AP; the second arm is Smooth-AP."""

    case: Case
    validation: Array  # [seeds, arms, epochs]
    test: Array  # [seeds, arms], of the best epoch
    apart: Array  # [seeds], Smooth-AP minus cross-entropy
    gain: Gain


def plan_epochs(args: argparse.Namespace, steps: int) -> tuple[int, int, int]:
    """Warmup, blend and total epochs, after the defaults and the environment's shortening."""
    total = args.total_epochs or min(max(round(STEPS / steps), EPOCHS[0]), EPOCHS[1])
    warmup = 4 * total // 10 if args.warmup_epochs is None else args.warmup_epochs
    blend = total // 10 if args.blend_epochs is None else args.blend_epochs
    if warmup + blend >= total:
        taken = f"warmup and blend take {warmup} + {blend} epochs of {total}"
        raise DemoError(f"{taken}: raise --total-epochs above their sum")
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
    overlap = 0.0 if data in ("made", "synthetic") else T_OVERLAP
    splits: dict[str, Callable[[int], list[Rows]]]
    if data == "made":
        splits = {name: partial(make_split, name, args.pos_rate or 0.01) for name in MADE}
    elif data == "synthetic":
        rate, names = args.pos_rate or 0.005, [*"0123"] if args.multiclass else [*"01"]
        splits = {data: lambda seed: split_table(synthetic(seed, rate, len(names)), names, seed)}
    else:
        table, names = load_table(data, args.target, args.multiclass)
        table = thin(table, args.pos_rate, args.seed) if args.pos_rate else table
        if len(names) == 2:
            print(f"positive: {args.target or 'label'} = {names[1]}")
        splits = {Path(data).name: partial(split_table, table, names)}
    models = [0, 16] if args.hidden is None else [args.hidden]
    return [Case(rows, split, overlap, h) for rows, split in splits.items() for h in models]


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
def average_precision(model: nn.Module, part: Rows) -> float:
    """In points; of several classes the mean over classes."""
    scores = model(torch.from_numpy(part.x)).numpy()
    if not np.isfinite(scores).all():
        raise DemoError("the scores are no longer finite: try a smaller --lr")
    scores = scores[:, 0] if scores.shape[1] == 1 else scores
    return 100 * float(average_precision_score(part.y, scores))


def train_pair(case: Case, seed: int, args: argparse.Namespace, show: bool) -> tuple[Array, Array]:
    """Both arms, from the same weights and in the same batch order: one seed of an `Outcome`."""
    train, validation, test = case.split(seed)
    x, y = map(torch.from_numpy, train)
    counts, steps = y.bincount(), -(-len(y) // args.batch_size)
    outputs = 1 if len(counts) == 2 else len(counts)
    warmup, blend, total = plan_epochs(args, steps)
    queue_size = args.queue_size
    if queue_size is None:
        few = args.batch_size * int(counts.min()) / len(y) < FEW_POSITIVES
        queue_size = 8 * args.batch_size if few else 0
    ranking = LossWarmupWrapper(
        warmup_loss=cross_entropy,
        main_loss=SmoothAPLoss(outputs, queue_size=queue_size, temperature_unit="spread"),
        warmup_epochs=warmup,
        blend_epochs=blend,
        temp_start=args.temp_start,
        temp_end=args.temp_end or args.temp_start,
        temp_decay_steps=max(1, (total - warmup) * steps - 1),
    )
    losses: tuple[Any, ...] = cross_entropy, ranking
    models = [build_model(x.shape[1], case.hidden, outputs, seed) for _ in losses]
    adams = [torch.optim.Adam(model.parameters(), args.lr, fused=True) for model in models]
    best, reached = [*models], np.zeros((len(losses), total))
    shuffle, step = torch.Generator().manual_seed(seed), 0
    for epoch in range(total):
        ranking.on_train_epoch_start(epoch)
        sums = [0.0, 0.0]
        for rows in torch.randperm(len(y), generator=shuffle).split(args.batch_size):
            ranking.on_train_batch_start(step)
            batch, labels = x[rows], y[rows]
            for arm, loss_fn in enumerate(losses):
                loss = loss_fn(models[arm](batch), labels)
                adams[arm].zero_grad()
                loss.backward()
                adams[arm].step()
                sums[arm] += loss.item() / steps
            step += 1
        for arm, model in enumerate(models):
            reached[arm, epoch] = average_precision(model, validation)
            if reached[arm].argmax() == epoch:
                best[arm] = copy.deepcopy(model)
        if show:
            phase = "warmup" if ranking.in_warmup else "blend" if ranking.in_blend else "ranking"
            line = f"{epoch + 1:>3}/{total:<3}   {phase:<7}  {ranking.main_weight:5.2f}"
            for mean, ap in zip(sums, reached[:, epoch], strict=True):
                line += f"{mean:13.4f}  {ap:6.2f}  "
            tqdm.write(line.rstrip())
    return reached, np.array([average_precision(model, test) for model in best])


def table_row(found: Outcome) -> str:
    """One line of the result."""
    (plain, ours), gain = found.test.mean(0), found.gain
    up = f"{(found.apart > 0).sum()}/{len(found.test)}"
    return (
        f"{found.case.rows:<16.16}  {found.case.model:<15}  {plain:6.2f}  {ours:9.2f}  "
        f"{gain!s:>22}  {up:<4}  {gain.verdict}"
    )


def notes(outcomes: Sequence[Outcome], warmup: int) -> str:
    """What to know of the result before believing it."""
    verdicts = {found.gain.verdict for found in outcomes}
    traces = np.concatenate([found.validation for found in outcomes])  # [runs, arms, epochs]
    unused = (traces[:, 1].argmax(-1) < warmup).sum()
    rising = traces[..., -1] == traces.max(-1)
    all_notes = {
        "A tie: the interval holds 0, so these seeds cannot tell the two apart; it may still hide "
        "a gain or a loss as large as its ends.": "tie" in verdicts,
        "One seed says nothing: it moves by points. Raise --seeds.": "one seed" in verdicts,
        f"In {unused} of {len(traces)} runs the best validation epoch of Smooth-AP lies in its "
        "warmup: there the ranking loss was not used.": unused,
        f"In {rising.sum()} of {rising.size} trainings the last epoch was the best: more "
        "--total-epochs may change the outcome.": rising.mean() > 0.5,
        f"{EPOCHS_VARIABLE} shortened the run: do not conclude from it.": shortened(),
    }
    return "\n".join(note for note, holds in all_notes.items() if holds)


def run(argv: Sequence[str]) -> list[Outcome]:
    """Parse, load, train, print, draw."""
    args = Parser("proxy-losses-demo", DESCRIPTION, EPILOG, FLAGS).parse_args(argv)
    cases = cases_of(args)
    parts = cases[0].split(args.seed)
    steps = -(-len(parts[0].y) // args.batch_size)
    warmup, blend, total = plan_epochs(args, steps)
    plain = "BCE" if parts[0].y.max() == 1 else "CE"
    sizes = [
        f"{name} {len(part.y):,} rows" + f" ({part.y.sum():,} positive)" * (plain == "BCE")
        for name, part in zip(("train", "validation", "test"), parts, strict=True)
    ]
    with picture(args.out) as axes:
        print(
            f"{cases[0].rows}: {', '.join(sizes)}, {parts[0].x.shape[1]} features\n"
            f"{steps} steps an epoch, of {args.batch_size} rows; epochs: {warmup} of {plain} "
            f"alone, {blend} of both, {total - warmup - blend} of Smooth-AP\n\n"
            f"Seed {args.seed}, {cases[0].model}: training loss, and AP x 100 on validation rows\n"
            f"epoch     phase    weight     {plain:<18}     Smooth-AP",
            flush=True,
        )
        outcomes: list[Outcome] = []
        for case in cases:
            found: list[tuple[Array, Array]] = []
            seeds = range(args.seed, args.seed + args.seeds)
            for seed in tqdm(seeds, f"{case.rows}, {case.model}", disable=None, leave=False):
                found.append(train_pair(case, seed, args, show=not outcomes and not found))
            validation, test = map(np.stack, zip(*found, strict=True))
            apart = test[:, 1] - test[:, 0]
            gain = gain_of(apart, case.overlap)
            outcomes.append(Outcome(case, validation, test, apart, gain))
            if len(outcomes) == 1:
                print(
                    f"\nAP x 100 on test rows, mean of {args.seeds} paired seeds\n{'rows':<16}  "
                    f"{'model':<15}  {plain:>6}  Smooth-AP    gain, 95 % interval  up    verdict"
                )
            print(table_row(outcomes[-1]), flush=True)
        print(f"\n{notes(outcomes, warmup)}")
        draw(axes, outcomes, warmup, blend, plain)
    return outcomes


def draw(
    axes: Sequence[Any], outcomes: Sequence[Outcome], warmup: int, blend: int, plain: str
) -> None:
    """The first seed's training, and the differences of all."""
    (left, right), first = axes, outcomes[0]
    total, seeds = first.validation.shape[2], len(first.test)
    left.axvspan(0.5, warmup + 0.5, color="#eeeeee", lw=0, label=f"{plain} alone")
    left.axvspan(warmup + 0.5, warmup + blend + 0.5, color="#f8e7c0", lw=0, label="both losses")
    epochs, (theirs, ours) = range(1, total + 1), first.validation[0]
    left.plot(epochs, theirs, "--", color=THEIRS, lw=2, label=f"{plain} throughout")
    left.plot(epochs, ours, color=OURS, lw=2, label="Smooth-AP")
    left.set(xlim=(0.5, total + 0.5), xlabel="epoch", ylabel="AP x 100, validation rows")
    left.xaxis.get_major_locator().set_params(integer=True)
    left.set_title(f"{first.case.rows}, {first.case.model}, one seed")
    left.legend()
    for at, (*_, apart, gain) in enumerate(outcomes):
        colour = {"win": OURS, "loss": THEIRS}.get(gain.verdict, GREY)
        right.errorbar(gain.mean, at, xerr=gain.half, color=colour, fmt="o", ms=9, lw=3)
        right.plot(apart, [at + 0.2] * seeds, "o", color=colour, ms=4, alpha=0.5)
    right.axvline(0, color="black", lw=1)
    names = [f"{found.case.rows},\n{found.case.model}" for found in outcomes]
    right.set_yticks(range(len(outcomes)), names)
    right.set_ylim(len(outcomes) - 0.5, -0.5)
    right.set_xlabel(f"Smooth-AP minus {plain}, AP points on test rows")
    right.set_title(f"{seeds} paired seeds: each, mean, 95 % interval (grey: a tie)")
