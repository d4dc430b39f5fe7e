"""Walks over the data: the loss terms of one batch after the other."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, final

from torch import Tensor, nn

from sharpness.errors import ModelError, NonFiniteError, NoTermsError
from sharpness.objective.data import Batches
from sharpness.objective.functional import Functional
from sharpness.objective.guard import reseed
from sharpness.objective.losses import Terms
from sharpness.objective.memory import Budget


@final
class Passes:
    """Walks over the batches with a model, which count themselves.

    Args:
        model: The model, for its flags and for the tensors that take no extra memory.
        functional: The loss of one batch.
        batches: The data.
        seed: Seed of what is random in the model.
        memory: Bytes that may be kept between walks; ``None`` means a share of what is free.

    Attributes:
        count: Walks so far.
        num_terms: Loss terms in the data, once walked.
    """

    def __init__(
        self, model: nn.Module, functional: Functional, batches: Batches, *, seed: int, memory: int | None
    ) -> None:
        self.batches = batches
        self.count = 0
        self.num_terms: float | None = None
        self.reserved = 0  # bytes of `memory` that are spoken for elsewhere
        self._model = model
        self._functional = functional
        self._seed = seed
        self._memory = memory
        self._room: Budget | None = None

    def terms(
        self,
        leaves: Sequence[Tensor],
        *,
        draw: int = 0,
        tensors: Mapping[str, Tensor] | None = None,
        skip: Mapping[int, float] | None = None,
        weightless: bool = False,
        finite: bool = True,
    ) -> Iterator[tuple[int, Terms]]:
        """Walk the data once and yield the position and the terms of each batch that has any.

        The graph of a batch lives as long as the consumer holds its terms: drop them before asking for the next.

        Args:
            leaves: What goes in the places of the chosen parameters.
            draw: Which of the draws of everything random.
            tensors: What goes in other places, by name.
            skip: Batches that need not be evaluated, with their weights.
            weightless: Also yield batches whose terms have no weight, and whose total means nothing.
            finite: Refuse a loss that is NaN or infinite.
        """
        found = 0.0
        for i, _, evaluate in self.walk(leaves, draw=draw, tensors=tensors):
            if skip is not None and i in skip:
                found += skip[i]
                continue
            terms = evaluate()
            if terms.weight == 0:
                if weightless:
                    yield i, terms
                del terms
                continue
            found += terms.weight
            require_usable(i, terms, leaves, finite=finite)
            yield i, terms
            del terms  # the graph must not outlive its batch
        self.walked(found)

    def walked(self, weight: float) -> None:
        """Take note of the number of loss terms of a whole walk.

        Raises:
            NoTermsError: If it is 0.
        """
        require_terms(weight)
        self.num_terms = weight

    def walk(
        self, leaves: Sequence[Tensor], *, draw: int = 0, tensors: Mapping[str, Tensor] | None = None
    ) -> Iterator[tuple[int, Any, Callable[[], Terms]]]:
        """Walk the data once and yield the position of each batch, the batch, and what returns its terms."""
        self.count += 1
        self.batches.settle(self.room())
        places = self._functional.places(leaves, tensors)
        renewed = any(module.training for module in self._model.modules())  # batch norm and its like write to buffers

        def evaluate(i: int, batch: Any) -> Terms:
            reseed(self._seed, draw, i)
            return self._functional.terms(batch, self._functional.places(leaves, tensors) if renewed else places)

        for i, batch in self.batches.walk(draw=draw):
            yield i, batch, partial(evaluate, i, batch)

    def room(self) -> Budget:
        """Return what memory there is to keep batches and graphs."""
        if self._room is None:
            own = [*self._model.parameters(), *self._model.buffers()]
            self._room = Budget(self._memory, self.batches.device, own, reserved=self.reserved)
            self._room.take(self.batches.tensors())
        return self._room

    def forget(self) -> None:
        """Forget what was taken of the memory; the batches stay."""
        self._room = None


def require_usable(i: int, terms: Terms, leaves: Sequence[Tensor], *, finite: bool = True) -> None:
    """Refuse a loss that is not finite, if asked for, or that the parameters have no part in.

    Raises:
        NonFiniteError: If the loss of batch ``i`` is NaN or infinite.
        ModelError: If it does not depend on leaves that are to be differentiated by.
    """
    if finite:
        _require_finite(i, terms)
    if leaves[0].requires_grad and not terms.total.requires_grad:
        require_dependence(())


def _require_finite(i: int, terms: Terms) -> None:
    if not math.isfinite(terms.number):
        raise NonFiniteError(
            f"the loss of batch {i} (counted from 0) is {terms.number}. "
            "Check this batch for NaN, and the weights for overflow."
        )


def require_terms(weight: float) -> None:
    """Refuse data without a loss term.

    Raises:
        NoTermsError: If ``weight``, the number of all of them, is 0.
    """
    if weight == 0:
        raise NoTermsError("the loader holds no loss term: every batch has weight 0. Check ignore_index and weights.")


def require_dependence(used: Collection[int]) -> None:
    """Refuse a loss that none of the parameters has a part in.

    Raises:
        ModelError: If ``used`` is empty.
    """
    if not used:
        raise ModelError(
            "the loss does not depend on the parameters that are measured. Look for .detach(), .item(), "
            "torch.no_grad() and quantised layers in the model and the loss, and at params=..."
        )
