"""Spectra that estimates of traces and diagonals find easy, hard, and impossible to tell the scale of."""

import torch
from torch import Tensor

I = torch.arange(1, 101, dtype=torch.float64)  # noqa: E741
TRACED: dict[str, Tensor] = {
    "flat": torch.linspace(1, 3, 100, dtype=torch.float64),
    "fast": 0.7**I,
    "slow": I**-1,
    "step": torch.where(I <= 6, 1.0, 1e-3).double(),
    "indefinite": torch.where(I <= 3, 10.0 - I, torch.where(I <= 5, -5.0, 0.1 * torch.sin(3 * I))),
    "near zero": torch.where(I % 2 == 0, 2 / I, -2 / (I + 1)) + 1e-4,
    "pair": torch.where(I <= 1, 10.0, torch.where(I <= 2, -9.0, 0.01)).double(),
    "both ends": torch.where(I <= 10, 1.0, torch.where(I > 90, -0.8, 0.0)).double() + 1e-3 * torch.sin(I),
    "classes": torch.cat([torch.linspace(10, 1, 10, dtype=torch.float64), 0.05 * torch.sin(I[:90])]),
    "outliers": torch.where(I <= 9, 60 / (I + 1), 0.3 * I**-0.5),
}
