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
