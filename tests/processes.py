"""Processes of one group that a test starts, each with what it found."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist


def _process(rank: int, world: int, folder: str, worker: Callable, args: tuple, before: Any):
    """As torchrun starts it, but the processes meet at a file."""
    torch.set_num_threads(1)
    os.environ |= {"RANK": f"{rank}", "LOCAL_RANK": f"{rank}", "WORLD_SIZE": f"{world}"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = f"{folder}/compiled{rank}"
    first = [] if before is None else [before()]
    dist.init_process_group("gloo", f"file://{folder}/meet", rank=rank, world_size=world)
    torch.save(worker(rank, *first, *args), f"{folder}/{rank}.pt")
    dist.barrier()  # another may still ask this one for its share
    # Past the end of the interpreter: models and compiled code keep the threads of a group, and
    # one that frees the tensors of the last collective at that moment aborts the process.
    os._exit(0)


def run(world: int, worker: Callable, *args: Any, before: Callable | None = None) -> list[Any]:
    """What ``worker(rank, *args)`` returns in each process of a group of ``world``.

    With ``before`` it is ``worker(rank, before(), *args)``, called before there is a group.
    """
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(_process, (world, folder, worker, args, before), nprocs=world)
        return [torch.load(f"{folder}/{rank}.pt", weights_only=True) for rank in range(world)]
