"""The demo's command line: flags in, lines and one PNG out."""

from __future__ import annotations

import argparse
import math
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from ._errors import DemoError
from ._settings import Settings

if TYPE_CHECKING:
    from ._report import Result

EPOCHS_VARIABLE = "PROXY_LOSSES_DEMO_EPOCHS"

DESCRIPTION = """\
Train one small model twice on one split of an imbalanced table, from the same weights and in
the same batch order: with BCE that blends into the Smooth-AP ranking loss, and with BCE alone
for as many steps. Each keeps its best validation epoch. Prints a line per epoch and the test
AUCPR (average precision) of both, and draws both.
"""
EPILOG = f"""\
What to expect: a tie, mostly. On real tables a network trained with BCE already ranks well; a
model too small for its data (--hidden 0) gains on some of them. The demo prints what it
measured. {EPOCHS_VARIABLE} = N shortens any run to N epochs an arm.
"""


class _Parser(argparse.ArgumentParser):
    """Errors are one line, without the usage."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {' '.join(message.split())}\n")


def _number(
    kind: Callable[[str], float], ok: Callable[[float], bool], wanted: str
) -> Callable[[str], float]:
    def parse(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not (math.isfinite(value) and ok(value)):
            raise argparse.ArgumentTypeError(f"must be {wanted}, got {text!r}")
        return value

    return parse


MOST = 1_000_000  # epochs, rows of a batch or the queue, hidden units: more is a slip
_count = _number(int, lambda value: 0 <= value <= MOST, f"a whole number from 0 to {MOST:,}")
_several = _number(int, lambda value: 1 <= value <= MOST, f"a whole number from 1 to {MOST:,}")
_seed = _number(int, lambda value: 0 <= value < 2**32, "a whole number from 0 to 4294967295")
_positive = _number(float, lambda value: 1e-9 <= value <= 1e9, "a number from 1e-9 to 1e9")
_share = _number(float, lambda value: 0 < value < 1, "a number between 0 and 1")
_KNOBS: list[tuple[str, Callable[[str], float], str]] = [
    ("--hidden", _count, "hidden units; 0 is a linear model"),
    ("--total-epochs", _several, "epochs of each arm"),
    ("--batch-size", _several, "rows of a training step"),
    ("--queue-size", _count, "earlier rows that the ranking loss compares with, too"),
    ("--temp-start", _positive, "Smooth-AP's temperature, in logits, at the switch"),
    ("--temp-end", _positive, "Smooth-AP's temperature at the last step"),
    ("--lr", _positive, "Adam's learning rate, for both arms"),
    ("--seed", _seed, "seed of the split, the first weights and the batches"),
]


def build_parser() -> argparse.ArgumentParser:
    """The flags, their defaults in their help."""
    parser = _Parser(
        prog="proxy-losses-demo",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    data = parser.add_argument_group("data")
    data.add_argument(
        "--data",
        default="digits",
        help="digits (bundled, real), synthetic, a path to an .npz (arrays X, y), .csv or .parquet "
        "file, or the name of an OpenML data set such as creditcard; text columns become one-hot "
        "(default: digits)",
    )
    data.add_argument(
        "--target",
        metavar="COLUMN",
        help="the label column of a .csv, .parquet or OpenML table; of two values the rarer is "
        "the positive, of 0 and 1 it is 1 (default: OpenML's own; a file needs it)",
    )
    data.add_argument(
        "--multiclass",
        action="store_true",
        help="rank every class against the rest, with CE as the plain loss; digits: all ten "
        "(default: two classes; digits: 8 against the rest)",
    )
    data.add_argument(
        "--pos-rate",
        type=_share,
        metavar="RATE",
        help="thin the positives to this share of the rows (default: all; synthetic: 0.01)",
    )
    for flag, kind, meaning in _KNOBS:
        name = flag[2:].replace("-", "_")
        default = getattr(Settings(), name)
        note = f"{meaning} (default: %(default)s)"
        add(flag, type=kind, default=default, metavar="N", help=note)
    note = "epochs of {} (default: {} of the total)"
    add("--warmup-epochs", type=_count, metavar="N", help=note.format("BCE alone", "3/10"))
    add("--blend-epochs", type=_count, metavar="N", help=note.format("both losses", "1/10"))
    add(
        "--out",
        type=Path,
        default=Path("demo.png"),
        metavar="PNG",
        help="where to draw the figure (default: %(default)s)",
    )
    return parser


def plan_epochs(args: argparse.Namespace) -> tuple[int, int, int]:
    """Warmup, blend and total epochs, after the defaults and the environment's shortening."""
    total: int = args.total_epochs
    given_warmup, given_blend = args.warmup_epochs, args.blend_epochs
    warmup: int = 3 * total // 10 if given_warmup is None else given_warmup
    blend: int = total // 10 if given_blend is None else given_blend
    if warmup + blend >= total:
        raise DemoError(
            f"warmup and blend take {warmup} + {blend} epochs of {total}: "
            "raise --total-epochs above their sum"
        )
    text = os.environ.get(EPOCHS_VARIABLE, "")
    if not text:
        return warmup, blend, total
    if not text.isdecimal() or int(text) < 1:
        raise DemoError(f"{EPOCHS_VARIABLE} must be a whole number, 1 or more, got {text!r}")
    cap = min(total, int(text))
    # Shrink in proportion, but keep a phase that was asked for while there is room for main.
    warmup = min(cap - 1, max(min(warmup, 1), warmup * cap // total))
    blend = min(cap - 1 - warmup, max(min(blend, 1), blend * cap // total))
    return warmup, blend, cap


def _check_out(path: Path) -> Path:
    """Find out before the training, not after it, that the figure cannot be written."""
    path = path.expanduser()
    if path.is_dir():
        path = path / "demo.png"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        existed = path.exists()
        path.open("ab").close()
        if not existed:
            path.unlink()
    except OSError as error:
        raise DemoError(f"--out {path} cannot be written: {error.strerror}") from error
    return path


def run(argv: Sequence[str] | None = None) -> Result:
    """Parse, load, train both arms, print, draw."""
    args = build_parser().parse_args(argv)
    if args.multiclass and args.pos_rate is not None:
        raise DemoError("--pos-rate is for two classes: leave out --multiclass")
    warmup, blend, total = plan_epochs(args)

    from tqdm import tqdm

    from ._plot import save_figure
    from ._report import conclude, describe, epoch_line, final_table, verdict
    from ._sources import load_table
    from ._tables import split_table
    from ._train import Epoch, steps_per_epoch, train_arms

    knobs = {name: getattr(args, name) for name in Settings._fields if "epochs" not in name}
    settings = Settings(warmup_epochs=warmup, blend_epochs=blend, total_epochs=total, **knobs)
    table = load_table(
        args.data,
        target=args.target,
        multiclass=args.multiclass,
        pos_rate=args.pos_rate,
        seed=args.seed,
    )
    split = split_table(table, args.seed)
    out = _check_out(args.out)
    print(describe(table, split, settings), flush=True)

    steps = 2 * total * steps_per_epoch(len(split.train.labels), settings)
    with tqdm(total=steps, unit="step", disable=None, leave=False) as bar:

        def on_epoch(arm: str, epoch: Epoch) -> None:
            bar.set_description(f"{arm}, {epoch.phase}")
            tqdm.write(epoch_line(arm, epoch, total), file=sys.stdout)

        ranking, plain = train_arms(table, split, settings, on_epoch, bar.update)

    result = conclude(table, settings, split, ranking, plain)
    print(f"\n{final_table(result)}\n{verdict(result)}")
    save_figure(result, out)
    print(f"figure: {out}", flush=True)
    return result


def main(argv: Sequence[str] | None = None) -> int:
    """The console script: 0, or one line on stderr and exit code 2."""
    try:
        run(argv)
    except DemoError as error:
        build_parser().error(str(error))
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("proxy_losses"):
            raise
        build_parser().error(
            f'the demo needs the package {error.name!r}: pip install "proxy-losses[demo]"'
        )
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
