"""Gradient, products and eigenvalues of a loss by the plainest means, to judge the library by.

Nothing here comes from the library: PyTorch's own double backward of one scalar, and SciPy's `eigsh`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from scipy.sparse.linalg import LinearOperator, eigsh
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel


class Plain:
    """The loss of a model as it stands; its parameters are moved, and put back, by ``shift``."""

    def __init__(self, model: nn.Module, loss: Callable[[nn.Module], Tensor]) -> None:
        self.model, self._loss = model, loss
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.sizes = [p.numel() for p in self.parameters]
        self.n = sum(self.sizes)
        self._graph: Tensor | None = None

    def gradient(self, shift: Tensor | None = None) -> Tensor:  # (n,)
        """Return the gradient at the parameters moved by ``shift``."""
        kept = [p.detach().clone() for p in self.parameters]
        try:
            if shift is not None:
                for p, piece in zip(self.parameters, shift.split(self.sizes), strict=True):
                    p.data.add_(piece.view_as(p))
            return self._differentiable_gradient().detach()
        finally:
            for p, old in zip(self.parameters, kept, strict=True):
                p.data.copy_(old)

    def difference(self, v: Tensor, h: float) -> Tensor:  # (n,)
        """Return the central difference of the gradient along ``v``."""
        return (self.gradient(h * v) - self.gradient(-h * v)) / (2 * h)

    def product(self, v: Tensor) -> Tensor:  # (n,)
        """Return the Hessian times ``v``."""
        if self._graph is None:
            self._graph = self._differentiable_gradient()
        pieces = torch.autograd.grad(self._graph, self.parameters, v, retain_graph=True, allow_unused=True)
        return self._flat(pieces)

    def top(self, k: int, *, start: Tensor | None = None, basis: int | None = None) -> np.ndarray:
        """Return the ``k`` largest eigenvalues, descending.

        Where a product is dear, ``start`` is near the eigenvector wanted, and a small ``basis`` and 1e-6 will do.
        """

        def matvec(v: np.ndarray) -> np.ndarray:
            return self.product(torch.from_numpy(np.ascontiguousarray(v.reshape(-1)))).numpy()

        operator = LinearOperator((self.n, self.n), matvec, dtype=np.float64)
        v0 = None if start is None else start.double().numpy()
        values = eigsh(
            operator, k=k, which="LA", tol=1e-11 if start is None else 1e-6, v0=v0, ncv=basis, return_eigenvectors=False
        )
        return np.sort(values)[::-1]

    def _differentiable_gradient(self) -> Tensor:
        with sdpa_kernel(SDPBackend.MATH):
            total = self._loss(self.model)
        return self._flat(torch.autograd.grad(total, self.parameters, create_graph=True, allow_unused=True))

    def _flat(self, pieces: Sequence[Tensor | None]) -> Tensor:
        return torch.cat(
            [
                p.new_zeros(p.numel()) if piece is None else piece.reshape(-1)
                for p, piece in zip(self.parameters, pieces, strict=True)
            ]
        )
