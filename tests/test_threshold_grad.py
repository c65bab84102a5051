"""Thresholds that move with the scores: the gradient of the soft quantile, the value as it is."""

from __future__ import annotations

import functools
import warnings

import pytest
import torch

import proxy_losses as P
from proxy_losses import _numerics as num
from proxy_losses._checks import INTERPOLATIONS

from .metrics import lists
from .reference import held_recall

recall = functools.partial(P.recall_at_quantile, quantile=0.3)
trapezoid = functools.partial(P.partial_auc, beta=0.5)
FUNCTIONS = {"recall": recall, "trapezoid": trapezoid}
every_function = pytest.mark.parametrize("fn", FUNCTIONS.values(), ids=FUNCTIONS)
STEP = 1e-4


def slope_of(value, scores: torch.Tensor) -> torch.Tensor:
    """Central differences of fourth order, of a function of a list."""
    found, scores = [], scores.tolist()
    for j in range(len(scores)):

        def at(d: float, j: int = j) -> float:
            return value([s + d * (k == j) for k, s in enumerate(scores)])

        found.append((8 * (at(STEP) - at(-STEP)) - at(2 * STEP) + at(-2 * STEP)) / (12 * STEP))
    return torch.tensor(found, dtype=torch.float64)


def gradient(fn, scores, pos, tau, **more) -> torch.Tensor:
    s = scores.clone().requires_grad_()
    value = fn(s, pos, tau, **more)
    (found,) = torch.autograd.grad(value.sum(), s)
    return found


# Of order STEP^4 f^(5) and, with 1e-16 rounding in a value, 1e-12: far below.
CLOSE = {"rtol": 1e-7, "atol": 1e-9}


@pytest.mark.parametrize("tau", [0.1, 0.5, 3.0])
@pytest.mark.parametrize("interpolation", INTERPOLATIONS)
def test_recall_has_the_gradient_of_the_soft_quantile(tau, interpolation):
    scores, pos = lists(0, 14)
    valid = torch.arange(14) != 4
    weight = torch.rand(14, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    theta = torch.quantile(scores[valid], 0.7, interpolation=interpolation).item()
    among = valid.nonzero()[:, 0].tolist()

    def value(s):
        return held_recall(s, (pos & valid).tolist(), tau, theta, scores.tolist(), among, weight)

    how = {"interpolation": interpolation, "valid_mask": valid, "sample_weight": weight}
    found = gradient(recall, scores, pos, tau, **how)
    torch.testing.assert_close(found, slope_of(value, scores), **CLOSE)
    assert found[4] == 0
    assert (found[~pos & valid] < 0).all()


@pytest.mark.parametrize("basis", ["fpr", "population"])
@pytest.mark.parametrize("scale", ["iqr", "band"])
@pytest.mark.parametrize("numerator", ["pool", "live"])
def test_trapezoid_has_the_gradient_of_soft_quantiles(basis, scale, numerator):
    """With "live" of those of the live reference rows; the spread is a constant."""
    scores, pos = lists(2, 16)
    iid, live = torch.arange(16) != 5, torch.arange(16) % 3 > 0
    reference = iid if basis == "population" else iid & ~pos
    top, low, high = (
        torch.quantile(scores[reference], q, interpolation="higher").item()
        for q in (0.5, 0.25, 0.75)
    )
    first = scores[reference].max().item()
    spread = high - low if scale == "iqr" else first - top
    counted, moves = pos, reference
    if numerator == "live":
        counted, moves = pos & live, reference & live
    among = moves.nonzero()[:, 0].tolist()

    def value(s):
        each = [
            held_recall(s, counted.tolist(), 0.3 * spread, t, scores.tolist(), among)
            for t in (first, top)
        ]
        return sum(each) / 2

    how = {"budget_basis": basis, "tau_scale": scale, "pos_numerator": numerator}
    found = gradient(trapezoid, scores, pos, 0.3, iid_mask=iid, live_mask=live, **how)
    torch.testing.assert_close(found, slope_of(value, scores), **CLOSE)
    assert (found[~(moves | counted)] == 0).all()
    assert found.sum().abs() < 1e-15  # of live rows too


@every_function
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_values_are_the_same_to_the_bit_and_shifts_change_nothing(fn, dtype):
    scores, pos = lists(3, 4, 300, dtype=dtype)
    valid = torch.rand(300, generator=torch.Generator().manual_seed(4)) < 0.8
    for tau in (1e-6, 1e-3, 0.3, 10.0, torch.tensor([0.1, 0.2, 0.3, 0.4])):
        s = scores.clone().requires_grad_()
        value = fn(s, pos, tau, valid_mask=valid)
        assert torch.equal(value, fn(s, pos, tau, valid_mask=valid, threshold_grad="none"))
        with torch.no_grad():
            assert torch.equal(value, fn(s, pos, tau, valid_mask=valid))
        (found,) = torch.autograd.grad(value.sum(), s)
        pull = gradient(fn, scores, pos, tau, valid_mask=valid, threshold_grad="none")
        bound = 300 * torch.finfo(dtype).eps * pull.abs().sum(-1)
        assert (found.sum(-1).abs() <= bound).all()


@every_function
def test_a_threshold_that_is_a_constant_moves_positives_alone(fn):
    scores, pos = lists(5, 60)
    found = gradient(fn, scores, pos, 0.3, threshold_grad="none")
    assert torch.equal(found != 0, pos)


@every_function
def test_the_gradient_of_tau_takes_thresholds_as_they_are(fn):
    scores, pos = lists(6, 40)
    found = []
    for how in ("implicit", "none"):
        tau = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
        value = fn(scores.clone().requires_grad_(), pos, tau, threshold_grad=how)
        found += torch.autograd.grad(value, tau)
    torch.testing.assert_close(*found, rtol=1e-14, atol=0)


@pytest.mark.parametrize("tau", [1e-20, 1e-8])
def test_no_row_is_near(tau):
    """Between two rows far from both: the nearest ones move the threshold."""
    scores = torch.tensor([0.0, 1.0, 3.0, 1e30], requires_grad=True)
    among = torch.tensor([True, True, True, False])
    theta = torch.tensor([2.25])
    found = num.with_implicit_grad(theta, scores, among, tau, torch.tensor([True]))
    assert torch.equal(found, theta)
    found.sum().backward()
    assert scores.grad.tolist() == [0, 0, 1, 0]


def test_overflow_is_no_number_lost():
    scores = torch.tensor([-3e38, 3e38, 1e38], requires_grad=True)
    every = torch.ones(3, dtype=torch.bool)
    found = num.with_implicit_grad(
        torch.tensor([0.0, 3e38]), scores, every, 1e-3, torch.tensor([True])
    )
    assert found.tolist() == [0.0, scores[1].item()]
    found[1].backward()
    assert scores.grad.tolist() == [0, 1, 0]


@every_function
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_lists_that_do_not_count_and_lists_that_are_broken(fn, bad):
    scores, pos = lists(7, 4, 20)
    pos[0] = False  # no positive
    valid = torch.ones(4, 20, dtype=torch.bool)
    valid[1] = False  # nothing
    scores[:2, 3] = bad
    scores[2, 3] = bad
    found = gradient(fn, scores, pos, 0.3, valid_mask=valid)
    assert (found[:2] == 0).all()
    assert found[2].isnan().any()
    assert found[3].isfinite().all()
    assert (found[3] != 0).any()


@every_function
def test_rows_without_gradient_take_part(fn):
    """As the rows of a queue do: the others have the gradient that they have in the whole."""
    scores, pos = lists(8, 60)
    whole = gradient(fn, scores, pos, 0.3)
    batch = scores[:20].clone().requires_grad_()
    value = fn(torch.cat([batch, scores[20:]]), pos, 0.3)
    (part,) = torch.autograd.grad(value, batch)
    torch.testing.assert_close(part, whole[:20], rtol=1e-13, atol=1e-16)


def test_loss_functions_default_to_implicit_and_published_modules_to_none():
    torch.manual_seed(0)
    logits, ids = torch.randn(80, 1, requires_grad=True), (torch.arange(80) < 20).long()
    for cls, function, own in (
        (P.RecallAtQuantileLoss, P.recall_at_quantile_loss, {"quantile": 0.2}),
        (P.PAUCAtBudgetLoss, P.partial_auc_loss, {"beta": 0.2}),
    ):
        grads = {}
        for how in ({}, {"threshold_grad": "none"}, {"threshold_grad": "implicit"}):
            with warnings.catch_warnings():
                warnings.simplefilter("error")  # nobody is told to switch
                module = cls(1, queue_size=0, temperature=0.1, **how)
                loss = module(logits, ids)
            (by_module,) = torch.autograd.grad(loss, logits)
            loss, _ = function(logits, ids, None, 0.1, **own, **how)
            grads[how.get("threshold_grad"), "module"] = by_module
            grads[how.get("threshold_grad"), "function"] = torch.autograd.grad(loss, logits)[0]
        assert torch.equal(grads[None, "module"], grads["none", "module"])
        assert not torch.equal(grads[None, "module"], grads["implicit", "module"])
        assert torch.equal(grads[None, "function"], grads["implicit", "function"])
        assert (grads["none", "module"][20:] == 0).all()


def test_queries_of_a_module_are_pushed_back_one_by_one():
    torch.manual_seed(1)
    logits, ids = torch.randn(60, 1, requires_grad=True), (torch.arange(60) % 5 == 0).long()
    query = torch.arange(60) % 3
    module = P.RecallAtQuantileLoss(1, 0.3, queue_size=0, threshold_grad="implicit")
    module.temperature = 0.2
    (found,) = torch.autograd.grad(module(logits, ids, query_ids=query), logits)
    each = torch.stack([found[query == q].sum() for q in range(3)])
    assert each.abs().max() < 1e-6
    assert found.abs().max() > 1e-3


@every_function
def test_a_wrong_choice(fn):
    with pytest.raises(ValueError, match="threshold_grad must be one of"):
        fn(torch.randn(5), torch.ones(5).bool(), 0.1, threshold_grad="exact")
    for cls in (P.RecallAtQuantileLoss, P.PAUCAtBudgetLoss):
        with pytest.raises(ValueError, match="threshold_grad must be one of"):
            cls(1, threshold_grad=None)
