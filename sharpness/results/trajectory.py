"""How sharpness moves while a model is trained."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, final

from tabulate import tabulate
from torch import Tensor

from sharpness._record import Record
from sharpness.errors import ArgumentError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_SHOWN = 20  # rows of a table
_LEVELS = (5.0, 2.0, 1.0)  # of the loss, times powers of ten


@final
@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class TrajectoryResult(Record):
    """Loss and sharpness at several steps of one training. NaN stands for what could not be measured.

    Attributes:
        steps: ``(m,)`` updates done when each measurement was made, ascending.
        loss: ``(m,)`` loss over the whole loader, in the mode of the measurement.
        gradient_norms: ``(m,)`` length of its gradient.
        metrics: Name of each metric -> ``(m,)`` its values.
        intervals: Name of each metric -> ``(m, 2)`` its own interval; the value and a standard error to each side where
            that is all it has; NaN without either.
        converged: Name of each metric -> ``(m,)`` whether it reached what it seeks; true for what seeks nothing.
        test_loss: ``(m,)`` loss over the test loader; ``None`` without one.
        test_accuracy: ``(m,)`` likewise; ``None`` also where there are no classes.
        learning_rates: ``(m,)`` of the optimizer's parameter group with the largest; NaN without an optimizer.
        limits: ``(m,)`` largest eigenvalue at which full-batch training with that learning rate is stable; NaN where
            there is no such formula (any optimizer but `torch.optim.SGD`).
        num_passes: Passes over the data, for all measurements together.
        seconds: Wall time of the measurements, likewise.
        settings: What the calls resolved to.
    """

    steps: Tensor
    loss: Tensor
    gradient_norms: Tensor
    metrics: dict[str, Tensor]
    intervals: dict[str, Tensor]
    converged: dict[str, Tensor]
    test_loss: Tensor | None = None
    test_accuracy: Tensor | None = None
    learning_rates: Tensor
    limits: Tensor
    num_passes: int
    seconds: float
    settings: dict[str, Any] = field(default_factory=dict)

    def __repr__(self) -> str:
        count = len(self.steps)
        if not count:
            return "TrajectoryResult(nothing measured yet)"
        name = self.metric()
        first, last = (f"{self.metrics[name][i].item():.4g} at loss {self.loss[i].item():.4g}" for i in (0, -1))
        limit = self.limits[-1].item()
        stable = f" (stable below {limit:.4g})" if math.isfinite(limit) else ""
        span = f"{count} measurements in steps {int(self.steps[0])} to {int(self.steps[-1])}"
        return f"TrajectoryResult({name} {first} -> {last}{stable}; {span})"

    def metric(self, name: str | None = None) -> str:
        """Return the name of a metric that was tracked, the first if ``None``.

        Raises:
            ArgumentError: If it was not.
        """
        names = list(self.metrics)
        if name is not None and name not in names:
            raise ArgumentError(f"`metric` must be one of {', '.join(map(repr, names))}, got {name!r}.")
        return names[0] if name is None else name

    def at_loss(self, level: float, metric: str | None = None) -> float:
        """Return a metric where the loss first falls to ``level``, interpolated linearly in the logarithm of the loss.

        Args:
            level: Loss, above zero.
            metric: Name of the metric, the first if ``None``.

        Returns:
            The value; NaN if the loss starts below ``level``, does not reach it, or was not finite just before.

        Raises:
            ArgumentError: If the metric was not tracked.
        """
        values, losses = self.metrics[self.metric(metric)].tolist(), self.loss.tolist()
        for i, loss in enumerate(losses):
            if loss == level:
                return float(values[i])
            if loss < level:
                if i == 0 or loss <= 0 or not math.isfinite(losses[i - 1]):
                    return math.nan
                share = math.log(losses[i - 1] / level) / math.log(losses[i - 1] / loss)
                return float(values[i - 1] + share * (values[i] - values[i - 1]))
        return math.nan

    def table(self, *, tablefmt: str = "simple") -> str:
        """Return the measurements as a table (20 of them at most), in any format that ``tabulate`` knows."""
        columns: dict[str, Tensor | None] = {
            "step": self.steps,
            "loss": self.loss,
            "test loss": self.test_loss,
            "test accuracy": self.test_accuracy,
            "gradient norm": self.gradient_norms,
            **self.metrics,
            "learning rate": self.learning_rates,
            "limit": self.limits,
        }
        filled = {
            title: values.tolist()
            for title, values in columns.items()
            if values is not None and (title == "step" or not bool(values.isnan().all()))
        }
        count = len(self.steps)
        shown = range(count) if count <= _SHOWN else {round(i * (count - 1) / (_SHOWN - 1)) for i in range(_SHOWN)}
        rows = [
            [f"{cell:.4g}" if isinstance(cell, float) else str(cell) for cell in row]
            for i, row in enumerate(zip(*filled.values(), strict=True))
            if i in shown
        ]
        return tabulate(rows, headers=list(filled), tablefmt=tablefmt, disable_numparse=True)

    def plot(self, ax: Axes | None = None, *, metric: str | None = None, loss: bool = True, **style: Any) -> Axes:
        """Draw a metric (the first if ``None``) against the step on ``ax`` and return the axes.

        With the limit of stability as a line, and the ``loss`` on a second axis.
        """
        from sharpness.plotting import plot_trajectory

        return plot_trajectory(self, ax=ax, metric=metric, loss=loss, **style)


@final
@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class TrajectoryComparison(Record, Mapping[int, tuple[TrajectoryResult, ...]]):
    """Trainings with several batch sizes: a mapping from the batch size to its trajectories, one per seed.

    Attributes:
        curves: Batch size -> its trajectories.
        reached: Batch size -> whether each training reached the stop loss.
        num_passes: Passes over the data for all measurements together.
        seconds: Wall time, training included.
        settings: What the call resolved to.
    """

    curves: dict[int, tuple[TrajectoryResult, ...]]
    reached: dict[int, tuple[bool, ...]]
    num_passes: int
    seconds: float
    settings: dict[str, Any] = field(default_factory=dict)

    def __getitem__(self, batch_size: int) -> tuple[TrajectoryResult, ...]:
        """Return the trajectories of this batch size, one per seed."""
        return self.curves[batch_size]

    def __iter__(self) -> Iterator[int]:
        """Iterate over the batch sizes."""
        return iter(self.curves)

    def __len__(self) -> int:
        """Return the number of batch sizes."""
        return len(self.curves)

    def __repr__(self) -> str:
        name = self._first.metric()
        ends = ", ".join(
            f"{size}: {' '.join(f'{run.metrics[name][-1].item():.4g}' for run in runs[:4])}"
            for size, runs in list(self.items())[:6]
        )
        missed = sum(not reached for flags in self.reached.values() for reached in flags)
        return f"TrajectoryComparison(last {name} by batch size: {ends}{f'; {missed} missed the loss' * bool(missed)})"

    @property
    def _first(self) -> TrajectoryResult:
        return next(iter(self.curves.values()))[0]

    def levels(self) -> list[float]:
        """Return round losses, 5, 2 and 1 times powers of ten, descending, that some training passed through."""
        losses = [loss for runs in self.values() for run in runs for loss in run.loss.tolist() if math.isfinite(loss)]
        positive = [loss for loss in losses if loss > 0]
        if not positive:
            return []
        low, high = min(positive), max(positive)
        powers = range(math.floor(math.log10(high)), math.floor(math.log10(low)) - 1, -1)
        return [factor * 10.0**power for power in powers for factor in _LEVELS if low <= factor * 10.0**power <= high]

    def table(self, *, metric: str | None = None, tablefmt: str = "simple") -> str:
        """Return a metric (the first if ``None``) of each batch size at the same losses, the mean over the seeds.

        Args:
            metric: Name of the metric.
            tablefmt: Any format that the package ``tabulate`` knows.

        Raises:
            ArgumentError: If the metric was not tracked.
        """
        name = self._first.metric(metric)
        rows = []
        for level in self.levels():
            found = [[run.at_loss(level, name) for run in runs] for runs in self.values()]
            known = [[value for value in values if not math.isnan(value)] for values in found]
            rows.append([f"{level:g}", *(f"{sum(values) / len(values):.4g}" if values else "" for values in known)])
        headers = ["training loss", *(f"batch size {size}" for size in self)]
        return tabulate(rows, headers=headers, tablefmt=tablefmt, disable_numparse=True)

    def plot(self, ax: Axes | None = None, *, metric: str | None = None, **style: Any) -> Axes:
        """Draw a metric (the first if ``None``) against the training loss on ``ax`` and return the axes."""
        from sharpness.plotting import plot_trajectories

        return plot_trajectories(self, ax=ax, metric=metric, **style)
