"""A model and its loss as a function of tensors that are put in the places of its own.

The user's tensors are never written to: the forward pass sees copies, also where a module writes to its weights or
buffers. Derivatives are taken with the same copies in place, since checkpointed blocks run again then.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar, final

import torch
from torch import Tensor, nn
from torch.func import functional_call

from sharpness.objective.data import map_tensors
from sharpness.objective.first_order import FirstOrder
from sharpness.objective.guard import default_dtype, twice_differentiable
from sharpness.objective.losses import Criterion, Terms
from sharpness.objective.parameters import Parameters

T = TypeVar("T")


@final
class Functional:
    """The loss of one batch, with other tensors in the places of the model's parameters and buffers."""

    def __init__(self, model: nn.Module, criterion: Criterion, parameters: Parameters) -> None:
        self._model = model
        self._criterion = criterion
        self._parameters = parameters
        self._frame = _Frame(model)

    def leaves(self, at: Tensor | None = None, *, differentiable: bool = True) -> list[Tensor]:
        """Return new tensors for the chosen parameters, at ``at``, ``(n,)``, or at the parameters as they are."""
        named = dict(self._model.named_parameters())
        own = [_copy(named[name]) for name in self._parameters.names]
        if at is not None:
            self._parameters.check(at)
            pieces = self._parameters.split(at.detach().to(self._parameters.device))
            own = [piece.to(p.dtype, copy=True) for piece, p in zip(pieces, own, strict=True)]
        return [tensor.requires_grad_(differentiable) for tensor in own]

    def places(self, leaves: Sequence[Tensor], others: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
        """Return what goes in which place: ``leaves``, ``others`` by name, and copies of all the rest."""
        chosen = dict(zip(self._parameters.names, leaves, strict=True)) | dict(others or {})
        own = [*self._model.named_parameters(), *self._model.named_buffers()]
        return {f"model.{name}": chosen[name] if name in chosen else _copy(tensor) for name, tensor in own}

    def terms(self, batch: Any, places: dict[str, Tensor]) -> Terms:
        """Return the loss terms of a batch."""
        with twice_differentiable():
            return self.inside(places, lambda: self._criterion(self._model, batch))

    def inside(self, places: dict[str, Tensor], body: Callable[[], T]) -> T:
        """Return ``body()``, run with the tensors in their places."""
        answer: T = functional_call(self._frame, places, (body,))
        return answer

    def product(self, batch: Any, v: Tensor, dtype: torch.dtype) -> tuple[Tensor, float]:  # (n,) -> (n,)
        """Return the Hessian of a batch's total loss times ``v``, computed in ``dtype``, and the batch's weight."""

        def cast(tensor: Tensor) -> Tensor:
            return tensor.to(dtype) if tensor.is_floating_point() else tensor

        leaves = [cast(leaf.detach()).requires_grad_(True) for leaf in self.leaves()]
        places = {name: cast(tensor) for name, tensor in self.places(leaves).items()}

        def body() -> tuple[Tensor, float]:
            terms = self.terms(map_tensors(cast, batch), places)
            pieces = FirstOrder.of(terms, leaves).product(leaves, self._parameters.split(v.detach()), keep=False)
            whole = [leaf.detach() * 0 if g is None else g.detach() for g, leaf in zip(pieces, leaves, strict=True)]
            return torch.cat([piece.reshape(-1).double() for piece in whole]), terms.weight

        with default_dtype(dtype):
            return self.inside(places, body)

    def state(self) -> list[Tensor]:
        """Return everything of the model that the loss depends on."""
        flags = torch.tensor([module.training for module in self._model.modules()])
        return [*self._model.parameters(), *self._model.buffers(), flags]


@final
class _Frame(nn.Module):
    """A module around the model, so that its tensors can be exchanged while any function runs."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, body: Callable[[], Any]) -> Any:
        return body()


def unwrap(model: nn.Module) -> nn.Module:
    """Return the module inside ``torch.compile``, ``DataParallel`` and ``DistributedDataParallel``."""
    while True:
        if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            inner: Any = model.module
        else:
            inner = getattr(model, "_orig_mod", None)
        if inner is None:
            return model
        model = inner


def _copy(tensor: Tensor) -> Tensor:
    """Return a copy, in single precision for half precision."""
    own = tensor.detach()
    return own.float() if own.dtype in (torch.float16, torch.bfloat16) else own.clone()
