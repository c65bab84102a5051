"""Import path of proxy-losses 0.1.1 for `RecallAtQuantileLoss`."""

from .nn import RecallAtQuantileLoss

__all__ = ["RecallAtQuantileLoss"]
