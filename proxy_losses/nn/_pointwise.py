"""The focal losses as modules."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from .._checks import check_flag, check_fraction, check_int
from .._metrics import focal
from .._metrics.focal import check_class_targets, check_elements
from . import _late
from ._batch import BatchLoss, as_floating, check_class_ids, judge_class_ids, readable


class PointwiseLoss(BatchLoss):
    """What the focal losses share: checks of values, on the rows of all processes."""

    ignore_index: int

    def _check(
        self, inputs: Tensor, sample_weight: Tensor | None, class_ids: Tensor | None = None,
        known: Tensor | None = None,
    ) -> None:  # fmt: skip
        """Raise and warn as weights, class ids and known targets in [0, 1] ask.

        Off the CPU at a later forward.
        """
        now = _late.at_once(inputs)
        if not now and not self._may_ask(inputs):
            return
        asked: dict[str, Tensor] = {}
        classes = 0 if class_ids is None else inputs.shape[1]
        if class_ids is not None and readable(class_ids) and class_ids.numel():
            if now:
                check_class_ids(class_ids, classes, self.ignore_index)
            else:
                ids = class_ids.to(torch.int64)
                asked["least id"], asked["largest id"] = (
                    ids * (ids != self.ignore_index)  # 0 in the padding
                ).aminmax()
        if now and known is not None and readable(known):
            known = known.detach() if known.requires_grad else known
            if not known.is_floating_point() or known.dtype.itemsize == 1:  # few take such
                known = known.float()
            if torch.equal(known.clamp(0, 1), known):  # cheaper than the range, for the error
                known = None
        for name, x in (("weight", sample_weight), ("target", known)):
            if x is not None and readable(x) and x.numel():
                asked[f"least {name}"], asked[f"largest {name}"] = x.detach().aminmax()
        if not asked:
            return
        judge = functools.partial(self._judge, num_classes=classes)
        if not now:
            self._ask(inputs, asked, judge)
        else:
            judge({name: x.item() for name, x in asked.items()}, "")

    def _judge(self, said: Mapping[str, float], at: str, *, num_classes: int) -> None:
        if "least id" in said:
            judge_class_ids(said, num_classes, self.ignore_index, at)
        if "least weight" in said:
            self._judge_weight(said, at)
        if "least target" not in said:
            return
        low, high = said["least target"], said["largest target"]
        if not 0 <= low <= high <= 1:
            raise ValueError(
                f"{at}{type(self).__name__}: targets must be in [0, 1], got {low} to {high}; where "
                "a label is missing (often NaN, -1 or -100) pass label_mask=, bool in the shape of "
                "inputs, False there"
            )


class SigmoidFocalLoss(PointwiseLoss):
    r"""Focal loss of independent yes/no predictions (Lin et al., ICCV 2017): `sigmoid_focal`.

    Args:
        alpha: weight of the positives, in [0, 1]; the negatives have 1 - alpha. -1 for no such
            weights.
        gamma: focusing exponent >= 0; 0 is binary cross-entropy.
        reduction: "none", "mean" over all elements, or "sum".
        gather_distributed: gather the rows of all processes first: None and True when there are
            several, False never.

    Raises:
        ValueError, TypeError: alpha out of range.

    Example:
        >>> loss_fn = SigmoidFocalLoss(alpha=0.75)
        >>> logits = torch.tensor([[2.0], [1.0], [0.0]], requires_grad=True)
        >>> loss = loss_fn(logits, torch.tensor([[0.0], [1.0], [0.0]]))
        >>> round(loss.item(), 4)
        0.1576
    """

    SUPPORTED_REDUCTIONS = focal.SIGMOID_REDUCTIONS

    def __init__(
        self, alpha: float = 0.25, gamma: float = 2.0, reduction: str = "mean",
        gather_distributed: bool | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        check_fraction("alpha", alpha, also=-1)
        check_flag("gather_distributed", gather_distributed, optional=True)
        self.alpha = alpha
        self.gamma = gamma
        self.reduction = reduction
        self.gather_distributed = gather_distributed

    def forward(
        self, inputs: Tensor, targets: Tensor, *, sample_weight: Tensor | None = None,
        label_mask: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """The loss; see `sigmoid_focal` for arguments, shapes and errors.

        Args:
            inputs: [...] floating, logits.
            targets: [...] in [0, 1].
            sample_weight: >= 0 and finite, dim 0 of inputs, its other axes theirs or 1.
            label_mask: [...] bool, targets that are known, or None for all.

        Returns:
            [], or [...] for reduction "none"; in float32 for half input.

        Raises:
            TypeError, ValueError: as `sigmoid_focal`; in eager code a weight that is negative or
                not finite, and a known target outside [0, 1], too (off the CPU at a later
                forward, see `set_debug`).
        """
        sample_weight = as_floating(sample_weight)
        check_elements(inputs, targets, sample_weight, label_mask)
        self._begin(inputs)
        inputs, targets, sample_weight, label_mask = self._gather(
            inputs, targets, sample_weight, label_mask
        )
        known = None
        if targets.dtype != torch.bool:
            known = targets if label_mask is None else targets.where(label_mask, 0)
        self._check(inputs, sample_weight, known=known)  # on all rows: every process, or none
        return focal.sigmoid_focal(
            inputs, targets, alpha=self.alpha, gamma=self.gamma, reduction=self.reduction,
            sample_weight=sample_weight, label_mask=label_mask,
        )  # fmt: skip


class SoftmaxFocalLoss(PointwiseLoss):
    r"""Focal loss of mutually exclusive classes (Lin et al., ICCV 2017): `softmax_focal`.

    Args:
        alpha: [C] weights of the classes, a tensor or numbers; None for 1. Kept as a float32
            buffer.
        gamma: focusing exponent >= 0; 0 is cross-entropy.
        reduction: "none"; "mean" over the rows that count; "mean_positive", the sum over them
            divided by the number (or weight) of those not of background_class; or "sum".
        label_smoothing: as in `torch.nn.functional.cross_entropy`.
        ignore_index: target of rows that do not count; it may be a class id.
        background_class: the class that "mean_positive" does not count.
        gather_distributed: as in `SigmoidFocalLoss`.

    Raises:
        ValueError: alpha not one-dimensional.

    Example:
        >>> loss_fn = SoftmaxFocalLoss(alpha=[0.2, 0.8], reduction="mean_positive")
        >>> logits = torch.tensor([[2.0, 0.0], [0.0, 1.0]], requires_grad=True)
        >>> loss = loss_fn(logits, torch.tensor([0, 1]))
        >>> round(loss.item(), 4)
        0.0185
    """

    SUPPORTED_REDUCTIONS = focal.SOFTMAX_REDUCTIONS
    alpha: Tensor | None

    def __init__(
        self, alpha: Tensor | Sequence[float] | None = None, gamma: float = 2.0,
        reduction: str = "mean", label_smoothing: float = 0.0, ignore_index: int = -100,
        background_class: int = 0, gather_distributed: bool | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        check_int("ignore_index", ignore_index)
        check_int("background_class", background_class)
        check_flag("gather_distributed", gather_distributed, optional=True)
        if alpha is not None:
            alpha = focal.class_weights(alpha).detach().clone().float()
        self.register_buffer("alpha", alpha)
        self.gamma = gamma
        self.reduction = reduction
        self.label_smoothing = label_smoothing
        self.ignore_index = ignore_index
        self.background_class = background_class
        self.gather_distributed = gather_distributed

    def forward(
        self, inputs: Tensor, targets: Tensor, *, sample_weight: Tensor | None = None
    ) -> Tensor:
        """The loss; see `softmax_focal` for arguments, shapes and errors.

        Args:
            inputs: [N, C] or [N, C, ...] floating, logits.
            targets: [N] or [N, ...] integer class ids in [0, C), or ignore_index.
            sample_weight: >= 0 and finite, the shape of targets.

        Returns:
            [], or [N, ...] for reduction "none"; in float32 for half input.

        Raises:
            TypeError, ValueError: as `softmax_focal`; in eager code a weight that is negative or
                not finite too, and a target outside [0, C), which gives NaN (off the CPU at a
                later forward, see `set_debug`).
        """
        sample_weight = as_floating(sample_weight)
        check_class_targets(inputs, targets, sample_weight)
        self._begin(inputs)
        inputs, targets, sample_weight = self._gather(inputs, targets, sample_weight)
        self._check(inputs, sample_weight, targets)
        return focal.softmax_focal(
            inputs, targets, alpha=self.alpha, gamma=self.gamma, reduction=self.reduction,
            label_smoothing=self.label_smoothing, ignore_index=self.ignore_index,
            background_class=self.background_class, sample_weight=sample_weight,
        )  # fmt: skip
