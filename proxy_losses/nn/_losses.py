"""The ranking losses as modules."""

from __future__ import annotations

import torch

from .. import _step
from .._checks import INTERPOLATIONS, check_choice, check_quantile, warn_user
from .._metrics.partial_auc import PARTIAL_AUC
from .._pool import Batch, Pool
from .._step import ClassLosses, Options
from ._base import RankingLoss
from ._batch import check_class_ids


class SmoothAPLoss(RankingLoss):
    r"""1 - Smooth-AP (Brown et al., ECCV 2020), one-vs-rest, over the batch and a memory queue.

    Called with logits [N, C] and targets, see `proxy_losses.nn.RankingLoss.forward`; formula and
    limits are those of `smooth_ap`.

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
        temperature_unit: "score" for a temperature in units of the logits, as published; "spread"
            to multiply it by the detached spread of the pool (`score_spread`), class by class, so
            that it keeps its meaning as the logits grow.
        query_shape: (queries, longest query), bounds that compiled code needs for `query_ids`.
        distributed: what several processes do when they gather: "gather" every row to all, or
            "shard", where each keeps its rows and a queue of its own, only sums travel, and the
            loss is the same exact one of the whole pool (see the README).

    Diagnostics (return_diagnostics), [C] each: saturation, the share of positives whose rank has
    numerically no gradient (`smooth_ap_saturation`); tau_eff, the temperature in units of the
    logits; pos_count, the positives ranked; grad_pos_count, those of them in this batch.

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
        *,
        temperature_unit: str = "score",
        query_shape: tuple[int, int] | None = None,
        distributed: str = "gather",
    ) -> None:
        super().__init__(
            num_classes, queue_size, temperature, reduction, ignore_index,
            update_queue_in_eval, gather_distributed, max_pool_size, query_shape,
            distributed, temperature_unit,
        )  # fmt: skip

    def _classes(self, pool: Pool, options: Options) -> ClassLosses:
        return _step.smooth_ap_classes(pool, self._tau, options)


class RecallAtQuantileLoss(RankingLoss):
    r"""1 - smooth recall in the top fraction of the scores, over the batch and a memory queue.

    Called with logits [N, C] and targets, see `proxy_losses.nn.RankingLoss.forward`; formula and
    limits are those of `recall_at_quantile`. Only positives get a gradient, so nothing holds the
    other scores down: train with a share of cross-entropy, as with final_main_weight=0.75 of
    `LossWarmupWrapper`.

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
        temperature_unit: as in `SmoothAPLoss`.
        query_shape: as in `SmoothAPLoss`.
        distributed: as in `SmoothAPLoss`.

    Diagnostics as in `SmoothAPLoss`, with `recall_saturation`.

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
        *,
        temperature_unit: str = "score",
        query_shape: tuple[int, int] | None = None,
        distributed: str = "gather",
    ) -> None:
        check_choice("quantile_interpolation", quantile_interpolation, INTERPOLATIONS)
        check_quantile(quantile, quantile_interpolation)
        super().__init__(
            num_classes, queue_size, temperature, reduction, ignore_index,
            update_queue_in_eval, gather_distributed, max_pool_size, query_shape,
            distributed, temperature_unit,
        )  # fmt: skip
        self.quantile = quantile
        self.quantile_interpolation = quantile_interpolation

    def _classes(self, pool: Pool, options: Options) -> ClassLosses:
        return _step.recall_classes(
            pool, self._tau, options,
            quantile=self.quantile, interpolation=self.quantile_interpolation,
        )  # fmt: skip

    def _check_values(self, batch: Batch) -> None:
        super()._check_values(batch)
        if self.num_classes > 1 and batch.targets.dim() == 1:
            check_class_ids(batch.targets, self.num_classes, self.ignore_index)


class PAUCAtBudgetLoss(RankingLoss):
    r"""1 - partial AUC over a band of false-positive rates, over the batch and a memory queue.

    Called with logits [N, C] and targets, see `proxy_losses.nn.RankingLoss.forward`. Every class
    has its own band and temperature, read off its iid negatives; see `partial_auc`. With the
    trapezoid only positives get a gradient, so nothing holds the other scores down: train with a
    share of cross-entropy, as with final_main_weight=0.75 of `LossWarmupWrapper`.

    Args:
        num_classes: C; 1 for binary, with targets in {0, 1}.
        alpha: lower false-positive rate, 0 <= alpha < beta.
        beta: upper false-positive rate, the budget, at most 1; 0.005 is 0.5 % of the negatives.
            The pool should hold well over 1 / beta of them.
        surrogate: "trapezoid" (gradient to positives) or "pairwise" (and to the band's negatives).
        n_knots: false-positive rates of the trapezoid, >= 2.
        tau_scale: the spread that temperature multiplies, "iqr" or "band".
        pos_numerator: "pool" for all positives, "live" for those of the batch alone.
        budget_basis: "fpr" for a band of the iid negatives, "population" of all iid rows.
        queue_size: past rows kept, 0 for none.
        temperature: in units of that spread, > 0.
        reduction: "mean" or "sum" over the classes that count, or "none".
        ignore_index: class id of rows that do not count.
        update_queue_in_eval: store rows in eval mode too.
        gather_distributed: as in `SmoothAPLoss`.
        quantile_interpolation: as `interpolation` of `torch.quantile`.
        max_pool_size: as in `SmoothAPLoss`.
        query_shape: as in `SmoothAPLoss`.
        distributed: as in `SmoothAPLoss`.

    Diagnostics (return_diagnostics), [C] each: t_alpha and t_beta, the ends of the band; tau_eff,
    the temperature in units of the logits; band_neg_count, the iid negatives in it; pauc_var, the
    unweighted variance of the positives' share of the value; grad_pos_count, the positives of this
    batch. NaN or 0 for a class that does not count.

    Warns:
        UserWarning: once, when a class is left out because its reference scores have no
            dispersion to set a temperature by.

    Raises:
        ValueError, TypeError: an argument out of range.

    Example:
        >>> loss_fn = PAUCAtBudgetLoss(num_classes=1, beta=0.1, queue_size=0)
        >>> logits = torch.cat([torch.tensor([500.0]), torch.arange(100.0)])[:, None]
        >>> loss_fn(logits, (logits[:, 0] > 400).long()).item()
        0.0
    """

    def __init__(
        self,
        num_classes: int,
        alpha: float = 0.0,
        beta: float = 0.005,
        surrogate: str = "trapezoid",
        n_knots: int = 2,
        tau_scale: str = "iqr",
        pos_numerator: str = "pool",
        budget_basis: str = "fpr",
        queue_size: int = 1024,
        temperature: float = 0.1,
        reduction: str = "mean",
        ignore_index: int = -100,
        update_queue_in_eval: bool = False,
        gather_distributed: bool | None = None,
        quantile_interpolation: str = "higher",
        max_pool_size: int | None = None,
        *,
        query_shape: tuple[int, int] | None = None,
        distributed: str = "gather",
    ) -> None:
        check_choice("quantile_interpolation", quantile_interpolation, INTERPOLATIONS)
        self._settings = {
            "alpha": alpha, "beta": beta, "surrogate": surrogate, "n_knots": n_knots,
            "tau_scale": tau_scale, "pos_numerator": pos_numerator, "budget_basis": budget_basis,
            "interpolation": quantile_interpolation,
        }  # fmt: skip
        assert PARTIAL_AUC.check is not None
        PARTIAL_AUC.check(self._settings)
        super().__init__(
            num_classes, queue_size, temperature, reduction, ignore_index,
            update_queue_in_eval, gather_distributed, max_pool_size, query_shape,
            distributed,
        )  # fmt: skip
        self.alpha = float(alpha)
        self.beta = float(beta)
        self.surrogate = surrogate
        self.n_knots = n_knots
        self.tau_scale = tau_scale
        self.pos_numerator = pos_numerator
        self.budget_basis = budget_basis
        self.quantile_interpolation = quantile_interpolation
        self._degenerate_warned = False

    def _classes(self, pool: Pool, options: Options) -> ClassLosses:
        losses = _step.partial_auc_classes(pool, self._tau, options, settings=self._settings)
        if self._degenerate_warned or torch.compiler.is_compiling():
            return losses
        assert losses.degenerate is not None
        if losses.degenerate.any():
            self._degenerate_warned = True
            warn_user(
                f"{type(self).__name__}: the reference scores of at least one class have no "
                "dispersion (all equal, or too few for this band), so no temperature can be set; "
                "the class is left out. A longer queue or a wider band helps."
            )
        return losses
