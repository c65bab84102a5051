"""The queue as a value under transforms: vmap, compile, gradients."""

import pytest
import torch
from torch._dynamo.testing import CompileCounter

import proxy_losses as P
from proxy_losses import QueueState, _queue, enqueue, init_queue, queue_rows, reset_queue

from .compiling import compile_fresh
from .test_queue import IGNORE, Batch, same, with_room


def stack(states):
    return QueueState(*map(torch.stack, zip(*states, strict=True)))


@pytest.mark.parametrize("n", [0, 1, 3, 4, 9])
def test_vmap_over_stacked_queues(n):
    queues = [with_room(init_queue(4, 2)), Batch(2, 2, 10).into(init_queue(4, 2))]
    queues.append(Batch(7, 2, 40).into(queues[1]))
    batches = [Batch(n, 2, 100 * k) for k in range(3)]
    keep = torch.tensor([True, False, True])

    def push(queue, x, y, weight, iid, query_ids, where):
        extras = {"sample_weight": weight, "iid_mask": iid, "query_ids": query_ids}
        new = enqueue(queue, x, y, where=where, **extras)
        return new, queue_rows(new), reset_queue(new)

    args = [(b.logits, b.targets, *b.extras.values()) for b in batches]
    columns = map(torch.stack, zip(*args, strict=True))
    mapped, mapped_rows, empty = torch.vmap(push)(stack(queues), *columns, keep)
    looped = [push(q, *a, k) for q, a, k in zip(queues, args, keep, strict=True)]
    assert same(mapped, stack([new for new, _, _ in looped]))
    for got, *want in zip(mapped_rows, *(rows for _, rows, _ in looped), strict=True):
        assert torch.equal(got, torch.stack(want))
    assert same(empty, stack([e for _, _, e in looped]))


def test_vmap_over_batches_of_one_queue():
    queue, logits = init_queue(3, 1), torch.randn(5, 2, 1)
    targets = torch.tensor([0, 1])
    mapped = torch.vmap(lambda x: enqueue(queue, x, targets).logits)(logits)
    assert same(mapped, [enqueue(queue, x, targets).logits for x in logits])


@pytest.mark.parametrize("n", [3, 8, 11])
def test_compiles_once_over_steps(n):
    torch.compiler.reset()
    counter = CompileCounter()

    def push(queue, logits, targets, query_ids, where):
        queue = enqueue(queue, logits, targets, query_ids=query_ids, where=where)
        return queue, queue_rows(queue)[2]

    compiled = torch.compile(push, backend=counter, fullgraph=True)
    queue = with_room(init_queue(8, 2, ignore_index=IGNORE))
    for k in range(20):
        batch = Batch(n, 2, 10 * k)
        args = (
            queue,
            batch.logits,
            batch.targets,
            batch.extras["query_ids"],
            torch.tensor(k % 5 != 2),
        )
        (queue, valid), (want, want_valid) = compiled(*args), push(*args)
        assert isinstance(queue, QueueState)
        assert same([*queue, valid], [*want, want_valid])
    assert counter.frame_count == 1
    assert queue.enqueued.item() == 16 * {3: 3, 8: 8, 11: 16}[n]  # 11 rows end a second turn


def test_the_default_compiler_agrees():
    batch, queue = Batch(7, 2, 30), Batch(3, 2).into(init_queue(4, 2))
    compiled, _ = compile_fresh(enqueue)
    assert same(
        compiled(queue, batch.logits, batch.targets), enqueue(queue, batch.logits, batch.targets)
    )


def test_the_gradient_is_cut():
    targets = torch.tensor([0, 1, 0])
    x = torch.randn(3, 2, requires_grad=True)
    queue = enqueue(init_queue(4, 2), x, targets, sample_weight=x[:, 0])
    assert not any(field.requires_grad for field in queue)

    def loss(x):
        queue = enqueue(init_queue(4, 2), x, targets, sample_weight=x[:, 0])
        stored = queue_rows(queue)[0].sum() + queue.sample_weight.sum()
        return 2.0 * x.sum() + stored, queue

    for grad in (torch.func.grad, torch.func.jacrev):
        g, queue = grad(loss, has_aux=True)(x.detach())
        assert torch.equal(g, torch.full_like(x, 2.0))  # 3 if stored rows carried a gradient
        assert torch.equal(queue.logits[:3], x.detach())
    g, queues = torch.vmap(torch.func.grad(loss, has_aux=True))(torch.randn(5, 3, 2))
    assert torch.equal(g, torch.full((5, 3, 2), 2.0))
    assert queues.logits.shape == (5, 4, 2)


@pytest.mark.slow
def test_a_whole_step_reads_the_queue_before_it_is_written():
    """Inductor once wrote the new rows in place, where the loss of the step still read the old."""
    sched = P.Schedule(warmup_steps=2, blend_steps=2, temp_start=0.5, temp_end=0.1)

    def step(params, queue, state, x, y, k):
        reset, state = P.start_step(state, k, sched)
        empty = reset_queue(queue)
        queue = QueueState(*(torch.where(reset, a, b) for a, b in zip(empty, queue, strict=True)))

        def total(params):
            logits = torch.tanh(x @ params["a"]) @ params["b"]
            tau = P.state_temp(state, sched)
            loss, new = P.recall_at_quantile_loss(logits, y, queue, tau, quantile=0.3)
            return P.state_weight(state, sched) * loss, (loss, new)

        grad, (loss, new) = torch.func.grad(total, has_aux=True)(params)
        return grad, new, state, loss

    g = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    params = {"a": draw(4, 8), "b": draw(8, 3)}
    queue, state = init_queue(10, 3, dtype=torch.float64), P.init_schedule(sched)
    batches = [(draw(7, 4), torch.randint(0, 3, (7,), generator=g)) for _ in range(2)]
    _, queue, state, _ = step(params, queue, state, *batches[0], torch.tensor(0))
    args = params, queue, state, *batches[1], torch.tensor(1)
    _, new, _, loss = compile_fresh(step)[0](*args)
    _, kept, _, want = step(*args)
    torch.testing.assert_close(loss, want)
    torch.testing.assert_close(new.logits, kept.logits)


@pytest.mark.parametrize("labels", [False, True])
@pytest.mark.parametrize("query_ids", [False, True])
def test_the_form_without_branches_stores_the_same(labels, query_ids, monkeypatch):
    """What compiled code uses, where the number of rows may be one that nobody knows."""
    one = two = init_queue(4, 2, ignore_index=-7, multi_label=labels)
    for step, n in enumerate([3, 0, 1, 4, 2, 9, 3, 5, 1]):
        torch.manual_seed(step)
        targets = torch.rand(n, 2) < 0.5 if labels else torch.randint(0, 2, (n,))
        extras = {
            "sample_weight": torch.rand(n) if step % 2 else None,
            "iid_mask": torch.rand(n) < 0.5 if step % 3 else None,
            "query_ids": torch.randint(0, 9, (n,)) if query_ids and step != 4 else None,
            "where": torch.tensor(step != 3),
        }
        logits = torch.randn(n, 2)
        one = enqueue(one, logits, targets, **extras)
        with monkeypatch.context() as unsized:
            unsized.setattr(_queue, "size_known", lambda size: False)
            two = enqueue(two, logits, targets, **extras)
        assert all(map(torch.equal, one, two))
