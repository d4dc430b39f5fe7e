"""Which parameters of a model are measured, and how they line up in one flat vector."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, TypeAlias, final

import torch
from torch import Tensor, nn

from sharpness._checks import nearest
from sharpness.errors import ArgumentError, ModelError
from sharpness.objective.wrappers import check_evaluable, is_quantised

ParameterChoice: TypeAlias = "str | re.Pattern[str] | Callable[[str, Tensor], bool] | Iterable[str | re.Pattern[str]]"


@final
@dataclass(frozen=True)
class Parameters:
    """The chosen parameters of a model, in the order of ``named_parameters``; a tied one counts once."""

    names: tuple[str, ...]
    shapes: tuple[torch.Size, ...]
    dtype: torch.dtype
    device: torch.device  # of the vector; each parameter has its own
    entrance: torch.device  # where the model takes its inputs

    @property
    def n(self) -> int:
        """Return the number of entries."""
        return sum(self.sizes)

    @property
    def sizes(self) -> list[int]:
        """Return the number of entries of each parameter."""
        return [shape.numel() for shape in self.shapes]

    @property
    def layout(self) -> tuple[tuple[str, tuple[int, ...]], ...]:
        """Return name and shape of each parameter."""
        return tuple((name, tuple(shape)) for name, shape in zip(self.names, self.shapes, strict=True))

    def subset(self, positions: Iterable[int]) -> Parameters:
        """Return some of them, by position."""
        names, shapes = zip(*((self.names[i], self.shapes[i]) for i in positions), strict=True)
        return dataclasses.replace(self, names=names, shapes=shapes)

    def check(self, vector: Any) -> None:
        """Refuse what is no ``(n,)`` vector."""
        if not isinstance(vector, Tensor) or vector.shape != (self.n,):
            got = tuple(vector.shape) if isinstance(vector, Tensor) else type(vector).__name__
            raise ArgumentError(f"a vector of {self.n} entries is needed, one per parameter measured, got {got}.")

    def split(self, flat: Tensor) -> list[Tensor]:  # (n,)
        """Return views of ``flat`` in the parameters' shapes."""
        return [piece.view(shape) for piece, shape in zip(torch.split(flat, self.sizes), self.shapes, strict=True)]

    def flatten(self, tensors: Iterable[Tensor], dtype: torch.dtype | None = None) -> Tensor:  # (n,)
        """Return the tensors, in the parameters' order, as one new vector."""
        return torch.cat([t.detach().reshape(-1).to(self.device, dtype or self.dtype) for t in tensors])


def choose(model: nn.Module, params: ParameterChoice | None) -> Parameters:
    """Return the parameters that ``params`` chooses among those that require grad.

    Raises:
        ArgumentError: If a name, glob or regular expression matches nothing.
        ModelError: If nothing is left to measure, or a parameter cannot be measured.
    """
    check_evaluable(model)
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if not trainable and is_quantised(model):
        raise ModelError(
            f"{type(model).__name__} has only quantised weights, which are integers and have no derivatives. "
            "Measure the model as it was before it was quantised."
        )
    if not trainable:
        raise ModelError(
            f"{type(model).__name__} has no trainable parameters; sharpness is measured with respect to those that "
            "require grad. Call model.requires_grad_(True), or on the layers you want to measure."
        )
    chosen = trainable if params is None else {name: trainable[name] for name in _matches(model, trainable, params)}
    for name, p in chosen.items():
        if p.dtype not in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
            raise ModelError(
                f"parameter {name!r} is {p.dtype}; only real floating point parameters of 16, 32 or 64 bits can be "
                "measured. Leave it out with params=..., or convert the model."
            )
        if isinstance(p, nn.UninitializedParameter):
            raise ModelError(f"parameter {name!r} has no shape yet. Run one forward pass to initialise lazy layers.")
    dtype = torch.float32
    for p in chosen.values():
        dtype = torch.promote_types(dtype, p.dtype)
    return Parameters(
        names=tuple(chosen),
        shapes=tuple(p.shape for p in chosen.values()),
        dtype=dtype,
        device=next(iter(chosen.values())).device,
        entrance=next(model.parameters()).device,
    )


def _matches(model: nn.Module, trainable: dict[str, nn.Parameter], params: Any) -> list[str]:
    """Return the names that are chosen, in the order of the model."""
    if callable(params) and not isinstance(params, (str, re.Pattern)):
        kept = {name for name, p in trainable.items() if params(name, p)}
        if not kept:
            raise ArgumentError("`params` chose no parameter: the predicate was false for every trainable one.")
        return [name for name in trainable if name in kept]
    patterns: Sequence[Any] = [params] if isinstance(params, (str, re.Pattern)) else _as_list(params)
    canonical = {id(p): name for name, p in trainable.items()}
    everything = dict(model.named_parameters(remove_duplicate=False))  # the second name of a tied parameter is a name
    wanted: set[str] = set()
    for pattern in patterns:
        if isinstance(pattern, re.Pattern):
            found = {name for name in everything if pattern.search(name)}
        elif isinstance(pattern, str):
            found = {name for name in everything if name == pattern or fnmatchcase(name, pattern)}
        else:
            raise ArgumentError(
                f"`params` must hold names, globs or compiled regular expressions, got {pattern!r} "
                f"({type(pattern).__name__}). Pass names as model.named_parameters() gives them."
            )
        text = pattern.pattern if isinstance(pattern, re.Pattern) else pattern
        if not found:
            raise ArgumentError(f"`params`: {text!r} matches no parameter of the model.{nearest(text, everything)}")
        kept = {canonical[id(everything[name])] for name in found if id(everything[name]) in canonical}
        if not kept:
            raise ArgumentError(
                f"`params`: {text!r} matches only parameters that do not require grad. Call requires_grad_(True) on "
                "them first, if they are floating point."
            )
        wanted |= kept
    return [name for name in trainable if name in wanted]


def _as_list(params: Any) -> list[Any]:
    try:
        patterns = list(params)
    except TypeError:
        patterns = []
    if not patterns:
        raise ArgumentError(
            f"`params` must be a name, a glob, a compiled regular expression, a list of these or a predicate "
            f"(name, tensor) -> bool, got {params!r}. Leave it out to measure all trainable parameters."
        )
    return patterns
