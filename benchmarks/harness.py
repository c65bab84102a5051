"""Times contenders side by side: one process, interleaved, medians, ratios first.

A suite is a module with a function that builds a `Suite` from the command line, and hands it to
`main`. Nothing is timed before all contenders agree with us on the first, smallest case.

Time is ``time.perf_counter`` around complete calls, or with ``--cpu-time`` that of this thread.
Each round times every contender once, in rotating order, so that a busy machine slows all of them
alike; a ratio is the median over rounds of contender / ours, hence above 1 where we are faster.
``--against`` adds another version of the package. Memory is the peak resident set of one call above
its inputs, in a fresh process. `report.Report` is the schema of what is written. A contender that
returns nothing is a yardstick: it is timed and compared with nobody.
"""

from __future__ import annotations

import argparse
import atexit
import gc
import importlib
import importlib.metadata
import json
import math
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Literal, NamedTuple

import torch
from torch import Tensor

import proxy_losses

from . import report as rep
from .report import CaseReport, Entry, Goal, Report

OURS = "proxy_losses"
MIN_REPEATS = 7
MIN_SAMPLE_S = 0.01  # shorter calls are repeated within one sample
SLOW_SAMPLE_S, SLOW_REPEATS = 20.0, 3  # a longer sample ends its contender after so many rounds

AGAINST = "another checkout, or a folder with a renamed copy of its package, to measure beside"
UNRECORDED = ("quick", "out", "peak_of", "against", "cpu_time")  # options

Fn = Callable[[], tuple[Tensor, ...]]
Clock = Callable[[], float]


class Skip(NamedTuple):
    """Why a contender does not run a case."""

    status: Literal["skipped", "absent"]
    reason: str


class Case(NamedTuple):
    """One input, and a function per contender that returns what it computed from it."""

    name: str
    sizes: dict[str, float]
    contenders: dict[str, Fn | Skip]
    goal: Goal | None = None


class Suite(NamedTuple):
    """Cases, smallest first."""

    name: str
    about: str  # what one call computes, dtype and parameters included
    ours: str  # the contender that ratios refer to
    cases: list[Case]
    tolerance: float  # of the gate; see `deviation`
    peers: dict[str, str | None]  # optional package -> version, None where it cannot be imported
    checks: Sequence[Case] = ()  # more for the gate; not timed


Build = Callable[[argparse.Namespace], Suite]


class DisagreementError(RuntimeError):
    """A contender computes something else than we do."""


def peer(package: str) -> tuple[ModuleType | None, str | None]:
    """An optional package and its version, or (None, None) where it cannot be imported."""
    try:
        module = importlib.import_module(package)
    except ImportError:
        return None, None
    try:
        return module, importlib.metadata.version(package.replace("_", "-"))
    except importlib.metadata.PackageNotFoundError:
        return module, str(getattr(module, "__version__", "unknown"))


def packages(args: argparse.Namespace) -> dict[str, ModuleType]:
    """This package, and the version of it that ``--against`` names, by their import names."""
    folder = getattr(args, "against", None)
    return {OURS: proxy_losses} | ({} if folder is None else _version(folder))


@cache
def _version(folder: Path) -> dict[str, ModuleType]:
    """The package in the folder.

    That of a checkout is copied under another name, which its operators get too, so that both
    live in this process.
    """
    name = "old_losses"
    if (source := folder / OURS).is_dir():
        folder = Path(tempfile.mkdtemp())
        atexit.register(shutil.rmtree, folder)
        shutil.copytree(source, folder / name)
        for path in folder.rglob("*.py"):
            path.write_text(path.read_text().replace(OURS, name))
    elif len(found := [*folder.glob("*/__init__.py")]) == 1:
        name = found[0].parent.name
    else:
        raise SystemExit(f"--against needs a checkout, or a folder of one package, got {folder}")
    sys.path.insert(0, str(folder.resolve()))
    return {name: importlib.import_module(name)}


def deviation(theirs: Sequence[Tensor], ours: Sequence[Tensor]) -> float:
    """Largest difference in any output, relative to the largest entry of that output of ours."""
    worst = 0.0
    for a, b in zip(theirs, ours, strict=True):
        if a.shape != b.shape:
            return math.inf
        error = (a.double() - b.double()).abs().max().item()
        worst = max(worst, error / max(b.double().abs().max().item(), 1e-30))
        if not math.isfinite(error):
            return math.inf
    return worst


def runnable(case: Case) -> dict[str, Fn]:
    return {name: fn for name, fn in case.contenders.items() if not isinstance(fn, Skip)}


def gate(suite: Suite) -> None:
    """Raise `DisagreementError` unless all agree with us on the first case and on the checks."""
    for case in (suite.cases[0], *suite.checks):
        fns = runnable(case)
        expected = fns[suite.ours]()
        for name, fn in fns.items():
            outputs = fn()
            error = deviation(outputs, expected) if outputs else 0.0
            if not error <= suite.tolerance:
                off = f"{name} deviates from {suite.ours} by {error:.2g} on {case.name!r}"
                raise DisagreementError(f"{off}, tolerance {suite.tolerance:g}")


def rounds(
    calls: Mapping[str, tuple[Fn, int]], repeats: int, clock: Clock = time.perf_counter
) -> dict[str, list[float]]:
    """Seconds per call of each contender in each round; each round starts with another one."""
    samples: dict[str, list[float]] = {name: [] for name in calls}
    order = list(calls)
    gc.collect()
    gc.freeze()  # what a collection between the rounds need not look at
    gc.disable()
    try:
        for _ in range(repeats):
            gc.collect()
            for name in order:
                (fn, count), done = calls[name], samples[name]
                if len(done) >= SLOW_REPEATS and done[-1] * count > SLOW_SAMPLE_S:
                    continue
                start = clock()
                for _ in range(count):
                    fn()
                done.append((clock() - start) / count)
            order = order[1:] + order[:1]
    finally:
        gc.enable()
        gc.unfreeze()
    return samples


def _round(x: float) -> float:
    return float(f"{x:.4g}")


def _spread(samples: list[float]) -> tuple[float, list[float]]:
    first, middle, third = statistics.quantiles(samples, n=4, method="inclusive")
    return _round(middle), [_round(first), _round(third)]


def measure(
    case: Case, ours: str, repeats: int = MIN_REPEATS, clock: Clock = time.perf_counter
) -> CaseReport:
    """Warm up, note how far the contenders deviate from us, and time them."""
    if repeats < MIN_REPEATS:
        raise ValueError(f"repeats must be >= {MIN_REPEATS}, got {repeats}")
    fns = runnable(case)
    expected = fns[ours]()
    errors: dict[str, float | None] = {}
    calls: dict[str, tuple[Fn, int]] = {}
    for name, fn in fns.items():
        start = time.perf_counter()
        outputs = fn()
        count = math.ceil(MIN_SAMPLE_S / (time.perf_counter() - start))
        errors[name] = _round(deviation(outputs, expected)) if outputs else None
        calls[name] = (fn, max(1, count))
    samples = rounds(calls, repeats, clock)
    entries: dict[str, Entry] = {}
    for name, contender in case.contenders.items():
        entry: Entry = {
            "status": "measured", "reason": None, "median_s": None, "iqr_s": None, "ratio": None,
            "ratio_iqr": None, "repeats": None, "calls": None, "peak_bytes": None,
            "deviation": None,
        }  # fmt: skip
        if isinstance(contender, Skip):
            entry["status"], entry["reason"] = contender
        else:
            ratios = [a / b for a, b in zip(samples[name], samples[ours], strict=False)]
            entry["median_s"], entry["iqr_s"] = _spread(samples[name])
            entry["ratio"], entry["ratio_iqr"] = _spread(ratios)
            entry["repeats"], entry["calls"] = len(samples[name]), calls[name][1]
            entry["deviation"] = errors[name]
        entries[name] = entry
    return {"name": case.name, "sizes": case.sizes, "contenders": entries, "goal": None}


def own_peak(suite: Suite, case_name: str, contender: str) -> int | None:
    """Peak resident bytes of one call above what this process holds; None if it cannot tell."""
    case = next(c for c in suite.cases if c.name == case_name)
    fns = [fns for c in suite.cases if contender in (fns := runnable(c))]
    fns[0][contender]()  # what is loaded once, on the first call, is not counted
    gc.collect()
    try:
        Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew
        before = _high_water()
        runnable(case)[contender]()
        return _high_water() - before
    except OSError:
        return None


def _high_water() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM:"))


def child_peak(
    module: str, argv: Sequence[str], case: str, contender: str
) -> tuple[int | None, str | None]:
    """`own_peak` in a fresh process that is given the same command line, or why there is none."""
    command = [sys.executable, "-m", module, *argv, "--peak-of", case, contender]
    # glibc then gives freed buffers back at once, so that no warm-up hides the growth.
    env = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}
    done = subprocess.run(command, cwd=rep.ROOT, env=env, capture_output=True, text=True)
    if done.returncode:  # out of memory, say; the times are worth keeping
        last = done.stderr.strip().splitlines()[-1:] or [""]
        return None, f"the process for its peak exited {done.returncode}: {last[0]}"
    peak: int | None = json.loads(done.stdout.splitlines()[-1])
    return peak, "this system does not tell the peak" if peak is None else None


def _clock(args: argparse.Namespace) -> Clock:
    return time.thread_time if args.cpu_time else time.perf_counter


def new_report(suite: Suite, args: argparse.Namespace) -> Report:
    """A report without cases."""
    commit, dirty = rep.checkout()
    options = {k: v for k, v in vars(args).items() if k not in UNRECORDED}
    return {
        "schema_version": rep.SCHEMA_VERSION, "suite": suite.name, "about": suite.about,
        "ours": suite.ours, "quick": args.quick, "options": options, "date": rep.now(),
        "commit": commit, "dirty": dirty, "versions": rep.versions(), "peers": suite.peers,
        "machine": rep.machine(args.threads), "clock": f"time.{_clock(args).__name__}",
        "tolerance": suite.tolerance, "cases": [],
    }  # fmt: skip


def run(suite: Suite, args: argparse.Namespace, module: str, argv: Sequence[str]) -> Report:
    """The gate, then every case."""
    gate(suite)
    report = new_report(suite, args)
    for number, case in enumerate(suite.cases, 1):
        print(f"[{number}/{len(suite.cases)}] {case.name}", file=sys.stderr, flush=True)
        result = measure(case, suite.ours, args.repeats, _clock(args))
        if not args.no_memory:
            for name in runnable(case):
                entry = result["contenders"][name]
                entry["peak_bytes"], entry["reason"] = child_peak(module, argv, case.name, name)
        result["goal"] = case.goal and case.goal.judge(result["contenders"], suite.ours)
        report["cases"].append(result)
    return report


def parser(module: str, *, against: bool = True) -> argparse.ArgumentParser:
    """The options that all suites share; `against` if it takes more versions of ours."""
    options = argparse.ArgumentParser(prog=f"python -m {module}")
    options.add_argument("--quick", action="store_true", help="few sizes, to see that it works")
    options.add_argument("--out", type=Path, help="JSON file; without it, --quick writes none")
    options.add_argument("--threads", type=int, default=1, help="of torch; default 1")
    options.add_argument("--repeats", type=int, default=MIN_REPEATS)
    options.add_argument(
        "--cpu-time", action="store_true", help="of this thread, where other work runs beside"
    )
    options.add_argument("--no-memory", action="store_true", help="time alone, no child processes")
    if against:
        options.add_argument("--against", type=Path, help=AGAINST)
    options.add_argument("--peak-of", nargs=2, help=argparse.SUPPRESS)
    return options


def main(
    module: str,
    build: Build,
    argv: Sequence[str] | None = None,
    options: argparse.ArgumentParser | None = None,
) -> int:
    """Run a suite: print its tables and write ``results/<suite>.json``, or ``--out``.

    Args:
        module: what ``python -m`` calls the suite; peaks are measured through it.
        build: makes the suite from the parsed options.
        argv: command line, None for that of this process.
        options: `parser` with the suite's own options added.

    Returns:
        Exit status, 1 when the gate refuses.
    """
    argv = sys.argv[1:] if argv is None else argv
    args = (options or parser(module)).parse_args(argv)
    torch.set_num_threads(args.threads)
    suite = build(args)
    others = {name: p.__version__ for name, p in packages(args).items() if name != OURS}
    suite = suite._replace(peers={**suite.peers, **others})
    if args.peak_of:
        print(json.dumps(own_peak(suite, *args.peak_of)))
        return 0
    try:
        report = run(suite, args, module, argv)
    except DisagreementError as error:
        print(f"refusing to time: {error}", file=sys.stderr)
        return 1
    print(rep.show(report))
    rep.save(report, args, suite.name)
    return 0
