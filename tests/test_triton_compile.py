"""The Triton kernels compile to machine code of the GPUs that people have."""

from __future__ import annotations

import inspect
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")


@pytest.mark.slow
def test_every_kernel_compiles(tmp_path: Path) -> None:
    """For the oldest cards that they run on."""
    from proxy_losses._ranks.triton import kernels, step_kernels

    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    env |= {"TRITON_CACHE_DIR": str(tmp_path), "TRITON_DEFAULT_FP_FUSION": "1"}
    program = [sys.executable, "-m", "tests.compile_kernels", "80"]
    found = subprocess.run(
        program, env=env, cwd=Path(__file__).parent.parent, capture_output=True, text=True
    )
    assert found.returncode == 0, found.stderr[-2000:]
    lines = [line.split() for line in found.stdout.splitlines()]
    public = {
        name
        for name, value in (vars(kernels) | vars(step_kernels)).items()
        if not name.startswith("_") and hasattr(value, "fn") and inspect.isfunction(value.fn)
    }
    assert {name for name, _ in lines} == public
    # What a block may have on every one of them without asking for more.
    assert max(int(shared) for _, shared in lines) <= 48 << 10
