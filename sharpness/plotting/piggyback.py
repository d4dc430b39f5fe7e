"""Large-batch solutions against the small-batch epochs before them (Keskar et al. 2017, Figure 5)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sharpness.plotting.axes import draw_spreads, given_or_new
from sharpness.results import PiggybackResult

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def plot_piggyback(result: PiggybackResult, *, ax: Axes | None = None, **style: Any) -> Axes:
    """Draw the sharpness of iterates and solutions on ``ax``, and their test accuracy on a second axis to the right.

    Points are means over the seeds, bars their standard deviations. What is not finite has no point.
    """
    ax = given_or_new(ax)
    rows = {"small-batch iterate": result.small, "large-batch solution": result.large}
    for i, (label, group) in enumerate(rows.items()):
        spreads = [row.metrics[result.metric] for row in group]
        look = {"color": f"C{i}", "marker": "o", "label": f"{label}: sharpness", **style}
        draw_spreads(ax, result.switch_epochs, spreads, **look)
    ax.set(xlabel="epochs of the small batch", ylabel=result.metric.replace("_", " "))
    lines, labels = ax.get_legend_handles_labels()
    if all(row.test_accuracy is not None for group in rows.values() for row in group):
        right = ax.twinx()
        for i, (label, group) in enumerate(rows.items()):
            accuracies = [row.test_accuracy for row in group if row.test_accuracy is not None]
            look = {"color": f"C{i}", "marker": "s", "linestyle": "--", "label": f"{label}: accuracy"}
            draw_spreads(right, result.switch_epochs, accuracies, **look)
        right.set(ylabel="test accuracy")
        more = right.get_legend_handles_labels()
        lines, labels = lines + more[0], labels + more[1]
    ax.legend(lines, labels)
    return ax
