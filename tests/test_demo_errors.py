"""What the demo refuses: one line on stderr, exit code 2, no traceback."""

import runpy
import sys
from pathlib import Path
from types import SimpleNamespace
from urllib.error import URLError

import numpy as np
import pytest

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")
pytest.importorskip("tqdm")
pd = pytest.importorskip("pandas")
pytest.importorskip("pyarrow")

from proxy_losses.demo import _sources, _train  # noqa: E402
from proxy_losses.demo.__main__ import (  # noqa: E402
    EPOCHS_VARIABLE,
    build_parser,
    main,
    plan_epochs,
)

SHORT = ["--total-epochs", "4", "--warmup-epochs", "2", "--blend-epochs", "1", "--hidden", "8"]


@pytest.fixture(autouse=True)
def _own_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv(EPOCHS_VARIABLE, raising=False)


def blobs(rows=400, positives=60, seed=0):
    """Two overlapping clouds: features [rows, 3] and labels in {0, 1}."""
    rng = np.random.default_rng(seed)
    labels = (np.arange(rows) < positives).astype(np.int64)
    return rng.normal(size=(rows, 3)) + labels[:, None], labels


def frame(rows=400):
    features, labels = blobs(rows)
    table = pd.DataFrame(features, columns=["a", "b", "c"])
    table["colour"] = np.where(features[:, 0] > 0, "red", "blue")
    table["fraud"] = np.where(labels == 1, "yes", "no")
    return table


def error_of(argv, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(argv)
    assert stopped.value.code == 2
    text = capsys.readouterr().err
    assert text.startswith("proxy-losses-demo: error: ")
    assert text.count("\n") == 1
    assert text.endswith("\n")
    return text


@pytest.mark.parametrize(
    ("argv", "fragment"),
    [
        (
            ["--hidden", "-1"],
            "argument --hidden: must be a whole number from 0 to 1,000,000, got '-1'",
        ),
        (["--hidden", "2.5"], "--hidden: must be a whole number"),
        (["--pos-rate", "0"], "--pos-rate: must be a number between 0 and 1"),
        (["--pos-rate", "nan"], "--pos-rate: must be a number between 0 and 1"),
        (["--warmup-epochs", "x"], "--warmup-epochs: must be"),
        (["--blend-epochs", "-2"], "--blend-epochs: must be"),
        (["--total-epochs", "0"], "--total-epochs: must be a whole number from 1"),
        (["--batch-size", "0"], "--batch-size: must be"),
        (["--queue-size", "-1"], "--queue-size: must be"),
        (["--temp-start", "0"], "--temp-start: must be a number from 1e-9"),
        (["--temp-end", "inf"], "--temp-end: must be"),
        (["--lr", "-1"], "--lr: must be"),
        (["--seed", "-1"], "--seed: must be"),
        (["--no-such-flag"], "unrecognized arguments"),
        (["--warmup-epochs", "30", "--blend-epochs", "10"], "30 + 10 epochs of 40"),
        (["--multiclass", "--pos-rate", "0.1"], "--pos-rate is for two classes"),
        (["--pos-rate", "0.5"], "above the data's own rate, 0.09683"),
        (["--pos-rate", "0.001"], "class '8' has 2 distinct rows, too few"),
        (["--target", "x"], "digits has none"),
        (["--out", "file.txt/a.png"], "file.txt/a.png cannot be written"),
        (["--data", "nowhere.npz"], "no such file: nowhere.npz"),
        (["--data", "nowhere.csv"], "no such file: nowhere.csv"),
        (["--data", "."], ". is not a .npz, .csv or .parquet file"),
        (["--data", "file.txt"], "file.txt is not a .npz, .csv or .parquet file"),
    ],
)
def test_flags_and_paths(argv, fragment, capsys):
    Path("file.txt").write_text("not a table")
    assert fragment in error_of(argv, capsys)


@pytest.mark.parametrize(
    ("arrays", "fragment"),
    [
        ({"X": None}, "must hold the arrays X and y; it holds: X, z"),
        ({"X": "text"}, "X must be numbers [rows, columns]"),
        ({"X": "flat"}, "got X float64 [400] and y [400]"),
        ({"y": "short"}, "and y [399]"),
        (
            {"X": "nan"},
            "feature column '1' is NaN or infinite in 2 of 400 rows (and 1 more columns)",
        ),
        ({"y": "one"}, "the target has a single class (1)"),
        ({"y": "many"}, "the target has 400 different values (0, 1, 2, 3, 4, 5, 6, 7, ...)"),
        ({"y": "nan"}, "the target is missing in 1 of 400 rows"),
        ({"y": "few"}, "class '1' has 4 distinct rows, too few for a 60/20/20 split"),
        ({"X": "pickled"}, "cannot read mine.npz as an .npz file of plain arrays"),
    ],
)
def test_npz_contents(arrays, fragment, capsys):
    features, labels = blobs()
    broken = features.copy()
    broken[[3, 5], 1], broken[4, 2] = [np.nan, np.inf], np.nan
    changed = {
        ("X", "text"): features.astype(str),
        ("X", "flat"): features[:, 0],
        ("X", "nan"): broken,
        ("X", "pickled"): np.array([{}] * 400, dtype=object),
        ("y", "short"): labels[1:],
        ("y", "one"): np.ones(400),
        ("y", "many"): np.arange(400),
        ("y", "nan"): np.where(np.arange(400) == 7, np.nan, labels),
        ("y", "few"): (np.arange(400) < 4).astype(int),
    }
    mine = {"X": features, "y": labels}
    for name, kind in arrays.items():
        mine[name] = changed.get((name, kind))
    if mine["X"] is None:
        mine = {"X": features, "z": labels}
    np.savez("mine.npz", **mine)
    assert fragment in error_of(["--data", "mine.npz"], capsys)


@pytest.mark.parametrize(
    ("change", "argv", "fragment"),
    [
        ({}, [], "a .csv file needs --target COLUMN; the columns are: a, b, c, colour, fraud"),
        ({}, ["--target", "no"], "no column 'no'; the columns are: a, b, c, colour, fraud"),
        ({"a": [np.nan] * 400}, ["--target", "fraud"], "column 'a' is NaN or infinite in 400 of"),
        (
            {"id": [f"n{i}" for i in range(400)]},
            ["--target", "fraud"],
            "column 'id' is not numeric",
        ),
        (
            {"fraud": [None] + ["no", "yes"] * 199 + ["no"]},
            ["--target", "fraud"],
            "missing in 1 of",
        ),
    ],
)
def test_csv_contents(change, argv, fragment, capsys):
    frame().assign(**change).to_csv("mine.csv", index=False)
    assert fragment in error_of(["--data", "mine.csv", *argv], capsys)


@pytest.mark.parametrize("name", ["empty.csv", "junk.parquet", "junk.npz", "cut.npz", "one.npz"])
def test_unreadable_files(name, capsys):
    content = {"empty": b"", "junk": b"junk" * 9, "cut": b"PK\x03\x04" + b"cut" * 9}
    if name == "one.npz":
        with open(name, "wb") as file:
            np.save(file, np.zeros(3))
    else:
        Path(name).write_bytes(content[name.split(".")[0]])
    argv = [] if name.endswith("npz") else ["--target", "y"]
    assert f"cannot read {name}" in error_of(["--data", name, *argv], capsys)


def test_target_is_not_for_npz_and_must_not_be_alone(capsys):
    features, labels = blobs()
    np.savez("mine.npz", X=features, y=labels)
    assert "an .npz holds X and y" in error_of(["--data", "mine.npz", "--target", "y"], capsys)
    pd.DataFrame({"y": labels}).to_csv("mine.csv", index=False)
    assert "no column besides" in error_of(["--data", "mine.csv", "--target", "y"], capsys)


def test_openml_without_a_network(monkeypatch, capsys):
    def refuse(*args, **kwargs):
        raise URLError("no\nroute")

    monkeypatch.setattr("sklearn.datasets.fetch_openml", refuse)
    text = error_of(["--data", "creditcard"], capsys)
    assert "'creditcard' is neither digits, synthetic nor a file here" in text
    assert "no route" in text


def test_openml_table(monkeypatch, capsys):
    bunch = SimpleNamespace(frame=frame(), target_names=["fraud"], details={"version": "3"})
    monkeypatch.setattr("sklearn.datasets.fetch_openml", lambda *args, **kwargs: bunch)
    assert main([*SHORT, "--data", "cards"]) == 0
    out = capsys.readouterr().out
    assert "data   cards (OpenML, version 3): 400 rows, 60 positive ('yes')" in out
    bunch.target_names = []
    assert "give --target COLUMN, one of: a, b" in error_of(["--data", "cards"], capsys)
    table = _sources.load_table("cards", target="colour", multiclass=False, pos_rate=None, seed=0)
    assert set(table.classes) == {"red", "blue"}


def test_missing_packages(monkeypatch, capsys):
    frame().to_parquet("mine.parquet")

    def refuse(path):
        raise ImportError("no engine")

    monkeypatch.setattr(pd, "read_parquet", refuse)
    assert "'pyarrow'" in error_of(["--data", "mine.parquet", "--target", "fraud"], capsys)
    monkeypatch.setitem(sys.modules, "tqdm", None)
    assert "needs the package 'tqdm': pip install" in error_of([], capsys)


def test_a_diverging_loss_stops_the_run(monkeypatch, capsys):
    monkeypatch.setattr(
        _train, "binary_cross_entropy", lambda logits, targets: logits.sum() * float("nan")
    )
    assert "no longer finite in epoch 1: try a smaller --lr" in error_of(SHORT, capsys)


@pytest.mark.parametrize(
    ("cap", "expected"),
    [
        ("1", (0, 0, 1)),
        ("2", (1, 0, 2)),
        ("3", (1, 1, 3)),
        ("10", (3, 1, 10)),
        ("999", (12, 4, 40)),
        ("", (12, 4, 40)),
    ],
)
def test_the_environment_shortens_a_run(cap, expected, monkeypatch):
    monkeypatch.setenv(EPOCHS_VARIABLE, cap)
    argv = ["--total-epochs", "40", "--warmup-epochs", "12", "--blend-epochs", "4"]
    assert plan_epochs(build_parser().parse_args(argv)) == expected


def test_the_environment_must_hold_a_number(monkeypatch, capsys):
    for text in ("0", "-3", "many"):
        monkeypatch.setenv(EPOCHS_VARIABLE, text)
        assert f"{EPOCHS_VARIABLE} must be a whole number" in error_of([], capsys)


def test_help_names_every_flag_with_its_default_and_runs_as_a_module(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["demo", "--help"])
    monkeypatch.delitem(sys.modules, "proxy_losses.demo.__main__")
    with pytest.raises(SystemExit) as stopped:
        runpy.run_module("proxy_losses.demo", run_name="__main__")
    assert stopped.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    flags = "data target multiclass hidden pos-rate warmup-epochs blend-epochs total-epochs"
    for flag in f"{flags} batch-size queue-size temp-start temp-end lr seed out".split():
        assert f"--{flag}" in text
    assert text.count("(default: ") == 15


def test_an_interrupt_is_quiet(monkeypatch, capsys):
    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(_sources, "load_table", interrupt)
    assert main([]) == 130
    assert capsys.readouterr().err == "interrupted\n"
