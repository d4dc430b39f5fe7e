"""Directions to look at the loss along: random ones as long as the weights, and those to other models."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvTransposeNd

from sharpness.errors import ArgumentError
from sharpness.metrics.perturbation import normal
from sharpness.objective import Objective
from sharpness.objective.wrappers import unwrap

_NORMALISATIONS = (_NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)
_EPS = 1e-10  # beside the length of a random filter, as in the code of Li et al.


def filter_normalised(objective: Objective, i: int) -> Tensor:  # -> (n,)
    r"""Return random direction ``i`` of Li et al. (2018): Gaussian, each filter as long as that of the weights.

    .. math:: d_j \leftarrow \frac{d_j}{\lVert d_j \rVert} \lVert w_j \rVert

    for each filter ``j``, the entries of a weight that make one output: those of one index of its first dimension, but
    of the second for transposed convolutions (in their groups) and the ``Conv1D`` of GPT-2. Biases and the weights of
    normalisations, and all others of less than two dimensions, do not move.
    """
    parameters = objective.parameters
    weights, drawn = (parameters.split(flat) for flat in (objective.vector(), normal(objective, i)))
    owners = {
        f"{prefix}.{name}".removeprefix("."): module
        for prefix, module in reversed(list(objective.model.named_modules()))  # a shared one has its first name
        for name, _ in module.named_parameters(recurse=False)
    }
    modules = (owners[name] for name in parameters.names)
    return parameters.flatten(map(_like_filters, drawn, weights, modules))


def _like_filters(drawn: Tensor, weights: Tensor, module: nn.Module) -> Tensor:
    if weights.ndim < 2 or isinstance(module, _NORMALISATIONS):
        return torch.zeros_like(weights)
    groups, outputs = 1, 1  # the outputs' axis after that of the groups
    if isinstance(module, _ConvTransposeNd):
        groups, outputs = module.groups, 2
    elif type(module).__name__ == "Conv1D" and weights.ndim == 2:
        outputs = 2
    d, w = (tensor.reshape(groups, -1, *tensor.shape[1:]) for tensor in (drawn, weights))
    others = [axis for axis in range(1, d.ndim) if axis != outputs]
    lengths, wanted = (torch.linalg.vector_norm(t, dim=others, keepdim=True) for t in (d, w))
    scaled: Tensor = d * (wanted / (lengths + _EPS))
    return scaled.flatten(0, 1)


def all_tensors(model: Any, name: str) -> dict[str, Tensor]:
    """Return parameters and buffers of a model by name.

    Raises:
        ArgumentError: If it is none.
    """
    if not isinstance(model, nn.Module):
        raise ArgumentError(f"`{name}` must be a torch.nn.Module, got {type(model).__name__}.")
    inner = unwrap(model)
    return {key: tensor.detach() for key, tensor in [*inner.named_parameters(), *inner.named_buffers()]}


def require_alike(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> None:
    """Refuse two models of different architecture.

    Raises:
        ArgumentError: If a name, a shape or a dtype differs.
    """
    kinds, others = ({name: (t.shape, t.dtype) for name, t in tensors.items()} for tensors in (one, other))
    if kinds != others:
        different = sorted(set(one) ^ set(other)) or [name for name in one if kinds[name] != others[name]]
        raise ArgumentError(
            f"the models differ in architecture, at {different[0]!r} first; they must be alike in names, shapes "
            "and dtypes."
        )
