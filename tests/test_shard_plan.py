"""What shards send, as a pure function of sizes; and groups of one."""

import itertools
import math

import pytest
import torch
import torch.distributed as dist

import proxy_losses as P
from proxy_losses import _quantiles
from proxy_losses._ranks.census import Census
from proxy_losses._ranks.plan import Wire, mean_pool, payload, share
from proxy_losses.distributed import group_name

from . import shards


def pool_of(ranks, *, lists=1, row_bytes=(4, 1)):
    return mean_pool(
        ranks, lists, lists * max(ranks) // 20, grad=True, weighted=False, row_bytes=row_bytes
    )


def test_moments_cost_kilobytes_whatever_the_rows():
    sent = []
    for rows in (10**5, 10**6, 10**7, 10**9):
        pool = pool_of([rows] * 64)
        taken = share(pool, [240.0], 1e-6)
        assert taken.how == "direct"
        sent.append(payload(pool, taken).reduced)
        assert payload(pool, taken).gathered == 0
    assert max(sent) < 100_000
    # Wider cells and fewer nodes for more rows: no more than a factor of a few.
    assert max(sent) < 4 * min(sent)


def test_few_rows_are_gathered_and_heavy_tails_keep_their_occupied_cells():
    assert share(pool_of([20, 0]), [240.0], 1e-6).how == "gather"
    pool = pool_of([10**7] * 8)
    assert share(pool, [1e7], 1e-6).how == "count"
    assert share(pool, [1e7], 1e-6, occupied=2_000, most_cells=1_500).how == "occupied"
    # Every row in a cell of its own.
    scattered = share(pool, [1e9], 1e-6, occupied=8 * 10**7, most_cells=10**7)
    assert scattered.how == "gather"


def test_the_same_numbers_give_the_same_answer_and_the_cheapest_is_taken():
    for rows, span, lists in itertools.product((10, 10**4, 10**7), (0.0, 50.0, 1e6), (1, 100)):
        pool = pool_of([rows, 3 * rows], lists=lists)
        taken = share(pool, [span] * lists, 1e-6)
        assert taken == share(pool, [span] * lists, 1e-6)
        forced = share(pool, [span] * lists, 1e-6, method="dense")
        assert forced.how == "gather"
        assert taken.cost <= forced.cost
        assert share(pool, [span] * lists, 1e-6, method="grid").how in ("direct", "count")


def test_a_range_beyond_counting_is_gathered():
    pool = pool_of([10**6] * 2)
    for span in (2.0**51, math.inf):
        assert share(pool, [span], 1e-6).how == "gather"
        with pytest.raises(OverflowError, match="too large for the grid"):
            share(pool, [span], 1e-6, method="grid")
    census = Census([-1e308], [1e308], [0.0], [1.0], [False], [], (2,))
    assert census.spans == [math.inf]


def test_a_ring_moves_each_buffer_about_twice():
    wire = Wire(1000, 10, 2)
    assert wire.sent(1) == 0.0
    assert wire.sent(4) == 2 * 0.75 * 1000 + 3 * 10


@pytest.mark.parametrize("wanted", [1, 2, 500, 10**6])
@pytest.mark.parametrize("width", [32, 64])
def test_digits_cover_the_key_once(wanted, width):
    digits = _quantiles.digits(wanted, width)
    assert sum(bits for _, bits in digits) == width
    assert [shift for shift, _ in digits] == [
        width - sum(bits for _, bits in digits[: k + 1]) for k in range(len(digits))
    ]
    assert max(bits for _, bits in digits) <= _quantiles.MAX_BITS


@pytest.mark.parametrize("lists", [1, 700])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_quantiles_send_tables_whatever_the_rows(monkeypatch, lists, dtype):
    sent = []
    monkeypatch.setattr(_quantiles, "reduce_now", lambda x, *_: sent.append(x.numel() * 8) or x)
    levels = torch.tensor([0.1, 0.9])
    for rows in (3, 200):
        sent.clear()
        scores = shards.make_pool(rows, lists=lists, dtype=dtype).scores
        found = _quantiles.radix_quantiles(scores, None, levels, "linear", False, "a group")
        assert torch.equal(found, torch.quantile(scores, levels.to(dtype), dim=-1).T)
        # Two ranks for each of two levels.
        assert sum(sent) == _quantiles.payload(lists, 4, torch.finfo(dtype).bits)
        assert max(sent) <= max(_quantiles.TABLE_BYTES, (8 * 4 * lists) << _quantiles.MIN_BITS)


@pytest.fixture
def group_of_one(tmp_path):
    dist.init_process_group("gloo", f"file://{tmp_path}/meet", rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()


@pytest.mark.parametrize("name", shards.ASKED)
def test_a_group_of_one_is_the_plain_call(group_of_one, name):
    pool = shards.make_pool(40)
    assert group_name(group_of_one) == ""
    with shards.Counted() as counted:
        value, grads = shards.value_and_grads(name, pool, (40,), 0, group=group_of_one)
    assert counted.messages == 0
    alone, alone_grads = shards.value_and_grads(name, pool)
    assert torch.equal(value, alone)
    assert all(map(torch.equal, grads, alone_grads))


def test_tensors_gathered_together_share_their_rows(group_of_one):
    x, y = torch.zeros(3, 2), torch.ones(3)
    assert all(a is b for a, b in zip(P.all_gather_no_grad(x, y), (x, y), strict=True))
    with pytest.raises(ValueError, match=r"share dim 0, got \[3, 2\]"):
        P.all_gather_with_grad(x, y[:2])
