"""The diagonal of a matrix, entry by entry, each with its doubt."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, final

import torch
from torch import Tensor

from sharpness._record import Record
from sharpness.errors import ArgumentError

if TYPE_CHECKING:
    from matplotlib.axes import Axes


@final
@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class DiagonalResult(Record):
    """An estimate of the diagonal of a symmetric operator.

    Attributes:
        value: ``(n,)`` the estimate of each entry, in the order of ``named_parameters``.
        stderr: ``(n,)`` its standard error; 0 where the entries were computed one by one.
        trace: Sum of the entries.
        trace_stderr: Its standard error, from the sums over single random vectors.
        sum_of_squares: Sum of the squared entries, free of what their noise adds to it.
        num_samples: Random vectors, each of which gave one estimate of the whole diagonal.
        num_matvecs: Products spent with the operator.
        num_passes: Passes over the data; 0 for an operator without data.
        seconds: Wall time.
        layout: Name and shape of each parameter in ``value``.
        settings: What the call resolved to.
    """

    value: Tensor
    stderr: Tensor
    trace: float
    trace_stderr: float
    sum_of_squares: float
    num_samples: int
    num_matvecs: int
    num_passes: int
    seconds: float
    layout: tuple[tuple[str, tuple[int, ...]], ...] | None = None
    settings: dict[str, Any] = field(default_factory=dict)

    bulky: ClassVar[frozenset[str]] = frozenset({"value", "stderr", "layout"})

    @property
    def headline(self) -> float:
        """Return the sum of the entries, the one number that stands for the record."""
        return self.trace

    @property
    def headline_stderr(self) -> float:
        """Return the standard error of the headline."""
        return self.trace_stderr

    @property
    def doubt(self) -> str:
        """Return the error of the sum, and that of the entries as a whole relative to them, in a few words.

        100 % says that the errors are as large as the entries, or larger.
        """
        error = torch.linalg.vector_norm(self.stderr.double()).item()
        if not error:
            return "exact up to rounding"
        whole = max(math.sqrt(max(self.sum_of_squares, 0.0)), error)
        return f"± {self.trace_stderr:.2g} (standard error), entries ± {100 * error / whole:.0f} % as a whole"

    def __repr__(self) -> str:
        apart = " " if self.stderr.any() else ", "
        return (
            f"DiagonalResult({len(self.value)} entries of sum {self.trace:.4g}{apart}{self.doubt}; "
            f"{self.num_matvecs} matvecs)"
        )

    def named_value(self) -> dict[str, Tensor]:
        """Return the estimates as a dict from parameter names to tensors of the parameters' shapes.

        Raises:
            ArgumentError: If the operator has no named parameters.
        """
        return self._named(self.value)

    def named_stderr(self) -> dict[str, Tensor]:
        """Return the standard errors, likewise.

        Raises:
            ArgumentError: If the operator has no named parameters.
        """
        return self._named(self.stderr)

    def _named(self, vector: Tensor) -> dict[str, Tensor]:
        if self.layout is None:
            raise ArgumentError(
                "this result is of an operator without named parameters. Call diagonal(model, loader) for a model's."
            )
        pieces = torch.split(vector, [math.prod(shape) for _, shape in self.layout])
        return {name: piece.view(shape) for (name, shape), piece in zip(self.layout, pieces, strict=True)}

    def plot(self, ax: Axes | None = None, **style: Any) -> Axes:
        """Draw the entries in ascending order on ``ax`` (a new one if ``None``) and return the axes."""
        from sharpness.plotting import plot_diagonal

        return plot_diagonal(self, ax=ax, **style)
