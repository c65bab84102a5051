"""The benchmark of shards runs, and agrees with itself; nothing here asserts a time."""

import json

from benchmarks import harness, shards


def test_processes_measure_and_agree(tmp_path, monkeypatch):
    path = tmp_path / "shards.json"
    monkeypatch.setattr(shards, "QUICK", [shards.Task(2, "normal", 3_000)])
    monkeypatch.setattr(harness, "MIN_SAMPLE_S", 1e-6)
    assert shards.main(["--quick", "--out", str(path)]) == 0
    (case,) = json.loads(path.read_text())["cases"]
    assert set(case["contenders"]) == set(shards.WAYS)
    assert case["sizes"]["processes"] == 2
    for entry in case["contenders"].values():
        assert entry["median_s"] > 0.0
        assert entry["deviation"] <= shards.TOLERANCE


def test_the_table_needs_no_processes(capsys):
    assert shards.main(["--table"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 13
    assert "64 x 16,000,000" in lines[-1]
