"""The rows of a tensor of weights: what feeds one output unit of a layer, a neuron or a filter."""

from __future__ import annotations

from collections.abc import Sequence
from typing import final

from torch import Tensor, nn
from torch.nn.modules.conv import _ConvTransposeNd


@final
class Rows:
    """The weights of a layer as a matrix with a row for each output unit, and back.

    In most layers these are what one index of the first dimension selects; a transposed convolution, and the linear
    layer of GPT-2, have their inputs first.

    Args:
        model: The model.
        name: Name of the parameter.
        shape: Its shape, of two dimensions or more.
    """

    def __init__(self, model: nn.Module, name: str, shape: Sequence[int]) -> None:
        module = model.get_submodule(name.rpartition(".")[0])
        groups = module.groups if isinstance(module, _ConvTransposeNd) else 1
        conv1d = type(module).__name__ == "Conv1D" and len(shape) == 2  # of Hugging Face's GPT-2
        self._inputs_first = isinstance(module, _ConvTransposeNd) or conv1d
        self._split = (groups, shape[0] // groups, *shape[1:])  # groups, inputs of one, outputs of one
        self._shape = tuple(shape)

    def of(self, weights: Tensor) -> Tensor:  # -> (rows, columns)
        """Return the weights row by row."""
        if not self._inputs_first:
            return weights.flatten(1)
        return weights.reshape(self._split).transpose(1, 2).flatten(2).flatten(0, 1)

    def back(self, rows: Tensor) -> Tensor:
        """Return the weights in their own shape."""
        if not self._inputs_first:
            return rows.reshape(self._shape)
        groups, inputs, outputs, *rest = self._split
        return rows.reshape(groups, outputs, inputs, *rest).transpose(1, 2).reshape(self._shape)
