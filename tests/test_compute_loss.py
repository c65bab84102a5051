"""The loss function for the Hugging Face Trainer: shapes, heads, shares of the items."""

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

import proxy_losses as P

pytest.importorskip("transformers", reason="needs proxy-losses[huggingface]")

from proxy_losses.integrations.huggingface import make_compute_loss

PAD = -100


class Given(nn.Module):
    """A loss that hands out what it is given."""

    num_classes = 1

    def forward(self, logits, targets):
        self.args = logits, targets
        return (logits * 0).sum() + 3.0, "per class"


def test_shapes_that_reach_the_loss():
    g = torch.Generator().manual_seed(0)
    x, y = torch.randn(6, 2, generator=g), torch.tensor([0, 1, PAD, 1, 0, PAD])
    binary, several = Given(), Given()
    several.num_classes = 2
    assert make_compute_loss(binary)({"logits": x}, y) == 3.0
    torch.testing.assert_close(binary.args[0], (x[:, 1:] - x[:, :1])[y != PAD])
    assert torch.equal(binary.args[1], y[y != PAD])
    make_compute_loss(several)({"logits": x}, y[:, None])
    assert torch.equal(several.args[0], x[y != PAD])
    make_compute_loss(binary)({"logits": x[:, :1]}, y)  # a head of one logit
    assert torch.equal(binary.args[0], x[:, :1][y != PAD])
    make_compute_loss(several, logits=1)(("loss", x.view(2, 3, 2)), y.view(2, 3))
    assert torch.equal(several.args[0], x[y != PAD])
    labels = (x > 0).float()
    make_compute_loss(several)({"logits": x}, labels)
    assert torch.equal(several.args[1], labels)
    make_compute_loss(several, ignore_index=0)({"logits": x}, y)
    assert several.args[1].tolist() == [1, PAD, 1, PAD]


def test_two_logits_are_one_score_with_the_same_cross_entropy():
    x, y = torch.randn(9, 2, dtype=torch.float64), torch.arange(9) % 2
    compute_loss = make_compute_loss(P.LossWarmupWrapper(
        lambda z, t: nn.functional.binary_cross_entropy_with_logits(z[:, 0], t.double()),
        P.SmoothAPLoss(1), warmup_steps=1,
    ))  # fmt: skip
    torch.testing.assert_close(compute_loss({"logits": x}, y), cross_entropy(x, y))


def test_shares_of_the_items_add_up():
    x, y = torch.randn(12, 3), torch.tensor([0, 1, 2, PAD] * 3)
    y[8:] = PAD
    compute_loss = make_compute_loss(nn.CrossEntropyLoss())
    pieces = [slice(0, 3), slice(3, 8), slice(8, 12)]  # the last one without an item
    x.requires_grad_()
    total = sum(compute_loss({"logits": x[p]}, y[p], num_items_in_batch=6) for p in pieces)
    torch.testing.assert_close(total, cross_entropy(x, y))
    total.backward()
    assert x.grad.isfinite().all()
    assert not x.grad[8:].any()


def test_a_loss_that_would_broadcast():
    x, y = torch.randn(6, 1), torch.tensor([0, 1, 0, 1, 0, 1])
    for loss_fn in (
        nn.MSELoss(),
        P.LossWarmupWrapper(nn.SmoothL1Loss(), P.SmoothAPLoss(1), warmup_steps=1),
    ):
        with pytest.raises(ValueError, match=r"shape of its logits \[6, 1\], got \[6\], which"):
            make_compute_loss(loss_fn)({"logits": x}, y)
    by_row = P.LossWarmupWrapper(
        lambda z, t: nn.functional.mse_loss(z[:, 0], t.float()), P.SmoothAPLoss(1), warmup_steps=1
    )
    got = make_compute_loss(by_row)({"logits": x}, y)
    assert got.item() == pytest.approx(((x[:, 0] - y) ** 2).mean().item())
    scores, targets = torch.randn(4, 3), torch.rand(4, 3)
    got = make_compute_loss(nn.MSELoss())({"logits": scores}, targets)
    assert got.item() == pytest.approx(((scores - targets) ** 2).mean().item())


@pytest.mark.parametrize(
    ("labels", "items", "says"),
    [
        (None, None, "labels: expected a tensor, got None"),
        (torch.zeros(4, dtype=torch.long), None, r"expected \[6\].* got \[4\]"),
        (torch.zeros(6, dtype=torch.long), torch.tensor([[3], [3]]), "one process per GPU"),
    ],
)
def test_bad_input_is_named(labels, items, says):
    with pytest.raises(ValueError, match=says):
        make_compute_loss(P.SmoothAPLoss(1))({"logits": torch.randn(6, 2)}, labels, items)


# -- multi-label


class Masked(Given):
    """`Given` with a mask."""

    num_classes = 3

    def forward(self, logits, targets, label_mask=None):
        self.mask = label_mask
        return super().forward(logits, targets)


def multi_label(seed: int = 0):
    """Tokens [2, 6, 3] whose last two are padding, and of which one lacks a label."""
    x = torch.randn(2, 6, 3, generator=torch.Generator().manual_seed(seed))
    y = ((torch.arange(12).view(2, 6, 1) + torch.arange(3)) % 2).float()
    y[:, 4:] = PAD
    return x, y


def test_rows_of_padding_alone_are_left_out():
    x, y = multi_label()
    for loss_fn in (Given(), Masked()):
        loss_fn.num_classes = 3
        make_compute_loss(loss_fn)({"logits": x}, y)
        assert torch.equal(loss_fn.args[0], x[:, :4].reshape(-1, 3))
        assert torch.equal(loss_fn.args[1], y[:, :4].reshape(-1, 3))
    assert loss_fn.mask is None  # nothing is unknown


@pytest.mark.parametrize("wrapped", [False, True])
def test_padding_in_multi_label_targets_is_unknown(wrapped):
    x, y = multi_label()
    y[0, 1, 2] = y[1, 0, 0] = PAD
    main = P.SmoothAPLoss(3, queue_size=16, temperature=0.3)
    loss_fn = P.LossWarmupWrapper(nn.CrossEntropyLoss(), main) if wrapped else main
    if wrapped:
        loss_fn.on_train_batch_start(0)
        main.temperature = 0.3
    x.requires_grad_()
    loss = make_compute_loss(loss_fn)({"logits": x}, y)
    rows, labels = x[:, :4].reshape(-1, 3), y[:, :4].reshape(-1, 3)
    known = labels != PAD
    each = [
        P.SmoothAPLoss(1, queue_size=0, temperature=0.3)(rows[k, c : c + 1], labels[k, c])
        for c, k in enumerate(known.T)
    ]
    assert all(value > 0 for value in each)
    torch.testing.assert_close(loss, torch.stack(each).mean())
    state = main._queue.state
    assert state.enqueued == 8  # padding takes no slot
    assert torch.equal(state.label_mask[:8], known)
    loss.backward()
    assert not x.grad[:, 4:].any()
    assert not x.grad[0, 1, 2]


def test_padding_of_another_index():
    x, y = multi_label()
    y[y == PAD] = -1.0
    y[0, 0, 0] = -1.0
    loss_fn = Masked()
    make_compute_loss(loss_fn, ignore_index=-1)({"logits": x}, y)
    assert loss_fn.mask.sum() == 8 * 3 - 1
    assert ((loss_fn.args[1] == 0) | (loss_fn.args[1] == 1)).all()


def test_a_loss_that_takes_no_mask_is_named():
    x, y = multi_label()
    y[0, 0, 0] = PAD
    with pytest.raises(ValueError, match="BCEWithLogitsLoss, which has no argument 'label_mask'"):
        make_compute_loss(nn.BCEWithLogitsLoss())({"logits": x}, y)


@pytest.mark.parametrize("bad", [float("nan"), -1.0, 0.5])
def test_labels_that_are_none_are_refused(bad):
    x, y = multi_label()
    y[0, 0, 0] = bad
    with pytest.raises(ValueError, match=r"targets must be labels 0 and 1, got \["):
        make_compute_loss(P.SmoothAPLoss(3, queue_size=8))({"logits": x}, y)


def test_shares_of_multi_label_items_add_up():
    x, y = multi_label()
    y[0, 0, 0] = PAD
    items = int((y != PAD).sum())
    loss_fn = P.SigmoidFocalLoss(alpha=-1, gamma=0)
    compute_loss = make_compute_loss(loss_fn)
    total = sum(
        compute_loss({"logits": x[k : k + 1]}, y[k : k + 1], num_items_in_batch=items)
        for k in range(2)
    )
    known = y != PAD
    want = nn.functional.binary_cross_entropy_with_logits(x[known], y[known])
    torch.testing.assert_close(total, want)
