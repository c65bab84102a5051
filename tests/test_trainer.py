"""The trainer of the benchmarks trains every network of a stack as a plain loop would."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import binary_cross_entropy_with_logits as bce_loss

import proxy_losses as P
from benchmarks.trainer import Arm, Budget, Part, Queued, Training, average_precision, each, scores

SEEDS, ROWS, STEPS = 2, 40, 6
RATES = (1e-2, 1e-2, 3e-2)  # two tensors, of two configurations and of one


def problem():
    draw = torch.Generator().manual_seed(0)
    shapes = ((4, 3), (1, 3), (3, 1), (1, 1))
    weights = [torch.randn(SEEDS, *s, generator=draw, dtype=torch.float64) for s in shapes]
    x = torch.randn(SEEDS, ROWS, 4, generator=draw, dtype=torch.float64)
    order = torch.randint(0, ROWS, (SEEDS, STEPS, 8), generator=draw)
    return Part(x, x[..., 0] > 0.5), weights, order


def scaled(value, setup):
    return lambda found, y, *_: value * bce_loss(found, y.double())


ARM = Arm("scaled", each(scaled), RATES, "scale", (1.0, 2.0, 1.0))


@pytest.mark.parametrize("batched", [False, True])
@pytest.mark.parametrize("fall", [False, True])
def test_each_network_is_that_of_a_plain_loop(batched, fall):
    part, start, order = problem()
    budget = Budget(STEPS, fall=fall)
    training = Training(part, ARM, start, budget, order if batched else None)
    looks = dict(training.after([0, 2, STEPS]))
    for s in range(SEEDS):
        for k, (rate, value) in enumerate(zip(RATES, ARM.values, strict=True)):
            weights = [w[s].clone().requires_grad_() for w in start]
            optimizer = torch.optim.Adam(weights, rate)
            for step in range(STEPS + 1):
                if step in looks:
                    for found, expected in zip(looks[step], weights, strict=True):
                        torch.testing.assert_close(found[s, k], expected)
                rows = order[s, min(step, STEPS - 1)] if batched else slice(None)
                optimizer.param_groups[0]["lr"] = rate * (1 - (step + 1) / STEPS if fall else 1)
                w1, b1, w2, b2 = weights
                found = ((part.x[s, rows] @ w1 + b1).relu() @ w2 + b2)[:, 0]
                optimizer.zero_grad()
                (value * bce_loss(found, part.y[s, rows].double())).backward()
                optimizer.step()


def test_the_best_look_of_each_network_is_kept():
    part, start, _ = problem()
    values = iter(torch.tensor([
        [[0.5, 0.5, 0.9], [0.1, 0.1, 0.1]],
        [[0.6, 0.5, 0.1], [0.1, 0.2, 0.1]],
        [[0.6, 0.7, 0.1], [0.1, 0.3, 0.1]],
        [[0.1, 0.6, 0.9], [0.1, 0.4, 0.8]],
    ], dtype=torch.float64))  # fmt: skip
    training = Training(part, ARM, start, Budget(6, 2))
    seen = []
    fitted = training.fit(lambda now: seen.append(now) or next(values))
    assert fitted.step.tolist() == [[2, 4, 0], [0, 6, 6]]
    assert fitted.value.tolist() == [[0.6, 0.7, 0.9], [0.1, 0.4, 0.8]]
    assert fitted.evaluations == 4
    for found, at_2 in zip(fitted.weights, seen[1], strict=True):
        assert torch.equal(found[0, 0], at_2[0, 0])
    chosen, weights = fitted.choose()
    assert chosen.tolist() == [2, 2]
    assert torch.equal(weights[0][1], seen[3][0][1, 2])
    torch.testing.assert_close(weights[0][0], start[0][0], rtol=0, atol=0)


def test_patience_ends_a_network():
    part, start, _ = problem()
    values = iter(torch.tensor([[[0.1, 0.1, 0.1]] * 2, [[0.1, 0.2, 0.1]] * 2,
                                [[0.3, 0.1, 0.1]] * 2, [[0.1, 0.3, 0.9]] * 2]))  # fmt: skip
    training = Training(part, ARM, start, Budget(6, 2, patience=4))
    assert training.fit(lambda now: next(values)).step.tolist() == [[4, 6, 0]] * 2


def test_a_loss_may_ask_for_the_scores_of_all_rows():
    part, start, order = problem()
    seen = []

    def make(setup):
        def loss(found, batch):
            everything = setup.score()
            seen.append((setup.before(), everything))
            rows = batch.rows[:, None].expand(found.shape)
            torch.testing.assert_close(everything.gather(2, rows), found.detach())
            return found.square().mean(-1)

        return loss

    [*Training(part, ARM._replace(make=make), start, Budget(STEPS), order).after([2])]
    before = scores([w[:, None] for w in start], part.x)[:, 0]
    torch.testing.assert_close(seen[1][0], before)
    assert not torch.allclose(seen[1][1][:, 0], before)


def test_average_precision_is_by_list():
    y = torch.tensor([[True, False, False], [False, True, False]])
    found = average_precision(torch.tensor([[3.0, 2, 1], [1.0, 2, 3]]).expand(2, 2, 3), y)
    assert found.tolist() == [[1.0, 1 / 3], [0.5, 0.5]]


@pytest.mark.parametrize("rows", [0, 6])
@pytest.mark.parametrize("models", [1, 3])
def test_every_model_has_its_own_queue(rows, models):
    draw = torch.Generator().manual_seed(1)
    ranking, tau = Queued(P.smooth_ap_loss, rows, models), torch.rand(models, generator=draw)
    alone = [P.init_queue(rows, 1) if rows else None for _ in range(models)]
    for step in range(4):
        s = torch.randn(models, 8, generator=draw)
        y = torch.arange(8).expand(models, 8) % 3 == 0
        if step == 2:  # the first model starts again
            ranking.clear(torch.arange(models) == 0)
            alone[0] = P.init_queue(rows, 1) if rows else None
        found = ranking(s, y, tau)
        for k in range(models):
            expected, alone[k] = P.smooth_ap_loss(s[k, :, None], y[k].long(), alone[k], tau[k])
            torch.testing.assert_close(found[k], expected)
