"""The parts of the scorecard estimator: metrics, soft losses, selection."""

import functools

import numpy as np
import pytest
import torch
from sklearn.metrics import average_precision_score, recall_score, roc_auc_score

from proxy_losses.integrations import _scorecard as card


def soft(metric, scores, y, weight, quantile=0.5, fpr=1.0, tau=0.1) -> float:
    fit = np.ones((1, len(y))) if weight is None else weight[None]
    parts = card.Parts(scores[:, None], y, fit, fit)
    loss = card.soft_loss(metric, parts, tau, quantile, fpr, slice(None))
    return loss(torch.from_numpy(scores)[None, None]).item()


@pytest.mark.parametrize("metric", card.METRICS)
def test_a_weight_is_a_number_of_rows(metric):
    """The soft metric of weighted rows is that of the rows repeated, negatives too."""
    rng = np.random.default_rng(0)
    scores, y = rng.normal(size=60), rng.random(60) < 0.3
    # Copies of a positive are tied with each other, which Smooth-AP counts by half a rank each.
    count = np.where(y & (metric in ("ap", "enrichment")), 1, rng.integers(1, 5, size=60))
    weighted = soft(metric, scores, y, count.astype(float))
    repeated = soft(metric, np.repeat(scores, count), np.repeat(y, count), None)
    assert weighted == pytest.approx(repeated, abs=10 * card.RTOL)
    # And in a band that ends among the rows, the scale of the weights means nothing.
    band = {"quantile": 0.1, "fpr": 0.2}
    assert soft(metric, scores, y, np.full(60, 3.0), **band) == pytest.approx(
        soft(metric, scores, y, None, **band), abs=10 * card.RTOL
    )
    # The six largest negatives of weight 2 make up 12 of all negatives' weight.
    if metric == "pauc":
        order = np.argsort(-np.where(y, -np.inf, scores))[: (~y).sum()]
        heavy = np.ones(60)
        heavy[order[:6]] = 2.0
        first = 12.0 / (len(order) + 6.0)
        above = scores[y][:, None] - scores[order[:6]]
        expected = 1 - (1 / (1 + np.exp(-above / 0.1))).mean()
        assert soft(metric, scores, y, heavy, fpr=first) == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("metric", card.METRICS)
def test_cases_are_rows_of_that_weight(metric):
    """Rows repeated inside, and the same weights halved, which are no numbers of cases."""
    rng = np.random.default_rng(0)
    scores, y = rng.normal(size=60), rng.random(60) < 0.3
    weight = np.where(y, 1.0, rng.integers(1, 3, size=60))
    cases, halved = (soft(metric, scores, y, w, quantile=0.13) for w in (weight, 0.5 * weight))
    assert cases == pytest.approx(halved, abs=10 * card.RTOL)


@pytest.mark.parametrize("metric", card.METRICS)
def test_soft_losses_become_the_metric(metric):
    """At a small tau: average precision, recall, and the pairs in the ROC curve's corner."""
    rng = np.random.default_rng(0)
    y = np.arange(400) % 4 == 0  # 300 negatives, 30 of them in the corner
    scores = rng.permutation(400) / 400 + 0.3 * y + 1e-4 * rng.random(400)
    value = 1 - soft(metric, scores, y, None, 0.05, 0.1, tau=1e-7)
    if metric in ("ap", "enrichment"):
        expected = average_precision_score(y, scores)
    elif metric == "pauc":
        bound = np.sort(scores[~y])[-30]
        expected = np.mean(scores[y][:, None] > scores[~y & (scores >= bound)])
    else:
        last = np.sort(scores)[-20]  # the threshold, which lies on a row: half of it if positive
        expected = np.mean((scores[y] > last) + 0.5 * (scores[y] == last))
    assert value == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("metric", card.METRICS)
def test_lists_of_a_batch_are_apart(metric):
    """Lists of other rows, with candidates beside them: each as the table of its rows alone."""
    rng = np.random.default_rng(0)
    y = np.arange(80) % 4 == 0
    fit = np.stack([np.arange(80) < 60, np.arange(80) >= 20, np.ones(80)]).astype(float)
    fit[:, :8] *= 2.0 if metric == "recall" else 1.0
    scores = rng.normal(size=(3, 2, 80))
    x = torch.from_numpy(scores).requires_grad_()
    parts = card.Parts(scores[0, 0][:, None], y, fit, fit)
    found = card.soft_loss(metric, parts, 0.3, 0.2, 0.3, slice(1, 3))(x[1:])
    assert found.shape == (2, 2)
    for row, mass in zip((1, 2), fit[1:], strict=True):
        kept = mass > 0
        for k in range(2):
            alone = soft(metric, scores[row, k][kept], y[kept], mass[kept], 0.2, 0.3, 0.3)
            assert found[row - 1, k].item() == pytest.approx(alone, abs=2 * card.RTOL)
    found.sum().backward()
    assert not x.grad[0].any()
    assert not x.grad[1, :, :20].any()  # not in its list


def test_the_threshold_of_weighted_rows_pushes_back():
    """Shifting all scores changes nothing, so that the gradient adds up to zero."""
    rng = np.random.default_rng(0)
    scores = torch.from_numpy(rng.normal(size=(1, 50))).requires_grad_()
    weight = torch.from_numpy(rng.random((1, 50)) + 0.5)
    card._weighted_recall(scores, torch.arange(50) < 10, weight, 0.3, 0.2).sum().backward()
    assert abs(scores.grad.sum()) < 1e-12 < abs(scores.grad).sum()


def judged():
    """Four models of three lists; some rows are held out twice."""
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(40, 2)), np.arange(40) % 4 == 0
    held = np.stack([np.arange(40) % 2 == k for k in (0, 1)]).astype(float)
    held = np.where(np.arange(40) < 8, 1.0, held)
    parts = card.Parts(x, y, np.stack([1 - held[0], 1 - held[1], np.ones(40)]), held)
    weights = rng.normal(size=(3, 4, 3))
    return parts, weights, card.judge(weights, parts, card.of_positives("ap", 0.05, 0.1))


def test_choosing_by_held_out_and_training_rows():
    parts, weights, verdict = judged()
    x, y, held = parts.x, parts.y, parts.held
    for k in range(4):
        rows = [np.flatnonzero(side) for side in held]
        pooled = np.concatenate([x[r] @ weights[p, k, :2] + weights[p, k, 2]
                                 for p, r in enumerate(rows)])  # fmt: skip
        expected = average_precision_score(np.concatenate([y[r] for r in rows]), pooled)
        own = average_precision_score(y, x @ weights[2, k, :2])
        assert verdict.held[k] == pytest.approx(expected)
        assert verdict.total(0.25)[k] == pytest.approx(0.75 * expected + 0.25 * own)
    assert verdict.each.shape == (4, 10)  # a positive that is held out twice is one
    np.testing.assert_allclose(verdict.mass, np.array([2, 2, *[1] * 8]) / 12)


def test_what_is_left_of_a_gain():
    """The paired difference less its standard errors, of positives that count alike."""
    start = card.Verdict(np.array([[0.2, 0.4, 0.3, 0.1]]), np.full(4, 0.25), np.array([0.5]))
    better = start.each + np.array([0.1, 0.3, 0.2, 0.2])
    each = np.concatenate([start.each, better, start.each - 0.1])
    verdict = card.Verdict(each, start.mass, np.array([0.5, 0.9, 1.0]))
    sure = 0.2 - 1.5 * np.std([0.1, 0.3, 0.2, 0.2], ddof=1) / 4**0.5
    # as it was; better; worse on held-out rows, however good on its own
    np.testing.assert_allclose(
        verdict.gain(start, 0.2, 1.5), [0.0, 0.8 * sure + 0.2 * 0.4, 0.0], atol=1e-15
    )
    assert not verdict.gain(start, 0.2, 1e3).any()
    one = card.Verdict(np.array([[0.9]]), np.ones(1), np.ones(1))
    none = one.gain(card.Verdict(np.array([[0.1]]), np.ones(1), np.ones(1)), 0.2, 1.5)
    assert none == 0.0  # of one positive there is no standard error


def test_models_in_units_and_between():
    parts, weights, _ = judged()
    weights[:, 3, :2] = 0.0  # without spread
    found = card.units(weights, parts)
    for p in range(3):
        for k in range(4):
            kept = parts.fit[p] > 0
            spread = (parts.x[kept] @ weights[p, k, :2]).std() or 1.0
            np.testing.assert_allclose(found[p, k], weights[p, k] / spread)
    way = card.between(found[:, 0], found[:, 1:3])
    for j, (k, step) in enumerate((k, step) for k in (1, 2) for step in card.STEPS):
        np.testing.assert_allclose(way[:, j], (1 - step) * found[:, 0] + step * found[:, k])


@pytest.mark.parametrize("metric", card.METRICS)
@pytest.mark.parametrize("decimals", [1, 16])
def test_what_each_positive_adds(metric, decimals):
    """By loops over the rows, tied ones too; the mean is what scikit-learn says."""
    rng = np.random.default_rng(0)
    scores, y = np.round(rng.normal(size=200), decimals), rng.random(200) < 0.2
    weight = rng.random(200) + 0.5
    quantile, fpr = 0.1, 0.2
    found = card.of_positives(metric, quantile, fpr)(scores, y, weight)
    negatives = weight[~y].sum()
    expected = []
    for s in scores[y]:
        above, upto = weight[scores > s], weight[scores >= s]
        first, last = (weight[~y & side].sum() / negatives for side in (scores > s, scores >= s))
        if metric == "ap":
            expected.append(weight[y & (scores >= s)].sum() / upto.sum())
        elif metric == "pauc":
            x = np.linspace(0, fpr, 20_001)
            height = np.interp(x, [first, last], [0, 1]) if last > first else (x >= first) * 1.0
            chance = fpr**2 / 2
            expected.append(0.5 * (1 + (np.trapezoid(height, x) - chance) / (fpr - chance)))
        else:
            room = quantile * weight.sum() - above.sum()
            share = np.clip(room / (upto.sum() - above.sum()), 0, 1)
            expected.append(share if metric == "recall" else share / quantile)
    np.testing.assert_allclose(found, expected, rtol=1e-9, atol=2e-5 if metric == "pauc" else 1e-12)
    mean = card.exact(metric, quantile, fpr)(scores, y, weight)
    assert mean == pytest.approx(np.average(found, weights=weight[y]))
    if metric == "ap":
        assert mean == pytest.approx(average_precision_score(y, scores, sample_weight=weight))
    if metric == "pauc":
        assert mean == pytest.approx(
            roc_auc_score(y, scores, max_fpr=fpr, sample_weight=weight), abs=1e-12
        )


def test_blocks_of_lists_do_not_matter(monkeypatch):
    """And each list is trained on its own rows, towards its own candidate."""
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(60, 3)), np.arange(60) % 5 == 0
    fit = np.stack([np.arange(60) % 3 > 0, np.arange(60) % 3 < 2, np.ones(60)]).astype(float)
    parts = card.Parts(x, y, fit, fit[:2])
    plan = card.Plan(np.array([1.0, 0.5, 0.0]), np.array([1.0, 10.0, 1.0]), 1.0, 0.1, 20)
    starts = rng.normal(size=(3, 4))
    soft_loss = functools.partial(card.soft_loss, "ap", parts, 0.25, 0.05, 0.1)
    whole = card.ascend(starts, parts, plan, soft_loss)
    monkeypatch.setattr(card, "_CELLS", 1)
    np.testing.assert_allclose(card.ascend(starts, parts, plan, soft_loss), whole, rtol=1e-9)
    kept = fit[1] > 0
    alone = card.Parts(x[kept], y[kept], fit[1:2, kept], fit[1:2, kept])
    one = card.ascend(
        starts[1:2], alone, plan, functools.partial(soft_loss.func, "ap", alone, 0.25, 0.05, 0.1)
    )
    np.testing.assert_allclose(one[0], whole[1], rtol=1e-2, atol=1e-2)
    lost = card.ascend(starts, parts, plan._replace(rate=1e200, steps=3), soft_loss)
    np.testing.assert_array_equal(lost[:, 0], starts)  # it did not stay finite


def test_without_the_ranking_loss_it_is_the_logistic_regression():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(300, 3))
    y = x[:, 0] + rng.logistic(size=300) > 2
    parts = card.Parts(x, y, np.ones((1, 300)), np.ones((1, 300)))
    start = card.logistics(parts, [0.1])[:, 0]
    plan = card.Plan(np.array([0.0, 0.0]), np.array([1.0, 100.0]), 0.1, 0.02, 400)
    soft_loss = functools.partial(card.soft_loss, "ap", parts, 0.25, 0.05, 0.1)
    found = card.ascend(start, parts, plan, soft_loss)[0]
    # it stops within lbfgs's tolerance, and Adam circles within a step of the minimum
    np.testing.assert_allclose(found[0], start[0], atol=0.02)
    np.testing.assert_allclose(found[1], card.logistics(parts, [0.001])[0, 0], atol=0.02)


def test_exact_metrics():
    rng = np.random.default_rng(0)
    scores, y = rng.normal(size=1000), rng.random(1000) < 0.1
    top = scores >= np.sort(scores)[-50]
    assert card.exact("recall", 0.05, 0.1)(scores, y, None) == pytest.approx(recall_score(y, top))
    # One tied score: the top 5 % holds 5 % of the positives.
    assert card.exact("recall", 0.05, 0.1)(np.zeros(1000), y, None) == pytest.approx(0.05)
    count = rng.integers(1, 4, size=1000)
    for metric in card.METRICS:
        score = card.exact(metric, 0.05, 0.1)
        assert score(scores, y, count.astype(float)) == pytest.approx(
            score(np.repeat(scores, count), np.repeat(y, count), None)
        )


def test_selection_takes_weights_and_stops_where_nothing_is_left():
    rng = np.random.default_rng(0)
    y = rng.random(400) < 0.3
    x = rng.normal(size=(400, 5))
    x[:, 2] += 2 * y
    x[:, 4] = x[:, 2]
    picked = card.select(card.Rows(x - x.mean(0), y, None), 5)
    np.testing.assert_array_equal(picked, [True, True, True, True, False])
    # Rows of weight 1 to 3 are picked by as the repeated ones are.
    count = rng.integers(1, 4, size=400)
    x[:, 0] += 0.5 * y * (count > 1)
    x -= np.average(x, axis=0, weights=count)
    weighted = card.select(card.Rows(x, y, count.astype(float)), 2)
    repeated = card.select(card.Rows(np.repeat(x, count, 0), np.repeat(y, count), None), 2)
    np.testing.assert_array_equal(weighted, repeated)
