"""All that a comparison knows, against the batch size."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from sharpness.plotting.axes import draw_spreads, pyplot
from sharpness.results import Comparison, Spread

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_COLUMNS = 3
_COSTS = ("epochs", "updates", "samples", "seconds")
_TITLES = {"samples": "samples processed", "seconds": "seconds of training"}


def plot_sweep(comparison: Comparison, **style: Any) -> Figure:
    """Draw test accuracy, each metric, and what the training took, against the batch size on a logarithmic axis.

    Points are means over the seeds, bars their standard deviations; a single seed has none. What no row knows has no
    panel, and a value that is not finite no point. Names that are no batch sizes stand side by side.
    """
    panels = _panels(comparison)
    names = [row.name for row in comparison.rows]
    sizes = [int(name) for name in names if name.isdecimal() and int(name) > 0]
    columns = min(_COLUMNS, len(panels))
    lines = math.ceil(len(panels) / columns)
    figure: Figure
    figure, axes = pyplot().subplots(
        lines, columns, figsize=(3.6 * columns, 2.8 * lines), squeeze=False, layout="constrained"
    )
    for ax, (title, spreads) in zip(axes.flat, panels.items(), strict=False):
        _draw(ax, sizes if len(sizes) == len(names) else None, names, spreads, style)
        positive = all(spread is None or spread.mean > 0 for spread in spreads)
        ax.set(title=_TITLES.get(title, title.replace("_", " ")))
        ax.set_yscale("log" if title in _COSTS and positive else "linear")
    for ax in axes.flat[len(panels) :]:
        ax.remove()
    return figure


def _panels(comparison: Comparison) -> dict[str, list[Spread | None]]:
    """Return what is drawn, by title; the training loss stands in where there is nothing else."""
    rows = comparison.rows
    found: dict[str, list[Spread | None]] = {"test accuracy": [row.test_accuracy for row in rows]}
    found.update({name: [row.metrics.get(name) for row in rows] for name in comparison.ratios})
    found.update({name: [getattr(row, name) for row in rows] for name in _COSTS})
    known = {title: spreads for title, spreads in found.items() if any(spread is not None for spread in spreads)}
    return known or {"training loss": [row.train_loss for row in rows]}


def _draw(
    ax: Axes, sizes: list[int] | None, names: Sequence[str], spreads: Sequence[Spread | None], style: dict[str, Any]
) -> None:
    """Draw one quantity: a line over batch sizes in ascending order, points over names."""
    places = range(len(names)) if sizes is None else sizes
    draw_spreads(ax, places, spreads, **{"fmt": "o" if sizes is None else "o-", **style})
    if sizes is None:
        ax.set(xticks=list(places), xlim=(-0.5, len(names) - 0.5))
        ax.set_xticklabels(list(names))
        return
    ax.set_xscale("log", base=2)
    ax.set(xlabel="batch size", xticks=sizes, xlim=(min(sizes) / 1.5, max(sizes) * 1.5))
    ax.set_xticklabels([str(size) for size in sizes])
    ax.minorticks_off()
