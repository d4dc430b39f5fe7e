"""Model, loss and data as one function of a flat vector."""

from sharpness.objective.evaluation import Evaluation
from sharpness.objective.objective import Objective

__all__ = ["Evaluation", "Objective"]
