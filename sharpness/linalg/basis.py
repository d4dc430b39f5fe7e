"""Where the vectors of a Krylov basis are kept: in blocks of rows, on any device, in any floating dtype."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, TypeAlias, final

import numpy as np
import torch
from torch import Tensor

from sharpness.linalg.products import accumulator

Floats: TypeAlias = "np.ndarray[Any, np.dtype[np.float64]]"

_ROWS_PER_BLOCK = 16  # the basis grows by contiguous blocks, so nothing is ever copied
_PIECE = 2**22  # entries that are converted, moved or rotated at a time


@final
class Basis:
    """Rows of length ``n``, multiplied in the dtype and on the device of the operator.

    Where the rows are kept in another dtype or on another device than they are multiplied, they are brought there
    piece by piece, never all at once.

    Args:
        n: Length of the rows.
        dtype: Dtype to multiply in.
        device: Device to multiply on.
        rows: How many rows there can be at most.
        stored_dtype: Dtype of the rows as they are kept; ``None`` is ``dtype``.
        stored_device: Where the rows are kept; ``None`` is ``device``.
    """

    def __init__(
        self,
        n: int,
        *,
        dtype: torch.dtype,
        device: torch.device,
        rows: int,
        stored_dtype: torch.dtype | None = None,
        stored_device: torch.device | None = None,
    ) -> None:
        self.n, self.rows = n, rows
        self.dtype, self.device = dtype, device
        self.stored_dtype = stored_dtype or dtype
        self.stored_device = stored_device or device
        self.size = 0
        self.rounds = self.stored_dtype != dtype  # whether a row kept is another vector than the one given
        self._in_place = not self.rounds and self.stored_device == device
        self._blocks: list[Tensor] = []

    def append(self, q: Tensor) -> Tensor:
        """Keep the row ``q``, ``(n,)``; return the row as it is kept, in the dtype to multiply in."""
        if self.size == len(self._blocks) * _ROWS_PER_BLOCK:
            rows = min(_ROWS_PER_BLOCK, self.rows - self.size)
            self._blocks.append(torch.empty(rows, self.n, dtype=self.stored_dtype, device=self.stored_device))
        self.size += 1
        self._stored(self.size - 1).copy_(q)
        return self.row(self.size - 1) if self.rounds else q

    def row(self, j: int) -> Tensor:
        """Return row ``j`` to multiply with."""
        return self._stored(j).to(dtype=self.dtype, device=self.device)

    def remove(self, w: Tensor, *, first: int | None = None) -> Tensor:
        """Take from ``w`` its part along the (first so many) rows, in place; return the coefficients of that part."""
        parts = []
        for block in self._filled(self.size if first is None else first):
            part = sum((rows @ w[where] for rows, where in self._pieces(block)), start=w.new_zeros(()))
            part = part.to(w)
            for rows, where in self._pieces(block):
                w[where].addmv_(rows.T, part, alpha=-1)
            parts.append(part)
        return torch.cat(parts) if parts else w.new_zeros(0)

    def subtract(self, w: Tensor, coefficients: Floats) -> None:
        """Take the combination of the first rows with these coefficients, ``(p,)``, from ``w``, in place."""
        factors, first = torch.as_tensor(coefficients.copy()).to(w), 0
        for block in self._filled(len(coefficients)):
            for rows, where in self._pieces(block):
                w[where].addmv_(rows.T, factors[first : first + len(block)], alpha=-1)
            first += len(block)

    def combine(self, s: Floats) -> Tensor:  # (m, k) -> (k, n)
        """Return the combinations of the rows with the columns of ``s`` as coefficients."""
        coefficients = torch.as_tensor(s.T.copy(), dtype=self.dtype, device=self.device)
        combined = torch.zeros(s.shape[1], self.n, dtype=self.dtype, device=self.device)
        first = 0
        for block in self._filled(self.size):
            for rows, where in self._pieces(block):
                combined[:, where] += coefficients[:, first : first + len(block)] @ rows
            first += len(block)
        return combined

    def compress(self, s: Floats) -> None:  # (m, p)
        """Replace the ``m`` rows by ``p <= m`` combinations of them, in place, some columns at a time."""
        wide = accumulator(self.stored_device)
        mixing = torch.as_tensor(s.T.copy(), dtype=wide, device=self.stored_device)
        filled = self._filled(self.size)
        width = max(1, _PIECE // self.size)
        for low in range(0, self.n, width):
            where = slice(low, low + width)
            mixed = mixing @ torch.cat([block[:, where].to(wide) for block in filled])
            for j, row in enumerate(mixed):
                self._stored(j)[where].copy_(row)
        self.size = s.shape[1]

    def _pieces(self, block: Tensor) -> Iterator[tuple[Tensor, slice]]:
        """Yield a block of rows, as it is where it can be used in place, and the columns that it covers."""
        if self._in_place:
            yield block, slice(None)
            return
        width = _PIECE // _ROWS_PER_BLOCK
        for low in range(0, self.n, width):
            where = slice(low, low + width)
            yield block[:, where].to(dtype=self.dtype, device=self.device), where

    def _filled(self, size: int) -> list[Tensor]:
        """Return the first ``size`` rows of the blocks."""
        full, rest = divmod(size, _ROWS_PER_BLOCK)
        return self._blocks[:full] + ([self._blocks[full][:rest]] if rest else [])

    def _stored(self, j: int) -> Tensor:
        return self._blocks[j // _ROWS_PER_BLOCK][j % _ROWS_PER_BLOCK]
