"""What runs off the CPU alone, run on the CPU beside what runs there: the same numbers."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

import proxy_losses as P
from proxy_losses import _numerics as num
from proxy_losses import _quantiles
from proxy_losses._checks import INTERPOLATIONS
from proxy_losses._lists import Batch, _scattered
from proxy_losses._ranks import Lists, op
from proxy_losses._ranks import steps as kernels
from proxy_losses.nn import _late
from proxy_losses.nn._queue import ONES, MemoryQueue

from .makers import PAD, every_loss, smooth

LEVELS = [(0.995,), (0.0, 1.0), (0.75, 0.25), (0.9, 0.5, 0.3, 0.75, 0.25), (0.1,)]


# -- quantiles


@pytest.mark.parametrize("interpolation", INTERPOLATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_sorted_quantiles(interpolation, dtype):
    g = torch.Generator().manual_seed(0)
    for levels, m, exact in itertools.product(LEVELS, (1, 2, 7, 101), (False, True)):
        s = torch.randn(3, m, generator=g).to(dtype)
        valid = torch.rand(3, m, generator=g) < 0.7
        valid[:, 0] = True
        s = torch.where(valid, s.round(decimals=1), 1e9)  # ties
        for mask in (None, valid):
            want = _quantiles.quantiles(s, levels, interpolation, mask, exact=exact)
            got = _quantiles.sorted_quantiles(s, levels, interpolation, mask, exact=exact)
            assert torch.equal(got, want), (levels, m, exact)


@pytest.mark.parametrize("shapes", [((3, 9), (9,)), ((9,), (3, 9)), ((2, 1, 9), (1, 3, 9))])
def test_sorted_quantiles_of_lists_that_share_a_mask_or_scores(shapes):
    s, valid = torch.randn(shapes[0]), torch.rand(shapes[1]) < 0.7
    valid[..., 0] = True
    for interpolation in INTERPOLATIONS:
        want = _quantiles.quantiles(s, (0.9, 0.2), interpolation, valid)
        got = _quantiles.sorted_quantiles(s, (0.9, 0.2), interpolation, valid, exact=False)
        assert torch.equal(got, want)


@pytest.mark.parametrize(
    ("levels", "rows", "sort"),
    [
        ((0.995,), 1_000_000, False),
        ((0.5,), 1_000_000, True),
        ((0.005,), 1_000_000, False),
        ((0.75, 0.25), 1_000_000, True),
        ((0.995, 0.99), 1_000_000, False),
        ((0.995,), 1_536, True),
    ],
)
def test_what_is_sorted_whole(levels, rows, sort):
    assert _quantiles._better_sorted(levels, rows) is sort


def test_a_list_without_valid_rows_stays_within_it():
    none = torch.zeros(2, 5, dtype=torch.bool)
    for interpolation in INTERPOLATIONS:
        out = _quantiles.sorted_quantiles(
            torch.ones(2, 5), [0.9, 0.1], interpolation, none, exact=True
        )
        assert out.shape == (2, 2)


# -- soft steps


def steps(knots: int, weighted: bool, dtype=torch.float64):
    g = torch.Generator().manual_seed(knots)
    scores = torch.randn(4, 9, generator=g, dtype=dtype).requires_grad_()
    pos = torch.rand(4, 9, generator=g) < 0.5
    pos[:, 0], pos[2] = True, False
    some = torch.tensor([[True], [True], [False], [False]])
    weight = torch.rand(4, 9, generator=g, dtype=dtype) * pos if weighted else pos
    at = torch.randn(4, knots, generator=g, dtype=dtype)
    return scores, at, weight, some


def test_triton_that_cannot_build_its_driver(monkeypatch):
    runtime = pytest.importorskip("triton.runtime")

    class Driver:
        @property
        def active(self):
            raise RuntimeError("no C compiler")

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(runtime, "driver", Driver())
    with pytest.warns(UserWarning, match="do not run on cuda:0.*RuntimeError: no C compiler"):
        assert op.kernels_of.__wrapped__(torch.device("cuda:0")) is None


@pytest.mark.parametrize("weighted", [False, True])
def test_step_means_of_lists_that_do_not_count_or_are_broken(weighted):
    scores, at, weight, some = steps(2, weighted)
    scores, at = scores.detach(), at.clone()
    scores[2], at[2], at[1, 0] = math.nan, math.nan, math.nan
    width = torch.tensor([[0.3], [0.3], [math.nan], [0.0]], dtype=torch.float64)
    scores[0, ~(weight[0] > 0)] = math.inf  # in rows without weight
    s = scores.clone().requires_grad_()
    cleaned, _ = num.clean_lists(s, weight > 0, some)
    out = num.step_means(cleaned, at, width, weight, some)
    (gradient,) = torch.autograd.grad(out.sum(), s)
    assert out.isnan().tolist() == [False, True, False, False]
    assert (out[2:] == 0).all()
    assert (gradient[2:] == 0).all()
    assert gradient[1][weight[1] > 0].isnan().all()
    assert gradient[0].isfinite().all()
    assert (gradient[0][~(weight[0] > 0)] == 0).all()


def test_one_program_looks_at_so_many_knots_of_so_many_rows(monkeypatch):
    """More are torch operations, which share them among many."""
    seen = []
    monkeypatch.setattr(kernels, "mean_above", lambda *_, **__: seen.append(True) or 1 / 0)
    scores = torch.empty(1, 5000, device="meta")
    few, many = 2, 60  # the last is under MOST_KNOTS
    assert many * 5000 > kernels.MOST_STEPS
    P.partial_auc(scores, scores > 0, 0.3, n_knots=many)
    assert not seen
    with pytest.raises(ZeroDivisionError):
        P.partial_auc(scores, scores > 0, 0.3, n_knots=few)


def test_what_kernels_are_asked_for():
    """Short lists of one process whose scores alone have a gradient, in plain eager code."""
    meta = torch.empty(4, 9, device="meta")
    lists = Lists(meta, meta > 0)
    assert kernels.served(lists, 0.3)
    assert kernels.served(lists, torch.tensor(0.3))
    assert not kernels.served(lists, torch.tensor(0.3, requires_grad=True))
    assert not kernels.served(lists._replace(weight=meta.clone().requires_grad_()), 0.3)
    assert not kernels.served(lists, 0.3, "a group")
    assert not kernels.served(Lists(*(torch.empty(4, 9) for _ in "ab")), 0.3)
    assert not kernels.served(lists._replace(valid=torch.ones(9, dtype=torch.bool)), 0.3)
    assert op.kernels_of.__wrapped__(torch.device("cuda:99")) is None  # of a FakeTensor
    for shape in ((0, 9), (4, 0), (4, kernels.LONGEST + 1)):
        meta = torch.empty(shape, device="meta")
        assert not kernels.served(Lists(meta, meta > 0), 0.3)
    seen = []
    torch.func.grad(lambda s: seen.append(kernels.served(lists._replace(scores=s))) or s.sum())(
        lists.scores
    )
    with torch.autograd.forward_ad.dual_level():
        seen.append(kernels.served(lists))
    assert seen == [False, False]


def test_one_number_of_the_host():
    like = torch.zeros(2, device="meta")
    for x in (torch.tensor(3), torch.tensor(3.0), torch.tensor(True)):
        beside = num.beside(x, like, torch.float64)
        assert (beside.device.type, beside.dtype, beside.shape) == ("meta", torch.float64, ())
    x = torch.tensor([1.0, 2.0])
    assert num.beside(x, torch.zeros(1), torch.float32) is x


# -- storing


FIELDS = ["logits", "targets", "sample_weight", "iid_mask", "query_ids", "enqueued"]


@pytest.mark.parametrize("keep", [True, False, None])
@pytest.mark.parametrize("given", [(), ("sample_weight",), ("iid_mask", "query_ids")], ids=str)
@pytest.mark.parametrize("n", [0, 3, 5, 8])
def test_stored_in_place_if_a_flag_says_so(n, given, keep):
    """A few batches, then one that the flag is about, against the pure function.

    None for no flag, where Python knows the slots.
    """
    memory, state = MemoryQueue(5, 2, PAD), P.init_queue(5, 2, ignore_index=PAD)
    g = torch.Generator().manual_seed(n)
    for size, flag in ((2, True), (4, True), (n, keep), (2, True)):
        batch = Batch(
            torch.randn(size, 2, generator=g), torch.randint(2, (size,), generator=g),
            torch.rand(size, generator=g), torch.rand(size, generator=g) < 0.5,
            torch.randint(9, (size,), generator=g),
        )  # fmt: skip
        batch = batch._replace(**{f: None for f in Batch._fields[2:] if f not in given})
        more = {f: getattr(batch, f) for f in Batch._fields[2:6]}
        where = None if keep is None else torch.tensor(flag)
        state = P.enqueue(state, batch.logits, batch.targets, **more, where=where)
        homes = [id(x) for x in memory.buffers()]
        memory.write(batch, where)
        for field in FIELDS:
            mine, wanted = getattr(memory.state, field), getattr(state, field)
            if wanted.numel():  # the module always has room
                assert torch.equal(mine, wanted), field
        assert [id(x) for x in memory.buffers()] == homes
    assert set(memory.ones()) == set(ONES) - set(given)


def test_what_is_known_of_values_moves_with_them():
    memory = MemoryQueue(3, 1, PAD).to("meta")
    assert memory.ones() == ONES
    memory = MemoryQueue(3, 1, PAD)
    memory.write(Batch(torch.zeros(1, 1), torch.zeros(1, dtype=torch.int64), torch.ones(1)))
    assert memory.double().ones() == ("iid_mask", "label_mask", "gains")


@pytest.mark.filterwarnings("ignore:.*dispersion")
@every_loss
def test_a_step_without_reads_is_the_same_step(make, monkeypatch):
    """With weights, padding, a batch that is not finite and one of padding alone."""
    one, two = make(num_classes=3, queue_size=7), make(num_classes=3, queue_size=7)
    g = torch.Generator().manual_seed(1)
    for k in range(8):
        logits, ids = torch.randn(4, 3, generator=g), torch.randint(3, (4,), generator=g)
        ids[0] = PAD
        logits[0] = math.nan
        if k == 3:
            logits[2, 1] = math.inf
        if k == 0:
            ids[:] = PAD
        given = {"sample_weight": torch.rand(4, generator=g)} if k == 5 else {}
        want = one(logits, ids, **given)
        with monkeypatch.context() as patch:
            patch.setattr(_late, "at_once", lambda x: False)
            got = two(logits, ids, **given)
        torch.testing.assert_close(got, want, equal_nan=True)
        for name, buffer in one.state_dict().items():
            torch.testing.assert_close(
                two.state_dict()[name], buffer, rtol=0, atol=0, equal_nan=True, msg=f"{k}, {name}"
            )


@pytest.mark.filterwarnings("ignore:.*max_pool_size")
def test_a_capped_pool_of_fixed_shape(monkeypatch):
    """Above the cap the same draw; below it, where nobody may look, all rows that count."""
    capped, twin, free = (smooth(queue_size=9, max_pool_size=c) for c in (6, 6, None))
    for k in range(6):
        logits, ids = torch.randn(4, 1), torch.tensor([0, 1, PAD, 1])
        want = capped(logits, ids)
        if k == 0:
            assert want == free(logits, ids)
        with monkeypatch.context() as patch:
            patch.setattr(_late, "at_once", lambda x: False)
            got = twin(logits, ids)
        torch.testing.assert_close(got, want)
    assert twin._draws == 6


@pytest.mark.filterwarnings("ignore:.*max_pool_size")
def test_a_capped_pool_in_compiled_code():
    module, twin = (P.SmoothAPLoss(3, queue_size=16, max_pool_size=7) for _ in "ab")
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    for _ in range(4):
        rows = torch.randn(10, 3), torch.randint(3, (10,))
        torch.testing.assert_close(compiled(*rows), twin(*rows))
    assert module._draws == twin._draws == 4


def test_draws_look_random_and_are_a_permutation():
    x = _scattered(torch.arange(1 << 16))
    assert x.unique().numel() == 1 << 16
    assert x.min() >= 0
    assert x.max() < 1 << 32
    # Sixteen bits of each place are fair: 2**16 throws, 5 standard deviations.
    for bit in range(32):
        assert abs(((x >> bit) & 1).double().mean() - 0.5) < 5 * 0.5 / (1 << 8)
