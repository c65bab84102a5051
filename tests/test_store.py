"""``store=False``: the loss of a batch that leaves the queue as it is."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import proxy_losses as P

from . import processes
from .compiling import compile_fresh
from .makers import batch, every_loss, smooth, some_losses, warned
from .test_label_mask import EXTRA

pytestmark = pytest.mark.filterwarnings("ignore:.*dispersion")


@every_loss
@pytest.mark.parametrize("labels", [False, True])
def test_the_loss_is_that_of_a_call_that_stores(make, labels):
    module = make(num_classes=3, queue_size=12)
    module(*batch(0, 9, 3))
    logits, targets = batch(1, 9, 3)
    extra = {"sample_weight": torch.rand(9) + 0.1, "query_ids": torch.arange(9) % 2}
    if labels:
        targets, extra["label_mask"] = torch.rand(9, 3) < 0.5, torch.rand(9, 3) < 0.9
    before, twin = copy.deepcopy(module), copy.deepcopy(module)
    losses = [module(logits, targets, **extra, store=False) for _ in range(3)]
    assert [x.shape for x in module.buffers()] == [x.shape for x in before.buffers()]
    assert all(map(torch.equal, module.buffers(), before.buffers()))
    want = twin(logits, targets, **extra)
    assert all(loss == want for loss in losses)
    stored = module(logits, targets, **extra, store=True)
    assert stored == want
    assert all(map(torch.equal, module.buffers(), twin.buffers()))
    a, b = (torch.autograd.grad(x, logits)[0] for x in (losses[1], want))
    assert torch.equal(a, b)


@every_loss
def test_true_does_not_store_where_the_mode_does_not(make):
    module = make(queue_size=12).eval()
    module(*batch(0, 9), store=True)
    assert module._queue.state.enqueued == 0
    writes = make(queue_size=12, update_queue_in_eval=True).eval()
    writes(*batch(0, 9), store=False)
    assert writes._queue.state.enqueued == 0
    writes(*batch(0, 9))
    assert writes._queue.state.enqueued == 9


@every_loss
def test_it_must_be_a_flag(make):
    module = make(num_classes=3)
    with pytest.raises(TypeError, match="store must be True or False, got str"):
        module(*batch(0, 9, 3), store="no")
    with pytest.raises(TypeError, match="store must be True or False, got NoneType"):
        P.LossWarmupWrapper(nn.CrossEntropyLoss(), module)(*batch(0, 9, 3), store=None)


@pytest.mark.filterwarnings("ignore:.*max_pool_size")
@every_loss
def test_it_spends_no_draw(make):
    module = make(num_classes=3, queue_size=12, max_pool_size=10)
    module(*batch(0, 9, 3))
    drawn = [module(*batch(1, 9, 3), store=False) for _ in range(3)]
    assert drawn[0] == drawn[1] == drawn[2] == module(*batch(1, 9, 3))
    assert module._draws == 2


@some_losses
def test_compiled(make):
    module = make(num_classes=3, queue_size=12)
    module(*batch(0, 9, 3))
    twin = copy.deepcopy(module)
    call, compiles = compile_fresh(module, "aot_eager")
    for k in range(3):
        rows = batch(k, 9, 3)
        torch.testing.assert_close(call(*rows, store=False), twin(*rows, store=False))
        assert all(map(torch.equal, module.buffers(), twin.buffers()))
        torch.testing.assert_close(call(*rows), twin(*rows))
        assert all(map(torch.equal, module.buffers(), twin.buffers()))
    assert compiles() == 2


def train(passes: int):
    """A run that looks at each batch several times more than it trains on it."""
    torch.manual_seed(0)
    model, loss_fn = nn.Linear(8, 1), smooth(queue_size=64)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for step in range(3):
        torch.manual_seed(step)
        x, y = torch.randn(12, 8), torch.arange(12) % 2
        for _ in range(passes):
            loss_fn(model(x), y, store=False).backward()
        optimizer.zero_grad()
        loss_fn(model(x), y).backward()
        optimizer.step()
    return model, loss_fn


def test_passes_that_do_not_store_do_not_change_a_run():
    (model, loss_fn), (other, several) = train(0), train(3)
    assert all(map(torch.equal, model.parameters(), other.parameters()))
    assert all(map(torch.equal, loss_fn.buffers(), several.buffers()))
    assert several._queue.state.enqueued == 36


def test_sam_takes_the_gradient_at_the_perturbed_weights_of_the_batch_alone():
    torch.manual_seed(0)
    model, loss_fn = nn.Linear(8, 1), smooth(queue_size=64)
    x, y = torch.randn(12, 8), torch.arange(12) % 2
    loss_fn(model(x), y, store=False).backward()
    step = 0.05 * model.weight.grad / model.weight.grad.norm()
    model.zero_grad()
    with torch.no_grad():
        model.weight += step
    loss_fn(model(x), y).backward()
    alone = copy.deepcopy(model)
    alone.zero_grad()
    smooth(queue_size=0)(alone(x), y).backward()
    assert torch.equal(model.weight.grad, alone.weight.grad)
    assert loss_fn._queue.state.enqueued == 12


def test_lbfgs_evaluates_one_function():
    torch.manual_seed(0)
    model, loss_fn = nn.Linear(8, 1), smooth(queue_size=64)
    bare = copy.deepcopy(model)
    x, y = torch.randn(12, 8), torch.arange(12) % 2
    for net, loss, extra in ((model, loss_fn, {"store": False}), (bare, smooth(queue_size=0), {})):
        optimizer = torch.optim.LBFGS(net.parameters(), max_iter=5, line_search_fn="strong_wolfe")

        def closure():
            optimizer.zero_grad()  # noqa: B023
            value = loss(net(x), y, **extra)  # noqa: B023
            value.backward()
            return value

        optimizer.step(closure)
    assert all(map(torch.equal, model.parameters(), bare.parameters()))
    loss_fn(model(x), y)
    assert loss_fn._queue.state.enqueued == 12


def test_the_wrapper_passes_it_to_what_declares_it():
    x, y = batch(0, 9, 3)
    warm = smooth(num_classes=3, queue_size=20)
    main = smooth(num_classes=3, queue_size=20)
    wrapper = P.LossWarmupWrapper(warm, main, warmup_steps=1, blend_steps=1)
    for step, stored in ((0, (9, 0)), (1, (18, 9)), (2, (18, 18))):
        wrapper.on_train_batch_start(step)
        want = wrapper(x, y, store=False)
        assert wrapper(x, y) == want
        assert tuple(int(m._queue.state.enqueued) for m in (warm, main)) == stored
    assert wrapper(x, y, store=False, return_per_class=True)[0] == wrapper(x, y, store=False)
    for main in (nn.CrossEntropyLoss(), lambda x, y: x.sum()):  # they store nothing
        with pytest.warns(UserWarning, match="no attribute 'temperature'"):
            plain = P.LossWarmupWrapper(nn.CrossEntropyLoss(), main, warmup_steps=1)
        for step in (0, 1):
            plain.on_train_batch_start(step)
            assert plain(x, y, store=False) == plain(x, y)


@pytest.mark.parametrize("which", ["warmup", "main"])
def test_a_compiled_loss_in_the_wrapper_hears_of_it(which):
    torch.compiler.reset()
    inner = smooth(num_classes=3, queue_size=20)
    loss = torch.compile(inner, backend="eager")
    pair = (loss, smooth(num_classes=3)) if which == "warmup" else (nn.CrossEntropyLoss(), loss)
    wrapper = P.LossWarmupWrapper(*pair, warmup_steps=int(which == "warmup"))
    wrapper.on_train_batch_start(0)
    wrapper(*batch(0, 9, 3), store=False)
    assert inner._queue.state.enqueued == 0
    wrapper(*batch(0, 9, 3))
    assert inner._queue.state.enqueued == 9


def worker(rank: int) -> dict:
    out = {}
    rows = slice(0, 4) if rank == 0 else slice(4, 9)
    for name, extra in EXTRA.items():
        for how in ("gather", "shard"):
            module = getattr(P, name)(3, queue_size=30, temperature=0.3, distributed=how, **extra)
            losses, counts = [], []
            for step in range(3):
                logits, targets = batch(step, 9, 3)
                for store in (False, True):
                    loss = module(logits[rows], targets[rows], store=store)
                    losses.append(loss.item())
                    counts.append(int(module._queue.state.enqueued))
            out[name, how] = losses, counts
    return out


def test_of_several_processes():
    for own, found in zip((4, 5), processes.run(2, worker), strict=True):
        for (_, how), (losses, counts) in found.items():
            rows = 9 if how == "gather" else own
            assert counts == [0, rows, rows, 2 * rows, 2 * rows, 3 * rows]
            for k in (0, 2, 4):
                assert losses[k] == pytest.approx(losses[k + 1], rel=1e-6)


def test_a_validation_left_in_training_mode_stores_nothing():
    module = smooth(queue_size=20)
    module(*batch(0, 9))
    with torch.no_grad():
        assert warned(lambda: module(*batch(1, 9), store=False)) == []
    assert module._queue.state.enqueued == 9


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("kind", ["queue", "cap", "memory"])
@pytest.mark.filterwarnings("ignore:.*(gradients are disabled|max_pool_size)")
def test_a_forward_that_a_backward_computes_anew_is_refused(kind, reentrant):
    module = {
        "queue": lambda: smooth(queue_size=20),
        "cap": lambda: smooth(queue_size=0, max_pool_size=4),
        "memory": lambda: P.RetrievalLoss(memory_size=20, embedding_dim=1),
    }[kind]()
    loss = checkpoint(module, *batch(0, 9), use_reentrant=reentrant)
    before = copy.deepcopy(module.state_dict())
    with pytest.raises(RuntimeError, match=r"inside a backward.*call the loss outside"):
        loss.backward()
    assert all(map(torch.equal, module.state_dict().values(), before.values()))
    for steady in (lambda *of: module(*of, store=False), copy.deepcopy(module).eval()):
        (a, targets), (b, _) = batch(1, 9), batch(1, 9)
        checkpoint(steady, a, targets, use_reentrant=reentrant).backward()
        module(b, targets, store=False).backward()
        if kind != "cap":  # which eval mode ranks too
            assert torch.equal(a.grad, b.grad)
