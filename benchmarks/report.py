"""What a benchmark leaves behind: the schema of its JSON, where it ran, and its tables."""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import subprocess
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypedDict

import numpy
import torch

import proxy_losses

Written = dict[str, Any]

SCHEMA_VERSION = 2
ROOT = Path(__file__).resolve().parents[1]
RESULTS = "benchmarks/results"
PEAK_RESOLUTION = 1 << 19  # bytes; the kernel counts resident pages in batches per CPU


class Entry(TypedDict):
    """One contender on one case; the numbers are null unless status is measured."""

    status: Literal["measured", "skipped", "absent"]
    reason: str | None  # why it, or its peak, was not measured
    median_s: float | None  # seconds per call
    iqr_s: list[float] | None  # [first, third quartile]
    ratio: float | None  # median over rounds of its time / our time
    ratio_iqr: list[float] | None  # [first, third quartile]
    repeats: int | None  # samples, one per round; fewer than asked for where one takes very long
    calls: int | None  # calls per sample
    peak_bytes: int | None  # above the inputs, to PEAK_RESOLUTION; null too if not measurable
    deviation: float | None  # from our outputs, relative to their largest entry; null: a yardstick


class GoalReport(TypedDict):
    """A figure to reach, and the one measured; the latter is null where someone did not run."""

    figure: str  # what is measured
    target: str  # the bound on it, such as ">= 100"
    measured: float | None
    reached: bool | None


class Goal(NamedTuple):
    """A bound on one figure of ours."""

    figure: Literal["speed-up", "share of time", "bytes per element", "us per element"]
    bound: float  # from below on a speed-up, from above on all others
    against: str | None = None  # the contender of a speed-up or a share of time
    elements: float = 1.0  # what bytes and microseconds are divided by

    def judge(self, entries: dict[str, Entry], ours: str) -> GoalReport:
        """The figure measured, and whether it keeps the bound."""
        mine, ratio = entries[ours], entries[self.against or ours]["ratio"]
        value = {
            "speed-up": ratio,
            "share of time": ratio and 1.0 / ratio,
            "bytes per element": _per(mine["peak_bytes"], self.elements),
            "us per element": _per(mine["median_s"], 1e-6 * self.elements),
        }[self.figure]
        up = self.figure == "speed-up"
        reached = None
        if value is not None:
            value = float(f"{value:.4g}")
            reached = value >= self.bound if up else value <= self.bound
        whom = f" {'over' if up else 'of'} {self.against}" if self.against else ""
        target = f"{'>=' if up else '<='} {self.bound:g}"
        return {
            "figure": self.figure + whom, "target": target, "measured": value, "reached": reached,
        }  # fmt: skip


def _per(x: float | None, count: float) -> float | None:
    return None if x is None else x / count


class CaseReport(TypedDict):
    """All contenders on one case."""

    name: str
    sizes: dict[str, float]
    contenders: dict[str, Entry]
    goal: GoalReport | None


class Report(TypedDict):
    """The file."""

    schema_version: int
    suite: str
    about: str  # what one call computes
    ours: str  # the contender that ratios refer to
    quick: bool  # a smaller run that proves the script works; not to be published
    options: dict[str, Any]  # of the command line
    date: str  # ISO 8601, UTC
    commit: str | None  # null outside a git checkout
    dirty: bool | None  # whether anything but results differs from the commit
    versions: dict[str, str]  # python, torch, numpy, proxy_losses
    peers: dict[str, str | None]  # optional package -> version, null if not importable
    machine: dict[str, Any]  # see `machine`
    clock: str
    tolerance: float  # the largest deviation that the gate lets pass
    cases: list[CaseReport]


def git(*args: str) -> str | None:
    """Output of a git command, None where there is no git or no checkout."""
    try:
        done = subprocess.run(["git", *args], cwd=ROOT, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor())


def _gpu() -> str:
    """Name of the card, "cpu" without one."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"


def versions() -> dict[str, str]:
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": numpy.__version__,
        "proxy_losses": proxy_losses.__version__,
    }


def machine(threads: int) -> dict[str, Any]:
    """Where it runs; `load` is the 1 minute average at the start, with other work in it."""
    return {
        "platform": platform.platform(),
        "cpu": _cpu(),
        "cpu_count": os.cpu_count(),
        "device": _gpu(),
        "threads": threads,
        "peak_resolution": PEAK_RESOLUTION,
        "load": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
    }


def now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def checkout() -> tuple[str | None, bool | None]:
    """The commit, and whether the tree differs from it outside the results."""
    changes = git("status", "--porcelain", "--", ".", f":!{RESULTS}")
    return git("rev-parse", "HEAD"), None if changes is None else bool(changes)


def heading(suite: str, about: str, peers: Mapping[str, str | None] | None = None) -> Written:
    """What a suite without `Report` begins with: what ran, when, where and on what; one thread."""
    commit, dirty = checkout()
    return {
        "suite": suite, "about": about, "date": now(), "commit": commit, "dirty": dirty,
        "versions": {**versions(), **(peers or {})}, "machine": machine(1),
    }  # fmt: skip


def write(written: Mapping[str, Any], path: Path, indent: int | None = 1) -> None:
    """A JSON file; its folder is made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(written, indent=indent) + "\n")


def save(written: Mapping[str, Any], args: argparse.Namespace, suite: str) -> Path | None:
    """Write ``--out``, or ``results/<suite>.json`` unless it is a quick run; where it went."""
    out: Path | None = args.out or (None if args.quick else ROOT / RESULTS / f"{suite}.json")
    if out is not None:
        write(written, out)
    return out


def main(
    suite: str, argv: Sequence[str] | None, measure: Callable[[bool], Written],
    show: Callable[[Written], str], draw: Callable[[Written, Path], None],
) -> int:  # fmt: skip
    """Measure (quickly or not), print, write and draw, on one thread; or draw the file alone."""
    options = argparse.ArgumentParser(prog=f"python -m benchmarks.{suite}")
    options.add_argument("--quick", action="store_true", help="few steps, to see that it works")
    options.add_argument("--plot", action="store_true", help="draw the file, train nothing")
    options.add_argument("--out", type=Path, help="JSON file; without it, --quick writes none")
    args = options.parse_args(argv)
    if args.plot:
        path = args.out or ROOT / RESULTS / f"{suite}.json"
        draw(json.loads(path.read_text()), path.with_suffix(".png"))
        return 0
    torch.set_num_threads(1)
    written = measure(args.quick)
    print(show(written))
    if (out := save(written, args, suite)) is not None:
        draw(written, out.with_suffix(".png"))
    return 0


def show(report: Report) -> str:
    """The report as tables, ratios first."""
    commit = report["commit"] or "no commit"
    where = report["machine"]
    lines = [
        f"{report['suite']}: {report['about']}",
        f"{commit[:12]}{' (modified)' if report['dirty'] else ''}, {report['date']}, "
        f"torch {report['versions']['torch']}, {where['cpu']} x {where['cpu_count']}, "
        f"threads {where['threads']}, load {where['load']}",
    ]
    ours = report["ours"]
    lines += _goals(report)
    lines += _table(f"time / time of {ours} (above 1: {ours} is faster)", report, _ratio)
    lines += _table(f"peak memory / peak of {ours}", report, _memory_ratio)
    lines += _table("ms per call, median [quartiles]", report, _time)
    lines += _table("peak memory above the inputs, MB", report, _memory)
    reasons = [
        f"{case['name']}: {name} {entry['status']}, {entry['reason']}"
        for case in report["cases"]
        for name, entry in case["contenders"].items()
        if entry["reason"] is not None
    ]
    return "\n".join([*lines, "", *reasons] if reasons else lines)


def _goals(report: Report) -> list[str]:
    """Targets and what was measured, one line per case that has one."""
    rows = [
        [case["name"], goal["figure"], goal["target"], _number(goal["measured"]),
         {True: "yes", False: "NO", None: "not measured"}[goal["reached"]]]
        for case in report["cases"] if (goal := case["goal"]) is not None
    ]  # fmt: skip
    title = "targets of the full sizes, quick run" if report["quick"] else "targets"
    header = [title, "figure", "target", "measured", "reached"]
    return ["", *align([header, *rows])] if rows else []


def _number(x: float | None) -> str:
    return "-" if x is None else f"{x:,.0f}" if x >= 100 else f"{x:.3g}"


def align(rows: list[list[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows
    ]


def markdown(rows: Sequence[Sequence[str]]) -> str:
    """A table, the first row its head."""
    lines = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([lines[0], "|---" * len(rows[0]) + "|", *lines[1:]])


def replaced(page: str, block: str, mark: str = "measured") -> str:
    """The page with this between the marks of this name."""
    between = rf"(<!-- {mark}: begin -->\n).*?(<!-- {mark}: end -->)"
    page, count = re.subn(between, lambda m: f"{m[1]}{block}\n{m[2]}", page, flags=re.DOTALL)
    if count != 1:
        raise ValueError(f"the page must have the marks of {mark!r} once, got {count}")
    return page


def _table(title: str, report: Report, cell: Callable[[Entry, Entry], str]) -> list[str]:
    """Cases down, contenders across."""
    names = list(dict.fromkeys(n for case in report["cases"] for n in case["contenders"]))
    rows = [["", *names]]
    for case in report["cases"]:
        entries, ours = case["contenders"], case["contenders"][report["ours"]]
        cells = (
            "" if e is None else cell(e, ours) if e["status"] == "measured" else e["status"]
            for e in (entries.get(name) for name in names)
        )
        rows.append([case["name"], *cells])
    return ["", title, *align(rows)]


def _ratio(entry: Entry, ours: Entry) -> str:
    if entry is ours:
        return "1"
    low, high = entry["ratio_iqr"] or (0.0, 0.0)
    return f"{entry['ratio']:.2f} [{low:.2f}, {high:.2f}]"


def _memory_ratio(entry: Entry, ours: Entry) -> str:
    mine, theirs = ours["peak_bytes"], entry["peak_bytes"]
    if mine is None or theirs is None or max(mine, theirs) < PEAK_RESOLUTION:
        return "-"
    low, high = (p < PEAK_RESOLUTION for p in (mine, theirs))
    bound = ">" if low else "<" if high else ""
    return f"{bound}{max(theirs, PEAK_RESOLUTION) / max(mine, PEAK_RESOLUTION):.2f}"


def _time(entry: Entry, ours: Entry) -> str:
    low, high = entry["iqr_s"] or (0.0, 0.0)
    return f"{_ms(entry['median_s'] or 0.0)} [{_ms(low)}, {_ms(high)}]"


def _ms(seconds: float) -> str:
    ms = 1e3 * seconds
    return f"{ms:,.0f}" if ms >= 100 else f"{ms:.3g}"


def _memory(entry: Entry, ours: Entry) -> str:
    if entry["peak_bytes"] is None:
        return "-"
    small = entry["peak_bytes"] < PEAK_RESOLUTION
    return f"<{PEAK_RESOLUTION / 1e6:.1f}" if small else f"{entry['peak_bytes'] / 1e6:.1f}"
