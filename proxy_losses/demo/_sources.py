"""Where the demo's tables come from: bundled, made up, a file, or OpenML."""

from __future__ import annotations

import socket
import warnings
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
import numpy.typing as npt

from ._errors import DemoError
from ._tables import Floats, Table, check_features, encode_labels, some, thin_positives

SUFFIXES = (".npz", ".csv", ".parquet")
DIGIT = 8
SYNTHETIC_ROWS = 20_000
SYNTHETIC_RATE = 0.01
_MAX_CATEGORIES = 100
_OPENML_TIMEOUT_S = 30.0


def load_table(
    data: str, *, target: str | None, multiclass: bool, pos_rate: float | None, seed: int
) -> Table:
    """The table that ``--data`` names, thinned to ``pos_rate`` positives where that is given."""
    if target is not None and data in ("digits", "synthetic"):
        raise DemoError(f"--target is for tables with named columns; {data} has none")
    if data == "synthetic":
        return _synthetic(multiclass, pos_rate or SYNTHETIC_RATE, seed)
    path = Path(data).expanduser()
    if data == "digits":
        table = _digits(multiclass)
    elif path.suffix.lower() in SUFFIXES or path.exists():
        table = _from_file(path, target, multiclass)
    else:
        table = _from_openml(data, target, multiclass)
    return table if pos_rate is None else thin_positives(table, pos_rate, seed)


def _digits(multiclass: bool) -> Table:
    from sklearn.datasets import load_digits

    features, digit = load_digits(return_X_y=True)
    if multiclass:
        return Table("digits", features, digit.astype(np.int64), tuple("0123456789"))
    return Table("digits", features, (digit == DIGIT).astype(np.int64), ("the rest", str(DIGIT)))


def _synthetic(multiclass: bool, pos_rate: float, seed: int) -> Table:
    from sklearn.datasets import make_classification

    weights = [0.90, 0.06, 0.03, 0.01] if multiclass else [1 - pos_rate, pos_rate]
    features, labels = make_classification(
        n_samples=SYNTHETIC_ROWS,
        n_features=20,
        n_informative=8,
        n_redundant=4,
        n_classes=len(weights),
        n_clusters_per_class=3,
        weights=weights,
        flip_y=0.0,  # a share of random labels would swamp the few positives
        random_state=seed,
    )
    names = tuple(str(label) for label in range(len(weights)))
    return Table("synthetic", features, labels.astype(np.int64), names)


def _from_file(path: Path, target: str | None, multiclass: bool) -> Table:
    suffix = path.suffix.lower()
    if not path.exists():
        raise DemoError(f"no such file: {path}")
    if not path.is_file() or suffix not in SUFFIXES:
        raise DemoError(f"{path} is not a {', '.join(SUFFIXES[:-1])} or {SUFFIXES[-1]} file")
    if suffix == ".npz":
        if target is not None:
            raise DemoError("--target is for tables with named columns; an .npz holds X and y")
        features, raw = _read_npz(path)
    else:
        frame = _read_frame(path)
        if target is None:
            raise DemoError(
                f"a {suffix} file needs --target COLUMN; the columns are: {some(list(frame))}"
            )
        features, raw = _from_frame(frame, target)
    return Table(path.name, features, *encode_labels(raw, multiclass))


def _read_npz(path: Path) -> tuple[Floats, npt.NDArray[Any]]:
    try:
        with path.open("rb") as file:
            archive = np.load(file, allow_pickle=False)
            arrays = {name: archive[name] for name in archive.files}
    except (OSError, ValueError, AttributeError, EOFError, BadZipFile) as error:
        raise DemoError(f"cannot read {path} as an .npz file of plain arrays: {error}") from error
    if not {"X", "y"} <= arrays.keys():
        raise DemoError(f"{path} must hold the arrays X and y; it holds: {some(list(arrays))}")
    features, raw = arrays["X"], arrays["y"]
    raw = raw[:, 0] if raw.ndim == 2 and raw.shape[1] == 1 else raw
    if features.dtype.kind not in "biuf" or features.ndim != 2 or raw.shape != features.shape[:1]:
        raise DemoError(
            f"{path}: X must be numbers [rows, columns] and y [rows]; got X {features.dtype} "
            f"{list(features.shape)} and y {list(raw.shape)}"
        )
    features = features.astype(np.float64)
    return check_features(features, [str(index) for index in range(features.shape[1])]), raw


def _read_frame(path: Path) -> Any:
    import pandas as pd

    try:
        if path.suffix.lower() == ".csv":
            return pd.read_csv(path, low_memory=False)
        return pd.read_parquet(path)
    except ImportError as error:
        raise DemoError(
            "reading .parquet needs the package 'pyarrow': pip install \"proxy-losses[demo]\""
        ) from error
    except (OSError, ValueError) as error:
        raise DemoError(f"cannot read {path}: {error}") from error


def _from_frame(frame: Any, target: str) -> tuple[Floats, npt.NDArray[Any]]:
    """Features and raw target of a data frame; text columns become one-hot columns."""
    import pandas as pd

    frame = frame.rename(columns=str)
    if target not in frame.columns:
        raise DemoError(f"no column {target!r}; the columns are: {some(list(frame.columns))}")
    blocks: list[Floats] = []
    names: list[str] = []
    for name, column in frame.drop(columns=[target]).items():
        if pd.api.types.is_numeric_dtype(column) and not pd.api.types.is_complex_dtype(column):
            blocks.append(column.to_numpy(dtype=np.float64, na_value=np.nan)[:, None])
            names.append(name)
            continue
        text = column.astype(object).where(column.notna(), "missing").astype(str)
        if text.nunique() > _MAX_CATEGORIES:
            raise DemoError(
                f"column {name!r} is not numeric and has {text.nunique():,} different values "
                f"(more than {_MAX_CATEGORIES}): drop it or turn it into numbers"
            )
        one_hot = pd.get_dummies(text, dtype=np.float64)
        blocks.append(one_hot.to_numpy())
        names += [f"{name}={value}" for value in one_hot.columns]
    if not blocks:
        raise DemoError(f"there is no column besides the target {target!r}")
    raw = frame[target]
    if raw.isna().any() or not pd.api.types.is_numeric_dtype(raw):
        raw = raw.astype(object).where(raw.notna(), None)
    return check_features(np.concatenate(blocks, axis=1), names), raw.to_numpy()


def _from_openml(name: str, target: str | None, multiclass: bool) -> Table:
    import pandas  # noqa: F401  (fetch_openml needs it for a data frame)
    from sklearn.datasets import fetch_openml

    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(_OPENML_TIMEOUT_S)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # several versions of a name; retries
            bunch = fetch_openml(name, as_frame=True, n_retries=1)
    except (OSError, ValueError) as error:
        raise DemoError(
            f"--data {name!r} is neither digits, synthetic nor a file here, "
            f"and OpenML did not supply it: {error}"
        ) from error
    finally:
        socket.setdefaulttimeout(before)
    frame = bunch.frame
    if target is None:
        if len(bunch.target_names) != 1:
            raise DemoError(
                f"OpenML names no single target for {name!r}: give --target COLUMN, "
                f"one of: {some(list(frame.columns))}"
            )
        target = str(bunch.target_names[0])
    features, raw = _from_frame(frame, target)
    version = getattr(bunch, "details", {}).get("version", "?")
    return Table(f"{name} (OpenML, version {version})", features, *encode_labels(raw, multiclass))
