"""Modules with query ids: what they remember, report, warn of and draw."""

from __future__ import annotations

import copy
import re
from collections.abc import Sequence

import numpy as np
import pytest
import torch

import proxy_losses as P
from proxy_losses import _lists

from .makers import FUNCTIONS, PAD, every_loss, pauc, same_rows, warned
from .test_query_loss import SHAPE, queries

every_shape = pytest.mark.parametrize("shape", [None, SHAPE])


def given(seed: int, n: int = 25):
    logits, targets, weight, ids = queries(seed, n)
    return (logits.float(), targets), {"sample_weight": weight, "query_ids": ids}


@every_loss
@every_shape
def test_is_the_functional_form_with_a_memory(make, shape):
    module = make(num_classes=3, queue_size=60, query_shape=shape)
    queue = P.init_queue(60, 3)
    for seed in range(6):
        rows, extras = given(seed)
        if seed == 2:
            del extras["query_ids"]
        loss = module(*rows, **extras)
        want, queue = FUNCTIONS[make](*rows, queue, 0.25, query_shape=shape, **extras)
        assert torch.equal(loss, want)
        assert same_rows(module, queue)


@every_loss
def test_checkpoints_carry_ids(make):
    module, bare = (make(num_classes=3, queue_size=60) for _ in "ab")
    for seed in range(3):
        rows, extras = given(seed)
        module(*rows, **extras)
    saved, unused = copy.deepcopy(module.state_dict()), bare.state_dict()
    fresh = make(num_classes=3, queue_size=60)
    fresh.load_state_dict(saved)
    rows, extras = given(3)
    assert torch.equal(fresh(*rows, **extras), module(*rows, **extras))
    assert all(map(torch.equal, fresh._queue.state, module._queue.state))
    assert fresh._queue.state.query_ids.unique().numel() > 3
    # And the other way round, from before there were ids.
    module.load_state_dict(copy.deepcopy(unused))
    assert all(map(torch.equal, module._queue.state, bare._queue.state))
    # A checkpoint of an earlier release has no such field.
    del saved["_queue._q_query_ids"]
    fresh.load_state_dict(saved)
    alone = make(num_classes=3, queue_size=60)
    assert torch.equal(fresh(*rows, **extras), alone(*rows, **extras))


@every_loss
def test_reset_and_rows_stored_by_hand(make):
    module, fresh = (make(num_classes=3, queue_size=60) for _ in "ab")
    rows, extras = given(0)
    alone = fresh(*rows, **extras)
    module(*rows, **extras)
    module.reset_queue()
    iid, weight = torch.rand(25) < 0.5, torch.rand(25)
    module._queue.enqueue(*rows, iid, weight)  # without ids
    state = module._queue.state
    assert torch.equal(state.iid_mask[:25], iid)
    assert torch.equal(state.sample_weight[:25], weight)
    assert state.enqueued == 25
    assert torch.equal(module.eval()(*rows, **extras), alone)


@every_loss
def test_a_bad_batch_raises_and_is_not_stored(make):
    module, logits, targets = make(num_classes=2), torch.zeros(4, 2), torch.tensor([0, 1, 0, 1])
    for query_ids, error in (
        (torch.zeros(3, dtype=torch.int64), ValueError),
        (torch.zeros(4), TypeError),
        ([0, 0, 1, 1], TypeError),
    ):
        with pytest.raises(error, match="query_ids must"):
            module(logits, targets, query_ids=query_ids)
    assert module._queue.state.enqueued == 0
    for shape in (3, (1, 2, 3), (0, 1), (1, "2")):
        with pytest.raises((ValueError, TypeError), match="query_shape"):
            make(query_shape=shape)


@pytest.mark.filterwarnings("ignore:.*dispersion")  # a query with one negative of a class
@every_loss
@every_shape
def test_diagnostics_are_means_and_sums_over_queries(make, shape):
    logits, targets, _, ids = queries(1)
    valid = targets != PAD
    module = make(num_classes=3, queue_size=0, query_shape=shape, reduction="none")
    _, per_class, _, stats = module(logits, targets, None, True, True, query_ids=ids)
    each = []
    for q in ids[valid].unique():
        rows = valid & (ids == q)
        single = make(num_classes=3, queue_size=0)
        _, losses, _, parts = single(logits[rows], targets[rows], None, True, True)
        each.append({"per_class": losses, **parts})
    assert torch.stack([x["per_class"] for x in each]).isnan().any()
    for name, found in {"per_class": per_class, **stats}.items():
        parts = torch.stack([x[name] for x in each])
        want = parts.nanmean(0) if parts.is_floating_point() else parts.sum(0)
        torch.testing.assert_close(found, want, rtol=1e-12, atol=1e-14)


def test_a_class_left_out_of_some_queries_is_no_news():
    logits = torch.tensor([3.0, 0.0, 1.0, 2.0, 1.0, 0.0])[:, None]
    targets, ids = torch.tensor([1, 0, 0, 0, 1, 0]), torch.tensor([0, 0, 0, 0, 1, 1])
    module, out = pauc(queue_size=0), []
    assert warned(lambda: out.append(module(logits, targets, True, query_ids=ids))) == []
    assert out[0][2].tolist() == [True]
    # Query 1 has one negative: no spread, and no other query to tell of the class.
    alone = logits[4:], targets[4:]
    (text,) = warned(lambda: out.append(module(*alone, True, query_ids=ids[4:])))
    assert "dispersion" in text
    assert out[1][2].tolist() == [False]


@pytest.mark.filterwarnings("ignore:.*max_pool_size")
@every_loss
def test_a_capped_pool_keeps_its_ids(make):
    rows, extras = given(0, 60)
    module = make(num_classes=3, queue_size=0, max_pool_size=30)
    pool = _lists.make_pool(
        _lists.Batch(*rows, extras["sample_weight"], None, extras["query_ids"]), None
    )
    drawn = _lists.subsample_pool(pool, 30, seed=0)
    lists = drawn.lists
    assert lists.valid.sum() == 30
    ids = torch.where(lists.pos.any(0), lists.pos.int().argmax(0), PAD)
    want, _ = FUNCTIONS[make](
        lists.scores.T,
        ids,
        None,
        0.25,
        sample_weight=lists.weight,
        query_ids=drawn.query_ids,
    )
    loss = module(*rows, **extras)
    torch.testing.assert_close(loss, want)
    assert loss != make(num_classes=3, queue_size=0)(*rows, **extras)


class Pair(Sequence):
    """As a configuration library holds a list."""

    def __init__(self, *items):
        self.items = items

    def __getitem__(self, index):
        return self.items[index]

    def __len__(self):
        return len(self.items)


@pytest.mark.parametrize(
    "pair",
    [(4, 8), [4, 8], torch.Size((4, 8)), torch.tensor([4, 8]), np.array([4, 8]),
     (np.int64(4), np.int32(8)), Pair(4, 8)],
    ids=lambda pair: type(pair).__name__,
)  # fmt: skip
def test_any_pair_is_a_shape(pair):
    module = P.SmoothAPLoss(1, queue_size=8, query_shape=pair)
    assert module.query_shape == (4, 8)
    assert [type(n) for n in (module.query_shape, *module.query_shape)] == [tuple, int, int]
    x, y = torch.tensor([[0.3], [0.1], [0.2]]), torch.tensor([0, 1, 1])
    ids = torch.tensor([0, 0, 1])
    found = P.smooth_ap_loss(x, y, None, 0.1, query_ids=ids, query_shape=pair)[0]
    assert found == P.smooth_ap_loss(x, y, None, 0.1, query_ids=ids)[0]


@pytest.mark.parametrize("shape", [(1, 2, 3), "48", b"48", {4, 8}, {4: 8, 5: 9}, [], 4])
def test_what_is_no_pair_is_refused(shape):
    message = f"query_shape must be None or a pair .*, got {re.escape(repr(shape))}"
    with pytest.raises(ValueError, match=message):
        P.SmoothAPLoss(1, query_shape=shape)
