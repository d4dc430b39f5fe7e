r"""Products of one batch with a curvature matrix of the form :math:`J^\top M J`.

``J`` is the Jacobian of the model's outputs with respect to the parameters and ``M`` a positive semi-definite matrix
in the space of the outputs, block-diagonal over the samples. Both factors are applied by reverse-mode differentiation:
with ``u`` a dummy in the shape of the outputs, :math:`g(u) = J^\top u` is recorded once, and :math:`J v` is the
derivative of :math:`g(u)^\top v` with respect to ``u``. So every model with a second derivative has these products,
recurrent ones and those with attention included (forward-mode rules are missing for some of their kernels).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor

from sharpness.objective.diagnosis import Source, explained, is_custom
from sharpness.objective.losses import Terms
from sharpness.objective.memory import graph_nodes, graph_tensors
from sharpness.objective.output_matrices import OutputCurvature
from sharpness.objective.roots import Roots


@final
@dataclass(frozen=True)
class GaussNewton:
    """A batch's linearised model with its graph, and the curvature of the loss at the outputs."""

    outputs: tuple[Tensor, ...]
    dummies: tuple[Tensor, ...]  # u, one per output
    pulled_back: Roots  # of J^T u
    middle: OutputCurvature
    used: frozenset[int]
    total: float
    weight: float
    source: Source | None

    @classmethod
    def of(cls, terms: Terms, leaves: Sequence[Tensor], middle: OutputCurvature) -> GaussNewton:
        """Record the pull-back from the outputs to the parameters."""
        outputs = middle.outputs
        dummies = tuple(torch.zeros_like(out, requires_grad=True) for out in outputs)
        with explained(terms.source):
            pulled = torch.autograd.grad(outputs, leaves, dummies, create_graph=True, allow_unused=True)
        roots = Roots.of(pulled)
        return cls(
            outputs=outputs,
            dummies=dummies,
            pulled_back=roots,
            middle=middle,
            used=frozenset(roots.positions),
            total=terms.number,
            weight=terms.weight,
            source=terms.source,
        )

    def product(
        self, leaves: Sequence[Tensor], block: Sequence[int], directions: Sequence[Tensor], *, keep: bool
    ) -> Sequence[Tensor | None]:
        """Return the block ``J^T M J`` of the parameters ``block`` times ``directions``; ``keep`` the graph or not."""
        edges, along = self.pulled_back.along(block, directions)
        if not edges:
            return [None] * len(block)
        with explained(self.source):
            pushed = torch.autograd.grad(edges, self.dummies, along, retain_graph=True, allow_unused=True)
            ahead = [torch.zeros_like(u) if p is None else p for p, u in zip(pushed, self.dummies, strict=True)]
            weighed = self.middle.times(ahead)
            wanted = [leaves[i] for i in block]
            return torch.autograd.grad(self.outputs, wanted, weighed, retain_graph=keep, allow_unused=True)

    def require_differentiable(self, leaves: Sequence[Tensor]) -> None:
        """Refuse a model without second derivatives, also one whose custom functions PyTorch would take for constants.

        Raises:
            ModelError: If there is an operation that cannot be differentiated twice.
        """
        if self.source is not None and any(is_custom(node) for node in graph_nodes(self.outputs)):
            self.source.require_differentiable()
        self.product(leaves, range(len(leaves)), [torch.zeros_like(leaf) for leaf in leaves], keep=True)

    def tensors(self) -> Iterator[Tensor]:
        """Yield every tensor that is kept alive between products."""
        yield from self.dummies
        yield from self.middle.tensors()
        yield from self.pulled_back.tensors()
        yield from graph_tensors(self.outputs)

    def nodes(self) -> Iterator[Any]:
        """Yield every node of the graphs that a product runs through."""
        yield from self.pulled_back.nodes()
        yield from graph_nodes(self.outputs)
