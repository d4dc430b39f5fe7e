"""The box of epsilon-sharpness, seen as the unit box, and the loss in it."""

from __future__ import annotations

from typing import final

import torch
from torch import Tensor

from sharpness.metrics.subspace import Subspace
from sharpness.objective import Objective


@final
class Box:
    """``x + A (b z)`` for ``z`` in ``[-1, 1]^p``, with ``b = epsilon (|A^+ x| + 1)``; without ``A``, the full space.

    Args:
        objective: The loss.
        epsilon: Size of the box.
        subspace: The range of ``A``.
        dtype: Dtype of ``z`` and of what is returned.
        device: Where these are.

    Attributes:
        p: Dimension of the box.
        num_evaluations: Evaluations of loss and gradient so far.
    """

    def __init__(
        self, objective: Objective, epsilon: float, subspace: Subspace | None, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.dtype, self.device = dtype, device
        self.num_evaluations = 0
        self._objective, self._subspace = objective, subspace
        center = objective.vector()
        if subspace is None:
            self._center = center.to(device, dtype)
            self._half_width = epsilon * (self._center.abs() + 1)
        else:
            self._center = center
            self._half_width = (epsilon * (subspace.coordinates(center).abs() + 1)).to(device, dtype)
        self.p = len(self._half_width)

    def evaluate(self, z: Tensor) -> tuple[float, Tensor]:  # (p,) -> (p,)
        """Return the loss at the point ``z`` of the unit box and its slope there, a new tensor."""
        self.num_evaluations += 1
        if self._subspace is None:
            loss, gradient = self._objective.value_and_gradient(torch.addcmul(self._center, self._half_width, z))
            return loss, gradient.to(self.device, self.dtype).mul_(self._half_width)
        step = self._subspace.multiply((self._half_width * z).to(self._center.device))
        loss, gradient = self._objective.value_and_gradient(step.add_(self._center))
        slope = self._subspace.multiply_transposed(gradient)
        return loss, slope.to(self.device, self.dtype).mul_(self._half_width)

    def random_point(self, generator: torch.Generator) -> Tensor:  # -> (p,)
        """Return a point drawn uniformly in the unit box, on the CPU, the same for every dtype but for rounding."""
        drawn = torch.rand(self.p, generator=generator, dtype=torch.float64, device="cpu")
        return drawn.mul_(2).sub_(1).to(self.device, self.dtype)
