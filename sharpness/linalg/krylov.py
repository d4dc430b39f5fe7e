r"""A Krylov space, one product at a time: the engine of Lanczos.

It holds an orthonormal basis ``Q``, ``(m, n)`` rows, and a symmetric projected matrix ``T``, ``(m, m)``, with

.. math:: A Q^T = Q^T T + q_{m+1} b^T, \qquad b = \beta_m e_m.

``T`` is the whole of what the products have revealed: its eigenvalues are the Ritz values, and
``beta_m |s_m|`` is the residual of the Ritz pair with coefficients ``s`` (Paige 1971; Parlett 1998, ch. 13).

When the space is exhausted (``beta`` at the level of rounding) the run goes on with a random vector of the
complement, and ``T`` gets a new diagonal block. That is how repeated eigenvalues are found.

When the basis is full it is compressed to some of its Ritz vectors (thick restart, Wu & Simon 2000): the relation
above holds again, with ``T`` diagonal and ``b`` full. ``T`` is tridiagonal until then; afterwards it also has an
arrow, the couplings of the rows kept to the first new one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias, final

import numpy as np
import torch
from scipy.linalg import eigh_tridiagonal
from torch import Tensor

from sharpness.errors import NonFiniteError
from sharpness.linalg.basis import Basis, Floats
from sharpness.linalg.bounds import rounding_level
from sharpness.linalg.products import dot, norm
from sharpness.linalg.steps import Domain

Keep: TypeAlias = "Callable[[Floats], np.ndarray[tuple[int], np.dtype[np.intp]]]"

_PER_RESTART = 2.0  # times eps |A|; over 250 compressions 0.3 of them each were seen


def _upper_half(theta: Floats) -> np.ndarray[tuple[int], np.dtype[np.intp]]:
    return np.arange(len(theta) // 2 + 1, len(theta))


@final
class KrylovSpace:
    """An orthonormal Krylov basis with full reorthogonalisation.

    Args:
        domain: Size, dtype and device of the symmetric operator ``A``.
        generator: Source of the random vectors, on the CPU, so that all devices draw the same ones.
        rows: How many rows the basis may have; ``None`` sets no limit.
        keep: Maps the Ritz values, ``(m,)`` ascending, to the positions of those to keep when the basis is full,
            fewer than ``rows - 1``; ``None`` keeps the upper half.
        stored_dtype: Dtype in which the basis is kept; ``None`` is the operator's.
        stored_device: Where the basis is kept; ``None`` is the operator's device.
        locked: ``(l, n)`` orthonormal rows; the space is one of ``P A P``, ``P`` the projector onto their complement.
        start: ``(n,)`` the first vector, not zero; ``None`` draws one.
        scale: A lower bound of ``|A|``, where one is known.
    """

    def __init__(
        self,
        domain: Domain,
        generator: torch.Generator,
        *,
        rows: int | None = None,
        keep: Keep | None = None,
        stored_dtype: torch.dtype | None = None,
        stored_device: torch.device | None = None,
        locked: Tensor | None = None,
        start: Tensor | None = None,
        scale: float = 0.0,
    ) -> None:
        self.domain = domain
        self._locked = locked
        self.n = domain.n - (0 if locked is None else len(locked))  # of the space searched
        self._generator, self._start = generator, start
        self._keep = keep or _upper_half
        self.basis = Basis(
            domain.n,
            dtype=domain.dtype,
            device=domain.device,
            rows=self.n if rows is None else min(rows, self.n),
            stored_dtype=stored_dtype,
            stored_device=stored_device,
        )
        self.diagonal: list[float] = []  # alpha
        self.coupling: list[float] = []  # beta; entry j couples rows j and j + 1; the last one couples to the outside
        self._arrow = np.zeros(0)  # couplings of the rows kept at the last restart to the row after them
        self.num_products = 0
        self.num_starts = 0  # random starts
        self._num_restarts = 0  # compressions
        self.discarded: list[float] = []  # Ritz values left out at restarts
        self.log_norm = 0.0  # of the polynomial that has made the next vector from the start: the sum of all log beta
        self.leaks = np.zeros((0 if locked is None else len(locked), 0))  # Y A Q', how P A P differs from A
        self._closed: list[tuple[int, float]] = []  # last row of each exhausted block, and the beta neglected there
        self._carried: list[Floats] = []  # the same after a restart: couplings, over the rows then kept
        self._latest = 0  # first row that is wholly of the latest block
        self._gram: Floats | None = None  # of the latest block within the rows kept
        self._noise = 0.0
        self._scale = scale
        self._next: Tensor | None = None
        self.exhausted = True  # whether the space is invariant: what comes next is a random start in the complement

    @property
    def size(self) -> int:
        """Number of rows."""
        return self.basis.size

    @property
    def scale(self) -> float:
        """A lower bound of ``|A|``."""
        return self._scale

    @property
    def floor(self) -> float:
        """Size of the rounding errors that cannot be avoided: in a product, and in every compression of the basis."""
        eps = torch.finfo(self.domain.dtype).eps
        return rounding_level(self.domain.dtype, self._scale) + _PER_RESTART * eps * self._scale * self._num_restarts

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
        return float(max(self.floor, torch.finfo(self.domain.dtype).eps ** (2 / 3) * self._scale))

    def request(self) -> Tensor:  # (n,)
        """Grow the basis by one row and return the vector to multiply."""
        if self._next is None and self.size:
            self._closed.append((self.size - 1, self.coupling[-1]))
            self.coupling[-1] = 0.0
        if self.size == self.basis.rows:
            self._compress()
        q = self._fresh() if self._next is None else self._next
        if self.exhausted:
            self.num_starts += 1
            self._latest, self._gram = self.size, None
        return self.basis.append(q)

    def absorb(self, w: Tensor) -> None:  # (n,)
        """Take in the product of the vector that was handed out last.

        Raises:
            NonFiniteError: If the product holds NaN or infinity.
        """
        q = self.basis.row(self.size - 1)
        self.num_products += 1
        alpha = dot(q, w)
        if not np.isfinite(alpha):
            raise NonFiniteError(
                f"product {self.num_products} of the operator holds NaN or infinity. "
                "Check the loss and the weights for overflow, or use float64."
            )
        w = w - alpha * q
        restarted = self.size == len(self._arrow) + 1 and self.size > 1
        if restarted:
            self.basis.subtract(w, self._arrow)
        elif self.size > 1 and self.coupling[-1]:
            w -= self.coupling[-1] * self.basis.row(self.size - 2)
        leaked = self._orthogonalise(w)
        # Two columns may leak by design: those that the recurrence has just subtracted.
        self._noise = max(self._noise, float(np.linalg.norm(leaked[: -1 if restarted else -2])))
        alpha += float(leaked[-1])
        beta = norm(w)
        self.diagonal.append(alpha)
        self.coupling.append(beta)
        self.log_norm += float(np.log(max(beta, np.finfo(float).tiny)))
        self._scale = max(self._scale, abs(alpha) + beta)
        self.exhausted = self.size == self.n or beta <= self._negligible
        # Between the two levels the direction of w is mostly noise, as good a random start as any, and its coupling
        # is kept in T. Below, it means nothing.
        self._next = w / beta if beta > self.floor and self.size < self.n else None

    def ritz(self) -> tuple[Floats, Floats, Floats]:
        """Return all Ritz values in ascending order, ``(m,)``, coefficients, ``(m, m)``, and residuals, ``(m,)``.

        The residuals are upper bounds of ``|P A P y - theta y|`` without the allowance for rounding.
        """
        theta, s = self._eigh()
        self._scale = max(self._scale, float(np.abs(theta).max()))
        return theta, s, self.outside(s)

    def outside(self, s: Floats) -> Floats:  # (m, k) -> (k,)
        """Bound the part of ``P A P y`` outside of the space, for the vectors of coefficients ``s``."""
        ends = [*self._closed, (self.size - 1, self.coupling[-1])]
        bounds: Floats = np.sum(
            [beta * np.abs(s[row]) for row, beta in ends] + [np.abs(row @ s[: len(row)]) for row in self._carried],
            axis=0,
        )
        return bounds

    def latest_share(self, s: Floats) -> Floats:  # (m, k) -> (k,)
        """Return the norm of the part of each vector that lies in the block of the last random start."""
        share: Floats = np.linalg.norm(s[self._latest :], axis=0)
        if self._gram is not None:
            kept = s[: len(self._gram)]
            share = np.sqrt(share**2 + np.maximum(np.sum(kept * (self._gram @ kept), axis=0), 0.0))
        return share

    def vectors(self, s: Floats) -> Tensor:  # (m, k) -> (k, n)
        """Return the unit vectors with coefficients ``s`` in the basis, as rows."""
        return self.basis.combine(s)

    def _eigh(self) -> tuple[Floats, Floats]:
        p = len(self._arrow)
        if not p:
            theta, s = eigh_tridiagonal(np.array(self.diagonal), np.array(self.coupling[:-1]))
            return theta.astype(float), s.astype(float)
        off = np.array(self.coupling[:-1])
        projected = np.diag(np.array(self.diagonal)) + np.diag(off, 1) + np.diag(off, -1)
        if self.size > p:
            projected[:p, p] = projected[p, :p] = self._arrow
        dense_theta, dense_s = np.linalg.eigh(projected)
        return dense_theta, dense_s

    def _compress(self) -> None:
        """Compress the basis to the Ritz vectors to keep."""
        self._num_restarts += 1
        theta, s = self._eigh()
        kept = np.sort(self._keep(theta))
        self.discarded += np.delete(theta, kept).tolist()
        s = s[:, kept]
        self._carried = [row @ s[: len(row)] for row in self._carried] + [beta * s[row] for row, beta in self._closed]
        self._closed = []
        gram = s[self._latest :].T @ s[self._latest :]
        if self._gram is not None:
            p = len(self._gram)
            gram += s[:p].T @ self._gram @ s[:p]
        self._gram, self._latest = gram, len(kept)
        self._arrow = self.coupling[-1] * s[-1]
        self.diagonal = theta[kept].tolist()
        self.coupling = [0.0] * len(kept)
        self.leaks = self.leaks @ s
        self.basis.compress(s)

    def _fresh(self) -> Tensor:
        """Return the start, once, and then random unit vectors, orthogonal to the basis."""
        if self._start is not None:
            q, self._start = self._start.clone(), None
        else:
            v = torch.randn(self.domain.n, generator=self._generator, dtype=torch.float64, device="cpu")
            q = v.to(dtype=self.domain.dtype, device=self.domain.device)
        self._orthogonalise(q.div_(norm(q)), start=True)
        return q.div_(norm(q))

    def _orthogonalise(self, w: Tensor, *, start: bool = False) -> Floats:
        """Take from ``w`` its part in the basis, in place; return the coefficients of that part, ``(m,)``.

        Gram-Schmidt by blocks, repeated while a pass removes a noticeable share: twice is enough
        (Daniel, Gragg, Kaufman, Stewart 1976). Within Lanczos the recurrence is the first pass.
        """
        removed = np.zeros(self.size)
        leaks = np.zeros(len(self.leaks))
        for _ in range(3 if self.size or self._locked is not None else 0):
            share = self.basis.remove(w).cpu().double().numpy()
            removed += share
            aside = 0.0
            if self._locked is not None:
                part = self._locked @ w
                w.addmv_(self._locked.T, part, alpha=-1)
                leaks += part.cpu().double().numpy()
                aside = norm(part)
            if np.hypot(np.linalg.norm(share), aside) <= 0.1 * norm(w):
                break
        if not start:
            self.leaks = np.column_stack([self.leaks, leaks])
        return removed
