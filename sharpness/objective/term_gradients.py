"""Products with sums of outer products of gradients, from first derivatives alone: one backward pass per term.

For models that cannot be differentiated twice. Where they can, `GaussNewton` does the same for all terms at once.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor

from sharpness.objective.diagnosis import Source, explained
from sharpness.objective.losses import Terms
from sharpness.objective.memory import graph_nodes, graph_tensors
from sharpness.objective.output_matrices import OuterProducts


@final
@dataclass(frozen=True)
class TermGradients:
    """A batch's model with its graph, and the derivative of each loss term by the outputs."""

    middle: OuterProducts
    used: frozenset[int]
    total: float
    weight: float
    source: Source | None

    @classmethod
    def of(cls, terms: Terms, leaves: Sequence[Tensor], middle: OuterProducts) -> TermGradients:
        """Look which parameters the outputs depend on."""
        ones = [torch.ones_like(out) for out in middle.outputs]
        with explained(terms.source):
            whole = torch.autograd.grad(middle.outputs, leaves, ones, retain_graph=True, allow_unused=True)
        used = frozenset(i for i, g in enumerate(whole) if g is not None)
        return cls(middle, used, terms.number, terms.weight, terms.source)

    def product(
        self, leaves: Sequence[Tensor], block: Sequence[int], directions: Sequence[Tensor], *, keep: bool
    ) -> Sequence[Tensor | None]:
        """Return the block of the parameters ``block`` times ``directions``; the graph is kept either way."""
        wanted = [leaves[i] for i in block]
        along = [direction.to(leaf) for direction, leaf in zip(directions, wanted, strict=True)]
        found: list[Tensor | None] = [None] * len(block)
        for slopes, scale in self.middle.terms():
            with explained(self.source):
                gradients = torch.autograd.grad(
                    self.middle.outputs, wanted, slopes, retain_graph=True, allow_unused=True
                )
            pairs = [(g.to_dense() if g.is_sparse else g) if g is not None else None for g in gradients]
            share = scale * sum(torch.sum(g * v).item() for g, v in zip(pairs, along, strict=True) if g is not None)
            for i, g in enumerate(pairs):
                sum_ = found[i]
                if g is not None:
                    found[i] = g * share if sum_ is None else sum_.add_(g, alpha=share)
        return found

    def tensors(self) -> Iterator[Tensor]:
        """Yield every tensor that is kept alive between products."""
        yield from self.middle.tensors()
        yield from graph_tensors(self.middle.outputs)

    def nodes(self) -> Iterator[Any]:
        """Yield every node of the graph."""
        yield from graph_nodes(self.middle.outputs)
