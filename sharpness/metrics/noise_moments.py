r"""Moments of gradients that pass by one after the other, from a few scalars of each.

With ``s_k``, ``w_k`` and ``m_k`` the sum of the gradients, the number of loss terms and the number of samples of group
``k``, :math:`G = \sum s_k / \sum w_k` and :math:`e_k = s_k - w_k G`, everything below follows from
:math:`|e_k|^2` and :math:`G \cdot e_k`, the estimates without a group included.
"""

from __future__ import annotations

import math
from typing import Any, TypeAlias, final

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.stats import t as student_t
from torch import Tensor

from sharpness.results.eigen import as_float64

Columns: TypeAlias = NDArray[np.float64]

_CONFIDENCE = 0.975  # of each end
_FACTOR = 4  # from one measured batch size to the next
_LEVELS = 10
_LEAST = 8  # batches that a measured error is the mean of; of fewer its standard error is a guess


@final
class Moments:
    """What is kept of each group of samples: four scalars.

    Args:
        mean: ``(n,)`` the mean gradient ``G``.
    """

    def __init__(self, mean: Tensor) -> None:
        self._mean = mean
        self._rows: list[tuple[float, float, float, int]] = []

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def num_samples(self) -> int:
        """Return the number of samples so far."""
        return sum(row[3] for row in self._rows)

    def add(self, total: Tensor, weight: float, count: int) -> None:
        """Add a group: the sum of its gradients, the number of its loss terms, and that of its samples."""
        off = total - weight * self._mean
        self._rows.append((torch.dot(off, off).item(), torch.dot(self._mean, off).item(), weight, count))

    def estimate(self) -> dict[str, Any]:
        """Return both moments and their ratio, with standard errors by the jackknife, and Fieller's interval."""
        squares, inner, weights, counts = np.array(self._rows, dtype=np.float64).T
        length = torch.dot(self._mean, self._mean).item()
        count, samples = len(self), counts.sum()
        trace = float((squares / counts).sum() / (weights.sum() / samples) ** 2 / (count - 1))
        squared = float(length - trace / samples)
        with np.errstate(divide="ignore", invalid="ignore"):  # all loss terms in one group: nothing is known
            some, others = _without_one(squares, inner, weights, counts, length)
            covariance = (count - 1) * np.cov(some, others, ddof=0)
            ratios = some / others
        errors = np.sqrt(np.diag(covariance))
        t = float(student_t.ppf(_CONFIDENCE, count - 1))
        converged = bool(squared > t * errors[1])
        value = trace / squared if converged else math.inf if trace > 0 else math.nan
        return {
            "value": value,
            "stderr": math.sqrt((count - 1) * float(np.var(ratios))) if converged else value,
            "interval": _ratio_interval(trace, squared, covariance, t) if converged or trace > 0 else (0.0, math.inf),
            "trace_covariance": trace,
            "trace_stderr": float(errors[0]),
            "gradient_norm_squared": squared,
            "gradient_stderr": float(errors[1]),
            "converged": converged,
        }


@final
class Blocks:
    """The measured error of the gradient of batches of consecutive samples, 4 times as many at each level.

    Args:
        mean: ``(n,)`` the mean gradient.
        size: Samples in the smallest batch.
    """

    def __init__(self, mean: Tensor, size: int) -> None:
        self._mean = mean
        self._size = size
        self._open: list[tuple[Tensor, float, int]] = []  # per level: sum of gradients, loss terms, blocks in it
        self._squares: list[list[float]] = []

    def add(self, total: Tensor, weight: float) -> None:
        """Add the next batch of the smallest size."""
        for level in range(_LEVELS):
            if level == len(self._squares):
                self._squares.append([])
                self._open.append((torch.zeros_like(total), 0.0, 0))
            if weight:
                off = total / weight - self._mean
                self._squares[level].append(torch.dot(off, off).item())
            sum_, terms, blocks = self._open[level]
            total, weight, blocks = sum_.add_(total), terms + weight, blocks + 1
            if blocks < _FACTOR:
                self._open[level] = (total, weight, blocks)
                return
            self._open[level] = (torch.zeros_like(total), 0.0, 0)

    def measured(self, num_samples: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return batch sizes, and the root mean square error at each with its standard error.

        The mean gradient is that of the same samples, so a batch of ``m`` is off by ``1/m - 1/N`` of the trace; what is
        returned is scaled to ``1/m``.
        """
        found = []
        for level, squares in enumerate(self._squares):
            size = self._size * _FACTOR**level
            if len(squares) < _LEAST:
                break
            kept = np.array(squares) / (1 - size / num_samples)
            error = math.sqrt(kept.mean())
            spread = math.sqrt(kept.var(ddof=1) / len(kept))
            found.append((size, error, spread / (2 * error) if error else 0.0))
        return (
            torch.tensor([row[0] for row in found], dtype=torch.int64),
            as_float64([row[1] for row in found]),
            as_float64([row[2] for row in found]),
        )


def _without_one(
    squares: Columns, inner: Columns, weights: Columns, counts: Columns, length: float
) -> tuple[Columns, Columns]:
    """Return the same estimates without each group; exact where all samples have equally many loss terms.

    Leaving out ``j`` moves the mean by ``-e_j / W_j``, with ``W_j`` the terms that are left. Where the numbers of terms
    differ, a sum of inner products between groups, of relative order ``1/N``, is taken as if they did not.
    """
    samples, terms = counts.sum() - counts, weights.sum() - weights
    left = (squares / counts).sum() - squares / counts - squares / samples
    trace = np.maximum(left, 0.0) / (terms / samples) ** 2 / (len(counts) - 2)
    squared = length - 2 * inner / terms + squares / terms**2 - trace / samples
    return trace, squared


def _ratio_interval(over: float, under: float, covariance: Columns, t: float) -> tuple[float, float]:
    """Return Fieller's interval of a ratio of two quantities that cannot be negative: what the data do not exclude.

    These are the ``r`` with ``(over - r under)^2 <= t^2 var(over - r under)``. Where ``under`` cannot be told from zero
    they have no upper end.
    """
    under = max(under, 0.0)
    a = under**2 - t**2 * covariance[1, 1]
    b = over * under - t**2 * covariance[0, 1]
    c = over**2 - t**2 * covariance[0, 0]
    root = math.sqrt(max(b * b - a * c, 0.0))
    if a > 0:
        return max(float((b - root) / a), 0.0), float((b + root) / a)
    return (float((b - root) / a) if a < 0 < c else 0.0), math.inf
