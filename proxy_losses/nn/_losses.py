"""The ranking losses as modules."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _step
from .._checks import INTERPOLATIONS, check_choice, check_quantile
from .._step import ClassLosses, Pool
from ._base import RankingLoss


class SmoothAPLoss(RankingLoss):
    r"""1 - Smooth-AP (Brown et al., ECCV 2020), one-vs-rest, over the batch and a memory queue.

    Args:
        num_classes: C; 1 for binary, with targets in {0, 1}.
        queue_size: past rows kept, 0 for none.
        temperature: in units of the logits, > 0; smaller is closer to AP, with sharper gradients.
        reduction: "mean" or "sum" over the classes that have positives and negatives, or "none".
        ignore_index: class id of rows that do not count.
        update_queue_in_eval: store rows in eval mode too.
        gather_distributed: gather the rows of all processes before ranking and storing: None and
            True when there are several, False never.
        max_pool_size: rank a subsample of at most this many rows, with a quota for rare classes.
            Kept for compatibility and for eager code alone: ranks need no cap here.

    Raises:
        ValueError, TypeError: an argument out of range.

    Example:
        >>> loss_fn = SmoothAPLoss(num_classes=1, queue_size=256, temperature=0.05)
        >>> logits = torch.tensor([[2.0], [1.0], [0.0]], requires_grad=True)
        >>> loss = loss_fn(logits, torch.tensor([0, 1, 0]))
        >>> round(loss.item(), 3)
        0.5
    """

    def __init__(
        self,
        num_classes: int,
        queue_size: int = 1024,
        temperature: float = 0.01,
        reduction: str = "mean",
        ignore_index: int = -100,
        update_queue_in_eval: bool = False,
        gather_distributed: bool | None = None,
        max_pool_size: int | None = None,
    ) -> None:
        super().__init__(
            num_classes, queue_size, temperature, reduction, ignore_index,
            update_queue_in_eval, gather_distributed, max_pool_size,
        )  # fmt: skip

    def _classes(self, pool: Pool) -> ClassLosses:
        return _step.smooth_ap_classes(pool, self._tau)


class RecallAtQuantileLoss(RankingLoss):
    r"""1 - smooth recall in the top fraction of the scores, over the batch and a memory queue.

    Args:
        num_classes: C; 1 for binary, with targets in {0, 1}.
        quantile: the top fraction, in (0, 1): 0.005 is the top 0.5 % of the pool. Below about
            1 / quantile rows in the pool the threshold is its largest score.
        queue_size: past rows kept, 0 for none.
        temperature: in units of the logits, > 0.
        reduction: "mean" or "sum" over the classes that have positives, or "none".
        ignore_index: class id of rows that do not count.
        update_queue_in_eval: store rows in eval mode too.
        gather_distributed: as in `SmoothAPLoss`.
        quantile_interpolation: as `interpolation` of `torch.quantile`.
        max_pool_size: as in `SmoothAPLoss`.

    Raises:
        ValueError, TypeError: an argument out of range, or, in forward, a class id outside
            [0, num_classes).

    Example:
        >>> loss_fn = RecallAtQuantileLoss(num_classes=1, quantile=0.5, queue_size=0)
        >>> logits = torch.tensor([[2.0], [1.0], [0.0], [-1.0]])
        >>> loss_fn(logits, torch.tensor([1, 0, 0, 0])).item()
        0.0
    """

    def __init__(
        self,
        num_classes: int,
        quantile: float = 0.005,
        queue_size: int = 1024,
        temperature: float = 0.01,
        reduction: str = "mean",
        ignore_index: int = -100,
        update_queue_in_eval: bool = False,
        gather_distributed: bool | None = None,
        quantile_interpolation: str = "higher",
        max_pool_size: int | None = None,
    ) -> None:
        check_choice("quantile_interpolation", quantile_interpolation, INTERPOLATIONS)
        check_quantile(quantile, quantile_interpolation)
        super().__init__(
            num_classes, queue_size, temperature, reduction, ignore_index,
            update_queue_in_eval, gather_distributed, max_pool_size,
        )  # fmt: skip
        self.quantile = quantile
        self.quantile_interpolation = quantile_interpolation

    def _classes(self, pool: Pool) -> ClassLosses:
        return _step.recall_classes(
            pool, self._tau, quantile=self.quantile, interpolation=self.quantile_interpolation
        )

    def _check_rows(
        self,
        logits: Tensor,
        targets: Tensor,
        iid_mask: Tensor | None,
        sample_weight: Tensor | None,
    ) -> None:
        super()._check_rows(logits, targets, iid_mask, sample_weight)
        if self.num_classes == 1 or targets.dim() == 2 or torch.compiler.is_compiling():
            return
        stray = ((targets < 0) | (targets >= self.num_classes)) & (targets != self.ignore_index)
        if stray.any():
            raise ValueError(
                f"targets contain class ids outside [0, {self.num_classes}) and other than "
                f"ignore_index={self.ignore_index}: {targets[stray][:5].tolist()}"
            )
