"""The retrieval benchmark splits classes, trains all arms alike and records what it did."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from benchmarks import harness
from benchmarks.retrieval import __main__ as program
from benchmarks.retrieval import page
from benchmarks.retrieval.data import Cell, Rows, load, made, split


@pytest.fixture(autouse=True)
def _keep_threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.slow
def test_quick_run(tmp_path, capsys):
    pytest.importorskip("pytorch_metric_learning")
    path = tmp_path / "deep" / "out.json"
    argv = ["--quick", "--out", str(path)]
    assert program.main([*argv, "--minutes", "0"]) == 0  # one split, gone on with
    assert list(json.loads(path.read_text())["results"]["made"]) == ["0 % noise, all rows a class"]
    assert program.main(argv) == 0
    text = path.read_text()
    assert str(tmp_path) not in text
    written = json.loads(text)
    assert written["quick"]
    assert written["versions"]["pytorch_metric_learning"]
    known = written["protocol"]["arms"]
    for name in written["protocol"]["cells"]:
        for found in written["results"]["made"][name].values():
            assert list(found) == list(known)
            for arm, one in found.items():
                values = known[arm]["values"]
                assert len(one["validation"]) == len(values)
                assert one["chosen"] == values[int(np.argmax(one["validation"]))]
                assert 0 < one["map"] <= 1
                assert 0 < one["recall_at_1"] <= 1
    splits = sum(len(cell) for cell in written["results"]["made"].values())
    tried = sum(len(arm["values"]) for arm in known.values())
    assert f"{tried * splits} fitted" in capsys.readouterr().out
    cpu = written["cpu_s"]
    path.with_suffix(".png").unlink()
    assert program.main(argv) == 0  # all is there
    assert json.loads(path.read_text())["cpu_s"] == cpu
    assert program.main(["--report", "--out", str(path)]) == 0
    assert path.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    # An arm of another record runs anew, and it alone.
    written["protocol"]["arms"]["raw"]["values"] = ["other"]
    kept = [
        one.pop("raw")["map"]
        for cell in written["results"]["made"].values()
        for one in (dict(found) for found in cell.values())
    ]
    path.write_text(json.dumps(written))
    assert program.main(argv) == 0
    again = json.loads(path.read_text())
    assert [f["raw"]["map"] for c in again["results"]["made"].values() for f in c.values()] == kept
    assert len(again["earlier_commits"]) == 2
    written["protocol"]["unit"] = "another"
    path.write_text(json.dumps(written))
    with pytest.raises(SystemExit, match="of another protocol"):
        program.main(argv)


def test_peers_are_trained_alike():
    losses = pytest.importorskip("pytorch_metric_learning.losses")
    from benchmarks.retrieval.arms import OURS, QUICK, Task, arms, embedder

    parts = split(made()["made"], Cell(0.0, None), 0)
    task = Task(parts, QUICK, 0.9)
    seen = []

    class Spy(losses.ProxyAnchorLoss):
        def forward(self, embeddings, labels):
            seen.append((embeddings.detach().clone(), labels, self.proxies.detach().clone()))
            return super().forward(embeddings, labels)

    embedder(32.0, task, make=lambda alpha, *sizes: Spy(*sizes, alpha=alpha))
    theirs = arms()["SupCon"].fit(0.1, task)
    mine = arms()[OURS].fit(0.05, task)
    embeddings, labels, proxies = seen[0]
    assert embeddings.shape[1:] == proxies.shape[1:] == (16,)
    assert labels.max() < len(proxies) == len(set(parts.train.y))
    assert not torch.equal(seen[1][2], proxies)
    assert theirs.value != mine.value


def test_splits_are_of_classes():
    rows = made()["made"]
    plain = split(rows, Cell(0.0, None), 0)
    classes = [set(part.y) for part in plain]
    assert [len(some) for some in classes] == [14, 4, 6]
    assert len(set.union(*classes)) == 24
    assert sum(len(part.y) for part in plain) == len(rows.y)
    assert set(split(rows, Cell(0.0, None), 1).test.y) != classes[2]
    few = split(rows, Cell(0.0, 5), 0)
    assert [set(np.bincount(part.y)[np.unique(part.y)]) for part in few] == [{5}, {5}, {12}]
    np.testing.assert_array_equal(few.test.x, plain.test.x)


def test_noise_is_of_this_share_and_spares_the_test():
    base = made()["made"]
    rows = Rows(np.arange(len(base.y), dtype=np.float32)[:, None], base.y)  # a row tells its number
    noisy = split(rows, Cell(0.25, None), 0)
    known = np.concatenate([part.x for part in noisy[:2]])[:, 0].astype(int)
    y = np.concatenate([part.y for part in noisy[:2]])
    assert len(known) == 18 * 12
    assert (y != rows.y[known]).sum() == 0.25 * 18 * 12
    assert not set(y) & set(noisy.test.y)
    np.testing.assert_array_equal(rows.y[noisy.test.x[:, 0].astype(int)], noisy.test.y)


def test_the_comparison():
    cell = {
        str(k): {"LinearEmbedder": {"map": 0.5 + gain}, "raw": {"map": 0.5}}
        for k, gain in enumerate((0.01, 0.03))
    }
    found = page.compare(cell)["raw"]
    # t(0.975, 1) = 12.706; the variance of 1 and 3 is 2; test classes are a third of the others
    assert found["mean"] == pytest.approx(2.0)
    assert found["half"] == pytest.approx(12.706 * (2 * (1 / 2 + 1 / 3)) ** 0.5, abs=1e-3)
    assert (found["up"], found["down"], found["sure"]) == (2, 0, False)


def test_data(tmp_path, monkeypatch, capsys):
    with pytest.raises(SystemExit, match="file of embeddings with x and y"):
        load(tmp_path)
    np.savez(tmp_path / "some.npz", x=np.ones((4, 2), np.float16), y=np.arange(4, dtype=np.int16))
    np.savez(tmp_path / "other.npz", X=np.ones((4, 2)))
    (name, rows), *rest = load(tmp_path).items()
    assert (name, rows.x.dtype, len(rest)) == ("some", np.float32, 0)
    monkeypatch.setattr(harness, "peer", lambda package: (None, "1"))
    with pytest.raises(SystemExit):
        program.main([])
    assert "--data FOLDER is needed" in capsys.readouterr().err
    monkeypatch.setattr(harness, "peer", lambda package: (None, None))
    with pytest.raises(SystemExit, match=r'pytorch_metric_learning is missing: pip.*"\.\[bench\]"'):
        program.main(["--quick"])


def test_the_page_is_that_of_the_file():
    published = json.loads(program.OUT.read_text())
    text = page.PAGE.read_text()
    assert page.insert(text, published) == text
    assert not published["quick"]
    assert not published["dirty"]
