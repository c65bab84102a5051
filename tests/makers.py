"""The loss modules that the module tests run over, one for each metric, and batches for them."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch

import proxy_losses as P
from proxy_losses._metrics import METRICS, Example, Metric
from proxy_losses._queue import NO_QUERY

PAD, QUANTILE = -100, 0.3
COMMON = {"num_classes": 1, "queue_size": 8, "temperature": 0.25}
# "linear": quartiles of two negatives already differ, so batches may be small.
SETTINGS = {  # others: the first example
    "partial_auc": {"beta": 0.5, "interpolation": "linear", "threshold_grad": "implicit"}
}


def maker(metric: Metric) -> Callable[..., Any]:
    """Makes a small module of the metric's loss."""
    example = Example("", metric, SETTINGS.get(metric.name, metric.examples[0]))

    def make(**kwargs):
        return getattr(P, metric.module)(**{**COMMON, **example.arguments, **kwargs})

    make.__name__ = metric.name
    make.function = functools.partial(getattr(P, f"{metric.name}_loss"), **example.settings)
    return make


MAKERS = [maker(metric) for metric in METRICS]
smooth, recall, pauc = MAKERS[:3]
assert recall().quantile == QUANTILE
FUNCTIONS = {make: make.function for make in MAKERS}  # what each module is a memory for
every_loss = pytest.mark.parametrize("make", MAKERS)
# Ranks, thresholds, gains: for what is compiled and the same in every class.
some_losses = pytest.mark.parametrize(
    "make", [m for m in MAKERS if m.__name__ in ("smooth_ap", "partial_auc", "smooth_ndcg")]
)


def batch(seed: int, n: int = 5, classes: int = 1):
    """Logits that want a gradient, and targets of all classes; row 3 is padding."""
    torch.manual_seed(seed)
    logits = torch.randn(n, classes, requires_grad=True)
    targets = (torch.arange(n) % max(classes, 2))[torch.randperm(n)]
    return logits, torch.where(torch.arange(n) == 3, PAD, targets)


def same_rows(module, queue: P.QueueState) -> bool:
    """Whether a module's queue is this state, in which room for ids is made when some come."""
    state = (getattr(module, "_queue", None) or module).state
    if not queue.query_ids.numel():
        assert (state.query_ids == NO_QUERY).all()
        state = state._replace(query_ids=queue.query_ids)
    if not queue.label_mask.numel():
        assert state.label_mask.all()
        state = state._replace(label_mask=queue.label_mask)
    if not queue.gains.numel():
        assert (state.gains == 1).all()
        state = state._replace(gains=queue.gains)
    return all(map(torch.equal, state, queue))


def warned(call) -> list[str]:
    """Texts of the warnings of a call, all of them attributed to the file of the call."""
    with warnings.catch_warnings(record=True) as log:
        warnings.simplefilter("always")
        call()
    assert all(w.category is UserWarning and w.filename == call.__code__.co_filename for w in log)
    return [str(w.message) for w in log]
