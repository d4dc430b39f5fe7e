"""What a pass over the whole data tells: loss and accuracy, or loss and gradient."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from sharpness.objective.batch_sum import BatchSum
from sharpness.objective.diagnosis import explained
from sharpness.objective.losses import Terms
from sharpness.objective.parameters import Parameters
from sharpness.objective.passes import Passes, require_dependence


@final
@dataclass(frozen=True)
class Evaluation:
    """Loss and accuracy over the whole data.

    Attributes:
        loss: Mean over all loss terms.
        accuracy: Fraction classified correctly; ``None`` where there are no classes.
    """

    loss: float
    accuracy: float | None


def evaluate(
    passes: Passes,
    leaves: Sequence[Tensor],
    *,
    draw: int = 0,
    tensors: Mapping[str, Tensor] | None = None,
    finite: bool = True,
) -> Evaluation:
    """Return loss and accuracy at the leaves. Not under ``no_grad``: a forward pass may take derivatives of its own."""
    return summed(
        terms for _, terms in passes.terms(leaves, draw=draw, tensors=tensors, weightless=True, finite=finite)
    )


def summed(batches: Iterable[Terms]) -> Evaluation:
    """Return loss and accuracy over the terms of all batches, which are dropped one by one."""
    total = weight = correct = counted = 0.0
    classes = True
    for terms in batches:
        if terms.weight:
            total, weight = total + terms.total.item(), weight + terms.weight
        if terms.correct is None or terms.counted is None:
            classes = False
        else:
            correct, counted = correct + terms.correct, counted + terms.counted
        del terms  # before the next batch is evaluated
    return Evaluation(loss=total / weight, accuracy=correct / counted if classes and counted else None)


def value_and_gradient(passes: Passes, leaves: Sequence[Tensor], parameters: Parameters) -> tuple[float, Tensor]:
    """Return the loss at the leaves, and its gradient by them as one vector, ``(n,)``."""
    total, weight, gradient = 0.0, 0.0, BatchSum(parameters, "gradient")
    used: set[int] = set()
    for i, terms in passes.terms(leaves):
        total, weight = total + terms.total.item(), weight + terms.weight
        with explained(terms.source):
            gradients = torch.autograd.grad(terms.total, leaves, allow_unused=True)
        used |= {j for j, g in enumerate(gradients) if g is not None}
        gradient.add(i, gradients)
        del terms, gradients  # before the next batch is evaluated
    require_dependence(used)
    return total / weight, gradient.divided_by(weight)
