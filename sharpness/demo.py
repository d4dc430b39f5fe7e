"""The main job on real data: is the minimum that a large batch finds sharper than a small batch's?

Everything goes through the public functions; this file only chooses the numbers and draws the figure.
"""

from __future__ import annotations

import json
import math
import os
import textwrap
from typing import Any

from scipy.stats import t as student_t
from tabulate import tabulate
from torch import nn

from sharpness._checks import check_writable
from sharpness._write import write_text
from sharpness.comparison import compare_batch_sizes, interpolate
from sharpness.datasets import digits
from sharpness.results import Comparison, InterpolationResult, Spread
from sharpness.results.comparison_lines import in_percent
from sharpness.results.picture import check_picture, save_figure

SMALL, LARGE = 16, 1000
_EIGENVALUE = "top_eigenvalues"


def make_model() -> nn.Module:
    """Return a new network for the digits, 64-64-64-10 with ReLU: 8 970 parameters."""
    return nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))


def run(
    *,
    seeds: int = 3,
    json_path: str | os.PathLike[str] | None = None,
    plot_path: str | os.PathLike[str] | None = None,
    html_path: str | os.PathLike[str] | None = None,
    progress: bool | None = None,
) -> tuple[Comparison, InterpolationResult]:
    """Train, compare, interpolate; print the table and what was found; write the files.

    Raises:
        ArgumentError: If a file cannot be written; found before anything is trained.
    """
    for name, path in (("json_path", json_path), ("plot_path", plot_path), ("html_path", html_path)):
        if path is not None:
            check_writable(name, path)
    if plot_path is not None:
        check_picture(plot_path)
    train_set, test_set = digits()
    models: dict[tuple[int, int], nn.Module] = {}
    comparison = compare_batch_sizes(
        make_model,
        train_set,
        test_set,
        nn.CrossEntropyLoss(),
        batch_sizes=(SMALL, LARGE),
        seeds=seeds,
        progress=progress,
        on_trained=lambda size, seed, model: models.update({(size, seed): model}),
    )
    line = interpolate(
        models[SMALL, 0],
        models[LARGE, 0],
        [train_set.tensors],
        nn.CrossEntropyLoss(),
        test_loader=[test_set.tensors],
        progress=progress,
    )
    print(_table(comparison))
    for warning in comparison.warnings:
        print(f"warning: {warning}")
    print("\n" + textwrap.fill(conclusion(comparison), width=100))
    if json_path is not None:
        document = {"comparison": comparison.to_dict(), "interpolation": line.to_dict()}
        write_text(json_path, json.dumps(document, indent=1, allow_nan=False) + "\n")
        print(f"\nnumbers: {json_path}")
    if plot_path is not None:
        save_figure(_draw(comparison, line), plot_path)
        print(f"figure: {plot_path}")
    if html_path is not None:
        comparison.to_html(html_path)
        print(f"page: {html_path}")
    return comparison, line


def _table(comparison: Comparison) -> str:
    """Return the quantities as lines and the batch sizes as columns, which fits a terminal."""
    small, large = comparison.rows
    lines: list[tuple[str, Any, Any, Any]] = [
        ("epochs", small.epochs, large.epochs, ""),
        ("updates", small.updates, large.updates, ""),
        ("training loss", small.train_loss, large.train_loss, ""),
        ("test accuracy (%)", in_percent(small.test_accuracy), in_percent(large.test_accuracy), ""),
    ]
    titles = {
        _EIGENVALUE: "top Hessian eigenvalue",
        "epsilon_sharpness(epsilon=0.001)": "epsilon-sharpness at 1e-3 (%)",
        "epsilon_sharpness(epsilon=0.0005)": "epsilon-sharpness at 5e-4 (%)",
        "average_case_sharpness": "average case, relative to weights",
    }
    for metric, title in titles.items():
        lines.append((title, small.metrics[metric], large.metrics[metric], comparison.ratios[metric][-1]))
        if metric == _EIGENVALUE:
            widths = [f"± {_half_width(row.records[metric]):.1g}" for row in comparison.rows]
            lines.append(("  certified to", widths[0], widths[1], ""))
    headers = ["", *(f"batch {row.name}" for row in comparison.rows), "large / small"]
    count = len(small.train_loss.values)
    table = tabulate([[str(cell) for cell in line] for line in lines], headers=headers, disable_numparse=True)
    note = (
        f"mean ± standard deviation over {count} seeds; each ratio is taken seed by seed" if count > 1 else "one seed"
    )
    return f"{table}\n({note})"


def _half_width(records: Any) -> float:
    """Return the widest of the certified intervals, halved."""
    return max(float(record.interval[0, 1] - record.interval[0, 0]) / 2 for record in records)


def conclusion(comparison: Comparison) -> str:
    """Return two sentences that say what was found, whichever way it went."""
    small, large = comparison.rows
    ratio = comparison.ratios[_EIGENVALUE][-1]
    every = all(value > 1 for value in ratio.values)
    none = all(value <= 1 for value in ratio.values)
    if len(ratio.values) == 1:
        first = f"With this one seed the large batch's top eigenvalue is {ratio.mean:.1f} times that of the small batch"
    elif every:
        first = (
            f"With every seed the large batch ended in the sharper minimum: its top eigenvalue is on average "
            f"{ratio.mean:.1f} times that of the small batch ({min(ratio.values):.1f} to {max(ratio.values):.1f})"
        )
    elif none:
        first = f"With no seed was the large batch's minimum the sharper one (eigenvalue ratio {ratio})"
    else:
        first = f"Which minimum is sharper depends on the seed (eigenvalue ratio {ratio})"
    first += f", at training losses of {large.train_loss.mean:.2g} against {small.train_loss.mean:.2g}."
    if small.test_accuracy is None or large.test_accuracy is None:
        return first
    pairs = zip(small.test_accuracy.values, large.test_accuracy.values, strict=True)
    gaps = [100 * (a - b) for a, b in pairs]
    gap, count = Spread.of(gaps), len(gaps)
    if count < 2:
        second = f"The test accuracies differ by {abs(gap.mean):.2f} percentage points, from a single seed"
        return f"{first} {second}; one small data set and one architecture prove no law."
    half = float(student_t.ppf(0.975, count - 1)) * gap.std / math.sqrt(count)
    size = f"{abs(gap.mean):.2f} percentage points (95 % interval ± {half:.2f} from {count} seeds)"
    if abs(gap.mean) <= half:
        second = f"The test accuracies differ by {size}, which so few seeds cannot tell from nothing"
    else:
        winner = "flatter" if (gap.mean > 0) == (ratio.mean > 1) else "sharper"
        second = f"The {winner} minimum is the better one on the test set, by {size}"
    return f"{first} {second}; one small data set and one architecture prove no law."


def _draw(comparison: Comparison, line: InterpolationResult) -> Any:
    """Return a figure: the eigenvalues beside the loss along the line between the minima."""
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    comparison.plot(left, metric=_EIGENVALUE)
    left.set(xlabel="batch size", ylabel="top Hessian eigenvalue", title="sharpness of the minima")
    line.plot(right)
    right.set(xlabel=f"alpha (0: batch {SMALL}, 1: batch {LARGE})", title="on the line between them")
    plt.close(figure)
    return figure
