"""The loss on a line or a plane through a model."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, final

from torch import Tensor

from sharpness._record import Record

if TYPE_CHECKING:
    from matplotlib.axes import Axes


@final
@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class LandscapeResult(Record):
    """The loss on a grid of one or two directions through a model.

    Attributes:
        coordinates: ``(steps,)`` positions along each direction, in its own length; 0 is the model.
        loss: ``(steps,)``, or ``(steps, steps)`` the first direction from row to row; NaN or infinite where it is.
        accuracy: Likewise; ``None`` where there are no classes.
        center: Loss of the model itself.
        direction_norms: ``(dims,)`` lengths of the directions.
        cosine: Cosine of the angle between the two directions; ``None`` for one.
        eigenvalues: ``(dims,)`` curvature along the directions where they are eigenvectors, else ``None``.
        num_evaluations: Evaluations of the loss.
        num_passes: Passes over the data.
        seconds: Wall time.
        settings: What the call resolved to.
    """

    coordinates: Tensor
    loss: Tensor
    accuracy: Tensor | None = None
    center: float
    direction_norms: Tensor
    cosine: float | None = None
    eigenvalues: Tensor | None = None
    num_evaluations: int
    num_passes: int
    seconds: float
    settings: dict[str, Any] = field(default_factory=dict)

    def __repr__(self) -> str:
        finite = self.loss[self.loss.isfinite()]
        span = f"{finite.min().item():.4g} to {finite.max().item():.4g}" if len(finite) else "nowhere finite"
        bad = self.loss.numel() - len(finite)
        angle = "" if self.cosine is None else f", cosine {self.cosine:.2g}"
        return (
            f"LandscapeResult({' x '.join(map(str, self.loss.shape))} points along {self.settings.get('directions')}; "
            f"loss {self.center:.4g} at the model, {span}{f', {bad} not finite' * (bad > 0)}{angle})"
        )

    def plot(self, ax: Axes | None = None, **style: Any) -> Axes:
        """Draw the loss as a curve, or as contours over the plane, on ``ax`` and return the axes."""
        from sharpness.plotting import plot_landscape

        return plot_landscape(self, ax=ax, **style)
