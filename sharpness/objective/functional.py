"""A model seen as a function: its wrappers taken off, its tensors exchangeable."""

from __future__ import annotations

from typing import Any, final

import torch
from torch import Tensor, nn

from sharpness.objective.losses import Criterion, Terms


@final
class LossModule(nn.Module):
    """The loss of a batch as the output of a module, so that the model's tensors can be exchanged for the call."""

    def __init__(self, model: nn.Module, criterion: Criterion) -> None:
        super().__init__()
        self.model = model
        self._criterion = criterion

    def forward(self, batch: Any) -> Terms:
        """Return the terms of the batch."""
        return self._criterion(self.model, batch)


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


def measurable(tensor: Tensor) -> Tensor:
    """Return ``tensor`` as autograd can use it: half precision as float32, no inference tensors."""
    if tensor.dtype in (torch.float16, torch.bfloat16):
        return tensor.float()
    return tensor.clone() if tensor.is_inference() else tensor
