r"""Intervals for eigenvalues from Ritz pairs and their residuals.

*Residual bound.* A symmetric ``A`` has an eigenvalue within :math:`r = \|A y - \theta y\|` of :math:`\theta`, for any
unit vector ``y``: for certain, whatever else is in the spectrum (Parlett 1998, theorem 4.5.1).

*Kato-Temple.* If ``(a, b)`` holds exactly one eigenvalue, it lies in
:math:`[\theta - r^2 / (b - \theta),\ \theta + r^2 / (\theta - a)]` (Parlett 1998, theorem 4.6.2 and its corollary).
Much tighter, but products alone can never prove that an interval holds no second eigenvalue, so this one is reported
beside the certain one, not in its place. ``a`` and ``b`` are taken from the neighbouring Ritz values and their
residuals.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

# A product of a network's loss in floating point is off by some multiple of eps |A|; this multiple was larger than any
# seen over the test problems and the trained networks of the benchmarks.
_ROUNDING = 32.0


def rounding_level(dtype: torch.dtype, scale: float) -> float:
    """Return how far rounding alone may move a product with a unit vector, for an operator of norm ``scale``."""
    return float(_ROUNDING * torch.finfo(dtype).eps * scale)


def accurate(
    theta: np.ndarray[Any, Any], residuals: np.ndarray[Any, Any], *, tol: float, floor: float
) -> np.ndarray[Any, Any]:
    """Return which pairs meet the relative tolerance, or cannot be told from exact ones at the rounding ``floor``."""
    good: np.ndarray[Any, Any] = (residuals <= tol * np.abs(theta)) | (residuals <= 2 * floor)
    return good


def residual_interval(theta: np.ndarray[Any, Any], residuals: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Return ``(k, 2)`` rows, each of which contains an eigenvalue for certain."""
    return np.stack([theta - residuals, theta + residuals], axis=1)


def kato_temple(
    theta: np.ndarray[Any, Any], residuals: np.ndarray[Any, Any], wanted: np.ndarray[Any, Any], rounding: float
) -> np.ndarray[Any, Any]:
    """Return ``(k, 2)`` Kato-Temple rows for the ``wanted`` of the Ritz values ``theta``, ``(m,)`` ascending.

    A row is NaN where a neighbour's residual interval reaches into the pair's own: no gap is known there.
    ``residuals`` include the allowance for rounding, ``rounding``, which no gap can reduce.
    """
    rows = np.full((len(wanted), 2), np.nan)
    for row, i in enumerate(wanted):
        below = max((theta[:i] + residuals[:i]).tolist(), default=-np.inf)
        above = min((theta[i + 1 :] - residuals[i + 1 :]).tolist(), default=np.inf)
        r = residuals[i]
        if below < theta[i] - r and theta[i] + r < above:
            rows[row] = (
                theta[i] - min(r, r**2 / (above - theta[i]) + rounding),
                theta[i] + min(r, r**2 / (theta[i] - below) + rounding),
            )
    return rows
