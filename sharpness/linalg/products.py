"""Inner products and norms, accumulated in float64 where the device has it."""

from __future__ import annotations

import torch
from torch import Tensor


def accumulator(device: torch.device) -> torch.dtype:
    """Return the widest dtype to add up in: float64, but float32 on Apple's GPU."""
    return torch.float32 if device.type == "mps" else torch.float64


def dot(a: Tensor, b: Tensor) -> float:  # (n,), (n,)
    """Return the inner product."""
    wide = accumulator(a.device)
    return torch.dot(a.to(wide), b.to(wide)).item()


def norm(a: Tensor) -> float:  # (n,)
    """Return the Euclidean norm."""
    return float(torch.linalg.vector_norm(a, dtype=accumulator(a.device)))
