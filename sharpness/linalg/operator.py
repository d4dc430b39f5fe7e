"""Symmetric linear operators: something that multiplies a vector, and its size.

Algorithms see ``matvec``, ``shape``, ``dtype`` and ``device`` only; whether a network, a matrix or a
function stands behind them is not their business. A new operator supplies ``_matvec`` and its size, and ``_matmat``
where it multiplies a block for less than its columns.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, final

import numpy as np
import torch
from scipy.sparse.linalg import LinearOperator as ScipyOperator
from torch import Tensor

from sharpness._checks import check_count
from sharpness.errors import ArgumentError


class LinearOperator(ABC):
    """A symmetric ``n x n`` operator known by its products.

    Args:
        n: Dimension.
        dtype: Dtype of the vectors, float32 or float64.
        device: Where the vectors live.
    """

    def __init__(self, n: int, *, dtype: torch.dtype, device: torch.device | str) -> None:
        if dtype not in (torch.float32, torch.float64):
            raise ArgumentError(f"`dtype` must be torch.float32 or torch.float64, got {dtype}.")
        self.n = check_count("n", n)
        self.dtype = dtype
        self.device = torch.device(device)

    @property
    def shape(self) -> tuple[int, int]:
        """Return ``(n, n)``."""
        return (self.n, self.n)

    @abstractmethod
    def _matvec(self, v: Tensor) -> Tensor:  # (n,) -> (n,)
        """Multiply one vector whose shape, dtype and device were checked."""

    def matvec(self, v: Tensor) -> Tensor:  # (n,) -> (n,)
        """Return the product of the operator with the vector ``v``, ``(n,) -> (n,)``.

        Raises:
            ArgumentError: If ``v`` has another shape, dtype or device than the operator.
        """
        self._check(v, dims=1)
        with torch.no_grad():
            product = self._matvec(v).detach()
        if product.shape != v.shape or product.dtype != v.dtype:
            raise ArgumentError(
                f"the operator's product has shape {tuple(product.shape)} and {product.dtype}; it must have "
                f"{tuple(v.shape)} and {v.dtype} like the vector. Mend the matvec function."
            )
        return product

    def matmat(self, V: Tensor) -> Tensor:  # (n, m) -> (n, m)
        """Return the product of the operator with each column of ``V``, ``(n, m) -> (n, m)``.

        Raises:
            ArgumentError: If ``V`` has another shape, dtype or device than the operator.
        """
        self._check(V, dims=2)
        if not V.shape[1]:
            return V.clone()
        with torch.no_grad():
            product = self._matmat(V).detach()
        if product.shape != V.shape or product.dtype != V.dtype:
            raise ArgumentError(
                f"the operator's product has shape {tuple(product.shape)} and {product.dtype}; it must have "
                f"{tuple(V.shape)} and {V.dtype} like the matrix. Mend its _matmat."
            )
        return product

    def _matmat(self, V: Tensor) -> Tensor:  # (n, m) -> (n, m)
        """Multiply the columns of a matrix that was checked; override where a block is cheaper than its columns."""
        return torch.stack([self.matvec(column) for column in V.unbind(1)], dim=1)

    def __matmul__(self, other: Tensor) -> Tensor:
        """Return ``matvec`` of a vector or ``matmat`` of a matrix."""
        return self.matmat(other) if isinstance(other, Tensor) and other.ndim == 2 else self.matvec(other)

    def product_error(self, rows: Tensor) -> float | None:  # (k, n)
        """Return the largest measured rounding error of a product with one of the unit rows; ``None`` if not known.

        Algorithms add it to the residuals of the pairs that they report. It does not count as a product.
        """
        return 0.0

    def to_dense(self) -> Tensor:
        """Return the ``(n, n)`` matrix, by ``n`` products."""
        return self.matmat(torch.eye(self.n, dtype=self.dtype, device=self.device))

    def to_scipy(self) -> ScipyOperator:
        """Return the operator as SciPy's ``LinearOperator``, blocks included, for ``eigsh`` and the like."""
        kind = {torch.float32: np.float32, torch.float64: np.float64}[self.dtype]

        def matvec(x: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
            v = torch.as_tensor(np.asarray(x).reshape(-1).copy(), dtype=self.dtype, device=self.device)
            product: np.ndarray[Any, Any] = self.matvec(v).cpu().numpy()
            return product

        def matmat(X: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
            V = torch.as_tensor(np.array(X), dtype=self.dtype, device=self.device)
            product: np.ndarray[Any, Any] = self.matmat(V).cpu().numpy()
            return product

        return ScipyOperator(self.shape, matvec=matvec, rmatvec=matvec, matmat=matmat, rmatmat=matmat, dtype=kind)

    def _check(self, v: Any, *, dims: int) -> None:
        wanted = f"{'a vector' if dims == 1 else 'a matrix'} of {self.n} {'entries' if dims == 1 else 'rows'}"
        if not isinstance(v, Tensor) or v.ndim != dims or v.shape[0] != self.n:
            got = tuple(v.shape) if isinstance(v, Tensor) else type(v).__name__
            raise ArgumentError(f"the operator multiplies {wanted}, got {got}.")
        if v.dtype != self.dtype or v.device != self.device:
            raise ArgumentError(
                f"the operator multiplies {self.dtype} vectors on {self.device}, got {v.dtype} on {v.device}. "
                f"Convert with v.to(dtype={self.dtype}, device={str(self.device)!r})."
            )


def check_operator(operator: Any) -> int:
    """Return the dimension of an operator; refuse what is none.

    Raises:
        ArgumentError: If there is no dimension, dtype or device.
    """
    if not all(hasattr(operator, name) for name in ("n", "dtype", "device")):
        raise ArgumentError(
            f"`operator` must be a LinearOperator, got {type(operator).__name__}. Pass DenseOperator(matrix), or "
            "FunctionOperator(function, n)."
        )
    return int(operator.n)


@final
class DenseOperator(LinearOperator):
    """The operator of a symmetric matrix.

    Args:
        matrix: ``(n, n)`` symmetric, a tensor or nested lists.

    Example:
        >>> DenseOperator([[2.0, 1.0], [1.0, 3.0]]).n
        2
    """

    def __init__(self, matrix: Any) -> None:
        self.matrix = torch.as_tensor(matrix).detach()
        if self.matrix.ndim != 2 or self.matrix.shape[0] != self.matrix.shape[1]:
            raise ArgumentError(f"`matrix` must be square, got shape {tuple(self.matrix.shape)}.")
        if not bool(torch.isfinite(self.matrix).all()):
            raise ArgumentError("`matrix` holds NaN or infinity.")
        slack = 1e-5 * self.matrix.abs().max().item() if self.matrix.numel() else 0.0
        if not torch.allclose(self.matrix, self.matrix.T, rtol=0.0, atol=slack):
            raise ArgumentError("`matrix` must be symmetric. Pass (matrix + matrix.T) / 2 if that is what you mean.")
        super().__init__(self.matrix.shape[0], dtype=self.matrix.dtype, device=self.matrix.device)

    def _matvec(self, v: Tensor) -> Tensor:
        return self.matrix @ v

    def _matmat(self, V: Tensor) -> Tensor:
        return self.matrix @ V


@final
class FunctionOperator(LinearOperator):
    """The operator of a function that multiplies a vector by a symmetric matrix.

    Args:
        function: Maps an ``(n,)`` tensor to an ``(n,)`` tensor.
        n: Dimension.
        dtype: Dtype of the vectors.
        device: Where the vectors live.

    Example:
        >>> FunctionOperator(lambda v: 3 * v, 5).matvec(torch.ones(5))
        tensor([3., 3., 3., 3., 3.])
    """

    def __init__(
        self,
        function: Callable[[Tensor], Tensor],
        n: int,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        super().__init__(n, dtype=dtype, device=device)
        self.function = function

    def _matvec(self, v: Tensor) -> Tensor:
        return self.function(v).clone()  # it may hand out the same memory each time
