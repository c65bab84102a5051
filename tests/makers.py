"""The one list of loss modules that the module tests run over, and batches for them."""

from __future__ import annotations

import functools
import warnings

import pytest
import torch

import proxy_losses as P

PAD, QUANTILE = -100, 0.3
COMMON = {"num_classes": 1, "queue_size": 8, "temperature": 0.25}
# "linear": quartiles of two negatives already differ, so batches may be small.
BAND = {"beta": 0.5, "quantile_interpolation": "linear"}


def smooth(**kwargs):
    return P.SmoothAPLoss(**{**COMMON, **kwargs})


def recall(**kwargs):
    return P.RecallAtQuantileLoss(**{**COMMON, "quantile": QUANTILE, **kwargs})


def pauc(**kwargs):
    return P.PAUCAtBudgetLoss(**{**COMMON, **BAND, **kwargs})


MAKERS = [smooth, recall, pauc]
FUNCTIONS = {  # what each module is a memory for
    smooth: P.smooth_ap_loss,
    recall: functools.partial(P.recall_at_quantile_loss, quantile=QUANTILE),
    pauc: functools.partial(P.partial_auc_loss, beta=0.5, interpolation="linear"),
}
every_loss = pytest.mark.parametrize("make", MAKERS)


def batch(seed: int, n: int = 5, classes: int = 1):
    """Logits that want a gradient, and targets of all classes; row 3 is padding."""
    torch.manual_seed(seed)
    logits = torch.randn(n, classes, requires_grad=True)
    targets = (torch.arange(n) % max(classes, 2))[torch.randperm(n)]
    return logits, torch.where(torch.arange(n) == 3, PAD, targets)


def warned(call) -> list[str]:
    """Texts of the warnings of a call, all of them attributed to the file of the call."""
    with warnings.catch_warnings(record=True) as log:
        warnings.simplefilter("always")
        call()
    assert all(w.category is UserWarning and w.filename == call.__code__.co_filename for w in log)
    return [str(w.message) for w in log]
