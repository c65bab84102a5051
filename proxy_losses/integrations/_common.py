"""What integrations share: finding wrappers, what to log of them, rows to validate on."""

from __future__ import annotations

from typing import Any

from torch import nn

from ..nn import LossWarmupWrapper, ScheduledLoss


def find_wrappers(root: nn.Module) -> dict[str, LossWarmupWrapper]:
    """The wrappers in a module by their path in it; one that is reachable twice counts once.

    Raises:
        ValueError: there is none.
    """
    found = {n: m for n, m in root.named_modules() if isinstance(m, LossWarmupWrapper)}
    if not found:
        raise ValueError(
            f"no LossWarmupWrapper in {type(root).__name__}: assign it to an attribute of the "
            "module (a plain list or dict hides it; nn.ModuleList and nn.ModuleDict do not)"
        )
    return found


def own_queue_losses(root: nn.Module) -> dict[str, ScheduledLoss]:
    """The losses in a module whose queue is each process's own, by their path in it."""
    losses = {n: m for n, m in root.named_modules() if isinstance(m, ScheduledLoss)}
    return {
        n: m for n, m in losses.items() if m.distributed == "shard" or m.gather_distributed is False
    }


def reset_losses(root: nn.Module) -> None:
    """Every ranking loss and every wrapper in a module as at the start of its first run."""
    for module in root.modules():
        if isinstance(module, ScheduledLoss):
            temperature = module.temperature
            module.reset()
            module.temperature = temperature  # outside of a wrapper it is the user's
    for module in root.modules():
        if isinstance(module, LossWarmupWrapper):
            module.reset()


def progress(wrappers: dict[str, LossWarmupWrapper], prefix: str) -> dict[str, float]:
    """Numbers to log: main_weight, temperature if there is one, phase (0 warmup, 1 blend, 2 main).

    Example:
        >>> from proxy_losses.integrations._common import progress
        >>> loss_fn = LossWarmupWrapper(
        ...     torch.nn.BCELoss(), SmoothAPLoss(1, temperature=0.5), warmup_steps=9
        ... )
        >>> progress({"loss_fn": loss_fn}, "train/")
        {'train/loss_fn/main_weight': 0.0, 'train/loss_fn/phase': 0.0, \
'train/loss_fn/temperature': 0.5}
    """
    values = {}
    for path, wrapper in wrappers.items():
        stem = f"{prefix}{path}/" if path else prefix
        values[stem + "main_weight"] = wrapper.main_weight
        values[stem + "phase"] = 0.0 if wrapper.in_warmup else 1.0 if wrapper.in_blend else 2.0
        temperature = wrapper.current_temperature
        if temperature is not None:
            values[stem + "temperature"] = temperature
    return values


def validates(X_val: Any, y_val: Any, sample_weight_val: Any = None) -> bool:
    """Whether `fit` is given rows to validate on.

    Raises:
        ValueError: a part of them is missing.
    """
    if X_val is None:
        for name, given in {"y_val": y_val, "sample_weight_val": sample_weight_val}.items():
            if given is not None:
                raise ValueError(f"{name} needs X_val, which is None")
    elif y_val is None:
        raise ValueError("X_val needs y_val, which is None")
    return X_val is not None
