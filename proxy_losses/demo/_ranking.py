"""Does a ranking loss rank your positives higher than BCE (binary cross-entropy) does?

This trains small models twice, from the same weights and in the same batch order: once with BCE
throughout, and once with BCE that blends into Smooth-AP, a differentiable average precision (AP).
Either keeps its best epoch on validation rows and is judged by AP on test rows, for several seeds.
The mean difference is printed with its 95 % interval, win or not, and drawn.

Without flags the rows are made on the spot, 1 % of them positive: a table whose top is contested,
where a linear model cannot have top and bulk right at once, and one with smooth odds, which BCE
fits as well. With --data FILE they are yours. What to expect: a win of 3 to 4 points for a linear
model on the contested top; elsewhere ties, or gains that other seeds and more epochs may take
away; on most real tables ties.

"proxy-losses-demo retrieval" tunes embeddings for retrieval instead; see its own --help.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Sequence
from itertools import product
from typing import Any, TypeAlias

import numpy as np
import torch
from matplotlib.figure import Figure
from sklearn.metrics import average_precision_score
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from proxy_losses import LossWarmupWrapper, SmoothAPLoss

from ._tables import Array, Rows, splits_of
from ._verdict import Gain, gain_of

# AP x 100 on validation rows [seeds, arms, epochs] and on test rows [seeds, arms]; and the gain.
Outcome: TypeAlias = tuple[Array, Array, Gain]


def cross_entropy(outputs: Tensor, targets: Tensor) -> Tensor:
    """BCE of logits [N, 1], or CE of log-probabilities [N, C]."""
    if outputs.shape[1] == 1:
        return F.binary_cross_entropy_with_logits(outputs[:, 0], targets.to(outputs.dtype))
    return F.nll_loss(outputs, targets)


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


@torch.no_grad()
def average_precision(model: nn.Module, part: Rows) -> float:
    """In points; of several classes the mean over classes."""
    scores = model(torch.from_numpy(part.x)).numpy()
    if not np.isfinite(scores).all():
        raise ValueError("the scores are no longer finite: try a smaller --lr")
    return 100 * float(average_precision_score(part.y, scores))


def train_both(
    parts: Sequence[Rows], hidden: int, seed: int, args: argparse.Namespace, show: bool
) -> tuple[Array, Array]:
    """AP on validation rows [arms, epochs], and on test rows, of the best epochs [arms]."""
    x, y = map(torch.from_numpy, parts[0])
    classes, steps = int(y.max()) + 1, -(-len(y) // args.batch_size)
    outputs = 1 if classes == 2 else classes
    ranking = LossWarmupWrapper(
        warmup_loss=cross_entropy,
        main_loss=SmoothAPLoss(outputs, queue_size=args.queue_size, temperature_unit="spread"),
        warmup_epochs=args.warmup_epochs,
        blend_epochs=args.blend_epochs,
        temp_start=args.temp_start,
        temp_end=args.temp_end or args.temp_start,
        temp_decay_steps=max(1, (args.total_epochs - args.warmup_epochs) * steps - 1),
    )
    losses: list[Any] = [cross_entropy, ranking]
    models = [build_model(x.shape[1], hidden, outputs, seed) for _ in losses]
    adams = [torch.optim.Adam(model.parameters(), args.lr, fused=True) for model in models]
    best, reached = [*models], np.zeros((2, args.total_epochs))
    shuffle, step = torch.Generator().manual_seed(seed), 0
    for epoch in range(args.total_epochs):
        ranking.on_train_epoch_start(epoch)
        means = [0.0, 0.0]
        for rows in torch.randperm(len(y), generator=shuffle).split(args.batch_size):
            ranking.on_train_batch_start(step)
            for arm, loss_fn in enumerate(losses):
                loss = loss_fn(models[arm](x[rows]), y[rows])
                adams[arm].zero_grad()
                loss.backward()
                adams[arm].step()
                means[arm] += loss.item() / steps
            step += 1
        phase = "warmup" if ranking.in_warmup else "blend" if ranking.in_blend else "ranking"
        line = f"{epoch + 1:>3}/{args.total_epochs:<3}   {phase:<7}  {ranking.main_weight:5.2f}"
        for arm, model in enumerate(models):
            reached[arm, epoch] = average_precision(model, parts[1])
            if reached[arm].argmax() == epoch:
                best[arm] = copy.deepcopy(model)
            line += f"{means[arm]:13.4f}  {reached[arm, epoch]:6.2f}  "
        if show:
            tqdm.write(line.rstrip())
    return reached, np.array([average_precision(model, parts[2]) for model in best])


def run(args: argparse.Namespace) -> dict[str, Outcome]:
    """Compare on every table with every model; print and draw."""
    tables, overlap = splits_of(args)
    first, split = next(iter(tables.items()))
    parts = split(args.seed)
    settle(args, parts[0].y)
    plain = "BCE" if parts[0].y.max() == 1 else "CE"
    for name, part in zip(("train", "validation", "test"), parts, strict=True):
        print(f"{name}: {len(part.y):,} rows, {np.bincount(part.y).min():,} of the rarest class")
    print(
        f"epochs: {args.warmup_epochs} of {plain} alone, {args.blend_epochs} of both losses, the "
        f"others of Smooth-AP\n\n{first}, seed {args.seed}: training loss, and AP x 100 on "
        "validation rows\n"
        f"epoch     phase    weight     {plain:<18}     Smooth-AP",
        flush=True,
    )
    outcomes: dict[str, Outcome] = {}
    seeds = range(args.seed, args.seed + args.seeds)
    for (table, split), hidden in product(tables.items(), args.hidden):
        name = f"{table}, " + (f"MLP of {hidden} units" if hidden else "linear model")
        found: list[tuple[Array, Array]] = []
        for seed in tqdm(seeds, name, disable=None, leave=False):
            show = not outcomes and not found
            found.append(train_both(split(seed), hidden, seed, args, show))
        validation, test = map(np.stack, zip(*found, strict=True))
        (theirs, ours), apart = test.mean(0), test[:, 1] - test[:, 0]
        gain = gain_of(apart.tolist(), overlap)
        if not outcomes:
            print(f"\nAP x 100 on test rows, mean of {args.seeds} paired seeds")
            print(f"{plain:>38}  Smooth-AP    gain, 95 % interval  up    verdict")
        up = f"{(apart > 0).sum()}/{args.seeds}"
        print(f"{name:<32}{theirs:6.2f}  {ours:9.2f}  {gain!s:>22}  {up:<4}  {gain.verdict}")
        outcomes[name] = validation, test, gain
    runs = np.concatenate([validation for validation, *_ in outcomes.values()])
    unused = (runs[:, 1].argmax(-1) < args.warmup_epochs).sum()
    rising = (runs[..., -1] == runs.max(-1)).sum()
    print(
        "\nA tie: the interval holds 0, so these seeds cannot tell the two apart; it may still\n"
        "hide a gain or a loss as large as its ends. Of many intervals of 95 %, one may miss.\n"
        f"Runs whose best epoch of Smooth-AP lies in its warmup: {unused} of {len(runs)}.\n"
        f"Trainings whose last epoch was the best, so that more may change them: {rising} of "
        f"{2 * len(runs)}."
    )
    draw(outcomes, plain, args)
    return outcomes


def settle(args: argparse.Namespace, y: Array) -> None:
    """Fill in the defaults that depend on the labels of the training rows."""
    steps = -(-len(y) // args.batch_size)
    total = args.total_epochs or min(max(round(1000 / steps), 20), 40)
    warmup = 4 * total // 10 if args.warmup_epochs is None else args.warmup_epochs
    blend = total // 10 if args.blend_epochs is None else args.blend_epochs
    if warmup + blend >= total:
        taken = f"warmup and blend take {warmup} + {blend} epochs of {total}"
        raise ValueError(f"{taken}: raise --total-epochs above their sum")
    args.total_epochs = min(total, args.most_epochs)
    args.warmup_epochs = warmup * args.total_epochs // total
    args.blend_epochs = blend * args.total_epochs // total
    args.hidden = [0, 16] if args.hidden is None else [args.hidden]
    if args.queue_size is None:
        few = args.batch_size * np.bincount(y).min() / len(y) < 3
        args.queue_size = 8 * args.batch_size if few else 0


def draw(outcomes: dict[str, Outcome], plain: str, args: argparse.Namespace) -> None:
    """The first seed's training, and the differences of all."""
    figure = Figure(figsize=(11, 4.4), dpi=130, layout="constrained")
    left, right = figure.subplots(1, 2)
    name, (validation, _, _) = next(iter(outcomes.items()))
    start, end = args.warmup_epochs + 0.5, args.warmup_epochs + args.blend_epochs + 0.5
    left.axvspan(0.5, start, color="#eeeeee", label=f"{plain} alone")
    left.axvspan(start, end, color="#f8e7c0", label="both losses")
    arms = [f"{plain} throughout", "Smooth-AP"]
    left.plot(range(1, args.total_epochs + 1), validation[0].T, label=arms)
    left.set(xlabel="epoch", ylabel="AP x 100, validation rows", title=f"{name}, one seed")
    left.xaxis.get_major_locator().set_params(integer=True)
    left.legend()
    for at, (_, test, gain) in enumerate(outcomes.values()):
        right.plot(test[:, 1] - test[:, 0], [at] * args.seeds, "o", color="#888888")
        right.errorbar(gain.mean, at + 0.2, xerr=gain.half, fmt="o", color="C1", lw=3)
    right.axvline(0, color="black", lw=1)
    right.set_yticks(range(len(outcomes)), [name.replace(", ", ",\n") for name in outcomes])
    right.invert_yaxis()
    right.set_xlabel(f"Smooth-AP minus {plain}, AP points on test rows")
    right.set_title(f"{args.seeds} seeds, and the mean with its 95 % interval")
    figure.savefig(args.out, format="png")
