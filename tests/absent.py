"""Importing a file as if packages were not installed."""

import importlib.util
import sys
from pathlib import Path

import proxy_losses


def import_without(monkeypatch, file: str, *packages: str):
    """A fresh copy of integrations/<file>.py, imported while these packages cannot be."""
    for name in packages:
        monkeypatch.setitem(sys.modules, name, None)
    path = Path(proxy_losses.__file__).parent / "integrations" / f"{file}.py"
    spec = importlib.util.spec_from_file_location(f"proxy_losses.integrations._{file}_again", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
