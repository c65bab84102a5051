"""The parts of the scorecard estimator: metrics, soft losses, selection."""

import numpy as np
import pytest
import torch
from sklearn.metrics import average_precision_score, recall_score

from proxy_losses.integrations import _scorecard as card


def soft(metric, scores, y, weight, quantile=0.5, fpr=1.0) -> float:
    rows = card.Rows(scores[:, None], y, weight)
    return card.soft_loss(metric, rows, 0.1, quantile, fpr)(torch.from_numpy(scores)).item()


@pytest.mark.parametrize("metric", card.METRICS)
def test_a_weight_is_a_number_of_rows(metric):
    """The soft metric of weighted rows is that of the rows repeated, negatives too."""
    rng = np.random.default_rng(0)
    scores, y = rng.normal(size=60), rng.random(60) < 0.3
    # Copies of a positive are tied with each other, which Smooth-AP counts by half a rank each.
    count = np.where(y & (metric == "ap"), 1, rng.integers(1, 5, size=60))
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
def test_soft_losses_become_the_metric(metric):
    """At a small tau: ap exactly; the pairs in the top exactly those of the ROC curve's corner."""
    rng = np.random.default_rng(0)
    y = np.arange(400) % 4 == 0  # 300 negatives, 30 of them in the corner
    scores = rng.permutation(400) / 400 + 0.3 * y + 1e-4 * rng.random(400)
    loss = card.soft_loss(metric, card.Rows(scores[:, None], y, None), 1e-7, 0.05, 0.1)
    value = 1 - loss(torch.from_numpy(scores)).item()
    if metric == "ap":
        expected = average_precision_score(y, scores)
    elif metric == "pauc":
        bound = np.sort(scores[~y])[-30]
        expected = np.mean(scores[y][:, None] > scores[~y & (scores >= bound)])
    else:
        top = np.sort(scores)[-40]  # twice the quantile
        expected = np.mean(scores[y][:, None] > scores[~y & (scores >= top)])
    assert value == pytest.approx(expected, abs=1e-5)


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
