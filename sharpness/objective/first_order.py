"""The gradient of one batch as a graph that can be differentiated again."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from sharpness.errors import ModelError
from sharpness.objective.losses import Terms
from sharpness.objective.memory import graph_nodes, graph_tensors


@final
@dataclass(frozen=True)
class FirstOrder:
    """A batch's gradient with its graph.

    A parameter that the loss does not use, or that enters it linearly, has no second derivative: its gradient is left
    out, and its rows of the Hessian are zero unless another gradient depends on it.
    """

    gradients: tuple[Tensor, ...]  # those that depend on the parameters
    positions: tuple[int, ...]  # which parameters they belong to
    used: frozenset[int]  # positions of the parameters that the loss depends on
    total: float
    weight: float

    @classmethod
    def of(cls, terms: Terms, leaves: Sequence[Tensor]) -> FirstOrder:
        """Differentiate once, ready for more."""
        with explained():
            gradients = torch.autograd.grad(terms.total, leaves, create_graph=True, allow_unused=True)
        moving = [i for i, g in enumerate(gradients) if g is not None and g.requires_grad]
        return cls(
            gradients=tuple(gradients[i] for i in moving),
            positions=tuple(moving),
            used=frozenset(i for i, g in enumerate(gradients) if g is not None),
            total=terms.total.item(),
            weight=terms.weight,
        )

    def product(self, leaves: Sequence[Tensor], directions: Sequence[Tensor], *, keep: bool) -> Sequence[Tensor | None]:
        """Return the batch's Hessian times the directions, one tensor per leaf; ``keep`` lets the graph live on."""
        if not self.gradients:
            return [None] * len(leaves)
        along = [directions[i].to(g.dtype) for i, g in zip(self.positions, self.gradients, strict=True)]
        with explained():
            return torch.autograd.grad(self.gradients, leaves, along, retain_graph=keep, allow_unused=True)

    def require_differentiable(self) -> None:
        """Refuse a graph with an operation that PyTorch would silently take for a constant in a second derivative.

        Raises:
            ModelError: If there is a custom function marked ``once_differentiable``.
        """
        if any(type(node).__name__ in ("Error", "DelayedError") for node in graph_nodes(self.gradients)):
            raise ModelError(
                "the model uses a custom autograd function that is marked once_differentiable, so it has no second "
                "derivative. Write its backward with differentiable operations and remove the mark."
            )

    def tensors(self) -> Iterator[Tensor]:
        """Yield every tensor that the graph keeps alive."""
        yield from self.gradients
        yield from graph_tensors(self.gradients)


@contextmanager
def explained() -> Iterator[None]:
    """Turn PyTorch's words for a missing derivative into ours."""
    try:
        yield
    except RuntimeError as error:
        text = str(error)
        missing = "is not implemented" in text and "derivative" in text
        if "use_reentrant=True" in text or "not have been used in the graph" in text:
            raise ModelError(
                "the model uses torch.utils.checkpoint with use_reentrant=True, which cannot be differentiated twice. "
                "Pass use_reentrant=False."
            ) from error
        if not (missing or "double backward" in text or "differentiate twice" in text):
            raise
        raise ModelError(
            f"an operation of the model cannot be differentiated twice: {text.splitlines()[0]}. Replace it by one made "
            "of differentiable PyTorch operations (fused or custom kernels often have a plain counterpart)."
        ) from error
