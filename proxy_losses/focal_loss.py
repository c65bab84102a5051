"""Import path of imbalanced-losses 0.6.0 for the focal losses."""

from .nn import SigmoidFocalLoss, SoftmaxFocalLoss

__all__ = ["SigmoidFocalLoss", "SoftmaxFocalLoss"]
