"""The scorecard benchmark compares what it says it does; nothing here asserts who wins."""

import json

import numpy as np
import pytest
import torch

from benchmarks import linear_ranker


@pytest.fixture(autouse=True)
def _keep_threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def write(path, features: int, rate: float) -> None:
    rng = np.random.default_rng(features)
    y = (np.arange(600) < 600 * rate).astype(np.uint8)
    np.savez(path, X=rng.normal(size=(600, features)) + y[:, None], y=y)


@pytest.mark.slow
def test_from_tables_to_the_report(tmp_path, capsys):
    write(tmp_path / "narrow.npz", 3, 0.05)
    write(tmp_path / "wide.npz", 7, 0.05)
    write(tmp_path / "balanced.npz", 3, 0.5)
    out = tmp_path / "deep" / "report.json"
    argv = ["--data", str(tmp_path), "--seeds", "1", "--out", str(out)]
    assert linear_ranker.main(argv) == 0
    text = out.read_text()
    assert str(tmp_path) not in text
    written = json.loads(text)
    assert set(written["protocol"]["tables"]) == {"narrow", "wide"}
    assert set(written["results"]["pauc, 5 features"]) == {"wide"}
    for found in written["results"].values():
        for splits in found.values():
            assert len(splits) == 1
            for split in splits:
                assert set(split["test"]) == set(linear_ranker.ARMS)
                assert split["improved"] or split["test"]["ranker"] == split["test"]["logistic"]
    shown = capsys.readouterr().out
    assert "narrow" in shown
    assert "balanced" not in shown


def test_refuses_a_folder_without_tables(tmp_path, capsys):
    with pytest.raises(SystemExit):
        linear_ranker.main(["--data", str(tmp_path)])
    assert "no table with" in capsys.readouterr().err


def test_the_comparison():
    def split(ranker: float, control: float) -> dict:
        return {"test": {"ranker": {"ap": ranker}, "logistic": {"ap": control}}}

    found = {
        "up": [split(0.52, 0.5), split(0.54, 0.5)],
        "sure": [split(0.3, 0.1), split(0.3, 0.1)],
        "down": [split(0.1, 0.3), split(0.1, 0.3)],
    }
    compared = linear_ranker.compare(found, "logistic", "ap")
    # Of two differences, 2 and 4: t of one degree of freedom, 12.706, times sd = sqrt(2) times
    # sqrt(1 / 2 + 1 / 3), a third being the test rows over the training rows
    half = 12.706 * (2 * (1 / 2 + 1 / 3)) ** 0.5
    assert compared["tables"]["up"] == pytest.approx(
        {"mean": 3.0, "low": 3 - half, "high": 3 + half}, abs=1e-3
    )
    # and over the tables of 3, 20 and -20, plainly: t of two degrees of freedom is 4.303
    half = 4.303 * np.std([3, 20, -20], ddof=1) / 3**0.5
    assert compared["overall"]["high"] == pytest.approx(1 + half, abs=0.01)
    assert (compared["up"], compared["down"]) == (2, 1)
    assert (compared["wins"], compared["ties"], compared["losses"]) == (1, 1, 1)
    assert compared["overall"]["mean"] == pytest.approx(1.0)
    alone = linear_ranker.compare({"up": found["up"][:1]}, "logistic", "ap")
    assert alone["overall"] == pytest.approx({"mean": 2.0, "low": None, "high": None})
