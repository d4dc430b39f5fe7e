"""A trace, with an interval that is true."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, final

from torch import Tensor

from sharpness._record import Record

if TYPE_CHECKING:
    from matplotlib.axes import Axes


@final
@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class TraceResult(Record):
    """An estimate of the trace of a symmetric operator.

    Attributes:
        value: The estimate; unbiased where the number of products was given.
        stderr: Its standard error over the random vectors; 0 where the trace was summed up entry by entry.
        interval: Low and high: holds the trace with a probability of 95 %, by Student's t, and an allowance for
            rounding.
        samples: ``(m,)`` one estimate per random vector; ``value`` is their mean. Those of `xtrace` share a basis, so
            they are not independent of each other, and ``stderr`` says what their mean is worth.
        converged: Whether half the interval is at most ``tol`` times the trace, or times the Frobenius norm where the
            trace is less than that (which only cancellation can do).
        num_matvecs: Products spent with the operator.
        num_passes: Passes over the data; 0 for an operator without data.
        seconds: Wall time.
        settings: What the call resolved to.
    """

    value: float
    stderr: float
    interval: tuple[float, float]
    samples: Tensor
    converged: bool
    num_matvecs: int
    num_passes: int
    seconds: float
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def headline(self) -> float:
        """Return the trace, the one number that stands for the record."""
        return self.value

    @property
    def doubt(self) -> str:
        """Return how far to trust the value, in a few words."""
        exact = "exact up to rounding"
        found = f"± {half_width(self.interval):.2g} at 95 %" if self.stderr else exact
        return found if self.converged else f"{found}, NOT converged"

    def __repr__(self) -> str:
        apart = " " if self.stderr else ", "
        return f"TraceResult({self.value:.4g}{apart}{self.doubt}; {self.num_matvecs} matvecs)"

    def plot(self, ax: Axes | None = None, **style: Any) -> Axes:
        """Draw the estimates, their mean and its interval on ``ax`` (a new one if ``None``) and return the axes."""
        from sharpness.plotting import plot_trace

        return plot_trace(self, ax=ax, **style)


def half_width(interval: tuple[float, float]) -> float:
    """Return half the width of an interval."""
    width = interval[1] - interval[0]
    return math.inf if math.isnan(width) else width / 2
