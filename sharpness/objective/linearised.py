"""What one batch needs for products with a curvature matrix, in whichever way they are made."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Protocol

from torch import Tensor


class Linearised(Protocol):
    """What one batch needs for products with a curvature matrix: a graph of its first derivatives."""

    @property
    def used(self) -> frozenset[int]:
        """Positions of the parameters that the loss depends on."""

    @property
    def total(self) -> float:
        """Sum of the batch's loss terms."""

    @property
    def weight(self) -> float:
        """Their number."""

    def product(
        self, leaves: Sequence[Tensor], block: Sequence[int], directions: Sequence[Tensor], *, keep: bool
    ) -> Sequence[Tensor | None]:
        """Return the matrix's block of the parameters ``block`` times ``directions``; ``keep`` the graph or not."""

    def tensors(self) -> Iterator[Tensor]:
        """Yield every tensor that is kept alive."""

    def nodes(self) -> Iterator[Any]:
        """Yield every node of the graphs that a product runs through."""
