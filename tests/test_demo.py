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

from proxy_losses.demo import _ranking, _retrieval, _tables, _verdict  # noqa: E402
from proxy_losses.demo.__main__ import EPOCHS_VARIABLE, RANKING, main, parse  # noqa: E402

SHORT = ["--total-epochs", "4", "--warmup-epochs", "2", "--blend-epochs", "1", "--hidden", "0"]


@pytest.fixture(autouse=True)
def _own_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv(EPOCHS_VARIABLE, raising=False)


def blobs(rows=400, positives=60):
    """Two overlapping clouds: features [rows, 3] and labels in {0, 1}."""
    labels = (np.arange(rows) < positives).astype(np.int64)
    return np.random.default_rng(0).normal(size=(rows, 3)) + labels[:, None], labels


def arguments(*argv):
    return parse(argparse.ArgumentParser(), RANKING, [*argv])


def assert_png(path):
    assert Path(path).read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert Path(path).stat().st_size > 20_000


def test_without_flags_two_tables_and_two_models(monkeypatch, capsys):
    monkeypatch.setattr(_tables, "MADE_ROWS", (700, 500, 500))
    monkeypatch.setenv(EPOCHS_VARIABLE, "10")
    found = []
    monkeypatch.setattr(_ranking, "draw", lambda outcomes, *_: found.append(outcomes))
    assert main(["--seeds", "2", "--pos-rate", "0.05", "--out", "new/a.png"]) == 0
    out = capsys.readouterr().out
    assert f"{EPOCHS_VARIABLE} shortened the run: do not conclude from it." in out
    assert out.startswith("train: 700 rows, ")
    trace = re.findall(r"^ +(\d+)/10 +(\w+) +(\S+) +(\S+) +(\S+) +(\S+) +(\S+)$", out, re.M)
    assert [line[1] for line in trace] == ["warmup"] * 4 + ["blend"] + ["ranking"] * 5
    assert [float(line[2]) for line in trace] == [0.0] * 4 + [0.5] + [1.0] * 5
    assert trace[3][3:5] == trace[3][5:]  # same weights, same batches: the warmup is the same
    assert trace[5][3:5] != trace[5][5:]
    (outcomes,) = found
    models = ("linear model", "MLP of 16 units")
    names = [f"{rows}, {model}" for rows in ("contested top", "smooth odds") for model in models]
    assert [*outcomes] == names
    for name, (_, test, gain) in outcomes.items():
        assert gain == _verdict.gain_of((test[:, 1] - test[:, 0]).tolist(), 0.0)
        up = (test[:, 1] > test[:, 0]).sum()
        row = re.search(
            rf"^{name} +(\S+) +(\S+) +{re.escape(str(gain))} +{up}/2 +{gain.verdict}$", out, re.M
        )
        assert [float(row[1]), float(row[2])] == pytest.approx(test.mean(0), abs=0.006)
    validation, test, _ = outcomes["contested top, MLP of 16 units"]
    runs = np.concatenate([of_seeds for of_seeds, *_ in outcomes.values()])
    unused = sum(int(trace.argmax() < 4) for trace in runs[:, 1])
    rising = sum(int(trace[-1] == max(trace)) for trace in runs.reshape(16, 10))
    assert f"in its warmup: {unused} of 8.\n" in out
    assert f"so that more may change them: {rising} of 16.\n" in out
    args = arguments("--pos-rate", "0.05")
    split = _tables.splits_of(args)[0]["contested top"]
    _ranking.settle(args, split(0)[0].y)
    again = _ranking.train_both(split(0), 16, 0, args, show=False)
    np.testing.assert_array_equal(again[0], validation[0])
    np.testing.assert_array_equal(again[1], test[0])


def test_a_csv_and_one_seed(capsys):
    features, labels = blobs()
    frame = pd.DataFrame(features, columns=["a", "b", "c"])
    frame["colour"] = np.where(features[:, 0] > 0, "red", "blue")
    frame["fraud"] = np.where(labels == 1, "yes", "no")
    frame.reset_index().to_csv("mine.csv")  # the index twice
    argv = [*SHORT, "--data", "mine.csv", "--target", "fraud", "--seeds", "1"]
    assert main(argv) == 0
    out = capsys.readouterr().out
    assert "train: 240 rows, 36 of the rarest class" in out
    assert re.search(r"^mine.csv, linear model .* \d/1 +one seed says nothing$", out, re.M)
    for name in ("Unnamed: 0", "index"):
        assert f"column '{name}' is left out: it numbers the rows" in out
    assert "positive: fraud = yes" in out
    assert_png("demo.png")
    frame.to_parquet("mine.parquet")
    for name in ("mine.csv", "mine.parquet"):
        frame, label = _tables.read(name, "fraud")
        x = _tables.features(frame)
        np.testing.assert_allclose(x[:, :3], features)
        np.testing.assert_array_equal(x[:, 4], features[:, 0] > 0)
        np.testing.assert_array_equal(_tables.class_numbers(label, multiclass=False), labels)


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
    assert main([*SHORT, "--multiclass", "--seeds", "1"]) == 0
    out = capsys.readouterr().out
    assert "of CE alone" in out
    assert "digits, linear model" in out
    test = _tables.splits_of(arguments("--multiclass"))[0]["digits"](0)[2]
    model = _ranking.build_model(64, 0, 10, seed=0)
    scores = model(torch.from_numpy(test.x)).detach().numpy()
    each = [average_precision_score(test.y == k, scores[:, k]) for k in range(10)]
    value = _ranking.average_precision(model, test)
    assert value == pytest.approx(100 * np.mean(each))


def test_npz_and_the_other_tables(capsys):
    features, labels = blobs()
    np.savez("mine.npz", X=features.astype(np.float32), y=labels.astype(np.uint8)[:, None])
    frame, label = _tables.read("mine.npz", None)
    np.testing.assert_allclose(frame, features, rtol=1e-6)
    np.testing.assert_array_equal(label, labels)
    tables, overlap = _tables.splits_of(arguments("--data", "digits", "--pos-rate", "0.02"))
    assert capsys.readouterr().out == "positive: target = 8\n"
    rows = [len(part.y) for part in tables["digits"](0)]
    assert sum(rows) == 1797 - 174 + 33  # all of the rest, and 2 % of eights
    assert overlap == pytest.approx(rows[2] / rows[0], rel=0.01)
    assert sum(part.y.sum() for part in tables["digits"](0)) == 33
    tables, overlap = _tables.splits_of(arguments("--data", "synthetic"))
    split = tables["synthetic"](1)
    assert [len(part.y) for part in split] == [12_000, 4000, 4000]
    assert split[0].y.mean() == pytest.approx(0.005, abs=5e-4)
    assert overlap == 0
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
    split = _tables.split(_tables.Rows(features, labels), seed=0)
    positives = [int(part.y.sum()) for part in split]
    assert sum(positives) == 50
    np.testing.assert_allclose(positives, [30, 10, 10], atol=3)  # two more rows of a copied one
    assert sum(len(part.y) for part in split) == 500
    np.testing.assert_allclose(split[0].x.mean(axis=0), 0, atol=1e-5)
    np.testing.assert_allclose(split[0].x.std(axis=0), 1, atol=1e-5)
    rows = [{row.tobytes() for row in part.x} for part in split]
    assert len(rows[0] | rows[1] | rows[2]) == len(rows[0]) + len(rows[1]) + len(rows[2])


@pytest.mark.parametrize(
    ("target", "labels", "positive"),
    [
        ([0, 1, 1, 1], [0, 1, 1, 1], "1"),
        ([0.0, 1.0, 1.0], [0, 1, 1], "1.0"),
        ([False, True, True], [0, 1, 1], "True"),
        ([3, 7, 7], [1, 0, 0], "3"),
        (["b", "a", "b"], [0, 1, 0], "a"),
    ],
)
def test_of_two_classes_the_rarer_is_positive_unless_they_are_0_and_1(
    target, labels, positive, capsys
):
    label = pd.Series(target, name="y")
    assert _tables.class_numbers(label, multiclass=False).tolist() == labels
    assert capsys.readouterr().out == f"positive: y = {positive}\n"


def test_gains():
    # Of two differences, 2 and 4: t of one degree of freedom, 12.706, times sd = sqrt(2)
    found = _verdict.gain_of([2.0, 4.0], 1 / 3)
    assert found.mean == 3
    assert found.half == pytest.approx(12.706 * (2 * (1 / 2 + 1 / 3)) ** 0.5, rel=1e-4)
    assert found.verdict == "tie"
    assert str(_verdict.Gain(3.0, 1.0, "win")) == "+3.00 [+2.00, +4.00]"
    one = _verdict.gain_of([2.0], 1 / 3)
    assert (str(one), one.verdict) == ("+2.00", "one seed says nothing")
    assert _verdict.gain_of([102.0, 104.0], 0.0).verdict == "win"
    assert _verdict.gain_of([-102.0, -104.0], 0.0).verdict == "loss"
    assert _verdict.gain_of([0.0, 0.0], 0.0).verdict == "tie"


@pytest.mark.parametrize(
    ("cap", "expected"), [("1", [0, 0, 1]), ("4", [1, 0, 4]), ("10", [3, 1, 10]), ("", [12, 4, 40])]
)
def test_the_environment_shortens_a_run(cap, expected, monkeypatch):
    monkeypatch.setenv(EPOCHS_VARIABLE, cap)
    args = arguments("--total-epochs", "40", "--warmup-epochs", "12", "--blend-epochs", "4")
    _ranking.settle(args, np.array([0, 1]))
    assert [args.warmup_epochs, args.blend_epochs, args.total_epochs] == expected


def test_defaults_that_depend_on_the_rows():
    for rows, epochs in ((5 * 256, 40), (39 * 256 + 1, 25), (50 * 256, 20), (500 * 256, 20)):
        for positives, queue in ((0.010, 2048), (0.013, 0)):  # 2.6 and 3.3 in a batch
            args = arguments()
            _ranking.settle(args, (np.arange(rows) < positives * rows).astype(int))
            assert (args.total_epochs, args.queue_size) == (epochs, queue)


def test_retrieval(monkeypatch, capsys):
    monkeypatch.setattr(_retrieval, "MADE", (20, 8, 24))
    monkeypatch.setenv(EPOCHS_VARIABLE, "1")
    found, run = [], _retrieval.run
    monkeypatch.setattr(_retrieval, "run", lambda args: found.append(run(args)))
    assert main(["retrieval", "--seeds", "2", "--noise", "0.4"]) == 0
    (values,) = found
    assert values.shape == (2, 2, 5, 2)
    np.testing.assert_array_equal(values[:, 0, 0], values[:, 1, 0])  # raw ones know no labels
    out = capsys.readouterr().out
    cells = "".join(rf" +{cell:.2f}" for cell in values.mean(0)[:, 3].reshape(-1))
    assert re.search(rf"^RetrievalLoss{cells}$", out, re.M)
    gain = _verdict.gain_of((values[:, 1, 3, 1] - values[:, 1, 2, 1]).tolist(), 0.0)
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
