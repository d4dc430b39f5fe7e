"""Eigenvalues that are separated from the bulk of a spectrum, from the Ritz values of several Lanczos runs."""

from __future__ import annotations

from typing import Any, TypeAlias

import numpy as np

from sharpness.linalg.basis import Floats

Bools: TypeAlias = "np.ndarray[Any, np.dtype[np.bool_]]"

_RESOLVED = 1e-3  # of the width of the spectrum: a smaller residual says that the Ritz value is an eigenvalue
_GAP = 0.2  # of the distance from the median
_APART = 0.01  # of the width of the spectrum, some three kernels
_BULK = 0.9  # of all eigenvalues belong to the bulk, or lie below it


def find_outliers(nodes: Floats, weights: Floats, residuals: Floats) -> tuple[Floats, Floats, Bools]:
    """Return the outliers at both ends in descending order, their residuals, and which are certainly apart.

    Args:
        nodes: ``(draws, steps)`` Ritz values.
        weights: ``(draws, steps)`` of sum 1 for each draw.
        residuals: ``(draws, steps)``.
    """
    real = weights > 0
    theta, weight, residual = nodes[real], weights[real], residuals[real]
    upper = _upper(theta, weight, residual)
    lower = _upper(-theta, weight, residual)
    values = np.concatenate([upper[0], -lower[0][::-1]])
    return values, np.concatenate([upper[1], lower[1][::-1]]), np.concatenate([upper[2], lower[2][::-1]])


def _upper(theta: Floats, weight: Floats, residual: Floats) -> tuple[Floats, Floats, Bools]:
    """Return the outliers at the upper end."""
    width = np.ptp(theta)
    median, edge = (_quantile(theta, weight, q) for q in (0.5, _BULK))
    resolved = residual <= _RESOLVED * width
    values, doubts = _merged(theta[resolved], residual[resolved], _RESOLVED * width)
    # The rest belongs to the bulk, unless it is another draw's view of a value that one draw has resolved.
    rest, error = theta[~resolved], residual[~resolved]
    new = np.array([not np.any(np.abs(t - values) <= e + doubts) for t, e in zip(rest, error, strict=True)], dtype=bool)
    bulk = rest[new].max(initial=edge)
    above = values > bulk
    values, doubts = values[above], doubts[above]
    gaps = values - np.append(values[1:], bulk)
    ends = np.flatnonzero(gaps >= np.maximum(_GAP * (values - median), _APART * width))
    count = ends[-1] + 1 if len(ends) else 0
    nearest = np.minimum(gaps, np.append(np.inf, gaps[:-1])) if len(gaps) else gaps
    return values[:count], doubts[:count], (doubts < nearest / 2)[:count]


def _merged(theta: Floats, residual: Floats, apart: float) -> tuple[Floats, Floats]:
    """Return distinct values in descending order, the best view of each."""
    values: list[float] = []
    doubts: list[float] = []
    for i in np.argsort(-theta):
        if values and values[-1] - theta[i] <= max(apart, residual[i] + doubts[-1]):
            if residual[i] < doubts[-1]:
                values[-1], doubts[-1] = theta[i], residual[i]
        else:
            values.append(theta[i])
            doubts.append(residual[i])
    return np.array(values), np.array(doubts)


def _quantile(theta: Floats, weight: Floats, q: float) -> float:
    order = np.argsort(theta)
    share = np.cumsum(weight[order]) / weight.sum()
    return float(theta[order][np.searchsorted(share, q)])
