"""Whether a model is at a minimum: what a Newton step would still gain."""

from __future__ import annotations

from sharpness.linalg.newton import NewtonDecrease, newton_decrease
from sharpness.objective import Objective
from sharpness.operators import HessianOperator

__all__ = ["NewtonDecrease", "newton_check"]


def newton_check(objective: Objective, *, num_matvecs: int = 10) -> NewtonDecrease:
    """Return by how much a Newton step within the Krylov space of the gradient would lower the quadratic model.

    Args:
        objective: Model, loss and data.
        num_matvecs: Products with the Hessian to spend at most.

    Raises:
        ModelError: If the loss cannot be differentiated twice.
        NonFiniteError: If the gradient or a product is NaN or infinite.

    Cost: a gradient, and ``num_matvecs`` Hessian-vector products.
    """
    with objective.session():
        return newton_decrease(HessianOperator(objective), objective.gradient(), num_matvecs=num_matvecs)
