"""Smooth-AP over pools that are sharded over processes, against gathering the rows.

``python -m benchmarks.shards [--quick] [--out FILE]`` measures with gloo on this machine;
``python -m benchmarks.shards --table`` counts what would be sent between many.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple
from unittest import mock

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

from proxy_losses import all_gather_no_grad, all_gather_with_grad, smooth_ap

from . import harness
from .harness import Case, Fn, Suite
from .ranks import student_list
from .smooth_ap import TAU, make_list

MODULE = "benchmarks.shards"
SHARDED, GATHERED, ONE = "sharded", "gathered", "one process"
WAYS = (SHARDED, GATHERED, ONE)
RATE = 0.05
TOLERANCE = 1e-5  # of the gate: float32 gradients, each within a few RTOL
LISTS = {"normal": make_list, "Student t": student_list}
STOP = -1


class Task(NamedTuple):
    """One pool and how many processes hold it."""

    world: int
    shape: str
    rows: int


FULL = [Task(w, shape, m) for m in (100_000, 1_000_000, 8_000_000) for shape in LISTS
        for w in (2, 4)]  # fmt: skip
QUICK = [Task(w, "normal", 20_000) for w in (2, 3)]
TABLE = ((2, 10**5), (8, 10**6), (64, 10**6), (64, 16 * 10**6))


def own(task: Task, rank: int) -> slice:
    bounds = [task.rows * k // task.world for k in (rank, rank + 1)]
    return slice(*bounds)


def call(task: Task, way: str, rank: int, group: Any) -> tuple[Tensor, ...]:
    """Value, and the gradient that data parallel training averages, at the rows of this rank."""
    scores, pos = pool_of(task)
    mine = own(task, rank)
    if way == ONE:
        leaf = scores.requires_grad_()
        value = smooth_ap(leaf, pos, TAU)
        (grad,) = torch.autograd.grad(value, leaf)
        return value.detach(), grad[mine]
    leaf = scores[mine].clone().requires_grad_()
    if way == SHARDED:
        value = smooth_ap(leaf, pos[mine], TAU, group=group)
    else:
        rows = all_gather_with_grad(leaf, group=group)
        value = smooth_ap(rows, all_gather_no_grad(pos[mine], group=group), TAU)
    (grad,) = torch.autograd.grad(value, leaf)
    return value.detach(), grad / task.world


_POOLS: dict[Task, tuple[Tensor, Tensor]] = {}


def pool_of(task: Task) -> tuple[Tensor, Tensor]:
    """The whole pool, kept while it is measured."""
    if task not in _POOLS:
        _POOLS.clear()
        _POOLS[task] = LISTS[task.shape](task.rows, RATE)
    scores, pos = _POOLS[task]
    return scores.detach(), pos


class Crew:
    """Processes that wait for the first one to say which call to make."""

    def __init__(self, rank: int, size: int, folder: str, tasks: Sequence[Task]) -> None:
        dist.init_process_group("gloo", f"file://{folder}/meet", rank=rank, world_size=size)
        self.rank, self.tasks = rank, tasks
        worlds = sorted({task.world for task in tasks})
        self.groups = {world: dist.new_group(list(range(world))) for world in worlds}

    def say(self, number: int, way: int) -> None:
        """Tell the others."""
        dist.broadcast(torch.tensor([number, way]), 0)

    def listen(self) -> None:
        """Take part until told to stop."""
        while True:
            heard = torch.empty(2, dtype=torch.int64)
            dist.broadcast(heard, 0)
            number, way = heard.tolist()
            if number == STOP:
                return
            task = self.tasks[number]
            if self.rank < task.world and WAYS[way] != ONE:
                call(task, WAYS[way], self.rank, self.groups[task.world])

    def lead(self, number: int, way: int) -> tuple[Tensor, ...]:
        """Say it and take part."""
        self.say(number, way)
        task = self.tasks[number]
        return call(task, WAYS[way], self.rank, self.groups[task.world])


def follower(index: int, size: int, folder: str, tasks: Sequence[Task], threads: int) -> None:
    torch.set_num_threads(threads)
    crew = Crew(index + 1, size, folder, tasks)
    crew.listen()
    dist.destroy_process_group()


def wire(run: Callable[[], Any]) -> tuple[int, int]:
    """Bytes that this process hands to `all_reduce`, and to `all_gather` of its own, in a call."""
    reduce, gather = (mock.Mock(side_effect=f) for f in (dist.all_reduce, dist.all_gather))
    with mock.patch.multiple(dist, all_reduce=reduce, all_gather=gather):
        run()
    calls = reduce.call_args_list, gather.call_args_list
    reduced, gathered = (sum(c.args[at].nbytes for c in of) for at, of in enumerate(calls))
    return reduced, gathered


def case_of(crew: Crew, number: int) -> Case:
    task = crew.tasks[number]
    contenders: dict[str, Fn | harness.Skip] = {
        way: partial(crew.lead, number, k) for k, way in enumerate(WAYS)
    }
    scores, _ = pool_of(task)
    span = round(float(scores.max() - scores.min()) / TAU)
    sizes = {"M": task.rows, "processes": task.world, "tau": TAU, "span_tau": span}
    for k, way in enumerate(WAYS[:2]):
        sizes[f"{way}_bytes"] = sum(wire(partial(crew.lead, number, k)))
    return Case(f"{task.shape}, M = {task.rows:,}, {task.world} processes", sizes, contenders)


def build(crew: Crew, _: Any) -> Suite:
    about = "forward and backward of smooth_ap, float32, eager, all processes on this machine"
    cases = [case_of(crew, k) for k in range(len(crew.tasks))]
    return Suite("shards", about, SHARDED, cases, TOLERANCE, {})


def table() -> str:
    """Bytes that leave each process per forward: moments against scores and labels.

    Counted in one process that plays the first of so many. The others play dead: their rows are
    missing from the size that the accuracy is set for, which changes a few percent.
    """
    lines = ["processes x rows   span / tau   sharded KB  gathered MB        ratio"]
    for world, rows in TABLE:
        dist.init_process_group("fake", rank=0, world_size=world, store=dist.HashStore())
        pos = torch.arange(rows) < RATE * rows
        for span in (20, 240, 1000):
            scores = torch.linspace(0.0, float(span), rows).requires_grad_()
            run = partial(smooth_ap, scores, pos, 1.0, group=dist.group.WORLD)
            reduced, gathered = wire(run)  # what goes round a ring:
            ours = 2.0 * (world - 1) / world * reduced + (world - 1) * gathered
            theirs = rows * (scores.itemsize + 1) * (world - 1)
            lines.append(
                f"{world:4d} x {rows:10,d}   {span:10d}   {ours / 1e3:10.1f}   "
                f"{theirs / 1e6:10.1f}   {theirs / ours:10,.0f}"
            )
        dist.destroy_process_group()
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    options = harness.parser(MODULE, against=False)
    options.add_argument("--table", action="store_true", help="bytes between many, no times")
    options.set_defaults(no_memory=True)  # of several processes; not measured
    args = options.parse_args(argv)
    if args.table:
        print(table())
        return 0
    tasks = QUICK if args.quick else FULL
    size = max(task.world for task in tasks)
    with tempfile.TemporaryDirectory() as folder:
        others = mp.spawn(follower, (size, folder, tasks, args.threads), size - 1, join=False)
        crew = Crew(0, size, folder, tasks)
        try:
            return harness.main(MODULE, partial(build, crew), argv, options)
        finally:
            crew.say(STOP, 0)
            assert others is not None
            others.join()
            dist.destroy_process_group()


if __name__ == "__main__":
    raise SystemExit(main())
