"""``python -m proxy_losses.doctor``: does everything hold on this machine?"""

from __future__ import annotations

import argparse
import platform

import torch

from .. import __version__
from . import _local, _proof
from ._outcome import Outcome, attempt

TOLERANCE = 1e-10  # relative, of float64 gradients


def proof(world: int, backend: str, kind: str) -> list[Outcome]:
    """Gathered and sharded, against one process."""
    found = []
    for how in ("gather", "shard"):
        name = f"{world} processes, {kind}, {how}"

        def check(how: str = how, name: str = name) -> Outcome:
            todo = [c for c in _proof.cases(world, [kind]) if c.distributed == how]
            results = _proof.prove(world, todo, backend)
            gradient = max(r.gradient for r in results)
            queue = max(r.queue for r in results)
            ok = gradient <= TOLERANCE and queue == 0.0
            return Outcome(
                name, ok, f"gradient off by {gradient:.1e} (at most {TOLERANCE:.0e}), queue by "
                f"{queue:.0e}",
            )  # fmt: skip

        found.append(attempt(name, check))
    return found


def show(outcome: Outcome) -> None:
    """One line of the table."""
    mark = {True: "pass", False: "FAIL", None: "skip"}[outcome.passed]
    print(f"{mark}  {outcome.name:<48}  {outcome.figure}", flush=True)


def main(argv: list[str] | None = None) -> int:
    """Print the table; 1 if anything failed."""
    options = argparse.ArgumentParser(
        prog="python -m proxy_losses.doctor",
        description="Checks on this machine that ranks are accurate, that several processes train "
        "as one, that runs resume bit for bit, and that compiled code and autocast agree.",
    )
    cuda = torch.cuda.is_available()
    options.add_argument("--device", default="cuda" if cuda else "cpu")
    options.add_argument("--processes", type=int, nargs="*", default=[2], help="default: 2")
    options.add_argument("--backend", default="gloo", choices=["gloo", "nccl"])
    options.add_argument("--quick", action="store_true", help="leave out torch.compile")
    args = options.parse_args(argv)
    print(f"proxy_losses {__version__}, torch {torch.__version__}, {platform.platform()}")
    outcomes = []
    for name, check in _local.CHECKS.items():
        if args.quick and "compile" in name:
            outcomes.append(Outcome(name, None, "left out by --quick"))
        else:
            outcomes.append(attempt(name, lambda check=check: check(args.device)))  # type: ignore[misc]
        show(outcomes[-1])
    for world in args.processes:
        if args.backend == "nccl" and torch.cuda.device_count() < world:
            outcomes.append(Outcome(f"{world} processes", None, "fewer GPUs than that"))
            show(outcomes[-1])
            continue
        for kind in _proof.KINDS:
            for outcome in proof(world, args.backend, kind):
                outcomes.append(outcome)
                show(outcome)
    failed = sum(o.passed is False for o in outcomes)
    print(f"{sum(o.passed is True for o in outcomes)} passed, {failed} failed")
    return int(failed > 0)


if __name__ == "__main__":
    raise SystemExit(main())
