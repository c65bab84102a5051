"""Compile the kernels that the launchers ask for, down to machine code, without a GPU.

``python -m tests.compile_kernels 90``: for compute capability 9.0. Prints a line for each: its name
and the shared memory it takes.
"""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction


def main(capability: int) -> None:
    target = GPUTarget("cuda", capability, 32)
    driver.set_active(
        SimpleNamespace(
            get_current_target=lambda: target,
            get_current_device=lambda: 0,
            get_current_stream=lambda _: 0,
        )
    )
    run, done = JITFunction.run, set()

    def compile_only(self: JITFunction, *args: Any, grid: Any, warmup: bool, **given: Any) -> Any:
        kernel = run(self, *args, grid=grid, warmup=True, **given)
        if kernel.hash not in done:
            done.add(kernel.hash)
            assert kernel.asm["cubin"]
            print(self.fn.__name__, kernel.metadata.shared)
        return kernel

    JITFunction.run = compile_only  # type: ignore[method-assign]
    from proxy_losses._ranks.triton import launch, ring, steps
    from proxy_losses.nn._ring import SEAL

    for lists, rows, dtype in ((1, 4096, torch.float32), (3, 1000, torch.float64)):
        scores = torch.zeros(lists, rows, dtype=dtype)
        mask, tau = scores > 1, torch.ones(lists, dtype=torch.float64)
        for method in ("dense", "grid"):
            for valid, weight, phi in (
                (None, None, "precision"),
                (mask, scores, "outranked"),
                (mask, scores, "discount"),
            ):
                rtol = 1e-6 if dtype == torch.float32 else 1e-12
                for grad in (True, False):
                    launch.rank_mean(scores, mask, valid, weight, tau, grad, phi, rtol, method)
            for kinds, weights in (
                ("value,slope", torch.stack([mask, mask], 1)),
                ("slope", scores[:, None]),
                ("value,stretch", scores[:, None].repeat(1, 3, 1)),
            ):
                launch.pair_sums(scores, weights, mask[:, None], tau, kinds, rtol, method)
        some, one = mask[:, 0], tau[0]
        for valid, weight, grad in ((None, None, True), (mask, scores, False)):
            given = scores, mask, valid, weight, tau
            steps.first_rank(*given, grad)
            steps.relative_gains(mask, valid, weight, weight, dtype)
            steps.precision_place(scores, scores.long(), mask, valid, one)
            for moves, knots, cut, spread in (
                ("", 1, None, []),
                ("quantile", 1, some, []),
                ("quantile", 5, None, [3, 4]),
                ("precision", 1, some, []),
            ):
                at, count = scores[:, :knots], max(knots - 2, 1)
                others = cut, valid, valid, one, count, spread, moves, True
                steps.mean_above(*given, at, *others)
        steps.ideal_share(scores, tau)
    count = torch.zeros((), dtype=torch.int64)
    for rows in (5, 8):
        for buffer, given in ((torch.zeros(8, 3), torch.zeros(rows, 3)), (torch.zeros(8), None)):
            ring.put_rows(buffer, given, 1, rows, count, count > 0)
        mark = torch.zeros(1, dtype=torch.float64)
        ring.count_rows(count, count, mark, count, count > 0, rows, 8, SEAL)
    ids, rows = torch.zeros(8, dtype=torch.int64), torch.zeros(8, 3)
    for weight in (None, rows[:, 0]):
        gains = None if weight is None else rows
        ring.keeps(rows, ids, weight, gains, ids > 0, torch.float32, -100)


if __name__ == "__main__":
    main(int(sys.argv[1]))
