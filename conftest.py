"""Doctests see the public names, as a reader of the examples would import them."""

from importlib.util import find_spec

import pytest
import torch

import proxy_losses

# Two workers share the cores; more threads than cores would only wait for each other.
torch.set_num_threads(1)

# Doctests of what is not installed.
collect_ignore = [
    f"proxy_losses/integrations/{file}.py"
    for file, packages in {
        "lightning": ("lightning", "pytorch_lightning"),
        "huggingface": ("transformers",),
        "sklearn": ("sklearn",),
        "_classes": ("sklearn",),
        "_embedder": ("sklearn",),
        "_rows": ("sklearn",),
        "_scorecard": ("sklearn",),
    }.items()
    if not any(map(find_spec, packages))
]
if not find_spec("triton"):
    collect_ignore += ["proxy_losses/_ranks/triton", "tests/compile_kernels.py"]


@pytest.fixture(autouse=True)
def _doctest_names(doctest_namespace: dict) -> None:
    doctest_namespace["torch"] = torch
    doctest_namespace.update({n: getattr(proxy_losses, n) for n in proxy_losses.__all__})
