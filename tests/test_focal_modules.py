"""The focal losses as modules: arguments, buffer, weights, warnings, checks of values."""

from __future__ import annotations

import copy
import inspect
import warnings

import pytest
import torch

import proxy_losses as P
import proxy_losses.focal_loss

from .pointwise import LOSSES, batch, every_loss, every_option

DEFAULTS = {
    P.SigmoidFocalLoss: {
        "alpha": 0.25, "gamma": 2.0, "reduction": "mean", "gather_distributed": None,
    },
    P.SoftmaxFocalLoss: {
        "alpha": None, "gamma": 2.0, "reduction": "mean", "label_smoothing": 0.0,
        "ignore_index": -100, "background_class": 0, "gather_distributed": None,
    },
}  # fmt: skip
SOFTMAX = LOSSES[1]


@every_loss
def test_arguments_their_order_and_defaults(loss):
    cls, defaults = loss.module, DEFAULTS[loss.module]
    params = inspect.signature(cls).parameters
    assert {n: p.default for n, p in params.items()} == defaults
    assert list(params) == list(defaults)
    assert all(p.kind is p.POSITIONAL_OR_KEYWORD for p in params.values())
    module = cls()
    assert {n: getattr(module, n) for n in defaults} == defaults
    assert loss.reductions == cls.SUPPORTED_REDUCTIONS
    weight = inspect.signature(cls.forward).parameters["sample_weight"]
    assert weight.kind is weight.KEYWORD_ONLY


def test_import_path_of_the_published_package():
    assert proxy_losses.focal_loss.SigmoidFocalLoss is P.SigmoidFocalLoss
    assert proxy_losses.focal_loss.SoftmaxFocalLoss is P.SoftmaxFocalLoss


@every_option
def test_is_the_function(loss, options):
    x, t, w = batch(loss, 30)
    for reduction in loss.reductions:
        module = loss.module(reduction=reduction, **options)
        want = loss.fn(x, t, reduction=reduction, sample_weight=w, **options)
        assert torch.equal(module(x, t, sample_weight=w), want)
        changed = loss.module()
        for name, value in {**options, "reduction": reduction}.items():
            setattr(changed, name, module.alpha if name == "alpha" else value)
        assert torch.equal(changed(x, t, sample_weight=w), want)


@pytest.mark.parametrize("alpha", [-0.5, 1.5, float("nan"), -2])
def test_a_sigmoid_alpha_out_of_range_raises_at_construction(alpha):
    with pytest.raises(ValueError, match="alpha"):
        P.SigmoidFocalLoss(alpha=alpha)
    with pytest.raises(TypeError, match="alpha"):
        P.SigmoidFocalLoss(alpha=str(alpha))


@pytest.mark.parametrize("alpha", [torch.ones(2, 2), [[1.0]], 0.25, torch.tensor(1.0)])
def test_a_softmax_alpha_of_other_axes_raises_at_construction(alpha):
    with pytest.raises(ValueError, match="alpha must be a 1-D tensor"):
        P.SoftmaxFocalLoss(alpha=alpha)


@every_loss
@pytest.mark.parametrize(
    ("change", "says"),
    [({"reduction": "median"}, "median"), ({"gamma": -1.0}, "gamma, unless 0, must be positive")],
)
def test_other_arguments_raise_at_the_call(loss, change, says):
    module = loss.module(**change)
    with pytest.raises(ValueError, match=says):
        module(*batch(loss, 31)[:2])


def test_alpha_is_a_buffer_of_the_published_name():
    x, t, _ = batch(SOFTMAX, 32)
    given = torch.tensor([0.1, 0.2, 0.3, 0.4])
    module = P.SoftmaxFocalLoss(alpha=given)
    assert list(module.state_dict()) == ["alpha"]
    assert module.alpha.dtype == torch.float32
    assert P.SoftmaxFocalLoss(alpha=[1, 2, 3, 4]).alpha.dtype == torch.float32
    assert list(module.parameters()) == []
    other = P.SoftmaxFocalLoss(alpha=[1.0] * 4)
    other.load_state_dict(module.state_dict())
    assert torch.equal(other(x, t), module(x, t))
    module.alpha.zero_()
    assert given[0] > 0, "the module owns its numbers"
    assert torch.equal(copy.deepcopy(other)(x, t), other(x, t))
    none = P.SoftmaxFocalLoss()
    assert none.state_dict() == {}
    none.load_state_dict({})
    with pytest.raises(RuntimeError, match="alpha"):
        none.load_state_dict(other.state_dict())
    assert P.SigmoidFocalLoss().state_dict() == {}


@pytest.mark.parametrize("cast", ["half", "bfloat16", "float", "double"])
def test_casts_keep_alpha_exact(cast):
    x, t, _ = batch(SOFTMAX, 33)
    plain = P.SoftmaxFocalLoss(alpha=[0.1, 0.2, 0.3, 0.7])
    module = getattr(copy.deepcopy(plain), cast)()
    assert torch.equal(module(x, t), plain(x, t))


@every_option
@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16])
def test_half_inputs_are_computed_in_float32(loss, options, half):
    x, t, w = batch(loss, 34, dtype=half)
    for reduction in loss.reductions:
        module = loss.module(reduction=reduction, **options)
        got, want = module(x, t, sample_weight=w), module(x.float(), t, sample_weight=w)
        torch.testing.assert_close(got, want, rtol=0.0, atol=0.0)  # and the same dtype


@every_loss
@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        ({"sample_weight": torch.ones(5)}, ValueError, "sample_weight must match {} dim-0"),
        ({"sample_weight": torch.ones(6, 9)}, ValueError, "sample_weight must be "),
        ({"sample_weight": [1.0] * 6}, TypeError, "sample_weight must be .*got list"),
        ({"sample_weight": -1.0}, ValueError, "non-negative, got -1.0"),
        ({"sample_weight": float("nan")}, ValueError, "sample_weight must be finite"),
        ({"sample_weight": float("inf")}, ValueError, "sample_weight must be finite"),
        ({"targets": torch.zeros(5).long()}, ValueError, "targets must have"),
        ({"inputs": torch.zeros(6, 4).long()}, TypeError, "inputs must be"),
    ],
)
def test_a_bad_batch_raises(loss, change, error, says):
    x, t, w = batch(loss, 35)
    if isinstance(change.get("sample_weight"), float):
        w[2] = change["sample_weight"]
        change = {"sample_weight": w}
    args = {"inputs": x, "targets": t} | change
    with pytest.raises(error, match=says.format(loss.of_inputs)):
        loss.module()(**args)


def test_a_class_id_out_of_range_is_named():
    x, t, _ = batch(SOFTMAX, 36)
    t[:2] = torch.tensor([4, -7])
    with pytest.raises(ValueError, match=r"outside \[0, 4\).*ignore_index=-100: \[4, -7\]"):
        P.SoftmaxFocalLoss()(x, t)
    t[:2] = 4
    assert P.SoftmaxFocalLoss(ignore_index=4)(x, torch.where(t < 0, 4, t)).isfinite()


@every_loss
def test_weights_of_other_dtypes(loss):
    x, t, _ = batch(loss, 37, dtype=torch.float32)
    ones, module = torch.ones(t.shape), loss.module()
    want = module(x, t, sample_weight=ones)
    for dtype in (torch.int64, torch.bool, torch.float16, torch.float64):
        got = module(x, t, sample_weight=ones.to(dtype))
        torch.testing.assert_close(got, want, rtol=0.0, atol=0.0)
    leaf = (2 * ones).requires_grad_()
    assert not module(x, t, sample_weight=leaf).requires_grad


@every_loss
@pytest.mark.parametrize("deep", [False, True])
def test_weights_of_zero_warn_once_and_name_the_line_of_the_caller(loss, deep):
    x, t, w = batch(loss, 38)
    module, zeros = loss.module(), torch.zeros_like(w)
    call = torch.nn.ModuleDict({"loss": module})["loss"] if deep else module.forward
    with warnings.catch_warnings(record=True) as log:
        warnings.simplefilter("always")
        call(x[:0], t[:0], sample_weight=zeros[:0])
        assert log == []
        losses = [call(x, t, sample_weight=zeros) for _ in range(3)]
        here = inspect.currentframe().f_lineno - 1
        call(x, t, sample_weight=w)
    (one,) = log
    assert (one.category, one.filename, one.lineno) == (UserWarning, __file__, here)
    assert f"{loss.module.__name__}: sample_weight is entirely zero" in str(one.message)
    assert losses == [0.0] * 3
    with pytest.warns(UserWarning, match="entirely zero"):  # another instance
        loss.module()(x, t, sample_weight=zeros)


@every_loss
@pytest.mark.parametrize("gather", [None, True, False])
def test_whether_to_gather_is_decided_at_the_first_call(loss, gather):
    x, t, _ = batch(loss, 39)
    module = loss.module(gather_distributed=gather)
    assert (module.gather_distributed, module._gather_resolved) == (gather, None)
    assert torch.equal(module(x, t), loss.module()(x, t))
    assert module._gather_resolved is False


@every_loss
def test_in_the_warmup_of_a_ranking_loss(loss):
    x, t, w = batch(loss, 40, 12, 1)
    labels = (torch.arange(12) % 2)[:, None]
    t, w = (labels, w) if t.dim() == 2 else (torch.zeros(12, dtype=torch.int64), w)
    wrapper = P.LossWarmupWrapper(loss.module(), P.SmoothAPLoss(1), warmup_epochs=1)
    got = wrapper(x, t, sample_weight=w)
    assert torch.equal(got, loss.module()(x, t, sample_weight=w))
