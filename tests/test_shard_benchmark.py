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
    # once round the gather: 4 bytes of a score and 1 of a label, and the gradients back
    assert case["sizes"]["gathered_bytes"] > 5 * 1_500
    assert case["sizes"]["sharded_bytes"] > 0
    for entry in case["contenders"].values():
        assert entry["median_s"] > 0.0
        assert entry["deviation"] <= shards.TOLERANCE


def test_the_table_needs_no_processes(capsys, monkeypatch):
    monkeypatch.setattr(shards, "TABLE", ((2, 10_000), (64, 200_000)))
    assert shards.main(["--table"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 7
    assert lines[-1].startswith("  64 x    200,000")
    kilobytes = [float(line.split()[4]) for line in lines[-3:]]
    assert 0 < kilobytes[0] < kilobytes[1] < kilobytes[2]  # by the span
