"""Learning rates: read, scaled and warmed up in an optimizer that anybody made."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable
from typing import Any, TypeAlias, final

import torch
from torch import Tensor, nn

from sharpness.errors import ArgumentError

OptimizerFactory: TypeAlias = Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]
OPTIMIZERS = ("sgd", "adam")
LR_SCALING: dict[str, Callable[[float], float]] = {"none": lambda ratio: 1.0, "linear": float, "sqrt": math.sqrt}


def make_optimizer(
    kind: str | OptimizerFactory, parameters: Iterable[nn.Parameter], *, lr: float, momentum: float
) -> torch.optim.Optimizer:
    """Return an optimizer by name, or by the user's factory.

    Raises:
        ArgumentError: If the factory makes something else, or an optimizer of other parameters or of another interface.
    """
    given = list(parameters)
    if not callable(kind):
        if kind == "adam":
            return torch.optim.Adam(given, lr=lr)
        return torch.optim.SGD(given, lr=lr, momentum=momentum)
    made = kind(given)
    if not isinstance(made, torch.optim.Optimizer):
        raise ArgumentError(
            f"`optimizer` must return a torch.optim.Optimizer, got {type(made).__name__}. "
            "Pass lambda parameters: torch.optim.SGD(parameters, lr=0.1), say."
        )
    known = {id(parameter) for parameter in given}
    if any(id(parameter) not in known for group in made.param_groups for parameter in group["params"]):
        raise ArgumentError(
            "`optimizer` returned an optimizer of parameters that it was not given. Make it of those that are passed "
            "to it, lambda parameters: torch.optim.SGD(parameters, lr=0.1), say."
        )
    closure = inspect.signature(made.step).parameters.get("closure")
    if closure is not None and closure.default is inspect.Parameter.empty:
        raise ArgumentError(
            f"`optimizer` returned {type(made).__name__}, whose step() needs a closure. Pass an optimizer that steps "
            "on the gradient of a batch, or train=callable(model, loader) with a loop of your own."
        )
    return made


def learning_rate(optimizer: torch.optim.Optimizer) -> float | None:
    """Return the learning rate of the first group of parameters, ``None`` for an optimizer that has none."""
    rate = optimizer.param_groups[0].get("lr")
    return None if rate is None else float(rate)


def scale_learning_rate(optimizer: torch.optim.Optimizer, factor: float) -> None:
    """Multiply the learning rate of every group of parameters."""
    if factor != 1.0:
        for group in optimizer.param_groups:
            _set_rate(group, factor * _rate(group, "lr_scaling"))


@final
class Warmup:
    """Linear warm-up: update ``t`` of the first ``T`` is made at ``t / T`` of the rate, later ones at all of it.

    The velocity of PyTorch's SGD does not contain the learning rate, so momentum needs no correction (Goyal et al.
    2017, Section 2.2).

    Args:
        optimizer: Its learning rates are those after the warm-up.
        num_updates: ``T``; zero for no warm-up.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, num_updates: int) -> None:
        self._optimizer = optimizer
        self._num_updates = num_updates
        self._rates = [_rate(group, "warmup_epochs") for group in optimizer.param_groups] if num_updates else []

    def before(self, update: int) -> None:
        """Set the learning rates for an update, counted from 1."""
        if update > self._num_updates:
            return
        for group, rate in zip(self._optimizer.param_groups, self._rates, strict=True):
            _set_rate(group, rate if update == self._num_updates else rate * update / self._num_updates)


def _rate(group: dict[str, Any], option: str) -> float:
    if "lr" not in group:
        raise ArgumentError(
            f"`{option}` changes the learning rate, and the optimizer that `optimizer` made has none (no 'lr' in its "
            "parameter groups). Leave the option out."
        )
    return float(group["lr"])


def _set_rate(group: dict[str, Any], rate: float) -> None:
    if isinstance(group["lr"], Tensor):
        group["lr"] = torch.full_like(group["lr"], rate)  # not in place: groups may share the tensor
    else:
        group["lr"] = rate
