"""Any batch for the focal losses: an error that says what is wrong, or a result."""

import math
from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import proxy_losses as P

from .fuzzing import FLOATS, FUZZ, documented, maybe
from .makers import PAD

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


def a_sigmoid_batch(data) -> dict:
    shape = data.draw(st.sampled_from([(0,), (4,), (4, 3), (2, 3, 2), (0, 3)]), "shape")
    x = torch.randn(shape, dtype=data.draw(st.sampled_from(FLOATS), "dtype"))
    return {
        "inputs": x, "targets": (torch.rand(shape) < 0.5).to(x), "sample_weight": torch.rand(shape)
    }  # fmt: skip


def a_softmax_batch(data) -> dict:
    shape = data.draw(st.sampled_from([(0, 3), (4, 3), (4, 1), (2, 3, 2), (2, 3, 0)]), "shape")
    x = torch.randn(shape, dtype=data.draw(st.sampled_from(FLOATS), "dtype"))
    targets = torch.randint(0, shape[1], (shape[0], *shape[2:]))
    if targets.numel() > 1:
        targets.view(-1)[0] = PAD
    return {"inputs": x, "targets": targets, "sample_weight": torch.rand(targets.shape)}


@pytest.mark.parametrize("cls", [P.SigmoidFocalLoss, P.SoftmaxFocalLoss])
@FUZZ
@given(data=st.data())
def test_any_batch_is_an_error_or_a_result(cls, data):
    torch.manual_seed(data.draw(st.integers(0, 99), "seed"))
    gamma = data.draw(st.sampled_from([0, 0.5, 1.0, 2.0, 1e6]), "gamma")
    reduction = data.draw(st.sampled_from(cls.SUPPORTED_REDUCTIONS), "reduction")
    module = cls(gamma=gamma, reduction=reduction)
    call = (a_sigmoid_batch if cls is P.SigmoidFocalLoss else a_softmax_batch)(data)
    if data.draw(st.booleans(), "without weight"):
        del call["sample_weight"]
    call = {name: maybe(data, name, x) for name, x in call.items()}
    try:
        loss = module(**call)
    except (TypeError, ValueError) as error:
        documented(error)
        return
    x = call["inputs"]
    assert loss.dtype == torch.promote_types(x.dtype, torch.float32)
    targets = call["targets"].double()
    if targets.dim() == x.dim() and not ((targets >= 0) & (targets <= 1)).all():
        return  # no probabilities: values are not checked
    if x.isfinite().all():
        assert not loss.isnan().any()


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_padded_row_may_hold_anything(bad):
    x, targets = torch.randn(4, 3), torch.tensor([0, PAD, 2, 1])
    spoilt = x.clone()
    spoilt[1] = bad
    spoilt.requires_grad_()
    loss = P.SoftmaxFocalLoss()(spoilt, targets)
    assert torch.equal(loss, P.SoftmaxFocalLoss()(x, targets))
    loss.backward()
    assert spoilt.grad.isfinite().all()


def test_narrow_class_ids_meet_a_wide_ignore_index():
    """In uint8 -100 is 156: that class would have been taken for padding."""
    x, targets = torch.randn(2, 200), torch.tensor([156, 3], dtype=torch.uint8)
    for loss in (P.SoftmaxFocalLoss(), nn.CrossEntropyLoss()):
        assert torch.equal(loss(x, targets.long()), loss(x, targets))
    assert torch.equal(P.softmax_focal(x, targets), P.softmax_focal(x, targets.long()))


SMALL = [torch.float8_e4m3fn, torch.float8_e5m2]
RARE = [torch.uint16, torch.uint32, torch.uint64, *SMALL]
RANKING = {"num_classes": 3, "queue_size": 0}


@pytest.mark.parametrize(
    ("make", "dtype"),
    [
        *((P.SigmoidFocalLoss, dtype) for dtype in RARE),
        *((partial(P.SmoothAPLoss, **RANKING), dtype) for dtype in SMALL),
        *((partial(P.RecallAtPrecisionLoss, **RANKING), dtype) for dtype in SMALL),
    ],
)
def test_targets_of_dtypes_that_few_operations_take(make, dtype):
    """As those of float32 are."""
    torch.manual_seed(0)
    logits, targets = torch.randn(12, 3), torch.rand(12, 3) < 0.4
    torch.testing.assert_close(make()(logits, targets.to(dtype)), make()(logits, targets.float()))
    assert make()(logits[:0], targets[:0].to(dtype)).numel() == 1
