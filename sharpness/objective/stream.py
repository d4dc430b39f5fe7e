"""Batches that are not kept: what a product takes from them is made anew each time, by compiled code.

Whether that is faster depends on the network, so by default it is done only where an earlier run, told to compile, has
found it to be. Making it takes the forward pass, the first backward pass and what of the second does not depend on the
vector. It is recorded for the first batch of each shape. A batch that weighs something else, or whose loss by the code
is not what it was by the model itself, may have taken another way through the model, and is left to the model.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor

from sharpness.objective.compiler import Compiler, Run
from sharpness.objective.data import map_tensors, tensors_in
from sharpness.objective.diagnosis import is_custom
from sharpness.objective.linearised import Linearised
from sharpness.objective.losses import Terms
from sharpness.objective.replay import HIDDEN, Replay
from sharpness.objective.tape import NotRecordableError, Recorder, Tape

_CLOSE = {torch.float32: 1e-4, torch.float64: 1e-9}  # relative difference of a loss that rounding may make


@final
@dataclass(frozen=True)
class Facts:
    """What an earlier pass told of a batch: the sum of its loss terms, their number, what they depend on."""

    total: float
    weight: float
    used: frozenset[int]


@final
@dataclass(frozen=True)
class _Shape:
    """Code for batches of one shape and weight: from the batch to the residuals, and from these to a product."""

    primal: Tape
    linear: Tape
    run: Run
    code: dict[str, Run]
    weight: float

    def residuals(self, found: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Return the residuals of a batch, of which those that all batches share are on the tape."""
        places = self.primal.outputs[1:]
        return tuple(
            own if place is None else found[place] for place, own in zip(places, self.linear.residuals, strict=True)
        )


@final
class Stream:
    """Makes products of batches that are not kept.

    Args:
        compiler: What compiles.

    Attributes:
        refusal: Why there is no code, where a batch could not be recorded.
        used: How many batches were made by code so far.
        prepared: How many shapes were recorded so far.
    """

    def __init__(self, compiler: Compiler) -> None:
        self.refusal: str | None = None
        self.used = 0
        self.prepared = 0
        self._compiler = compiler
        self._facts: dict[int, Facts] = {}
        self._counts: Counter[str] = Counter()
        self._shapes: dict[str, _Shape | None] = {}

    def note(self, i: int, batch: Any, linear: Linearised) -> None:
        """Remember what the model itself said of a batch."""
        if i not in self._facts:
            self._facts[i] = Facts(linear.total, linear.weight, linear.used)
            self._counts[_signature(batch)] += 1

    def linear(self, i: int, batch: Any, leaves: Sequence[Tensor]) -> Replay | None:
        """Return what replays products of a batch, made by code; ``None`` if that is for the model to do."""
        shape, facts = self._shapes.get(_signature(batch)), self._facts.get(i)
        if shape is None or facts is None or facts.weight != shape.weight:
            return None
        with torch.no_grad():
            found = shape.run(*shape.primal.residuals, *leaves, *tensors_in(batch))
        total = found[0].item()
        if not abs(total - facts.total) <= _CLOSE[leaves[0].dtype] * max(abs(total), 1e-3 * facts.weight):
            return None
        self.used += 1
        tape = Tape(shape.linear.program, shape.residuals(found), shape.linear.outputs)
        return Replay(tape, shape.code, facts.used, total, facts.weight)

    def prepare(
        self,
        i: int,
        batch: Any,
        leaves: Sequence[Tensor],
        directions: Sequence[Tensor],
        evaluate: Callable[[], Terms],
        linearise: Callable[[Terms], Linearised],
        seconds: float,
    ) -> None:
        """Record and compile what batches like this one need, if that pays and was not tried before.

        Args:
            i: Position of the batch.
            batch: The batch.
            leaves: The parameters.
            directions: A vector.
            evaluate: Returns the loss terms of the batch.
            linearise: Returns what the batch needs for products.
            seconds: Time that products with all batches take from now on.
        """
        signature = _signature(batch)
        seconds *= self._counts[signature] / max(self._counts.total(), 1)
        if (
            i not in self._facts
            or signature in self._shapes
            or self.refusal is not None
            or not self._compiler.may_pay(seconds)
        ):
            return
        self._shapes[signature] = None
        self.prepared += 1
        inputs = [*leaves, *tensors_in(batch)]
        try:
            with Recorder(inputs) as primal:
                terms = evaluate()
                graph = linearise(terms)
                if any(map(is_custom, graph.nodes())):
                    raise NotRecordableError(HIDDEN)
                with Recorder(directions) as linear:
                    product = graph.product(leaves, range(len(leaves)), directions, keep=False)
            after = linear.tape(product, {})
            before = primal.tape([terms.total, *after.residuals], {})
        except NotRecordableError as error:
            self.refusal = str(error)
            return
        if not self._compiler.pays([before.program, after.program], seconds, untried=False):
            return
        run = self._compiler.run(before.program, [*before.residuals, *inputs])
        code = None if run is None else self._compiler.run(after.program, [*after.residuals, *directions])
        if run is not None and code is not None:
            shared = tuple(
                t if place is None else t.new_empty(0)
                for place, t in zip(before.outputs[1:], after.residuals, strict=True)
            )  # those of this batch are not held
            linear_tape = Tape(after.program, shared, after.outputs)
            self._shapes[signature] = _Shape(before, linear_tape, run, {after.program.key: code}, terms.weight)

    def compare(self, by_code: float, without: float) -> None:
        """Remember for later runs how long products take with the code; give it up where that is longer."""
        shapes = [shape for shape in self._shapes.values() if shape is not None]
        self._compiler.learn([tape.program for s in shapes for tape in (s.primal, s.linear)], by_code / without)
        if self._compiler.wanted is True or by_code < without:
            return
        self.refusal = "compiled code for batches that are not kept was slower than autograd"
        self._shapes = dict.fromkeys(self._shapes)


def _signature(batch: Any) -> str:
    """Return what two batches have in common that the same operations are meant for."""
    return repr(map_tensors(lambda t: (t.dtype, tuple(t.shape)), batch))  # type: ignore[arg-type, return-value]
