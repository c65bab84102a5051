"""Any arguments and any batch: an error that names the argument, or a result with its NaN policy.

A loss module joins CONSTRUCTORS, a ranking loss also `makers.MAKERS` and `makers.FUNCTIONS`.
"""

import copy
import decimal
import fractions
import math
import traceback
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import proxy_losses as P
from proxy_losses._queue import NO_GROUP

from .makers import BAND, FUNCTIONS, MAKERS, PAD, every_loss, smooth

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
FUZZ = settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)

# -- constructors

# Sizes stay small (or beyond 64 bits): what is too large for the memory is not checked.
NUMBERS = st.one_of(
    st.integers(-3, 40), st.sampled_from([2**63, -(2**70), 10**400]), st.floats(),
    st.sampled_from([0.5, 1.0, -0.0, 1e-300, 1e300, 5e-324, math.nan, math.inf]),
    st.sampled_from([np.float32(0.25), np.int64(3), np.bool_(True), np.float16(0.5)]),
    st.sampled_from([fractions.Fraction(1, 3), decimal.Decimal("0.5"), 1j, True, False]),
)  # fmt: skip
TENSORS = st.sampled_from([
    torch.tensor(0.5), torch.tensor(3), torch.tensor(True), torch.tensor(math.nan), torch.ones(2),
    torch.ones(0), torch.tensor(1j), np.ones(2),
])  # fmt: skip
WORDS = st.sampled_from([
    "mean", "sum", "none", "higher", "linear", "nearest", "trapezoid", "pairwise", "iqr", "band",
    "pool", "live", "fpr", "population", "score", "spread", "", "Mean", b"mean",
])  # fmt: skip
OTHERS = st.sampled_from([None, [], (), (2, 3), [2, 3], (2, 0), (2, 3, 4), {}, object(), len, int])
ANYTHING = st.one_of(NUMBERS, TENSORS, WORDS, OTHERS)


def documented(error: Exception, name: str = "") -> None:
    """Raised by a check of ours, not deep inside, and it names what is wrong."""
    last = traceback.extract_tb(error.__traceback__)[-1].filename
    assert "proxy_losses" in last, f"from the depths: {error!r}"
    assert name in str(error)


def a_wrapper(**kwargs):
    return P.LossWarmupWrapper(**{"warmup_loss": nn.CrossEntropyLoss(), **kwargs})


RANKING = {
    "num_classes": 3, "queue_size": 4, "temperature": 0.5, "reduction": "mean",
    "ignore_index": PAD, "update_queue_in_eval": True, "gather_distributed": None,
    "max_pool_size": 5, "group_shape": (2, 3),
}  # fmt: skip
CONSTRUCTORS = {  # class -> a good value of every argument
    P.SmoothAPLoss: {**RANKING, "temperature_unit": "spread"},
    P.RecallAtQuantileLoss: {
        **RANKING, "quantile": 0.3, "quantile_interpolation": "linear", "temperature_unit": "score",
    },
    P.PAUCAtBudgetLoss: {
        **RANKING, **BAND, "alpha": 0.1, "surrogate": "pairwise", "n_knots": 3,
        "tau_scale": "band", "pos_numerator": "live", "budget_basis": "population",
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
        loss = module(logits, torch.arange(6) % max(classes, 2))
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

DTYPES = [
    torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.int8, torch.uint8,
    torch.int16, torch.int32, torch.int64, torch.uint16, torch.uint32, torch.uint64, torch.bool,
    torch.complex64, torch.float8_e4m3fn,
]  # fmt: skip
FLOATS = DTYPES[:4]
SPECIAL = [math.nan, math.inf, -math.inf, 1e38, -1e38, 3.4e38, 1e300, 1e-45, 0.0, 70000.0]
SHAPES = [(), (0,), (1,), (4, 1), (1, 4), (4, 3, 2), (5,), (2, 4)]
NO_TENSOR = [None, 1.0, True, "x", [0, 1, 0, 1], np.zeros(4)]


def maybe(data, name: str, usual: Tensor | None, odds: int = 6) -> Any:
    """The usual value, or now and then one of a wrong dtype, shape, content or kind."""
    kind = data.draw(st.integers(0, odds), name)
    if usual is None or kind > 3:
        return usual
    if kind == 0:
        return usual.to(data.draw(st.sampled_from(DTYPES), f"{name}: dtype"))
    if kind == 1:
        return torch.zeros(data.draw(st.sampled_from(SHAPES)), dtype=usual.dtype)
    if kind == 2:
        return data.draw(st.sampled_from(NO_TENSOR), f"{name}: kind")
    out = usual.double() if usual.is_floating_point() else usual.clone()
    if out.numel():
        spot = data.draw(st.integers(0, out.numel() - 1), f"{name}: where")
        fill = SPECIAL if usual.is_floating_point() else [-1, 7, PAD, -(2**31)]
        out.view(-1)[spot] = data.draw(st.sampled_from(fill), f"{name}: what")
    return out.to(usual.dtype)


def a_batch(data, classes: int) -> dict[str, Any]:
    """Arguments of a call, most of them good."""
    torch.manual_seed(data.draw(st.integers(0, 99), "seed"))
    n = data.draw(st.sampled_from([0, 1, 2, 4, 4, 9]), "rows")
    logits = torch.randn(n, classes, dtype=data.draw(st.sampled_from([torch.float32, *FLOATS])))
    targets = torch.randint(0, max(classes, 2), (n,))
    if n > 2:
        targets[n // 2] = PAD
    if classes > 1 and data.draw(st.integers(0, 9), "labels") == 0:
        targets = torch.rand(n, classes) < 0.5
    given_rows = data.draw(st.sets(st.sampled_from(["sample_weight", "iid_mask", "groups"])))
    rows = {
        "sample_weight": torch.rand(n), "iid_mask": torch.rand(n) < 0.8,
        "groups": torch.randint(0, 2, (n,)),
    }  # fmt: skip
    call = {"logits": logits, "targets": targets, **{k: rows[k] for k in sorted(given_rows)}}
    return {name: maybe(data, name, x) for name, x in call.items()}


def stored(module: nn.Module) -> dict[str, Tensor]:
    """All buffers; room for query ids that holds none is no content."""
    buffers = {k: x.clone() for k, x in module.named_buffers()}
    return {k: x[x != NO_GROUP] if "_q_groups" in k else x for k, x in buffers.items()}


def same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(
        x is b[k] or torch.equal(x.nan_to_num(7.5), b[k].nan_to_num(7.5)) for k, x in a.items()
    )


def unsound_columns(call: dict[str, Any], limit: float) -> tuple[list[bool], bool]:
    """By the rule, in plain Python: classes with a number that is none, and whether to store."""
    logits, targets = call["logits"], call["targets"]
    ids = targets.tolist() if targets.dim() == 2 else [[t] for t in targets.tolist()]
    counts = [row != [PAD] for row in ids]
    columns = [False] * logits.shape[1]
    keep = bool(ids)  # padding is stored too
    weight = call.get("sample_weight")
    for k, row in enumerate(logits.tolist()):
        if counts[k]:
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
    if "groups" not in call:  # a query that does not count hides its rows
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
