"""Records over the old files of recall and partial AUC."""

from __future__ import annotations

from torch import Tensor

from .._band import Band, check_band_options, partial_auc_and_stats
from .._checks import (
    BUDGET_BASES,
    INTERPOLATIONS,
    POS_NUMERATORS,
    SURROGATES,
    TAU_SCALES,
    check_quantile,
)
from .._pauc import partial_auc, partial_auc_defined
from .._ranks import How, Lists
from .._recall import (
    recall_and_counts,
    recall_at_quantile,
    recall_defined,
    recall_saturation,
)
from ._record import Found, Metric, Option, Settings, rank_stats


def _recall(
    lists: Lists, tau: float | Tensor, settings: Settings, how: How, *, stats: bool
) -> Found:
    value, defined = recall_and_counts(
        lists.scores, lists.pos, tau, settings["quantile"], settings["interpolation"],
        lists.valid, lists.weight, how.group,
    )  # fmt: skip
    if not stats:
        return Found(value, defined, {})
    share = recall_saturation(
        lists.scores, lists.pos, tau, **settings, valid_mask=lists.valid, group=how.group
    )
    return Found(value, defined, rank_stats(lists, tau, share, defined, how))


INTERPOLATION = Option(
    "interpolation", "higher", "str", "as in `torch.quantile`.", "quantile_interpolation", True,
    INTERPOLATIONS,
)  # fmt: skip
RECALL = Metric(
    name="recall_at_quantile",
    module="RecallAtQuantileLoss",
    title="smooth recall in the top fraction of the scores",
    function=recall_at_quantile,
    evaluate=_recall,
    defined=recall_defined,
    options=(
        Option(
            "quantile", 0.005, "float",
            "the top fraction, in (0, 1): 0.005 is the top 0.5 % of the pool. Below about "
            "1 / quantile rows in the pool the threshold is its largest score.",
        ),
        INTERPOLATION,
    ),
    check=lambda settings: check_quantile(settings["quantile"], settings["interpolation"]),
    needs_negative=False,
    examples=({"quantile": 0.3},),
    checks_ids=True,
    table="recall in the top fraction",
    shown="quantile",
    counts="have positives",
    note=(
        "Only positives get a gradient, so nothing holds the other scores down: train with a share "
        "of cross-entropy, as with final_main_weight=0.75 of `LossWarmupWrapper`."
    ),
    diagnostics=(
        "saturation, the share of positives whose rank has numerically no gradient "
        "(`recall_saturation`); tau_eff, the temperature in units of the logits; pos_count, "
        "the positives ranked"
    ),
    loss_example="""
    >>> logits = torch.arange(200.0)[:, None]
    >>> targets = (torch.arange(200) >= 199).long()
    >>> loss, _ = recall_at_quantile_loss(logits, targets, None, 0.01)
    >>> loss.item()
    0.5
    """,
    module_example="""
    >>> loss_fn = RecallAtQuantileLoss(num_classes=1, quantile=0.5, queue_size=0)
    >>> logits = torch.tensor([[2.0], [1.0], [0.0], [-1.0]])
    >>> loss_fn(logits, torch.tensor([1, 0, 0, 0])).item()
    0.0
    """,
)  # fmt: skip


def _pauc(lists: Lists, tau: float | Tensor, settings: Settings, how: How, *, stats: bool) -> Found:
    out = partial_auc_and_stats(
        lists.scores, lists.pos, tau, Band(**settings), lists.valid, lists.weight, lists.iid,
        lists.live, how.rtol, stats, how.group,
    )  # fmt: skip
    return Found(out.value, out.counts, out.stats, out.degenerate)


PARTIAL_AUC = Metric(
    name="partial_auc",
    module="PAUCAtBudgetLoss",
    title="partial AUC over a band of false-positive rates",
    function=partial_auc,
    evaluate=_pauc,
    defined=partial_auc_defined,
    options=(
        Option("alpha", 0.0, "float", "lower false-positive rate, 0 <= alpha < beta."),
        Option(
            "beta", 0.005, "float",
            "upper false-positive rate, the budget, at most 1; 0.005 is 0.5 % of the negatives. "
            "The pool should hold well over 1 / beta of them.",
        ),
        Option(
            "surrogate", "trapezoid", "str",
            '"trapezoid" (gradient to positives) or "pairwise" (and to the band\'s negatives).',
            choices=SURROGATES,
        ),
        Option("n_knots", 2, "int", "false-positive rates of the trapezoid, >= 2."),
        Option(
            "tau_scale", "iqr", "str",
            'the spread that the temperature multiplies, "iqr" or "band", see `partial_auc`.',
            choices=TAU_SCALES,
        ),
        Option(
            "pos_numerator", "pool", "str",
            '"pool" for all positives, "live" for those of the batch alone.',
            choices=POS_NUMERATORS,
        ),
        Option(
            "budget_basis", "fpr", "str",
            '"fpr" for a band of the iid negatives, "population" of all iid rows.',
            choices=BUDGET_BASES,
        ),
        INTERPOLATION,
    ),
    check=lambda settings: check_band_options(Band(**settings)),
    reads=("iid", "live"),
    temperature=0.1,
    own_spread=True,
    examples=(
        {"alpha": 0.125, "beta": 0.625, "n_knots": 3},
        {"alpha": 0.0, "beta": 0.5, "surrogate": "pairwise"},
    ),
    table="partial AUC up to a false-positive budget",
    shown="beta",
    note=(
        "Every class has its own band and temperature, read off its iid negatives. With the "
        "trapezoid only positives get a gradient, so nothing holds the other scores down: train "
        "with a share of cross-entropy, as with final_main_weight=0.75 of `LossWarmupWrapper`."
    ),
    diagnostics=(
        "t_alpha and t_beta, the ends of the band; tau_eff, the temperature in units of the "
        "logits; band_neg_count, the iid negatives in it; pauc_var, the unweighted variance of the "
        "positives' share of the value"
    ),
    loss_example="""
    >>> logits = torch.arange(1000.0)[:, None]
    >>> targets = (torch.arange(1000) >= 999).long()
    >>> loss, _ = partial_auc_loss(logits, targets, None, 1e-4, surrogate="pairwise")
    >>> loss.item()
    0.0
    """,
    module_example="""
    >>> loss_fn = PAUCAtBudgetLoss(num_classes=1, beta=0.1, queue_size=0)
    >>> logits = torch.cat([torch.tensor([500.0]), torch.arange(100.0)])[:, None]
    >>> loss_fn(logits, (logits[:, 0] > 400).long()).item()
    0.0
    """,
)  # fmt: skip
