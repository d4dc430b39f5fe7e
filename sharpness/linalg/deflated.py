"""An operator without what has been found of it."""

from __future__ import annotations

from typing import Any, final

import torch
from torch import Tensor

from sharpness.errors import ArgumentError
from sharpness.linalg.operator import LinearOperator
from sharpness.linalg.products import accumulator


@final
class DeflatedOperator(LinearOperator):
    r"""The operator :math:`P A P` with :math:`P = I - Y^\top Y`: ``A`` in the complement of the rows ``Y``.

    Its eigenvalues are those of ``A`` that do not belong to the rows, and a zero for each row. The algorithms of this
    package deflate on their own; use it to look beyond what they found.

    Args:
        operator: The operator ``A``.
        rows: ``(k, n)`` orthonormal rows, such as the ``eigenvectors`` of a result.

    Raises:
        ArgumentError: If the rows do not fit the operator or are not orthonormal.

    Cost: one product of ``A`` and ``8 k n`` operations per product.

    Example:
        >>> from sharpness.linalg import DenseOperator, lanczos
        >>> operator = DenseOperator([[2.0, 1.0], [1.0, 2.0]])
        >>> found = lanczos(operator, vectors=True)
        >>> lanczos(DeflatedOperator(operator, found.eigenvectors)).eigenvalues.round(decimals=4)
        tensor([1.], dtype=torch.float64)
    """

    def __init__(self, operator: LinearOperator, rows: Any) -> None:
        super().__init__(operator.n, dtype=operator.dtype, device=operator.device)
        if not isinstance(rows, Tensor) or rows.ndim != 2 or rows.shape[1] != operator.n:
            got = tuple(rows.shape) if isinstance(rows, Tensor) else type(rows).__name__
            raise ArgumentError(
                f"`rows` must be a matrix with {operator.n} columns, got {got}. "
                "Pass the eigenvectors of a result that was asked for with vectors=True."
            )
        self.operator = operator
        self.rows = rows.detach().to(dtype=operator.dtype, device=operator.device)
        wide = self.rows.to(accumulator(operator.device))
        off = (wide @ wide.T - torch.eye(len(wide), dtype=wide.dtype, device=wide.device)).abs().max().item()
        if off > 1e-3:
            raise ArgumentError(
                f"`rows` must be orthonormal, their products are off by {off:.1e}. Pass torch.linalg.qr(rows.T)[0].T."
            )

    def product_error(self, rows: Tensor) -> float | None:
        """Return the rounding error of products of the operator with the rows."""
        return self.operator.product_error(rows)

    def _matvec(self, v: Tensor) -> Tensor:
        return self._complement(self.operator.matvec(self._complement(v)))

    def _complement(self, v: Tensor) -> Tensor:
        for _ in range(2):  # twice, so that rows that are orthonormal to rounding only leave nothing behind
            v = v - self.rows.T @ (self.rows @ v)
        return v
