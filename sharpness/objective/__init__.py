"""Model, loss and data as one function of a flat vector."""

from sharpness.objective.objective import Evaluation, Objective

__all__ = ["Evaluation", "Objective"]
