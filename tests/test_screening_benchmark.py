"""The screening benchmark splits scaffolds, tunes all arms alike and records what it did."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from scipy.sparse import csr_array

from benchmarks import report
from benchmarks.linear_ranker import by_scaffold
from benchmarks.screening import __main__ as program
from benchmarks.screening import page
from benchmarks.screening.arms import FIELDS, MODES, arm_of, arms, logistic
from benchmarks.screening.data import made, split
from benchmarks.screening.metrics import bedroc, enrichment


@pytest.fixture(autouse=True)
def _keep_threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def bedroc_by_loops(scores, y, alpha):
    """Equation 36 of Truchon and Bayly, ranks by counting, the random order by its sum."""
    total, actives = len(y), sum(y)
    found = 0.0
    for score, active in zip(scores, y, strict=True):
        if active:
            rank = 1 + sum(other > score for other in scores)
            found += math.exp(-alpha * rank / total) / actives
    at_random = sum(math.exp(-alpha * rank / total) for rank in range(1, total + 1)) / total
    share = actives / total
    factor = share * math.sinh(alpha / 2)
    factor /= math.cosh(alpha / 2) - math.cosh(alpha / 2 - alpha * share)
    return found / at_random * factor + 1 / (1 - math.exp(alpha * (1 - share)))


@pytest.mark.parametrize("alpha", [5.0, 20.0])
def test_bedroc(alpha):
    rng = np.random.default_rng(0)
    y = np.arange(200) < 12
    scores = rng.normal(size=200) + y
    assert bedroc(scores, y, alpha) == pytest.approx(bedroc_by_loops(scores, y, alpha), rel=1e-12)
    # all first, all last
    assert bedroc(y.astype(float), y, alpha) == pytest.approx(1, abs=1e-12)
    assert bedroc(-np.arange(200.0), y, alpha) == pytest.approx(1, abs=1e-12)
    assert bedroc(np.arange(200.0), y, alpha) == pytest.approx(0, abs=1e-12)
    # tied molecules share their places: the mean over orders
    coarse = np.round(scores)
    orders = [bedroc_by_loops(coarse + 1e-6 * rng.random(200), y, alpha) for _ in range(400)]
    error = np.std(orders) / 400**0.5
    assert abs(bedroc(coarse, y, alpha) - np.mean(orders)) < 5 * error


def test_enrichment():
    y = np.isin(np.arange(200), [0, 3, 9, 150])
    assert enrichment(-np.arange(200.0), y, 0.01) == pytest.approx((1 / 2) / (4 / 200))
    assert enrichment(-np.arange(200.0), y, 0.05) == pytest.approx((3 / 10) / (4 / 200))
    assert enrichment(np.zeros(200), y, 0.05) == pytest.approx(1)


def test_parts_share_no_scaffold():
    screen = made()
    screen = screen._replace(scaffold=np.minimum(screen.scaffold, 250))  # one large family
    parts = split(screen, 0)
    sizes = [part.y.shape[1] for part in parts]
    assert sum(sizes) == 900
    assert sizes[2] <= 180
    np.testing.assert_allclose(np.array(sizes) / 900, (0.6, 0.2, 0.2), atol=0.2)
    rows = [{tuple(row) for row in part.x.rows.toarray()} for part in parts]
    of = {tuple(row): s for row, s in zip(screen.rows.x.toarray(), screen.scaffold, strict=True)}
    families = [{of[row] for row in some} for some in rows]
    assert not families[0] & families[1] | families[0] & families[2] | families[1] & families[2]
    # the test molecules of the same seed in `linear_ranker`
    _, test = by_scaffold(screen, 0)
    np.testing.assert_array_equal(test.x.toarray(), parts.test.x.rows.toarray())


def test_all_arms_are_tuned_alike():
    for model, field in FIELDS.items():
        for mode in MODES:
            tried = [arm_of(n, model, mode, 2.0, field).configurations() for n in arms(mode)]
            assert len({len(one) for one in tried}) == 1
            for one in tried:
                both = {(c["rate"], c["decay"]) for c in one}
                assert len(both) == len(one) == 2 * len(field.decays)
                assert both == {(c["rate"], c["decay"]) for c in tried[0]}
                if own := {*one[0]} - {"rate", "decay"}:
                    assert len({c[own.copy().pop()] for c in one}) == 2


def test_the_penalty_is_that_of_the_logistic_regression():
    parts = split(made(), 0)
    (weight, bias), decay, found = logistic(parts)
    x = torch.from_numpy(parts.train.x.rows.toarray())
    weight, bias = weight[0].requires_grad_(), bias[0]
    scores = (x @ weight + bias)[:, 0]
    y = parts.train.y[0].float()
    loss = torch.nn.functional.binary_cross_entropy_with_logits(scores, y)
    (slope,) = torch.autograd.grad(loss, weight)
    # The solver stops where the gradient of the sum of losses, times C, is below 1e-4.
    tolerance = 2e-4 / found["C"] / len(y)
    torch.testing.assert_close(slope, -decay * weight.detach(), rtol=0, atol=max(tolerance, 1e-6))


@pytest.mark.slow
def test_quick_run(tmp_path, capsys):
    path = tmp_path / "deep" / "out.json"
    argv = ["--quick", "--splits", "2", "--out", str(path)]
    assert program.main(argv) == 0
    text = path.read_text()
    assert str(tmp_path) not in text
    written = json.loads(text)
    tried = written["protocol"]["configurations"]
    for of_split in written["results"].values():
        for model, of_model in tried.items():
            for mode, known in of_model.items():
                assert list(of_split[model][mode]) == list(known)
                for arm, found in of_split[model][mode].items():
                    assert found["chosen"] == int(np.argmax(found["validation"]))
                    assert len(found["validation"]) == len(known[arm])
    assert "configurations a split" in capsys.readouterr().out
    cpu = written["cpu_s"]
    del written["results"]["1"]["MLP"]["continued"]  # a split that was broken off runs anew
    path.write_text(json.dumps(written))
    assert program.main(argv) == 0
    again = json.loads(path.read_text())
    assert again["cpu_s"] > cpu
    assert len(again["earlier_commits"]) == 1
    assert program.main(["--report", "--out", str(path)]) == 0
    assert path.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    assert [*page.compare(again, "MLP", "continued", ["focal"], "ap")["focal"]][:3] == [
        "mean", "half", "p",
    ]  # fmt: skip
    again["protocol"]["splits"] = 7
    path.write_text(json.dumps(again))
    with pytest.raises(SystemExit, match="of another protocol"):
        program.main(argv)


def test_the_command_line_asks_for_data(capsys):
    for argv, said in (([], "--data FILE.npz is needed"), (["--quick", "--splits", "1"], "2, for")):
        with pytest.raises(SystemExit):
            program.main(argv)
        assert said in capsys.readouterr().err


def test_the_page_is_that_of_the_file():
    published = json.loads(program.OUT.read_text())
    text = page.PAGE.read_text()
    assert report.replaced(text, page.block(published)) == text
    assert not published["quick"]
    assert not published["dirty"]


def test_sparse_rows_are_those_of_a_table():
    from benchmarks.trainer import Arm, Budget, Part, SparseRows, Training

    draw = torch.Generator().manual_seed(0)
    x = torch.rand(1, 30, 5, generator=draw).mul(2).floor()
    weights = [torch.randn(1, *s, generator=draw) for s in ((5, 3), (1, 3), (3, 1), (1, 1))]
    order = torch.randint(0, 30, (1, 4, 8), generator=draw)
    arm = Arm("", lambda setup: lambda s, batch: (s * batch.y[:, None]).square().mean(-1),
              (0.1, 0.1, 0.2), decays=(0.0, 0.5, 0.5))  # fmt: skip
    found = []
    for rows in (x, SparseRows(csr_array(x[0].numpy()))):
        training = Training(Part(rows, x[..., 0]), arm, weights, Budget(4), order)
        ((_, after),) = training.after([4])
        found.append(after)
    for sparse, dense in zip(found[1], found[0], strict=True):
        torch.testing.assert_close(sparse, dense, rtol=1e-4, atol=1e-5)
