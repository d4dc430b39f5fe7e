"""What identifies an objective: digests of its data, weights and options, to tell whether a file belongs to it."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from sharpness.objective.data import Batches, tensors_in
from sharpness.objective.reduction import criterion_of


def fingerprint(model: nn.Module, batches: Batches, loss: Any) -> dict[str, Any]:
    """Return digests of the data, one walk without the model, of the weights, and of what the model is made of."""
    return {
        "data": of_tensors(tensor for _, batch in batches.walk() for tensor in tensors_in(batch)),
        "weights": of_tensors([*model.parameters(), *model.buffers()]),
        "model": hashlib.blake2b(repr(model).encode(), digest_size=16).hexdigest(),
        "flags": "".join("t" if module.training else "e" for module in model.modules()),
        "loss": of_loss(loss),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),  # more of them round differently
    }


def of_tensors(tensors: Iterable[Tensor]) -> str:
    """Return a digest of tensors, in their order."""
    digest = hashlib.blake2b(digest_size=16)
    for tensor in tensors:
        _update(digest, tensor)
    return digest.hexdigest()


def of_loss(loss_fn: Any) -> str:
    """Return what a criterion is called, with its options; weights among them by their digest."""
    if loss_fn is None:
        return "inferred"
    kind, options = criterion_of(loss_fn)
    named = {
        name: of_tensors([value]) if isinstance(value, Tensor) else value
        for name, value in sorted(options.items())
        if isinstance(value, (Tensor, str, int, float, bool, type(None)))
    }
    name = f"{getattr(kind, '__module__', '')}.{getattr(kind, '__qualname__', type(kind).__qualname__)}"
    return f"{name}({', '.join(f'{option}={value}' for option, value in named.items())})"


def _update(digest: Any, tensor: Tensor) -> None:
    whole = tensor.detach() if tensor.layout == torch.strided else tensor.detach().to_dense()
    digest.update(f"{whole.dtype}{tuple(whole.shape)}".encode())
    digest.update(whole.reshape(-1).contiguous().cpu().view(torch.uint8).numpy().data if whole.numel() else b"")
