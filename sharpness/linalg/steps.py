"""Algorithms as generators: each hands out the next vector to multiply and is sent its product.

One caller may then feed many of them in lockstep, all with the same pass over the data.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from typing import Protocol, TypeAlias, TypeVar

import torch
from torch import Tensor

from sharpness.linalg.operator import LinearOperator

T = TypeVar("T")
Steps: TypeAlias = Generator[Tensor, Tensor, T]


class Domain(Protocol):
    """What an algorithm needs to know of an operator whose products it is sent."""

    @property
    def n(self) -> int:
        """Dimension."""

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of vectors and products."""

    @property
    def device(self) -> torch.device:
        """Where vectors and products live."""

    def product_error(self, rows: Tensor) -> float | None:
        """Return the rounding error of products with the unit rows ``(k, n)``, as a `LinearOperator` does."""


def drive(steps: Steps[T], operator: LinearOperator, spent: Callable[[], object] = lambda: None) -> T:
    """Multiply what ``steps`` hands out until it returns; ``spent`` is called after each product."""
    try:
        v = next(steps)
        while True:
            product = operator.matvec(v)
            spent()
            v = steps.send(product)
    except StopIteration as end:
        result: T = end.value
        return result
