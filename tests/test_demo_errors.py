"""What the demo refuses: one line on stderr, exit code 2, no traceback."""

import runpy
import sys
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")
pytest.importorskip("tqdm")
pd = pytest.importorskip("pandas")
pytest.importorskip("pyarrow")

from proxy_losses import demo  # noqa: E402
from proxy_losses.demo import _ranking  # noqa: E402
from proxy_losses.demo.__main__ import EPOCHS_VARIABLE, main  # noqa: E402


@pytest.fixture(autouse=True)
def _own_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv(EPOCHS_VARIABLE, raising=False)


def frame(rows=40, positives=12):
    table = pd.DataFrame(np.random.default_rng(0).normal(size=(rows, 2)), columns=["a", "b"])
    return table.assign(fraud=(np.arange(rows) < positives).astype(int))


def error_of(argv, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(argv)
    assert stopped.value.code == 2
    text = capsys.readouterr().err
    assert text.startswith("proxy-losses-demo")
    assert ": error: " in text
    assert text.count("\n") == 1
    assert text.endswith("\n")
    return text


@pytest.mark.parametrize(
    ("argv", "fragment"),
    [
        (["--hidden", "2.5"], "--hidden: invalid int value: '2.5'"),
        (["--pos-rate", "nan"], "--pos-rate: must be from 1e-06 to 0.999, got nan"),
        (["--total-epochs", "0"], "--total-epochs: must be from 1 to 1e+06, got 0"),
        (["--no-such-flag"], "unrecognized arguments: --no-such-flag."),
        (["--warmup-epochs", "18", "--blend-epochs", "2"], "18 + 2 epochs of 20"),
        (["--data", "digits", "--multiclass", "--pos-rate", "0.1"], "--multiclass is not for"),
        (["--data", "digits", "--pos-rate", "0.5"], "above the data's own rate, 0.09683"),
        (["--data", "digits", "--pos-rate", "0.001"], "rarest class has 2 different rows, too few"),
        (["--target", "x"], "made has none"),
        (["--out", "file.txt/a.png"], "cannot write: [Errno 17] File exists: 'file.txt'"),
        (["--out", "."], "cannot write: [Errno 21] Is a directory: '.'"),
        (
            ["retreival"],
            "unrecognized arguments: retreival. Write proxy-losses-demo [flags], or "
            "proxy-losses-demo retrieval [flags], in this order",
        ),
        (["--seeds", "2", "retrieval"], "retrieval. Write proxy-losses-demo [flags], or "),
        (["mine.csv", "--target", "x"], "unrecognized arguments: mine.csv"),
        (["--data", "nowhere.csv"], "cannot read nowhere.csv: [Errno 2] No such file"),
        (["--data", "file.txt"], "file.txt is not a file that ends in .csv, .parquet or .npz"),
        (["retrieval", "--seeds", "0"], "--seeds: must be from 1 to"),
        (["retrieval", "--data", "nowhere.npz"], "cannot read nowhere.npz: [Errno 2] No such file"),
        (["retrieval", "--data", "mine.csv"], "mine.csv is not a file that ends in .npz"),
    ],
)
def test_flags_and_paths(argv, fragment, capsys):
    Path("file.txt").write_text("not a table")
    assert fragment in error_of(argv, capsys)


@pytest.mark.parametrize(
    ("change", "target", "fragment"),
    [
        ({}, None, "--target must be the label's column, one of a, b, fraud; got None"),
        ({}, "no", "--target must be the label's column, one of a, b, fraud; got no"),
        ({f"c{k}" * 9: 0 for k in range(20)}, "no", "c8c8c8c8c8c8c8c8c8, [...]; got no"),
        ({"a": [np.nan] * 40}, "fraud", "column 'a' is missing or infinite in 40 of 40 rows"),
        ({"fraud": 0}, "fraud", "must have two values, or more with --multiclass"),
        ({"fraud": 1}, "fraud", "and none missing; it has 1: 1"),
        ({"fraud": [0, 1, 2, 3] * 10}, "fraud", "it has 4: 0, 1, 2, 3"),
        ({"fraud": [None] + ["n", "y"] * 19 + ["n"]}, "fraud", "none missing; it has 3: n, y, nan"),
        ({"fraud": [1] * 4 + [0] * 36}, "fraud", "rarest class has 4 different rows, too few"),
    ],
)
def test_csv_contents(change, target, fragment, capsys):
    frame().assign(**change).to_csv("mine.csv", index=False)
    argv = [] if target is None else ["--target", target]
    assert fragment in error_of(["--data", "mine.csv", *argv], capsys)


def test_text_of_many_values_and_a_label_alone(capsys):
    frame(200).assign(id=[f"n{i}" for i in range(200)]).to_csv("mine.csv", index=False)
    argv = ["--data", "mine.csv", "--target", "fraud"]
    assert "column 'id' is text of 200 different values" in error_of(argv, capsys)
    frame()[["fraud"]].to_csv("mine.csv", index=False)
    assert "no columns besides the label" in error_of(argv, capsys)
    frame().to_csv("mine.csv", index=False, sep=";")
    assert "one of a;b;fraud; got fraud; a csv file needs commas" in error_of(argv, capsys)
    frame().assign(fraud=np.arange(40) / 7).to_csv("mine.csv", index=False)
    assert "must have two values" in (found := error_of(argv, capsys))
    assert "it has 40: 0.0, 0.142" in found


@pytest.mark.parametrize("command", [[], ["retrieval"]])
@pytest.mark.parametrize("name", ["empty.csv", "junk.parquet", "junk.npz", "cut.npz", "one.npz"])
def test_unreadable_files(name, command, capsys):
    if command and not name.endswith("npz"):
        name = "junk.npz"
    content = {"empty": b"", "junk": b"junk" * 9, "cut": b"PK\x03\x04" + b"cut" * 9}
    if name == "one.npz":
        with open(name, "wb") as file:
            np.save(file, np.zeros(3))
    else:
        Path(name).write_bytes(content[name.split(".")[0]])
    assert f"cannot read {name}" in error_of([*command, "--data", name], capsys)


@pytest.mark.parametrize(
    ("command", "arrays", "fragment"),
    [
        (
            [],
            {"X": np.zeros((9, 2)), "z": np.zeros(9)},
            "must hold x [rows, columns] and y [rows], it holds {'x': [9, 2], 'z': [9]}",
        ),
        ([], {"X": np.zeros((9, 2)), "y": np.zeros(8)}, "cannot read mine.npz: Length of values"),
        (["retrieval"], {"x": np.zeros((9, 2))}, "it holds {'x': [9, 2]}"),
        (["retrieval"], {"x": np.zeros(1), "y": np.array(["a"], object)}, "y.astype(str)"),
        (["retrieval"], {"x": np.zeros(9), "y": np.zeros(9)}, "must hold x [rows, columns]"),
        (["retrieval"], {"x": np.full((9, 2), np.nan), "y": np.zeros(9)}, "contains NaN"),
        (["retrieval"], {"x": np.zeros((9, 2)), "y": np.arange(9) // 2}, "there are 4 classes of"),
    ],
)
def test_npz_contents(command, arrays, fragment, capsys):
    np.savez("mine.npz", **arrays)
    assert fragment in error_of([*command, "--data", "mine.npz"], capsys)


def test_missing_packages(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "tqdm", None)
    monkeypatch.delitem(sys.modules, "proxy_losses.demo._ranking")
    monkeypatch.delattr(demo, "_ranking")
    assert "needs the package 'tqdm': pip install" in error_of([], capsys)


def test_a_diverging_run_stops(monkeypatch, capsys):
    monkeypatch.setattr(_ranking, "cross_entropy", lambda out, targets: out.sum() * float("nan"))
    assert "no longer finite: try a smaller --lr" in error_of(["--data", "digits"], capsys)


def test_the_environment_must_hold_a_number(monkeypatch, capsys):
    for text in ("0", "-3", "many"):
        monkeypatch.setenv(EPOCHS_VARIABLE, text)
        for command in ([], ["retrieval"]):
            assert f"{EPOCHS_VARIABLE} must be a whole number" in error_of(command, capsys)


@pytest.mark.parametrize(
    ("command", "flags"),
    [
        ([], "data target multiclass hidden pos-rate warmup-epochs blend-epochs total-epochs "
             "batch-size queue-size temp-start temp-end lr seed seeds out"),
        (["retrieval"], "data noise seeds seed total-epochs out"),
    ],
)  # fmt: skip
def test_help_names_every_flag_with_its_default_and_runs_as_a_module(
    command, flags, monkeypatch, capsys
):
    monkeypatch.setattr(sys, "argv", ["demo", *command, "--help"])
    monkeypatch.delitem(sys.modules, "proxy_losses.demo.__main__")
    with pytest.raises(SystemExit) as stopped:
        runpy.run_module("proxy_losses.demo", run_name="__main__")
    assert stopped.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    for flag in flags.split():
        assert f"--{flag} " in text
    assert f"{EPOCHS_VARIABLE}=N in the environment shortens any run" in text
    assert text.count("default: ") >= len(flags.split()) - ("target" in flags)


def test_an_interrupt_is_quiet(monkeypatch, capsys):
    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(_ranking, "run", interrupt)
    assert main([]) == 130
    assert capsys.readouterr().err == "interrupted\n"
