"""Intervals for means of random samples, by Student's t."""

from __future__ import annotations

import math

from scipy.special import stdtrit
from torch import Tensor

CONFIDENCE = 0.95
_MANY = 1e6  # degrees of freedom, as good as infinite


def quantile(freedom: float) -> float:
    """Return how many standard errors to each side hold a mean at 95 %, with these degrees of freedom of the error.

    >>> round(quantile(1), 1), round(quantile(1000), 2)
    (12.7, 1.96)
    """
    return float(stdtrit(min(freedom, _MANY), (1 + CONFIDENCE) / 2))


def half_width(variance: float, freedom: float, rounding: float) -> float:
    """Return half the width of a 95 % interval around a mean with this variance."""
    return quantile(freedom) * math.sqrt(variance) + rounding


def freedom_of(lengths: Tensor) -> float:  # (m,)
    """Return the degrees of freedom of a variance that is the mean of ``lengths``, by Satterthwaite's rule.

    That is many where the lengths agree, as they do for equal eigenvalues, and about ``m`` where one eigenvalue
    dominates. It is taken to be no less than ``m - 1``.
    """
    m, spread = len(lengths), lengths.var().item()
    return max(m - 1.0, 2 * m * lengths.mean().item() ** 2 / spread if spread else _MANY)
