"""From the record of a metric: loss function, module, names, docs; what a new metric takes."""

from __future__ import annotations

import copy
import inspect
import pickle
from importlib import import_module
from pathlib import Path

import pytest
import torch

import proxy_losses as P
from proxy_losses import nn
from proxy_losses._losses import loss_function
from proxy_losses._metrics import METRICS, Found, Metric, Option, over_lists, table_row
from proxy_losses._ranks import Lists

from .makers import same_rows

ROOT = Path(P.__file__).parent
every_record = pytest.mark.parametrize("metric", METRICS, ids=lambda m: m.name)


# -- nothing forgotten


def test_every_record_is_on_the_roll():
    found = []
    for path in (ROOT / "_metrics").glob("[!_]*.py"):
        module = import_module(f"proxy_losses._metrics.{path.stem}")
        found += [x.name for x in vars(module).values() if isinstance(x, Metric)]
    assert set(found) <= {m.name for m in METRICS}
    assert len({m.name for m in METRICS}) == len(METRICS)


@every_record
def test_every_name_is_public(metric):
    for name in (metric.name, f"{metric.name}_loss", metric.defined.__name__, metric.module):
        assert name in P.__all__, name
    assert getattr(P, metric.name) is metric.function
    assert metric.module in nn.__all__
    assert getattr(nn, metric.module)._metric is metric


@every_record
def test_the_readme_has_its_row(metric):
    text = (ROOT.parent / "README.md").read_text()
    assert table_row(metric) in text.splitlines()
    assert f"`{metric.name}_loss`" in text


@every_record
def test_texts_are_complete(metric):
    for text in (metric.table, metric.diagnostics, metric.loss_example, metric.module_example):
        assert text
    assert not metric.shown or metric.shown in {o.name for o in metric.options}
    known = inspect.signature(metric.function).parameters
    assert {o.name: o.default for o in metric.options} == {
        o.name: known[o.name].default for o in metric.options
    }


# -- signatures, copies


def test_positional_arguments_are_those_published():
    common = "queue_size temperature reduction ignore_index update_queue_in_eval gather_distributed"
    order = {
        P.SmoothAPLoss: f"num_classes {common} max_pool_size",
        P.RecallAtQuantileLoss: (
            f"num_classes quantile {common} quantile_interpolation max_pool_size"
        ),
        P.PAUCAtBudgetLoss: (
            "num_classes alpha beta surrogate n_knots tau_scale pos_numerator budget_basis "
            f"{common} quantile_interpolation max_pool_size"
        ),
    }
    for cls, names in order.items():
        parameters = inspect.signature(cls).parameters.values()
        found = [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
        assert found == names.split()
        assert {p.name for p in parameters if p.kind is p.KEYWORD_ONLY} >= {"distributed"}
        # As source has them. (Not of the signature: pdoc evaluates those in place.)
        assert all(isinstance(cls.__init__.__annotations__[p.name], str) for p in parameters)


@every_record
def test_signatures_are_explicit(metric):
    loss, cls = getattr(P, f"{metric.name}_loss"), getattr(P, metric.module)
    keywords = inspect.signature(loss).parameters
    assert list(keywords)[:4] == ["logits", "targets", "queue", "tau"]
    assert not {p.kind for p in keywords.values()} & {
        inspect.Parameter.VAR_KEYWORD,
        inspect.Parameter.VAR_POSITIONAL,
    }
    for o in metric.options:
        assert keywords[o.name].default == o.default
        assert inspect.signature(cls).parameters[o.attribute].default == o.of_module.default
        assert f"    {o.name}: " in loss.__doc__
        assert f"    {o.attribute}: " in cls.__doc__
    for name in keywords:
        assert f"    {name}: " in loss.__doc__
    with pytest.raises(TypeError, match=rf"{metric.name}_loss\(\) got an unexpected.*'nonsense'"):
        loss(torch.zeros(2, 1), torch.tensor([0, 1]), None, 0.1, nonsense=1)
    for bad in ({}, {"num_classes": 2, "nonsense": 1}):
        with pytest.raises(TypeError, match=r"num_classes|nonsense"):
            cls(**bad)


@every_record
def test_pickle_and_copy(metric):
    loss, cls = getattr(P, f"{metric.name}_loss"), getattr(P, metric.module)
    assert pickle.loads(pickle.dumps(loss)) is loss
    assert copy.deepcopy(loss) is loss
    module = cls(3, queue_size=4)
    for twin in (pickle.loads(pickle.dumps(module)), copy.deepcopy(module)):
        assert type(twin) is cls
        assert repr(twin) == repr(module)
        for name in inspect.signature(cls).parameters:
            assert getattr(twin, name) == getattr(module, name)


# -- a metric of one's own, in one record


def gap(scores, pos_mask, tau, *, margin=0.0, valid_mask=None, sample_weight=None):
    """Mean over positives of the soft step above the mean of all scores."""
    return over_lists(
        GAP, Lists(scores, pos_mask, valid_mask, sample_weight), tau, {"margin": margin}, HOW
    ).value


def gap_defined(pos_mask, valid_mask=None, sample_weight=None):
    """Some positive."""
    return (pos_mask if valid_mask is None else pos_mask & valid_mask).any(-1)


def evaluate(lists, tau, settings, how, *, stats):
    valid = torch.ones_like(lists.pos) if lists.valid is None else lists.valid
    valid = valid.expand(lists.scores.shape)
    pos, scores = lists.pos & valid, torch.where(valid, lists.scores, 0.0)
    mean = scores.sum(-1, keepdim=True) / valid.sum(-1, keepdim=True).clamp(min=1)
    above = torch.sigmoid((scores - mean - settings["margin"]) / tau)
    weight = torch.where(pos, 1.0 if lists.weight is None else lists.weight.to(scores), 0.0)
    defined, total = weight.sum(-1) > 0, weight.sum(-1)
    value = (weight * above).sum(-1) / torch.where(defined, total, 1.0)
    return Found(torch.where(defined, value, 0.0), defined, {})


def check(settings):
    if not settings["margin"] >= 0:
        raise ValueError(f"margin must be >= 0, got {settings['margin']}")


HOW = P._ranks.How()
GAP = Metric(
    name="gap", module="GapLoss", title="gap", function=gap, evaluate=evaluate,
    defined=gap_defined, check=check,
    options=(Option("margin", 0.0, "float", "by how much.", "the_margin"),),
)  # fmt: skip
gap_loss = loss_function(GAP)


class GapLoss(nn.RankingLoss, metric=GAP): ...


def test_a_record_alone_makes_a_loss():
    module, queue = GapLoss(3, 0.25, queue_size=8, temperature=0.3), P.init_queue(8, 3)
    for k in range(4):
        torch.manual_seed(k)
        logits, targets = torch.randn(5, 3), torch.arange(5) % 3
        loss, per_class, valid = module(logits, targets, True)
        want, queue = gap_loss(logits, targets, queue, 0.3, margin=0.25)
        assert torch.equal(loss, want)
        assert valid.all()
        if k == 0:
            each = [1 - gap(logits[:, c], targets == c, 0.3, margin=0.25) for c in range(3)]
            torch.testing.assert_close(per_class, torch.stack(each))
    assert same_rows(module, queue)
    assert "the_margin: by how much." in GapLoss.__doc__
    with pytest.raises(ValueError, match="margin must be"):
        GapLoss(3, -1.0)
    with pytest.raises(ValueError, match="margin must be"):
        gap_loss(logits, targets, None, 0.3, margin=-1.0)
    module.the_margin = -1.0
    with pytest.raises(ValueError, match="margin must be"):
        module(logits, targets)


def test_a_class_without_a_metric_says_so():
    with pytest.raises(TypeError, match="needs a metric"):
        nn.RankingLoss(num_classes=2)


@every_record
def test_a_wrong_argument_is_told_with_the_name_of_the_class(metric):
    module = getattr(P, metric.module)
    with pytest.raises(
        TypeError, match=rf"^{metric.module}\.__init__\(\) got an unexpected.*'tau'"
    ):
        module(1, tau=0.1)
    with pytest.raises(TypeError, match=rf"^{metric.module}\.__init__\(\) missing.*'num_classes'"):
        module()
