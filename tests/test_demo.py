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


def arguments(*argv):
    return _common.Parser("demo", "", "", _ranking.FLAGS).parse_args(argv)


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
    names = [(rows, h) for rows in ("contested top", "smooth odds") for h in (0, 16)]
    assert [(found.case.rows, found.case.hidden) for found in outcomes] == names
    for found in outcomes:
        np.testing.assert_allclose(found.apart, found.test[:, 1] - found.test[:, 0])
        assert found.gain == _common.gain_of(found.apart, 0.0)
        row = re.search(
            rf"^{found.case.rows} +{found.case.model} +(\S+) +(\S+) +"
            rf"({re.escape(str(found.gain))}) +\d/2 +{found.gain.verdict}$", out, re.M,
        )  # fmt: skip
        assert row is not None
        assert [float(row[1]), float(row[2])] == pytest.approx(found.test.mean(0), abs=0.006)
    validation, test = _ranking.train_pair(outcomes[1].case, 0, arguments(), show=False)
    np.testing.assert_array_equal(validation, outcomes[1].validation[0])
    np.testing.assert_array_equal(test, outcomes[1].test[0])


def test_a_csv_and_one_seed(capsys):
    features, labels = blobs()
    frame = pd.DataFrame(features, columns=["a", "b", "c"])
    frame["colour"] = np.where(features[:, 0] > 0, "red", "blue")
    frame["fraud"] = np.where(labels == 1, "yes", "no")
    frame.to_csv("mine.csv")
    argv = [*SHORT, "--data", "mine.csv", "--target", "fraud", "--seeds", "1"]
    assert main(argv) == 0
    out = capsys.readouterr().out
    assert "mine.csv: train 240 rows (36 positive)" in out
    assert "5 features" in out
    assert "column 'Unnamed: 0' is left out: it numbers the rows" in out
    assert "positive: fraud = yes" in out
    assert "One seed says nothing" in out
    assert_png("demo.png")
    frame.to_parquet("mine.parquet")
    for name in ("mine.csv", "mine.parquet"):
        table, classes = _tables.load_table(name, "fraud", multiclass=False)
        np.testing.assert_allclose(table.x[:, :3], features)
        np.testing.assert_array_equal(table.x[:, 4], features[:, 0] > 0)
        np.testing.assert_array_equal(table.y, labels)
        assert classes == ["no", "yes"]


@pytest.mark.parametrize(
    ("first", "left_out"),
    [
        (range(40), True),
        (range(1, 41), True),
        ([float(k) for k in range(40)], True),
        ([k % 39 for k in range(40)], False),
        ([True, False] * 20, False),
        (["a", "b"] * 20, False),
        (pd.array([None, *range(1, 40)], dtype="Int64").fillna(2), False),
    ],
)
def test_a_first_column_that_numbers_the_rows_is_no_feature(first, left_out, capsys):
    frame = pd.DataFrame({"no": first, "a": np.random.default_rng(0).normal(size=40)})
    x = _tables.features(frame)
    assert any(np.array_equal(column, frame["a"]) for column in x.T)
    assert (x.shape[1] == 1) == left_out
    said = "column 'no' is left out: it numbers the rows, or is a saved index\n"
    assert capsys.readouterr().out == said * left_out


def test_multiclass_is_judged_class_by_class(capsys):
    (found,) = _ranking.run([*SHORT, "--multiclass", "--seeds", "1"])
    assert "of CE alone" in capsys.readouterr().out
    *_, test = found.case.split(0)
    model = _ranking.build_model(64, 0, 10, seed=0)
    scores = model(torch.from_numpy(test.x)).detach().numpy()
    each = [average_precision_score(test.y == k, scores[:, k]) for k in range(10)]
    value = _ranking.average_precision(model, test)
    assert value == pytest.approx(100 * np.mean(each))


def test_npz_and_the_other_tables():
    features, labels = blobs()
    np.savez("mine.npz", X=features.astype(np.float32), y=labels.astype(np.uint8)[:, None])
    table, _ = _tables.load_table("mine.npz", None, multiclass=False)
    np.testing.assert_array_equal(table.y, labels)
    digits, names = _tables.load_table("digits", None, multiclass=False)
    assert names == ["the rest", "8"]
    digits = _tables.thin(digits, 0.02, seed=0)
    assert (digits.y == 0).sum() == 1797 - 174
    assert digits.y.mean() == pytest.approx(0.02, abs=5e-4)
    (case,) = _ranking.cases_of(arguments("--data", "synthetic", "--hidden", "3"))
    split = case.split(1)
    assert [len(part.y) for part in split] == [12_000, 4000, 4000]
    assert split[0].y.mean() == pytest.approx(0.005, abs=5e-4)
    assert np.unique(_tables.synthetic(0, 0.005, 4).y).tolist() == [0, 1, 2, 3]


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
    features[300:320] = features[300]  # copies of one negative
    features[10], features[11] = features[12], -0.0 * features[12] + features[12]
    split = _tables.split_table(_tables.Rows(features, labels), ["0", "1"], seed=0)
    positives = [int(part.y.sum()) for part in split]
    assert sum(positives) == 50
    np.testing.assert_allclose(positives, [30, 10, 10], atol=3)  # two more rows of a copied one
    assert sum(len(part.y) for part in split) == 500
    np.testing.assert_allclose(split[0].x.mean(axis=0), 0, atol=1e-5)
    np.testing.assert_allclose(split[0].x.std(axis=0), 1, atol=1e-5)
    rows = [{row.tobytes() for row in part.x} for part in split]
    assert len(rows[0] | rows[1] | rows[2]) == len(rows[0]) + len(rows[1]) + len(rows[2])


@pytest.mark.parametrize(
    ("target", "labels", "names"),
    [
        ([0, 1, 1, 1], [0, 1, 1, 1], ["0", "1"]),
        ([0.0, 1.0, 1.0], [0, 1, 1], ["0.0", "1.0"]),
        ([False, True, True], [0, 1, 1], ["False", "True"]),
        ([3, 7, 7], [1, 0, 0], ["7", "3"]),
        (["b", "a", "b"], [0, 1, 0], ["b", "a"]),
    ],
)
def test_of_two_classes_the_rarer_is_positive_unless_they_are_0_and_1(target, labels, names):
    got, got_names = _tables.label_codes(pd.Series(target), multiclass=False)
    assert got.tolist() == labels
    assert got_names == names


def test_gains_and_notes():
    # Of two differences, 2 and 4: t of one degree of freedom, 12.706, times sd = sqrt(2)
    found = _common.gain_of(np.array([2.0, 4.0]), 1 / 3)
    assert found.mean == 3
    assert found.half == pytest.approx(12.706 * (2 * (1 / 2 + 1 / 3)) ** 0.5, rel=1e-4)
    assert found.verdict == "tie"
    assert str(_common.Gain(3.0, 1.0, "win")) == "+3.00 [+2.00, +4.00]"
    one = _common.gain_of(np.array([2.0]), 1 / 3)
    assert (str(one), one.verdict) == ("+2.00", "one seed")
    for shift, word in ((100.0, "win"), (-100.0, "loss")):
        gain = _common.gain_of(np.array([2.0, 4.0]) + shift, 0.0)
        assert gain.verdict == word
        validation = np.array([[[1.0, 2.0], [2.0, 2.0]]] * 2)  # [seeds, arms, epochs]
        outcome = _ranking.Outcome(None, validation, np.ones((2, 2)), np.ones(2), gain)
        text = _ranking.notes([outcome], warmup=1)
        # Its best epoch, the first of equals, is in the warmup.
        assert "In 2 of 2 runs the best validation epoch of Smooth-AP lies in its warmup" in text
        assert "In 4 of 4 trainings the last epoch was the best" in text
        assert "cannot tell the two apart" not in text
        assert "shortened the run" not in text
        assert "cannot tell" in _ranking.notes([outcome._replace(gain=found)], warmup=1)
        assert "Raise --seeds" in _ranking.notes([outcome._replace(gain=one)], warmup=1)


@pytest.mark.parametrize(
    ("cap", "expected"),
    [("1", (0, 0, 1)), ("2", (1, 0, 2)), ("3", (1, 1, 3)), ("10", (3, 1, 10)), ("", (12, 4, 40))],
)
def test_the_environment_shortens_a_run(cap, expected, monkeypatch):
    monkeypatch.setenv(_common.EPOCHS_VARIABLE, cap)
    args = argparse.Namespace(total_epochs=40, warmup_epochs=12, blend_epochs=4)
    assert _ranking.plan_epochs(args, steps=9) == expected


def test_a_default_number_of_epochs():
    args = arguments()
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
    gain = _common.gain_of(values[:, 1, 3, 1] - values[:, 1, 2, 1], 0.0)
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
    measured = _retrieval.judge(raw, _tables.Rows(x, y))
    assert measured == pytest.approx((100 * np.mean(hits), 100 * np.mean(ap)))
