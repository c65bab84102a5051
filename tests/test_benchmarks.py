"""The benchmark harness records what it says it does; nothing here asserts a time."""

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from benchmarks import harness, report, smooth_ap
from benchmarks.harness import Case, Skip, Suite

NO_MEMORY = ["--no-memory"]


def returns(value: float) -> Callable[[], tuple[torch.Tensor, ...]]:
    return lambda: (torch.tensor(value), torch.full((3,), value))


def toy_suite(**contenders) -> Suite:
    cases = [Case(name, {"M": 3}, {"ours": returns(1.0), **contenders}) for name in ("a", "b")]
    return Suite("toy", "one, and three of it", "ours", cases, 1e-3, {"no_such_peer": None})


@pytest.fixture(autouse=True)
def _keep_threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def run_main(suite: Suite, out: Path, *argv: str) -> int:
    return harness.main(
        "no.such.module", lambda args: suite, [*NO_MEMORY, "--out", str(out), *argv]
    )


def check_keys(record: dict, kind: type) -> None:
    assert list(record) == list(kind.__annotations__)


def test_report_has_the_schema(tmp_path, capsys):
    suite = toy_suite(
        other=returns(1.0 + 1e-6),
        huge=Skip("skipped", "too large"),
        theirs=Skip("absent", "cannot be imported"),
    )
    assert run_main(suite, tmp_path / "deep" / "toy.json") == 0
    written = json.loads((tmp_path / "deep" / "toy.json").read_text())

    check_keys(written, report.Report)
    assert written["schema_version"] == report.SCHEMA_VERSION
    assert written["peers"] == {"no_such_peer": None}
    assert set(written["versions"]) == {"python", "torch", "numpy", "proxy_losses"}
    assert written["machine"]["threads"] == 1
    assert str(tmp_path) not in json.dumps(written)
    assert [case["name"] for case in written["cases"]] == ["a", "b"]
    for case in written["cases"]:
        check_keys(case, report.CaseReport)
        entries = case["contenders"]
        assert list(entries) == ["ours", "other", "huge", "theirs"]
        for entry in entries.values():
            check_keys(entry, report.Entry)
        for name in ("ours", "other"):
            entry = entries[name]
            assert (entry["status"], entry["reason"]) == ("measured", None)
            assert entry["repeats"] >= 7
            assert entry["calls"] >= 1
            assert entry["median_s"] > 0
            assert entry["iqr_s"][0] <= entry["median_s"] <= entry["iqr_s"][1]
        assert entries["ours"]["ratio"] == 1.0
        assert entries["other"]["deviation"] == pytest.approx(1e-6, rel=0.1)
        for name, status in (("huge", "skipped"), ("theirs", "absent")):
            assert entries[name]["status"] == status
            assert entries[name]["reason"]
            assert all(v is None for k, v in entries[name].items() if k not in ("status", "reason"))

    shown = capsys.readouterr().out
    assert "a: huge skipped, too large" in shown
    assert "b: theirs absent, cannot be imported" in shown
    assert shown.index("time / time of ours") < shown.index("ms per call")


def test_time_may_be_that_of_the_thread(tmp_path):
    out = tmp_path / "toy.json"
    assert run_main(toy_suite(), out, "--cpu-time") == 0
    assert json.loads(out.read_text())["clock"] == "time.thread_time"
    assert run_main(toy_suite(), out) == 0
    assert json.loads(out.read_text())["clock"] == "time.perf_counter"


def test_rounds_interleave_and_rotate():
    log: list[str] = []
    times = {"a": 1, "b": 2, "c": 1}
    calls = {name: ((lambda n=name: log.append(n)), times[name]) for name in times}
    samples = harness.rounds(calls, 7)
    assert "".join(log[:12]) == "abbcbbcacabb"
    assert {name: log.count(name) for name in "abc"} == {"a": 7, "b": 14, "c": 7}
    assert [len(s) for s in samples.values()] == [7, 7, 7]


def test_ratio_is_the_median_over_rounds(monkeypatch):
    # A round in which everything is slow leaves the ratio alone.
    times = {"ours": [1.0, 1.0, 9.0, 9.0, 1.0, 1.0, 1.0], "other": [2.0, 2.0, 18.0, 18.0] + 3 * [2]}
    monkeypatch.setattr(harness, "rounds", lambda *_: times)
    case = Case("a", {}, {"ours": returns(1.0), "other": returns(1.0)})
    entry = harness.measure(case, "ours")["contenders"]["other"]
    assert entry["ratio"] == 2.0
    assert entry["ratio_iqr"] == [2.0, 2.0]


def test_fewer_than_seven_repeats_are_refused():
    with pytest.raises(ValueError, match="repeats must be >= 7"):
        harness.measure(toy_suite().cases[0], "ours", 6)


@pytest.mark.parametrize(
    "wrong",
    [
        returns(1.01),
        returns(float("nan")),
        lambda: (torch.tensor(1.0), torch.ones(2)),
        lambda: (torch.tensor(1.0), torch.tensor([1.0, 1.0, 1.01])),
    ],
    ids=["value", "nan", "shape", "gradient"],
)
def test_gate_refuses_a_wrong_contender(wrong, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(harness, "rounds", lambda *_: pytest.fail("timed"))
    assert run_main(toy_suite(wrong=wrong), tmp_path / "toy.json") == 1
    assert "refusing to time: wrong deviates" in capsys.readouterr().err
    assert not (tmp_path / "toy.json").exists()


def test_an_absent_peer_has_no_version():
    assert harness.peer("no_such_package_of_ours") == (None, None)
    assert harness.peer("torch") == (torch, torch.__version__)


def test_peak_of_a_known_allocation():
    def hold() -> tuple[torch.Tensor, ...]:
        return (torch.ones(100_000_000, dtype=torch.uint8),)

    suite = Suite("toy", "", "ours", [Case("a", {}, {"ours": hold})], 1e-3, {})
    peak = harness.own_peak(suite, "a", "ours")
    if peak is None:
        pytest.skip("this system does not tell the peak")
    assert 90e6 < peak < 150e6


def quick(**options) -> Suite:
    return smooth_ap.build(argparse.Namespace(quick=True, **{"max_gb": 2.0, **options}))


def test_smooth_ap_contenders_agree(monkeypatch):
    suite = quick()
    for case in suite.cases:
        harness.gate(suite._replace(cases=[case]))


def test_smooth_ap_gate_refuses_another_formula(monkeypatch):
    right = smooth_ap.plain_positive_rows
    monkeypatch.setattr(smooth_ap, "plain_positive_rows", lambda s, pos: right(2.0 * s, pos))
    with pytest.raises(harness.DisagreementError, match="plain P x M deviates from proxy_losses"):
        harness.gate(quick())


def test_smooth_ap_records_skips_and_absence(monkeypatch):
    monkeypatch.setattr(harness, "peer", lambda package: (None, None))
    suite = quick(max_gb=0.1)
    small, large = (case.contenders for case in suite.cases)
    assert suite.peers == {"imbalanced_losses": None}
    assert small["imbalanced_losses"].status == "absent"
    assert callable(small["plain M x M"])
    assert large["plain M x M"].status == "skipped"
    assert "limit 0.1" in large["plain M x M"].reason
    assert callable(large["proxy_losses"])


@pytest.mark.slow
def test_smooth_ap_peak_comes_from_a_fresh_process():
    case = quick().cases[0].name
    peak, reason = harness.child_peak(smooth_ap.MODULE, ["--quick"], case, smooth_ap.PLAIN_MM)
    assert (peak is None) == (reason is not None)
    assert peak is None or 8e6 < peak < 40e6  # about three buffers of 4 MB


def test_a_failed_child_is_recorded_not_raised():
    peak, reason = harness.child_peak("benchmarks.no_such_suite", [], "a", "ours")
    assert peak is None
    assert "exited 1" in reason
