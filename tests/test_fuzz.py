"""Any arguments and any batch: an error that names the argument, or a result with its NaN policy.

A ranking loss joins by its record; another loss module joins CONSTRUCTORS.
"""

import copy
import fractions
import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import proxy_losses as P
from proxy_losses._metrics import METRICS, Metric
from proxy_losses._queue import NO_QUERY

from .fuzzing import ANYTHING, FUZZ, a_batch, documented
from .makers import FUNCTIONS, MAKERS, PAD, every_loss, smooth

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
# -- constructors


def a_wrapper(**kwargs):
    return P.LossWarmupWrapper(**{"warmup_loss": nn.CrossEntropyLoss(), **kwargs})


RANKING = {
    "num_classes": 3, "queue_size": 4, "temperature": 0.5, "reduction": "mean",
    "ignore_index": PAD, "update_queue_in_eval": True, "gather_distributed": None,
    "max_pool_size": 5, "query_shape": (2, 3),
}  # fmt: skip
CHOSEN = {  # what is more telling than the defaults, where a metric has such an option
    "quantile": 0.3, "quantile_interpolation": "linear", "beta": 0.5, "alpha": 0.1,
    "n_knots": 3, "tau_scale": "band", "pos_numerator": "live",
    "budget_basis": "population",
}  # fmt: skip


def ranking(metric: Metric) -> dict[str, Any]:
    unit = {} if metric.own_spread else {"temperature_unit": "spread"}
    options = {
        o.attribute: CHOSEN.get(o.attribute, o.choices[-1] if o.choices else o.default)
        for o in metric.options
    }
    return {**RANKING, **unit, **options}


CONSTRUCTORS = {  # class -> a good value of every argument
    **{getattr(P, metric.module): ranking(metric) for metric in METRICS},
    P.SigmoidFocalLoss: {
        "alpha": 0.5, "gamma": 1.5, "reduction": "mean", "gather_distributed": None,
    },
    P.SoftmaxFocalLoss: {
        "alpha": [0.2, 0.3, 0.5], "gamma": 1.5, "reduction": "sum", "label_smoothing": 0.1,
        "ignore_index": PAD, "background_class": 1, "gather_distributed": False,
    },
    a_wrapper: {
        "main_loss": smooth(num_classes=3), "warmup_loss": nn.CrossEntropyLoss(),
        "warmup_steps": 0, "blend_steps": 2, "warmup_epochs": 0, "blend_epochs": 0,
        "temp_start": 0.5, "temp_end": 0.1, "temp_decay_steps": 5, "final_main_weight": 0.5,
        "reset_queue_each_epoch": True, "gather_distributed": False,
    },
}  # fmt: skip


def runs(module: nn.Module) -> None:
    """Two steps: the module works."""
    if isinstance(module, P.LossWarmupWrapper):
        module.on_train_epoch_start(1)
        module.on_train_batch_start(1)
    torch.manual_seed(0)
    classes = getattr(module, "num_classes", 3)
    for _ in range(2):
        logits = torch.randn(6, classes, requires_grad=True)
        targets = torch.arange(6) % max(classes, 2)
        if isinstance(module, P.SigmoidFocalLoss):
            targets = nn.functional.one_hot(targets).float()
        loss = module(logits, targets)
        loss.nansum().backward()
        assert logits.grad.isfinite().all()


@pytest.mark.parametrize("make", CONSTRUCTORS)
@FUZZ
@given(data=st.data())
def test_any_argument_is_named_or_works(make, data):
    good = CONSTRUCTORS[make]
    name = data.draw(st.sampled_from(sorted(good)), "argument")
    value = data.draw(ANYTHING, "value")
    arguments = {**copy.deepcopy(good), name: value}
    if name in ("warmup_loss", "main_loss") and callable(value):
        return  # what it returns is the caller's
    if name == "gamma" and isinstance(value, Tensor):
        return  # a tensor may vary, and is not read
    try:
        runs(make(**arguments))
    except (TypeError, ValueError) as error:
        documented(error, name)


@every_loss
@FUZZ
@given(value=ANYTHING)
def test_any_temperature_is_named_or_taken(make, value):
    module = make(num_classes=3, temperature=0.4)
    try:
        module.temperature = value
    except (TypeError, ValueError) as error:
        documented(error, "temperature")
        value = 0.4
    assert module.temperature == float(module._tau) == float(value) > 0
    runs(module)


# -- batches


def stored(module: nn.Module) -> dict[str, Tensor]:
    """All buffers; room for query ids or for a mask that holds none is no content."""
    buffers = {k: x.clone() for k, x in module.named_buffers()}
    plain = {"_q_query_ids": NO_QUERY, "_q_label_mask": 1}
    for name, x in buffers.items():
        value = plain.get(name.split(".")[-1])
        if value is not None and (x == value).all():
            buffers[name] = x[:0]
    return buffers


def same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(
        x is b[k] or torch.equal(x.nan_to_num(7.5), b[k].nan_to_num(7.5)) for k, x in a.items()
    )


def unsound_columns(call: dict[str, Any], limit: float) -> tuple[list[bool], bool]:
    """By the rule, in plain Python: classes with a number that is none, and whether to store."""
    logits, targets = call["logits"], call["targets"]
    ids = targets.tolist() if targets.dim() == 2 else [[t] for t in targets.tolist()]
    counts = [row != [PAD] for row in ids]
    known = call.get("label_mask")
    known = (torch.ones_like(logits).bool() if known is None else known).view(logits.shape).tolist()
    counts = [c and any(row) for c, row in zip(counts, known, strict=True)]
    columns = [False] * logits.shape[1]
    # Padding is stored too, but a batch of padding alone is in no query.
    keep = any(counts) or (bool(ids) and "query_ids" not in call)
    weight = call.get("sample_weight")
    for k, row in enumerate(logits.tolist()):
        if counts[k]:
            row = [x if told else 0.0 for x, told in zip(row, known[k], strict=True)]
            columns = [c or not math.isfinite(x) for c, x in zip(columns, row, strict=True)]
            keep = keep and all(abs(x) <= limit for x in row)
            keep = keep and (weight is None or abs(weight[k].item()) < 2.0**100)
    return columns, keep


FLOAT32 = torch.finfo(torch.float32).max


@every_loss
@FUZZ
@given(data=st.data())
def test_any_batch_is_an_error_or_a_result(make, data):
    classes = data.draw(st.sampled_from([1, 3]), "classes")
    module = make(num_classes=classes, queue_size=data.draw(st.sampled_from([0, 5]), "queue"))
    runs(module)
    before, twin = stored(module), copy.deepcopy(module)
    call = a_batch(data, classes)
    try:
        loss, per_class, valid = module(**call, return_per_class=True)
    except (TypeError, ValueError) as error:
        documented(error)
        assert same(stored(module), before)
        return
    assert loss.dtype == torch.promote_types(call["logits"].dtype, torch.float32)
    bad, keep = unsound_columns(call, FLOAT32)
    nan = per_class.isnan() & valid
    assert not (nan & ~torch.tensor(bad)).any(), "NaN out of finite numbers"
    if "query_ids" not in call:  # a query that does not count hides its rows
        assert nan.tolist() == (torch.tensor(bad) & valid).tolist()
    assert loss.isnan() == nan.any()
    assert same(stored(module), before) == (not keep or module._queue is None)
    if not keep:  # as if it had never come
        clean = torch.randn(4, classes), torch.arange(4) % max(classes, 2)
        assert torch.equal(module(*clean), twin(*clean))
        assert same(stored(module), stored(twin))


@every_loss
@FUZZ
@given(data=st.data())
def test_any_batch_of_the_functions_too(make, data):
    classes = data.draw(st.sampled_from([1, 3]), "classes")
    function, queue = FUNCTIONS[make], P.init_queue(5, classes)
    _, queue = function(torch.randn(3, classes), torch.arange(3) % max(classes, 2), queue, 0.3)
    call = a_batch(data, classes)
    if make is not MAKERS[2]:
        call.pop("iid_mask", None)
    kept = data.draw(st.sampled_from([queue, queue, queue, None, tuple(queue), 3]), "queue")
    tau = data.draw(st.sampled_from([0.3, 0.3, torch.tensor(0.3), 0.0, "x", torch.ones(2)]), "tau")
    before = [x.clone() for x in queue]
    try:
        loss, new = function(call.pop("logits"), call.pop("targets"), kept, tau, **call)
    except (TypeError, ValueError) as error:
        documented(error)
    else:
        assert loss.shape == ()
        assert (new is None) == (kept is None)
        if new is not None:
            rows, _, valid = P.queue_rows(new)
            if new.label_mask.numel():
                rows = torch.where(new.label_mask, rows, 0.0)
            assert rows[valid].isfinite().all()
            assert new.sample_weight[valid].isfinite().all()
    assert all(map(torch.equal, before, queue))


@FUZZ
@given(data=st.data(), step=st.integers(0, 3))
def test_any_batch_through_the_wrapper(data, step):
    def warm(logits, targets):
        return torch.zeros(())

    wrapper = P.LossWarmupWrapper(warm, smooth(num_classes=3), warmup_steps=1, blend_steps=2)
    wrapper.on_train_batch_start(step)
    before, call = stored(wrapper), a_batch(data, 3)
    try:
        loss = wrapper(**call)
    except (TypeError, ValueError) as error:
        documented(error)
        assert step > 0
    else:
        assert isinstance(loss, Tensor)
        if step and unsound_columns(call, FLOAT32)[1]:
            return
    assert same(stored(wrapper), before)


def test_what_is_raised_deep_inside_is_found():
    """Guard of the guard."""
    with pytest.raises(ValueError, match="Fraction") as found:
        fractions.Fraction("x")
    with pytest.raises(AssertionError, match="from the depths"):
        documented(found.value)
