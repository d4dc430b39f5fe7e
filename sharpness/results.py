"""The records that every function returns.

Each has four groups of fields under the same names everywhere: the value; the doubt (``residuals``,
``interval``, ``stderr``, ``converged``); the price (``num_matvecs`` or ``num_evaluations``,
``num_passes``, ``seconds``); the provenance (``settings``: what was resolved from the call).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, final

import numpy as np
import torch
from tabulate import tabulate
from torch import Tensor

from sharpness._record import Record
from sharpness.errors import ArgumentError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_SHOWN = 6  # eigenvalues in a repr

__all__ = [
    "Comparison",
    "ComparisonRow",
    "EigenResult",
    "EpsilonSharpnessResult",
    "InterpolationResult",
    "Record",
    "Spread",
]


@final
@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class EigenResult(Record):
    """Eigenvalues of a symmetric operator and how far to trust them.

    Attributes:
        eigenvalues: ``(k,)`` in the order that ``which`` asks for, float64 on the CPU.
        residuals: ``(k,)`` upper bounds of ``|A v - lambda v|`` for the unit vectors found and the operator as it is
            computed, with an allowance for rounding of a few ``eps |A|``.
        interval: ``(k, 2)`` low and high; each row contains an eigenvalue of the operator *for certain*
            (every symmetric matrix has an eigenvalue within the residual of any pair). To each side it reaches as
            far as the residual or, for a float32 model, the rounding measured against float64 if that is more.
        kato_temple: ``(k, 2)`` tighter rows that hold if the eigenvalues found are all there are nearby:
            the residual squared over the gap to the neighbours found. NaN where the gap does not allow it.
        converged: Whether every residual is at most ``tol * abs(eigenvalue)``, or at the level of rounding.
        num_matvecs: Products spent with the operator.
        num_passes: Passes over the data, the products included; 0 for an operator without data.
        seconds: Wall time.
        eigenvectors: ``(k, n)`` unit rows in the order of ``named_parameters``, or ``None``.
        layout: Name and shape of each parameter in a row of ``eigenvectors``.
        settings: What the call resolved to.
    """

    eigenvalues: Tensor
    residuals: Tensor
    interval: Tensor
    kato_temple: Tensor
    converged: bool
    num_matvecs: int
    num_passes: int
    seconds: float
    eigenvectors: Tensor | None = None
    layout: tuple[tuple[str, tuple[int, ...]], ...] | None = None
    settings: dict[str, Any] = field(default_factory=dict)

    bulky: ClassVar[frozenset[str]] = frozenset({"eigenvectors", "layout"})

    def __repr__(self) -> str:
        half = ((self.interval[:, 1] - self.interval[:, 0]) / 2).tolist()
        found = list(zip(self.eigenvalues.tolist(), half, strict=True))
        pairs = ", ".join(f"{value:.4g} ± {width:.1g}" for value, width in found[:_SHOWN])
        if len(found) > _SHOWN:
            pairs += f", ... {len(found)} in all"
        state = "converged" if self.converged else "NOT converged"
        return f"EigenResult([{pairs}], {state} in {self.num_matvecs} matvecs)"

    def named_vector(self, i: int) -> dict[str, Tensor]:
        """Return eigenvector ``i`` as a dict from parameter names to tensors of the parameters' shapes.

        Raises:
            ArgumentError: If the eigenvectors were not kept, or belong to an operator without named parameters.
        """
        if self.eigenvectors is None or self.layout is None:
            raise ArgumentError(
                "this result holds no named eigenvectors. Call top_eigenvalues(..., vectors=True) to keep them."
            )
        sizes = [math.prod(shape) for _, shape in self.layout]
        pieces = torch.split(self.eigenvectors[i], sizes)
        return {name: piece.view(shape) for (name, shape), piece in zip(self.layout, pieces, strict=True)}

    def plot(self, ax: Axes | None = None, **style: Any) -> Axes:
        """Draw the eigenvalues with their intervals on ``ax`` (a new one if ``None``) and return the axes."""
        from sharpness.plotting import plot_eigenvalues

        return plot_eigenvalues(self, ax=ax, **style)


@final
@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class EpsilonSharpnessResult(Record):
    """Keskar's epsilon-sharpness, a lower bound of the maximum that its definition asks for.

    Attributes:
        value: ``100 (max_loss - loss) / (1 + loss)``, in percent.
        loss: Loss of the model as it is.
        max_loss: Largest loss evaluated in the box.
        stderr: Standard error over subspace draws; ``None`` in the full space, where nothing is drawn.
        starts: One dict per start: ``max_loss`` and ``value`` reached from it, ``iterations``, ``climbs``,
            ``evaluations``, and the solver's last ``message``.
        num_evaluations: Evaluations of loss and gradient, each one pass over the data.
        num_passes: Passes over the data.
        seconds: Wall time.
        settings: What the call resolved to.
    """

    value: float
    loss: float
    max_loss: float
    stderr: float | None = None
    starts: tuple[dict[str, Any], ...]
    num_evaluations: int
    num_passes: int
    seconds: float
    settings: dict[str, Any] = field(default_factory=dict)

    def __repr__(self) -> str:
        found = ", ".join(f"{start['value']:.4g}" for start in self.starts)
        return (
            f"EpsilonSharpnessResult({self.value:.4g} % at epsilon={self.settings.get('epsilon'):g}, "
            f"a lower bound; starts reached {found}; {self.num_evaluations} evaluations)"
        )

    def plot(self, ax: Axes | None = None, **style: Any) -> Axes:
        """Draw what each start reached on ``ax`` (a new one if ``None``) and return the axes."""
        from sharpness.plotting import plot_epsilon_sharpness

        return plot_epsilon_sharpness(self, ax=ax, **style)


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


def as_float64(values: Any) -> Tensor:
    """Return ``values`` as a float64 tensor on the CPU, the form of all small results."""
    return torch.as_tensor(values, dtype=torch.float64, device="cpu")
