"""New models that start from the same weights, whatever the user's factory does."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from sharpness.errors import ArgumentError
from sharpness.objective.guard import own_randomness


@final
class Starts:
    """Models made by the user, each new, and with the weights of the first one of the same seed.

    Args:
        make_model: The user's factory.

    Attributes:
        copied: Whether the factory made other weights for the same seed, so that they had to be copied.
    """

    def __init__(self, make_model: Callable[[], nn.Module]) -> None:
        if isinstance(make_model, nn.Module) or not callable(make_model):
            raise ArgumentError(
                f"`make_model` must be a function that returns a new model, got {type(make_model).__name__}. "
                "Pass lambda: MyModel(), so that each training starts from a model of its own."
            )
        self.copied = False
        self._make_model = make_model
        self._made: list[nn.Module] = []
        self._weights: dict[int, dict[str, Tensor]] = {}
        self._unused: dict[int, nn.Module] = {}

    def weights(self, seed: int) -> dict[str, Tensor]:
        """Return the parameters and buffers that the models of a seed start from."""
        if seed not in self._weights:
            model = self.make(seed)
            self._weights[seed] = {name: tensor.detach().clone() for name, tensor in tensors_of(model).items()}
            self._unused[seed] = model
        return self._weights[seed]

    def model(self, seed: int) -> nn.Module:
        """Return a new model with the initial weights of a seed."""
        weights = self.weights(seed)
        model = self._unused.pop(seed, None)
        if model is None:
            model = self.make(seed)
        self.copied |= copy_into(model, weights, "`make_model` returned another architecture than before")
        return model

    def peek(self, seed: int) -> nn.Module:
        """Return the first model of a seed, to look at before it is trained."""
        self.weights(seed)
        return self._unused[seed]

    def alike(self) -> bool:
        """Return whether there are several seeds, and all start from the same parameters and buffers."""
        first, *others = self._weights.values()
        return bool(others) and all(
            signature(first) == signature(other) and all(torch.equal(first[name], other[name]) for name in first)
            for other in others
        )

    def replace(self, seed: int, weights: Mapping[str, Tensor]) -> None:
        """Let the models of a seed start from other weights of the same names and shapes."""
        self._weights[seed] = dict(weights)

    def make(self, seed: int) -> nn.Module:
        """Return what the factory makes under a seed.

        Raises:
            ArgumentError: If it is no model, not a new one, or one without weights as yet.
        """
        with own_randomness(seed):
            model = self._make_model()
        if not isinstance(model, nn.Module):
            raise ArgumentError(f"`make_model` must return a torch.nn.Module, got {type(model).__name__}.")
        if any(model is other for other in self._made):
            raise ArgumentError("`make_model` returned the same object twice. Build a new model at each call.")
        parameters = list(model.parameters())
        known = {id(parameter) for other in self._made for parameter in other.parameters()}
        if any(id(parameter) in known for parameter in parameters):
            raise ArgumentError(
                "`make_model` returned two models that share parameters, so that training one changes the other. "
                "Build a new model at each call, or copy what is shared with copy.deepcopy."
            )
        if any(map(is_lazy, parameters)):
            raise ArgumentError(
                "`make_model` returned a model with lazy layers, which has no weights to start from. Run it on a batch "
                "in make_model."
            )
        self._made.append(model)
        return model


def tensors_of(model: nn.Module) -> dict[str, Tensor]:
    """Return the parameters and buffers of a model by name, those that its state dict leaves out as well."""
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def copy_into(model: nn.Module, weights: Mapping[str, Tensor], otherwise: str) -> bool:
    """Write parameters and buffers into a model; return whether any was another before.

    Raises:
        ArgumentError: If they are not those of the model, in names, shapes and types.
    """
    own = tensors_of(model)
    if signature(own) != signature(weights):
        there, here = signature(weights), signature(own)
        name = next(name for name in [*there, *here] if there.get(name) != here.get(name))
        raise ArgumentError(
            f"{otherwise}: {name!r} is {here.get(name, 'not there')}, and was {there.get(name, 'not there')}. All "
            "batch sizes and seeds must have one architecture."
        )
    changed = False
    with torch.no_grad():
        for name, tensor in own.items():
            wanted = weights[name].to(tensor.device)
            if not torch.equal(tensor, wanted):
                tensor.copy_(wanted)
                changed = True
    return changed


def signature(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Return types and shapes by name, in words."""
    return {name: f"{str(tensor.dtype).removeprefix('torch.')}{list(tensor.shape)}" for name, tensor in tensors.items()}
