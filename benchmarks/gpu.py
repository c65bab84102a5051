"""Smooth-AP and the loss modules on a GPU: right first, then fast, eager and as a CUDA graph.

``python -m benchmarks.gpu [--quick] [--out FILE] [--plot]``; peers are optional. Without a GPU
``--quick --device cpu`` shows that the script works.

Every call ends when the device is done. "eager" is what a user waits for, launches included.
"replay" replays a captured CUDA graph `REPLAYS` times a call: the GPU's own time.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from proxy_losses._metrics import METRICS

from . import harness, report
from .figures import BLUE, GREEN, GREY, ORANGE, milliseconds, new_figure, tidy
from .harness import OURS, Case, Fn, Skip, Suite
from .losses import KINDS, Kind, batches
from .ranks import LISTS, SORT, Steps
from .report import Goal, Report
from .smooth_ap import PEER, TAU, plain_all_pairs, value_and_grad

MODULE = "benchmarks.gpu"
SIX_LINES, BCE = "six lines, torch.compile", "BCE alone"
REPLAYS = 10
TOLERANCE = 1e-5  # of the gate: values promise 1e-6, gradients 3e-6 of their scale
EAGER_ROWS, EAGER_RATES = (256, 1024, 4096, 16384, 65536), (0.005, 0.05, 0.5)
MILLION = 1_000_000

Step = Callable[[], tuple[Tensor, ...]]


def done(step: Step, device: str) -> Step:
    """The step, returning when the device has computed it."""
    if device == "cpu":
        return step

    def run() -> tuple[Tensor, ...]:
        out = step()
        torch.cuda.synchronize()
        return out

    return run


def captured(step: Callable[[], Any]) -> tuple[torch.cuda.CUDAGraph, Any]:
    """A graph of the step, after warm-up on another stream, and what it writes to."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = step()
    return graph, out


def replay(step: Step, device: str) -> Fn | Skip:
    """The step as a CUDA graph."""
    if device == "cpu":
        return Skip("absent", "no CUDA")
    graph, out = captured(step)

    def run() -> tuple[Tensor, ...]:
        for _ in range(REPLAYS):
            graph.replay()
        torch.cuda.synchronize()
        return out

    return run


def without_reads(step: Step, device: str) -> None:
    """Raise if the step waits for the device."""
    step()
    if device == "cpu":
        return
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def bytes_above(step: Step, device: str) -> float:
    """Peak device memory of a call above what is held."""
    if device == "cpu":
        return float("nan")
    step()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    held = torch.cuda.memory_allocated()
    step()
    torch.cuda.synchronize()
    return float(torch.cuda.max_memory_allocated() - held)


def in_float64(scores: Tensor, pos: Tensor) -> Tensor:
    """The plain formula from all pairs."""
    return plain_all_pairs(scores.double(), pos).to(scores.dtype)


def six_lines(scores: Tensor, pos: Tensor) -> Tensor:
    """The same without indexing, so that a compiler fuses it and nothing is read."""
    above = torch.sigmoid((scores[None, :] - scores[:, None]) / TAU)
    hits = pos.to(scores.dtype)
    rank_pos = 0.5 + (above * hits).sum(1)
    return (hits * rank_pos / (0.5 + above.sum(1))).sum() / hits.sum()


def sorting(scores: Tensor) -> tuple[Tensor, ...]:
    torch.sort(scores)
    return ()


def function_cases(device: str, quick: bool) -> tuple[list[Case], list[Case]]:
    """Of `smooth_ap`, to time and to check."""
    from proxy_losses import smooth_ap

    peer, _ = harness.peer(PEER)
    ours = partial(smooth_ap, tau=TAU)
    cases, checks = [], []

    def inputs(kind: str, rows: int, rate: float) -> tuple[Tensor, Tensor]:
        scores, pos = LISTS[kind](rows, rate)
        return scores.to(device), pos.to(device)

    for kind in LISTS:
        for rows in (200, 3000):
            data = inputs(kind, rows, 0.05)
            without_reads(partial(value_and_grad, ours, *data), device)
            checks.append(
                Case(f"check, {kind}, {rows:,}", {"rows": rows}, {
                    OURS: partial(value_and_grad, ours, *data),
                    "float64": partial(value_and_grad, in_float64, *data),
                    "six lines": partial(value_and_grad, six_lines, *data),
                })
            )  # fmt: skip
    compiled = six_lines if device == "cpu" else torch.compile(six_lines, dynamic=False)
    for rows in EAGER_ROWS[:2] if quick else EAGER_ROWS:
        for rate in EAGER_RATES:
            data = inputs("normal", rows, rate)
            contenders: dict[str, Fn | Skip] = {
                OURS: done(partial(value_and_grad, ours, *data), device),
                SIX_LINES: done(partial(value_and_grad, compiled, *data), device),
                SORT: done(partial(sorting, data[0]), device),
                PEER: Skip("absent", "not installed"),
            }
            if peer is not None:
                loss = peer.SmoothAPLoss(1, temperature=TAU, queue_size=0)
                contenders[PEER] = done(partial(peer_step, loss, *data), device)
            name = f"eager, 1 x {rows:,}, {rate:.1%}"
            sizes = {"rows": rows, "rate": rate}
            cases.append(Case(name, sizes, contenders, Goal("speed-up", 1.0, SIX_LINES)))
    for kind in LISTS:
        for rows in (20_000,) if quick else (MILLION, 10 * MILLION):
            data = inputs(kind, rows, 0.05)
            step = partial(value_and_grad, ours, *data)
            bound = 3.0 if kind == "normal" else 12.0
            if rows > MILLION:
                bound = 4.0
            fns = {OURS: replay(step, device), SORT: replay(partial(sorting, data[0]), device)}
            if device == "cpu":
                fns = {OURS: step, SORT: partial(sorting, data[0])}
            per_row = bytes_above(step, device) / rows
            cases.append(
                Case(f"replay, 1 x {rows:,}, {kind}", {"rows": rows, "bytes_per_row": per_row}, fns,
                     Goal("share of time", bound, SORT))
            )  # fmt: skip
    return cases, checks


def peer_step(loss: Any, scores: Tensor, pos: Tensor) -> tuple[Tensor, Tensor]:
    """1 minus the peer's loss, and its gradient."""
    return value_and_grad(lambda s, p: 1.0 - loss(s[:, None], p.long()), scores, pos)


class Training:
    """Steps of a module on batches that are already on the device."""

    def __init__(self, loss: Any, steps: Sequence[tuple[Tensor, Tensor]], device: str) -> None:
        self.loss = loss.to(device)
        self.steps = [(z.to(device), y.to(device)) for z, y in steps]
        for z, y in self.steps:
            self.loss(z, y)
        self.turn = 0

    def __call__(self) -> tuple[Tensor, ...]:
        """The next step: loss and gradient."""
        logits, targets = self.steps[self.turn % len(self.steps)]
        self.turn += 1
        return value_and_grad(self.loss, logits, targets)


def module_kinds() -> dict[str, Kind]:
    """Every ranking loss: the published ones as elsewhere, and all others of the records."""
    kinds = {name: kind for name, kind in KINDS.items() if kind.queue}
    known = {kind.cls for kind in kinds.values()}
    for name in ("RecallAtQuantileLoss", "PAUCAtBudgetLoss"):
        moving = {**kinds[name].kwargs, "threshold_grad": "implicit"}
        kinds[f"{name}, implicit"] = Kind(name, moving)
    others = [m.module for m in METRICS if m.module not in known]
    return kinds | {name: Kind(name, {"temperature": 0.05}) for name in others}


def make(package: Any, kind: Kind, classes: int, queue: int) -> Any:
    """The module, or None where the package has no such loss or option."""
    try:
        return getattr(package, kind.cls)(classes, queue_size=queue, **kind.kwargs)
    except (AttributeError, TypeError):
        return None


def module_cases(device: str, quick: bool) -> tuple[list[Case], list[Case]]:
    """All ranking losses beside those of imbalanced-losses, to time and to check."""
    peer, _ = harness.peer(PEER)
    makers = {OURS: harness.packages(argparse.Namespace())[OURS], PEER: peer}
    cases, checks = [], []
    sizes = [(1, 1024)] if quick else [(1, 1024), (1, 16384), (10, 1024), (10, 16384), (1000, 1024)]
    for name, kind in module_kinds().items():
        fresh, steps = partial(make, makers[OURS], kind, 10, 1024), batches(10, 512, 3)
        here = [(z.to(device), y.to(device)) for z, y in steps]
        double = [(z.double(), y) for z, y in steps]
        checks.append(
            Case(f"check, {name}", {"classes": 10}, {
                OURS: Steps(lambda fresh=fresh: fresh().to(device), here),
                "float64": Steps(lambda fresh=fresh: fresh().double(), double),
            })
        )  # fmt: skip
    for classes, queue in sizes:
        steps = batches(classes, 512, queue // 512 + 1)
        logits, targets = (x.to(device) for x in steps[0])
        for name, kind in module_kinds().items():
            if classes == 1000 and name != "SmoothAPLoss":
                continue
            contenders: dict[str, Fn | Skip] = {}
            for who, package in makers.items():
                loss = make(package, kind, classes, queue)
                if loss is None:
                    contenders[who] = Skip("absent", "not installed, or has no such loss")
                    continue
                training = Training(loss, steps, device)
                if who == OURS:
                    without_reads(training, device)
                contenders[who] = done(training, device)
            contenders[BCE] = done(partial(_bce, logits, targets), device)
            least = 200.0 if classes == 1000 else 1.0
            cases.append(
                Case(f"{name}, {classes:,} x 512 + {queue:,}", {"classes": classes, "queue": queue},
                     contenders, Goal("speed-up", least, PEER))
            )  # fmt: skip
    return cases, checks


def retrieval_cases(device: str, quick: bool) -> list[Case]:
    """Rows of 128 numbers, ranked among each other and a memory by smooth average precision."""
    from proxy_losses import RetrievalLoss

    cases = []
    for memory in (1024,) if quick else (0, 1024, 16384):
        gen = torch.Generator().manual_seed(memory)
        steps = [
            (torch.randn(512, 128, generator=gen), torch.randint(64, (512,), generator=gen))
            for _ in range(memory // 512 + 1)
        ]
        loss = RetrievalLoss("ap", memory_size=memory, embedding_dim=128 if memory else None)
        training = Training(loss, steps, device)
        without_reads(training, device)
        contenders: dict[str, Fn | Skip] = {OURS: done(training, device)}
        contenders[SORT] = done(partial(sorting, torch.randn(512, 512 + memory).to(device)), device)
        cases.append(
            Case(f"RetrievalLoss, 512 + {memory:,}", {"memory": memory}, contenders,
                 Goal("share of time", 12.0, SORT))
        )  # fmt: skip
    return cases


def _bce(logits: Tensor, targets: Tensor) -> tuple[Tensor, ...]:
    """The yardstick: what a training step without a ranking loss takes for its loss."""
    wide = (targets[:, None] == torch.arange(logits.shape[1], device=logits.device)).float()
    leaf = logits.detach().requires_grad_()
    torch.nn.functional.binary_cross_entropy_with_logits(leaf, wide).backward()
    return ()


def suite(args: argparse.Namespace) -> Suite:
    device = args.device
    if device != "cpu" and not torch.cuda.is_available():
        raise SystemExit("no GPU here; --quick --device cpu shows that the script works")
    cases, checks = function_cases(device, args.quick)
    about = (
        f"value and gradient of smooth_ap, tau {TAU}, float32, and training steps of the modules; "
        f"a replay is {REPLAYS} replays of a CUDA graph"
    )
    modules, more = module_cases(device, args.quick)
    cases += modules + retrieval_cases(device, args.quick)
    version = harness.peer(PEER)[1]
    return Suite("gpu", about, OURS, cases, TOLERANCE, {PEER: version}, checks + more)


def draw(written: Report, path: Path) -> None:
    """Eager time of one list against its rows, 5 % positives."""
    figure = new_figure(6.0, 3.6)
    ax = figure.subplots()
    found: dict[str, list[tuple[float, float]]] = {}
    for case in written["cases"]:
        if case["name"].startswith("eager") and case["sizes"]["rate"] == 0.05:
            for name, entry in case["contenders"].items():
                if entry["median_s"] is not None:
                    found.setdefault(name, []).append(
                        (case["sizes"]["rows"], 1e3 * entry["median_s"])
                    )
    colours = {OURS: BLUE, SIX_LINES: ORANGE, SORT: GREY, PEER: GREEN}
    for name, points in found.items():
        ax.plot(*zip(*points, strict=True), marker="o", color=colours[name], label=name)
    ax.set_xscale("log")
    ax.set_yscale("log")
    milliseconds(ax)
    tidy(ax, "rows of the list", "ms, value and gradient")
    ax.set_title(f"Smooth-AP on {written['machine']['device']}", fontsize=10)
    ax.legend(fontsize=8, frameon=False)
    figure.savefig(path)


def main(argv: Sequence[str] | None = None) -> int:
    options = harness.parser(MODULE, against=False)
    options.set_defaults(no_memory=True)
    options.add_argument("--device", default="cuda", help="cuda, or cpu to try the script")
    options.add_argument("--plot", action="store_true", help="draw the file, measure nothing")
    args = options.parse_args(argv)
    path = args.out or report.ROOT / report.RESULTS / "gpu.json"
    if not args.plot:
        status = harness.main(MODULE, suite, argv, options)
        if status or not path.exists():
            return status
    draw(json.loads(path.read_text()), path.with_suffix(".png"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
