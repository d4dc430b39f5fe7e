"""How many products an estimate may spend, how many vectors it may keep, and when it looks at its tolerance."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from sharpness._checks import check_count
from sharpness.errors import ArgumentError
from sharpness.linalg.gram import multiply, row_dots
from sharpness.linalg.operator import LinearOperator

LIMIT = 1000  # products that may be spent on a tolerance without being asked
_SMALL = 64  # dimensions that are multiplied one by one
_GROWTH = 1.25  # from one look at the tolerance to the next
_BLOCK = 16


def budget_of(num_matvecs: Any, least: int, method: str, reason: str) -> int:
    """Return the products that may be spent; refuse fewer than the method needs."""
    if num_matvecs is None:
        return LIMIT
    if check_count("num_matvecs", num_matvecs) < least:
        raise ArgumentError(
            f"`num_matvecs` must be at least {least} for {method}, {reason}, got {num_matvecs}. "
            f"Pass num_matvecs={least} or more, or leave it out."
        )
    return int(num_matvecs)


def most_vectors(
    operator: LinearOperator, memory: Any, vectors: int | None, *, each: int = 1, instead: str = ""
) -> int:
    """Return how many random vectors there is room for; refuse a number that does not fit.

    Args:
        operator: The operator.
        memory: Bytes, ``None`` or 0 for no limit.
        vectors: How many are needed; ``None`` for the least that an estimate is made from.
        each: Vectors that are kept for each of them.
        instead: What else may be done, for the error.
    """
    if not memory and memory is not False:
        return operator.n // each
    pack = each * operator.n * operator.dtype.itemsize
    most = check_count("memory", memory) // pack
    wanted = 3 if vectors is None else vectors
    if most < wanted:
        raise ArgumentError(
            f"`memory` must be at least {wanted * pack} bytes for {wanted} random vectors, {each} to keep for each, "
            f"got {memory}. Pass memory={wanted * pack} or more, or fewer num_matvecs{instead}."
        )
    return int(most)


def limiting(num_matvecs: int | None, spent: int) -> str:
    """Return the name of the option that has kept a run from going on."""
    return "memory" if num_matvecs is None and spent < LIMIT - 2 else "num_matvecs"


def is_small(n: int, num_matvecs: int | None) -> bool:
    """Return whether the diagonal is had entry by entry for what may be spent."""
    return n <= (_SMALL if num_matvecs is None else num_matvecs)


def sizes(budget: int, first: int, *, adaptive: bool) -> Iterator[int]:
    """Yield how much is to be spent in all before each look at the tolerance."""
    size = min(first, budget) if adaptive else budget
    yield size
    while size < budget:
        size = min(math.ceil(size * _GROWTH), budget)
        yield size


def entries(operator: LinearOperator, spent: Callable[[int], object]) -> tuple[Tensor, Tensor]:
    """Return the diagonal and the squared lengths of the columns, by ``n`` products."""
    diagonal, lengths = [], []
    for low in range(0, operator.n, _BLOCK):
        high = min(low + _BLOCK, operator.n)
        rows = torch.zeros(high - low, operator.n, dtype=operator.dtype, device=operator.device)
        rows[range(high - low), range(low, high)] = 1.0
        products = multiply(operator, rows, spent)
        diagonal.append(row_dots(rows, products))
        lengths.append(row_dots(products, products))
    return torch.cat(diagonal), torch.cat(lengths)
