r"""A Krylov space, one product at a time: the engine of Lanczos.

After ``m`` products with the symmetric operator ``A`` it holds an orthonormal basis ``Q``, ``(m, n)`` rows, and a
symmetric tridiagonal ``T``, ``(m, m)``, with

.. math:: A Q^T = Q^T T + \beta_m q_{m+1} e_m^T.

``T`` is the whole of what the products have revealed: its eigenvalues are the Ritz values, and
``beta_m |s_m|`` is the residual of the Ritz pair with coefficients ``s`` (Paige 1971; Parlett 1998, ch. 13).

When the space is exhausted (``beta`` at the level of rounding) the run goes on with a random vector of the
complement, and ``T`` gets a new diagonal block. That is how repeated eigenvalues are found.
"""

from __future__ import annotations

from typing import Any, TypeAlias, final

import numpy as np
import torch
from scipy.linalg import eigh_tridiagonal
from torch import Tensor

from sharpness.errors import NonFiniteError
from sharpness.linalg.bounds import rounding_level
from sharpness.linalg.operator import LinearOperator
from sharpness.linalg.products import dot, norm

Floats: TypeAlias = "np.ndarray[Any, np.dtype[np.float64]]"

_ROWS_PER_BLOCK = 16  # the basis grows by contiguous blocks, so nothing is ever copied


@final
class KrylovSpace:
    """An orthonormal Krylov basis of ``operator`` with full reorthogonalisation.

    Args:
        operator: Symmetric operator of size ``n``.
        generator: Source of the random vectors, on the CPU, so that all devices draw the same ones.
    """

    def __init__(self, operator: LinearOperator, generator: torch.Generator) -> None:
        self.operator = operator
        self._generator = generator
        self._blocks: list[Tensor] = []
        self.size = 0
        self.diagonal: list[float] = []  # alpha
        self.coupling: list[float] = []  # beta; entry j couples rows j and j + 1; the last one couples to the outside
        self.starts: list[int] = []  # first row of each random start
        self._closed: list[tuple[int, float]] = []  # last row of each exhausted block, and the beta neglected there
        self._noise = 0.0
        self._scale = 0.0
        self._next: Tensor | None = None
        self.exhausted = True  # whether the space is invariant: what comes next is a random start in the complement

    @property
    def floor(self) -> float:
        """Size of the rounding errors that a product cannot avoid."""
        return rounding_level(self.operator.dtype, self._scale)

    @property
    def rounding(self) -> float:
        """Size of the errors in a product: the floor, and what was measured beyond.

        The measure is what a product leaks onto earlier basis vectors, zero for a symmetric operator in exact
        arithmetic. An operator that is not symmetric, or not the same at each product, shows up here.
        """
        return self.floor + 2 * self._noise

    @property
    def _negligible(self) -> float:
        """Coupling below which the space counts as exhausted: rounding, amplified by the steps before."""
        return float(max(self.floor, torch.finfo(self.operator.dtype).eps ** (2 / 3) * self._scale))

    def extend(self) -> None:
        """Spend one product and grow the basis by one row.

        Raises:
            NonFiniteError: If the product holds NaN or infinity.
        """
        q = self._random() if self._next is None else self._next
        if self._next is None and self.size:
            self._closed.append((self.size - 1, self.coupling[-1]))
            self.coupling[-1] = 0.0
        if self.exhausted:
            self.starts.append(self.size)
        behind = self.coupling[-1] if self.size else 0.0
        self._append(q)
        w = self.operator.matvec(q)

        alpha = dot(q, w)
        if not np.isfinite(alpha):
            raise NonFiniteError(
                f"product {self.size} of the operator holds NaN or infinity. "
                "Check the loss and the weights for overflow, or use float64."
            )
        w = w - alpha * q
        if behind:
            w -= behind * self._row(self.size - 2)
        leaked = self._orthogonalise(w)
        # Two columns may leak by design: those that the recurrence has just subtracted.
        self._noise = max(self._noise, float(np.linalg.norm(leaked[:-2])))
        alpha += float(leaked[-1])
        beta = norm(w)
        self.diagonal.append(alpha)
        self.coupling.append(beta)
        self._scale = max(self._scale, abs(alpha) + beta)
        self.exhausted = self.size == self.operator.n or beta <= self._negligible
        # Between the two levels the direction of w is mostly noise, as good a random start as any, and its coupling
        # is kept in T. Below, it means nothing.
        self._next = w / beta if beta > self.floor and self.size < self.operator.n else None

    def ritz(self) -> tuple[Floats, Floats, Floats]:
        """Return all Ritz values in ascending order, ``(m,)``, coefficients, ``(m, m)``, and residuals, ``(m,)``.

        The residuals are upper bounds of ``|A y - theta y|`` without the allowance for rounding.
        """
        theta, s = eigh_tridiagonal(np.array(self.diagonal), np.array(self.coupling[:-1]))
        ends = [*self._closed, (self.size - 1, self.coupling[-1])]
        residuals = np.sum([beta * np.abs(s[row]) for row, beta in ends], axis=0)
        self._scale = max(self._scale, float(np.abs(theta).max()))
        return theta.astype(float), s.astype(float), residuals

    def vectors(self, s: Floats) -> Tensor:  # (m, k) -> (k, n)
        """Return the unit vectors with coefficients ``s`` in the basis, as rows."""
        coefficients = torch.as_tensor(s.T.copy(), dtype=self.operator.dtype, device=self.operator.device)
        rows = torch.zeros(s.shape[1], self.operator.n, dtype=self.operator.dtype, device=self.operator.device)
        first = 0
        for block in self._filled():
            rows += coefficients[:, first : first + len(block)] @ block
            first += len(block)
        return rows

    def _random(self) -> Tensor:
        """Draw a unit vector orthogonal to the basis."""
        v = torch.randn(self.operator.n, generator=self._generator, dtype=torch.float64, device="cpu")
        q = v.to(dtype=self.operator.dtype, device=self.operator.device)
        self._orthogonalise(q.div_(norm(q)))
        return q.div_(norm(q))

    def _orthogonalise(self, w: Tensor) -> Floats:
        """Take from ``w`` its part in the basis, in place; return the coefficients of that part, ``(m,)``.

        Gram-Schmidt by blocks, repeated while a pass removes a noticeable share: twice is enough
        (Daniel, Gragg, Kaufman, Stewart 1976). Within Lanczos the recurrence is the first pass.
        """
        removed = np.zeros(self.size)
        for _ in range(3 if self.size else 0):
            parts = []
            for block in self._filled():
                part = block @ w
                w.addmv_(block.T, part, alpha=-1)
                parts.append(part)
            share = torch.cat(parts).cpu().double().numpy()
            removed += share
            if np.linalg.norm(share) <= 0.1 * norm(w):
                break
        return removed

    def _filled(self) -> list[Tensor]:
        """Return the filled rows of each block."""
        full, rest = divmod(self.size, _ROWS_PER_BLOCK)
        return self._blocks[:full] + ([self._blocks[full][:rest]] if rest else [])

    def _row(self, j: int) -> Tensor:
        return self._blocks[j // _ROWS_PER_BLOCK][j % _ROWS_PER_BLOCK]

    def _append(self, q: Tensor) -> None:
        if self.size % _ROWS_PER_BLOCK == 0:
            rows = min(_ROWS_PER_BLOCK, self.operator.n - self.size)
            self._blocks.append(torch.empty(rows, self.operator.n, dtype=q.dtype, device=q.device))
        self.size += 1
        self._row(self.size - 1).copy_(q)
