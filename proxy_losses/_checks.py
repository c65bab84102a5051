"""Checks of shapes, dtypes and static ranges. They read metadata only, never tensor values."""

from __future__ import annotations

import math
import sys
import warnings
from collections.abc import Mapping, Sequence
from numbers import Integral, Rational, Real
from typing import Any, NoReturn

import torch
from torch import Tensor

INTERPOLATIONS = ("linear", "lower", "higher", "midpoint", "nearest")
REDUCTIONS = ("mean", "sum", "none")
SURROGATES = ("trapezoid", "pairwise")
TAU_SCALES = ("iqr", "band")
POS_NUMERATORS = ("pool", "live")
BUDGET_BASES = ("fpr", "population")
DISTRIBUTED = ("gather", "shard")
TEMPERATURE_UNITS = ("score", "spread")
THRESHOLD_GRADS = ("implicit", "none")
MAX_WEIGHT = 2.0**100  # so that the sum of a pool of weights is finite in float32
TEMPERATURES = (1e-20, 1e20)  # float32 holds their products with any spread that is not 0


def fail_type(name: str, expected: str, got: object, instead: str = "") -> NoReturn:
    """Raise `TypeError`; instead is what to write where a tensor was given."""
    what = type(got).__name__
    if "tensor" in expected and (isinstance(got, list) or hasattr(got, "__array__")):
        what += "; torch.as_tensor makes a tensor"
    if isinstance(got, Tensor):
        what = f"a tensor of {got.dtype}" + (f"; {instead}" if instead else "")
    raise TypeError(f"{name} must be {expected}, got {what}")


def check_floating(name: str, x: object) -> None:
    """Raise `TypeError` unless x is a floating-point tensor."""
    if not isinstance(x, Tensor) or not x.is_floating_point():
        fail_type(name, "a floating-point tensor", x)
    if x.dtype.itemsize < 2:
        fail_type(name, "a floating-point tensor of 16 bits at least", x)


def check_bool(name: str, x: object) -> None:
    """Raise `TypeError` unless x is a bool tensor."""
    if not isinstance(x, Tensor) or x.dtype != torch.bool:
        fail_type(name, "a bool tensor", x, f"pass {name}.bool()")


def common_shape(first: torch.Size, *others: torch.Size) -> torch.Size:
    """`torch.broadcast_shapes`, which takes 0.1 ms, unless all are equal."""
    if all(other == first for other in others):
        return first
    shape: torch.Size = torch.broadcast_shapes(first, *others)
    return shape


def check_real(name: str, x: object) -> None:
    """Raise `TypeError` unless x is a tensor of real numbers or bool."""
    if not isinstance(x, Tensor) or x.is_complex():
        fail_type(name, "a real tensor", x)


def check_integers(name: str, x: object) -> None:
    """Raise `TypeError` unless x is a tensor of integers or bool."""
    if not isinstance(x, Tensor) or x.is_floating_point() or x.is_complex():
        fail_type(name, "an integer tensor", x)


def check_same_list(name: str, x: Tensor, scores: Tensor, of: str = "scores") -> None:
    """Raise `ValueError` unless x has scores' last axis and leading axes that broadcast with it."""
    if x.shape == scores.shape:
        return
    if x.dim() == 0 or x.shape[-1] != scores.shape[-1]:
        column = scores.dim() == 2 and scores.shape[1] == 1 and x.shape == scores.shape[:1]
        raise ValueError(
            f"{name} must have the list length of {of} on its last axis: "
            f"expected [..., {scores.shape[-1]}], got {list(x.shape)}"
            + (f"; lists lie on the last axis: pass {of}[:, 0]" if column else "")
        )
    try:
        torch.broadcast_shapes(x.shape, scores.shape)
    except RuntimeError:
        raise ValueError(
            f"leading axes of {name} must broadcast with those of {of}: "
            f"expected {list(scores.shape)}, got {list(x.shape)}"
        ) from None


def check_lists(
    scores: Tensor, pos_mask: Tensor, valid_mask: Tensor | None = None,
    sample_weight: Tensor | None = None, gains: Tensor | None = None, **masks: Tensor | None,
) -> torch.Size:  # fmt: skip
    """Check the arguments that every list-wise metric takes, and further bool masks by name.

    With gains it is these that were given, and pos_mask was made of them.

    Returns the shape [..., M] that they have together.
    """
    check_floating("scores", scores)
    _check_axis("scores", scores)
    if gains is None:
        check_bool("pos_mask", pos_mask)
        check_same_list("pos_mask", pos_mask, scores)
    else:
        _check_gains(gains)
        check_same_list("gains", gains, scores)
    _check_beside("scores", scores, sample_weight, {"valid_mask": valid_mask, **masks})
    given = (pos_mask, valid_mask, sample_weight, *masks.values())
    return common_shape(scores.shape, *(x.shape for x in given if x is not None))


def check_defined(
    marks: Tensor, valid_mask: Tensor | None, sample_weight: Tensor | None, *, graded: bool = False
) -> None:
    """`check_lists` where scores are not asked for; marks are gains if graded, else pos_mask."""
    name = "gains" if graded else "pos_mask"
    if graded:
        _check_gains(marks)
    else:
        check_bool(name, marks)
    _check_axis(name, marks)
    _check_beside(name, marks, sample_weight, {"valid_mask": valid_mask})


def _check_axis(name: str, x: Tensor) -> None:
    if x.dim() == 0:
        raise ValueError(f"{name} must have at least one axis [..., M], got a 0-d tensor")


def _check_gains(gains: Tensor) -> None:
    check_real("gains", gains)
    if gains.is_floating_point():
        check_floating("gains", gains)


def _check_beside(
    of: str, lists: Tensor, sample_weight: Tensor | None, masks: Mapping[str, Tensor | None]
) -> None:
    for name, mask in masks.items():
        if mask is not None:
            check_bool(name, mask)
            check_same_list(name, mask, lists, of)
    if sample_weight is not None:
        check_floating("sample_weight", sample_weight)
        check_same_list("sample_weight", sample_weight, lists, of)


def check_tau(tau: float | Tensor, lists: torch.Size) -> None:
    """Raise unless tau is a positive number, or a floating tensor that broadcasts to the lists."""
    if not isinstance(tau, Tensor):
        check_temperature("tau", tau)
        return
    check_floating("tau", tau)
    tail = lists[len(lists) - tau.dim() :]
    if tau.dim() > len(lists) or any(t not in (1, n) for t, n in zip(tau.shape, tail, strict=True)):
        raise ValueError(
            f"tau must be 0-d or one value per list {list(lists)}, got {list(tau.shape)}"
        )


def as_number(name: str, x: Any) -> Any:
    """A tensor of one number as that number; anything else as it is."""
    if not isinstance(x, Tensor):
        return x
    if x.numel() != 1:
        raise ValueError(f"{name} must be one number, got a tensor of shape {list(x.shape)}")
    return x.item()


def as_whole(name: str, x: Any) -> Any:
    """`as_number`, and a float that is whole, as products and files have it, as the integer."""
    x = as_number(name, x)
    if isinstance(x, Real) and not isinstance(x, Integral) and float(x).is_integer():
        return int(float(x))
    return x


def check_number(name: str, x: object) -> None:
    """Raise `TypeError` unless x is a real number and no bool, or one that a compiler traces."""
    if type(x) is float:  # the usual, at once
        return
    fraction = isinstance(x, Rational) and not isinstance(x, Integral)
    if isinstance(x, bool) or fraction or not isinstance(x, Real | torch.SymFloat | torch.SymInt):
        fail_type(name, "a number", x)


def _as_float(x: Real) -> float:
    try:
        return float(x)
    except OverflowError:  # an integer
        return math.inf


def check_positive(name: str, x: float) -> None:
    """Raise unless x is a finite number > 0."""
    check_number(name, x)
    if not 0 < (_as_float(x) if isinstance(x, Real) else x) < math.inf:
        raise ValueError(f"{name} must be positive and finite, got {x}")


def check_fraction(name: str, x: float, also: float | None = None) -> None:
    """Raise unless x is a number in [0, 1], or the one value `also`, which means none."""
    check_number(name, x)
    if not 0.0 <= x <= 1.0 and (also is None or x != also):
        more = "" if also is None else f", or {also} for none"
        raise ValueError(f"{name} must be in [0, 1]{more}, got {x}")


def check_temperature(name: str, x: float) -> None:
    """Raise unless x is a number that is a temperature in float32 too."""
    check_number(name, x)
    low, high = TEMPERATURES
    if isinstance(x, Real) and not low <= _as_float(x) <= high:
        start = '; at 0 a ranking has no gradient: 0.25 with temperature_unit="spread" is a start'
        raise ValueError(
            f"{name} must be positive, in [{low}, {high}], got {x}{start if x == 0 else ''}"
        )


def check_int(name: str, x: int, minimum: int | None = None) -> None:
    """Raise `TypeError` unless x is an integer, `ValueError` below minimum or out of int64."""
    if isinstance(x, bool) or not isinstance(x, Integral):
        fail_type(name, "an integer", x)
    if minimum is not None and x < minimum:
        raise ValueError(f"{name} must be >= {minimum}, got {x}")
    if not -(2**63) <= x < 2**63:
        raise ValueError(f"{name} must fit in 64 bits, got {x}")


def check_flag(name: str, x: object, *, optional: bool = False) -> None:
    """Raise `TypeError` unless x is True, False, an integer in their place or, optionally, None."""
    if not isinstance(x, Integral) and not (optional and x is None):
        fail_type(name, "True or False", x)


def check_places(name: str, k: Any) -> None:
    """Raise unless k is an integer >= 1 or a sequence of such."""
    many = k if isinstance(k, Sequence) and not isinstance(k, str) else [k]
    if not many:
        raise ValueError(f"{name} must be an integer >= 1 or a sequence of such, got {k!r}")
    for each in many:
        check_int(name, each, 1)


def check_quantile(quantile: float) -> None:
    """Raise unless 0 < quantile < 1."""
    check_number("quantile", quantile)
    if not 0.0 < quantile < 1.0:
        raise ValueError(
            f"quantile (the top fraction; 0.005 is the top 0.5 %) must be in (0, 1), got {quantile}"
        )


def check_precision(precision: float) -> None:
    """Raise unless 0 < precision <= 1."""
    check_number("precision", precision)
    if not 0.0 < precision <= 1.0:
        raise ValueError(f"precision must be in (0, 1], got {precision}")


def check_band(alpha: float, beta: float, n_knots: int) -> None:
    """Raise unless 0 <= alpha < beta <= 1 and n_knots is an integer >= 2."""
    check_number("alpha", alpha)
    check_number("beta", beta)
    if not 0.0 <= alpha < beta <= 1.0:
        raise ValueError(
            f"alpha and beta, the band of false-positive rates, must satisfy "
            f"0 <= alpha < beta <= 1, got alpha={alpha} and beta={beta}"
        )
    if isinstance(n_knots, bool) or not isinstance(n_knots, Integral) or n_knots < 2:
        raise ValueError(f"n_knots must be an integer >= 2, got {n_knots!r}")


def check_floor(min_tpr: float) -> None:
    """Raise unless 0 <= min_tpr < 1."""
    check_number("min_tpr", min_tpr)
    if not 0.0 <= min_tpr < 1.0:
        raise ValueError(
            f"min_tpr, the true-positive rate that the band starts at, must be in [0, 1), "
            f"got {min_tpr}"
        )


def check_choice(name: str, x: str, choices: tuple[str, ...]) -> None:
    """Raise `ValueError` unless x is one of choices."""
    if not isinstance(x, str) or x not in choices:
        raise ValueError(f"{name} must be one of {list(choices)}, got {x!r}")


def check_rtol(rtol: float | None) -> None:
    """Raise `ValueError` unless rtol is None or in (0, 1)."""
    if rtol is not None and not 0.0 < rtol < 1.0:
        raise ValueError(f"rtol must be None or in (0, 1), got {rtol}")


def check_batch(logits: Tensor, targets: Tensor, num_classes: int | None = None) -> None:
    """Check a training batch.

    logits [N, C] floating; targets [N] integers, or labels [N, C] (bool) when C > 1.
    """
    if not isinstance(logits, Tensor) or logits.dim() != 2:
        got = f"{type(logits).__name__}; torch.as_tensor makes a tensor"
        if isinstance(logits, Tensor):
            row = "; with one score a row pass logits[:, None]" if logits.dim() == 1 else ""
            got = f"{list(logits.shape)}{row}"
        raise ValueError(f"logits must be [N, C], got {got}")
    check_floating("logits", logits)
    n, c = logits.shape
    if num_classes is not None and c != num_classes:
        two = "; of two columns pass the difference, logits[:, 1:] - logits[:, :1]"
        raise ValueError(
            f"logits must be [N, num_classes={num_classes}], got {list(logits.shape)}"
            + (two if (c, num_classes) == (2, 1) else "")
        )
    if not isinstance(targets, Tensor):
        raise TypeError(
            f"targets must be a tensor, got {type(targets).__name__}; torch.as_tensor makes one"
        )
    if targets.shape != (n,) and not (targets.shape == (n, c) and is_labels(targets)):
        raise ValueError(
            f"targets must be [N={n}] class ids, or [N={n}, C={c}] bool labels with C > 1, "
            f"got {list(targets.shape)} of {targets.dtype}"
            + (
                "; of one-hot columns pass targets.argmax(1), of several labels a row "
                "targets.bool()"
                if targets.dim() == 2 and len(targets) == n
                else ""
            )
        )
    if targets.dim() == 1 and targets.dtype != torch.bool and not _is_integer(targets):
        fail_type("targets", "integer class ids", targets)


def _is_integer(x: Tensor) -> bool:
    return not (x.is_floating_point() or x.is_complex() or x.dtype == torch.bool)


def is_labels(targets: Tensor) -> bool:
    """Whether targets are multi-label, [N, C] bool, rather than class ids, [N]."""
    # A size may be a symbol of the compiler: a comparison of it is a bool where it decides.
    if targets.dim() == 2 and targets.dtype == torch.bool and targets.shape[1] > 1:  # noqa: SIM103
        return True
    return False


def check_rows(name: str, x: Tensor | None, n: int) -> None:
    """Raise unless x is None or a tensor with one entry per row, [N]."""
    if x is not None and not isinstance(x, Tensor):
        fail_type(name, "a tensor", x)
    if x is not None and x.shape != (n,):
        raise ValueError(f"{name} must match logits dim-0: expected [{n}], got {list(x.shape)}")


def check_query_ids(query_ids: Tensor | None, n: int) -> None:
    """Raise unless query_ids is None or [N] integer query ids."""
    check_rows("query_ids", query_ids, n)
    if query_ids is not None and not _is_integer(query_ids):
        fail_type("query_ids", "integer query ids", query_ids)


def check_row_ids(name: str, row_ids: Tensor | None, n: int) -> None:
    """Raise unless row_ids is None or [N] integer ids of rows."""
    if row_ids is None:
        return
    if not isinstance(row_ids, Tensor) or not _is_integer(row_ids):
        fail_type(name, "integer ids of rows", row_ids)
    if row_ids.shape != (n,):
        raise ValueError(f"{name} must be one id for each row: [{n}], got {list(row_ids.shape)}")


def check_label_mask(label_mask: Tensor | None, shape: torch.Size, like: str = "logits") -> None:
    """Raise unless label_mask is None or bool of this shape, that of the logits."""
    if label_mask is None:
        return
    check_bool("label_mask", label_mask)
    if label_mask.shape != shape:
        raise ValueError(
            f"label_mask must have the shape of {like}: expected {list(shape)}, "
            f"got {list(label_mask.shape)}"
        )


def check_row_extras(
    shape: torch.Size, sample_weight: Tensor | None, iid_mask: Tensor | None,
    query_ids: Tensor | None, label_mask: Tensor | None, gains: Tensor | None = None,
) -> None:  # fmt: skip
    """Check what rows of logits [N, C] may carry: weights, flags, query ids, labels, gains."""
    n = shape[0]
    check_rows("sample_weight", sample_weight, n)
    if sample_weight is not None:
        check_floating("sample_weight", sample_weight)
    check_rows("iid_mask", iid_mask, n)
    if iid_mask is not None:
        check_bool("iid_mask", iid_mask)
    check_query_ids(query_ids, n)
    check_label_mask(label_mask, shape)
    if gains is not None:
        check_floating("gains", gains)
        if gains.shape != shape:
            raise ValueError(f"gains must be [N, C] = {list(shape)}, got {list(gains.shape)}")


def as_list_shape(name: str, shape: Any) -> tuple[int, int] | None:
    """None, or any ordered pair of integers >= 1, such as a list from a file, as a tuple."""
    if shape is None:
        return None
    pair = shape.tolist() if hasattr(shape, "tolist") else shape  # of numpy or torch
    if not isinstance(pair, Sequence) or isinstance(pair, str | bytes) or len(pair) != 2:
        raise ValueError(f"{name} must be None or a pair (queries, longest query), got {shape!r}")
    for what, size in zip(("queries", "longest query"), pair, strict=True):
        check_int(f"{name}, {what},", size, 1)
    return int(pair[0]), int(pair[1])


def warn_user(message: str, category: type[Warning] = UserWarning) -> None:
    """A warning attributed to the caller's own line, however many of our frames lie above."""
    level, frame = 1, sys._getframe()
    while frame.f_back is not None and frame.f_globals.get("__name__", "").split(".")[0] in (
        "proxy_losses",
        "torch",
    ):
        level, frame = level + 1, frame.f_back
    warnings.warn(message, category, stacklevel=level)
