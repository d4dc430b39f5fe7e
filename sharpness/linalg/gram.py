"""Products of blocks of vectors, and of an operator with them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from sharpness.errors import NonFiniteError
from sharpness.linalg.operator import LinearOperator
from sharpness.linalg.products import accumulator

_PIECE = 2**22  # entries that are converted at a time
_BLOCK = 16  # vectors in one call of matmat


def gram(a: Tensor, b: Tensor) -> Tensor:  # (p, n), (q, n) -> (p, q)
    """Return all inner products of the rows of two blocks, accumulated in float64; on the CPU."""
    wide = accumulator(a.device)
    total = torch.zeros(len(a), len(b), dtype=wide, device=a.device)
    width = max(1, _PIECE // max(len(a) + len(b), 1))
    for low in range(0, a.shape[1], width):
        total += a[:, low : low + width].to(wide) @ b[:, low : low + width].to(wide).T
    return total.cpu().double()


def row_dots(a: Tensor, b: Tensor) -> Tensor:  # (p, n), (p, n) -> (p,)
    """Return the inner product of each row of one block with that of the other; on the CPU."""
    wide = accumulator(a.device)
    return torch.stack([torch.dot(x.to(wide), y.to(wide)) for x, y in zip(a, b, strict=True)]).cpu().double()


def multiply(operator: LinearOperator, rows: Tensor, spent: Callable[[int], object]) -> Tensor:  # (p, n) -> (p, n)
    """Return the product of the operator with each row, some at a time.

    Raises:
        NonFiniteError: If a product holds NaN or infinity.
    """
    pieces = []
    for low in range(0, len(rows), _BLOCK):
        block = rows[low : low + _BLOCK]
        pieces.append(operator.matmat(block.T).T)
        if not bool(torch.isfinite(pieces[-1]).all()):
            raise NonFiniteError(
                "a product of the operator holds NaN or infinity. "
                "Check the loss and the weights for overflow, or use float64."
            )
        spent(len(block))
    return torch.cat(pieces) if pieces else rows
