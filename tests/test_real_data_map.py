"""The map compares what it says it does; nothing here asserts who wins."""

import json

import numpy as np
import pytest
import torch

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")

from benchmarks import report
from benchmarks.real_data import made, map_page
from benchmarks.real_data import map as real_map
from benchmarks.real_data.data import make_table, stack
from benchmarks.real_data.stacked import Capacity, arms, network, pick_features, scaled_bce
from benchmarks.real_data.train import Effort, validation_ap
from benchmarks.trainer import Arm, Budget, Part, Training, scores

TINY = Effort(Budget(6, 3, 512, fall=True), Budget(4, 2))


@pytest.fixture(autouse=True)
def _keep_threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def table(rows: int = 500, features: int = 4, rate: float = 0.1):
    rng = np.random.default_rng(features)
    y = np.arange(rows) < rate * rows
    x = rng.normal(size=(rows, features))
    x[:, 1] += 2 * y
    return make_table(f"t{features}", x, y.astype(np.uint8), "made")


def test_seeds_do_not_mix():
    both = stack(table(), [0, 1])
    weights = [torch.randn(2, *shape) for shape in ((4, 3), (1, 3), (3, 1), (1, 1))]

    def best(parts, start, scale):
        training = Training(parts.train, Arm("", scaled_bce(scale), (0.1,)), start, TINY.more)
        return training.fit(lambda now: validation_ap(now, parts.val)).weights

    together = best(both, weights, torch.ones(2))
    one = type(both)(*(Part(p.x[1:], p.y[1:]) for p in both))
    for a, b in zip(together, best(one, [w[1:] for w in weights], torch.ones(1)), strict=True):
        # float32 sums of two batch sizes may differ in the last bits
        torch.testing.assert_close(a[1:], b, rtol=1e-4, atol=1e-5)


def test_scores_are_those_of_a_network():
    weights = network(stack(table(), [0, 1]), 3, TINY.base)
    x = torch.randn(2, 5, 4)
    for seed in range(2):
        w1, b1, w2, b2 = (w[seed] for w in weights)
        expected = ((x[seed] @ w1 + b1).relu() @ w2 + b2)[:, 0]
        found = scores([w[:, None] for w in weights], x)[seed, 0]
        torch.testing.assert_close(found, expected)


def test_arms_start_at_the_start_and_pick_features():
    parts = stack(table(), [0, 1])
    assert pick_features(parts.train, 1).tolist() == [[1], [1]]
    assert pick_features(parts.train, 4) is None
    still = TINY._replace(more=Budget(0, 2))
    for capacity in (Capacity("linear", features=2), Capacity("network", hidden=2)):
        found = arms(parts, capacity, still)
        np.testing.assert_array_equal(found["smooth_ap"], found["start"])
        np.testing.assert_array_equal(found["continued"], found["start"])


def test_a_contested_top():
    x, y = made.contested(90, 20_000, np.random.default_rng(0))
    assert y.mean() == pytest.approx(made.RATE, abs=0.005)
    apart, agree = x[y].mean(0), made.contested(0, 20_000, np.random.default_rng(0))[0][y].mean(0)
    # 0.6 * 2 along the first axis and 0.4 * 4 along the second; 600 rows of deviation below 2
    np.testing.assert_allclose(apart[:2], [1.2, 1.6], atol=0.35)
    np.testing.assert_allclose(agree[:2], [2.8, 0.0], atol=0.35)


def test_a_digit_is_not_in_its_own_embedding():
    train, val, test = made.embedded(3, 0)
    assert (train[1].sum(), val[1].sum()) == (made.PROBE["train"], made.PROBE["val"])
    assert 80 < test[1].sum() < 100
    assert train[0].shape[1] == made.EMBEDDING


def test_cells_without_enough_positives_are_empty():
    assert real_map.rows_of(table(), None) == 300
    assert real_map.rows_of(table(), 250) == 250
    assert real_map.rows_of(table(), 150) is None  # 15 positives
    assert real_map.rows_of(table(), 400) is None
    up = {"smooth_ap": [0.5], "continued": [0.4], "start": [0.4]}
    row = {"linear, all": {"a": up, "b": up}}
    assert real_map.cells({"all": row})["all"]["linear, all"] is None
    row["linear, all"]["c"] = {"smooth_ap": [0.2], "continued": [0.4], "start": [0.4]}
    cell = real_map.cells({"all": row})["all"]["linear, all"]["continued"]
    # of 10, 10 and -20: mean 0, deviation sqrt(300), t of 2 degrees of freedom 4.303
    assert cell == pytest.approx(
        {"tables": 3, "mean": 0, "se": 10, "t95": 43.03, "up": 2, "down": 1}, abs=0.01
    )


@pytest.mark.slow
def test_from_tables_to_the_page(tmp_path, monkeypatch, capsys):
    for features in (3, 4, 5):
        t = table(features=features)
        np.savez(tmp_path / f"{t.name}.npz", X=t.x, y=t.y)
    monkeypatch.setattr(real_map, "EFFORT", TINY)
    monkeypatch.setattr(real_map, "SIZES", {"250": 250, "all": None})
    linear = [Capacity("linear, 4", features=4), Capacity("linear, all")]
    monkeypatch.setattr(real_map, "CAPACITIES", (*linear, Capacity("2 hidden", hidden=2)))
    monkeypatch.setattr(made, "ANGLES", (0, 90))
    monkeypatch.setattr(made, "ROWS", {"train": 500, "val": 500, "test": 500})
    monkeypatch.setattr(made, "DIGITS", (3,))
    out, page = tmp_path / "out", tmp_path / "MAP.md"
    argv = ["--data", str(tmp_path), "--seeds", "2", "--out", str(out), "--page", str(page)]
    assert real_map.main(argv) == 0
    written = (out / "real_data_map.json").read_text()
    assert str(tmp_path) not in written
    cells = json.loads(written)["cells"]
    assert cells["250"]["linear, 4"] is None  # of two tables
    assert cells["all"]["2 hidden"]["continued"]["tables"] == 3
    assert (out / "real_data_map.png").stat().st_size > 10_000
    assert "| t3 | 2 hidden |" in page.read_text()
    assert map_page.text(json.loads(written)) == page.read_text()
    capsys.readouterr()


def test_the_page_is_that_of_the_committed_results():
    results = report.ROOT / report.RESULTS / "real_data_map.json"
    page = report.ROOT / "benchmarks" / "real_data" / "MAP.md"
    assert map_page.text(json.loads(results.read_text())) == page.read_text()
