"""A comparison as lines of text: a quantity each, with a cell for every row of the comparison."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

from sharpness.results.headline import interval_of, stderr_of

# The records call this file, so that it knows them by their fields only.
Comparison: TypeAlias = Any
ComparisonRow: TypeAlias = Any
Spread: TypeAlias = Any

_ESSENTIAL = ("a lower bound", "NOT converged")
_READABLE = 1e6
_QUANTITIES: dict[str, Callable[[ComparisonRow], Any]] = {
    "epochs": lambda row: row.epochs,
    "updates": lambda row: row.updates,
    "samples": lambda row: row.samples,
    "seconds": lambda row: row.seconds,
    "learning rate": lambda row: row.learning_rate,
    "train loss": lambda row: row.train_loss,
    "test loss": lambda row: row.test_loss,
    "loss gap (test - train)": lambda row: row.loss_gap,
    "train accuracy (%)": lambda row: in_percent(row.train_accuracy),
    "test accuracy (%)": lambda row: in_percent(row.test_accuracy),
    "accuracy gap (train - test, %)": lambda row: in_percent(row.accuracy_gap),
    "weight norm": lambda row: row.weight_norm,
    "logit norm": lambda row: row.logit_norm,
    "distance from initial": lambda row: row.distance_from_initial,
    "gradient norm": lambda row: row.gradient_norm,
    "Newton decrease (% of loss)": lambda row: newton_share(row),
}


def comparison_lines(comparison: Comparison) -> list[list[str]]:
    """Return a line for each quantity that is known of a row; below a metric its doubt, and its ratio to the first."""
    rows = comparison.rows
    lines = [[title, *(_text(cell(row)) for row in rows)] for title, cell in _QUANTITIES.items()]
    if len(rows) > 1 and comparison.distances:
        lines.append([f"distance from {rows[0].name}", "", *(_number(d) for d in comparison.distances[0][1:])])
    for name, ratios in comparison.ratios.items():
        lines.append([metric_title(name, rows), *(_text(row.metrics.get(name)) for row in rows)])
        lines.append(["(measured to)", *(_short(row.doubts.get(name, "")) for row in rows)])
        if len(rows) > 1:
            intervals = comparison.ratio_intervals.get(name, (None,) * len(rows))
            texts = [ratio_text(r, i) for r, i in zip(ratios, intervals, strict=True)]
            lines.append([f"(over {rows[0].name})", "", *texts[1:]])
    return [line for line in lines if any(line[1:])]


def metric_title(name: str, rows: Sequence[ComparisonRow]) -> str:
    """Return the name of a metric, with what makes it scale-free where the name does not say so."""
    records = next((row.records[name] for row in rows if row.records.get(name)), ())
    settings = getattr(records[0], "settings", {}) if records else {}
    said = [str(settings["adaptive"])] if settings.get("adaptive") else []
    said += ["normalised logits"] if settings.get("normalize_logits") else []
    return f"{name} [{', '.join(said)}]" if said and "(" not in name else name


def ratio_text(ratio: Spread, interval: tuple[float, float] | None) -> str:
    """Return a ratio as it goes with its interval: the geometric mean over the seeds, where it has one."""
    center = geometric_mean(ratio)
    if math.isnan(center):
        return ""
    if interval is None:
        return f"x{center:.4g}"
    low, high = interval
    if low == high:
        return f"x{center:.4g} (exact)"
    digits = _digits(high - low, center)
    return f"x{_rounded(center, digits)} ({_rounded(low, digits)} to {_rounded(high, digits)})"


def geometric_mean(ratio: Spread) -> float:
    """Return the geometric mean of positive ratios, the mean of others."""
    if ratio.values and all(value > 0 and math.isfinite(value) for value in ratio.values):
        return math.exp(sum(map(math.log, ratio.values)) / len(ratio.values))
    return float(ratio.mean)


def newton_share(row: ComparisonRow) -> Spread | None:
    """Return what a Newton step gains, in percent of the training loss; ``None`` where the loss is not positive."""
    if row.newton_decrease is None or min(row.train_loss.values) <= 0:
        return None
    pairs = zip(row.newton_decrease.values, row.train_loss.values, strict=True)
    return type(row.train_loss).of(100 * gain / loss for gain, loss in pairs)


def in_percent(spread: Spread | None) -> Spread | None:
    """Return a fraction in percent."""
    return None if spread is None else type(spread).of(100 * value for value in spread.values)


def least_certain(records: Sequence[Any]) -> Any:
    """Return the record of which least is known: one that did not converge, else the one of the widest doubt."""
    return max(records, key=lambda record: (not getattr(record, "converged", True), _width(record)), default=None)


def _width(record: Any) -> float:
    interval = interval_of(record)
    return stderr_of(record) or 0.0 if interval is None else interval[1] - interval[0]


def _digits(width: float, center: float) -> int:
    """Return how many significant digits show an interval."""
    if not width or not center:
        return 4
    return min(max(2 - math.floor(math.log10(abs(width / center))), 2), 6)


def _short(doubt: str) -> str:
    """Return a doubt without what it says about the value."""
    first, *others = doubt.split(", ")
    return ", ".join([first, *(part for part in others if part in _ESSENTIAL)])


def _rounded(value: float, digits: int) -> str:
    """Return a number to so many digits, without an exponent where that is readable."""
    text = f"{value:.{digits}g}"
    return f"{float(text):.0f}" if "e+" in text and value < _READABLE else text


def _text(cell: Any) -> str:
    return "" if cell is None else str(cell)


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"
