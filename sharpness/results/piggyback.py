"""Large-batch trainings that start where a small-batch training has got to."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, final

from tabulate import tabulate

from sharpness._record import Record
from sharpness.results.comparison import ComparisonRow
from sharpness.results.comparison_lines import in_percent

if TYPE_CHECKING:
    from matplotlib.axes import Axes


@final
@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class PiggybackResult(Record):
    """Minima that a large batch finds from the iterates of a small batch.

    Attributes:
        switch_epochs: ``(m,)`` epochs of the small batch before the large one takes over, ascending; 0 is the initial
            model, so that the large batch does it all.
        small: ``(m,)`` rows of the small-batch iterates; what they took is up to there.
        large: ``(m,)`` rows of the large-batch solutions that start there; what they took is the large batch's alone.
        metric: Name of the sharpness in the rows.
        warnings: Trainings that missed the stop loss, and metrics that did not converge, in words.
        seconds: Wall time, training included.
        settings: What the call resolved to.
    """

    switch_epochs: tuple[int, ...]
    small: tuple[ComparisonRow, ...]
    large: tuple[ComparisonRow, ...]
    metric: str
    warnings: tuple[str, ...]
    seconds: float
    settings: dict[str, Any] = field(default_factory=dict)

    def __repr__(self) -> str:
        first, last = (self.large[i].metrics[self.metric] for i in (0, -1))
        return (
            f"PiggybackResult({self.metric} of the large batch: {first!r} from epoch {self.switch_epochs[0]}, {last!r} "
            f"from epoch {self.switch_epochs[-1]} of the small one; {len(self.warnings)} warnings)"
        )

    def __str__(self) -> str:
        return "\n".join([self.table(), *(f"warning: {text}" for text in self.warnings)])

    def table(self, *, tablefmt: str = "simple") -> str:
        """Return a line for each switch, in any format that the package ``tabulate`` knows."""

        def accuracy(row: ComparisonRow) -> str:
            found = in_percent(row.test_accuracy)
            return "" if found is None else f"{found!r} %"

        def cells(row: ComparisonRow) -> list[str]:
            return [repr(row.train_loss), accuracy(row), repr(row.metrics[self.metric])]

        titles = ("train loss", "test accuracy", self.metric)
        headers = ["switch epoch", *(f"{size}: {t}" for size in ("small", "large") for t in titles), "large: updates"]
        body = [
            [str(epoch), *cells(small), *cells(large), str(large.updates)]
            for epoch, small, large in zip(self.switch_epochs, self.small, self.large, strict=True)
        ]
        return tabulate(body, headers=headers, tablefmt=tablefmt, disable_numparse=True)

    def plot(self, ax: Axes | None = None, **style: Any) -> Axes:
        """Draw sharpness, and test accuracy on a second axis, against the switch, and return the axes."""
        from sharpness.plotting import plot_piggyback

        return plot_piggyback(self, ax=ax, **style)
