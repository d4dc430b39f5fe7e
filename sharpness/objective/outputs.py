"""The size of a classifier's outputs, seen on the way of an evaluation."""

from __future__ import annotations

from typing import final

import torch
from torch import Tensor

from sharpness.objective.evaluation import Evaluation, summed
from sharpness.objective.losses import Terms
from sharpness.objective.objective import Objective


def evaluate_with_logits(objective: Objective) -> tuple[Evaluation, float | None]:
    """Return loss and accuracy at the parameters as they are, and the mean norm of the logits; one forward pass.

    The logits of a sample are centred first, since a number that is added to all of them changes nothing. The norm is
    ``None`` where there are no classes, or a ``batch_loss`` hides the outputs.
    """
    logits = _Logits()
    with objective.session():
        leaves = objective.functional.leaves(differentiable=False)
        found = summed(logits.seen(terms) for _, terms in objective.passes.terms(leaves, weightless=True))
    objective._loss = found.loss
    return found, logits.mean_norm if found.accuracy is not None else None


@final
class _Logits:
    """The sum of the norms that passed by."""

    def __init__(self) -> None:
        self._total, self._count = 0.0, 0

    def seen(self, terms: Terms) -> Terms:
        """Add a batch, and hand it on."""
        if terms.correct is not None and isinstance(terms.outputs, Tensor):
            logits = terms.outputs.detach()
            dim = 1 if logits.ndim > 1 else 0
            norms = torch.linalg.vector_norm((logits - logits.mean(dim, keepdim=True)).float(), dim=dim)
            self._total, self._count = self._total + norms.sum().item(), self._count + norms.numel()
        return terms

    @property
    def mean_norm(self) -> float | None:
        """Return the mean norm, ``None`` where there was none."""
        return self._total / self._count if self._count else None
