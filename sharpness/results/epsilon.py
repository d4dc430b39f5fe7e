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
        value: ``100 (max_loss - loss) / (1 + loss)``, in percent; over several random subspaces the mean of theirs.
        loss: Loss of the model as it is.
        max_loss: Largest loss evaluated in any box.
        stderr: Standard error of the mean over subspace draws; ``None`` where there are not several.
        draws: The value of each random subspace.
        starts: One dict per start: its ``draw``, ``max_loss`` and ``value`` reached from it, ``iterations``,
            ``climbs``, ``evaluations``, and the solver's last ``message``.
        num_evaluations: Evaluations of loss and gradient, each one pass over the data.
        num_passes: Passes over the data.
        seconds: Wall time.
        settings: What the call resolved to.
    """

    value: float
    loss: float
    max_loss: float
    stderr: float | None = None
    draws: tuple[float, ...] = ()
    starts: tuple[dict[str, Any], ...]
    num_evaluations: int
    num_passes: int
    seconds: float
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def headline(self) -> float:
        """Return the percentage, the one number that stands for the record."""
        return self.value

    @property
    def doubt(self) -> str:
        """Return how far to trust the value, in a few words."""
        return f"{'' if self.stderr is None else f'± {self.stderr:.2g} (standard error), '}a lower bound"

    def __repr__(self) -> str:
        many = len(self.draws) > 1
        values = self.draws if many else [start["value"] for start in self.starts]
        found = ", ".join(f"{value:.4g}" for value in values)
        spread = "" if self.stderr is None else f" ± {self.stderr:.2g}"
        dim = self.settings.get("subspace_dim")
        where = "" if dim is None else f" in {dim} dimensions"
        return (
            f"EpsilonSharpnessResult({self.value:.4g}{spread} % at epsilon={self.settings.get('epsilon'):g}{where}, "
            f"a lower bound; {'draws' if many else 'starts'} reached {found}; {self.num_evaluations} evaluations)"
        )

    def plot(self, ax: Axes | None = None, **style: Any) -> Axes:
        """Draw what each start reached on ``ax`` (a new one if ``None``) and return the axes."""
        from sharpness.plotting import plot_epsilon_sharpness

        return plot_epsilon_sharpness(self, ax=ax, **style)
