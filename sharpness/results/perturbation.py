"""What perturbing the weights does to the loss; and single numbers with their doubt."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, final

from torch import Tensor

from sharpness._record import Record

if TYPE_CHECKING:
    from matplotlib.axes import Axes


@final
@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class PerturbationResult(Record):
    """A measure of the loss in a neighbourhood of the weights.

    Attributes:
        value: The measure, as its function defines it.
        loss: Loss of the model as it is.
        max_loss: Largest loss found, the mean over groups of the largest of each; ``None`` where none is sought.
        stderr: Standard error of ``value`` over the random perturbations; ``None`` where nothing is drawn.
        sigma: The size of perturbation that was found or used; ``None`` for a maximum.
        accuracy: Accuracy of the model as it is; ``None`` where there are no classes, or it is not looked at.
        samples: One number per random perturbation (the two signs of it averaged), or per group of samples.
        converged: Whether what was sought was found.
        num_evaluations: Evaluations of the loss, or of loss and gradient, of the whole data or of a group.
        num_passes: Passes over the data.
        seconds: Wall time.
        settings: What the call resolved to.
    """

    value: float
    loss: float
    max_loss: float | None = None
    stderr: float | None = None
    sigma: float | None = None
    accuracy: float | None = None
    samples: Tensor | None = None
    converged: bool = True
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
        found = [f"± {self.stderr:.2g} (standard error)"] if self.stderr is not None else []
        found += ["a lower bound"] if self.max_loss is not None else []
        return ", ".join(found + ["NOT converged"] * (not self.converged))

    def __repr__(self) -> str:
        named = f"{self.settings.get('metric')} {self.value:.4g}"
        apart = " " if self.stderr is not None else ", "
        return (
            f"PerturbationResult({named}{apart if self.doubt else ''}{self.doubt}; loss {self.loss:.4g}; "
            f"{self.num_evaluations} evaluations)"
        )

    def plot(self, ax: Axes | None = None, **style: Any) -> Axes:
        """Draw what each perturbation, or group, gave on ``ax`` (a new one if ``None``) and return the axes."""
        from sharpness.plotting import plot_perturbation

        return plot_perturbation(self, ax=ax, **style)


@final
@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class ScalarResult(Record):
    """One number, with its doubt where it is an estimate.

    Attributes:
        value: The number.
        stderr: Its standard error; ``None`` where nothing is drawn at random, 0 where it was summed up entry by entry.
        interval: Low and high end of where it lies, at 95 % where there is a ``stderr``; ``None`` where it is exact up
            to rounding, or none is given.
        samples: One number per random vector; ``None`` where nothing is drawn.
        about: What of the model was measured, or what the number is not, in a few words; ``None`` where that is plain.
        critical_step: The step at which the loss rises above its present value, for `critical_sharpness`.
        directional_curvature: ``d'Hd / g'd`` beside it, if asked for.
        steps: ``(m,)`` all steps that were tried, ascending, likewise.
        losses: ``(m,)`` the loss at each of them.
        num_forward_passes: Forward passes that this took.
        converged: Whether what was sought was found, as narrowly as asked for.
        num_evaluations: Evaluations or products spent.
        num_passes: Passes over the data.
        seconds: Wall time.
        settings: What the call resolved to.
    """

    value: float
    stderr: float | None = None
    interval: tuple[float, float] | None = None
    samples: Tensor | None = None
    about: str | None = None
    critical_step: float | None = None
    directional_curvature: float | None = None
    steps: Tensor | None = None
    losses: Tensor | None = None
    num_forward_passes: int | None = None
    converged: bool = True
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
        if self.interval is not None and self.stderr:
            found = f"± {(self.interval[1] - self.interval[0]) / 2:.2g} at 95 %"
            return found if self.converged else f"{found}, NOT converged"
        if not self.converged:
            return "NOT converged"
        if self.interval is not None and self.stderr is None:
            return f"between {self.interval[0]:.4g} and {self.interval[1]:.4g}"
        found = f"± {self.stderr:.2g} (standard error)" if self.stderr else "exact up to rounding"
        return found if self.about is None else f"{found}, {self.about}"

    def __repr__(self) -> str:
        apart = " " if self.stderr else ", "
        return (
            f"ScalarResult({self.settings.get('metric')} {self.value:.4g}{apart}{self.doubt}; "
            f"{self.num_evaluations} evaluations)"
        )

    def plot(self, ax: Axes | None = None, **style: Any) -> Axes:
        """Draw the number with its standard error, or the losses it was read off, and return the axes."""
        from sharpness.plotting import plot_scalar

        return plot_scalar(self, ax=ax, **style)
