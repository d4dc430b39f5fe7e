"""The Hessian of an objective as a linear operator."""

from __future__ import annotations

from typing import final

from torch import Tensor

from sharpness.linalg.operator import LinearOperator
from sharpness.objective import Objective


@final
class HessianOperator(LinearOperator):
    r"""The Hessian :math:`\nabla^2 f(\theta)` of an objective, known by its products.

    Args:
        objective: Model, loss and data.

    Cost: one pass over the data per product.

    Example:
        >>> import torch
        >>> from sharpness import HessianOperator, Objective
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> HessianOperator(Objective(model, [(torch.eye(2), torch.zeros(2, 1))])).to_dense()
        tensor([[1., 0.],
                [0., 1.]])
    """

    def __init__(self, objective: Objective) -> None:
        super().__init__(objective.n, dtype=objective.dtype, device=objective.device)
        self.objective = objective

    def product_error(self, rows: Tensor) -> float | None:
        """Return the rounding error of products with the rows, measured against float64 on the first samples."""
        return self.objective.product_error(rows)

    def _matvec(self, v: Tensor) -> Tensor:
        return self.objective.hvp(v)
