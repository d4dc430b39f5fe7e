"""The loss as a surface: evaluated wherever one goes, also where it is not finite, and along straight lines."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any, final

import torch
from torch import Tensor

from sharpness.errors import ArgumentError
from sharpness.objective.evaluation import Evaluation, evaluate, summed
from sharpness.objective.guard import reseed
from sharpness.objective.losses import Terms
from sharpness.objective.objective import Objective
from sharpness.objective.passes import require_terms


def evaluate_anywhere(
    objective: Objective, at: Tensor | None = None, *, tensors: Mapping[str, Tensor] | None = None
) -> Evaluation:
    """Return loss and accuracy as `Objective.evaluate` does, but a loss that is NaN or infinite as what it is.

    Tensors are exchanged once for all batches, not for each, and ``tensors`` are not copied: they must not be the
    user's own.
    """
    with objective.session():
        functional, names = objective.functional, objective.parameters.names
        given = {name: single(tensor) for name, tensor in (tensors or {}).items()}
        if at is None and given.keys() >= set(names):
            leaves = [given[name] for name in names]
        else:
            leaves = functional.leaves(at, differentiable=False)
        if any(module.training for module in objective.model.modules()):  # batch norm and its like write to buffers
            return evaluate(objective.passes, leaves, tensors=given, finite=False)
        places = functional.places(leaves, {name: t for name, t in given.items() if name not in names})
        places |= {f"model.{name}": given[name] for name in names if name in given}

        def walk() -> Iterator[Terms]:
            found = 0.0
            for i, batch in objective.batches.walk():
                reseed(objective.seed, 0, i)
                terms = functional.terms_here(batch)
                found += terms.weight
                yield terms  # also without weight: its rows count for the accuracy
            require_terms(found)

        objective.batches.settle(objective.passes.room())
        objective.passes.count += 1
        return functional.inside(places, lambda: summed(walk()))


def single(tensor: Tensor) -> Tensor:
    """Return a tensor in the precision that it is evaluated in: single for half."""
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor


def as_direction(objective: Objective, value: Any, name: str) -> Tensor:  # -> (n,)
    """Return a direction that a user gave as tensors of the parameters, by position or name, or as one vector.

    Raises:
        ArgumentError: If it does not fit the parameters that are measured, or is not finite.
    """
    parameters = objective.parameters
    needed = (
        f"`{name}` must hold one tensor per parameter that is measured ({len(parameters.names)}, in the order of "
        f"named_parameters, or a mapping from their names), or be one vector of {parameters.n} entries"
    )
    if isinstance(value, Tensor):
        if value.shape != (parameters.n,):
            raise ArgumentError(f"{needed}; got a tensor of shape {tuple(value.shape)}.")
        tensors = parameters.split(value)
    elif isinstance(value, Mapping):
        if set(value) != set(parameters.names):
            different = sorted(set(map(str, value)) ^ set(parameters.names))
            raise ArgumentError(f"{needed}; got a mapping that differs in {different[0]!r} first.")
        tensors = [value[key] for key in parameters.names]
    else:
        tensors = list(value) if isinstance(value, (list, tuple)) else []
    shapes = [tensor.shape if isinstance(tensor, Tensor) else None for tensor in tensors]
    if shapes != list(parameters.shapes):
        got = f"{len(tensors)} of other shapes" if tensors else repr(value)
        raise ArgumentError(f"{needed}; got {got}. Leave the tensors of frozen parameters out.")
    flat = parameters.flatten(tensors)
    if not bool(torch.isfinite(flat).all()) or not bool(flat.any()):
        raise ArgumentError(f"`{name}` must be finite and not zero everywhere. Look for NaN in what it was made from.")
    return flat


@final
class Line:
    """The loss along ``theta - step * direction``; every step is tried once.

    Args:
        objective: What to evaluate, from its parameters as they are.
        direction: ``(n,)``.
        loss: The loss at step zero.
        bar: A progress bar.

    Attributes:
        losses: The loss at each step tried, zero included.
    """

    def __init__(self, objective: Objective, direction: Tensor, loss: float, bar: Any) -> None:
        self._objective = objective
        self._center = objective.vector()
        self._direction = direction
        self._bar = bar
        self.losses = {0.0: loss}

    @property
    def start(self) -> float:
        """Return the loss at step zero."""
        return self.losses[0.0]

    @property
    def rounding(self) -> float:
        """Return by how much rounding may move a loss."""
        return 4 * torch.finfo(self._objective.dtype).eps * abs(self.start)

    @property
    def scale(self) -> float:
        """Return the step that is as long as the vector of the parameters."""
        length = torch.linalg.vector_norm(self._center).item() or 1.0
        return float(length / torch.linalg.vector_norm(self._direction).item())

    @property
    def shortest(self) -> float:
        """Return the step that hardly moves the parameters any more."""
        return torch.finfo(self._objective.dtype).eps * self.scale

    def loss(self, step: float) -> float:
        """Return the loss at a step, infinite where it is NaN."""
        if step not in self.losses:
            found = evaluate_anywhere(self._objective, self._center - step * self._direction).loss
            self.losses[step] = math.inf if math.isnan(found) else found
            self._bar.update()
        return self.losses[step]

    def slope(self, step: float) -> float:
        """Return the mean slope of the loss up to a step above zero: negative while the loss is below its start."""
        return (self.loss(step) - self.start) / step

    def points(self) -> tuple[Tensor, Tensor]:
        """Return the steps tried, ascending, and their losses."""
        steps = sorted(self.losses)
        return torch.tensor(steps, dtype=torch.float64), torch.tensor(
            [self.losses[step] for step in steps], dtype=torch.float64
        )
