"""Where the graphs of first derivatives begin, to be differentiated again; the derivatives themselves are not kept."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge

from sharpness.objective.memory import graph_nodes, graph_tensors

# Before 2.6 PyTorch differentiates tensors only, not the edges of a graph that they come from.
_EDGES = tuple(int(part) for part in torch.__version__.split(".")[:2]) >= (2, 6)


@final
@dataclass(frozen=True)
class Roots:
    """The graphs of one tensor per parameter, as large as the model, without the tensors.

    Attributes:
        edges: Where the graph of each tensor begins.
        positions: Which parameters they belong to; those without a graph are left out.
    """

    edges: tuple[Any, ...]
    positions: tuple[int, ...]
    _kinds: tuple[tuple[torch.device, torch.dtype], ...]

    @classmethod
    def of(cls, tensors: Sequence[Tensor | None]) -> Roots:
        """Take the graphs of those tensors that have one."""
        moving = [(i, tensor) for i, tensor in enumerate(tensors) if tensor is not None and tensor.requires_grad]
        return cls(
            edges=tuple(get_gradient_edge(tensor) if _EDGES else tensor for _, tensor in moving),
            positions=tuple(i for i, _ in moving),
            _kinds=tuple((tensor.device, tensor.dtype) for _, tensor in moving),
        )

    def along(self, block: Sequence[int], directions: Sequence[Tensor]) -> tuple[list[Any], list[Tensor]]:
        """Return the edges of the parameters in ``block``, and the direction that belongs to each."""
        given = dict(zip(block, directions, strict=True))
        met = [
            (edge, given[i].to(device, dtype))
            for edge, i, (device, dtype) in zip(self.edges, self.positions, self._kinds, strict=True)
            if i in given
        ]
        return [edge for edge, _ in met], [direction for _, direction in met]

    def tensors(self) -> Iterator[Tensor]:
        """Yield every tensor that the graphs keep alive."""
        yield from (edge for edge in self.edges if isinstance(edge, Tensor))
        yield from graph_tensors(self.edges)

    def nodes(self) -> Iterator[Any]:
        """Yield every node of the graphs."""
        yield from graph_nodes(self.edges)
