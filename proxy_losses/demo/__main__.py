"""The demo's command line: the flags of both commands, and errors in one line."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn, TypeAlias

import torch

EPOCHS_VARIABLE = "PROXY_LOSSES_DEMO_EPOCHS"
Flags: TypeAlias = dict[str, tuple[Any, Any, str]]  # type, default and help of each


class Parser(argparse.ArgumentParser):
    """One whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        """Exit with the message, without the usage."""
        self.exit(2, f"{self.prog}: error: {message}\n")


def number(kind: type[int] | type[float], low: float, high: float) -> Callable[[str], float]:
    """A flag's type: a number from low to high."""

    def checked(text: str) -> float:
        value = kind(text)
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"must be from {low:g} to {high:g}, got {text}")
        return value

    checked.__name__ = kind.__name__  # for argparse's own "invalid int value"
    return checked


COUNT, SEVERAL, POSITIVE = number(int, 0, 1e6), number(int, 1, 1e6), number(float, 1e-9, 1e9)
BOTH: Flags = {
    "--seeds": (SEVERAL, 5, "how many seeds"),
    "--seed": (number(int, 0, 2**31), 0, "the first of them"),
}
RANKING: Flags = BOTH | {
    "--data": (str, None, "made (two made tables), synthetic (classes made by scikit-learn), "
        "digits (bundled with it), or a .csv, .parquet or .npz file; an .npz holds x and y "
        "(default: made; digits with --multiclass)"),
    "--target": (str, None, "the label's column; of two values that are not 0 and 1 the rarer is "
        "the positive; text columns beside it become one-hot"),
    "--multiclass": (bool, None, "rank every class against the rest, beside CE (default: two "
        "classes; digits: 8 against the rest)"),
    "--pos-rate": (number(float, 1e-6, 0.999), None, "share of positives: of made rows (default: "
        "0.01; synthetic: 0.005), or to thin those of a table to (default: all)"),
    "--hidden": (COUNT, None, "hidden units, 0 for a linear model (default: both 0 and 16)"),
    "--total-epochs": (SEVERAL, None, "epochs of a training (default: 20 to 40, of 1000 steps)"),
    "--warmup-epochs": (COUNT, None, "epochs of BCE alone (default: 4/10 of the total)"),
    "--blend-epochs": (COUNT, None, "epochs of both losses (default: 1/10 of the total)"),
    "--batch-size": (SEVERAL, 256, "rows of a training step"),
    "--queue-size": (COUNT, None, "earlier rows that Smooth-AP ranks too (default: 8 batches where "
        "a batch has fewer than 3 positives, else 0)"),
    "--temp-start": (POSITIVE, 0.25, "Smooth-AP's temperature, in standard deviations of scores"),
    "--temp-end": (POSITIVE, None, "that of the last step (default: no change)"),
    "--lr": (POSITIVE, 0.02, "Adam's learning rate"),
    "--out": (Path, Path("demo.png"), "where to draw the picture"),
}  # fmt: skip
RETRIEVAL: Flags = BOTH | {
    "--data": (str, None, "an .npz with x and y (default: made embeddings)"),
    "--noise": (number(float, 0, 1), 0.2, "share of the labels that are drawn at random"),
    "--total-epochs": (SEVERAL, 15, "epochs of tuning, of 20 steps each"),
    "--out": (Path, Path("demo-retrieval.png"), "where to draw the picture"),
}


def parse(parser: argparse.ArgumentParser, flags: Flags, argv: list[str]) -> argparse.Namespace:
    """The values of the flags, and the most epochs that the environment allows."""
    for flag, (kind, default, note) in flags.items():
        if kind is bool:
            parser.add_argument(flag, action="store_true", help=note)
            continue
        note += f" (default: {default})" * (default is not None)
        name = kind.__name__.upper()
        parser.add_argument(flag, type=kind, default=default, metavar=name, help=note)
    args, unknown = parser.parse_known_args(argv)
    if unknown:
        parser.error(
            f"unrecognized arguments: {' '.join(unknown)}. Write proxy-losses-demo [flags], or "
            "proxy-losses-demo retrieval [flags], in this order; --help of either explains them"
        )
    most = os.environ.get(EPOCHS_VARIABLE) or "1000000"
    if not most.isdecimal() or int(most) < 1:
        parser.error(f"{EPOCHS_VARIABLE} must be a whole number, 1 or more, got {most!r}")
    args.most_epochs = int(most)
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """The console script: 0, or one line on stderr and exit code 2."""
    argv = list(sys.argv[1:] if argv is None else argv)
    command = argv.pop(0) if argv[:1] == ["retrieval"] else ""
    parser = Parser(
        f"proxy-losses-demo {command}".strip(),
        usage="%(prog)s [flags]",
        epilog=f"{EPOCHS_VARIABLE}=N in the environment shortens any run to N epochs.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    torch.set_num_threads(1)  # tensors this small are slower on several
    try:
        from . import _ranking, _retrieval

        demo: Any = _retrieval if command else _ranking
        parser.description = demo.__doc__
        args = parse(parser, RETRIEVAL if command else RANKING, argv)
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.open("ab").close()  # that a picture cannot be written is found out at once
        demo.run(args)
        print(f"picture: {args.out}")
        if os.environ.get(EPOCHS_VARIABLE):
            print(f"{EPOCHS_VARIABLE} shortened the run: do not conclude from it.")
    except ModuleNotFoundError as error:
        parser.error(f'the demo needs the package {error.name!r}: pip install ".[demo]"')
    except OSError as error:  # of what is read, one is turned into a ValueError
        parser.error(f"cannot write: {error}")
    except ValueError as error:
        parser.error(" ".join(str(error).split()))
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
