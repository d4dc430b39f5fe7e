r"""How far a Newton step would still lower a function: from a gradient, and a few products with the Hessian."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from sharpness.linalg.krylov import KrylovSpace
from sharpness.linalg.operator import LinearOperator
from sharpness.linalg.products import norm


@final
@dataclass(frozen=True)
class NewtonDecrease:
    """What the Krylov space of the gradient tells.

    Attributes:
        decrease: By how much the quadratic model falls within the part of the space that curves upwards. It grows with
            the number of products; where no curvature is negative it is a lower bound of ``g' H^-1 g / 2``, and equal
            to it once the space is exhausted.
        step_norm: Length of the step that this takes.
        gradient_norm: ``|g|``.
        least: Least curvature met, an upper bound of the smallest eigenvalue; NaN where the gradient is zero.
        largest: Largest curvature met, a lower bound of the largest eigenvalue, likewise.
        descends: Whether ``least`` is negative by more than rounding: then the point is no minimum.
        num_matvecs: Products spent.
    """

    decrease: float
    step_norm: float
    gradient_norm: float
    least: float
    largest: float
    descends: bool
    num_matvecs: int


def newton_decrease(operator: LinearOperator, gradient: Tensor, *, num_matvecs: int = 10) -> NewtonDecrease:
    r"""Return how far the quadratic model of a function falls within the Krylov space of its gradient ``g``.

    With ``T`` the projection of ``H`` on the space and :math:`(\theta_i, s_i)` its eigenpairs, the model
    :math:`g^\top v + \tfrac12 v^\top H v` falls by :math:`\tfrac12 |g|^2 \sum_i s_{1i}^2 / \theta_i`, a Gauss rule for
    :math:`\tfrac12 g^\top H^{-1} g`, half the square of the Newton decrement. Ritz values that rounding cannot tell
    from zero, and negative ones, are left out of the sum: along the latter the model has no minimum.

    Args:
        operator: ``H``, symmetric.
        gradient: ``(n,)``.
        num_matvecs: Products to spend at most.

    Raises:
        NonFiniteError: If a product holds NaN or infinity.

    Cost: ``num_matvecs`` products, fewer where the space is exhausted; as many vectors.

    References:
        Golub & Meurant (2010), Matrices, Moments and Quadrature, ch. 6; Boyd & Vandenberghe (2004), section 9.5.
    """
    length = norm(gradient)
    if not length:
        return NewtonDecrease(0.0, 0.0, 0.0, float("nan"), float("nan"), False, 0)
    rows = min(num_matvecs, operator.n)
    space = KrylovSpace(operator, torch.Generator().manual_seed(0), rows=rows, start=gradient / length)
    for _ in range(rows):
        space.absorb(operator.matvec(space.request()))
        if space.exhausted:  # what would follow is a random start, which the gradient has no part in
            break
    theta, s, _ = space.ritz()
    upwards = theta > space.rounding
    share, curvature = s[0, upwards], theta[upwards]
    decrease = 0.5 * length * (length * float((share**2 / curvature).sum()))
    return NewtonDecrease(
        decrease=decrease,
        step_norm=length * float(((share / curvature) ** 2).sum() ** 0.5),
        gradient_norm=length,
        least=float(theta[0]),
        largest=float(theta[-1]),
        descends=bool(theta[0] < -space.rounding),
        num_matvecs=space.num_products,
    )
