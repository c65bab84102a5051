"""The rank benchmarks record targets and draw what they measured; nothing here asserts a time."""

import argparse
import json
import subprocess
import sys

import pytest
import torch

import proxy_losses
from benchmarks import gpu, harness, losses, rank_figures, ranks, reads, report, smooth_ap
from benchmarks.harness import Case, Skip
from benchmarks.report import Goal
from proxy_losses._metrics import METRICS

TINY = ranks.Sizes(
    small=(200,), small_rates=(0.05,), pool=400, curve=(200, 300), sort=500, huge=600,
    queue=(4, 8, 16), classes=(3, 60), worst=400, check=300,
)  # fmt: skip
TARGETS = {
    "speed-up over imbalanced_losses": {">= 0.9", ">= 100", ">= 25"},
    "speed-up over dense one-vs-rest": {">= 50"},
    "share of time of torch.sort": {"<= 0.6", "<= 1.3"},
    "bytes per element": {"<= 50"},
    "us per element": {"<= 0.5"},
}


@pytest.fixture(autouse=True)
def _keep_threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """The whole suite on lists so short that it takes a moment; all repeats, few calls each."""
    path = tmp_path_factory.mktemp("ranks") / "deep" / "ranks.json"
    threads = torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ranks, "QUICK", TINY)
        patch.setattr(harness, "MIN_SAMPLE_S", 1e-6)
        assert ranks.main(["--quick", "--no-memory", "--out", str(path)]) == 0
    torch.set_num_threads(threads)
    return path


@pytest.mark.slow
def test_every_target_is_in_the_report(tiny):
    written = json.loads(tiny.read_text())
    goals = [case["goal"] for case in written["cases"] if case["goal"]]
    found: dict[str, set[str]] = {}
    for goal in goals:
        assert list(goal) == list(report.GoalReport.__annotations__)
        found.setdefault(goal["figure"], set()).add(goal["target"])
    assert found == TARGETS
    for case in written["cases"]:
        goal, entries = case["goal"], case["contenders"]
        if not goal:
            continue
        if goal["figure"].startswith("share"):
            assert goal["measured"] == pytest.approx(1 / entries["torch.sort"]["ratio"], rel=1e-3)
            assert goal["reached"] == (goal["measured"] <= float(goal["target"][3:]))
            assert entries["torch.sort"]["deviation"] is None
        if (
            goal["figure"] == "speed-up over imbalanced_losses"
            and not written["peers"]["imbalanced_losses"]
        ):
            assert goal["measured"] is None
            assert goal["reached"] is None
            assert entries["imbalanced_losses"]["status"] == "absent"
        if goal["figure"] == "bytes per element":
            assert goal["reached"] is None  # --no-memory
        if goal["figure"] == "speed-up over dense one-vs-rest":
            assert goal["measured"] == pytest.approx(entries["dense one-vs-rest"]["ratio"])
            assert entries["dense one-vs-rest"]["deviation"] < 1e-5


@pytest.mark.slow
def test_the_table_is_shown(tiny, capsys):
    print(report.show(json.loads(tiny.read_text())))
    shown = capsys.readouterr().out
    assert shown.index("reached") < shown.index("time / time of proxy_losses")
    assert "not measured" in shown


@pytest.mark.slow
def test_plot_from_the_file(tiny):
    assert ranks.main(["--plot", "--out", str(tiny)]) == 0
    assert tiny.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("peak_of", [None, ("smooth_ap, normal, M = 300", "proxy_losses")])
def test_only_picks_cases(peak_of, monkeypatch):
    monkeypatch.setattr(ranks, "QUICK", TINY)
    options = harness.parser("x")
    args = options.parse_args(["--quick"])
    args.max_gb, args.only, args.peak_of = 1.0, ["M = 300", "classes"], peak_of
    names = [case.name for case in ranks.build(args).cases]
    assert all("M = 300" in name or "classes" in name for name in names)
    assert len(names) == (4 if peak_of is None else 1)
    args.only = ["no such case"]
    with pytest.raises(SystemExit, match="is in none of"):
        ranks.build(args)


def test_gate_covers_classes_and_tails(monkeypatch):
    right = ranks.dense_one_vs_rest
    monkeypatch.setattr(ranks, "dense_one_vs_rest", lambda x, y: right(2.0 * x, y))
    cases = ranks.Cases(1.0, None, {ranks.OURS: proxy_losses})
    names = [case.name for case in ranks.checks(cases, 300)]
    assert {name.split(", ")[-1] for name in names} >= {"Student t", "blob and isolated"}
    suite = harness.Suite("x", "", ranks.OURS, ranks.checks(cases, 300), 1e-4, {})
    with pytest.raises(harness.DisagreementError, match="dense one-vs-rest deviates"):
        harness.gate(suite._replace(cases=suite.cases[:1], checks=suite.cases))


@pytest.mark.parametrize(
    ("goal", "measured", "reached"),
    [
        (Goal("speed-up", 4.0, "other"), 4.0, True),
        (Goal("speed-up", 4.1, "other"), 4.0, False),
        (Goal("share of time", 0.25, "other"), 0.25, True),
        (Goal("share of time", 0.2, "other"), 0.25, False),
        (Goal("bytes per element", 50.0, elements=10.0), 40.0, True),
        (Goal("us per element", 0.1, elements=1e6), 0.5, False),
        (Goal("speed-up", 1.0, "absent"), None, None),
    ],
)
def test_judge(goal, measured, reached):
    nothing = dict.fromkeys(report.Entry.__annotations__)
    entries = {
        "ours": nothing | {"ratio": 1.0, "median_s": 0.5, "peak_bytes": 400},
        "other": nothing | {"ratio": 4.0},
        "absent": nothing,
    }
    judged = goal.judge(entries, "ours")
    assert (judged["measured"], judged["reached"]) == (measured, reached)


def test_slow_contenders_repeat_less(monkeypatch):
    case = Case(
        "a", {}, {"ours": lambda: (torch.ones(1),), "stick": lambda: (), "no": Skip("absent", "-")}
    )
    assert harness.measure(case, "ours")["contenders"]["stick"]["deviation"] is None
    monkeypatch.setattr(harness, "SLOW_SAMPLE_S", 0.0)
    entries = harness.measure(case, "ours")["contenders"]
    assert entries["stick"]["repeats"] == harness.SLOW_REPEATS
    assert entries["stick"]["ratio"] > 0


def test_figures(tmp_path, capsys):
    assert rank_figures.main(["--quick", "--out", str(tmp_path)]) == 0
    for name in ("error.png", "time.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
    for found in json.loads(capsys.readouterr().out)["errors"]:
        assert 0 < found["rank"] < found["rtol"]
        assert 0 < found["pair"] < found["rtol"]


@pytest.mark.parametrize("suite", [ranks, losses, smooth_ap])
def test_another_version_is_one_more_contender(suite, tmp_path, monkeypatch):
    monkeypatch.setattr(ranks, "QUICK", TINY)
    package = tmp_path / "new_name_of_ours"
    package.mkdir()
    (package / "__init__.py").write_text("from proxy_losses import *\n__version__ = '0'\n")
    monkeypatch.syspath_prepend(tmp_path)
    args = harness.parser("x").parse_args(["--quick", "--against", str(tmp_path)])
    args.max_gb, args.only = 1.0, None
    build = suite.suite if suite is losses else suite.build
    for case in build(args).cases:
        assert [*case.contenders][:2] == ["proxy_losses", "new_name_of_ours"]
    with pytest.raises(SystemExit, match="--against needs a checkout"):
        harness.packages(argparse.Namespace(against=tmp_path / "nothing"))


@pytest.mark.slow
def test_a_checkout_lives_beside_us(tmp_path):
    out = tmp_path / "out.json"
    argv = ["--quick", "--no-memory", "--only", "smooth_ap, normal, M = 1,000, 0.5 %",
            "--against", str(report.ROOT), "--out", str(out)]  # fmt: skip
    command = [sys.executable, "-m", ranks.MODULE, *argv]
    subprocess.run(command, cwd=report.ROOT, check=True, capture_output=True)
    text = out.read_text()
    assert str(report.ROOT) not in text
    written = json.loads(text)
    assert written["peers"]["old_losses"] == written["versions"]["proxy_losses"]
    (case,) = written["cases"]
    assert case["contenders"]["old_losses"]["deviation"] == 0.0


def test_reads_are_counted_inside_operators():
    x, y = torch.randn(3), torch.zeros(3, dtype=torch.bool)
    assert reads.reads(x.sum) == (x.sum(), {})
    out, found = reads.reads(lambda: (x.tolist(), bool(y[0]), y.nonzero(), torch.equal(x, x)))
    assert out[0] == x.tolist()
    assert found == {"tolist": 1, "item": 1, "nonzero": 1, "equal": 1}
    operator = torch.library.custom_op("benchmarks_test::read", mutates_args=())

    @operator
    def read(x: torch.Tensor) -> torch.Tensor:
        return x * x.sum().item() * len(x.tolist())

    assert reads.reads(lambda: read(x))[1] == {"item": 1, "tolist": 1}


def test_reads_of_every_function_and_module(tmp_path, capsys):
    out = tmp_path / "reads.json"
    assert reads.main(["--quick", "--out", str(out)]) == 0
    found = json.loads(out.read_text())["reads"]["proxy_losses"]
    assert {"SmoothAPLoss", "SoftmaxFocalLoss", "soft_ranks, 16,000 rows"} <= set(found)
    for parts in found.values():
        assert all(n > 0 for kinds in parts.values() for n in kinds.values())
    assert "soft_ranks, 16,000 rows: backward" in capsys.readouterr().out


@pytest.mark.slow
def test_the_gpu_benchmark_runs_without_one(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(harness, "MIN_SAMPLE_S", 1e-6)
    out = tmp_path / "gpu.json"
    assert gpu.main(["--quick", "--device", "cpu", "--out", str(out)]) == 0
    cases = json.loads(out.read_text())["cases"]
    kinds = {case["name"].partition(",")[0] for case in cases}
    assert {"eager", "replay", "RetrievalLoss", *(m.module for m in METRICS)} <= kinds
    assert all(case["goal"] for case in cases)
    assert out.with_suffix(".png").stat().st_size > 5000
    if not torch.cuda.is_available():
        with pytest.raises(SystemExit, match="no GPU here"):
            gpu.main(["--quick"])
    capsys.readouterr()
