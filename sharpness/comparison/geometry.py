"""Where models lie: how long their weights are, how far from each other and from where they started."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeAlias, final

import torch
from torch import Tensor, nn

from sharpness._checks import nearest
from sharpness.errors import ArgumentError
from sharpness.objective import Objective
from sharpness.objective.wrappers import STATE_PREFIXES, unwrap

Weights: TypeAlias = "nn.Module | Mapping[str, Tensor]"


@final
class Place:
    """The parameters measured of one model, as they are.

    Args:
        objective: The model's.
    """

    def __init__(self, objective: Objective) -> None:
        self.layout = objective.parameters.layout
        named = dict(objective.model.named_parameters())
        self._tensors = {name: named[name].detach() for name, _ in self.layout}

    @property
    def n(self) -> int:
        """Return the number of parameters measured."""
        return sum(tensor.numel() for tensor in self._tensors.values())

    @property
    def norms(self) -> dict[str, float]:
        """Return the Euclidean length of each tensor."""
        return {name: _length(tensor) for name, tensor in self._tensors.items()}

    def norm(self) -> float:
        """Return the Euclidean length of all."""
        return math.hypot(*self.norms.values())

    def distance(self, other: Place) -> float | None:
        """Return the Euclidean distance; ``None`` where names or shapes differ."""
        return None if self.layout != other.layout else self.distance_from(other._tensors)

    def distance_from(self, weights: Mapping[str, Tensor]) -> float | None:
        """Return the Euclidean distance from tensors by name; ``None`` where one lacks or has another shape."""
        weights = _without_prefixes(weights, self._tensors)
        if any(name not in weights or weights[name].shape != t.shape for name, t in self._tensors.items()):
            return None
        return math.hypot(*(_length(t, weights[name].detach()) for name, t in self._tensors.items()))


def distances(rows: Sequence[Sequence[Place]]) -> tuple[tuple[float | None, ...], ...]:
    """Return the distances between rows: the mean over the seeds, or over all pairs where their numbers differ."""
    return tuple(tuple(0.0 if a is b else _mean_distance(a, b) for b in rows) for a in rows)


def initial_weights(initial: Any, names: Sequence[str], counts: Sequence[int]) -> dict[str, list[Mapping[str, Tensor]]]:
    """Return where the training of each model started, by row, as far as it is known.

    Args:
        initial: A module or state dict that all started from, a list of these with one for each seed, or a mapping from
            names of rows to either.
        names: Names of the rows.
        counts: Number of models of each.

    Raises:
        ArgumentError: If it is something else, or does not fit the models.
    """
    if initial is None:
        return {}
    if isinstance(initial, Mapping) and initial and not _is_weights(initial):
        unknown = [str(name) for name in initial if str(name) not in names]
        if unknown:
            raise ArgumentError(
                f"`initial` names {unknown[0]!r}, which is none of the models: {', '.join(names)}."
                f"{nearest(unknown[0], names)}"
            )
        given = {str(name): value for name, value in initial.items()}
    else:
        given = dict.fromkeys(names, initial)
    return {n: _per_seed(n, given[n], count) for n, count in zip(names, counts, strict=True) if n in given}


def _per_seed(name: str, given: Any, count: int) -> list[Mapping[str, Tensor]]:
    each = list(given) if isinstance(given, (list, tuple)) else [given] * count
    if len(each) != count or not all(_is_weights(weights) for weights in each):
        raise ArgumentError(
            f"`initial` for {name!r} must be a module or a state dict, or a list with one for each of its {count} "
            f"models, got {type(given).__name__}{f' of {len(each)}' if isinstance(given, (list, tuple)) else ''}."
        )
    return [_tensors(weights) for weights in each]


def _is_weights(value: Any) -> bool:
    if isinstance(value, Mapping):
        return bool(value) and all(isinstance(tensor, Tensor) for tensor in value.values())
    return isinstance(value, nn.Module)


def _tensors(weights: Weights) -> Mapping[str, Tensor]:
    return dict(unwrap(weights).named_parameters()) if isinstance(weights, nn.Module) else weights


def _without_prefixes(weights: Mapping[str, Tensor], names: Iterable[str]) -> Mapping[str, Tensor]:
    """Return weights by the names that they have inside of the wrappers that they were saved with."""
    wanted = set(names)
    while not wanted <= set(weights):
        prefix = next((p for p in STATE_PREFIXES if all(name.startswith(p) for name in weights)), None)
        if prefix is None:
            break
        weights = {name.removeprefix(prefix): tensor for name, tensor in weights.items()}
    return weights


def _mean_distance(a: Sequence[Place], b: Sequence[Place]) -> float | None:
    pairs = list(zip(a, b, strict=True)) if len(a) == len(b) else [(p, q) for p in a for q in b]
    found = [p.distance(q) for p, q in pairs]
    known = [d for d in found if d is not None]
    return sum(known) / len(known) if len(known) == len(found) else None


def _length(tensor: Tensor, other: Tensor | None = None) -> float:
    wide = torch.float32 if tensor.device.type == "mps" else torch.float64
    tensor = tensor.to_dense() if tensor.layout != torch.strided else tensor
    apart = tensor.to(wide) if other is None else tensor.to(wide) - other.to(tensor.device, wide)
    return float(torch.linalg.vector_norm(apart))
