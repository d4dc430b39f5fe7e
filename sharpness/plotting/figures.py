"""One function per kind of result."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from sharpness.errors import ArgumentError, SharpnessError
from sharpness.results import (
    Comparison,
    EigenResult,
    EpsilonSharpnessResult,
    InterpolationResult,
    LayerwiseResult,
    PerturbationResult,
    Report,
    ScalarResult,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def plot_eigenvalues(result: EigenResult, *, ax: Axes | None = None, **style: Any) -> Axes:
    """Draw the eigenvalues in their order, with the certified intervals as bars."""
    ax = _axes(ax)
    half = (result.interval[:, 1] - result.interval[:, 0]) / 2
    positions = range(1, len(result.eigenvalues) + 1)
    ax.errorbar(positions, result.eigenvalues, yerr=half, **{"fmt": "o", "capsize": 4, **style})
    ax.axhline(0, color="0.7", linewidth=0.8, zorder=0)
    ax.set(xlabel="index", ylabel="eigenvalue", xticks=list(positions) if len(positions) <= 20 else [])
    return ax


def plot_epsilon_sharpness(result: EpsilonSharpnessResult, *, ax: Axes | None = None, **style: Any) -> Axes:
    """Draw the sharpness that each start reached, the starts of a subspace in one colour, and the mean over these."""
    ax = _axes(ax)
    values = [start["value"] for start in result.starts]
    colors = [f"C{start['draw'] % 10}" for start in result.starts]
    ax.bar(range(1, len(values) + 1), values, **{"color": colors, **style})
    if result.stderr is not None:
        ax.axhline(result.value, color="0.3", linewidth=0.8)
        ax.axhspan(result.value - result.stderr, result.value + result.stderr, color="0.3", alpha=0.2, linewidth=0)
    ax.set(
        xlabel="start", ylabel="epsilon-sharpness (%)", xticks=range(1, len(values) + 1) if len(values) <= 20 else []
    )
    return ax


def plot_comparison(comparison: Comparison, *, ax: Axes | None = None, metric: str | None = None, **style: Any) -> Axes:
    """Draw one metric of each row as a bar: the mean, and every seed as a dot."""
    names = list(comparison.ratios)
    if metric is not None and metric not in names:
        raise ArgumentError(f"`metric` must be one of {', '.join(map(repr, names))}, got {metric!r}.")
    metric = names[0] if metric is None else metric
    ax = _axes(ax)
    for i, row in enumerate(comparison.rows):
        spread = row.metrics[metric]
        ax.bar(i, spread.mean, **{"color": f"C{i}", "alpha": 0.5, "width": 0.6, **style})
        ax.plot([i] * len(spread.values), spread.values, "o", color=f"C{i}", markersize=5)
    ax.set(xticks=range(len(comparison.rows)), ylabel=metric.replace("_", " "))
    ax.set_xticklabels([row.name for row in comparison.rows])
    return ax


def plot_layerwise(result: LayerwiseResult, *, ax: Axes | None = None, **style: Any) -> Axes:
    """Draw the metric of each layer as a bar, the worst layer first."""
    ax = _axes(ax)
    names = list(result)
    ax.barh(range(len(names)), [result[name].headline for name in names], **style)
    ax.set(yticks=range(len(names)), xlabel=str(result.settings.get("metric")).replace("_", " "))
    ax.set_yticklabels(names)
    ax.invert_yaxis()
    return ax


def plot_interpolation(result: InterpolationResult, *, ax: Axes | None = None, **style: Any) -> Axes:
    """Draw the training loss, and the test loss if there is one, along the path, on a logarithmic axis."""
    ax = _axes(ax)
    ax.plot(result.alphas, result.train_loss, **{"label": "training loss", **style})
    if result.test_loss is not None:
        ax.plot(result.alphas, result.test_loss, **{"linestyle": "--", "label": "test loss", **style})
    for end in (0, 1):
        ax.axvline(end, color="0.7", linewidth=0.8, zorder=0)
    ax.set(xlabel="alpha (0: first model, 1: second)", ylabel="loss", yscale="log")
    ax.legend()
    return ax


def plot_perturbation(result: PerturbationResult, *, ax: Axes | None = None, **style: Any) -> Axes:
    """Draw what each perturbation, or group of samples, gave as a dot, and the loss where there are none."""
    ax = _axes(ax)
    metric = str(result.settings.get("metric")).replace("_", " ")
    if result.samples is None:
        ax.bar([0, 1], [result.loss, result.loss if result.max_loss is None else result.max_loss], **style)
        ax.set(xticks=[0, 1], ylabel="loss")
        ax.set_xticklabels(["model", "perturbed"])
        return ax
    ax.plot(range(1, len(result.samples) + 1), result.samples, **{"linestyle": "", "marker": "o", **style})
    target = result.settings.get("target")  # of a search for the sigma at which it moves so far
    level = result.value if target is None else math.copysign(result.settings["deviation"], result.samples.mean())
    ax.axhline(level, color="0.7", linewidth=0.8, zorder=0)
    ylabel = metric if target is None else f"change of the {target} at sigma = {result.sigma:.3g}"
    ax.set(xlabel="perturbation" if result.max_loss is None else "group of samples", ylabel=ylabel)
    return ax


def plot_scalar(result: ScalarResult, *, ax: Axes | None = None, **style: Any) -> Axes:
    """Draw the number, with its standard error as a bar where it has one."""
    ax = _axes(ax)
    ax.errorbar([0], [result.value], yerr=[result.stderr or 0.0], **{"fmt": "o", "capsize": 4, **style})
    ax.set(xticks=[0])
    ax.set_xticklabels([str(result.settings.get("metric")).replace("_", " ")])
    return ax


def plot_report(report: Report, *, ax: Axes | None = None, **style: Any) -> Axes:
    """Draw every measure as a bar on a logarithmic axis; negative ones have none."""
    ax = _axes(ax)
    names = list(report)
    ax.barh(range(len(names)), [max(report[name].headline, 0.0) for name in names], **style)
    ax.set(yticks=range(len(names)), xscale="log", xlabel="value (each measure in its own unit)")
    ax.set_yticklabels(names)
    ax.invert_yaxis()
    return ax


def _axes(ax: Axes | None) -> Axes:
    """Return ``ax``, or the axes of a new figure."""
    if ax is not None:
        return ax
    try:
        import matplotlib.pyplot as plt
    except ImportError as error:
        raise SharpnessError('plots need matplotlib. Install it with: pip install "sharpness[plot]"') from error
    return plt.subplots(layout="constrained")[1]
