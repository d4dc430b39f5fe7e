"""One function per kind of result."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np

from sharpness.errors import ArgumentError
from sharpness.plotting.axes import given_or_new
from sharpness.results import (
    Comparison,
    EigenResult,
    EpsilonSharpnessResult,
    InterpolationResult,
    LandscapeResult,
    LayerwiseResult,
    LearningRateResult,
    NoiseResult,
    PerturbationResult,
    Report,
    ScalarResult,
)
from sharpness.results.headline import interval_of
from sharpness.results.tidy import quantities

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def plot_eigenvalues(result: EigenResult, *, ax: Axes | None = None, **style: Any) -> Axes:
    """Draw the eigenvalues in their order, with the certified intervals as bars."""
    ax = given_or_new(ax)
    half = (result.interval[:, 1] - result.interval[:, 0]) / 2
    positions = range(1, len(result.eigenvalues) + 1)
    ax.errorbar(positions, result.eigenvalues, yerr=half, **{"fmt": "o", "capsize": 4, **style})
    ax.axhline(0, color="0.7", linewidth=0.8, zorder=0)
    ax.set(xlabel="index", ylabel="eigenvalue", xticks=list(positions) if len(positions) <= 20 else [])
    return ax


def plot_epsilon_sharpness(result: EpsilonSharpnessResult, *, ax: Axes | None = None, **style: Any) -> Axes:
    """Draw the sharpness that each start reached, the starts of a subspace in one colour, and the mean over these."""
    ax = given_or_new(ax)
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
    """Draw one metric, or another quantity, of each row as a bar: the mean, and every seed as a dot.

    What is not finite is left out: its dot, and the bar of a row that has one.
    """
    known = [dict(quantities(row)) for row in comparison.rows]
    names = list(dict.fromkeys([*comparison.ratios, *(name for found in known for name in found)]))
    if metric is not None and metric not in names:
        raise ArgumentError(f"`metric` must be one of {', '.join(map(repr, names))}, got {metric!r}.")
    metric = names[0] if metric is None else metric
    ax = given_or_new(ax)
    for i, found in enumerate(known):
        spread = found.get(metric)
        if spread is None:  # it does not apply to this one
            continue
        if math.isfinite(spread.mean):
            ax.bar(i, spread.mean, **{"color": f"C{i}", "alpha": 0.5, "width": 0.6, **style})
        finite = [value for value in spread.values if math.isfinite(value)]
        ax.plot([i] * len(finite), finite, "o", color=f"C{i}", markersize=5)
    ax.set(xticks=range(len(comparison.rows)), ylabel=metric.replace("_", " "))
    ax.set_xticklabels([row.name for row in comparison.rows])
    return ax


def plot_layerwise(result: LayerwiseResult, *, ax: Axes | None = None, **style: Any) -> Axes:
    """Draw the metric of each layer as a bar with its interval, the worst layer first; what is not finite has none."""
    ax = given_or_new(ax)
    names = list(result)
    values = [_finite(result[name].headline) for name in names]
    ends = [interval_of(result[name]) or (value, value) for name, value in zip(names, values, strict=True)]
    bars = [
        [max(_finite(sign * (pair[end] - value)), 0.0) for pair, value in zip(ends, values, strict=True)]
        for end, sign in ((0, -1), (1, 1))
    ]
    if any(map(any, bars)):
        style = {"xerr": bars, "capsize": 3, **style}
    ax.barh(range(len(names)), values, **style)
    ax.set(yticks=range(len(names)), xlabel=str(result.settings.get("metric")).replace("_", " "))
    ax.set_yticklabels(names)
    ax.invert_yaxis()
    return ax


def plot_interpolation(result: InterpolationResult, *, ax: Axes | None = None, **style: Any) -> Axes:
    """Draw the training loss, and the test loss if there is one, along the path.

    The axis is logarithmic, unless a loss is not above zero, or none is finite.
    """
    ax = given_or_new(ax)
    ax.plot(result.alphas, result.train_loss, **{"label": "training loss", **style})
    if result.test_loss is not None:
        ax.plot(result.alphas, result.test_loss, **{"linestyle": "--", "label": "test loss", **style})
    for end in (0, 1):
        ax.axvline(end, color="0.7", linewidth=0.8, zorder=0)
    losses = [result.train_loss] if result.test_loss is None else [result.train_loss, result.test_loss]
    finite = [loss for series in losses for loss in series.tolist() if math.isfinite(loss)]
    scale = "log" if finite and min(finite) > 0 else "linear"
    ax.set(xlabel="alpha (0: first model, 1: second)", ylabel="loss", yscale=scale)
    ax.legend()
    return ax


def plot_perturbation(result: PerturbationResult, *, ax: Axes | None = None, **style: Any) -> Axes:
    """Draw what each perturbation, or group of samples, gave as a dot, and the loss where there are none."""
    ax = given_or_new(ax)
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
    """Draw the number, with its standard error as a bar where it has one; or the losses along a line it comes from."""
    ax = given_or_new(ax)
    if result.steps is not None and result.losses is not None:
        ax.plot(result.steps, result.losses, **{"marker": "o", **style})
        ax.axhline(result.losses[0].item(), color="0.7", linewidth=0.8, zorder=0)
        if result.critical_step is not None and math.isfinite(result.critical_step):
            ax.axvline(result.critical_step, color="C1", label=f"critical step: {result.critical_step:.3g}")
            ax.legend()
        ax.set(xlabel="step", ylabel="loss")
        return ax
    ax.errorbar([0], [result.value], yerr=[result.stderr or 0.0], **{"fmt": "o", "capsize": 4, **style})
    ax.set(xticks=[0])
    ax.set_xticklabels([str(result.settings.get("metric")).replace("_", " ")])
    return ax


def plot_landscape(result: LandscapeResult, *, ax: Axes | None = None, **style: Any) -> Axes:
    """Draw the loss along a line as a curve, or over a plane as contours, with the model in the middle.

    What is not finite is left out of the curve or surface, and marked by crosses on a plane.
    """
    ax = given_or_new(ax)
    names = [f"direction {i + 1} (length {length:.3g})" for i, length in enumerate(result.direction_norms.tolist())]
    if result.loss.ndim == 1:
        ax.plot(result.coordinates, result.loss, **style)
        ax.plot([0], [result.center], "o", color="C1")
        ax.set(xlabel=names[0], ylabel="loss")
        return ax
    surface = np.ma.masked_invalid(result.loss.T.numpy())  # the first direction goes to the right
    if surface.count():
        drawn = ax.contourf(result.coordinates, result.coordinates, surface, **{"levels": 20, **style})
        ax.figure.colorbar(drawn, ax=ax, label="loss")
    rows, columns = np.nonzero(np.ma.getmaskarray(surface))
    ax.plot(result.coordinates[columns], result.coordinates[rows], "x", color="0.5", markersize=4)
    ax.plot([0], [0], "o", color="C1")
    ax.set(xlabel=names[0], ylabel=names[1])
    return ax


def plot_learning_rate(result: LearningRateResult, *, ax: Axes | None = None, **style: Any) -> Axes:
    """Draw the decrease of the loss against the step along the gradient, as predicted and as it is.

    What is below zero is a rise. The axis is cut where the loss rises by more than the largest predicted decrease.
    """
    ax = given_or_new(ax)
    ax.plot(result.steps, result.linear_decrease, color="0.6", linestyle=":", label="predicted by the gradient")
    ax.plot(result.steps, result.quadratic_decrease, color="0.4", linestyle="--", label="and the curvature")
    ax.plot(result.steps, result.decrease, **{"marker": "o", "label": "actual", **style})
    for name, step in (("limit", result.value), ("breakdown", result.breakdown)):
        if math.isfinite(step):
            ax.axvline(step, color="C1" if name == "limit" else "C2", linewidth=0.8, label=f"{name}: {step:.3g}")
    ax.axhline(0, color="0.7", linewidth=0.8, zorder=0)
    if len(result.steps):
        highest = result.quadratic_decrease.max().item()
        tallest = highest if highest > 0 else result.linear_decrease.max().item()
        ax.set(xscale="log")
        if math.isfinite(1.5 * tallest):
            ax.set(ylim=(-tallest, 1.5 * tallest))
    ax.set(xlabel="step along the gradient", ylabel="decrease of the loss")
    ax.legend()
    return ax


def plot_noise(result: NoiseResult, *, ax: Axes | None = None, **style: Any) -> Axes:
    """Draw the error of mini-batch gradients against the batch size, as measured and by the formula.

    Where it falls below the length of the gradient, at the noise scale, larger batches cease to pay.
    """
    ax = given_or_new(ax)
    sizes = [float(size) for size in result.batch_sizes] or [1.0]
    known = math.isfinite(result.value) and result.value > 0
    ends = (min(sizes), max(sizes[-1], 4 * result.value) if known else sizes[-1])
    ax.plot(ends, [math.sqrt(result.trace_covariance / size) for size in ends], color="0.4", label="√(tr Σ / m)")
    bars = {"linestyle": "", "marker": "o", "capsize": 4, "label": "measured", **style}
    ax.errorbar(sizes[: len(result.errors)], result.errors, yerr=result.errors_stderr, **bars)
    if result.gradient_norm_squared > 0:
        ax.axhline(math.sqrt(result.gradient_norm_squared), color="C1", linestyle=":", label="length of the gradient")
    if known:
        ax.axvline(result.value, color="C1", label=f"returns diminish: {result.value:.3g}")
    ax.set(xlabel="batch size m", ylabel="error of the gradient", xscale="log")
    ax.set_yscale("log" if result.trace_covariance > 0 else "linear")
    ax.legend()
    return ax


def plot_report(report: Report, *, ax: Axes | None = None, **style: Any) -> Axes:
    """Draw every measure as a bar on a logarithmic axis; those that are negative or not finite have none."""
    ax = given_or_new(ax)
    names = list(report)
    values = [max(_finite(report[name].headline), 0.0) for name in names]
    ax.barh(range(len(names)), values, **style)
    scale = "log" if any(value > 0 for value in values) else "linear"
    ax.set(yticks=range(len(names)), xscale=scale, xlabel="value (each measure in its own unit)")
    ax.set_yticklabels(names)
    ax.invert_yaxis()
    return ax


def _finite(value: float) -> float:
    """Return the length of a bar: 0 for a value that is not finite, for which there is none."""
    return value if math.isfinite(value) else 0.0
