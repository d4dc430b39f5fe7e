"""Sharpness while a model is trained: against the step, and against the loss."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from sharpness.plotting.axes import given_or_new
from sharpness.results import TrajectoryComparison, TrajectoryResult

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_EIGENVALUES = ("top_eigenvalues", "critical_sharpness")  # what a limit of stability is a limit of


def plot_trajectory(
    result: TrajectoryResult, *, ax: Axes | None = None, metric: str | None = None, loss: bool = True, **style: Any
) -> Axes:
    """Draw a metric against the step, the largest stable value dashed beside it, and the loss on a second axis."""
    name = result.metric(metric)
    ax = given_or_new(ax)
    values, intervals = result.metrics[name].numpy(), result.intervals[name].numpy()
    (line,) = ax.plot(result.steps, values, **{"marker": ".", "label": name.replace("_", " "), **style})
    ax.fill_between(result.steps, intervals[:, 0], intervals[:, 1], color=line.get_color(), alpha=0.2, linewidth=0)
    if name.startswith(_EIGENVALUES) and np.isfinite(result.limits.numpy()).any():
        ax.plot(result.steps, _finite(result.limits.numpy()), color="0.3", linestyle="--", label="limit of stability")
    ax.set(xlabel="step", ylabel=name.replace("_", " "))
    handles, labels = ax.get_legend_handles_labels()
    if loss:
        second = ax.twinx()
        losses = result.loss.numpy()
        second.plot(result.steps, losses, color="C1", linewidth=0.8, label="loss")
        second.set(ylabel="loss", yscale="log" if len(losses) and np.nanmin(losses, initial=np.inf) > 0 else "linear")
        more = second.get_legend_handles_labels()
        handles, labels = handles + more[0], labels + more[1]
    ax.legend(handles, labels)
    return ax


def plot_trajectories(
    comparison: TrajectoryComparison, *, ax: Axes | None = None, metric: str | None = None, **style: Any
) -> Axes:
    """Draw a metric against the training loss, one colour per batch size, both axes logarithmic; training goes right.

    What is not above zero is left out.
    """
    name = next(iter(comparison.values()))[0].metric(metric)
    ax = given_or_new(ax)
    for i, (size, runs) in enumerate(comparison.items()):
        for j, run in enumerate(runs):
            label = f"batch size {size}" if j == 0 else None
            points = _positive(run.loss.numpy()), _positive(run.metrics[name].numpy())
            ax.plot(*points, **{"color": f"C{i % 10}", "marker": ".", "label": label, **style})
    ax.set(xlabel="training loss", ylabel=name.replace("_", " "), xscale="log", yscale="log")
    ax.invert_xaxis()
    ax.legend()
    return ax


def _finite(values: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    return np.where(np.isfinite(values), values, np.nan)


def _positive(values: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    return np.where(np.isfinite(values) & (values > 0), values, np.nan)
