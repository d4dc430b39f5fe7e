"""Batches whose products are replayed from tapes, compiled where that pays."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor

from sharpness.objective.compiler import Compiler, Run
from sharpness.objective.diagnosis import is_custom
from sharpness.objective.linearised import Linearised
from sharpness.objective.tape import NotRecordableError, Program, Recorder, Tape

HIDDEN = "the model has an autograd function of its own, which may hide operations"
_SAVED = 0.05  # of the time of a product that a tape saves, on the low side
_PER_NODE = 150e-6  # seconds that recording takes for each node of a graph, on the high side


@final
@dataclass(frozen=True)
class Replay:
    """What one batch needs for products with the whole matrix: a tape in the place of its graph.

    Attributes:
        tape: A product, recorded.
        code: Compiled code, by program; shared by all batches.
        used: Positions of the parameters that the loss depends on.
        total: Sum of the batch's loss terms.
        weight: Their number.
    """

    tape: Tape
    code: dict[str, Run]
    used: frozenset[int]
    total: float
    weight: float

    def product(
        self, leaves: Sequence[Tensor], block: Sequence[int], directions: Sequence[Tensor], *, keep: bool
    ) -> Sequence[Tensor | None]:
        """Return the matrix times ``directions``, which are for all parameters; the tape is kept either way."""
        program = self.tape.program
        with torch.no_grad():
            found = self.code.get(program.key, program.graph)(*self.tape.residuals, *directions)
        return [None if place is None else found[place] for place in self.tape.outputs]

    def tensors(self) -> Iterator[Tensor]:
        """Yield every tensor that is kept alive."""
        yield from self.tape.residuals

    def nodes(self) -> Iterator[Any]:
        """Yield nothing: there is no graph."""
        yield from ()


@final
class Replays:
    """Makes tapes of graphs, and compiled code of tapes, where that pays.

    Args:
        compiler: What compiles.

    Attributes:
        refusal: Why there are no tapes, where a product could not be recorded.
        code: Compiled code, by program.
    """

    def __init__(self, compiler: Compiler) -> None:
        self.compiler = compiler
        self.refusal: str | None = None
        self.code: dict[str, Run] = {}
        self._programs: dict[str, Program] = {}
        self._tried: set[str] = set()

    def pay(self, graphs: Collection[Linearised], seconds: float) -> bool:
        """Return whether tapes of the graphs pay, if products with all of them take ``seconds`` from now on."""
        if not graphs or not seconds or self.refusal is not None:
            return False
        nodes = list(next(iter(graphs)).nodes())
        if any(map(is_custom, nodes)):
            self.refusal = HIDDEN
            return False
        return self.compiler.wanted is True or seconds * _SAVED > len(graphs) * len(nodes) * _PER_NODE

    def record(
        self, graph: Linearised, leaves: Sequence[Tensor], block: Sequence[int], directions: Sequence[Tensor]
    ) -> tuple[Replay | None, Sequence[Tensor | None]]:
        """Return a product of a graph and, unless that cannot be recorded, what replays it."""
        try:
            with Recorder(directions) as recorder:
                found = graph.product(leaves, block, directions, keep=True)
            tape = recorder.tape(found, self._programs)
        except NotRecordableError as error:
            self.refusal = str(error)
            return None, graph.product(leaves, block, directions, keep=True)
        return Replay(tape, self.code, graph.used, graph.total, graph.weight), found

    def compile(self, replays: Sequence[Replay], directions: Sequence[Tensor], seconds: float) -> None:
        """Compile the programs of all replays, of which a product takes ``seconds`` from now on, where that pays."""
        by_program: dict[str, list[Replay]] = {}
        for replay in replays:
            by_program.setdefault(replay.tape.program.key, []).append(replay)
        for key, same in by_program.items():
            program = same[0].tape.program
            if key in self._tried or not self.compiler.pays([program], seconds * len(same) / len(replays)):
                continue
            self._tried.add(key)
            code = self.compiler.run(program, [*same[0].tape.residuals, *directions])
            if code is not None:
                self.code[key] = code
