"""Several processes train as one: all losses, gathered and sharded, through DDP."""

from __future__ import annotations

import pytest

from proxy_losses import distributed
from proxy_losses.doctor import _proof
from proxy_losses.doctor.__main__ import TOLERANCE

EVERY = tuple(_proof.KINDS)
# Ranks, thresholds, pairs: more processes are the same code once three agree on every loss.
FEW = ("SmoothAPLoss", *(kind for kind in EVERY if kind.startswith("PAUCAtBudgetLoss")))


@pytest.mark.parametrize(
    ("world", "kinds"),
    [
        (1, EVERY), (2, EVERY), pytest.param(3, EVERY, marks=pytest.mark.slow),
        pytest.param(4, FEW, marks=pytest.mark.slow),
    ],
    ids=[1, 2, 3, 4],
)  # fmt: skip
def test_gradients_and_queues_are_those_of_one_process(world, kinds):
    todo = _proof.cases(world, kinds)
    assert {(c.kind, c.distributed) for c in todo} == {
        (kind, how) for kind in kinds for how in ("gather", "shard")
    }
    for case, result in zip(todo, _proof.prove(world, todo), strict=True):
        # Float64 sums of a few hundred terms; sharded ranks promise rtol = 1e-12.
        assert result.gradient <= TOLERANCE, case
        assert result.loss <= 1e-12, case
        assert result.queue == 0.0, case


def local_slice(ctx, *grads):
    """The backward of a gather that forgets the losses of the other processes."""
    return None, *(None if g is None else g[: ctx.rows] for g in grads)


def _process_with_a_wrong_gather(rank, world, backend, folder, todo):
    distributed._AllGather.backward = staticmethod(local_slice)
    _proof._process(rank, world, backend, folder, todo)


def test_a_wrong_gather_would_show(monkeypatch):
    """Guard of the guard."""
    monkeypatch.setattr(_proof, "PROCESS", _process_with_a_wrong_gather)
    (result,) = _proof.prove(2, [_proof.Case("SmoothAPLoss", "gather", (16, 16))])
    assert result.gradient > 0.1
