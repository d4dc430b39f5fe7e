"""An orthonormal basis of the range of an operator, grown from products with random vectors."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import final

import torch
from torch import Tensor

from sharpness.linalg.gram import gram, multiply, row_dots
from sharpness.linalg.leave_one_out import Grams
from sharpness.linalg.operator import LinearOperator
from sharpness.linalg.probes import Probes
from sharpness.linalg.products import accumulator

_RANK = 50.0  # times eps |A w|: what is left of a product beyond the basis below this is rounding
_BLOCK = 16  # test vectors drawn and multiplied at a time
_PIECE = 2**20  # entries of a block of estimates that are formed at a time


@final
class Sketch:
    """What products of an operator with random vectors, and with a basis ``Q`` of their range, have revealed.

    The random vectors are drawn again when they are needed; kept are ``Q``, ``(r, n)`` rows, the products ``A Q`` if
    asked for, and matrices of at most ``m x m``. Directions that are rounding only are left out of the basis, so
    ``r < m`` where the operator has a lower rank than there are vectors.

    Args:
        operator: Symmetric operator.
        probes: The random vectors.
        keep_products: Keep ``A Q`` too, and the products of vectors that are not in the basis.
        spent: Called with the number of products after each block.
    """

    def __init__(
        self,
        operator: LinearOperator,
        probes: Probes,
        *,
        keep_products: bool = False,
        spent: Callable[[int], object] = lambda number: None,
    ) -> None:
        self.operator, self.probes = operator, probes
        self.n = operator.n
        self.num_matvecs = 0
        self.size = 0  # test vectors
        self.in_basis: list[int] = []  # those whose products the basis spans
        self.h = torch.zeros(0, 0, dtype=torch.float64)  # Q A Q'
        self.w = torch.zeros(0, 0, dtype=torch.float64)  # Q W', W the test vectors as rows
        self.r = torch.zeros(0, 0, dtype=torch.float64)  # Q A W'
        self.norms = torch.zeros(0, dtype=torch.float64)  # |w|^2
        self.forms = torch.zeros(0, dtype=torch.float64)  # w' A w
        self.lengths = torch.zeros(0, dtype=torch.float64)  # |A w|^2
        self._keep_products = keep_products
        self._basis: list[Tensor] = []
        self._products: list[Tensor] = []
        self._outside: list[Tensor] = []  # products of the test vectors that are not in the basis
        self._spent_beyond = 0  # vectors that were drawn after the basis was complete
        self._report = spent

    @property
    def rank(self) -> int:
        """Number of rows of the basis."""
        return len(self.h)

    @property
    def frobenius(self) -> float:
        """An estimate of the Frobenius norm."""
        return float(self.lengths.mean().sqrt()) if self.size else 0.0

    @property
    def rounding(self) -> float:
        """How far rounding may move the trace."""
        eps = torch.finfo(self.operator.dtype).eps
        values = torch.linalg.eigvalsh(self.h).abs().sum().item() if self.rank else 0.0
        return 16 * eps * max(values, self.forms.abs().max().item() if self.size else 0.0)

    def multiply(self, number: int, *, into_basis: bool) -> None:
        """Draw so many more test vectors, multiply them, and let the basis span their products or not."""
        for low in range(0, number, _BLOCK):
            self._multiply(min(_BLOCK, number - low), into_basis)

    def _multiply(self, number: int, into_basis: bool) -> None:
        first, last = self.size, self.size + number
        probes = self.probes.rows(first, last)
        products = self._times(probes)
        self.size = last
        self.norms = torch.cat([self.norms, row_dots(probes, probes)])
        self.forms = torch.cat([self.forms, row_dots(probes, products)])
        self.lengths = torch.cat([self.lengths, row_dots(products, products)])
        self.w = torch.cat([self.w, self._against_basis(probes)], dim=1)
        self.r = torch.cat([self.r, self._against_basis(products)], dim=1)
        del probes
        if into_basis:
            self.in_basis += range(first, last)
            self._extend(products)
        elif self._keep_products:
            self._outside.append(products)

    def _extend(self, products: Tensor) -> None:
        """Add to the basis what the products of the last test vectors hold beyond it."""
        number = len(products)
        floor = _RANK * torch.finfo(products.dtype).eps * self.lengths.max().sqrt().item()
        fresh, coordinates = self._orthonormal(products, floor)
        if not len(fresh):
            return
        images = self._times(fresh)
        old = self._against_basis(images)  # (r, p)
        own = gram(fresh, images)
        self.h = torch.cat([torch.cat([self.h, old], dim=1), torch.cat([old.T, (own + own.T) / 2], dim=1)])
        earlier = self.size - number
        w = torch.zeros(len(fresh), self.size, dtype=torch.float64)
        r = torch.zeros(len(fresh), self.size, dtype=torch.float64)
        for low in range(0, self.size, _BLOCK):
            high = min(low + _BLOCK, self.size)
            probes = self.probes.rows(low, high)
            w[:, low:high] = gram(fresh, probes)
            r[:, low:high] = gram(images, probes)
        spanned = [i for i in self.in_basis if i < earlier]
        r[:, spanned] = 0.0  # the basis holds the whole of those products
        r[:, earlier:] = coordinates
        self.w, self.r = torch.cat([self.w, w]), torch.cat([self.r, r])
        self._basis.append(fresh)
        if self._keep_products:
            self._products.append(images)

    def _orthonormal(self, products: Tensor, floor: float) -> tuple[Tensor, Tensor]:
        """Return orthonormal rows that span what the products hold beyond the basis, and their coordinates in it."""
        left = products
        coordinates = torch.eye(len(products), dtype=torch.float64)
        for attempt in range(2):  # once to know the rank, and once more for what was small
            left = self._off_basis(left)
            q, triangle = torch.linalg.qr(left.T)  # (n, p), (p, p)
            u, values, _ = torch.linalg.svd(triangle.double().cpu())
            kept = values > (floor if not attempt else 0.5)
            left = (q @ u[:, kept].to(q)).T
            coordinates = (u[:, kept].T @ triangle.double().cpu()) @ coordinates
            if not len(left):
                break
        return left.contiguous(), coordinates

    def _against_basis(self, rows: Tensor) -> Tensor:  # (p, n) -> (r, p)
        parts = [gram(block, rows) for block in self._basis]
        return torch.cat(parts) if parts else torch.zeros(0, len(rows), dtype=torch.float64)

    def _times(self, rows: Tensor) -> Tensor:
        products = multiply(self.operator, rows, self._report)
        self.num_matvecs += len(rows)
        return products

    def taken(self) -> Tensor:  # (r, m)
        """Return what removing each of the vectors of the basis takes from it: a unit column, or zero for nothing."""
        coordinates = self.r[:, self.in_basis]
        u, values, vh = torch.linalg.svd(coordinates, full_matrices=False)
        needed = (vh**2).sum(0) > 1 - torch.finfo(self.operator.dtype).eps ** 0.5
        columns = u @ (vh / values.unsqueeze(1))
        columns = columns / torch.linalg.vector_norm(columns, dim=0).clamp_min(torch.finfo(torch.float64).tiny)
        found: Tensor = columns * needed
        return found

    def grams(self) -> Grams:
        """Return the inner products that `leave_one_out` needs, over all coordinates; all vectors are in the basis."""
        identity = torch.eye(self.rank, dtype=torch.float64)
        return Grams(
            h=self.h,
            w=self.w,
            r=self.r,
            s=self.taken(),
            norms=self.norms,
            forms=self.forms,
            basis=identity,
            cross=self.h,
            probe_products=self.r.T,
            probe_basis=self.w.T,
        )

    def square(self) -> Grams:
        """Return the inner products for the square of the operator, whose trace is its squared Frobenius norm."""
        rows = [torch.cat([gram(a, b) for b in self._products], dim=1) for a in self._products]
        h = torch.cat(rows) if rows else self.h
        r = self.h @ self.r  # Q A A w, since A w lies in the basis
        return replace(self.grams(), h=h, r=r, forms=self.lengths, cross=h, probe_products=r.T)

    def groups(self, groups: Sequence[Sequence[slice]]) -> list[Grams]:
        """Return the inner products over each group of coordinates; all vectors are in the basis."""
        whole, found = self.grams(), []
        for group in groups:
            basis = torch.zeros(self.rank, self.rank, dtype=torch.float64)
            cross = torch.zeros_like(basis)
            for where in group:
                q, images = self.columns(where)
                basis += gram(q, q)
                cross += gram(q, images)
            empty = torch.zeros(self.size, self.rank, dtype=torch.float64)
            found.append(
                replace(
                    whole, basis=basis, cross=(cross + cross.T) / 2, probe_products=empty, probe_basis=empty.clone()
                )
            )
        for low in range(0, self.size, _BLOCK):
            high = min(low + _BLOCK, self.size)
            probes = self.probes.rows(low, high)
            for group, grams in zip(groups, found, strict=True):
                for where in group:
                    q, images = self.columns(where)
                    grams.probe_basis[low:high] += gram(probes[:, where], q)
                    grams.probe_products[low:high] += gram(probes[:, where], images)
        return [replace(grams, forms=(grams.probe_basis * self.r.T).sum(-1)) for grams in found]

    def columns(self, where: slice) -> tuple[Tensor, Tensor]:  # (r, c), (r, c)
        """Return some columns of the basis and of its products."""
        if not self._basis:
            empty = torch.zeros(0, where.stop - where.start, dtype=self.operator.dtype, device=self.operator.device)
            return empty, empty
        return torch.cat([b[:, where] for b in self._basis]), torch.cat([b[:, where] for b in self._products])

    def outside(self) -> tuple[Tensor, Tensor]:  # (g,), (g,)
        """Return ``u . A u`` and ``|(I - P) A u|^2`` for the test vectors that are not in the basis.

        ``u`` is what such a vector has in the complement, scaled to the length that it has there in the mean.
        """
        those = [i for i in range(self.size) if i not in set(self.in_basis)]
        w, r, free = self.w[:, those], self.r[:, those], self.n - self.rank
        beyond = r - self.h @ w
        forms = self.forms[those] - (w * r).sum(0) - (w * beyond).sum(0)
        lengths = torch.zeros(len(those), dtype=torch.float64)
        for where in self.pieces():
            q, images = self.columns(where)
            wide = accumulator(q.device)
            left = torch.cat([rows[:, where] for rows in self._outside]).to(wide)
            left -= w.T.to(left) @ images.to(wide) + beyond.T.to(left) @ q.to(wide)
            lengths += (left**2).sum(1).cpu().double()
        scale = free / (self.norms[those] - (w * w).sum(0)).clamp_min(1e-12 * self.n)
        return scale * forms, scale * lengths

    def beyond(self, number: int) -> tuple[Tensor, Tensor]:  # (number,), (number,)
        """Return what `outside` does, of so many new vectors that are not kept: the basis grows no more.

        The vectors are multiplied after what they have in the basis is taken off, so none of it has to be known.
        """
        first = self.size + self._spent_beyond
        self._spent_beyond += number
        left = self._off_basis(self.probes.rows(first, first + number))
        left *= (self.n - self.rank) ** 0.5 / torch.linalg.vector_norm(left, dim=1, keepdim=True)
        products = self._times(left)
        forms = row_dots(left, products)
        products = self._off_basis(products)
        return forms, row_dots(products, products)

    def _off_basis(self, rows: Tensor) -> Tensor:
        for _ in range(2):
            for block in self._basis:
                rows = rows - (block @ rows.T).T @ block
        return rows

    def pieces(self) -> Iterator[slice]:
        """Yield ranges of coordinates that blocks of estimates may be formed for at a time."""
        width = max(1, _PIECE // max(self.size, 1))
        for low in range(0, self.n, width):
            yield slice(low, min(low + width, self.n))
