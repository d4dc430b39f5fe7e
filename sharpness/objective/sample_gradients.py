"""Gradients of single samples, or of groups of so many, in the order of the data.

The groups are made of slices of the loader's batches, so they are the same however the loader splits the data. One
gradient is alive at a time. A sample is a row of a batch; it has one loss term or several (the tokens of a sentence),
or none (all of its targets ignored), and its gradient is the sum over them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor

from sharpness.errors import ArgumentError, NonFiniteError
from sharpness.objective.data import num_samples, samples
from sharpness.objective.diagnosis import explained
from sharpness.objective.guard import reseed
from sharpness.objective.microbatch import batch_statistics
from sharpness.objective.objective import Objective

_SLACK = 1e-4  # relative change of the loss that rounding may make


@final
@dataclass(frozen=True)
class GroupGradient:
    """The gradient of one group of samples.

    Attributes:
        total: ``(n,)``, summed over the loss terms of the group, in the widest dtype.
        weight: Number of its loss terms.
        count: Number of its samples.
    """

    total: Tensor
    weight: float
    count: int


def interaction(objective: Objective) -> str | None:
    """Return how the samples of a batch see each other; ``None`` if they do not, as far as the first few tell."""
    found = batch_statistics(objective.model, objective.mode)
    if found is not None:
        return f"{found} normalises by the statistics of the batch in this mode"
    objective.batches.settle(objective.passes.room())
    few = objective.batches.sample
    if few is None:
        return "the batches hold no tensor with a dimension"
    count = num_samples(few.batch) or 0
    if count < 2:
        return None
    total, weight = _loss(objective, few.batch)
    try:
        parts = [_loss(objective, samples(few.batch, i, i + 1)) for i in range(count)]
    except Exception as error:  # whatever a model raises that has a batch size written into it
        _loss(objective, few.batch)  # if that fails now, something else is wrong
        return f"the model cannot take a single sample ({error})"
    whole, alone = total / (weight or 1.0), sum(part[0] for part in parts) / (sum(part[1] for part in parts) or 1.0)
    if abs(whole - alone) <= _SLACK * max(abs(whole), 1e-3):
        return None
    return f"the loss of {count} samples is {whole:.6g} together and {alone:.6g} one by one"


def visit_groups(
    objective: Objective, size: int, visit: Callable[[GroupGradient], None], *, within: bool = False
) -> None:
    """Call ``visit`` with the gradient of each group of ``size`` samples; one walk over the data.

    Args:
        objective: What to differentiate.
        size: Samples in a group.
        visit: What to do with a gradient, which is a new tensor.
        within: Cut each group out of a single batch, evaluate it at once, and leave out what is smaller than a group.
            Otherwise groups go on from batch to batch, and only the last one may be smaller.

    Raises:
        ArgumentError: If a batch cannot be cut into samples.
        NonFiniteError: If a loss or gradient is NaN or infinite; names the group.
    """
    objective.batches.settle(objective.passes.room())
    objective.passes.count += 1
    group = _Group(objective)

    def walk() -> None:
        for _, batch in objective.batches.walk(cut=not within):
            total = num_samples(batch)
            if total is None:
                raise ArgumentError(
                    "gradients of single samples need batches that can be cut into samples, and this one holds no "
                    "tensor with a dimension. Yield tensors whose first dimension counts the samples."
                )
            start = 0
            while start < total:
                stop = min(start + size - group.count, total)
                if within and stop - start < size:
                    break
                group.add(samples(batch, start, stop), stop - start)
                start = stop
                if group.count == size:
                    visit(group.closed())
        if group.count:
            visit(group.closed())

    objective.functional.inside(group.places, walk)  # once for all: checkpointed blocks run again with these weights


def widened(vector: Tensor) -> Tensor:
    """Return a copy of a vector in the widest dtype of its device, which sums over samples are made in."""
    return vector.to(torch.float32 if vector.device.type == "mps" else torch.float64, copy=True)


@final
class _Group:
    """The sum of the gradients of the pieces of one group, and then of the next."""

    def __init__(self, objective: Objective) -> None:
        self._objective = objective
        self._leaves = objective.functional.leaves()
        self.places = objective.functional.places(self._leaves)
        self._renewed = any(module.training for module in objective.model.modules())
        self._position = 0
        self._zero = torch.zeros_like(widened(objective.vector()))
        self._start()

    def _start(self) -> None:
        self._total = self._zero.clone()
        self._weight = 0.0
        self.count = 0

    def add(self, piece: Any, count: int) -> None:
        """Add the gradient of a piece of so many samples."""
        functional, parameters = self._objective.functional, self._objective.parameters
        # Batch norm and its like write to their buffers.
        places = functional.places(self._leaves) if self._renewed else self.places
        reseed(self._objective.seed, 0, self._position, self.count)
        terms = functional.terms(piece, places)
        if terms.weight:
            with explained(terms.source):
                found = torch.autograd.grad(terms.total, self._leaves, allow_unused=True)
            for part, tensor in zip(parameters.split(self._total), found, strict=True):
                if tensor is not None:
                    part += (tensor if tensor.layout == torch.strided else tensor.to_dense()).to(part.device)
        self._weight += terms.weight
        self.count += count

    def closed(self) -> GroupGradient:
        """Return the sum, and start with the next group."""
        found = GroupGradient(self._total, self._weight, self.count)
        if not bool(torch.isfinite(found.total.sum())):
            i = self._position
            what = f"sample {i}" if self.count == 1 else f"group {i} of {self.count} samples"
            raise NonFiniteError(
                f"the gradient of {what} (counted from 0) holds NaN or infinity. Look for square roots and logarithms "
                "at zero in the model and the loss, for NaN in this part of the data, and for overflow."
            )
        self._position += 1
        self._start()
        return found


def _loss(objective: Objective, batch: Any) -> tuple[float, float]:
    """Return the sum of the loss terms of a batch, and their number."""
    functional = objective.functional
    reseed(objective.seed, 0, 0)
    leaves = functional.leaves(differentiable=False)
    terms = functional.terms(batch, functional.places(leaves))
    return (terms.total.item(), terms.weight) if terms.weight else (0.0, 0.0)
