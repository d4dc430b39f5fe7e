"""Products with one curvature matrix, batch by batch; what each batch needs is kept between them while memory lasts."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor

from sharpness.errors import ModelError
from sharpness.objective.batch_sum import BatchSum
from sharpness.objective.compiler import Compiler, wait_for
from sharpness.objective.curvature import Curvature
from sharpness.objective.first_order import FirstOrder
from sharpness.objective.gauss_newton import GaussNewton
from sharpness.objective.guard import derived_seed
from sharpness.objective.linearised import Linearised
from sharpness.objective.losses import Terms
from sharpness.objective.output_curvature import output_curvature
from sharpness.objective.output_matrices import OuterProducts
from sharpness.objective.parameters import Parameters
from sharpness.objective.passes import Passes, require_dependence, require_usable
from sharpness.objective.replay import Replay, Replays
from sharpness.objective.stream import Stream
from sharpness.objective.term_gradients import TermGradients

_NAMES = {"hessian": "Hessian", "ggn": "GGN", "fisher": "Fisher", "empirical_fisher": "empirical-Fisher"}


@final
@dataclass(frozen=True)
class Request:
    """A product that is wanted: a block of parameters, by position, and the direction to multiply by."""

    parameters: Parameters
    block: Sequence[int]
    directions: Sequence[Tensor]
    whole: bool

    @classmethod
    def of(cls, parameters: Parameters, vector: Tensor, block: Sequence[int] | None = None) -> Request:
        """Ask for the product with ``vector``, which has the entries of the ``block`` of the parameters, or of all."""
        whole = range(len(parameters.names))
        block = whole if block is None else block
        own = parameters.subset(block)
        own.check(vector)
        return cls(own, block, own.split(vector.detach()), whole=list(block) == list(whole))


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

    def __init__(self, curvature: Curvature, seed: int, compiler: Compiler | None = None) -> None:
        self.curvature = curvature
        self.kept: dict[int, Linearised] = {}
        self.loss: float | None = None
        self.used: frozenset[int] = frozenset()
        self.by_term = False  # whether the model has first derivatives only, and each term takes a backward pass
        self.exact = True  # whether no targets were drawn
        self._looked = False
        self._seed = seed
        self._compiler = compiler or Compiler(False, "exact")
        self._replays = Replays(self._compiler)
        self._stream = Stream(self._compiler)
        self._done = 0  # products so far
        self._seconds = 0.0  # that the last one took
        self._without = 0.0  # that one took of which no batch was made by code
        self._recording = False  # whether this pass turns kept graphs into tapes
        self._streaming = False  # whether it may make what is not kept by compiled code
        self._remaining = 0.0  # seconds that products take from now on
        self._along: Sequence[Tensor] = ()  # a vector

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
        recorded = any(isinstance(linear, Replay) for linear in self.kept.values())
        reasons = (self._replays.refusal, self._stream.refusal, self._compiler.failure)
        found: dict[str, Any] = {
            "one_backward_per_term": self.by_term,
            "engine": "compiled" if self._replays.code or self._stream.used else "recorded" if recorded else "autograd",
            "engine_note": "; ".join(dict.fromkeys(reason for reason in reasons if reason is not None)) or None,
            "compile_seconds": self._compiler.seconds,
        }
        if self.curvature.name == "fisher":
            found["fisher"] = "exact" if self.exact else f"{self.curvature.num_samples} draws per term"
        return found

    def multiply(
        self, passes: Passes, leaves: Sequence[Tensor], requests: Sequence[Request], expected: int | None = None
    ) -> list[Tensor]:
        """Return the product for each request; one pass over the data for all of them.

        Args:
            passes: The data.
            leaves: The parameters.
            requests: What is wanted.
            expected: About how many more products there will be, these included; as many as there were if ``None``.
        """
        started, compiling = time.perf_counter(), self._compiler.seconds
        streamed, prepared = self._stream.used, self._stream.prepared
        self._prepare(passes, requests, (self._done if expected is None else expected) * self._seconds)
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
        found = [sum_.divided_by(weight) for sum_ in sums]
        wait_for(passes.batches.device)
        self._done += len(requests)
        self._seconds = (time.perf_counter() - started - (self._compiler.seconds - compiling)) / len(requests)
        if self._stream.used == streamed:
            self._without = self._seconds
        elif self._stream.prepared == prepared:
            self._stream.compare(self._seconds, self._without)
        return found

    def forms(self, passes: Passes, leaves: Sequence[Tensor], request: Request) -> list[tuple[float, float]]:
        """Return ``v' H_b v`` for the mean loss of each batch ``b``, and the batch's weight."""
        found = []
        for share in self.shares(passes, leaves, [request]):
            pairs = zip(share.pieces[0], request.directions, strict=True)
            form = sum(torch.sum(p.double() * d.double()).item() for p, d in pairs if p is not None)
            found.append((form / share.weight, share.weight))
            del share, pairs
        return found

    def _prepare(self, passes: Passes, requests: Sequence[Request], seconds: float) -> None:
        """Choose how products are made that take ``seconds`` from now on: from graphs, from tapes, by compiled code."""
        self._remaining, self._along = seconds, requests[0].directions
        self._recording = False
        whole = all(request.whole for request in requests)
        self._streaming = whole and self._done > 0 and self.curvature.sample_targets is None
        if not whole:  # a tape is of the whole matrix; a graph has its blocks
            for i in [i for i, linear in self.kept.items() if isinstance(linear, Replay)]:
                passes.room().release(self.kept.pop(i).tensors())
            return
        replays = [linear for linear in self.kept.values() if isinstance(linear, Replay)]
        if replays and len(replays) == len(self.kept):
            self._replays.compile(replays, self._along, seconds)
        self._recording = not replays and self._replays.pay(self.kept.values(), seconds)

    def shares(self, passes: Passes, leaves: Sequence[Tensor], requests: Sequence[Request]) -> Iterator[Share]:
        """Yield what each batch contributes; the consumer must drop it before the next batch is evaluated."""
        for i, graph, keep in self._graphs(passes, leaves):
            pieces: list[Sequence[Tensor | None]] = []
            if self._recording and keep:
                graph, first = self._recorded(i, graph, passes, leaves, requests[0])
                pieces.append(first)
            for position, request in enumerate(requests[len(pieces) :], len(pieces)):
                last = position == len(requests) - 1
                pieces.append(graph.product(leaves, request.block, request.directions, keep=keep or not last))
            share = Share(i, pieces, graph.total, graph.weight, graph.used)
            del graph, pieces  # neither may outlive its batch
            yield share
            del share

    def _recorded(
        self, i: int, graph: Linearised, passes: Passes, leaves: Sequence[Tensor], request: Request
    ) -> tuple[Linearised, Sequence[Tensor | None]]:
        """Return a product of a kept graph, and what replays it in its place, if there is room for that."""
        replay, product = self._replays.record(graph, leaves, request.block, request.directions)
        if replay is None or not passes.room().take(replay.tensors()):
            self._recording = False
            return graph, product
        self.kept[i] = replay
        passes.room().release(graph.tensors())
        return replay, product

    def _graphs(self, passes: Passes, leaves: Sequence[Tensor]) -> Iterator[tuple[int, Linearised, bool]]:
        """Yield the position and the graph of each batch, and whether the graph must survive."""
        kept = dict(self.kept)
        yield from ((i, graph, True) for i, graph in kept.items())
        if kept and len(kept) == passes.batches.count:
            passes.count += 1
            return
        room, weight = passes.batches.kept and not kept, 0.0
        for i, batch, evaluate in passes.walk(leaves):
            if i in kept:
                weight += kept[i].weight
                continue
            graph = self._streamed(i, batch, evaluate, leaves)
            if graph is None:
                terms = evaluate()
                if terms.weight == 0:
                    continue
                require_usable(i, terms, leaves)
                graph = self.linearise(i, terms, leaves)
                self._stream.note(i, batch, graph)
                del terms
                room = room and passes.room().take(graph.tensors())
                if room:
                    self.kept[i] = graph
            weight += graph.weight
            yield i, graph, i in self.kept
            del graph
        passes.walked(weight)

    def _streamed(
        self, i: int, batch: Any, evaluate: Callable[[], Terms], leaves: Sequence[Tensor]
    ) -> Linearised | None:
        """Return what replays products of a batch that is not kept, made by compiled code, if there is such code."""
        if not self._streaming:
            return None
        self._stream.prepare(
            i, batch, leaves, self._along, evaluate, lambda terms: self.linearise(i, terms, leaves), self._remaining
        )
        return self._stream.linear(i, batch, leaves)
