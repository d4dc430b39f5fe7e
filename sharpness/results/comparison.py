"""Models side by side, and on the way from one to another."""

from __future__ import annotations

import math
import os
import textwrap
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, final

import numpy as np
from tabulate import tabulate
from torch import Tensor

from sharpness._record import Record
from sharpness._write import write_text
from sharpness.results.comparison_lines import comparison_lines, least_certain
from sharpness.results.present import comparison_page
from sharpness.results.tidy import comparison_csv

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_SHOWN = 3  # metrics in a repr
_NAMED = 8  # rows in a repr
_WIDTH = 40  # of the names of quantities on a terminal


@final
@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class Spread(Record):
    """A number over several seeds.

    Attributes:
        mean: Mean over the seeds.
        std: Sample standard deviation; NaN for a single seed, or where a value is not finite.
        values: One number per seed.
    """

    mean: float
    std: float
    values: tuple[float, ...]

    @classmethod
    def of(cls, values: Iterable[float]) -> Spread:
        """Summarise ``values``, one per seed."""
        kept = tuple(float(value) for value in values)
        known = len(kept) > 1 and all(map(math.isfinite, kept))
        std = float(np.std(kept, ddof=1)) if known else math.nan
        if known and len(set(kept)) == 1:
            std = 0.0  # not the rounding of the mean
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
        loss_gap: The generalisation gap, test loss less training loss, seed by seed; ``None`` without test data.
        accuracy_gap: Training accuracy less test accuracy, likewise.
        epochs: Epochs that the training took; ``None`` for a model that was given trained.
        updates: Steps of the optimizer, likewise.
        seconds: Wall time of the training, likewise.
        samples: Samples that were processed, as often as they were, likewise.
        learning_rate: Learning rate of the first group of parameters, after a warm-up, likewise.
        weight_norm: Euclidean length of the parameters measured.
        logit_norm: Mean length of the logits of a sample of the training data, centred; ``None`` where there are no
            classes.
        distance_from_initial: Euclidean distance of the parameters measured from where the training started; ``None``
            where that is not known.
        gradient_norm: Length of the gradient of the training loss; ``None`` where the minimum was not checked.
        newton_decrease: By how much a Newton step would still lower the training loss, at least (see `compare`).
        least_curvature: Least curvature met on the way to that, an upper bound of the smallest eigenvalue.
        metrics: Name of each metric -> its value over the seeds; a metric that does not apply is left out.
        records: Name of each metric -> the record of each seed, with its doubt, price and provenance.
    """

    name: str
    train_loss: Spread
    test_loss: Spread | None = None
    train_accuracy: Spread | None = None
    test_accuracy: Spread | None = None
    loss_gap: Spread | None = None
    accuracy_gap: Spread | None = None
    epochs: Spread | None = None
    updates: Spread | None = None
    seconds: Spread | None = None
    samples: Spread | None = None
    learning_rate: Spread | None = None
    weight_norm: Spread | None = None
    logit_norm: Spread | None = None
    distance_from_initial: Spread | None = None
    gradient_norm: Spread | None = None
    newton_decrease: Spread | None = None
    least_curvature: Spread | None = None
    metrics: dict[str, Spread]
    records: dict[str, tuple[Record, ...]] = field(default_factory=dict)

    @property
    def doubts(self) -> dict[str, str]:
        """Return for each metric how far to trust its least certain measurement, in a few words."""
        return {name: worst.doubt for name, worst in ((n, least_certain(r)) for n, r in self.records.items()) if worst}

    def __repr__(self) -> str:
        shown = list(self.metrics.items())[:_SHOWN]
        values = "".join(f", {name}={spread!r}" for name, spread in shown)
        more = f", ... {len(self.metrics)} metrics" if len(self.metrics) > _SHOWN else ""
        return f"ComparisonRow({self.name!r}, train_loss={self.train_loss!r}{values}{more})"


@final
@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class Comparison(Record):
    """Several models, or batch sizes, measured the same way on the same data.

    Attributes:
        rows: One `ComparisonRow` per model or batch size.
        ratios: Name of each metric -> one `Spread` per row, of its ratios to the first row. Seeds are paired
            where the rows have equally many, so that the spread is that of the ratio; NaN where one has no value.
        ratio_intervals: Name of each metric -> the 95 % interval of each row's ratio to the first row: of the ratio of
            geometric means over several seeds, or of one seed's measurements; ``None`` where nothing is known.
        distances: ``(rows, rows)`` Euclidean distances between the parameters measured, in the mean over the seeds;
            ``None`` where the shapes differ.
        warnings: What makes the comparison unfair, in words.
        notes: What else to know before quoting it, likewise.
        seconds: Wall time, training included.
        settings: What the call resolved to.
    """

    rows: tuple[ComparisonRow, ...]
    ratios: dict[str, tuple[Spread, ...]]
    ratio_intervals: dict[str, tuple[tuple[float, float] | None, ...]] = field(default_factory=dict)
    distances: tuple[tuple[float | None, ...], ...] = ()
    warnings: tuple[str, ...]
    notes: tuple[str, ...] = ()
    seconds: float
    settings: dict[str, Any] = field(default_factory=dict)

    def __repr__(self) -> str:
        names = ", ".join(row.name for row in self.rows[:_NAMED]) + ", ..." * (len(self.rows) > _NAMED)
        last = ", ".join(f"{name} x{spreads[-1]!r}" for name, spreads in list(self.ratios.items())[:_SHOWN])
        more = f", ... {len(self.ratios)} metrics" if len(self.ratios) > _SHOWN else ""
        return f"Comparison([{names}]; last against first: {last}{more}; {len(self.warnings)} warnings)"

    def __str__(self) -> str:
        warnings, notes = (f"warning: {text}" for text in self.warnings), (f"note: {text}" for text in self.notes)
        return "\n".join([self.table(), *warnings, *notes])

    def _repr_html_(self) -> str:
        """Return the table and the warnings for a notebook."""
        return comparison_page(self, figures=False).fragment()

    def __getitem__(self, name: str) -> ComparisonRow:
        """Return the row of this name."""
        for row in self.rows:
            if row.name == str(name):
                return row
        raise KeyError(f"no row {name!r}; the rows are {[row.name for row in self.rows]}")

    def table(self, *, tablefmt: str = "simple") -> str:
        """Return the quantities as lines and the rows as columns, in any format that the package ``tabulate`` knows.

        Below each metric stand how far its least certain measurement can be trusted, and the ratio to the first row:
        the geometric mean over the seeds, with its 95 % interval.
        """
        headers = ["", *(row.name for row in self.rows)]
        lines = comparison_lines(self)
        if tablefmt == "simple":  # a terminal is narrow, and the other formats have no lines within a cell
            lines = [[_wrapped(line[0]), *line[1:]] for line in lines]
        return tabulate(lines, headers=headers, tablefmt=tablefmt, disable_numparse=True)

    def to_html(self, path: str | os.PathLike[str] | None = None) -> str:
        """Return the comparison as one self-contained page, and write it to ``path`` if there is one.

        Raises:
            ArgumentError: If the file cannot be written; an older one is then left as it was.
        """
        page = comparison_page(self).html()
        if path is not None:
            write_text(path, page)
        return page

    def to_csv(self, path: str | os.PathLike[str] | None = None) -> str:
        """Return one line per row, seed and quantity as CSV, and write it to ``path`` if there is one.

        The columns are ``row``, ``seed`` (0 for the first model of a row), ``quantity``, ``value``, and where a metric
        tells them ``stderr``, ``low`` and ``high`` (its interval), ``converged``, ``doubt`` (in words), ``passes`` and
        ``seconds``. What is NaN or not known is empty. Ratios are left out: they follow from the values.

        Raises:
            ArgumentError: If the file cannot be written; an older one is then left as it was.
        """
        text = comparison_csv(self)
        if path is not None:
            write_text(path, text)
        return text

    def plot(self, ax: Axes | None = None, *, metric: str | None = None, **style: Any) -> Axes:
        """Draw one metric of each row (the first if ``None``), or a field such as ``"test_accuracy"``, on ``ax``."""
        from sharpness.plotting import plot_comparison

        return plot_comparison(self, ax=ax, metric=metric, **style)

    def figure(self, **style: Any) -> Figure:
        """Draw all that is known of each row, one panel each, against the batch size where names are batch sizes."""
        from sharpness.plotting import plot_sweep

        return plot_sweep(self, **style)


def _wrapped(title: str) -> str:
    """Break a long title before its options, and where else it has to."""
    return title if len(title) <= _WIDTH else "\n".join(textwrap.wrap(title.replace("(", " (", 1), _WIDTH))


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
