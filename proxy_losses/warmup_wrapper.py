"""Import path of proxy-losses 0.1.1 for `LossWarmupWrapper`."""

from .nn import LossWarmupWrapper

__all__ = ["LossWarmupWrapper"]
