"""Epsilon-sharpness, and what each start reached."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, final

from sharpness._record import Record

if TYPE_CHECKING:
    from matplotlib.axes import Axes


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

    @property
    def headline(self) -> float:
        """Return the percentage, the one number that stands for the record."""
        return self.value

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
