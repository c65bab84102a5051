"""The demo, run in this process on few rows: what it prints, draws and measures."""

import argparse
import re
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")
pytest.importorskip("tqdm")
pd = pytest.importorskip("pandas")
pytest.importorskip("pyarrow")

from sklearn.metrics import average_precision_score  # noqa: E402

from proxy_losses.demo import _common, _ranking, _retrieval, _tables  # noqa: E402
from proxy_losses.demo.__main__ import main  # noqa: E402

SHORT = ["--total-epochs", "4", "--warmup-epochs", "2", "--blend-epochs", "1", "--hidden", "0"]


@pytest.fixture(autouse=True)
def _own_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv(_common.EPOCHS_VARIABLE, raising=False)


def blobs(rows=400, positives=60):
    """Two overlapping clouds: features [rows, 3] and labels in {0, 1}."""
    labels = (np.arange(rows) < positives).astype(np.int64)
    return np.random.default_rng(0).normal(size=(rows, 3)) + labels[:, None], labels


def assert_png(path):
    assert Path(path).read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert Path(path).stat().st_size > 20_000


def test_without_flags_two_tables_and_two_models(monkeypatch, capsys):
    monkeypatch.setattr(_tables, "MADE_ROWS", (700, 500, 500))
    monkeypatch.setenv(_common.EPOCHS_VARIABLE, "4")
    outcomes = _ranking.run(["--seeds", "2", "--pos-rate", "0.05", "--out", "new/a.png"])
    out = capsys.readouterr().out
    assert_png("new/a.png")
    assert f"{_common.EPOCHS_VARIABLE} shortened the run: do not conclude from it." in out
    assert out.startswith("contested top: train 700 rows (")
    trace = re.findall(r"^ +(\d)/4 +(\w+) +(\S+) +(\S+) +(\S+) +(\S+) +(\S+)$", out, re.M)
    assert [line[:3] for line in trace] == [
        ("1", "warmup", "0.00"), ("2", "blend", "0.50"), ("3", "ranking", "1.00"),
        ("4", "ranking", "1.00"),
    ]  # fmt: skip
    assert trace[0][3:5] == trace[0][5:]  # same weights, same batches: the warmup is the same
    assert trace[3][3:5] != trace[3][5:]
    names = ["contested top (linear model)", "contested top (MLP of 16 units)"]
    names += ["smooth odds (linear model)", "smooth odds (MLP of 16 units)"]
    assert [_ranking.name_of(o.case) for o in outcomes] == names
    for found in outcomes:
        tests = np.array([[run.test["BCE"], run.test["Smooth-AP"]] for run in found.runs])
        np.testing.assert_allclose(found.difference, tests[:, 1] - tests[:, 0])
        row = re.search(
            rf"^{found.case.name} +{_ranking.model_name(found.case.hidden)} +(\S+) +(\S+) +"
            rf"({re.escape(str(found.gain))}) +\d/2 +{found.gain.verdict}$", out, re.M,
        )  # fmt: skip
        assert row is not None
        assert [float(row[1]), float(row[2])] == pytest.approx(tests.mean(0), abs=0.006)
    again = _ranking.train_pair(outcomes[1].case, 0, _ranking.build_parser().parse_args([]), None)
    assert again == outcomes[1].runs[0]


def test_a_csv_and_one_seed(capsys):
    features, labels = blobs()
    frame = pd.DataFrame(features, columns=["a", "b", "c"])
    frame["colour"] = np.where(features[:, 0] > 0, "red", "blue")
    frame["fraud"] = np.where(labels == 1, "yes", "no")
    frame.to_csv("mine.csv", index=False)
    argv = [*SHORT, "--data", "mine.csv", "--target", "fraud", "--seeds", "1"]
    assert main(argv) == 0
    out = capsys.readouterr().out
    assert "mine.csv: train 240 rows (36 positive)" in out
    assert "5 features" in out
    assert "One seed says nothing" in out
    assert_png("demo.png")
    frame.to_parquet("mine.parquet")
    for name in ("mine.csv", "mine.parquet"):
        table = _tables.load_table(name, "fraud", multiclass=False)
        np.testing.assert_allclose(table.x[:, :3], features)
        np.testing.assert_array_equal(table.x[:, 4], features[:, 0] > 0)
        np.testing.assert_array_equal(table.y, labels)
        assert table.classes == ("no", "yes")


def test_multiclass_is_judged_class_by_class(capsys):
    (found,) = _ranking.run([*SHORT, "--multiclass", "--seeds", "1", "--out", "."])
    assert "of CE alone" in capsys.readouterr().out
    split = found.case.split(0)
    model = _ranking.build_model(64, 0, 10, seed=0)
    scores = model(torch.from_numpy(split.test.x)).detach().numpy()
    each = [average_precision_score(split.test.y == k, scores[:, k]) for k in range(10)]
    value = _ranking.average_precision(model, split.test)
    assert value == pytest.approx(100 * np.mean(each))


def test_npz_and_the_other_tables():
    features, labels = blobs()
    np.savez("mine.npz", X=features.astype(np.float32), y=labels.astype(np.uint8)[:, None])
    table = _tables.load_table("mine.npz", None, multiclass=False)
    np.testing.assert_array_equal(table.y, labels)
    digits = _tables.thin(_tables.load_table("digits", None, multiclass=False), 0.02, seed=0)
    assert (digits.y == 0).sum() == 1797 - 174
    assert digits.y.mean() == pytest.approx(0.02, abs=5e-4)
    args = _ranking.build_parser().parse_args(["--data", "synthetic", "--hidden", "3"])
    (case,) = _ranking.cases_of(args)
    assert [len(part.y) for part in case.split(1)] == [12_000, 4000, 4000]
    assert case.split(1).train.y.mean() == pytest.approx(0.005, abs=5e-4)
    assert np.unique(_tables.synthetic(0, 0.005, multiclass=True).y).tolist() == [0, 1, 2, 3]


def test_the_two_made_tables():
    rng = np.random.default_rng(0)
    x, y = _tables.contested(100_000, 0.01, rng)
    assert y.mean() == pytest.approx(0.01, abs=0.001)
    assert x[y, 0].mean() == pytest.approx(0.7 * 1.5, abs=0.15)
    assert x[~y, 0].mean() == pytest.approx(0.02 * 2.5, abs=0.02)
    x, y = _tables.smooth(1000, 0.01, rng)
    assert y.sum() == 10
    assert x[y, 3].mean() > 1


def test_split_is_stratified_standardised_and_keeps_copies_together():
    features, labels = blobs(rows=500, positives=50)
    features[300:360] = features[300]  # copies of one negative
    features[10], features[11] = features[12], -0.0 * features[12] + features[12]
    split = _tables.split_table(_tables.Table("t", features, labels, ("0", "1")), seed=0)
    positives = [int(part.y.sum()) for part in split]
    assert sum(positives) == 50
    np.testing.assert_allclose(positives, [30, 10, 10], atol=3 / 2)  # half of the largest group
    assert sum(len(part.y) for part in split) == 500
    np.testing.assert_allclose(split.train.x.mean(axis=0), 0, atol=1e-5)
    np.testing.assert_allclose(split.train.x.std(axis=0), 1, atol=1e-5)
    rows = [{row.tobytes() for row in part.x} for part in split]
    assert len(rows[0] | rows[1] | rows[2]) == len(rows[0]) + len(rows[1]) + len(rows[2])


@pytest.mark.parametrize(
    ("target", "labels", "names"),
    [
        ([0, 1, 1, 1], [0, 1, 1, 1], ("0", "1")),
        ([0.0, 1.0, 1.0], [0, 1, 1], ("0.0", "1.0")),
        ([False, True, True], [0, 1, 1], ("False", "True")),
        ([3, 7, 7], [1, 0, 0], ("7", "3")),
        (["b", "a", "b"], [0, 1, 0], ("b", "a")),
    ],
)
def test_of_two_classes_the_rarer_is_positive_unless_they_are_0_and_1(target, labels, names):
    got, got_names = _tables._labels(pd.Series(target), multiclass=False)
    assert got.tolist() == labels
    assert got_names == names


def test_intervals_and_verdicts():
    # Of two differences, 2 and 4: t of one degree of freedom, 12.706, times sd = sqrt(2)
    found = _common.interval(np.array([2.0, 4.0]), 1 / 3)
    assert found.mean == 3
    assert str(_common.interval(np.array([2.0]), 1 / 3)) == "+2.00"
    assert found.half == pytest.approx(12.706 * (2 * (1 / 2 + 1 / 3)) ** 0.5, rel=1e-4)
    case = _ranking.Case("t", lambda seed: None, 0, 0.0)
    run = _ranking.Run({"BCE": [1, 2], "Smooth-AP": [2, 2]}, {"BCE": 1, "Smooth-AP": 1}, 1)
    for gain, word in ((3.0, "win"), (-3.0, "loss"), (1.0, "tie")):
        outcome = _ranking.Outcome(case, [run], np.ones(1), _common.Interval(gain, 2.0))
        text = _ranking.verdict([outcome], "BCE")
        assert f"A {word} for Smooth-AP over BCE: t (linear model)." in text
        assert ("cannot tell the two apart" in text) == (word == "tie")
        assert "In 1 of 1 runs" in text  # its best epoch, the first of equals, is in the warmup
        assert "The last epoch was the best of t (linear model) in 2 of 2 trainings" in text
        assert "shortened the run" not in text


@pytest.mark.parametrize(
    ("cap", "expected"),
    [("1", (0, 0, 1)), ("2", (1, 0, 2)), ("3", (1, 1, 3)), ("10", (3, 1, 10)), ("", (12, 4, 40))],
)
def test_the_environment_shortens_a_run(cap, expected, monkeypatch):
    monkeypatch.setenv(_common.EPOCHS_VARIABLE, cap)
    args = argparse.Namespace(total_epochs=40, warmup_epochs=12, blend_epochs=4)
    assert _ranking.plan_epochs(args, steps=9) == expected


def test_a_default_number_of_epochs():
    args = _ranking.build_parser().parse_args([])
    assert [_ranking.plan_epochs(args, steps)[2] for steps in (5, 40, 50, 500)] == [40, 25, 20, 20]


def test_retrieval(monkeypatch, capsys):
    monkeypatch.setattr(_retrieval, "MADE", (20, 8, 24))
    monkeypatch.setenv(_common.EPOCHS_VARIABLE, "1")
    values = _retrieval.run(["--seeds", "2", "--noise", "0.4"])
    assert values.shape == (2, 2, 5, 2)
    np.testing.assert_array_equal(values[:, 0, 0], values[:, 1, 0])  # raw ones know no labels
    out = capsys.readouterr().out
    cells = "".join(rf" +{cell:.2f}" for cell in values.mean(0)[:, 3].reshape(-1))
    assert re.search(rf"^RetrievalLoss{cells}$", out, re.M)
    gain = _common.interval(values[:, 1, 3, 1] - values[:, 1, 2, 1], 0.0)
    assert f"RetrievalLoss - contrastive loss: mAP {gain}: {gain.verdict}" in out
    assert_png("demo-retrieval.png")


def test_retrieval_of_a_file_takes_classes_apart(capsys):
    rows = _retrieval.made(0)
    np.savez("mine.npz", x=rows.x.astype(np.float16), y=np.char.add("c", rows.y.astype(str)))
    loaded = _retrieval.load("mine.npz")
    np.testing.assert_allclose(loaded.x, rows.x, rtol=1e-3, atol=1e-3)
    parts = _retrieval.split_classes(loaded, seed=1)
    classes = [set(part.y) for part in parts]
    assert [len(c) for c in classes] == [24, 9, 27]
    assert not classes[0] & classes[1] | classes[2] & (classes[0] | classes[1])
    noisy = _retrieval.with_noise(parts[0], 0.5, np.random.default_rng(0))
    assert set(noisy.y) <= classes[0]
    assert (noisy.y != parts[0].y).mean() == pytest.approx(0.5 * 23 / 24, abs=0.1)


def test_contrastive_loss_and_measures_are_those_of_loops():
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(9, 4)), np.array([0, 0, 0, 1, 1, 2, 2, 2, 3])
    z = x / np.linalg.norm(x, axis=1, keepdims=True)
    losses, hits, ap = [], [], []
    for i in range(9):
        others = [j for j in range(9) if j != i]
        hits.append(y[max(others, key=lambda j, i=i: z[i] @ z[j])] == y[i])
        positive = [j for j in others if y[j] == y[i]]
        if positive:
            total = sum(np.exp(z[i] @ z[j] / 0.1) for j in others)
            losses.append(-np.mean([np.log(np.exp(z[i] @ z[j] / 0.1) / total) for j in positive]))
            ap.append(average_precision_score(y[others] == y[i], z[others] @ z[i]))
    got = _retrieval.contrastive(torch.from_numpy(x), torch.from_numpy(y), 0.1)
    assert got.item() == pytest.approx(np.mean(losses))
    raw = _retrieval.LinearEmbedder(shrinkages=(), max_iter=0, device="cpu", random_state=0)
    raw.fit(np.tile(x, (2, 1)), np.tile(y, 2))
    measured = _retrieval.judge(raw, _retrieval.Rows(x, y))
    assert measured == pytest.approx((100 * np.mean(hits), 100 * np.mean(ap)))
