"""From a batch to a loss: pooling, one-vs-rest, multi-label, reduction, degenerate input."""

from __future__ import annotations

import functools

import pytest
import torch

import proxy_losses as P

from . import reference
from .metrics import EXAMPLES, lists, of_value

TIGHT = {"rtol": 1e-12, "atol": 1e-14}
LOSSES = {  # name -> (loss function, reference of a list, settings)
    name: (
        getattr(P, f"{example.metric.name}_loss"),
        functools.partial(getattr(reference, example.metric.name), **of_value(example.settings)),
        example.settings,
    )
    for name, example in EXAMPLES.items()
}
every_loss = pytest.mark.parametrize("name", LOSSES)


def batch(seed: int, n: int = 24, c: int = 3, *, multi_label: bool = False):
    g = torch.Generator().manual_seed(seed)
    logits = torch.randn(n, c, generator=g, dtype=torch.float64)
    if multi_label:
        return logits, torch.rand(n, c, generator=g) < 0.3
    targets = torch.randint(0, max(c, 2), (n,), generator=g)
    targets[torch.rand(n, generator=g) < 0.2] = -100
    return logits, targets


def rows_by_hand(logits, targets, c):
    """Score, label and validity lists of class c."""
    if targets.dim() == 2:
        return logits[:, c].tolist(), targets[:, c].tolist(), [True] * len(targets)
    binary = logits.shape[1] == 1
    pos = [t != 0 if binary else t == c for t in targets.tolist()]
    return logits[:, c].tolist(), pos, [t != -100 for t in targets.tolist()]


@every_loss
@pytest.mark.parametrize("kind", ["binary", "classes", "labels"])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("with_queue", [False, True])
def test_is_one_minus_the_metric_of_every_class(name, kind, reduction, with_queue):
    loss_fn, metric, kwargs = LOSSES[name]
    c = 1 if kind == "binary" else 3
    multi = kind == "labels"
    old, live = batch(0, 10, c, multi_label=multi), batch(1, 24, c, multi_label=multi)
    weights = [torch.rand(n, dtype=torch.float64) for n in (10, 24)]
    pool = [live[0]], [live[1]], [weights[1]]
    queue = None
    if with_queue:
        queue = P.init_queue(64, c, dtype=torch.float64)
        queue = P.enqueue(queue, *old, sample_weight=weights[0])
        # Weights are stored in float32.
        for parts, x in zip(pool, (*old, weights[0].float().double()), strict=True):
            parts.append(x)
    loss, new = loss_fn(*live, queue, 0.3, reduction=reduction, sample_weight=weights[1], **kwargs)
    logits, targets, weight = (torch.cat(p) for p in pool)
    per_class = [
        1 - metric(s, p, 0.3, v, weight.tolist())
        for s, p, v in (rows_by_hand(logits, targets, k) for k in range(c))
    ]
    expected = torch.tensor(per_class, dtype=torch.float64)
    expected = {"mean": expected.mean(), "sum": expected.sum(), "none": expected}[reduction]
    torch.testing.assert_close(loss, expected, **TIGHT)
    assert (new is None) == (queue is None)
    if new is not None:
        assert new.enqueued == 34


@every_loss
def test_only_live_rows_get_a_gradient(name):
    loss_fn, _, kwargs = LOSSES[name]
    logits, targets = batch(2)
    logits.requires_grad_()
    old = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    queue = P.enqueue(P.init_queue(8, 3, dtype=torch.float64), old, targets[:5])
    loss, new = loss_fn(logits, targets, queue, 0.3, **kwargs)
    loss.backward()
    assert logits.grad.abs().sum() > 0
    assert (logits.grad[targets == -100] == 0).all()
    assert old.grad is None
    assert not new.logits.requires_grad


@every_loss
def test_classes_that_do_not_count(name):
    loss_fn, _, kwargs = LOSSES[name]
    logits = torch.randn(12, 4, dtype=torch.float64, requires_grad=True)
    targets = torch.arange(12) % 3  # class 3 is absent
    none, _ = loss_fn(logits, targets, None, 0.3, reduction="none", **kwargs)
    assert none.isnan().tolist() == [False, False, False, True]
    mean, _ = loss_fn(logits, targets, None, 0.3, **kwargs)
    total, _ = loss_fn(logits, targets, None, 0.3, reduction="sum", **kwargs)
    torch.testing.assert_close(mean, none[:3].mean(), **TIGHT)
    torch.testing.assert_close(total, none[:3].sum(), **TIGHT)
    mean.backward()
    assert logits.grad.isfinite().all()
    assert (logits.grad[:, 3] == 0).all()


@every_loss
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_padding_alone_is_zero_and_stores_nothing(name, reduction):
    loss_fn, _, kwargs = LOSSES[name]
    logits = torch.full((6, 3), torch.nan, requires_grad=True)
    queue = P.init_queue(8, 3)
    loss, new = loss_fn(logits, torch.full((6,), -100), queue, 0.3, reduction=reduction, **kwargs)
    assert (loss == 0).all()
    assert loss.shape == ((3,) if reduction == "none" else ())
    loss.sum().backward()
    assert (logits.grad == 0).all()
    for before, after in zip(queue, new, strict=True):
        assert torch.equal(before, after)


def test_padded_rows_take_slots():
    logits, targets = torch.randn(4, 2), torch.tensor([0, -100, 1, 0])
    _, queue = P.smooth_ap_loss(logits, targets, P.init_queue(8, 2), 0.3)
    assert queue.enqueued == 4
    assert P.queue_rows(queue)[2].tolist() == [True, False, True, True] + [False] * 4


@pytest.mark.parametrize("n", [4, 5, 9])
def test_a_batch_that_fills_the_queue_starts_at_slot_zero(n):
    logits, targets = torch.randn(n, 2), torch.arange(n) % 2
    queue = P.enqueue(P.init_queue(4, 2), torch.randn(3, 2), torch.zeros(3, dtype=torch.int64))
    queue = P.enqueue(queue, logits, targets)
    assert torch.equal(queue.logits, logits[-4:])
    assert torch.equal(queue.targets, targets[-4:])
    assert queue.enqueued % 4 == 0


def test_a_stored_weight_acts_on_later_calls():
    logits, targets = batch(3, 12, 1)
    targets = targets.clamp(min=0)
    silent = P.enqueue(
        P.init_queue(12, 1, dtype=torch.float64), logits, targets, sample_weight=torch.zeros(12)
    )
    heard = P.enqueue(P.init_queue(12, 1, dtype=torch.float64), logits, targets)
    live = batch(4, 12, 1)[0], targets
    a, _ = P.smooth_ap_loss(*live, silent, 0.3)
    b, _ = P.smooth_ap_loss(*live, heard, 0.3)
    assert a != b


def test_binary_counts_stray_ids_as_positive():
    logits = torch.randn(5, 1)
    a, _ = P.smooth_ap_loss(logits, torch.tensor([0, 1, 0, 7, -1]), None, 0.3)
    b, _ = P.smooth_ap_loss(logits, torch.tensor([0, 1, 0, 1, 1]), None, 0.3)
    assert a == b


def test_queue_switches_to_labels_at_the_first_such_batch():
    logits, labels = batch(5, multi_label=True)
    made = P.init_queue(30, 3, dtype=torch.float64, multi_label=True)
    plain = P.init_queue(30, 3, dtype=torch.float64)
    for seed in (5, 6):
        live = batch(seed, multi_label=True)
        a, made = P.smooth_ap_loss(*live, made, 0.3)
        b, plain = P.smooth_ap_loss(*live, plain, 0.3)
        assert a == b
    assert torch.equal(made.targets, plain.targets)
    with pytest.raises(ValueError, match="stores multi-label targets"):
        P.smooth_ap_loss(logits, labels.long().argmax(1), made, 0.3)


def test_dense_labels_equal_class_ids():
    logits, targets = batch(7)
    targets = targets.clamp(min=0)
    one_hot = torch.nn.functional.one_hot(targets, 3).bool()
    a, _ = P.smooth_ap_loss(logits, targets, None, 0.3)
    b, _ = P.smooth_ap_loss(logits, one_hot, None, 0.3)
    assert a == b


@every_loss
def test_vmap_over_states(name):
    """Two runs at once: states stack because every field is a tensor."""
    loss_fn, _, kwargs = LOSSES[name]
    queues = [P.init_queue(30, 1, dtype=torch.float64) for _ in range(2)]
    stacked = P.QueueState(*(torch.stack(f) for f in zip(*queues, strict=True)))
    step = torch.func.vmap(lambda x, y, q: loss_fn(x, y, q, 0.3, **kwargs))
    for seed in range(3):
        scores, pos = lists(seed, 2, 12)
        logits, targets = scores[..., None], pos.long()
        losses, stacked = step(logits, targets, stacked)
        for k in range(2):
            one, queues[k] = loss_fn(logits[k], targets[k], queues[k], 0.3, **kwargs)
            assert one > 0
            torch.testing.assert_close(losses[k], one, **TIGHT)
    for field, a, b in zip(P.QueueState._fields, *queues, strict=True):
        assert torch.equal(getattr(stacked, field), torch.stack([a, b]))


@every_loss
@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        ({"logits": torch.randn(6)}, ValueError, r"logits must be \[N, C\], got \[6\]"),
        ({"logits": torch.ones(6, 3, dtype=torch.int64)}, TypeError, "logits must be a floating"),
        ({"targets": torch.zeros(5, dtype=torch.int64)}, ValueError, r"targets must be .*\[N=6\]"),
        ({"targets": torch.zeros(6, 2, dtype=torch.int64)}, ValueError, "targets must be"),
        ({"targets": torch.zeros(6)}, TypeError, "targets must be integer class ids"),
        ({"targets": [0] * 6}, TypeError, "targets must be a tensor, got list"),
        ({"reduction": "max"}, ValueError, "reduction must be one of"),
        ({"sample_weight": torch.ones(5)}, ValueError, "sample_weight must match logits dim-0"),
        ({"queue": P.init_queue(4, 2)}, ValueError, "num_classes=2"),
        ({"tau": 0}, ValueError, "tau must be positive"),
    ],
)
def test_bad_arguments(name, change, error, says):
    args = {
        "logits": torch.randn(6, 3),
        "targets": torch.arange(6) % 3,
        "queue": P.init_queue(4, 3),
        "tau": 0.1,
    } | change
    before = [f.clone() for f in args["queue"]]
    with pytest.raises(error, match=says):
        LOSSES[name][0](**args)
    for a, b in zip(before, args["queue"], strict=True):
        assert torch.equal(a, b)
