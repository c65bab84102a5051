"""The benchmark on real tables splits, trains and records as it says."""

from __future__ import annotations

import json
import urllib.error
import warnings

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score

from benchmarks import report, trainer
from benchmarks.real_data import __main__ as program
from benchmarks.real_data import arms, boosting, data, models, noise, page, stats, train
from benchmarks.trainer import Budget, Part

BASE, MORE = Budget(6, 2, 64), Budget(4, 2, 64)


@pytest.fixture(autouse=True)
def _keep_threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def make(rows=900, copies=0, huge=0, name="made"):
    """A table of which some rows come several times, and one very often."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(rows, 4)).astype("float32")
    y = x[:, 0] + rng.normal(size=rows) > 2.2
    again = rng.integers(rows, size=copies)
    x = np.concatenate([x, x[again], np.zeros((huge, 4), "float32")])
    y = np.concatenate([y, rng.random(copies) < 0.1, np.zeros(huge, bool)])
    return data.make_table(name, x, y, "made up")


@pytest.mark.parametrize(("copies", "huge"), [(0, 0), (300, 0), (300, 700)])
def test_splits_keep_copies_together_and_are_stratified(copies, huge):
    table = make(copies=copies, huge=huge)
    for seed in range(5):
        found = data.split(table, seed)
        assert sorted(np.concatenate(found)) == [*range(len(table.y))]
        train_set, val, test = ({*table.group[rows].tolist()} for rows in found)
        assert not (train_set & val) | (train_set & test) | (val & test)
        for rows, share in zip(found, data.SHARES, strict=True):
            # A group, of 5 rows at most, may straddle either edge of its part.
            assert abs(len(rows) - share * len(table.y)) <= 10
            assert abs(table.y[rows].sum() - share * table.y.sum()) <= 10
        if not copies:
            again = data.split(table, seed)
            assert all(np.array_equal(a, b) for a, b in zip(found, again, strict=True))
    assert not np.array_equal(data.split(table, 0).test, data.split(table, 1).test)


def test_parts_are_standardised_by_the_training_rows():
    x = np.random.default_rng(0).normal(3.0, 2.0, (1000, 3)).astype("float32")
    x[0, 0], x[1, 1], x[:, 2] = 1e6, np.nan, 7.0
    table = data.make_table("t", x, np.arange(1000) % 10 == 0, "made up")
    stack = data.stack(table, [0, 1], 400)
    assert [tuple(part.x.shape) for part in stack] == [(2, 400, 3), (2, 200, 3), (2, 200, 3)]
    for part in stack:
        assert part.x.isfinite().all()
        assert part.x.abs().max() <= data.CLIP
        assert (part.x[:, :, 2] == 0).all()
        assert (part.y.double().mean(1) == 0.1).all()
    second = stack.train.x[:, :, 1].double()
    # Of 400 rows in float32; a missing value counts as the mean.
    torch.testing.assert_close(second.mean(1), torch.zeros(2).double(), rtol=0, atol=1e-5)
    torch.testing.assert_close(
        second.std(1, correction=0), torch.ones(2).double(), rtol=0, atol=3e-3
    )


def test_the_rarer_label_is_positive():
    x = np.zeros((4, 2))
    assert data.make_table("t", x, np.array(["n", "p", "n", "n"]), "").y.tolist() == [0, 1, 0, 0]
    assert data.make_table("t", x, np.array([1, 1, 0, 1]), "").y.tolist() == [1, 1, 0, 1]
    with pytest.raises(SystemExit, match="t: expected two labels, got 3"):
        data.make_table("t", x, np.array([0, 1, 2, 0]), "")


def test_folders_without_tables_are_refused(tmp_path):
    with pytest.raises(SystemExit, match=r"holds no \.npz file: give a folder"):
        data.load(str(tmp_path))
    np.savez(tmp_path / "t.npz", X=np.zeros((2, 2)))
    with pytest.raises(SystemExit, match=r"t.npz lacks X or y, it has \['X'\]"):
        data.load(str(tmp_path))


def test_without_a_network_openml_says_so(monkeypatch):
    def fetch(**_):
        warnings.warn("A network error occurred. Retrying...", stacklevel=1)
        raise urllib.error.URLError("no route")

    monkeypatch.setattr("sklearn.datasets.fetch_openml", fetch)
    with pytest.raises(
        SystemExit, match=r"1597 \(creditcard\) cannot.*needs a network.*--data FOL"
    ):
        program.main(["--data", "openml", "--quick"])


@pytest.mark.parametrize("model", models.WIDTHS)
@pytest.mark.parametrize("arm", [arms.BASE, *arms.ARMS], ids=lambda arm: arm.name)
def test_a_stack_trains_each_network_as_if_alone(arm, model):
    if (why := trainer.missing(arm)) is not None:
        pytest.skip(why)
    seeds = [3, 1, 2]
    stack = doubled(data.stack(make(), seeds))
    start = [w.double() for w in models.initial(model, 4, seeds)]
    arm, budget = arms.of_model(arm, model), BASE if arm is arms.BASE else MORE
    whole = train.fit(stack, arm, start, seeds, budget)
    alone = train.fit(
        data.Stack(*(Part(part.x[1:2], part.y[1:2]) for part in stack)),
        arm._replace(rates=arm.rates[1:2], values=arm.values[1:2]),
        [w[1:2] for w in start],
        seeds[1:2],
        budget,
    )
    # Rounding differs with the shape of a product, by 1e-14; Smooth-AP is asked for 1e-12. Adam
    # divides by |gradient| + 1e-8, and the peers may keep rows in float32.
    tolerance = 1e-3 if arm.modules else 1e-12 / 1e-8
    for together, single in zip(whole.weights, alone.weights, strict=True):
        torch.testing.assert_close(together[1, 1], single[0, 0], rtol=0, atol=tolerance)
    moved = [(w - v[:, None]).abs().max() for w, v in zip(whole.weights, start, strict=True)]
    assert max(moved) > 2e-3


def doubled(stack):
    return data.Stack(*(Part(part.x.double(), part.y) for part in stack))


def test_all_arms_share_start_steps_rates_and_number_of_configurations():
    for model in models.WIDTHS:
        rates = [c["rate"] for c in arms.of_model(arms.CONTROL, model).configurations()]
        for arm in arms.ARMS:
            tried = arms.of_model(arm, model).configurations()
            assert [c["rate"] for c in tried] == rates
            assert len(arm.values) == len(tried) == len(arms.BASE.configurations())
    assert len(boosting.CONFIGURATIONS) == len(arms.RATES)
    seeds = [0, 1]
    stack = data.stack(make(), seeds)
    start = models.initial("linear", 4, seeds)
    first = trainer.score_all([w[:, None] for w in start], stack.val.x)[:, 0]
    best = train.metrics_of(first, stack.val.y)
    for arm in (arm for arm in arms.ARMS if trainer.missing(arm) is None):
        ticks = iter(range(MORE.steps))
        fitted = train.fit(stack, arm, start, seeds, MORE, ticks.__next__)
        assert next(ticks, None) is None
        assert fitted.evaluations == MORE.steps // MORE.every + 1
        for of_seed, at in zip(best, fitted.value, strict=True):
            assert (at >= of_seed["ap"]).all()  # step 0 is eligible


def test_a_start_that_nothing_improves_is_kept(monkeypatch):
    values = iter([0.9, 0.1, 0.9])
    monkeypatch.setattr(
        train, "validation_ap", lambda w, part: torch.full((1, 3), next(values)).double()
    )
    stack = data.stack(make(), [0])
    start = models.initial("linear", 4, [0])
    fitted = train.fit(stack, arms.CONTROL, start, [0], MORE)
    assert (fitted.step == 0).all()
    chosen, weights = fitted.choose()
    assert chosen.tolist() == [0]
    assert all(torch.equal(a, b) for a, b in zip(weights, start, strict=True))


def test_batches():
    y = torch.zeros(1, 100, dtype=torch.bool)
    y[0, :10] = True
    plain = train.batches(y, [0], 10, 20, "plain")
    assert plain.shape == (1, 10, 20)
    assert plain[0, :5].flatten().sort().values.tolist() == [*range(100)]
    assert torch.equal(plain, train.batches(y, [0], 10, 20, "plain"))
    enriched = train.batches(y, [0], 10, 20, "enriched")
    assert (y[0][enriched[0]].sum(-1) == 4).all()


def test_metrics():
    rng = np.random.default_rng(0)
    y = np.arange(1000) < 40
    scores = rng.normal(size=1000) + 2 * y
    found = train.metrics_of(torch.from_numpy(scores)[None], torch.from_numpy(y)[None])[0]
    area = 0.005 * found["pauc"]  # McClish: 0.5 for a random ranking, 1 for a perfect one
    lowest = 0.005**2 / 2
    expected = 0.5 * (1 + (area - lowest) / (0.005 - lowest))
    assert roc_auc_score(y, scores, max_fpr=0.005) == pytest.approx(expected, rel=1e-12)
    assert found["recall"] == pytest.approx(y[np.argsort(-scores)[:5]].sum() / 5)
    perfect = train.metrics_of(torch.from_numpy(y.astype(float))[None], torch.from_numpy(y)[None])
    assert perfect == [{"ap": 1.0, "recall": 1.0, "pauc": 1.0}]


def test_the_tables_are_equals():
    found = stats.overall([10.0, 10.0, -20.0])
    # mean 0, deviation sqrt(300), t of 2 degrees of freedom 4.303
    assert found[:5] == pytest.approx((0, 10, 43.03, 2, 1), abs=0.01)
    assert stats.overall([1.0])[:5] == (1.0, None, None, 1, 0)


def test_resampled_interval_and_holm():
    mean, half, p = stats.resampled([1.0, 2.0, 3.0])
    # Variance 1, (1 / 3 + 1 / 3) of it for the mean, t(0.975, 2) = 4.3027.
    assert (mean, half) == pytest.approx((2.0, 4.30265 * (2 / 3) ** 0.5), abs=1e-4)
    assert 0.05 < p < 0.15
    assert stats.resampled([1.0, 1.0]) == (1.0, 0.0, 0.0)
    assert stats.holm([0.03, 0.01, 0.04]) == [False, True, False]
    assert stats.holm([0.01, 0.02, 0.04]) == [True, True, True]


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A quick run on two made-up tables without LibAUC."""
    folder = tmp_path_factory.mktemp("tables")
    table = make(rows=600)
    for name in "ab":
        np.savez(folder / f"{name}.npz", X=table.x, y=table.y)
    out = folder / "deep" / "out.json"
    with pytest.MonkeyPatch.context() as patch:
        real = trainer.missing
        hidden = "LibAUC APLoss"
        patch.setattr(program, "missing", lambda a: "absent" if a.name == hidden else real(a))
        argv = ["--data", str(folder), "--quick", "--seeds", "2", "--out", str(out)]
        assert program.main(argv) == 0
    text = out.read_text()
    assert str(folder) not in text
    assert out.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    return json.loads(text)


def test_quick_run(written, capsys):
    assert written["quick"]
    assert written["complete"]
    assert written["absent"]["LibAUC APLoss"] == "absent"
    ran = [arm.name for arm in (arms.BASE, *arms.ARMS) if arm.name not in written["absent"]]
    for found in written["results"].values():
        assert list(found) == [*models.WIDTHS, boosting.NAME]
        for model in models.WIDTHS:
            assert list(found[model]) == ran
            for run in found[model].values():
                assert {len(run[key]) for key in (*train.METRICS, "chosen", "step")} == {2}
                for tried, chosen in zip(run["tried"], run["chosen"], strict=True):
                    assert tried[chosen] == max(tried)
    per_table = len(models.WIDTHS) * len(ran) * 3 + 3
    assert written["protocol"]["configurations_tried"] == 2 * per_table
    for times in written["epochs"]["models"].values():
        assert {*times} == {*ran} - {arms.CONTROL.name}
        assert times[arms.BASE.name]["ratio"] == 1.0
    shown = page.block(written)
    assert "Left out: LibAUC APLoss (absent)" in shown
    assert f"{2 * per_table} in all" in shown
    assert "did not complete" not in shown


def test_the_block_follows_the_numbers(written):
    changed = json.loads(json.dumps(written))
    for found in changed["results"].values():
        control = found["MLP"][arms.CONTROL.name]["ap"]
        found["MLP"]["focal"]["ap"] = [value + 0.5 for value in control]
    assert "| focal | +50.00 ± 0.00 | 2 / 0 | 0.50 | 2 / 0 / 0 |" in page.block(changed)
    text = page.insert("a\n<!-- measured: begin -->\nold\n<!-- measured: end -->\nz\n", changed)
    assert text.startswith("a\n")
    assert text.endswith("z\n")
    assert "old" not in text


def test_runs_on_different_tables_join(written, tmp_path):
    paths = []
    for name in "ab":
        part = json.loads(json.dumps(written))
        for key in ("tables", "results"):
            part[key] = {name: part[key][name]}
        paths.append(tmp_path / f"{name}.json")
        paths[-1].write_text(json.dumps(part))
    whole = program.join(paths)
    for key in ("tables", "results", "protocol"):
        assert whole[key] == written[key]
    assert [run["tables"] for run in whole["runs"]] == [["a"], ["b"]]
    with pytest.raises(SystemExit, match=r"a\.json has a once more"):
        program.join([paths[0], paths[0]])
    for key, value in (("commit", "other"), ("versions", {})):
        paths[1].write_text(json.dumps(part | {key: value}))
        with pytest.raises(SystemExit, match=rf"b\.json differs in {key}"):
            program.join(paths)
    paths[1].write_text(json.dumps(part | {"protocol": {"seeds": [7]}}))
    with pytest.raises(SystemExit, match=r"b\.json differs in its seeds"):
        program.join(paths)


def test_arms_that_ran_later(written, tmp_path, monkeypatch):
    folder, out = tmp_path / "tables", tmp_path / "out.json"
    folder.mkdir()
    table = make(rows=600)
    for name in "ab":
        np.savez(folder / f"{name}.npz", X=table.x, y=table.y)
    earlier = json.loads(json.dumps(written))
    for found in earlier["results"].values():
        for model in models.WIDTHS:
            del found[model]["partial_auc, implicit"]
    out.write_text(json.dumps(earlier))
    argv = ["--data", str(folder), "--quick", "--later", "--out", str(out)]
    hidden = "LibAUC APLoss"
    real = trainer.missing
    monkeypatch.setattr(program, "missing", lambda a: "absent" if a.name == hidden else real(a))
    assert program.main(argv) == 0
    whole = json.loads(out.read_text())
    assert whole["results"] == earlier["results"]
    (part,) = whole["later"]
    for name, found in part["results"].items():
        for model in models.WIDTHS:
            assert {*found[model]} == {"BCE", "BCE continued", "partial_auc, implicit"}
            for arm, run in found[model].items():  # on one machine all is as it was
                assert run["ap"] == written["results"][name][model][arm]["ap"]
    # The control of its own run, and no other.
    for found in whole["results"].values():
        for model in models.WIDTHS:
            found[model]["BCE continued"]["ap"] = [0.0, 0.0]
    for model in models.WIDTHS:
        now = stats.compare(whole, model, "ap")["partial_auc, implicit"]
        before = stats.compare(written, model, "ap")["partial_auc, implicit"]
        assert {t: f[:3] for t, f in now.items()} == {t: f[:3] for t, f in before.items()}
    shown = page.block(whole)
    assert "*partial_auc, implicit* ran later" in shown
    assert "by at most 0.00 points for the MLP" in shown
    assert (
        f"{2 * sum(p['protocol']['configurations_per_table'] for p in (written, part))} in" in shown
    )
    with pytest.raises(SystemExit, match="an arm that it lacks"):
        program.main(argv)
    whole["tables"]["a"]["rows"] = 7
    del whole["later"]
    out.write_text(json.dumps(whole))
    with pytest.raises(SystemExit, match="a is another table"):
        program.main(argv)


def test_the_page_is_that_of_the_file():
    published = json.loads((report.ROOT / report.RESULTS / "real_data.json").read_text())
    text = page.PAGE.read_text()
    assert page.insert(text, published) == text
    assert published["complete"]
    assert not published["quick"]
    assert not published["dirty"]
    assert not published["epochs"]["dirty"]
    assert len(published["protocol"]["seeds"]) >= 10


def test_the_command_line_asks_for_data(capsys):
    with pytest.raises(SystemExit):
        program.main([])
    assert "give --data FOLDER, --data openml, --report or --join" in capsys.readouterr().err


def test_noise_changes_as_many_labels_as_it_says():
    y = torch.zeros(2, 400, dtype=torch.bool)
    y[:, :40] = True
    found = noise.noisy(y, 0.1, [0, 1])
    assert ((~found & y).sum(1) == 4).all()
    assert ((found & ~y).sum(1) == 4).all()
    assert torch.equal(noise.noisy(y, 0.0, [0, 1]), y)
    more = noise.noisy(y, 0.2, [0, 1])
    assert ((more != y).sum(1) == 16).all()
    assert (more[found != y] != y[found != y]).all()  # those of less noise, and others


@pytest.mark.slow
def test_noise_from_tables_to_the_page(tmp_path, capsys):
    table = make(rows=600)
    np.savez(tmp_path / "a.npz", X=table.x, y=table.y)
    out, where = tmp_path / "deep" / "noise.json", tmp_path / "page.md"
    where.write_text("a\n<!-- noise: begin -->\n<!-- noise: end -->\nz\n")
    argv = ["--quick", "--data", str(tmp_path), "--seeds", "2", "--out", str(out), "--page"]
    assert noise.main([*argv, str(where)]) == 0
    written = json.loads(out.read_text())
    assert str(tmp_path) not in out.read_text()
    assert list(written["results"]["a"]) == list(noise.CELLS)
    assert len({len(one) for one in written["protocol"]["tried"].values()}) == 1
    mean = noise.gains(written, "0 %", "Smooth-AP")["a"]
    assert f"| 0 % | {mean:+.2f} |" in where.read_text()
    assert noise.main(["--report", "--out", str(out), "--page", str(where)]) == 0
    with pytest.raises(SystemExit):
        noise.main([])
    assert "give --data FOLDER" in capsys.readouterr().err
