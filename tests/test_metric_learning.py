"""The metric-learning benchmark runs, pairs its arms and records what it did."""

from __future__ import annotations

import json

import pytest
import torch
from sklearn.metrics import average_precision_score

from benchmarks import digits, harness, metric_figures, metric_learning, report
from benchmarks.digits import QUESTIONS, Part, images, shifted
from benchmarks.metric_learning import OURS, ours, train
from benchmarks.trainer import Arm, each


@pytest.fixture(autouse=True)
def _keep_threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.slow
def test_quick_run(tmp_path, capsys):
    pytest.importorskip("pytorch_metric_learning")
    path = tmp_path / "deep" / "out.json"
    assert metric_learning.main(["--quick", "--out", str(path)]) == 0
    written = json.loads(path.read_text())
    assert str(tmp_path) not in json.dumps(written)
    assert written["quick"]
    assert written["versions"]["pytorch_metric_learning"]
    assert written["machine"]["threads"] == 1
    effort = metric_learning.QUICK
    assert list(written["results"]) == list(written["tuning"]) == list(QUESTIONS)
    for question, arms in written["results"].items():
        for tuned in written["tuning"][question].values():
            assert len(tuned["tried"]) == effort.values * len(effort.rates) * len(effort.steps)
            best = max(tuned["tried"], key=lambda t: t["map"])
            assert tuned["chosen"] == {k: best[k] for k in ("value", "rate", "steps")}
        assert next(iter(arms)) == OURS
        assert {*arms} == {*written["tuning"][question], "untrained network", "raw pixels"}
        for name, found in arms.items():
            for metric, values in found.items():
                assert len(values) == len(effort.seeds)
                assert all(0 < v <= 1 for v in values)
                ahead = written["compared"][question][name][metric]["ahead"]
                assert (ahead is None) == (name == OURS)
                if ahead is not None:
                    assert ahead["wins"] + ahead["ties"] + ahead["losses"] == len(values)
    assert "new images: mean" in capsys.readouterr().out
    path.with_suffix(".png").unlink()
    assert metric_learning.main(["--plot", "--out", str(path)]) == 0
    assert path.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


def test_precision_is_that_of_sklearn():
    pytest.importorskip("pytorch_metric_learning")
    x, y = images(Part((6, 7, 8), 0.0, 0.1))
    cosine = torch.nn.functional.normalize(x) @ torch.nn.functional.normalize(x).T
    exact = [
        average_precision_score((y == y[q])[torch.arange(len(y)) != q], row)
        for q, row in enumerate(cosine[~torch.eye(len(y), dtype=torch.bool)].view(len(y), -1))
    ]
    # Two rows of almost equal similarity may swap places.
    assert digits.evaluate(x, y)["map"] == pytest.approx(sum(exact) / len(y), abs=1e-5)


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setattr(harness, "peer", lambda package: (None, None))
    with pytest.raises(SystemExit, match=r'pytorch_metric_learning is missing: pip.*"\.\[bench\]"'):
        metric_learning.main(["--quick"])


def rows(part):
    return {tuple(row) for row in images(part)[0].tolist()}


@pytest.mark.parametrize("question", QUESTIONS.values(), ids=QUESTIONS)
def test_images_ranked_are_new(question):
    for learnt, ranked in question.folds:
        assert not rows(learnt) & rows(ranked)
        assert not (rows(learnt) | rows(ranked)) & rows(question.ranked)
        assert {*images(ranked)[1].tolist()} == {*ranked.digits}
    assert not rows(question.learnt) & rows(question.ranked)


def test_images_move_by_a_pixel():
    image = torch.zeros(400, 8, 8)
    image[:, 3, 4] = 1.0
    moved = shifted(image.view(-1, 64), torch.Generator().manual_seed(0)).view(-1, 8, 8)
    assert (moved.sum((1, 2)) == 1).all()
    at = {tuple(place) for place in moved.nonzero()[:, 1:].tolist()}
    assert at == {(3 + i, 4 + j) for i in (-1, 0, 1) for j in (-1, 0, 1)}


def test_arms_see_the_same_batches_and_weights():
    seen = []

    def spy(value, setup):
        def loss(embeddings, labels, *_):
            seen.append((embeddings.detach().clone(), labels))
            return ours(value)(embeddings, labels)

        return loss

    arm = Arm("spy", each(spy), (1e-3, 1e-3), "tau", (0.1, 0.1))
    ((_, both),) = train(arm, [Part((0, 1))] * 2, [5, 6], [2])
    ((_, alone),) = train(arm._replace(rates=(1e-3,), values=(0.1,)), [Part((0, 1))], [6], [2])
    # of the first step: two configurations of seed 5, two of seed 6; then seed 6 by itself
    first, same, other = seen[0], seen[1], seen[2]
    torch.testing.assert_close(first, same, rtol=0, atol=0)
    assert not torch.equal(first[0], other[0])
    torch.testing.assert_close(seen[8], other, rtol=1e-5, atol=1e-6)
    assert first[1].tolist() == sorted(first[1].tolist())
    assert first[1].bincount().tolist() == [metric_learning.PER_CLASS] * 2
    for of_both, of_one in zip(both, alone, strict=True):
        torch.testing.assert_close(of_both[0, 0], of_both[0, 1], rtol=0, atol=0)
        torch.testing.assert_close(of_both[1, 0], of_one[0, 0], rtol=1e-3, atol=1e-4)


def test_networks_start_as_torch_initialises_them():
    torch.manual_seed(3)
    net = torch.nn.Sequential(torch.nn.Linear(64, 128), torch.nn.ReLU(), torch.nn.Linear(128, 32))
    x = torch.randn(7, 64)
    weights = [w[None, None] for w in metric_learning.network(3)]
    torch.testing.assert_close(metric_learning.embed(weights, 0, x)[0], net(x))


def test_interval_and_pairs():
    found = metric_figures.paired([0.5, 0.6, 0.9], [0.4, 0.6, 1.0])
    assert (found["wins"], found["ties"], found["losses"]) == (1, 1, 1)
    assert found["mean"] == pytest.approx(0.0)
    # t(0.975, 2) = 4.3027; standard error 0.1 / sqrt(3).
    assert found["interval"] == pytest.approx([-0.24841, 0.24841], abs=1e-4)
    assert metric_figures.interval([0.5, 0.5])["interval"] == [0.5, 0.5]


def test_published_figures_are_of_a_full_run():
    written = json.loads((report.ROOT / report.RESULTS / "metric_learning.json").read_text())
    assert not written["quick"]
    assert not written["dirty"]
    assert len(written["protocol"]["seeds"]) >= 10
