"""The density of a whole spectrum."""

from __future__ import annotations

import math
import numbers
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, final

import torch
from torch import Tensor

from sharpness._checks import check_count
from sharpness._record import Record
from sharpness.errors import ArgumentError

if TYPE_CHECKING:
    from matplotlib.axes import Axes


@final
@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class DensityResult(Record):
    """The spectral density of a symmetric operator, by Gauss quadrature for random vectors.

    Each draw, a random unit vector, gives a rule of nodes and weights: the sum of ``weights * f(nodes)`` estimates the
    mean of ``f`` over all eigenvalues, without bias for polynomials of degree up to twice the steps less one. Their
    mean over the draws is the estimate, their spread its error.

    Attributes:
        grid: ``(g,)`` points.
        density: ``(g,)`` density there, of mass 1: the nodes of all draws, each a normal kernel of width ``sigma``.
        nodes: ``(num_draws, num_steps)`` in ascending order; a draw that has exhausted its space earlier repeats its
            last node with weight 0.
        weights: ``(num_draws, num_steps)``, of sum 1 for each draw.
        residuals: ``(num_draws, num_steps)`` an eigenvalue lies within this of each node, for certain.
        sigma: Standard deviation of the kernel.
        outliers: ``(k,)`` eigenvalues that are separated from the bulk, in descending order. Repeated ones count once.
        outlier_residuals: ``(k,)`` an eigenvalue lies within this of each, for certain.
        certified: ``(k,)`` whether this is less than half the distance to what was found next to it, so that it is
            certain that there is an eigenvalue of its own here. That the gap to the bulk is empty is likely only.
        n: Number of eigenvalues in all.
        num_matvecs: Products spent with the operator.
        num_passes: Passes over the data; 0 for an operator without data.
        seconds: Wall time.
        settings: What the call resolved to.
    """

    grid: Tensor
    density: Tensor
    nodes: Tensor
    weights: Tensor
    residuals: Tensor
    sigma: float
    outliers: Tensor
    outlier_residuals: Tensor
    certified: Tensor
    n: int
    num_matvecs: int
    num_passes: int
    seconds: float
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def headline(self) -> float:
        """Return the largest node, which is close to the largest eigenvalue and stands for the record."""
        return self.nodes.max().item()

    @property
    def interval(self) -> tuple[float, float]:
        """Return low and high about the largest node; an eigenvalue lies between them, for certain."""
        last = self.nodes.argmax()
        node, residual = self.nodes.flatten()[last].item(), self.residuals.flatten()[last].item()
        return node - residual, node + residual

    @property
    def num_outliers(self) -> int:
        """Return how many eigenvalues are separated from the bulk."""
        return len(self.outliers)

    @property
    def doubt(self) -> str:
        """Return how far to trust the largest node, and what the density is made of, in a few words."""
        low, high = self.interval
        return f"± {(high - low) / 2:.1g} (for certain), {self._extent}"

    @property
    def _extent(self) -> str:
        draws, steps = self.nodes.shape
        asked = self.settings.get("num_steps", steps)
        text = f"{draws} draw{'s' * (draws > 1)} x {steps} step{'s' * (steps > 1)}"
        return text if asked <= steps else f"{text}, all that the spectrum has, of {asked}"

    def moment(self, power: int) -> tuple[float, float]:
        """Return the mean of the eigenvalues to this power, and its standard error, NaN for a single draw.

        The first is the trace over ``n``, the second the squared Frobenius norm over ``n``.

        Raises:
            ArgumentError: If the power is not a whole number of at least 0.
        """
        power = check_count("power", power, low=0)
        return _mean((self.weights * self.nodes**power).sum(1))

    def mass_above(self, x: float) -> float:
        """Return the fraction of all eigenvalues that are larger than ``x``, by the nodes without their kernels.

        Raises:
            ArgumentError: If ``x`` is not a number.
        """
        return self._above(x)[0]

    def mass_above_stderr(self, x: float) -> float:
        """Return the standard error of `mass_above`, NaN for a single draw.

        Raises:
            ArgumentError: If ``x`` is not a number.
        """
        return self._above(x)[1]

    def _above(self, x: Any) -> tuple[float, float]:
        if isinstance(x, bool) or not isinstance(x, numbers.Real) or math.isnan(x):
            raise ArgumentError(f"`x` must be a number, got {x!r}. Pass a value on the axis of the eigenvalues.")
        return _mean((self.weights * (self.nodes > float(x))).sum(1))

    def __repr__(self) -> str:
        sure = int(self.certified.sum())
        low, high = self.nodes.min().item(), self.nodes.max().item()
        return (
            f"DensityResult([{low:.4g}, {high:.4g}], {self.num_outliers} outlier{'s' * (self.num_outliers != 1)} "
            f"({sure} certified), {self._extent}; {self.num_matvecs} matvecs)"
        )

    def plot(self, ax: Axes | None = None, **style: Any) -> Axes:
        """Draw the density on ``ax`` (a new one if ``None``) and return the axes.

        ``log=False`` draws it on a linear axis, ``eigenvalues=`` marks some (an `EigenResult` or numbers; without it
        the outliers), ``lr=`` draws the line at 2 / learning rate, beyond which gradient descent is unstable.
        """
        from sharpness.plotting import plot_density

        return plot_density(self, ax=ax, **style)


def _mean(values: Tensor) -> tuple[float, float]:
    """Return the mean over the draws and its standard error."""
    error = values.std().item() / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return torch.mean(values).item(), error
