"""Traces, diagonals and spectral densities."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch

from sharpness._checks import check_positive
from sharpness.errors import ArgumentError
from sharpness.plotting.axes import given_or_new
from sharpness.results import DensityResult, DiagonalResult, EigenResult, TraceResult

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_HEADROOM = 2.0
_FLOOR = 0.01  # of one eigenvalue, spread over a kernel: the lowest density that a logarithmic axis shows


def plot_trace(result: TraceResult, *, ax: Axes | None = None, **style: Any) -> Axes:
    """Draw the estimate of each random vector as a dot, their mean as a line and its interval as a band."""
    ax = given_or_new(ax)
    ax.plot(range(1, len(result.samples) + 1), result.samples, **{"linestyle": "", "marker": "o", **style})
    ax.axhline(result.value, color="0.3", linewidth=0.8)
    ax.axhspan(*result.interval, color="0.3", alpha=0.2, linewidth=0)
    ax.set(xlabel="random vector", ylabel="trace")
    return ax


def plot_diagonal(result: DiagonalResult, *, ax: Axes | None = None, **style: Any) -> Axes:
    """Draw the entries in ascending order, with a band of one standard error."""
    ax = given_or_new(ax)
    order = torch.argsort(result.value).cpu()
    value, stderr = (t.cpu().double()[order] for t in (result.value, result.stderr))
    ax.plot(range(len(value)), value, **style)
    ax.fill_between(range(len(value)), value - stderr, value + stderr, color="0.3", alpha=0.2, linewidth=0)
    ax.set(xlabel="entry, in ascending order", ylabel="diagonal")
    return ax


def plot_density(
    result: DensityResult,
    *,
    ax: Axes | None = None,
    log: bool = True,
    eigenvalues: EigenResult | Iterable[float] | None = None,
    lr: float | None = None,
    **style: Any,
) -> Axes:
    """Draw the density, with eigenvalues as ticks below it and the edge of stability as a line.

    Args:
        result: The density.
        ax: Where to draw.
        log: A logarithmic axis for the density, cut off at a hundredth of one eigenvalue.
        eigenvalues: Which to mark, an `EigenResult` or numbers; ``None`` marks the outliers.
        lr: Learning rate of gradient descent, which is unstable where an eigenvalue exceeds 2 / lr.
        **style: For the line of the density.

    Raises:
        ArgumentError: If the learning rate is not above 0, or the eigenvalues are not numbers.
    """
    lr = None if lr is None else check_positive("lr", lr)
    values = _numbers(result.outliers if eigenvalues is None else eigenvalues)
    ax = given_or_new(ax)
    ax.plot(result.grid, result.density, **style)
    if len(values):
        transform = ax.get_xaxis_transform()
        ax.plot(values, [0.02] * len(values), "|", color="C3", markersize=10, transform=transform, label="eigenvalues")
    if lr is not None:
        ax.axvline(2 / lr, color="0.3", linestyle="--", linewidth=0.8, label="2 / learning rate")
    if log:  # far from all kernels the density is as good as zero, and no axis is to reach down there
        low, top = _FLOOR / (result.n * result.sigma), result.density.max().item()
        ax.set(yscale="log", ylim=(low, _HEADROOM * max(top, low)))
    if len(values) or lr is not None:
        ax.legend()
    ax.set(xlabel="eigenvalue", ylabel="density")
    return ax


def _numbers(given: Any) -> list[float]:
    try:
        return [float(value) for value in (given.eigenvalues if isinstance(given, EigenResult) else given)]
    except (TypeError, ValueError) as error:
        raise ArgumentError(f"`eigenvalues` must be an EigenResult or numbers, got {given!r}.") from error
