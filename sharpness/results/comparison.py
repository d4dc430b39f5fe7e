"""Models side by side, and on the way from one to another."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, final

import numpy as np
from tabulate import tabulate
from torch import Tensor

from sharpness._record import Record

if TYPE_CHECKING:
    from matplotlib.axes import Axes


@final
@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class Spread(Record):
    """A number over several seeds.

    Attributes:
        mean: Mean over the seeds.
        std: Sample standard deviation; NaN for a single seed.
        values: One number per seed.
    """

    mean: float
    std: float
    values: tuple[float, ...]

    @classmethod
    def of(cls, values: Iterable[float]) -> Spread:
        """Summarise ``values``, one per seed."""
        kept = tuple(float(value) for value in values)
        std = float(np.std(kept, ddof=1)) if len(kept) > 1 else math.nan
        return cls(mean=float(np.mean(kept)) if kept else math.nan, std=std, values=kept)

    def __repr__(self) -> str:
        if not math.isfinite(self.std) or not math.isfinite(self.mean) or not self.std:
            return f"{self.mean:.4g}"
        decimals = 1 - math.floor(math.log10(self.std))  # two digits of the spread, and the mean to the same place
        if -4 < decimals < 8:
            return f"{self.mean:.{max(decimals, 0)}f} ± {self.std:.{max(decimals, 0)}f}"
        return f"{self.mean:.3e} ± {self.std:.1e}"


@final
@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class ComparisonRow(Record):
    """One model, or one batch size over all its seeds.

    Attributes:
        name: The model's name, or the batch size.
        train_loss: Mean loss over the training data.
        test_loss: Mean loss over the test data; ``None`` without any.
        train_accuracy: Fraction of the training data classified correctly; ``None`` where there are no classes.
        test_accuracy: Likewise for the test data.
        epochs: Epochs that the training took; ``None`` for a model that was given trained.
        updates: Steps of the optimizer, likewise.
        seconds: Wall time of the training, likewise.
        metrics: Name of each metric -> its value over the seeds.
        records: Name of each metric -> the record of each seed, with its doubt, price and provenance.
    """

    name: str
    train_loss: Spread
    test_loss: Spread | None = None
    train_accuracy: Spread | None = None
    test_accuracy: Spread | None = None
    epochs: Spread | None = None
    updates: Spread | None = None
    seconds: Spread | None = None
    metrics: dict[str, Spread]
    records: dict[str, tuple[Record, ...]] = field(default_factory=dict)

    def __repr__(self) -> str:
        values = ", ".join(f"{name}={spread!r}" for name, spread in self.metrics.items())
        return f"ComparisonRow({self.name!r}, train_loss={self.train_loss!r}, {values})"


@final
@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class Comparison(Record):
    """Several models, or batch sizes, measured the same way on the same data.

    Attributes:
        rows: One `ComparisonRow` per model or batch size.
        ratios: Name of each metric -> one `Spread` per row, of its ratios to the first row. Seeds are paired
            where the rows have equally many, so that the spread is that of the ratio.
        warnings: What makes the comparison unfair, in words.
        seconds: Wall time, training included.
        settings: What the call resolved to.
    """

    rows: tuple[ComparisonRow, ...]
    ratios: dict[str, tuple[Spread, ...]]
    warnings: tuple[str, ...]
    seconds: float
    settings: dict[str, Any] = field(default_factory=dict)

    def __repr__(self) -> str:
        names = ", ".join(row.name for row in self.rows)
        last = ", ".join(f"{name} x{spreads[-1]!r}" for name, spreads in self.ratios.items())
        return f"Comparison([{names}]; last against first: {last}; {len(self.warnings)} warnings)"

    def __str__(self) -> str:
        return "\n".join([self.table(), *(f"warning: {text}" for text in self.warnings)])

    def __getitem__(self, name: str) -> ComparisonRow:
        """Return the row of this name."""
        for row in self.rows:
            if row.name == str(name):
                return row
        raise KeyError(f"no row {name!r}; the rows are {[row.name for row in self.rows]}")

    def table(self, *, tablefmt: str = "simple") -> str:
        """Return the rows as a table, in any format that the package ``tabulate`` knows."""
        columns: Mapping[str, list[Any]] = {
            "": [row.name for row in self.rows],
            "epochs": [row.epochs for row in self.rows],
            "updates": [row.updates for row in self.rows],
            "train loss": [row.train_loss for row in self.rows],
            "test loss": [row.test_loss for row in self.rows],
            "train accuracy": [_percent(row.train_accuracy) for row in self.rows],
            "test accuracy": [_percent(row.test_accuracy) for row in self.rows],
            **{name: [row.metrics.get(name) for row in self.rows] for name in self.ratios},
        }
        filled = {title: cells for title, cells in columns.items() if any(cell is not None for cell in cells)}
        body = list(map(list, zip(*filled.values(), strict=True)))
        if len(self.rows) > 1:
            last = {name: spreads[-1] for name, spreads in self.ratios.items()}
            titles = list(filled)[1:]
            body.append([f"{self.rows[-1].name} / {self.rows[0].name}", *(last.get(title, "") for title in titles)])
        text = [["" if cell is None else str(cell) for cell in line] for line in body]
        return tabulate(text, headers=list(filled), tablefmt=tablefmt, disable_numparse=True)

    def plot(self, ax: Axes | None = None, *, metric: str | None = None, **style: Any) -> Axes:
        """Draw one metric (the first if ``None``) of each row on ``ax`` and return the axes."""
        from sharpness.plotting import plot_comparison

        return plot_comparison(self, ax=ax, metric=metric, **style)


def _percent(spread: Spread | None) -> str | None:
    if spread is None:
        return None
    scaled = Spread.of(100 * value for value in spread.values)
    return f"{scaled!r} %"


@final
@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class InterpolationResult(Record):
    """Loss and accuracy along a path between two models.

    Attributes:
        alphas: ``(m,)`` positions; 0 is the first model, 1 the second.
        train_loss: ``(m,)`` on the loader.
        train_accuracy: ``(m,)`` on the loader; ``None`` where there are no classes.
        test_loss: ``(m,)`` on the test loader; ``None`` without one.
        test_accuracy: Likewise.
        barrier: Largest excess of the training loss, for alpha in [0, 1], over the straight line between the
            losses of the two models.
        num_passes: Passes over the data.
        seconds: Wall time.
        settings: What the call resolved to.
    """

    alphas: Tensor
    train_loss: Tensor
    train_accuracy: Tensor | None = None
    test_loss: Tensor | None = None
    test_accuracy: Tensor | None = None
    barrier: float
    num_passes: int
    seconds: float
    settings: dict[str, Any] = field(default_factory=dict)

    def __repr__(self) -> str:
        low, high = self.alphas.min().item(), self.alphas.max().item()
        return f"InterpolationResult(barrier {self.barrier:.4g}, {len(self.alphas)} points in [{low:g}, {high:g}])"

    def plot(self, ax: Axes | None = None, **style: Any) -> Axes:
        """Draw the losses along the path on ``ax`` (a new one if ``None``) and return the axes."""
        from sharpness.plotting import plot_interpolation

        return plot_interpolation(self, ax=ax, **style)
