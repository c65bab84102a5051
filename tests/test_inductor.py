"""A sample of the contract matrix under inductor, the backend that people run.

Programs hold several metrics, as making kernels takes most of the time. Values are compared with
eager ones in float64, to a few roundings (TIGHT), and in float32 where that is what is asked.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.func import grad, jacrev, vmap

import proxy_losses as P

from .compiling import compile_fresh
from .makers import PAD
from .metrics import METRICS, TAU, TIGHT, lists

pytestmark = pytest.mark.slow

BAND = {"beta": 0.5, "quantile_interpolation": "linear"}
# Both are float32 sums of a few dozen terms in [0, 1], in some order: 1e-6, and 3e-6 for gradients.
LOOSE = {"rtol": 2e-6, "atol": 1e-6}
MODES = [
    ("backward", "along"),  # across: in the test of columns
    ("grad", "across"),
    ("vmap(grad)", "across"),
    ("jacrev", "along"),
]


@pytest.mark.parametrize(("mode", "lie"), MODES)
def test_metrics_along_and_across(mode, lie):
    """Every metric, of lists on the last axis and of lists in the columns of a batch."""
    scores, pos = lists(13, 3, 20)
    tau = torch.tensor(TAU, dtype=torch.float64)

    def each(s: Tensor, p: Tensor) -> Tensor:
        return torch.stack([m.fn(s, p, tau) for m in METRICS])

    def total(s: Tensor, p: Tensor) -> Tensor:
        return (each(s, p) * torch.arange(1.0, 1.0 + len(METRICS), dtype=s.dtype)[:, None]).sum()

    def one_list(s: Tensor, p: Tensor) -> Tensor:
        return each(s[None], p[None]).sum()

    def weighted(s: Tensor, p: Tensor) -> Tensor:
        return each(s, p).T @ torch.arange(1.0, 1.0 + len(METRICS), dtype=s.dtype)

    fns = {
        "backward": each,
        "grad": grad(total),
        "vmap(grad)": vmap(grad(one_list)),
        "jacrev": jacrev(weighted),
    }
    fn = fns[mode]
    compiled, _ = compile_fresh(fn)
    s, p = (x.T.contiguous().T for x in (scores, pos)) if lie == "across" else (scores, pos)
    s = s.detach().requires_grad_(mode == "backward")
    got, want = compiled(s, p), fn(scores, pos)
    torch.testing.assert_close(got, want, **TIGHT)
    if mode == "backward":
        got.square().sum().backward()
        want = grad(lambda x: each(x, pos).square().sum())(scores)
        torch.testing.assert_close(s.grad, want, **TIGHT)


def test_masks_weights_and_columns():
    """A batch as a model gives it: [N, C] logits and labels, known labels, weights per row."""
    torch.manual_seed(0)
    logits = torch.randn(40, 3, requires_grad=True)
    labels, known = torch.rand(40, 3) < 0.4, torch.rand(40, 3) < 0.8
    labels[0], labels[1], known[:2] = True, False, True
    weight = torch.rand(40, 1) + 0.5
    tau = torch.tensor(TAU)

    def fn(x: Tensor) -> tuple[Tensor, ...]:
        given = {"valid_mask": known.T, "sample_weight": weight.expand(-1, 3).T}
        return tuple(m.fn(x.T, labels.T, tau, **given) for m in METRICS)

    compiled, _ = compile_fresh(fn)
    for k, metric in enumerate(METRICS):
        got, want = compiled(logits)[k], fn(logits)[k]
        torch.testing.assert_close(got, want, **LOOSE, msg=lambda m, of=metric: f"{of.name}: {m}")
        a, b = (torch.autograd.grad(x.sum(), logits)[0] for x in (got, want))
        torch.testing.assert_close(a, b, **LOOSE, msg=lambda m, of=metric: f"{of.name}: {m}")


def ranking() -> dict[str, nn.Module]:
    common = {"num_classes": 3, "queue_size": 16, "temperature": 0.25}
    return {
        "SmoothAPLoss": P.SmoothAPLoss(**common),
        "PAUCAtBudgetLoss": P.PAUCAtBudgetLoss(**common, **BAND),
    }


@pytest.mark.parametrize("name", ranking())
def test_loss_modules_step_by_step(name):
    """Two steps with a queue, a ragged last batch and logits that lie across.

    The step of every loss, of one class: `doctor._local.compiled`.
    """
    eager, module = ranking()[name], ranking()[name]
    compiled, _ = compile_fresh(module)
    for step, rows in enumerate((12, 7)):
        torch.manual_seed(step)
        across = torch.randn(3, rows).T
        targets = torch.where(torch.arange(rows) == 3, PAD, torch.arange(rows) % 3)
        weight = torch.rand(rows) + 0.5
        leaves = [across.detach().requires_grad_() for _ in range(2)]
        got = compiled(leaves[0], targets, sample_weight=weight)
        want = eager(leaves[1], targets, sample_weight=weight)
        torch.testing.assert_close(got, want, **LOOSE)
        got.backward()
        want.backward()
        torch.testing.assert_close(leaves[0].grad, leaves[1].grad, **LOOSE)
        for a, b in zip(module.buffers(), eager.buffers(), strict=True):
            assert torch.equal(a, b)


def focal_batch(rows: int) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(rows)
    return torch.randn(3, rows).T, torch.rand(3, rows).T.round(), torch.arange(rows) % 3


def test_focal_losses_of_several_settings():
    sigmoid = [P.SigmoidFocalLoss(gamma=g, alpha=a) for g, a in ((2.0, 0.25), (1.5, 0.7), (0, -1))]
    softmax = [P.SoftmaxFocalLoss(gamma=g, label_smoothing=e) for g, e in ((2.0, 0.0), (0.5, 0.1))]

    def every(x: Tensor, labels: Tensor, ids: Tensor) -> Tensor:
        return torch.stack([f(x, labels) for f in sigmoid] + [f(x, ids) for f in softmax])

    compiled, _ = compile_fresh(every)
    for rows in (12, 7):
        x, labels, ids = focal_batch(rows)
        leaves = [x.detach().requires_grad_() for _ in range(2)]
        got, want = compiled(leaves[0], labels, ids), every(leaves[1], labels, ids)
        torch.testing.assert_close(got, want, **LOOSE)
        got.sum().backward()
        want.sum().backward()
        torch.testing.assert_close(leaves[0].grad, leaves[1].grad, **LOOSE)


@pytest.mark.parametrize("dynamic", [None, True], ids=["static", "dynamic"])
def test_losses_of_other_settings_in_one_program(dynamic):
    common = {"num_classes": 1, "queue_size": 0, "temperature": 0.3}
    losses = [
        *(P.RecallAtQuantileLoss(**common, quantile=q) for q in (0.1, 0.2)),
        *(P.PAUCAtBudgetLoss(**common, **{**BAND, "beta": b}) for b in (0.4, 0.6)),
    ]

    def together(x: Tensor, y: Tensor) -> Tensor:
        return torch.stack([loss(x, y) for loss in losses])

    torch.compiler.reset()
    compiled = torch.compile(together, fullgraph=True, dynamic=dynamic)
    for rows in (30, 47):
        torch.manual_seed(rows)
        x, y = torch.randn(rows, 1), (torch.arange(rows) % 3 == 0).long()
        torch.testing.assert_close(compiled(x, y), together(x, y), **LOOSE)


def test_settings_one_after_another():
    """Each loss compiled on its own, with others of the same class compiled before it."""
    torch.compiler.reset()
    torch.manual_seed(0)
    x, y = torch.randn(30, 1), (torch.arange(30) % 3 == 0).long()
    for quantile in (0.1, 0.2, 0.35):
        loss = P.RecallAtQuantileLoss(
            num_classes=1, queue_size=0, temperature=0.3, quantile=quantile
        )
        compiled = torch.compile(loss, fullgraph=True)
        torch.testing.assert_close(compiled(x, y), loss(x, y), **LOOSE)


def test_tau_varies_without_recompiling():
    scores, pos = lists(14, 3, 20)

    def each(s: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        values = torch.stack([m.fn(s, pos, t) for m in METRICS])
        ranks = P.soft_ranks(s, pos, t)
        return values, ranks.all + ranks.pos

    compiled, compiles = compile_fresh(each)
    for k in range(1, 7):
        tau = torch.tensor(0.1 * k, dtype=torch.float64)
        for got, want in zip(compiled(scores + k, tau), each(scores + k, tau), strict=True):
            torch.testing.assert_close(got, want, **TIGHT)
    assert compiles() == 1


def test_the_temperature_of_a_module_varies_without_recompiling():
    module, eager = (P.SmoothAPLoss(num_classes=1, queue_size=0) for _ in range(2))
    compiled, compiles = compile_fresh(module)
    torch.manual_seed(0)
    x, y = torch.randn(30, 1), (torch.arange(30) % 3 == 0).long()
    for k in range(1, 7):
        module.temperature = eager.temperature = 0.1 * k
        torch.testing.assert_close(compiled(x, y), eager(x, y), **LOOSE)
        if k == 2:  # the first forward decides whether to gather
            settled = compiles()
    assert compiles() == settled <= 2


def test_autocast_forward_and_backward_with_weights():
    """bfloat16 autocast changes no float32 number, of values or of any gradient."""
    scores, pos = lists(15, 3, 20, dtype=torch.float32)
    weight = torch.rand(3, 20, generator=torch.Generator().manual_seed(1)) + 0.5

    def total(s: Tensor, w: Tensor, t: Tensor) -> Tensor:
        each = [m.fn(s, pos, t, sample_weight=w).sum() for m in METRICS]
        ranks = P.soft_ranks(s, pos, t)
        sums = P.sigmoid_sums(s, w[:, None], pos, t)
        return torch.stack([*each, (ranks.pos / ranks.all.clamp(min=1.0)).sum(), sums.sum() / 400])

    def leaves() -> list[Tensor]:
        return [x.clone().requires_grad_() for x in (scores, weight, torch.tensor(TAU))]

    compiled, _ = compile_fresh(total)
    plain = leaves()
    want = total(*plain)
    want.sum().backward()
    for backward_inside in (False, True):
        mixed = leaves()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            got = compiled(*mixed)
            if backward_inside:
                got.sum().backward()
        if not backward_inside:
            got.sum().backward()
        assert got.dtype == torch.float32
        torch.testing.assert_close(got, want, rtol=2e-6, atol=0.0)
        for a, b in zip(mixed, plain, strict=True):
            largest = b.grad.abs().max().item()
            torch.testing.assert_close(a.grad, b.grad, rtol=0.0, atol=5e-6 * largest)


def test_both_methods_of_the_sums():
    """Where sums are near-linear, too: value, backward by scores, weights and tau."""
    g = torch.Generator().manual_seed(2)
    rows = 2_000
    scores = torch.randn(rows, 2, generator=g, dtype=torch.float64)
    weights = torch.randn(2, 1, rows, generator=g, dtype=torch.float64)
    at = torch.rand(rows, 2, generator=g) < 0.3
    tau = torch.tensor([0.05, 0.3], dtype=torch.float64)

    def fn(s: Tensor, w: Tensor, t: Tensor) -> Tensor:
        found = [P.sigmoid_sums(s.T, w, at.T, t, method=m) for m in ("dense", "grid")]
        return torch.stack(found)

    compiled, _ = compile_fresh(fn)
    results = []
    for run in (compiled, fn):
        leaves = [x.detach().clone().requires_grad_() for x in (scores, weights, tau)]
        out = run(*leaves)
        results.append((out, *torch.autograd.grad(out.square().sum(), leaves)))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=0.0, atol=1e-10 * b.abs().max().item())
