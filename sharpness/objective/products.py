"""Products with one curvature matrix, batch by batch; what each batch needs is kept between them while memory lasts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, final

import torch
from torch import Tensor

from sharpness.errors import ModelError
from sharpness.objective.batch_sum import BatchSum
from sharpness.objective.curvature import Curvature
from sharpness.objective.first_order import FirstOrder
from sharpness.objective.gauss_newton import GaussNewton
from sharpness.objective.guard import derived_seed
from sharpness.objective.losses import Terms
from sharpness.objective.output_curvature import OuterProducts, output_curvature
from sharpness.objective.parameters import Parameters
from sharpness.objective.passes import Passes, require_dependence
from sharpness.objective.term_gradients import TermGradients

_NAMES = {"hessian": "Hessian", "ggn": "GGN", "fisher": "Fisher", "empirical_fisher": "empirical-Fisher"}


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


@final
@dataclass(frozen=True)
class Request:
    """A product that is wanted: a block of parameters, by position, and the direction to multiply by."""

    parameters: Parameters
    block: Sequence[int]
    directions: Sequence[Tensor]

    @classmethod
    def of(cls, parameters: Parameters, vector: Tensor, block: Sequence[int] | None = None) -> Request:
        """Ask for the product with ``vector``, which has the entries of the ``block`` of the parameters, or of all."""
        block = range(len(parameters.names)) if block is None else block
        own = parameters.subset(block)
        own.check(vector)
        return cls(own, block, own.split(vector.detach()))


@final
@dataclass
class Share:
    """What one batch contributes to each product."""

    i: int
    pieces: list[Sequence[Tensor | None]]
    total: float
    weight: float
    used: frozenset[int]


@final
class Products:
    """Products with the matrix of one curvature over all batches.

    Graphs are kept only if the batches themselves are, since another walk may group the samples otherwise.

    Attributes:
        kept: The graphs that are kept, by batch.
        loss: Mean loss, once a product was made.
        used: Positions of the parameters that the loss depends on, likewise.
    """

    def __init__(self, curvature: Curvature, seed: int) -> None:
        self.curvature = curvature
        self.kept: dict[int, Linearised] = {}
        self.loss: float | None = None
        self.used: frozenset[int] = frozenset()
        self.by_term = False  # whether the model has first derivatives only, and each term takes a backward pass
        self.exact = True  # whether no targets were drawn
        self._looked = False
        self._seed = seed

    def linearise(self, i: int, terms: Terms, leaves: Sequence[Tensor]) -> Linearised:
        """Return what batch ``i`` needs for products; the same operations are expected of every batch.

        Raises:
            ModelError: If the model lacks the derivatives that this curvature needs.
        """
        if self.curvature.name == "hessian":
            graph = FirstOrder.of(terms, leaves)
            if not self._looked:
                graph.require_differentiable()
            self._looked = True  # only now: a model that was refused is refused again
            return graph
        generator = torch.Generator().manual_seed(derived_seed(self._seed, i))
        middle = output_curvature(self.curvature, terms, generator)
        self.exact = not isinstance(middle, OuterProducts)
        if isinstance(middle, OuterProducts) and self.by_term:
            return TermGradients.of(terms, leaves, middle)
        try:
            linear = GaussNewton.of(terms, leaves, middle)
            if not self._looked:
                linear.require_differentiable(leaves)
            self._looked = True
            return linear
        except ModelError:
            if not isinstance(middle, OuterProducts):
                raise
            self.by_term = True
            return TermGradients.of(terms, leaves, middle)

    def provenance(self) -> dict[str, Any]:
        """Return how the products were made, where there is more than one way."""
        found: dict[str, Any] = {"one_backward_per_term": self.by_term}
        if self.curvature.name == "fisher":
            found["fisher"] = "exact" if self.exact else f"{self.curvature.num_samples} draws per term"
        return found

    def multiply(self, passes: Passes, leaves: Sequence[Tensor], requests: Sequence[Request]) -> list[Tensor]:
        """Return the product for each request; one pass over the data for all of them."""
        what = f"{_NAMES[self.curvature.name]}-vector product"
        sums = [BatchSum(request.parameters, what) for request in requests]
        total = weight = 0.0
        used: frozenset[int] = frozenset()
        for share in self.shares(passes, leaves, requests):
            for sum_, pieces in zip(sums, share.pieces, strict=True):
                sum_.add(share.i, pieces)
            total, weight, used = total + share.total, weight + share.weight, used | share.used
            del share, pieces  # before the next batch is evaluated
        require_dependence(used)
        self.loss, self.used = total / weight, used
        return [sum_.divided_by(weight) for sum_ in sums]

    def shares(self, passes: Passes, leaves: Sequence[Tensor], requests: Sequence[Request]) -> Iterator[Share]:
        """Yield what each batch contributes; the consumer must drop it before the next batch is evaluated."""
        for i, graph, keep in self._graphs(passes, leaves):
            pieces = []
            for position, request in enumerate(requests):
                last = position == len(requests) - 1
                pieces.append(graph.product(leaves, request.block, request.directions, keep=keep or not last))
            share = Share(i, pieces, graph.total, graph.weight, graph.used)
            del graph, pieces  # neither may outlive its batch
            yield share
            del share

    def _graphs(self, passes: Passes, leaves: Sequence[Tensor]) -> Iterator[tuple[int, Linearised, bool]]:
        """Yield the position and the graph of each batch, and whether the graph must survive."""
        kept = dict(self.kept)
        yield from ((i, graph, True) for i, graph in kept.items())
        if kept and len(kept) == passes.batches.count:
            passes.count += 1
            return
        room = passes.batches.kept and not kept
        for i, terms in passes.terms(leaves, skip={i: graph.weight for i, graph in kept.items()}):
            graph = self.linearise(i, terms, leaves)
            del terms
            room = room and passes.room().take(graph.tensors())
            if room:
                self.kept[i] = graph
            yield i, graph, room
            del graph
