"""Gradients of several cotangents at once, by autograd's own vmap: right, and with their graph."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch.autograd.functional import jacobian
from torch.func import grad, jacrev, vmap

import proxy_losses as P
from proxy_losses import distributed

from . import pointwise
from .metrics import TAU, TIGHT, every_metric, lists
from .pointwise import every_loss


@every_metric
def test_metrics_are_differentiated_again(metric):
    scores, pos = lists(18, 2, 10)
    scores.requires_grad_()
    tau = torch.tensor(TAU, dtype=torch.float64, requires_grad=True)
    weight = torch.linspace(0.5, 1.5, 10, dtype=torch.float64, requires_grad=True)
    given = scores, tau, weight
    cotangents = torch.tensor([[1.0, 0.0], [0.5, -2.0]], dtype=torch.float64)

    def grads(out, *, batched, last=False):
        how = {"create_graph": not last, "retain_graph": True, "materialize_grads": True}
        if batched:
            return torch.autograd.grad(out, given, cotangents, is_grads_batched=True, **how)
        rows = [torch.autograd.grad(out, given, c, **how) for c in cotangents]
        return [torch.stack(x) for x in zip(*rows, strict=True)]

    def squares(found):  # so that a derivative depends on all that it is taken of
        return sum(x.square().reshape(2, -1).sum(1) for x in found)

    found = []
    for batched in (False, True):
        first = grads(metric.fn(scores, pos, tau, sample_weight=weight), batched=batched)
        second = grads(squares(first), batched=batched)
        third = grads(squares(second), batched=batched, last=True)
        found.append([*first, *second, *third])
    for want, got in zip(*found, strict=True):
        torch.testing.assert_close(got, want, **TIGHT)
    assert all(x.abs().max() > 0 for x in found[1][::3])


@every_metric
def test_of_what_vmap_made(metric):
    scores, pos = lists(19, 2, 10)
    scores.requires_grad_()
    value = vmap(lambda s, p: metric.fn(s, p, TAU))(scores, pos)
    (got,) = torch.autograd.grad(value, scores, torch.eye(2).double(), is_grads_batched=True)
    torch.testing.assert_close(got, jacrev(lambda s: metric.fn(s, pos, TAU))(scores), **TIGHT)


def test_ranks():
    g = torch.Generator().manual_seed(3)
    scores = torch.randn(9, generator=g, dtype=torch.float64, requires_grad=True)
    pos = torch.arange(9) % 3 == 0

    def plain(s):
        k = torch.sigmoid((s[None, :] - s[:, None]) / 0.4)
        return torch.stack([k.sum(1) + 0.5, k[:, pos].sum(1) + 0.5], 1)[pos]

    def ours(s):
        return torch.stack(P.soft_ranks(s, pos, 0.4), -1)[pos]

    found = []
    for f in (plain, ours):
        first = jacobian(f, scores, vectorize=True, create_graph=True)
        (second,) = torch.autograd.grad(first.square().sum(), scores)
        found.append((first, second, jacobian(f, scores, vectorize=True)))
    for want, got in zip(*found, strict=True):
        torch.testing.assert_close(got, want, **TIGHT)


@every_loss
def test_pointwise_losses(loss):
    x, t, _ = pointwise.batch(loss, 27)
    x.requires_grad_()

    def each(x):
        return loss.fn(x, t, reduction="none").flatten()[:5]

    want = jacrev(each)(x.detach())
    torch.testing.assert_close(jacobian(each, x, vectorize=True), want, **TIGHT)
    got = jacobian(each, x, vectorize=True, create_graph=True)
    torch.testing.assert_close(got, want, **TIGHT)
    got.square().sum().backward()
    want = grad(lambda x: jacrev(each)(x).square().sum())(x.detach())
    torch.testing.assert_close(x.grad, want, **TIGHT)


@pytest.fixture
def group(tmp_path):
    dist.init_process_group("gloo", f"file://{tmp_path}/meet", rank=0, world_size=1)
    yield str(dist.group.WORLD.group_name)
    dist.destroy_process_group()


def test_collectives(group):
    """Of a group of one, for which nothing else sends anything."""
    x = torch.arange(1.0, 7.0, dtype=torch.float64).view(3, 2).requires_grad_()
    y = torch.full((3,), 2.0, dtype=torch.float64)
    eye = torch.eye(6, dtype=torch.float64).view(6, 3, 2)
    twice = eye[:, None].expand(6, 6, 3, 2)
    forms = {
        "sum": lambda x: distributed._reduce_in_graph(x, group, "sum", "sum") ** 2,
        "gather": lambda x: distributed._gather_in_graph(group, x, y)[0] ** 2,
    }
    for f in forms.values():
        (first,) = torch.autograd.grad(f(x), x, eye, is_grads_batched=True, create_graph=True)
        torch.testing.assert_close(first, 2 * x * eye, rtol=0, atol=0)
        (second,) = torch.autograd.grad(first, x, twice, is_grads_batched=True)
        torch.testing.assert_close(second, 2 * eye, rtol=0, atol=0)
        torch.testing.assert_close(vmap(f, in_dims=1, out_dims=1)(x), f(x), rtol=0, atol=0)
