"""The gradient of one batch as a graph that can be differentiated again."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor

from sharpness.objective.diagnosis import Source, explained, is_custom
from sharpness.objective.losses import Terms
from sharpness.objective.memory import graph_nodes
from sharpness.objective.roots import Roots


@final
@dataclass(frozen=True)
class FirstOrder:
    """The graph of a batch's gradient. The gradient itself, as large as the model, is not kept.

    A parameter that the loss does not use, or that enters it linearly, has no second derivative: its gradient is left
    out, and its rows of the Hessian are zero unless another gradient depends on it.
    """

    roots: Roots  # of the gradients that depend on the parameters
    used: frozenset[int]  # positions of the parameters that the loss depends on
    total: float
    weight: float
    source: Source | None = None
    custom: bool = False  # whether there are functions that someone wrote in Python

    @classmethod
    def of(cls, terms: Terms, leaves: Sequence[Tensor]) -> FirstOrder:
        """Differentiate once, ready for more."""
        with explained(terms.source):
            gradients = torch.autograd.grad(terms.total, leaves, create_graph=True, allow_unused=True)
        return cls(
            roots=Roots.of(gradients),
            used=frozenset(i for i, g in enumerate(gradients) if g is not None),
            total=terms.number,
            weight=terms.weight,
            source=terms.source,
            custom=any(is_custom(node) for node in graph_nodes([terms.total])),
        )

    def product(
        self, leaves: Sequence[Tensor], block: Sequence[int], directions: Sequence[Tensor], *, keep: bool
    ) -> Sequence[Tensor | None]:
        """Return the Hessian's block of the parameters ``block`` times ``directions``; ``keep`` the graph or not."""
        edges, along = self.roots.along(block, directions)
        if not edges:
            return [None] * len(block)
        with explained(self.source):
            wanted = [leaves[i] for i in block]
            return torch.autograd.grad(edges, wanted, along, retain_graph=keep, allow_unused=True)

    def require_differentiable(self) -> None:
        """Refuse a graph with an operation that PyTorch would silently take for a constant in a second derivative.

        Raises:
            ModelError: If a custom function is marked ``once_differentiable``, or runs kernels unseen by autograd.
        """
        if self.custom and self.source is not None:
            self.source.require_differentiable()

    def tensors(self) -> Iterator[Tensor]:
        """Yield every tensor that the graph keeps alive."""
        yield from self.roots.tensors()

    def nodes(self) -> Iterator[Any]:
        """Yield every node of the graph."""
        yield from self.roots.nodes()
