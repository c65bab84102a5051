"""Pools sharded over processes against the same pool in one process."""

import pytest
import torch

from . import shards
from .processes import run
from .shards import ASKED, CUTS, INTERPOLATIONS, KINDS, LOCAL, make_pool, value_and_grads

# Both sides are within RTOL = 1e-12 of the exact sums, gradients within 3 RTOL of their natural
# scale; the gradient of tau takes differences of scores over the whole range.
CLOSE = 1e-10


@pytest.fixture(scope="module")
def processes() -> list[dict]:
    """What each process found in the groups it is in."""
    return run(max(CUTS), shards.worker)


@pytest.fixture(params=CUTS, ids=lambda world: f"{world}_processes")
def found(request, processes) -> list[dict]:
    """What each process of one group found."""
    return [out[request.param] for out in processes[: request.param]]


def assert_near(got, want, scale) -> None:
    torch.testing.assert_close(got, want, rtol=0.0, atol=CLOSE * scale.abs().max().item())


@pytest.mark.parametrize("name", ASKED)
def test_values_and_gradients_are_those_of_one_process(found, name):
    world = len(found)
    for cuts, kind, asked, method in shards.cases(world):
        if asked != name:
            continue
        value, grads = value_and_grads(name, make_pool(sum(cuts), kind), method="dense")
        assert value.abs().max() > 0.01
        first = found[0]["found"][cuts, kind, name, method]
        for rank, out in enumerate(found):
            got, got_grads = out["found"][cuts, kind, name, method]
            mine = slice(sum(cuts[:rank]), sum(cuts[: rank + 1]))
            assert_near(got, value[..., mine] if name in LOCAL else value, value)
            for g, w in zip(got_grads[:2], grads[:2], strict=True):
                # Every rank back-propagates its own copy of the loss. Where all terms saturate,
                # what is left is measured by what a pair may pull, about 1 / (4 tau).
                assert_near(g / world, w[:, mine], w.abs().max().clamp(min=0.8))
            if kind in ("normal", "ties"):
                assert_near(got_grads[2], grads[2], grads[2])
            assert torch.equal(got_grads[2], first[1][2])  # to the bit
            assert name in LOCAL or torch.equal(got, first[0])


def test_quantiles_are_exactly_those_of_torch(found):
    levels = torch.tensor([0.0, 0.003, 0.3, 0.5, 0.77, 1.0], dtype=torch.float64)
    cases = found[0]["quantiles"]
    assert len(cases) == len(CUTS[len(found)]) * len(KINDS) * 2 * len(INTERPOLATIONS) * 2
    for (cuts, kind, dtype, interpolation, masked), got in cases.items():
        pool = make_pool(sum(cuts), kind, dtype=getattr(torch, dtype.removeprefix("torch.")))
        for row, scores, valid in zip(got, pool.scores, pool.valid, strict=True):
            kept = scores[valid] if masked else scores
            want = torch.quantile(kept, levels.to(kept.dtype), interpolation=interpolation)
            assert torch.equal(row, want)
        for out in found[1:]:
            assert torch.equal(out["quantiles"][cuts, kind, dtype, interpolation, masked], got)


def test_ddp_gradients_are_those_of_one_process(found):
    for cuts in CUTS[len(found)]:
        loss, grads = shards.train(cuts, None, None)
        for out in found:
            got, got_grads = out["train", cuts]
            assert_near(got, loss, loss)
            for g, w in zip(got_grads, grads, strict=True):
                assert w.abs().max() > 1e-4, "a gradient of zero would prove nothing"
                assert_near(g, w, w)


def test_a_score_that_is_not_finite_reaches_every_rank(found):
    for key in found[0]["broken"]:
        targets = spoilt = 0
        for value, grads in (out["broken"][key] for out in found):
            bad, good = value
            seen = bad[bad != 0.0] if key[0] in LOCAL else bad  # 0 off the targets
            targets += seen.numel()
            assert seen.isnan().all()
            assert good.isfinite().all()
            spoilt += int(grads[0][0].isnan().sum())
            assert grads[0][1:].isfinite().all()
        assert min(targets, spoilt) >= len(found)


def test_errors_are_raised_on_every_rank_alike(found):
    for out in found:
        said = out["errors"]
        assert said["tau"].startswith("ValueError: tau differs between the processes")
        for name in ("sums", "precision"):
            assert said[f"twice {name}"].startswith("NotImplementedError: second derivatives")


def test_a_process_outside_the_group_is_told_so(processes):
    assert processes[-1]["outside"] == "ValueError: group: this process is not a member"


def test_several_tensors_are_gathered_at_once_and_differentiated_twice(found):
    world = len(found)
    rows = torch.cat([torch.arange(3.0)[: 3 - k % 2] for k in range(world)]).double()
    for rank, out in enumerate(found):
        got, x = out["gathers"], torch.arange(3.0).double()[: 3 - rank % 2]
        assert torch.equal(got["rows"][:, 0], rows)
        assert torch.equal(got["flags"], rows > 0)
        # Each rank's loss has the gradient 3 x^2; its derivative is summed over the copies again.
        assert torch.equal(got["first"][:, 0], world * 3.0 * x**2)
        assert torch.equal(got["second"][:, 0], world * 6.0 * x)


def test_what_is_sent_is_what_the_plan_foresees(found):
    for out in found:
        assert len(out["wire"]) == 2 * len(shards.WIRES)
        for (name, rows, kind), (counted, foreseen, how) in out["wire"].items():
            assert counted == foreseen, (name, rows, kind, how)
            assert (rows, kind, how) in shards.WIRES
            if how == "direct":  # kilobytes, whatever the rows
                assert counted[0] < 20_000
