"""RetrievalLoss and retrieval_loss: loops over queries and stored rows, ids, steps, processes."""

from __future__ import annotations

import copy
import math
import pickle

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

import proxy_losses as P
from proxy_losses import RetrievalLoss, retrieval_lists, retrieval_loss
from proxy_losses._metrics import METRICS
from proxy_losses._retrieval import BY_NAME
from proxy_losses.integrations._common import own_queue_losses, reset_losses
from proxy_losses.nn import _late

from . import reference
from .compiling import compile_fresh
from .makers import warned
from .metrics import TIGHT, of_value
from .test_late import Played
from .test_retrieval import SIZES, TAU, batch

PAD, WIDTH, CAPACITY = -100, 5, 10
every_metric = pytest.mark.parametrize("name", BY_NAME)


def settings(name: str) -> dict:
    """Of the first example of the record."""
    return dict(BY_NAME[name].examples[0])


def by_loops(name: str, lists: list) -> list[float]:
    """The losses of lists of scores and positives, NaN where one does not count."""
    record, chosen = BY_NAME[name], of_value(settings(name))
    losses = []
    for scores, pos in lists:
        counts = any(pos) and not (record.needs_negative and all(pos))
        if name == "partial_auc":
            counts = counts and reference.partial_auc_band(scores, pos, TAU, **chosen) is not None
        value = getattr(reference, record.name)(scores, pos, TAU, **chosen) if counts else math.nan
        losses.append(1 - value)
    return losses


def mean(losses: list[float]) -> float:
    counted = [x for x in losses if not math.isnan(x)]
    return sum(counted) / len(counted) if counted else 0.0


def rows(seed: int, n: int) -> tuple[Tensor, Tensor]:
    """Of classes in any number, exact in float32, which a memory holds; one row is padding."""
    g = torch.Generator().manual_seed(seed)
    labels = torch.randint(3, (n,), generator=g)
    labels[: n // 5] = PAD
    return torch.randn(n, WIDTH, generator=g).double(), labels


def module(**kwargs) -> RetrievalLoss:
    options = {"memory_size": CAPACITY, "embedding_dim": WIDTH, "temperature": TAU}
    return RetrievalLoss(kwargs.pop("metric", "ap"), **(options | kwargs))


def trained(steps: int = 3, **kwargs) -> RetrievalLoss:
    loss_fn = module(**kwargs)
    for k in range(steps):
        loss_fn(*rows(k, 4))
    return loss_fn


# -- a batch by itself


def test_every_metric_has_a_short_name():
    assert {r.name for r in BY_NAME.values()} == {m.name for m in METRICS}
    assert {"ap", "recall_at_k", "precision_at_k", "mrr", "auroc"} <= {*BY_NAME}
    for name in BY_NAME:
        assert all(f'"{name}"' in text for text in (RetrievalLoss.__doc__, retrieval_loss.__doc__))


@every_metric
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_losses_are_those_of_the_loops(name, sizes):
    x, y = batch(0, sizes)
    loss_fn = RetrievalLoss(name, temperature=TAU, reduction="none", **settings(name))
    expected = by_loops(name, reference.retrieval(x.tolist(), y.tolist()))
    value = loss_fn(x, y)
    # An error of eps in the scores, divided by tau, moves a value by about 10 eps.
    wanted = torch.tensor(expected, dtype=torch.float64)
    torch.testing.assert_close(value, wanted, rtol=1e-11, atol=1e-13, equal_nan=True)
    loss_fn.reduction = "mean"
    assert loss_fn(x, y).item() == pytest.approx(mean(expected), rel=1e-11)


@every_metric
def test_lists_and_metric_give_the_same(name):
    """To the bit, and the gradient; with references and relevance too."""
    x, y = batch(1, [4, 1, 6, 3])
    r, z = batch(2, [5, 2])
    record, a, b = BY_NAME[name], x.clone().requires_grad_(), x.clone().requires_grad_()
    c, d = r.clone().requires_grad_(), r.clone().requires_grad_()
    loss_fn = RetrievalLoss(name, temperature=TAU, **settings(name))

    def plain(x, **refs):
        lists = retrieval_lists(x, y, **refs)
        value = record.function(*lists[:2], TAU, valid_mask=lists.valid_mask, **settings(name))
        known = record.defined.__code__.co_varnames
        first = (lists.scores,) if "scores" in known else ()
        own = {k: v for k, v in settings(name).items() if k in known}
        counts = record.defined(*first, lists.pos_mask, valid_mask=lists.valid_mask, **own)
        return (counts.double() - value).sum() / counts.sum()

    for value, wanted, inputs in (
        (loss_fn(a, y), plain(b), [(a, b)]),
        (loss_fn(a, y, c, z), plain(b, ref_embeddings=d, ref_labels=z), [(a, b), (c, d)]),
        (loss_fn(a, y[:, None] == z, c), plain(b, ref_embeddings=d, ref_labels=z), [(a, b)]),
        (loss_fn(a, (y[:, None] == z).half() * 3, c), loss_fn(b, y, d, z), [(a, b), (c, d)]),
    ):
        torch.testing.assert_close(value, wanted, rtol=1e-13, atol=1e-15)
        for (given, _), mine, theirs in zip(
            inputs,
            torch.autograd.grad(value, [i for i, _ in inputs]),
            torch.autograd.grad(wanted, [j for _, j in inputs]),
            strict=True,
        ):
            torch.testing.assert_close(mine, theirs, **TIGHT)
            assert given.shape == mine.shape
            assert mine.abs().max() > 1e-4


@pytest.mark.parametrize("k", [None, 3])
def test_graded_relevance(k):
    x, r = batch(3, [7])[0], batch(4, [9])[0]
    g = torch.Generator().manual_seed(5)
    grades = torch.randint(3, (7, 9), generator=g).double() / 2
    grades[2], grades[4] = 0, 1  # nothing to find, nothing to prefer
    losses = []
    for q in range(7):
        scores = [reference.similarity(x[q].tolist(), row.tolist()) for row in r]
        value = reference.smooth_ndcg(scores, grades[q].tolist(), TAU, k=k)
        losses.append(math.nan if q in (2, 4) else 1 - value)
    loss_fn = RetrievalLoss("ndcg", k=k, temperature=TAU)
    assert loss_fn(x, grades, r).item() == pytest.approx(mean(losses), rel=1e-11)
    assert retrieval_loss(x, -grades, None, TAU, metric="ndcg", ref_embeddings=r)[0].isnan()


def test_no_query_that_counts():
    x, _ = batch(3, [6])
    for labels in (torch.arange(6), torch.full((6,), PAD), torch.arange(6) // 9):
        a = x.clone().requires_grad_()
        loss = RetrievalLoss()(a, labels)
        loss.backward()
        assert loss.item() == 0
        assert (a.grad == 0).all()


def test_padding_is_neither_query_nor_reference():
    x, y = batch(4, [4, 5])
    pad = torch.cat([y, y.new_full((3,), PAD)])
    a = torch.cat([x, torch.full((3, WIDTH), math.nan)]).requires_grad_()
    loss_fn = module()
    loss = loss_fn(a, pad)
    loss.backward()
    assert loss == RetrievalLoss(temperature=TAU)(x, y)
    assert (a.grad[9:] == 0).all()
    assert a.grad.isfinite().all()
    assert loss_fn.memory.labels.tolist() == pad[-CAPACITY:].tolist()  # it takes slots
    assert loss_fn(x, y).isfinite()


# -- the memory


@pytest.mark.parametrize("kind", ["cosine", "dot"])
@pytest.mark.parametrize("given", ["batch", "references", "labels"])
@pytest.mark.parametrize("ids", [False, True], ids=["", "ids"])
def test_steps_are_those_of_the_loops(kind, given, ids):
    """Sizes below, at and above the capacity; ids come again, as in a second epoch."""
    options = {"similarity": kind} | ({"num_labels": 3} if given == "labels" else {})
    loss_fn = module(**options)
    memory = P.init_memory(CAPACITY, WIDTH, num_labels=options.get("num_labels"))
    stored: list[tuple] = []  # embedding, label, id
    seen = 0
    for k, n in enumerate([4, 3, 5, CAPACITY, 2, 13, 4, 0]):
        x, y = rows(k, n)
        r, z = rows(50 + k, 6) if given == "references" else (x, y)
        row, ref = ((torch.arange(len(t)) + 2 * k) % 7 + 1 for t in (x, r))
        if given == "labels":
            y = z = torch.rand(n, 3, generator=torch.Generator().manual_seed(k)) < 0.4
        known = [set(t.nonzero()[:, 0].tolist()) if t.dim() else int(t) for t in z]
        refs = list(zip(r.tolist(), known, ref.tolist(), strict=True))
        lists = []
        for q in range(n):
            own = set(y[q].nonzero()[:, 0].tolist()) if y.dim() > 1 else int(y[q])
            pool = [t for m, t in enumerate(refs) if given == "references" or m != q] + stored
            pool = [t for t in pool if t[1] != PAD and not (ids and t[2] == row[q])]
            scores = [reference.similarity(x[q].tolist(), t[0], kind) for t in pool]
            pos = [bool(own & t[1]) if y.dim() > 1 else own == t[1] for t in pool]
            lists.append((scores, pos))
        more = {"row_ids": row} if ids else {}
        if given == "references":
            more |= {"ref_embeddings": r, "ref_labels": z} | ({"ref_row_ids": ref} if ids else {})
        losses = by_loops("ap", lists)
        seen += not all(map(math.isnan, losses))
        value = loss_fn(x, y, **more)
        assert value.item() == pytest.approx(mean(losses), rel=1e-11, abs=1e-13)
        other, memory = retrieval_loss(x, y, memory, TAU, similarity=kind, **more)
        assert other == value
        assert all(map(torch.equal, memory, loss_fn.memory))
        stored = (stored + refs)[-CAPACITY:]
    assert seen == 7  # all but the empty batch
    assert memory.enqueued >= 40


def test_one_label():
    """Rows with it find each other; rows without find nobody."""
    (x, _), has = rows(0, 7), torch.arange(7) % 2 == 0
    loss_fn, ids = module(num_labels=1), module()
    for _ in "ab":
        own = torch.where(has, 1, 10 + torch.arange(7))
        assert loss_fn(x, has[:, None]) == ids(x, own)
        ids.memory.labels[ids.memory.labels > 1] = 99
    assert loss_fn.memory.labels.shape == (CAPACITY, 1)


def test_gradients_reach_the_batch_alone():
    x, y = rows(0, 6)
    memory = P.enqueue_embeddings(P.init_memory(4, WIDTH, dtype=torch.float64), *rows(1, 4))
    refs = {"ref_embeddings": rows(2, 5)[0].requires_grad_(), "ref_labels": rows(2, 5)[1]}
    for more in ({}, refs):
        inputs = [x.clone().requires_grad_(), *list(more.values())[:1]]

        def loss(x, r=None, more=more):
            given = {**more, "ref_embeddings": r} if more else {}
            return retrieval_loss(x, y, memory, TAU, **given)[0]

        assert torch.autograd.gradcheck(loss, inputs)


def test_rows_that_are_not_finite_are_not_stored():
    loss_fn = trained()
    before = copy.deepcopy(loss_fn.memory)
    x, y = rows(9, 4)
    for bad in (math.nan, math.inf):
        broken = x.clone()
        broken[2, 0] = bad
        assert loss_fn(broken, y).isnan()
        assert all(map(torch.equal, loss_fn.memory, before))
    assert loss_fn(x, y).isfinite()
    assert not torch.equal(loss_fn.memory.embeddings, before.embeddings)


@pytest.mark.parametrize("late", [False, True])
def test_rows_too_large_for_the_memory_alone_have_a_loss(late, monkeypatch):
    if late:
        monkeypatch.setattr(_late, "at_once", lambda x: False)
        monkeypatch.setattr(_late, "carrier", lambda x: Played)
    Played.made = []
    loss_fn, (x, y) = trained(), rows(9, 4)
    before = copy.deepcopy(loss_fn.memory)
    large = x * 2.0**600
    losses = [loss_fn(x, y, store=False)]

    def step():
        losses.append(loss_fn(large, y))
        for answer in Played.made:
            answer.there = True

    (text,) = warned(lambda: [step() for _ in "abc"])
    said = "at forward 5: " if late else ""
    assert text.startswith(f"{said}RetrievalLoss: a batch was not stored in the memory, because")
    assert "too large for torch.float32" in text
    assert len({loss.item() for loss in losses}) == 1  # the scale has no effect
    assert all(map(torch.equal, loss_fn.memory, before))
    assert warned(lambda: loss_fn(large * math.nan, y)) == []  # the loss says it
    loss_fn.reset()
    assert warned(lambda: [step() for _ in "ab"]) == [text.replace("forward 5", "forward 1")]


def test_when_rows_are_stored():
    x, y = rows(0, 4)
    loss_fn = module()
    first = loss_fn(x, y, store=False)
    assert loss_fn.memory.enqueued == 0
    loss_fn.eval()(x, y)
    assert loss_fn.memory.enqueued == 0
    assert loss_fn.train()(x, y) == first  # ranked before it is stored
    assert loss_fn.memory.enqueued == 4
    assert module(memory_size=0).memory is None
    asked = module(update_memory_in_eval=True).eval()
    with torch.no_grad():
        assert warned(lambda: asked(x, y)) == []
        (text,) = warned(lambda: [loss_fn(x, y) for _ in "ab"])
    assert text.startswith("RetrievalLoss: rows are stored in the queue while gradients are")
    assert asked.memory.enqueued == 4
    loss_fn.temperature = 0.7
    loss_fn.reset_queue()
    assert loss_fn.memory.enqueued == 0
    assert loss_fn.temperature == pytest.approx(0.7)
    loss_fn.reset()
    assert loss_fn.temperature == TAU
    assert loss_fn(x, y) == first


def test_by_hand():
    memory = P.enqueue_embeddings(P.init_memory(4, 2), torch.ones(3, 2), torch.arange(3))
    for held in (False, True):
        where = torch.tensor(held)
        new = P.enqueue_embeddings(memory, torch.zeros(2, 2), torch.arange(2), where=where)
        assert new.enqueued == 3 + 2 * held
    assert memory.labels.tolist() == [0, 1, 2, 0]
    empty = P.reset_memory(memory)
    assert all(map(torch.equal, empty, P.init_memory(4, 2)))


# -- state


def goes_on(loss_fn: RetrievalLoss) -> list[float]:
    return [loss_fn(*rows(k, 4)).item() for k in range(20, 23)]


def through_meta(loss_fn: RetrievalLoss, *, assign: bool) -> RetrievalLoss:
    with torch.device("meta"):
        twin = module()
    if not assign:
        twin.to_empty(device="cpu")
        assert goes_on(copy.deepcopy(twin)) == goes_on(module())
    twin.load_state_dict(loss_fn.state_dict(), assign=assign)
    return twin


def loaded(loss_fn: RetrievalLoss) -> RetrievalLoss:
    twin = trained(2, temperature=0.9)
    twin.load_state_dict(pickle.loads(pickle.dumps(loss_fn.state_dict())))
    return twin


@pytest.mark.parametrize(
    "copied",
    [
        copy.deepcopy, loaded, lambda m: pickle.loads(pickle.dumps(m)),
        lambda m: through_meta(m, assign=True), lambda m: through_meta(m, assign=False),
        lambda m: copy.deepcopy(m).half(),
    ],
    ids=["deepcopy", "load", "pickle", "assign", "to_empty", "half"],
)  # fmt: skip
def test_a_copy_goes_on_alike(copied):
    loss_fn = trained()
    loss_fn.temperature = 0.2
    twin = copied(loss_fn)
    assert twin.temperature == 0.2
    addresses = [b.data_ptr() for b in twin.buffers()]
    assert goes_on(twin) == goes_on(copy.deepcopy(loss_fn)) != goes_on(module())
    assert [b.data_ptr() for b in twin.buffers()] == addresses
    assert loss_fn.memory.enqueued == 12


def test_other_sizes_do_not_load():
    saved = trained().state_dict()
    saved["_tau"] = torch.tensor(0.9, dtype=torch.float64)
    for options in ({"memory_size": 8}, {"num_labels": 3}):
        other = module(**options)
        with pytest.raises(RuntimeError, match=r"nothing was loaded:\s+size mismatch for _queue"):
            other.load_state_dict(saved)
        assert other.temperature == TAU
    for broken in ({}, {"_queue._q_seal": 3}):
        some = {k: v for k, v in saved.items() if k != "_queue._q_seal"} | broken
        with pytest.raises(RuntimeError, match=r"_queue\._q_seal must be a tensor, got"):
            module().load_state_dict(some)
    with pytest.raises(RuntimeError, match=r"Missing key.*_queue\._q_embeddings"):
        module().load_state_dict({"_tau": saved["_tau"]})


def test_an_average_of_memories_is_told():
    loss_fn = trained(1)
    averaged = AveragedModel(loss_fn, use_buffers=True)
    for k in range(2):
        loss_fn(*rows(k, 4))
        averaged.update_parameters(loss_fn)
    with pytest.raises(RuntimeError, match="the memory queue of this loss was averaged"):
        averaged.module(*rows(9, 4))
    averaged.module.reset()
    averaged.module(*rows(9, 4))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("every", [True, False])
def test_a_cast_state_dict_is_told(dtype, every):
    """Its seal is rounded; float16 has no number so large."""
    for trains, fresh, row in (
        (trained(1), module(), rows(9, 4)),
        (P.SmoothAPLoss(1, queue_size=8), P.SmoothAPLoss(1, queue_size=8), None),
    ):
        row = row or (torch.randn(4, 1), torch.arange(4) % 2)
        trains(*row)
        cast = {
            name: x.to(dtype) if every or x.is_floating_point() else x
            for name, x in trains.state_dict().items()
        }
        fresh.load_state_dict(cast)
        with pytest.raises(RuntimeError, match=r"was cast to another dtype, as by \.half\(\)"):
            fresh(*row)
        fresh.reset()
        assert fresh(*row).isfinite()


def test_on_meta_without_values():
    with torch.device("meta"):
        loss_fn = module()
    assert loss_fn.temperature == TAU
    with pytest.raises(RuntimeError, match="the state of RetrievalLoss is on the meta device"):
        loss_fn(*rows(0, 4))


# -- in a wrapper


def test_the_wrapper_schedules_it():
    def pull(x: Tensor, y: Tensor) -> Tensor:
        return (x * x).mean()

    def wrapped(**options):
        main = module(**options)
        return P.LossWarmupWrapper(
            pull, main, warmup_steps=2, blend_steps=2, temp_start=0.4, temp_end=0.1,
            temp_decay_steps=4,
        )  # fmt: skip

    wrapper, twin = wrapped(), wrapped()
    held, temperatures = [], []
    for step in range(9):
        wrapper.on_train_batch_start(step)
        x, y = rows(step, 4)
        ids = torch.arange(4) + 4 * (step % 2)  # two batches are an epoch
        loss = wrapper(x, y, row_ids=ids)
        alone = module(temperature=wrapper.current_temperature)
        if step < 2:
            assert loss == pull(x, y)
        elif step == 2:
            assert loss.item() == pytest.approx((2 * pull(x, y) + alone(x, y)).item() / 3)
        held.append(int(wrapper.main_loss.memory.enqueued))
        temperatures.append(wrapper.current_temperature)
        if step == 5:
            twin.load_state_dict(wrapper.state_dict())
        if step > 5:
            twin.on_train_batch_start(step)
            assert twin(x, y, row_ids=ids) == loss
    assert held == [0, 0, 4, 8, 12, 16, 20, 24, 28]
    assert (wrapper.main_loss.memory.row_ids >= 0).all()  # the blend passes them on
    assert temperatures[0] == TAU
    assert temperatures[2:] == sorted(temperatures[2:], reverse=True)
    assert (temperatures[2], temperatures[-1]) == (pytest.approx(0.4), pytest.approx(0.1))
    broken = wrapper.state_dict()
    broken["main_loss._queue._q_labels"] = torch.zeros(3)
    with pytest.raises(RuntimeError, match="LossWarmupWrapper, of which nothing was loaded"):
        wrapper.load_state_dict(broken)


def test_the_blend_ranks_given_references():
    main = module(memory_size=0, reduction="mean")
    wrapper = P.LossWarmupWrapper(lambda x, y: (x * 0).sum(), main, warmup_steps=0, blend_steps=1)
    wrapper.on_train_batch_start(0)
    (x, _), (r, _) = rows(0, 4), rows(1, 6)
    relevance = torch.eye(4, 6)
    blended = wrapper(x, relevance, ref_embeddings=r)
    torch.testing.assert_close(blended, main(x, relevance, r) / 2)


def test_callbacks_see_it():
    net = nn.ModuleDict({"a": trained(gather_distributed=False), "b": trained()})
    assert {*own_queue_losses(net)} == {"a"}
    net["b"].temperature = 0.7
    reset_losses(net)
    assert [int(m.memory.enqueued) for m in net.values()] == [0, 0]
    assert net["b"].temperature == pytest.approx(0.7)


# -- precision, transforms, compiled code


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_dtypes(dtype):
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    loss_fn, exact = module(), module()
    for k in range(3):
        x, y = rows(k, 6)
        x = x.to(dtype).requires_grad_()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            value = loss_fn(x, y)
        assert value.dtype == wide
        value.backward()
        assert x.grad.dtype == dtype
        # Half input is exact in float32; what remains is its rounding, divided by tau.
        assert value.item() == pytest.approx(exact(x.detach().double(), y).item(), abs=1e-4)
        assert loss_fn.memory.embeddings.dtype == torch.float32


@every_metric
def test_transforms_agree(name):
    states = [P.enqueue_embeddings(P.init_memory(4, WIDTH), *rows(k, 3)) for k in range(2)]
    stacked = P.MemoryState(*map(torch.stack, zip(*states, strict=True)))
    xs, ys = map(torch.stack, zip(*(rows(5 + k, 6) for k in range(2)), strict=True))
    ids = torch.arange(6)

    def one(x, y, memory):
        chosen = {"metric": name, **settings(name)}
        return retrieval_loss(x, y, memory, TAU, row_ids=ids, **chosen)

    losses, after = torch.vmap(one)(xs, ys, stacked)
    slopes = torch.vmap(torch.func.grad(lambda *a: one(*a)[0]))(xs, ys, stacked)
    assert slopes.abs().amax((1, 2)).min() > 1e-3
    for k, state in enumerate(states):
        x = xs[k].clone().requires_grad_()
        loss, memory = one(x, ys[k], state)
        torch.testing.assert_close(losses[k], loss, **TIGHT)
        torch.testing.assert_close(slopes[k], torch.autograd.grad(loss, x)[0], **TIGHT)
        assert all(torch.equal(a[k], b) for a, b in zip(after, memory, strict=True))


@pytest.mark.parametrize("name", ["ap", pytest.param("recall_at_k", marks=pytest.mark.slow)])
def test_compiled_steps_are_eager_ones(name):
    eager, twin = (trained(1, metric=name, **settings(name)) for _ in "ab")
    compiled, compiles = compile_fresh(twin, backend="aot_eager")
    for k in range(4):
        eager.temperature = twin.temperature = 0.1 + 0.1 * k
        x, y = rows(k, 6)
        a, b = (x.clone().requires_grad_() for _ in "ab")
        ids = torch.arange(6) + k
        wanted, found = eager(a, y, row_ids=ids), compiled(b, y, row_ids=ids)
        wanted.backward()
        found.backward()
        torch.testing.assert_close(found, wanted, **TIGHT)
        torch.testing.assert_close(b.grad, a.grad, **TIGHT)
        assert all(map(torch.equal, eager.memory, twin.memory))
    assert compiles() == 1


# -- bad input

X, Y = torch.ones(6, WIDTH), torch.arange(6)


@pytest.mark.parametrize(
    ("kwargs", "error", "says"),
    [
        ({"metric": "map"}, ValueError, r"metric must be one of \['ap', .*\], got 'map'"),
        ({"k": 3}, TypeError, r"RetrievalLoss\(\) got an unexpected keyword argument 'k'; metric="
         "'ap' takes none of its own"),
        ({"metric": "recall_at_k", "quantile": 0.1}, TypeError, r"'quantile'; .*takes \['k', "),
        ({"metric": "recall_at_k", "k": 0}, ValueError, "k must be >= 1, got 0"),
        ({"memory_size": -1}, ValueError, "memory_size must be >= 0"),
        ({"embedding_dim": None}, ValueError, "memory_size=10 needs embedding_dim=, the width D"),
        ({"embedding_dim": 0}, ValueError, "embedding_dim must be >= 1, got 0"),
        ({"num_labels": 0}, ValueError, "num_labels must be >= 1"),
        ({"similarity": "l2"}, ValueError, r"similarity must be one of \['cosine', 'dot'\]"),
        ({"ignore_index": 0.5}, TypeError, "ignore_index must be an integer, got float"),
        ({"reduction": "sum"}, ValueError, r"reduction must be one of \['mean', 'none'\]"),
        ({"update_memory_in_eval": None}, TypeError, "update_memory_in_eval must be True or False"),
        ({"gather_distributed": 0.5}, TypeError, "gather_distributed must be True or False"),
        ({"temperature": 0}, ValueError, "temperature must be positive"),
        ({"temperature": "warm"}, TypeError, "temperature must be a number, got str"),
    ],
)  # fmt: skip
def test_bad_settings(kwargs, error, says):
    with pytest.raises(error, match=says):
        module(**kwargs)


@pytest.mark.parametrize(
    ("args", "kwargs", "error", "says"),
    [
        ((X, Y), {"store": None}, TypeError, "store must be True or False"),
        ((X[None], Y[None]), {}, ValueError, r"embeddings must be \[N, D\], got \[1, 6, 5\]"),
        ((X, Y, X[None], Y[None]), {}, ValueError, r"ref_embeddings must be \[N, D\], got \[1,"),
        ((X[:, :3], Y), {}, ValueError, r"\[N, embedding_dim=5\], got \[6, 3\]"),
        ((X, Y[:5]), {}, ValueError, r"of embeddings \[6, 5\], got \[5\]"),
        ((X, Y, None, Y), {}, ValueError, "must be given together, got no ref_embeddings"),
        ((X, Y > 2), {}, ValueError, r"bool \[..., rows, L\].*got \[6\] of torch.bool"),
        ((X, (Y > 2)[:, None]), {}, ValueError, r"labels must be \[N\] class ids as in the memory"),
        ((X, Y, X), {}, TypeError, r"labels must be relevance \[Q, M\], bool or floating, where"),
        ((X, 1j * (X @ X.T), X), {}, TypeError, "labels must be relevance .*complex64"),
        ((X, (X @ X.T).to(torch.float8_e5m2), X), {}, TypeError, "labels must be .*float8"),
        ((X, [1], X), {}, TypeError, "labels must be relevance .*got list"),
        ((X, X, X), {}, ValueError, r"no ref_labels: \[6, 6\], got \[6, 5\]"),
        ((X, X, X[:, :3]), {}, ValueError, r"expected \[..., 5\], got \[6, 3\]"),
        ((X, X, 3), {}, TypeError, "ref_embeddings must be a floating-point tensor, got int"),
        ((X, X @ X.T, X), {}, ValueError, "relevance .* a memory needs ref_labels"),
        ((X, Y), {"row_ids": Y.float()}, TypeError, "row_ids must be integer ids of rows"),
        ((X, Y), {"row_ids": Y[1:]}, ValueError, r"one id for each row: \[6\], got \[5\]"),
        ((X, Y), {"ref_row_ids": Y}, ValueError, "ref_row_ids need ref_embeddings"),
        ((X, Y, X, Y), {"ref_row_ids": Y[1:], "row_ids": Y}, ValueError, "ref_row_ids must be one"),
        ((X, Y, X, Y), {"ref_row_ids": Y}, ValueError, "together, got no row_ids"),
        ((X, Y, X, Y), {"row_ids": Y}, ValueError, "together, got no ref_row_ids"),
    ],
)  # fmt: skip
def test_bad_batches(args, kwargs, error, says):
    loss_fn = module()
    with pytest.raises(error, match=says):
        loss_fn(*args, **kwargs)
    assert loss_fn.memory.enqueued == 0


def test_labels_are_as_many_as_told():
    loss_fn = RetrievalLoss(num_labels=3)
    for bad in (Y, torch.eye(6) > 0):
        with pytest.raises(ValueError, match=r"labels must be \[N, num_labels=3\] bool, got \[6"):
            loss_fn(X, bad)
    assert loss_fn(X, torch.eye(6), X).isfinite()  # relevance


def test_bad_relevance():
    loss_fn = RetrievalLoss()
    for bad in (-1.0, math.nan, math.inf):
        grades = torch.ones(6, 6)
        grades[2, 3] = bad
        with pytest.raises(ValueError, match="relevance must be finite and >= 0, below"):
            loss_fn(X, grades, X)


def test_relevance_on_a_device_is_judged_later(monkeypatch):
    monkeypatch.setattr(_late, "at_once", lambda x: False)
    monkeypatch.setattr(_late, "carrier", lambda x: Played)
    Played.made, loss_fn = [], RetrievalLoss()
    loss_fn(X, torch.eye(6), X)
    loss_fn(X, -torch.eye(6), X)
    for answer in Played.made:
        answer.there = True
    with pytest.raises(ValueError, match="at forward 2: RetrievalLoss: relevance must be finite"):
        loss_fn(X, Y)


def test_bad_functional_arguments():
    memory = P.init_memory(4, 3)
    with pytest.raises(TypeError, match=r"retrieval_loss\(\) got an unexpected keyword .*'k'"):
        retrieval_loss(X, Y, None, 0.1, k=3)
    for bad in (4, tuple(memory)):
        for call in (P.reset_memory, lambda m: retrieval_loss(X, Y, m, 0.1)):
            with pytest.raises(TypeError, match="memory must be a MemoryState, got"):
                call(bad)
    with pytest.raises(ValueError, match=r"embeddings must be \[N, D=3\] as in the memory"):
        retrieval_loss(X, Y, memory, 0.1)
    with pytest.raises(ValueError, match=r"ref_labels must be \[N, L=2\] bool as in the memory"):
        retrieval_loss(X, Y, P.init_memory(4, WIDTH, num_labels=2), 0.1, ref_embeddings=X,
                       ref_labels=Y)  # fmt: skip
    with pytest.raises(ValueError, match="tau must be positive"):
        retrieval_loss(X, Y, None, 0.0)
    with pytest.raises(ValueError, match="where must be one bool for the whole batch"):
        P.enqueue_embeddings(memory, X[:, :3], Y, where=Y > 2)
    for sizes in ((0, 3), (4, 0)):
        with pytest.raises(ValueError, match="must be >= 1, got 0"):
            P.init_memory(*sizes)
    with pytest.raises(ValueError, match="num_labels must be >= 1"):
        P.init_memory(4, 3, num_labels=0)


def test_it_is_a_module_of_few_words():
    assert repr(module()).startswith("RetrievalLoss(\n  'ap', memory_size=10, similarity='cosine'")
    net = nn.Sequential(nn.Linear(2, WIDTH), module())
    assert {n for n, _ in net.named_buffers()} >= {"1._tau", "1._queue._q_embeddings"}
