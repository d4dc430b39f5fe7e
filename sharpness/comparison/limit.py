"""The largest curvature at which an optimizer is stable with the learning rate it has."""

from __future__ import annotations

import math
from typing import Any

import torch

from sharpness.errors import ArgumentError


def widest_group(optimizer: Any) -> dict[str, Any]:
    """Return the parameter group of an optimizer with the largest learning rate; wrappers are looked through.

    Raises:
        ArgumentError: If it is not an optimizer.
    """
    inner = innermost(optimizer)
    if not isinstance(inner, torch.optim.Optimizer):
        raise ArgumentError(
            f"`optimizer` must be a torch.optim.Optimizer, got {type(optimizer).__name__}. "
            "Leave it out if there is none."
        )
    return max(inner.param_groups, key=lambda group: float(group["lr"]))


def innermost(optimizer: Any) -> Any:
    """Return the optimizer inside of the wrappers of training libraries, which hold it as ``optimizer``."""
    while (inner := getattr(optimizer, "optimizer", None)) is not None:
        optimizer = inner
    return optimizer


def limit_of(optimizer: Any, group: dict[str, Any]) -> float:
    r"""Return the largest eigenvalue of the loss at which full-batch steps of `torch.optim.SGD` are stable.

    .. math:: \frac{2 + 2\beta}{(1 - d)\,\eta} - w, \qquad \frac{2 + 2\beta}{(1 + 2\beta)\,\eta} - w

    with momentum ``beta``, dampening ``d`` and weight decay ``w``, which adds to every eigenvalue; the second with
    Nesterov's momentum. NaN for other optimizers, and where the loss is maximised.
    """
    if not isinstance(innermost(optimizer), torch.optim.SGD) or group["maximize"]:
        return math.nan
    lr, momentum = float(group["lr"]), float(group["momentum"])
    damped = 1 - float(group["dampening"]) if momentum else 1.0
    step = lr * (1 + 2 * momentum if group["nesterov"] else damped)
    return (2 + 2 * momentum) / step - float(group["weight_decay"]) if step else math.inf
