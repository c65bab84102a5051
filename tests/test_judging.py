"""What evaluation with scikit-learn and torchmetrics has to do with the values here."""

from __future__ import annotations

import pytest
import torch
from sklearn.metrics import average_precision_score, roc_auc_score

import proxy_losses as P

BUDGET = 0.005


@pytest.fixture(scope="module")
def ranked():
    """Float64 scores and labels; BUDGET times the 10,000 negatives is whole."""
    draw = torch.Generator().manual_seed(0)
    y = torch.arange(10_100) < 100
    return torch.randn(10_100, generator=draw, dtype=torch.float64) + 2.0 * y, y


def unstandardised(area: float, budget: float) -> float:
    """From McClish's standardised area to the area over its budget."""
    return budget / 2 + (2 * area - 1) * (1 - budget / 2)


def test_partial_auc_is_the_area_that_sklearn_standardises(ranked):
    scores, y = ranked
    area = unstandardised(roc_auc_score(y, scores, max_fpr=BUDGET), BUDGET)
    value = P.partial_auc(scores, y, 1e-12, beta=BUDGET, surrogate="pairwise")
    assert value.item() == pytest.approx(area, rel=1e-9)
    assert 0.05 < area < 0.95


@pytest.mark.parametrize(("standardised", "area"), [(1.0, 1.0), (0.5, BUDGET / 2)])
def test_perfect_and_random_rankings(standardised, area):
    assert unstandardised(standardised, BUDGET) == pytest.approx(area)


def test_smooth_ap_is_average_precision(ranked):
    scores, y = ranked
    exact = average_precision_score(y, scores)
    assert P.smooth_ap(scores, y, 1e-12).item() == pytest.approx(exact, rel=1e-9)


def test_torchmetrics_wants_probabilities(ranked):
    classification = pytest.importorskip("torchmetrics.classification")
    scores, y = ranked
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(0))

    def value(scores):
        metric = classification.BinaryAveragePrecision()
        for rows in order.split(4):
            metric.update(scores[rows], y[rows].long())
        return metric.compute().item()

    exact = average_precision_score(y, scores)
    assert value(scores.sigmoid()) == pytest.approx(exact, rel=1e-6)  # it answers in float32
    # Of logits it takes the sigmoid in those batches alone that leave [0, 1].
    assert abs(value(scores) - exact) > 1e-3


def test_torchmetrics_standardises_too(ranked):
    classification = pytest.importorskip("torchmetrics.classification")
    scores, y = ranked
    metric = classification.BinaryAUROC(max_fpr=BUDGET)
    metric.update(scores.sigmoid(), y.long())
    expected = roc_auc_score(y, scores, max_fpr=BUDGET)
    assert metric.compute().item() == pytest.approx(expected, rel=1e-5)  # it sums in float32
