"""Import path of imbalanced-losses for `PAUCAtBudgetLoss`."""

from .nn import PAUCAtBudgetLoss

__all__ = ["PAUCAtBudgetLoss"]
