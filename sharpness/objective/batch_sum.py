"""A sum of per-batch vectors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import final

import torch
from torch import Tensor

from sharpness.errors import NonFiniteError
from sharpness.objective.parameters import Parameters

_CHUNK = 2**16


@final
class BatchSum:
    """A sum of per-batch vectors, in the widest dtype, that knows which batch was not finite."""

    def __init__(self, parameters: Parameters, what: str) -> None:
        wide = torch.float32 if parameters.device.type == "mps" else torch.float64
        self._sum = torch.zeros(parameters.n, dtype=wide, device=parameters.device)
        self._pieces = parameters.split(self._sum)
        self._dtype = parameters.dtype
        self._what = what
        self._sizes: list[tuple[int, Tensor]] = []  # per batch; read once, at the end

    def add(self, i: int, tensors: Sequence[Tensor | None]) -> None:
        """Add the tensors of batch ``i``; ``None`` stands for zero."""
        size = self._sum.new_zeros(())
        for piece, tensor in zip(self._pieces, tensors, strict=True):
            if tensor is not None:
                dense = tensor.detach() if tensor.layout == torch.strided else tensor.detach().to_dense()
                for part, addend in zip(_chunks(piece), _chunks(dense.to(piece.device)), strict=True):
                    part += addend  # chunk by chunk: the addend is converted to the wider dtype on the way
                size = size + dense.sum().to(piece.device)
        self._sizes.append((i, size))

    def divided_by(self, weight: float) -> Tensor:
        """Return the sum over ``weight``."""
        finite = torch.isfinite(torch.stack([size for _, size in self._sizes])).tolist()
        if not all(finite):
            i = self._sizes[finite.index(False)][0]
            raise NonFiniteError(
                f"the {self._what} of batch {i} (counted from 0) holds NaN or infinity. "
                "Look for square roots and logarithms at zero in the model and the loss, and for overflow."
            )
        return self._sum.div_(weight).to(self._dtype)


def _chunks(tensor: Tensor) -> tuple[Tensor, ...]:
    return torch.split(tensor.reshape(-1), _CHUNK)
