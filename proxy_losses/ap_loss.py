"""Import path of proxy-losses 0.1.1 for `SmoothAPLoss`."""

from .nn import SmoothAPLoss

__all__ = ["SmoothAPLoss"]
