"""The demo, run in this process on small data: what it prints, draws, measures and refuses."""

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

from proxy_losses.demo import _measure, _report, _sources, _tables, _train  # noqa: E402
from proxy_losses.demo.__main__ import EPOCHS_VARIABLE, main, run  # noqa: E402

SHORT = ["--total-epochs", "4", "--warmup-epochs", "2", "--blend-epochs", "1", "--hidden", "8"]


@pytest.fixture(autouse=True)
def _own_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv(EPOCHS_VARIABLE, raising=False)


def blobs(rows=400, positives=60, seed=0):
    """Two overlapping clouds: features [rows, 3] and labels in {0, 1}."""
    rng = np.random.default_rng(seed)
    labels = (np.arange(rows) < positives).astype(np.int64)
    return rng.normal(size=(rows, 3)) + labels[:, None], labels


def frame(rows=400):
    features, labels = blobs(rows)
    table = pd.DataFrame(features, columns=["a", "b", "c"])
    table["colour"] = np.where(features[:, 0] > 0, "red", "blue")
    table["fraud"] = np.where(labels == 1, "yes", "no")
    return table


def assert_png(path):
    assert Path(path).read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert Path(path).stat().st_size > 20_000


def assert_lines(out, result):
    """Header, a line per epoch and arm, the table with sklearn's numbers, the verdict."""
    total = result.settings.total_epochs
    lines = re.findall(
        r"^(\S+) +epoch +(\d+)/\d+  (\w+) +main_weight +(\S+)  temperature +(\S+)  "
        r"loss (\S+)  validation AUCPR (\S+)$",
        out,
        re.M,
    )
    assert [int(line[1]) for line in lines] == [*range(1, total + 1)] * 2
    assert [line[2] for line in lines[:4]] == ["warmup", "warmup", "blend", "main"]
    assert [line[3] for line in lines[:4]] == ["0.00", "0.00", "0.50", "1.00"]
    assert {line[3] for line in lines[4:]} == {"-"}
    assert lines[3][4] == f"{result.settings.temp_end:.4f}"
    assert lines[0][3:] != lines[4][3:]
    assert lines[0][5:] == lines[4][5:]  # same weights, same batches: the warmup is the same
    assert lines[1][5:] == lines[5][5:]
    labels = result.split.test.labels
    for arm in (result.ranking, result.plain):
        scores = arm.test_scores
        truth = labels if scores.shape[1] == 1 else np.eye(scores.shape[1])[labels]
        expected = average_precision_score(truth, scores, average="macro")
        row = re.search(rf"^{arm.name}[ ,].*?  (0\.\d+|1\.0+) ", out[out.index("---") :], re.M)
        assert row is not None
        assert row[1] == f"{expected:.4f}"
        assert arm.best.aucpr == max(epoch.aucpr for epoch in arm.trace)
        assert f"{arm.best.number} ({arm.best.phase})" in out
    assert re.search(r"^Measured: a (win|tie|loss)", out, re.M)
    assert "one seed" in out
    assert result.ranking.steps == result.plain.steps > 0


def test_digits(capsys):
    result = run([*SHORT, "--out", "new/a.png"])
    out = capsys.readouterr().out
    assert out.startswith("data   digits: 1,797 rows, 174 positive ('8'), 9.68 %, 64 features")
    assert "model  64-8-1," in out
    assert_lines(out, result)
    assert_png("new/a.png")
    assert result.ranking.trace[:2] != result.plain.trace[:2]
    assert torch.get_num_threads() >= 1


def test_multiclass(capsys):
    result = run([*SHORT, "--multiclass", "--out", "."])
    out = capsys.readouterr().out
    assert "1,797 rows of 10 classes" in out
    assert "mean over classes" in out
    assert result.plain.name == "CE"
    assert result.plain.test_scores.shape == (len(result.split.test.labels), 10)
    assert_lines(out, result)
    assert_png("demo.png")


def test_synthetic_linear_without_positives_in_most_batches(monkeypatch, capsys):
    monkeypatch.setattr(_sources, "SYNTHETIC_ROWS", 3000)
    argv = [*SHORT, "--data", "synthetic", "--hidden", "0", "--batch-size", "64"]
    result = run(argv)
    out = capsys.readouterr().out
    assert "model  20-1," in out
    assert result.table.labels.mean() == pytest.approx(0.01, abs=0.002)
    assert_lines(out, result)
    assert_png("demo.png")
    again = run(argv)
    assert again.ranking.trace == result.ranking.trace
    assert np.array_equal(again.plain.test_scores, result.plain.test_scores)
    assert again.difference == result.difference


def test_synthetic_multiclass_has_four_classes(monkeypatch):
    monkeypatch.setattr(_sources, "SYNTHETIC_ROWS", 2000)
    table = _sources.load_table("synthetic", target=None, multiclass=True, pos_rate=None, seed=0)
    assert np.unique(table.labels).tolist() == [0, 1, 2, 3]


def test_npz(capsys):
    features, labels = blobs()
    np.savez("mine.npz", X=features.astype(np.float32), y=labels.astype(np.uint8)[:, None])
    assert main([*SHORT, "--data", "mine.npz"]) == 0
    out = capsys.readouterr().out
    assert "mine.npz: 400 rows, 60 positive, 15.00 %, 3 features" in out
    assert "test 80 rows, 12 positive, 15.00 %" in out
    assert_png("demo.png")


@pytest.mark.parametrize("suffix", ["csv", "parquet"])
def test_frames_with_text_columns_and_text_labels(suffix, capsys):
    table = frame()
    getattr(table, "to_csv" if suffix == "csv" else "to_parquet")(f"mine.{suffix}", index=False)
    result = run([*SHORT, "--data", f"mine.{suffix}", "--target", "fraud"])
    assert result.table.classes == ("no", "yes")
    assert "400 rows, 60 positive ('yes'), 15.00 %, 5 features" in capsys.readouterr().out
    assert_png("demo.png")


def test_both_arms_start_from_the_same_weights_and_see_the_same_batches():
    settings = _train.Settings(batch_size=50, total_epochs=2, seed=3)
    state = torch.random.get_rng_state()
    one, two = (_train.build_model(3, 1, settings).state_dict() for _ in range(2))
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(torch.equal(one[name], two[name]) for name in one)
    part = _tables.Part(*(array.astype(kind) for array, kind in zip(blobs(), "fl", strict=True)))
    for left, right in zip(*(_train.batches(part, settings) for _ in range(2)), strict=True):
        assert len(left) == _train.steps_per_epoch(400, settings) == 8
        assert all(torch.equal(a[0], b[0]) for a, b in zip(left, right, strict=True))


def test_split_is_stratified_standardised_and_keeps_copies_together():
    features, labels = blobs(rows=500, positives=50)
    features[300:400] = features[300]  # a hundred copies of one negative
    features[10], features[11] = features[12], -0.0 * features[12] + features[12]
    table = _tables.Table("t", features, labels, ("0", "1"))
    split = _tables.split_table(table, seed=0)
    assert split.copies == 99 + 2
    assert [len(part.labels) for part in split[:3]] == [300, 100, 100]
    assert [int(part.labels.sum()) for part in split[:3]] == [30, 10, 10]
    np.testing.assert_allclose(split.train.features.mean(axis=0), 0, atol=1e-5)
    np.testing.assert_allclose(split.train.features.std(axis=0), 1, atol=1e-5)
    rows = [{row.tobytes() for row in part.features} for part in split[:3]]
    assert len(rows[0] | rows[1] | rows[2]) == len(rows[0]) + len(rows[1]) + len(rows[2])
    other = _tables.split_table(table, seed=1)
    assert not np.array_equal(other.test.features, split.test.features)


def test_copies_with_a_stray_label_stay_with_their_majority():
    features, labels = blobs(rows=500, positives=50)
    features[49:300] = 1.0  # one positive among 251 copies
    split = _tables.split_table(_tables.Table("t", features, labels, ("0", "1")), seed=0)
    assert [int(part.labels.sum()) for part in split[1:3]] == [10, 10]


@pytest.mark.parametrize(
    ("target", "labels", "names"),
    [
        ([0, 1, 1, 1], [0, 1, 1, 1], ("0", "1")),
        ([0.0, 1.0, 1.0], [0, 1, 1], ("0", "1")),
        ([False, True, True], [0, 1, 1], ("False", "True")),
        ([3, 7, 7], [1, 0, 0], ("7", "3")),
        ([-1, -1, 1], [0, 0, 1], ("-1", "1")),
        (["b", "a", "b"], [0, 1, 0], ("b", "a")),
    ],
)
def test_of_two_classes_the_rarer_is_positive_unless_they_are_0_and_1(target, labels, names):
    got, got_names = _tables.encode_labels(np.array(target), multiclass=False)
    assert got.tolist() == labels
    assert got_names == names


def test_pos_rate_thins_positives_only(capsys):
    table = _sources.load_table("digits", target=None, multiclass=False, pos_rate=0.02, seed=0)
    assert (table.labels == 0).sum() == 1797 - 174
    assert table.labels.mean() == pytest.approx(0.02, abs=5e-4)


def test_recall_at_top():
    scores = np.arange(400.0)[::-1].copy()
    positive = np.zeros(400, dtype=bool)
    positive[[1, 2, 50]] = True
    assert _measure.top_count(400) == 2
    assert _measure.top_count(401) == 3
    assert _measure.top_count(1) == 1
    assert _measure.recall_at_top(scores, positive) == pytest.approx(1 / 3)
    scores[1:3] = 398.0  # two positives share the second place
    assert _measure.recall_at_top(scores, positive) == pytest.approx(1 / 3)
    assert _measure.recall_at_top(np.zeros(400), positive) == pytest.approx(2 / 400)
    measures = _measure.measure(scores[:, None], positive.astype(np.int64))
    assert measures.best_recall == pytest.approx(2 / 3)


def test_weighted_aucpr_equals_sklearn_with_ties_and_zero_weights():
    rng = np.random.default_rng(0)
    scores, labels = rng.integers(0, 9, (60, 3)).astype(float), rng.integers(0, 3, 60)
    weight = rng.integers(0, 3, 60).astype(float)
    expected = np.mean(
        [average_precision_score(labels == c, scores[:, c], sample_weight=weight) for c in range(3)]
    )
    assert _measure.weighted_aucpr(scores, labels)(weight) == pytest.approx(expected)


def test_bootstrap_and_verdict():
    features, labels = blobs()
    good = features.sum(axis=1, keepdims=True)
    bad = np.random.default_rng(0).normal(size=good.shape)
    table = _tables.Table("t", features, labels, ("0", "1"))
    split = _tables.split_table(table, 0)
    split = split._replace(test=_tables.Part(features.astype(np.float32), labels))
    epoch = _train.Epoch(1, "warmup", 0.0, 0.5, 0.1, 0.5)
    arms = [_train.Arm("Smooth-AP", (epoch,), epoch, 1, s) for s in (good, bad)]
    for ours, theirs, word in ((0, 1, "win for"), (1, 0, "loss for"), (0, 0, "tie")):
        plain = arms[theirs]._replace(name="BCE")
        result = _report.conclude(table, _train.Settings(), split, arms[ours], plain)
        text = _report.verdict(result)
        assert text.startswith(f"Measured: a {word}")
        assert "60 positives" in text
        assert "lies in its warmup" in text
        assert "The last epoch was the best of Smooth-AP and of BCE" in text
        assert result.difference.low <= result.difference.difference <= result.difference.high
