"""A model and its loss as a function of tensors that are put in the places of its own.

The user's tensors are never written to: the forward pass sees copies, also where a module writes to its weights or
buffers. Derivatives are taken with the same copies in place, since checkpointed blocks run again then.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar, final

import torch
from torch import Tensor, nn
from torch.func import functional_call

from sharpness.errors import ArgumentError, ModelError
from sharpness.objective.data import map_tensors
from sharpness.objective.diagnosis import Source, explained
from sharpness.objective.kernels import autocast, twice_differentiable
from sharpness.objective.losses import Criterion, Terms
from sharpness.objective.parameters import Parameters

T = TypeVar("T")


@final
class Functional:
    """The loss of one batch, with other tensors in the places of the model's parameters and buffers.

    Args:
        model: The module, without wrappers.
        criterion: The loss.
        parameters: Which parameters are measured.
        precision: One of ``PRECISIONS``: what forward passes are computed in.
    """

    def __init__(
        self, model: nn.Module, criterion: Criterion, parameters: Parameters, precision: str = "exact"
    ) -> None:
        self._model = model
        self._criterion = criterion
        self.parameters = parameters
        self._precision = precision
        self._frame = _Frame(model)
        self._kinds = self._kinds_now()

    def leaves(self, at: Tensor | None = None, *, differentiable: bool = True) -> list[Tensor]:
        """Return new tensors for the chosen parameters, at ``at``, ``(n,)``, or at the parameters as they are."""
        named = dict(self._model.named_parameters())
        own = [_copy(named[name]) for name in self.parameters.names]
        if at is not None:
            self.parameters.check(at)
            pieces = self.parameters.split(at.detach())
            own = [piece.to(p, copy=True) for piece, p in zip(pieces, own, strict=True)]
        return [tensor.requires_grad_(differentiable) for tensor in own]

    def places(self, leaves: Sequence[Tensor], others: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
        """Return what goes in which place: ``leaves``, ``others`` by name, and copies of all the rest."""
        given = {name: _copy(tensor) for name, tensor in (others or {}).items()}
        chosen = dict(zip(self.parameters.names, leaves, strict=True)) | given
        own = [*self._model.named_parameters(), *self._model.named_buffers()]
        return {f"model.{name}": chosen[name] if name in chosen else _copy(tensor) for name, tensor in own}

    def terms(self, batch: Any, places: dict[str, Tensor]) -> Terms:
        """Return the loss terms of a batch."""

        def forward(tensors: dict[str, Tensor]) -> Terms:
            own = map_tensors(lambda tensor: tensor, batch)  # a new container: the user's loss may pop from it
            with autocast(self.parameters.device, self._precision):
                return self.inside(tensors, lambda: self._criterion(self._model, own))

        leaves = [places[f"model.{name}"] for name in self.parameters.names]
        source = Source(self._model, leaves, lambda: forward(self.places(leaves)).total)
        with explained(source), warnings.catch_warnings():
            if any(leaf.requires_grad for leaf in leaves):  # else nothing is differentiated, and nothing can be lost
                warnings.filterwarnings("error", message="None of the inputs have requires_grad=True")
            try:
                return dataclasses.replace(forward(places), source=source)
            except UserWarning as warning:
                if "requires_grad=True" not in str(warning):
                    raise
                raise ModelError(
                    "the model uses torch.utils.checkpoint with use_reentrant=True on inputs that need no gradient, "
                    "and the parameters inside would be taken for constants. Pass use_reentrant=False."
                ) from warning

    def terms_here(self, batch: Any) -> Terms:
        """Return the loss terms of a batch with what is in the places now: for many batches `inside` one body."""
        own = map_tensors(lambda tensor: tensor, batch)  # a new container: the user's loss may pop from it
        with autocast(self.parameters.device, self._precision):
            return self._criterion(self._model, own)

    def inside(self, places: dict[str, Tensor], body: Callable[[], T]) -> T:
        """Return ``body()``, run with the tensors in their places and kernels that can be differentiated twice."""
        with twice_differentiable(self._model):
            answer: T = functional_call(self._frame, places, (body,))
        return answer

    def check_unmoved(self) -> None:
        """Refuse a model that is no longer where, or what, it was at construction.

        Raises:
            ArgumentError: If a parameter was moved to another device or dtype.
        """
        if self._kinds_now() != self._kinds:
            raise ArgumentError(
                "the model was moved to another device or dtype after this Objective was made. Make a new Objective."
            )

    def _kinds_now(self) -> list[tuple[torch.device, torch.dtype]]:
        named = dict(self._model.named_parameters())
        return [(named[name].device, named[name].dtype) for name in self.parameters.names]

    def state(self) -> list[Tensor]:
        """Return everything of the model and the criterion that the loss depends on, as far as it is known."""
        flags = torch.tensor([module.training for module in self._model.modules()])
        return [*self._model.parameters(), *self._model.buffers(), *self._criterion.tensors(), flags]


@final
class _Frame(nn.Module):
    """A module around the model, so that its tensors can be exchanged while any function runs."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, body: Callable[[], Any]) -> Any:
        return body()


def _copy(tensor: Tensor) -> Tensor:
    """Return a copy, in single precision for half precision."""
    own = tensor.detach()
    return own.float() if own.dtype in (torch.float16, torch.bfloat16) else own.clone()
