"""The measurement behind the rules of choosing trains what it says and records it."""

from __future__ import annotations

import json

import pytest
import torch
from torch.nn.functional import binary_cross_entropy_with_logits as bce_loss

import proxy_losses as P
from benchmarks import choosing, choosing_page, choosing_runs, report
from benchmarks.choosing_runs import CONTROL, WORLDS, Scale, Setting, make_data, train
from benchmarks.trainer import average_precision

TINY = Scale(seeds=2, steps=12, batch=64, rows=800, held_out=900, pools=4, every=4)


@pytest.fixture(autouse=True)
def _keep_threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(params=WORLDS)
def world(request):
    return WORLDS[request.param]


@pytest.mark.slow
def test_quick_run(tmp_path, capsys):
    path = tmp_path / "deep" / "out.json"
    assert choosing.main(["--quick", "--out", str(path)]) == 0
    written = json.loads(path.read_text())
    assert str(tmp_path) not in json.dumps(written)
    assert written["quick"]
    assert written["machine"]["threads"] == 1
    scale = choosing.QUICK
    asked = choosing.questions(scale.every)
    assert list(written["worlds"]) == list(WORLDS)
    for found in written["worlds"].values():
        assert [t["tau"] for t in found["temperatures"]] == list(
            (*choosing.TINY_TAUS, *choosing.TAUS)[:: scale.every]
        )
        assert {p["rows"] for p in found["pools"]} <= set(choosing.POOLS)
        assert found["pools"]
        usual = found["questions"]["queue kept at the switch"][0]
        for question, arms in asked.items():
            records = found["questions"][question]
            for arm, record in zip(arms, records, strict=True):
                assert arm._asdict() == {key: record[key] for key in Setting._fields}
                assert len(record["ap"]) == scale.seeds
                assert all(0 < ap <= 1 for ap in record["ap"])
                gain = sum(record["ap"]) / scale.seeds - found["control"]["ap"]["mean"]
                assert record["ap_gain"]["mean"] == pytest.approx(gain)
                assert ("over_still" in record) == (arm.grad == "implicit")
                assert ("drift" in record) == (arm.queue > 0)
                assert ("stale" in record) == (arm.queue > 0 and arm.loss == "ap")
                if arm.loss == "ap":
                    over = [a - b for a, b in zip(record["ap"], usual["ap"], strict=True)]
                    assert record["over_usual"]["mean"] == pytest.approx(sum(over) / len(over))
    assert "tau over time" in capsys.readouterr().out
    path.with_suffix(".png").unlink()
    assert choosing.main(["--plot", "--out", str(path)]) == 0
    assert path.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


def alone(world, arm, data, seed):
    """Scores of the rows learnt from, of one model trained in a plain loop."""
    x, y = (part[seed] for part in data.learnt)
    weights = [w[seed].clone().requires_grad_() for w in first_weights(world)]

    def net(rows):
        hidden = rows if len(weights) == 2 else (rows @ weights[0] + weights[1]).relu()
        return (hidden @ weights[-2] + weights[-1])[:, 0]

    steps = data.batches.shape[1]
    switch = round(arm.warmup * steps)
    schedule = P.Schedule(switch, round(arm.blend * steps), final_main_weight=arm.main)
    optimizer = torch.optim.Adam(weights, world.rate)
    queue = P.init_queue(arm.queue, 1) if arm.queue else None
    spread, unit = 1.0, "spread" if arm.unit == "spread" else "score"
    for step, rows in enumerate(data.batches[seed]):
        scores, pos = net(x[rows]), y[rows]
        loss = bce_loss(scores, pos.float())
        if step == switch and arm.unit != "spread":
            spread = P.score_spread(net(x))
        if step >= switch or arm.keep:
            tau = arm.tau * spread
            if arm.unit == "decay":
                done = (step - switch) / (steps - switch)
                tau = tau * choosing_runs.DECAY ** (0.5 - done)
            grad = {"threshold_grad": arm.grad}
            ranking, options = {
                "ap": (P.smooth_ap_loss, {"tau_unit": unit}),
                "recall": (P.recall_at_quantile_loss, {"tau_unit": unit, **grad}),
            }.get(arm.loss, (P.partial_auc_loss, {"surrogate": arm.loss, **grad}))
            ranked, queue = ranking(scores[:, None], pos.long(), queue, tau, **options)
            weight = P.blend_weight(step, schedule).float()
            if weight > 0:
                loss = (1 - weight) * loss + weight * ranked
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return net(x).detach()


def first_weights(world):
    return choosing_runs.first_weights(world, TINY.seeds)


ARMS = (
    CONTROL,
    Setting(queue=128),
    Setting(queue=128, warmup=0.0, tau=1.0),
    Setting(queue=128, unit="decay", blend=0.3),
    Setting(queue=128, unit="spread", main=0.5),
    Setting(queue=128, keep=True),
    Setting("recall", queue=0, tau=0.5),
    Setting("pairwise", queue=128, unit="spread", main=0.75),
    Setting("trapezoid", queue=128, unit="spread"),
    Setting("recall", queue=128, grad="implicit"),
    Setting("trapezoid", queue=128, unit="spread", main=0.75, grad="implicit"),
)


def test_stacked_models_are_those_of_plain_loops(world):
    data = make_data(world, TINY)
    for arm, found in zip(ARMS, train(world, ARMS, data), strict=True):
        for seed in range(TINY.seeds):
            # Adam divides by the root of tiny squares, which magnifies the order of sums.
            torch.testing.assert_close(
                found.scores[seed], alone(world, arm, data, seed), rtol=1e-3, atol=1e-3
            )


def test_drift_is_that_of_the_model(world):
    data = make_data(world, TINY)
    arms = [Setting(queue=512), Setting(queue=128, keep=True), Setting(queue=64)]
    for found in train(world._replace(rate=0.0), arms, data):  # so stored rows are found again
        # up to the rounding of a product, which differs with its shape
        assert (found.drift < 1e-6).all()
        assert (found.stale.abs() < 1e-5).all()
    moved = [found.drift.mean() for found in train(world, arms, data)]
    assert moved[0] > moved[2] > 0  # older rows have drifted further


def test_exact_metrics():
    scores = torch.tensor([[0.9, 0.8, 0.7, 0.1], [0.1, 0.2, 0.3, 0.4]])
    y = torch.tensor([[True, False, True, False], [True, True, False, False]])
    expected = torch.tensor([(1 + 2 / 3) / 2, (1 / 3 + 2 / 4) / 2], dtype=torch.float64)
    found = average_precision(torch.stack([scores, -scores], 1), y)
    torch.testing.assert_close(found[:, 0], expected)
    torch.testing.assert_close(found[:, 1], average_precision(-scores[:, None], y)[:, 0])
    scores, y = torch.arange(400.0)[None], (torch.arange(400) > 395)[None]
    assert choosing_runs.recall_at_top(scores, y) == 0.5  # the top 2 of 4 positives


def lists():
    """Two of 900 rows, every 30th a positive."""
    draw = torch.Generator().manual_seed(0)
    return torch.randn(2, 900, generator=draw), torch.arange(900).expand(2, -1) % 30 == 0


def test_a_small_temperature_has_no_error():
    small, large = choosing.temperatures(*lists(), (1e-6, 4.0))
    assert small["error"]["mean"] < 1e-3 < large["error"]["mean"]
    # Rows are about 1e-3 apart, so hardly any lie within 10 tau of another.
    assert small["saturation"]["mean"] > 0.9 > large["saturation"]["mean"] == 0


def test_pools_are_about_the_list():
    small, large = choosing.pools(*lists(), (90, 450, 600), 60)  # 600 is over half of the rows
    assert small["positives"] == pytest.approx(3.0, abs=0.5)
    assert large["sd"]["mean"] < small["sd"]["mean"]
    assert abs(large["bias"]["mean"]) < large["sd"]["mean"]


def test_published_figures_are_of_a_full_run():
    written = json.loads((report.ROOT / report.RESULTS / "choosing.json").read_text())
    assert not written["quick"]
    assert not written["dirty"]
    assert written["protocol"]["seeds"] >= 8
    assert written["cpu_s"] < 12 * 60


def test_the_tables_of_the_guide_are_those_of_the_run():
    run, page = json.loads(choosing_page.RUN.read_text()), choosing_page.PAGE.read_text()
    assert choosing_page.filled(page, run) == page
    usual = run["worlds"]["contested top, linear"]["questions"]["weight"][0]
    mean, (low, high) = usual["ap_gain"]["mean"], usual["ap_gain"]["interval"]
    gain = f"{100 * mean:+.1f} [{100 * low:.1f}, {100 * high:.1f}]"
    assert f"| the usual settings | {gain} | " in page
    for name, (_, rows) in choosing_page.TABLES.items():
        assert choosing_page.table(name, run).count("\n") > len(rows) / 2  # the run has these arms
    with pytest.raises(ValueError, match="the marks of 'queue' once, got 0"):
        choosing_page.filled(page.replace("<!-- queue: begin -->", ""), run)


def test_interval_and_pairs():
    found = choosing.paired([0.5, 0.6, 0.9], [0.4, 0.6, 1.0])
    assert (found["wins"], found["ties"], found["losses"]) == (1, 1, 1)
    assert found["mean"] == pytest.approx(0.0)
    # t(0.975, 2) = 4.3027; standard error 0.1 / sqrt(3).
    assert found["interval"] == pytest.approx([-0.24841, 0.24841], abs=1e-4)
    assert choosing.interval([0.5, 0.5])["interval"] == [0.5, 0.5]
