"""Matrices over the outputs of one batch, the middle factors of curvature matrices, known by their products."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import final

import torch
from torch import Tensor

from sharpness.objective.memory import graph_tensors


class OutputCurvature(ABC):
    """A positive semi-definite matrix over the outputs of one batch, known by its products."""

    def __init__(self, outputs: Sequence[Tensor]) -> None:
        self.outputs = tuple(outputs)

    @abstractmethod
    def times(self, ahead: Sequence[Tensor]) -> list[Tensor]:
        """Return the product with one tensor per output."""

    @abstractmethod
    def tensors(self) -> Iterator[Tensor]:
        """Yield every tensor that is kept alive between products."""


@final
class LossHessian(OutputCurvature):
    """The Hessian of the loss with respect to the outputs."""

    def __init__(self, outputs: Sequence[Tensor], total: Tensor) -> None:
        super().__init__(outputs)
        slopes = torch.autograd.grad(total, self.outputs, create_graph=True, allow_unused=True)
        self._slopes = [(i, slope) for i, slope in enumerate(slopes) if slope is not None and slope.requires_grad]

    def times(self, ahead: Sequence[Tensor]) -> list[Tensor]:
        """Return the product with one tensor per output."""
        if not self._slopes:  # the loss is linear in the outputs, almost everywhere
            return [torch.zeros_like(u) for u in ahead]
        slopes = [slope for _, slope in self._slopes]
        along = [ahead[i] for i, _ in self._slopes]
        found = torch.autograd.grad(slopes, self.outputs, along, retain_graph=True, allow_unused=True)
        return [torch.zeros_like(u) if w is None else w.detach() for w, u in zip(found, ahead, strict=True)]

    def tensors(self) -> Iterator[Tensor]:
        """Yield every tensor that is kept alive between products."""
        slopes = [slope for _, slope in self._slopes]
        yield from slopes
        yield from graph_tensors(slopes)


@final
class Diagonal(OutputCurvature):
    """A diagonal matrix, for outputs whose Fisher matrix is one."""

    def __init__(self, output: Tensor, diagonal: Tensor) -> None:
        super().__init__([output])
        self._diagonal = diagonal.detach()

    def times(self, ahead: Sequence[Tensor]) -> list[Tensor]:
        """Return the product with one tensor per output."""
        return [self._diagonal * ahead[0]]

    def tensors(self) -> Iterator[Tensor]:
        """Yield every tensor that is kept alive between products."""
        yield self._diagonal


@final
class OuterProducts(OutputCurvature):
    """The mean over draws of ``c_t a_t a_t'`` for each term ``t``."""

    def __init__(
        self, outputs: Sequence[Tensor], draws: Sequence[Sequence[Tensor]], class_dim: int | None, scale: Tensor | float
    ) -> None:
        super().__init__(outputs)
        self._class_dim = class_dim
        self._draws = [[self._by_term(a) for a in slopes] for slopes in draws]
        self._scale = scale

    def times(self, ahead: Sequence[Tensor]) -> list[Tensor]:
        """Return the product with one tensor per output."""
        along = [self._by_term(u) for u in ahead]
        found = [torch.zeros_like(u) for u in along]
        for slopes in self._draws:
            inner = torch.stack([(a * u).sum(dim=1) for a, u in zip(slopes, along, strict=True)]).sum(dim=0)
            share = (inner * self._scale / len(self._draws))[:, None]
            for w, a in zip(found, slopes, strict=True):
                w.addcmul_(a, share)
        return [self._as_output(w, u) for w, u in zip(found, ahead, strict=True)]

    def terms(self) -> Iterator[tuple[list[Tensor], float]]:
        """Yield for each term its derivative by the outputs, zero elsewhere, and the weight of its outer product."""
        for slopes in self._draws:
            for t in range(len(slopes[0])):
                if any(bool(a[t].any()) for a in slopes):
                    alone = [torch.zeros_like(a) for a in slopes]
                    for whole, a in zip(alone, slopes, strict=True):
                        whole[t] = a[t]
                    scale = self._scale[t].item() if isinstance(self._scale, Tensor) else self._scale
                    yield (
                        [self._as_output(a, out) for a, out in zip(alone, self.outputs, strict=True)],
                        scale / len(self._draws),
                    )

    def tensors(self) -> Iterator[Tensor]:
        """Yield every tensor that is kept alive between products."""
        for slopes in self._draws:
            yield from slopes

    def _by_term(self, tensor: Tensor) -> Tensor:  # -> (terms, outputs of one term)
        if self._class_dim is None:
            return tensor.reshape(tensor.shape[0] if tensor.ndim else 1, -1)
        return tensor.movedim(self._class_dim, -1).reshape(-1, tensor.shape[self._class_dim])

    def _as_output(self, by_term: Tensor, like: Tensor) -> Tensor:
        if self._class_dim is None:
            return by_term.view_as(like)
        return by_term.view(like.movedim(self._class_dim, -1).shape).movedim(-1, self._class_dim)
