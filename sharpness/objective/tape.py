"""The part of a computation that depends on chosen inputs, recorded operation by operation, to be run again.

What the recorded operations take from elsewhere, the *residuals*, are tensors that were computed once and for all. So a
recorded product of a linear map is its linearisation: all that does not depend on the vector has been done.
"""

from __future__ import annotations

import hashlib
import operator
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, final

import torch
from torch import Tensor, fx, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_unflatten
from torch.utils.weak import WeakTensorKeyDictionary

from sharpness.objective.simplify import simplify


class NotRecordableError(Exception):
    """The computation cannot be told from its operations; never leaves this package."""


_pauses = 0  # how many bodies are running that are not to be recorded


@contextmanager
def unrecorded() -> Iterator[None]:
    """Run a body that no recorder sees: numbers are read in it that the results depend on in no other way."""
    global _pauses
    _pauses += 1
    try:
        yield
    finally:
        _pauses -= 1


@final
@dataclass(frozen=True)
class Program:
    """A sequence of operations, apart from the residuals: tapes of the same operations share it.

    Attributes:
        key: Digest of the operations, their options, and the kinds of all tensors.
        graph: The operations; its inputs are the residuals, then the inputs.
    """

    key: str
    graph: fx.GraphModule


@final
@dataclass(frozen=True)
class Tape:
    """A recorded computation.

    Attributes:
        program: Its operations.
        residuals: What they take besides the inputs.
        outputs: For each output the place among the program's results; ``None`` where it does not depend on the inputs.
    """

    program: Program
    residuals: tuple[Tensor, ...]
    outputs: tuple[int | None, ...]


@final
@dataclass
class _Operation:
    """One operation: its function, its arguments as places on the tape, and how many places its results take."""

    function: Callable[..., Any]
    arguments: list[Any]
    spec: Any
    many: bool = False
    results: list[int] = field(default_factory=list)
    kinds: list[Any] = field(default_factory=list)


@final
@dataclass(frozen=True)
class _Place:
    """A tensor on the tape: a residual, an input or a result, by number."""

    kind: str
    index: int


@final
class Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Records the operations that depend on ``inputs`` while it is active.

    Args:
        inputs: ``(p,)`` tensors.
    """

    def __init__(self, inputs: Sequence[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._places: Any = WeakTensorKeyDictionary()
        for i, tensor in enumerate(inputs):
            self._places[tensor] = _Place("input", i)
        self._inputs = list(inputs)
        self._operations: list[_Operation] = []
        self._residuals: list[Tensor] = []
        self._versions: list[int] = []
        self._residual_places: Any = WeakTensorKeyDictionary()
        self._count = 0

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # else PyTorch imports its compiler, which takes seconds, to keep it out of here

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        flat, spec = tree_flatten((args, kwargs or {}))
        if _pauses or not any(isinstance(item, Tensor) and item in self._places for item in flat):
            return func(*args, **(kwargs or {}))
        recorded, changed = self._functional(func, flat)
        arguments = [self._place(item) if isinstance(item, Tensor) else item for item in flat]
        results = func(*args, **(kwargs or {}))
        found = results if isinstance(results, (tuple, list)) else (results,)
        if not all(item is None or isinstance(item, Tensor) for item in found):
            raise NotRecordableError(f"{func} turns a tensor into a number")
        operation = _Operation(recorded, arguments, spec, many=isinstance(results, (tuple, list)))
        self._operations.append(operation)
        for item in found:
            operation.results.append(self._count)
            operation.kinds.append(None if item is None else (item.dtype, item.shape, item.stride(), item.device))
            if item is not None:
                if item.layout != torch.strided:
                    raise NotRecordableError(f"{func} returns a {item.layout} tensor")
                self._places[item] = _Place("result", self._count)
            self._count += 1
        if changed is not None:
            self._places[changed] = _Place("result", operation.results[0])
        return results

    def tape(self, outputs: Sequence[Tensor | None], known: dict[str, Program]) -> Tape:
        """Return what was recorded; a program of the same operations is taken from ``known``, or put there."""
        if any(t._version != version for t, version in zip(self._residuals, self._versions, strict=True)):
            raise NotRecordableError("a tensor that was used is changed later")
        places = [self._places.get(tensor) if tensor is not None else None for tensor in outputs]
        wanted = [place for place in places if place is not None]
        needed, operations = self._needed(wanted)
        order = {old: new for new, old in enumerate(sorted(needed))}
        key = self._key(operations, order, wanted)
        if key not in known:
            known[key] = Program(key, self._graph(operations, order, wanted))
        count = iter(range(len(wanted)))
        return Tape(
            known[key],
            tuple(self._residuals[old] for old in order),
            tuple(None if place is None else next(count) for place in places),
        )

    def _functional(self, func: Any, flat: list[Any]) -> tuple[Any, Tensor | None]:
        """Return the operation to record in the place of one that writes to its first argument, and that argument."""
        for tag in (torch.Tag.nondeterministic_seeded, torch.Tag.dynamic_output_shape):
            if tag in func.tags:
                raise NotRecordableError(f"{func} is random, or its result has a shape of its own")
        if not func._schema.is_mutable:
            return func, None
        name = func._schema.name.split("::")[1]
        target = flat[0]
        plain = getattr(torch.ops.aten, name[:-1], None) if name.endswith("_") and not name.endswith("__") else None
        if plain is None or not hasattr(plain, func._overloadname):
            raise NotRecordableError(f"{func} writes to its arguments")
        pointer = target.untyped_storage().data_ptr()
        if any(t is not target and t.untyped_storage().data_ptr() == pointer for t in self._places):
            raise NotRecordableError(f"{func} writes to a tensor that others see")
        if target not in self._places:  # what it was before is needed again in each run
            flat[0] = target.clone()
        return getattr(plain, func._overloadname), target

    def _place(self, tensor: Tensor) -> _Place:
        if type(tensor) not in (Tensor, nn.Parameter) or tensor.layout != torch.strided:
            raise NotRecordableError(f"a tensor of the kind {type(tensor).__name__} takes part")
        known = self._places.get(tensor) or self._residual_places.get(tensor)
        if known is None:
            known = self._residual_places[tensor] = _Place("residual", len(self._residuals))
            self._residuals.append(tensor)
            self._versions.append(tensor._version)
        return known  # type: ignore[no-any-return]

    def _needed(self, wanted: Sequence[_Place]) -> tuple[set[int], list[_Operation]]:
        """Return the residuals and the operations that the outputs need."""
        results = {place.index for place in wanted if place.kind == "result"}
        residuals: set[int] = set()
        operations = []
        for operation in reversed(self._operations):
            if not results.isdisjoint(operation.results):
                operations.append(operation)
                for item in operation.arguments:
                    if isinstance(item, _Place):
                        (results if item.kind == "result" else residuals if item.kind == "residual" else set()).add(
                            item.index
                        )
        return residuals, operations[::-1]

    def _key(self, operations: Sequence[_Operation], order: dict[int, int], wanted: Sequence[_Place]) -> str:
        numbers: dict[int, int] = {}
        lines = [f"{_kind(tensor)}" for tensor in self._inputs]
        lines += [_kind(self._residuals[old]) for old in order]

        def told(item: Any) -> str:
            if not isinstance(item, _Place):
                return repr(item)
            number = {"input": {}, "residual": order, "result": numbers}[item.kind].get(item.index, item.index)
            return f"{item.kind}{number}"

        for operation in operations:
            lines.append(f"{operation.function} {operation.spec} {' '.join(map(told, operation.arguments))}")
            numbers.update((old, len(numbers)) for old in operation.results)
        lines.append(" ".join(map(told, wanted)))
        return hashlib.sha256("\n".join(lines).encode()).hexdigest()

    def _graph(
        self, operations: Sequence[_Operation], order: dict[int, int], wanted: Sequence[_Place]
    ) -> fx.GraphModule:
        graph = fx.Graph()
        nodes: dict[_Place, fx.Node] = {}
        for old, new in order.items():
            nodes[_Place("residual", old)] = graph.placeholder(f"residual_{new}")
        for i in range(len(self._inputs)):
            nodes[_Place("input", i)] = graph.placeholder(f"input_{i}")
        for place, node in nodes.items():
            tensor = self._residuals[place.index] if place.kind == "residual" else self._inputs[place.index]
            node.meta["kind"] = (tensor.dtype, tensor.shape, tensor.stride(), tensor.device)
        for operation in operations:
            flat = [nodes[item] if isinstance(item, _Place) else item for item in operation.arguments]
            args, kwargs = tree_unflatten(flat, operation.spec)
            node = graph.call_function(operation.function, tuple(args), kwargs)
            for i, (result, kind) in enumerate(zip(operation.results, operation.kinds, strict=True)):
                own = graph.call_function(operator.getitem, (node, i)) if operation.many else node
                own.meta["kind"] = kind
                nodes[_Place("result", result)] = own
        graph.output(tuple(nodes[place] for place in wanted))
        simplify(graph)
        return fx.GraphModule(nn.Module(), graph)


def _kind(tensor: Tensor) -> str:
    return f"{tensor.dtype} {tuple(tensor.shape)} {tensor.stride()} {tensor.device}"
