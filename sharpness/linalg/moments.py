"""Mean and variance of vectors that come a few at a time, a range of their entries at a time."""

from __future__ import annotations

from typing import final

import torch
from torch import Tensor

from sharpness.linalg.products import accumulator
from sharpness.linalg.steps import Domain


@final
class RunningMoments:
    """Mean and spread of the rows added so far, in float64 where the device has it.

    Every block of rows is added range by range, each entry once, and then closed.

    Attributes:
        mean: ``(n,)`` mean.
        count: Rows so far.
        inflation: What the variance of the mean is more than that of independent rows.
    """

    def __init__(self, domain: Domain) -> None:
        wide = accumulator(domain.device)
        self.mean = torch.zeros(domain.n, dtype=wide, device=domain.device)
        self._squares = torch.zeros_like(self.mean)  # about the mean
        self._sums: list[float] = []
        self._open: Tensor | None = None
        self._rows = 0
        self.count = 0
        self.inflation = 1.0

    def add(self, rows: Tensor, where: slice) -> None:  # (p, c)
        """Take in this range of entries of the next rows (Chan, Golub & LeVeque 1983)."""
        rows = rows.to(self.mean)
        self._rows = len(rows)
        sums = rows.sum(1)
        self._open = sums if self._open is None else self._open + sums
        mean = rows.mean(0)
        total = self.count + len(rows)
        shift = mean - self.mean[where]
        self._squares[where] += ((rows - mean) ** 2).sum(0) + shift**2 * (self.count * len(rows) / total)
        self.mean[where] += shift * (len(rows) / total)

    def close(self) -> None:
        """End the rows that were added range by range."""
        self.count += self._rows
        if self._open is not None:
            self._sums += self._open.tolist()
        self._open = None

    def inflate(self, covariance: float) -> None:
        """Allow for rows that are not independent, with this covariance of two of them, summed over the entries."""
        independent = self.variance.sum().item()
        if independent > 0:
            self.inflation = 1.0 + max(covariance, 0.0) / independent

    @property
    def variance(self) -> Tensor:  # (n,)
        """Variance of the mean of each entry."""
        return self._squares * (self.inflation / (max(self.count - 1, 1) * self.count))

    def variance_of_sum(self) -> float:
        """Return the variance of the mean of the rows' sums, as if they were independent."""
        return torch.tensor(self._sums, dtype=torch.float64).var().item() / self.count
