"""Labels that are unknown: every class is ranked over the rows whose label it knows."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch.func import grad_and_value, vmap

import proxy_losses as P

from . import processes
from .compiling import compile_fresh
from .makers import FUNCTIONS, PAD, every_loss, smooth, some_losses, warned
from .test_step import LOSSES, TIGHT, rows_by_hand
from .test_step import every_loss as every_function

TAU = 0.3
every_kind = pytest.mark.parametrize("kind", ["binary", "classes", "labels"])
# A class of few known rows may have a single negative.
pytestmark = pytest.mark.filterwarnings("ignore:.*dispersion")


def batch(seed: int, n: int = 30, kind: str = "labels", junk: float = math.nan):
    """Logits with junk where the label is unknown, targets, weights, which labels are known."""
    g = torch.Generator().manual_seed(seed)
    c = 1 if kind == "binary" else 3
    logits = torch.randn(n, c, generator=g, dtype=torch.float64)
    known = torch.rand(n, c, generator=g) < 0.6
    if kind == "labels":
        targets = torch.rand(n, c, generator=g) < 0.4
    else:
        targets = torch.randint(0, max(c, 2), (n,), generator=g)
        targets[torch.rand(n, generator=g) < 0.1] = PAD
    weight = torch.rand(n, generator=g, dtype=torch.float64)
    return torch.where(known, logits, junk), targets, weight, known


def by_hand(name, logits, targets, weight, known) -> torch.Tensor:
    """[C]: one minus the metric of every class over the rows that it knows, in plain loops."""
    _, metric, _ = LOSSES[name]
    found = []
    for c in range(logits.shape[1]):
        rows = known[:, c]
        scores, pos, valid = rows_by_hand(logits[rows], targets[rows], c)
        value = metric(scores, pos, TAU, valid, weight[rows].tolist())
        some = any(p and v for p, v in zip(pos, valid, strict=True))
        found.append(1 - value if some else math.nan)
    return torch.tensor(found, dtype=torch.float64)


# -- functions


@every_function
@every_kind
@pytest.mark.parametrize("junk", [0.0, math.nan, -math.inf])
def test_every_class_is_ranked_over_its_known_rows(name, kind, junk):
    loss_fn, _, kwargs = LOSSES[name]
    for seed in range(4):
        logits, targets, weight, known = batch(seed, kind=kind, junk=junk)
        want = by_hand(name, logits, targets, weight, known)
        assert want.isfinite().all()
        kwargs = {**kwargs, "sample_weight": weight, "label_mask": known}
        for reduction, expected in (("none", want), ("sum", want.sum()), ("mean", want.mean())):
            loss, _ = loss_fn(logits, targets, None, TAU, reduction=reduction, **kwargs)
            torch.testing.assert_close(loss, expected, **TIGHT)


@every_function
@every_kind
def test_stored_rows_keep_what_is_known_of_them(name, kind):
    """Over a queue that wraps; one batch comes without a mask, and one call reads without."""
    loss_fn, _, kwargs = LOSSES[name]
    kwargs = {**kwargs, "reduction": "none"}
    c = 1 if kind == "binary" else 3
    queue = P.init_queue(60, c, dtype=torch.float64, multi_label=kind == "labels")
    stored: list[tuple[torch.Tensor, ...]] = []
    for seed in range(6):
        logits, targets, weight, known = batch(seed, 25, kind)
        weight = weight.float().double()  # as it is stored
        if seed == 2:
            logits, known = logits.nan_to_num(0.7), torch.ones_like(known)
        live = (logits, targets, weight, known)
        pool = [torch.cat(x) for x in zip(live, *stored, strict=True)]
        mask = None if seed == 2 else known
        loss, queue = loss_fn(
            logits, targets, queue, TAU, sample_weight=weight, label_mask=mask, **kwargs
        )
        torch.testing.assert_close(loss, by_hand(name, *pool), **TIGHT)
        stored = [live, *stored]
        keep = [min(25, 60 - 25 * k) for k in range(3)]  # the last 60 rows, newest batch first
        stored = [tuple(x[-n:] for x in s) for s, n in zip(stored, keep, strict=False)]
    assert queue.enqueued == 150
    assert queue.label_mask.sum() == sum(s[3].sum() for s in stored)
    assert P._queue.reset_queue(queue).label_mask.all()


@every_function
def test_gradients_are_those_of_the_known_rows_alone(name):
    loss_fn, _, kwargs = LOSSES[name]
    logits, targets, weight, known = batch(0, 40)
    x = logits.clone().requires_grad_()
    loss_fn(
        x, targets, None, TAU, sample_weight=weight, label_mask=known, reduction="sum", **kwargs
    )[0].backward()
    assert not x.grad[~known].any()
    for c in range(3):
        rows = known[:, c]
        alone = logits[rows, c : c + 1].clone().requires_grad_()
        own = targets[rows, c].long(), None, TAU
        loss_fn(alone, *own, sample_weight=weight[rows], **kwargs)[0].backward()
        assert alone.grad.any()
        torch.testing.assert_close(x.grad[rows, c], alone.grad[:, 0], **TIGHT)


@every_function
@pytest.mark.parametrize("shape", [None, (4, 40)])
def test_queries_of_known_rows(name, shape):
    loss_fn, _, kwargs = LOSSES[name]
    logits, targets, weight, known = batch(1, 40)
    ids = torch.arange(40) % 3
    each = torch.full((3, 3), math.nan, dtype=torch.float64)
    for q in range(3):
        for c in range(3):
            rows = known[:, c] & (ids == q)
            own = logits[rows, c : c + 1], targets[rows, c].long(), None, TAU
            alone, _ = loss_fn(*own, sample_weight=weight[rows], reduction="none", **kwargs)
            each[q, c] = alone[0]
    assert not each.isnan().all(0).any()
    loss, _ = loss_fn(
        logits, targets, None, TAU, sample_weight=weight, label_mask=known, query_ids=ids,
        query_shape=shape, reduction="none", **kwargs,
    )  # fmt: skip
    torch.testing.assert_close(loss, each.nanmean(0), **TIGHT)


@every_function
def test_a_mask_of_all_labels_changes_nothing(name):
    loss_fn, _, kwargs = LOSSES[name]
    queue = other = P.init_queue(40, 3, dtype=torch.float64)
    for seed in range(3):
        logits, targets, weight, known = batch(seed, junk=0.5)
        args = {**kwargs, "sample_weight": weight}
        a, queue = loss_fn(logits, targets, queue, TAU, **args)
        full = torch.ones_like(known)
        b, other = loss_fn(logits, targets, other, TAU, label_mask=full, **args)
        torch.testing.assert_close(a, b, **TIGHT)
    assert queue.label_mask.shape == (0, 3)
    assert other.label_mask.all()
    assert other.label_mask.shape == (40, 3)


@every_function
def test_rows_of_which_nothing_is_known_are_padding(name):
    loss_fn, _, kwargs = LOSSES[name]
    logits, targets, _, known = batch(0)
    x = logits.clone().requires_grad_()
    queue = P.init_queue(8, 3, multi_label=True)
    loss, new = loss_fn(x, targets, queue, TAU, label_mask=torch.zeros_like(known), **kwargs)
    assert loss == 0
    loss.backward()
    assert not x.grad.any()
    assert new.enqueued == 0  # a pool of padding alone


@every_function
def test_vmap_and_compiled_steps(name):
    loss_fn, _, kwargs = LOSSES[name]
    queue = P.init_queue(70, 3, dtype=torch.float64, multi_label=True)
    room = P.enqueue(
        queue, torch.zeros(0, 3), torch.zeros(0, 3).bool(), label_mask=torch.zeros(0, 3).bool()
    )
    assert room.label_mask.shape == (70, 3)
    rows = [batch(k, 30, junk=0.2) for k in range(4)]
    tau = torch.tensor(TAU, dtype=torch.float64)

    def step(logits, targets, known, state):
        def objective(x):
            return loss_fn(x, targets, state, tau, label_mask=known, **kwargs)

        grad, (loss, new) = grad_and_value(objective, has_aux=True)(logits)
        return loss, grad, new

    want, state = [], room
    for x, t, _, k in rows:
        loss, grad, state = step(x, t, k, state)
        want.append((loss, grad))
    call, compiles = compile_fresh(step, "aot_eager")
    mine = room
    for (x, t, _, k), (loss, grad) in zip(rows, want, strict=True):
        got, slope, mine = call(x, t, k, mine)
        torch.testing.assert_close(got, loss, **TIGHT)
        torch.testing.assert_close(slope, grad, **TIGHT)
    assert compiles() == 1
    assert all(map(torch.equal, mine, state))
    if kwargs.get("surrogate") == "pairwise":
        return
    both = P.QueueState(*(torch.stack([f, f]) for f in room))
    x, t, k = (torch.stack([r[j] for r in rows[:2]]) for j in (0, 1, 3))
    losses, _, states = vmap(step)(x, t, k, both)
    for j in range(2):
        loss, _, new = step(x[j], t[j], k[j], room)
        torch.testing.assert_close(losses[j], loss, **TIGHT)
        assert all(torch.equal(f[j], g) for f, g in zip(states, new, strict=True))


@pytest.mark.parametrize(
    ("mask", "error", "says"),
    [
        (torch.ones(6, 3), TypeError, "label_mask must be a bool tensor, got a tensor of"),
        ([True], TypeError, "label_mask must be a bool tensor, got list"),
        (torch.ones(6, 2).bool(), ValueError, r"label_mask must have the shape of logits: .*6, 3"),
        (torch.ones(6).bool(), ValueError, r"label_mask must have the shape of logits: .*\[6\]"),
    ],
)
def test_a_wrong_mask_is_named(mask, error, says):
    logits, targets = torch.randn(6, 3), torch.rand(6, 3) < 0.5
    queue = P.init_queue(4, 3)
    with pytest.raises(error, match=says):
        P.smooth_ap_loss(logits, targets, queue, TAU, label_mask=mask)
    with pytest.raises(error, match=says):
        P.enqueue(queue, logits, targets, label_mask=mask)
    with pytest.raises(error, match=says):
        P.SmoothAPLoss(3, queue_size=4)(logits, targets, label_mask=mask)
    with pytest.raises(error, match=says.replace("logits", "inputs")):
        P.sigmoid_focal(logits, targets.float(), label_mask=mask)


# -- modules


@every_loss
@every_kind
@pytest.mark.parametrize("options", [{}, {"queries": True}])
def test_modules_are_their_functions(make, kind, options):
    c = 1 if kind == "binary" else 3
    module = make(num_classes=c, queue_size=40, temperature=TAU).double()
    queue = P.init_queue(40, c, dtype=torch.float64, multi_label=kind == "labels")
    for seed in range(5):
        logits, targets, weight, known = batch(seed, 25, kind)
        weight, extra = weight.float().double(), {}
        if options.get("queries"):
            extra["query_ids"] = torch.arange(25) % 2
        if seed != 3:
            extra["label_mask"] = known
        else:  # a step without, on stored rows with
            logits = logits.nan_to_num(0.3)
        given = torch.where(known, targets.double(), math.nan) if kind == "labels" else targets
        if seed == 3:
            given = targets
        loss = module(logits, given, sample_weight=weight, **extra)
        want, queue = FUNCTIONS[make](logits, targets, queue, TAU, sample_weight=weight, **extra)
        torch.testing.assert_close(loss, want, **TIGHT)
    state = module._queue.state
    counted = queue.label_mask
    assert torch.equal(state.label_mask, counted)
    if kind == "labels":  # what is unknown is stored as False
        assert torch.equal(state.targets & counted, queue.targets & counted)
        assert not (state.targets & ~counted).any()
    twin = copy.deepcopy(module)
    fresh = make(num_classes=c, queue_size=40, temperature=TAU).double()
    fresh.load_state_dict(module.state_dict(), strict=True)
    logits, targets, weight, known = batch(9, 25, kind)
    losses = [m(logits, targets, label_mask=known) for m in (module, twin, fresh)]
    assert losses[0] == losses[1] == losses[2]


@some_losses
def test_compiled_modules_are_eager_ones(make):
    """Functions of all losses: `test_vmap_and_compiled_steps`."""
    module = make(num_classes=3, queue_size=40, temperature=TAU).double()
    rows = [batch(k, 20, junk=0.2) for k in range(4)]

    def given(row):
        logits, targets, weight, known = row
        return (logits.clone().requires_grad_(), targets.double()), {
            "sample_weight": weight, "label_mask": known
        }  # fmt: skip

    args, kwargs = given(rows[0])
    module(*args, **kwargs)  # whether to gather, and the room in the queue
    twin = copy.deepcopy(module)
    call, compiles = compile_fresh(module, "aot_eager")
    for row in rows[1:]:
        (x, t), kwargs = given(row)
        (y, _), _ = given(row)
        got, want = call(x, t, **kwargs), twin(y, t, **kwargs)
        torch.testing.assert_close(got, want, **TIGHT)
        got.backward()
        want.backward()
        torch.testing.assert_close(x.grad, y.grad, **TIGHT)
        assert all(map(torch.equal, module.buffers(), twin.buffers()))
    assert compiles() == 1


@every_loss
def test_a_checkpoint_without_a_mask_loads_into_one_with(make):
    plain, masked = (make(num_classes=3, queue_size=40) for _ in "ab")
    logits, targets, _, known = batch(0, junk=0.4)
    plain(logits, targets)
    masked(logits, targets, label_mask=known)
    saved = plain.state_dict()
    saved = {k: x for k, x in saved.items() if "label_mask" not in k}  # as 0.4 wrote it
    masked.load_state_dict(saved, strict=True)
    rows = batch(1, junk=0.1)[:2]
    assert masked(*rows) == plain(*rows)
    masked(logits, targets, label_mask=known)
    masked.reset_queue()
    plain.reset_queue()
    assert masked(*rows) == plain(*rows)


def test_a_binary_mask_may_have_one_axis():
    logits, targets, _, known = batch(0, kind="binary")
    a, b = smooth().double(), smooth().double()
    assert a(logits, targets, label_mask=known) == b(logits, targets, label_mask=known[:, 0])


def test_a_row_without_a_label_may_hold_any_class_id():
    logits, known = torch.randn(4, 1), torch.tensor([True, True, False, True])
    targets = torch.tensor([0, 1, -1, 1])
    assert warned(lambda: smooth()(logits, targets, label_mask=known)) == []
    (text,) = warned(lambda: smooth()(logits, targets, label_mask=~known | known))
    assert "expects targets in" in text
    module = P.RecallAtQuantileLoss(3, 0.5, queue_size=0)
    ids, wide = torch.tensor([0, 1, 9, 2]), torch.randn(4, 3)
    module(wide, ids, label_mask=known[:, None].expand(4, 3))
    with pytest.raises(ValueError, match="outside"):
        module(wide, ids)


@every_loss
def test_logits_of_classes_not_seen_yet_are_masked_and_stored(make):
    """What a class-incremental run does; the queue fills, and nothing is warned of."""
    module, seen = make(num_classes=4, queue_size=32), torch.tensor([True, True, False, False])
    narrow = make(num_classes=2, queue_size=32)
    for k in range(5):
        g = torch.Generator().manual_seed(k)
        logits, targets = torch.randn(12, 4, generator=g), torch.arange(12) % 2
        masked = logits.masked_fill(~seen, -torch.inf)
        loss = module(masked, targets, label_mask=seen.expand(12, 4))
        torch.testing.assert_close(loss, narrow(logits[:, :2], targets))
    assert module._queue.state.enqueued >= 32


@every_loss
def test_diagnostics_count_the_known_labels(make):
    logits, targets, _, known = batch(0)
    pad = torch.where(known, logits, 0.0)
    _, stats = make(num_classes=3, queue_size=0)(
        pad, targets, return_diagnostics=True, label_mask=known
    )
    assert torch.equal(stats["grad_pos_count"], (targets & known).sum(0))
    for c in range(3):
        rows = known[:, c]
        _, alone = make(num_classes=1, queue_size=0)(
            pad[rows, c : c + 1], targets[rows, c].long(), return_diagnostics=True
        )
        for name, value in alone.items():
            torch.testing.assert_close(stats[name][c], value[0])


@pytest.mark.filterwarnings("ignore:.*max_pool_size")
@every_loss
def test_a_capped_pool_draws_rows_that_count(make):
    logits, targets, _, known = batch(0, 60)
    known[::2] = False
    rows = int(known.any(-1).sum())
    whole = make(num_classes=3, queue_size=0)(logits, targets, label_mask=known)
    same = make(num_classes=3, queue_size=0, max_pool_size=rows)
    assert same(logits, targets, label_mask=known) == whole
    capped = make(num_classes=3, queue_size=0, max_pool_size=rows - 4, reduction="none")
    loss, _, _, stats = capped(
        logits, targets, return_per_class=True, return_diagnostics=True, label_mask=known
    )
    assert loss.isfinite().all()
    assert "pos_count" not in stats or (stats["pos_count"] > 0).all()


# -- labels that are none


@every_loss
@pytest.mark.parametrize("bad", [math.nan, -1.0, -100.0, 0.3, 0.9, 2.0, math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_float_labels_are_zero_or_one(make, bad, dtype):
    logits, targets, _, known = batch(0, junk=0.2)
    module, labels = make(num_classes=3), targets.to(dtype)
    labels[4, 1] = bad
    before = copy.deepcopy(module)
    says = r"targets must be labels 0 and 1, got \[.*label_mask"
    if module._graded:
        says = "relevance grades, must be finite and >= 0.*label_mask"
    if not (module._graded and 0 <= bad < math.inf):
        with pytest.raises(ValueError, match=says):
            module(logits.float(), labels)
    assert all(map(torch.equal, module.buffers(), before.buffers()))
    known[4, 1] = False
    again = torch.where(known, targets, False)
    loss = module(logits.float(), labels, label_mask=known)
    assert loss == before(logits.float(), again, label_mask=known)


def test_the_labels_that_are_none_are_told():
    labels = torch.tensor([[0.0, -1.0], [1.0, 0.5], [math.nan, 1.0], [0.0, 1.0]])
    with pytest.raises(ValueError, match=r"^SmoothAPLoss: .*got \[-1.0, 0.5, nan\]; where a label"):
        P.SmoothAPLoss(2, queue_size=4)(torch.randn(4, 2), labels)
    with pytest.raises(ValueError, match=r"targets must be \[N=4\] class ids, or .* bool labels"):
        P.smooth_ap_loss(torch.randn(4, 2), labels, None, TAU)


# -- focal


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("weighted", [False, True])
def test_focal_leaves_unknown_labels_out(reduction, weighted):
    logits, targets, weight, known = batch(0)
    weight = weight[:, None] if weighted else None
    given = torch.where(known, targets.double(), math.nan)
    x = logits.clone().requires_grad_()
    loss = P.sigmoid_focal(
        x, given, reduction=reduction, sample_weight=weight, label_mask=known
    )  # fmt: skip
    alone = P.sigmoid_focal(
        logits[known], given[known], reduction=reduction,
        sample_weight=None if weight is None else weight.expand(known.shape)[known],
    )  # fmt: skip
    torch.testing.assert_close(loss[known] if reduction == "none" else loss, alone, **TIGHT)
    loss.sum().backward()
    assert not x.grad[~known].any()
    assert x.grad[known].isfinite().all()
    module = P.SigmoidFocalLoss(reduction=reduction)
    assert torch.equal(module(logits, given, sample_weight=weight, label_mask=known), loss)
    none = torch.zeros_like(known)
    assert not P.sigmoid_focal(x, given, reduction=reduction, label_mask=none).any()


@pytest.mark.parametrize("bad", [math.nan, -1.0, -100.0, 1.5])
def test_focal_targets_outside_the_range_are_refused(bad):
    logits, targets, _, known = batch(0, junk=0.0)
    given = targets.double()
    given[2, 1] = bad
    with pytest.raises(ValueError, match=r"targets must be in \[0, 1\], got .* to .*label_mask"):
        P.SigmoidFocalLoss()(logits, given)
    known[2, 1] = False
    assert P.SigmoidFocalLoss()(logits, given, label_mask=known).isfinite()
    with pytest.raises(ValueError, match=r"targets must be in \[0, 1\]"):
        P.SigmoidFocalLoss()(logits, torch.full_like(given, -1).long())


# -- the wrapper


def test_the_wrapper_passes_the_mask_on():
    logits, targets, _, known = batch(0, junk=0.0)
    heard = []

    def declares(x, y, label_mask=None):
        heard.append(label_mask)
        return x.mean()

    def silent(x, y):
        return x.mean()

    for warmup_loss, expected in ((declares, 0), (silent, 1)):
        wrapper = P.LossWarmupWrapper(
            warmup_loss, smooth(num_classes=3), warmup_steps=1, blend_steps=1, temp_start=TAU
        )
        main = smooth(num_classes=3, temperature=TAU)(logits, targets, label_mask=known)
        losses = []

        def call():
            for step in (0, 0, 1, 2):
                wrapper.on_train_batch_start(step)  # noqa: B023
                wrapper.reset_queue = wrapper.main_loss.reset_queue()  # noqa: B023
                wrapper.main_loss.temperature = TAU  # noqa: B023
                losses.append(wrapper(logits, targets, label_mask=known))  # noqa: B023

        texts = warned(call)
        assert len(texts) == expected
        assert all("has no argument 'label_mask'" in t for t in texts)
        warm = logits.mean()
        for got, want in zip(losses, (warm, warm, (warm + main) / 2, main), strict=True):
            torch.testing.assert_close(got, want)
    assert len(heard) == 3
    assert all(mask is known for mask in heard)


# -- processes

SHARDS = [(6, 3, 4), (9, 0, 2)]


def distributed_step(make_name: str, how: str, rows, masks) -> dict:
    module = getattr(P, make_name)(
        3, queue_size=20, temperature=TAU, distributed=how, **EXTRA[make_name]
    ).double()
    losses, grads = [], []
    for (logits, targets, weight, known), masked in zip(rows, masks, strict=True):
        x = logits.clone().requires_grad_()
        extra = {"label_mask": known, "sample_weight": weight} if masked else {}
        loss = module(x, targets, **extra)
        loss.backward()
        losses.append(loss.item())
        grads.append(x.grad)
    return {"losses": losses, "grads": grads, "module": module}


EXTRA = {"SmoothAPLoss": {}, "RecallAtQuantileLoss": {"quantile": 0.3}, "PAUCAtBudgetLoss": {
    "beta": 0.5, "quantile_interpolation": "linear"}}  # fmt: skip
MASKS = (True, False, False, True)


def shared_rows(n: int):
    """The first batch has, in the rows of one process alone, nothing but 1 and True."""
    rows = [batch(seed, n, junk=0.1) for seed in range(4)]
    rows[0][2][: n // 2 + 4], rows[0][3][: n // 2 + 4] = 1.0, True
    return rows


def worker(rank: int) -> dict:
    out = {}
    for shard in SHARDS:
        mine = slice(sum(shard[:rank]), sum(shard[: rank + 1]))
        own = [tuple(x[mine] for x in row) for row in shared_rows(sum(shard))]
        for name in EXTRA:
            for how in ("gather", "shard"):
                found = distributed_step(name, how, own, MASKS)
                out[shard, name, how] = found["losses"], found["grads"]
                if how == "gather":
                    out[shard, name, "queue"] = list(found["module"]._queue.state)
    labels = torch.tensor([[0.0, 1.0, 0.0], [1.0, -1.0 if rank == 1 else 0.0, 1.0]])
    for bad in (labels, torch.tensor([0.0, math.nan if rank == 1 else 1.0])):
        module = P.SmoothAPLoss(3, queue_size=4)
        try:
            module(torch.ones(2, 3), bad)
        except ValueError as error:
            out["refused", bad.dim()] = str(error), int(module._queue.state.enqueued)
    return out


@pytest.fixture(scope="module")
def ranks():
    return processes.run(3, worker)


@pytest.mark.parametrize("name", EXTRA)
@pytest.mark.parametrize("how", ["gather", "shard"])
@pytest.mark.parametrize("shard", SHARDS)
def test_processes_together_are_one(ranks, name, how, shard):
    rows = shared_rows(sum(shard))
    want = distributed_step(name, "gather", rows, MASKS)
    for rank, out in enumerate(ranks):
        losses, grads = out[shard, name, how]
        # Queues of 20 rows each of their own hold more than one of 20 rows: the first two calls.
        steps = 4 if how == "gather" else 2
        assert losses[:steps] == pytest.approx(want["losses"][:steps], rel=1e-9)
        mine = slice(sum(shard[:rank]), sum(shard[: rank + 1]))
        for got, whole in zip(grads[:steps], want["grads"][:steps], strict=True):
            # DistributedDataParallel averages; here each process has the sum of all.
            torch.testing.assert_close(got / 3, whole[mine], rtol=1e-7, atol=1e-10)
        assert losses == ranks[0][shard, name, how][0]
        if how == "gather":
            for a, b in zip(out[shard, name, "queue"], want["module"]._queue.state, strict=True):
                assert torch.equal(a, b)


def test_a_label_that_is_none_is_refused_on_every_process(ranks):
    for out in ranks:
        for dim, value in ((2, "-1.0"), (1, "nan")):
            text, stored = out["refused", dim]
            assert f"got [{value}]" in text
            assert stored == 0
