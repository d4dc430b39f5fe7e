"""A subspace of the space of the parameters, as products with a tall matrix that need never be held.

A random matrix is made of tiles, each from its own seed: what an entry is depends on the seed, the draw, its row and
its column, never on how many columns there are or on what is kept.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, TypeAlias, final

import numpy as np
import torch
from torch import Tensor

from sharpness.errors import ArgumentError

COLUMNS = ("gaussian", "orthonormal")

_ROWS = 2**14  # of a tile
_SMALLEST = 1e-12  # eigenvalue of the Gram matrix of unit columns, below which the columns are dependent

MakeTile: TypeAlias = "Callable[[int, slice], Tensor]"


@final
class Subspace:
    """The range of a matrix ``A``, ``(n, p)``, multiplied by tiles of rows.

    Args:
        n: Number of rows.
        p: Number of columns.
        tile: Called with the position of a tile and its rows, returns it as ``(p, rows)``.
        device: Where to multiply.
        orthonormal: Whether to take ``A R^-1`` with ``A'A = R'R`` in place of ``A``: other columns, the same subspace.

    Raises:
        ArgumentError: If the columns are not linearly independent.
    """

    def __init__(self, n: int, p: int, tile: MakeTile, device: torch.device, *, orthonormal: bool = False) -> None:
        self.n, self.p = n, p
        self._tile, self._device, self._orthonormal = tile, device, orthonormal
        gram = torch.zeros(p, p, dtype=torch.float64, device=device)
        for rows, _ in self._tiles():
            wide = rows.double()
            gram += wide @ wide.T
        self._lengths = gram.diagonal().sqrt()
        unit = gram / self._lengths.outer(self._lengths)
        smallest = torch.linalg.eigvalsh(unit)[0].item() if bool(torch.all(self._lengths > 0)) else 0.0
        if not smallest > _SMALLEST * p:
            raise ArgumentError(
                f"`subspace` has {p} columns that are not linearly independent: scaled to length 1, their Gram matrix "
                f"has the eigenvalue {smallest:.1g}. Leave out the columns that are zero or that others span."
            )
        self._root = torch.linalg.cholesky(unit)  # A'A = D L L' D

    def multiply(self, y: Tensor) -> Tensor:  # (p,) -> (n,)
        """Return ``A y``."""
        y = self._solve_upper(y) if self._orthonormal else y
        return torch.cat([y.to(rows) @ rows for rows, _ in self._tiles()])

    def multiply_transposed(self, g: Tensor) -> Tensor:  # (n,) -> (p,)
        """Return ``A'g`` in double precision."""
        found = self._transposed(g)
        return self._solve_lower(found) if self._orthonormal else found

    def coordinates(self, x: Tensor) -> Tensor:  # (n,) -> (p,)
        """Return ``A^+ x = (A'A)^-1 A'x`` in double precision."""
        found = self._solve_lower(self._transposed(x))
        return found if self._orthonormal else self._solve_upper(found)

    def _tiles(self) -> Iterator[tuple[Tensor, slice]]:
        for i, low in enumerate(range(0, self.n, _ROWS)):
            where = slice(low, min(low + _ROWS, self.n))
            yield self._tile(i, where), where

    def _transposed(self, g: Tensor) -> Tensor:
        found = torch.zeros(self.p, dtype=torch.float64, device=self._device)
        for rows, where in self._tiles():
            found += (rows @ g[where].to(rows)).double()
        return found

    def _solve_lower(self, b: Tensor) -> Tensor:
        """Return ``R'^-1 b``."""
        scaled = b.to(self._lengths) / self._lengths
        solved: Tensor = torch.linalg.solve_triangular(self._root, scaled[:, None], upper=False)[:, 0]
        return solved

    def _solve_upper(self, b: Tensor) -> Tensor:
        """Return ``R^-1 b``."""
        solved: Tensor = torch.linalg.solve_triangular(self._root.T, b.to(self._lengths)[:, None], upper=True)[:, 0]
        return solved / self._lengths


def given_subspace(matrix: Tensor, dtype: torch.dtype, device: torch.device) -> Subspace:
    """Return the range of the user's own matrix, which was checked."""
    own = matrix.detach().to(device, dtype)
    n, p = matrix.shape
    return Subspace(n, p, lambda _, where: own[where].T, device)


def check_rows(matrix: Tensor, n: int) -> None:
    """Refuse a matrix that is not a finite ``(n, p)`` one with ``p <= n``."""
    rows, p = matrix.shape
    if rows != n or not 1 <= p <= n:
        raise ArgumentError(
            f"`subspace` has the shape {tuple(matrix.shape)}; it must be (n, p) with one row for each of the n = {n} "
            "parameters that are measured, in the order of named_parameters(), and 1 <= p <= n. "
            "Transpose it if its columns are in rows; choose parameters with params=..."
        )
    if not bool(torch.isfinite(matrix).all()):
        raise ArgumentError(
            "`subspace` has entries that are NaN or infinite; all must be finite. Check how it is made."
        )


def check_matrix(matrix: Any) -> None:
    """Refuse what is not a real matrix."""
    if not isinstance(matrix, Tensor) or matrix.ndim != 2 or not matrix.is_floating_point():
        got = f"{tuple(matrix.shape)}, {matrix.dtype}" if isinstance(matrix, Tensor) else type(matrix).__name__
        raise ArgumentError(
            f"`subspace` must be a floating point matrix (n, p) with a direction in each column, got {got}. "
            "Pass a torch.Tensor of two dimensions, or subspace_dim=p for random directions."
        )


def random_subspace(
    n: int,
    p: int,
    *,
    seed: int,
    draw: int,
    columns: str,
    dtype: torch.dtype,
    device: torch.device,
    keep: bool,
) -> Subspace:
    """Return the range of a matrix with independent N(0, 1) entries, not normalised, or an orthonormal basis of it.

    Args:
        n: Number of rows.
        p: Number of columns.
        seed: Seed of the matrix.
        draw: Which of the matrices of this seed.
        columns: ``"gaussian"`` or ``"orthonormal"``.
        dtype: Dtype to draw and multiply in.
        device: Where to multiply; entries are drawn on the CPU, the same for every device.
        keep: Whether to keep the entries; else they are drawn again each time.
    """
    num_tiles = -(-n // _ROWS)
    seeds = [
        # The seeds of a column's tiles: of a prefix of its rows, they are the prefix.
        np.random.SeedSequence(seed, spawn_key=(draw, j)).generate_state(num_tiles, np.uint64) >> np.uint64(1)
        for j in range(p)
    ]
    kept: dict[int, Tensor] = {}
    generator = torch.Generator()

    def tile(i: int, where: slice) -> Tensor:
        if i in kept:
            return kept[i]
        entries = torch.empty(p, where.stop - where.start, dtype=torch.float64)  # the same for every dtype
        for row, own in zip(entries, seeds, strict=True):
            generator.manual_seed(int(own[i]))
            row.normal_(generator=generator)
        entries = entries.to(device, dtype)
        if keep:
            kept[i] = entries
        return entries

    return Subspace(n, p, tile, device, orthonormal=columns == "orthonormal")
