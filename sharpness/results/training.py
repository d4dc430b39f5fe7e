"""What curvature and noise say about training: batch sizes that pay, and steps that are stable."""

from __future__ import annotations

import math
import numbers
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, final

from torch import Tensor

from sharpness._record import Record
from sharpness.errors import ArgumentError
from sharpness.results.eigen import EigenResult

if TYPE_CHECKING:
    from matplotlib.axes import Axes


@final
@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class NoiseResult(Record):
    """How noisy the gradient of a mini-batch is against its mean.

    Attributes:
        value: The noise scale ``tr(Sigma) / |G|^2`` in samples: the batch size at which noise and gradient are equally
            long. Infinite where ``|G|^2`` cannot be told from zero, NaN where the noise is zero as well.
        stderr: Standard error of ``value``; infinite or NaN with it.
        interval: 95 % interval of ``value`` (Fieller's for a ratio); its upper end is infinite where ``value`` is.
        trace_covariance: Unbiased estimate of the trace of the covariance of the gradients of single samples.
        trace_stderr: Its standard error.
        gradient_norm_squared: Unbiased estimate of ``|G|^2``, the squared length of the mean gradient; it can be
            negative near a minimum.
        gradient_stderr: Its standard error.
        converged: Whether ``gradient_norm_squared`` can be told from zero, so that the ratio means something.
        batch_sizes: ``(m,)`` batch sizes at which the error of the gradient was measured.
        errors: ``(m,)`` root mean square of the length of that error, over batches of consecutive samples. Batches of
            sorted data are further from the mean than the formula says, and balanced ones nearer to it.
        errors_stderr: ``(m,)`` standard errors.
        num_samples: Samples that the estimates are of.
        num_evaluations: Gradients that were computed.
        num_passes: Passes over the data.
        seconds: Wall time.
        settings: What the call resolved to.
    """

    value: float
    stderr: float
    interval: tuple[float, float]
    trace_covariance: float
    trace_stderr: float
    gradient_norm_squared: float
    gradient_stderr: float
    converged: bool
    batch_sizes: Tensor
    errors: Tensor
    errors_stderr: Tensor
    num_samples: int
    num_evaluations: int
    num_passes: int
    seconds: float
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def headline(self) -> float:
        """Return the one number that stands for the record."""
        return self.value

    @property
    def doubt(self) -> str:
        """Return how far to trust the value, in a few words."""
        if self.converged:
            return f"± {self.stderr:.2g} (standard error)"
        if math.isnan(self.value):
            return "no gradient and no noise"
        return (
            f"at least {self.interval[0]:.3g}: |G|^2 = {self.gradient_norm_squared:.2g} ± {self.gradient_stderr:.1g} "
            "cannot be told from zero"
        )

    def standard_error(self, batch_size: int) -> float:
        r"""Return the root mean square error of the gradient of a mini-batch, :math:`\sqrt{\mathrm{tr}\,\Sigma / m}`.

        For ``m`` samples drawn with replacement, or from data without end; drawn without replacement from the ``N``
        samples that were measured, their gradient is nearer to that of all by the factor :math:`\sqrt{1 - m / N}`.

        Args:
            batch_size: ``m``.

        Raises:
            ArgumentError: If it is no whole number of at least 1.
        """
        if isinstance(batch_size, bool) or not isinstance(batch_size, numbers.Integral) or batch_size < 1:
            raise ArgumentError(f"`batch_size` must be a whole number of at least 1, got {batch_size!r}. Pass 32, say.")
        return math.sqrt(self.trace_covariance / int(batch_size))

    def __repr__(self) -> str:
        apart = " " if self.converged else ", "
        return (
            f"NoiseResult(noise scale {self.value:.4g}{apart}{self.doubt}; tr(Sigma) {self.trace_covariance:.4g}, "
            f"{self.num_samples} samples)"
        )

    def plot(self, ax: Axes | None = None, **style: Any) -> Axes:
        """Draw the error of the gradient against the batch size, measured and by the formula, and return the axes."""
        from sharpness.plotting import plot_noise

        return plot_noise(self, ax=ax, **style)


@final
@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class LearningRateResult(Record):
    """The largest stable learning rate, and how far the approximation behind it holds.

    Attributes:
        value: The largest step at which full-batch training is stable; infinite where no eigenvalue is positive.
        interval: Low and high end, from the interval of the eigenvalue.
        sharpness: The top eigenvalue with its doubt.
        loss: Loss of the model as it is.
        gradient_norm_squared: ``|g|^2``.
        directional_curvature: ``g'Hg / |g|^2``; NaN where the gradient is zero.
        steps: ``(m,)`` steps tried along the gradient, ascending.
        decrease: ``(m,)`` actual decrease of the loss at each, minus infinity where the loss is infinite or NaN.
        linear_decrease: ``(m,)`` what the gradient predicts, ``step |g|^2``.
        quadratic_decrease: ``(m,)`` what gradient and curvature predict, ``step |g|^2 - step^2 g'Hg / 2``.
        breakdown: Smallest step at which the actual decrease is less than half of the linear one; infinite if it is at
            none, NaN where there is no gradient, or rounding hides the decrease.
        quadratic_breakdown: Smallest step at which the actual decrease is off the quadratic one by more than half of
            the linear one, likewise.
        num_evaluations: Losses along the gradient.
        num_passes: Passes over the data.
        seconds: Wall time.
        settings: What the call resolved to.
    """

    value: float
    interval: tuple[float, float]
    sharpness: EigenResult
    loss: float
    gradient_norm_squared: float
    directional_curvature: float
    steps: Tensor
    decrease: Tensor
    linear_decrease: Tensor
    quadratic_decrease: Tensor
    breakdown: float
    quadratic_breakdown: float
    num_evaluations: int
    num_passes: int
    seconds: float
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def headline(self) -> float:
        """Return the one number that stands for the record."""
        return self.value

    @property
    def converged(self) -> bool:
        """Return whether the eigenvalue converged."""
        return self.sharpness.converged

    @property
    def doubt(self) -> str:
        """Return how far to trust the value, in a few words."""
        span = f"between {self.interval[0]:.4g} and {self.interval[1]:.4g}"
        return span if self.converged else f"{span}, NOT converged"

    def __repr__(self) -> str:
        return (
            f"LearningRateResult(limit {self.value:.4g}, {self.doubt}; quadratic up to a step of "
            f"{self.quadratic_breakdown:.3g}, linear up to {self.breakdown:.3g})"
        )

    def plot(self, ax: Axes | None = None, **style: Any) -> Axes:
        """Draw the decrease of the loss along the gradient, actual and predicted, and return the axes."""
        from sharpness.plotting import plot_learning_rate

        return plot_learning_rate(self, ax=ax, **style)
