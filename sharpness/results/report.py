"""Every measure of one model."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, final

from tabulate import tabulate

from sharpness._record import Record
from sharpness._write import write_text
from sharpness.results.present import report_page
from sharpness.results.tidy import mapping_csv

if TYPE_CHECKING:
    from matplotlib.axes import Axes


@final
@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class Report(Record, Mapping[str, Any]):
    """Every measure of one model, each with its doubt: a mapping from the metric's name to its record.

    Attributes:
        records: Name of each metric -> its record.
        skipped: Name of each metric that does not apply to this model, loss or data -> why.
        loss: Loss of the model.
        accuracy: Its accuracy; ``None`` where there are no classes.
        num_passes: Passes over the data for all metrics together.
        seconds: Wall time.
        settings: What the call resolved to.
    """

    records: dict[str, Any]
    skipped: dict[str, str]
    loss: float
    accuracy: float | None = None
    num_passes: int
    seconds: float
    settings: dict[str, Any] = field(default_factory=dict)

    def __getitem__(self, metric: str) -> Any:
        """Return the record of this metric."""
        return self.records[metric]

    def __iter__(self) -> Iterator[str]:
        """Iterate over the names of the metrics."""
        return iter(self.records)

    def __len__(self) -> int:
        """Return the number of metrics."""
        return len(self.records)

    def __repr__(self) -> str:
        return "\n".join([self._title(), "", self.table(), *self._notes()])

    def _repr_html_(self) -> str:
        """Return the table, and what was skipped, for a notebook."""
        return report_page(self, figures=False).fragment()

    def table(self, *, tablefmt: str = "simple") -> str:
        """Return the measures as a table, in any format that the package ``tabulate`` knows."""
        body = [
            [name, f"{record.headline:.4g}", record.doubt, f"{record.num_passes}", f"{record.seconds:.1f} s"]
            for name, record in self.items()
        ]
        headers = ["measure", "value", "doubt", "passes", "time"]
        return tabulate(body, headers=headers, tablefmt=tablefmt, disable_numparse=True)

    def to_html(self, path: str | os.PathLike[str] | None = None) -> str:
        """Return the report as one self-contained page, and write it to ``path`` if there is one.

        Raises:
            ArgumentError: If the file cannot be written; an older one is then left as it was.
        """
        page = report_page(self).html()
        if path is not None:
            write_text(path, page)
        return page

    def to_csv(self, path: str | os.PathLike[str] | None = None) -> str:
        """Return one line per measure as CSV, and write it to ``path`` if there is one.

        The columns are ``metric``, ``value``, ``stderr``, ``low`` and ``high`` (the interval), ``converged``, ``doubt``
        (in words), ``passes`` and ``seconds``. What is NaN or not known is empty.

        Raises:
            ArgumentError: If the file cannot be written; an older one is then left as it was.
        """
        text = mapping_csv(self, "metric")
        if path is not None:
            write_text(path, text)
        return text

    def plot(self, ax: Axes | None = None, **style: Any) -> Axes:
        """Draw every measure as a bar on ``ax`` (a new one if ``None``) and return the axes."""
        from sharpness.plotting import plot_report

        return plot_report(self, ax=ax, **style)

    def _title(self) -> str:
        accuracy = "" if self.accuracy is None else f", accuracy {100 * self.accuracy:.4g} %"
        return f"loss {self.loss:.6g}{accuracy}; {self.settings.get('loss')}, {self.settings.get('n')} parameters"

    def _notes(self) -> list[str]:
        return [f"skipped {name}: {reason}" for name, reason in self.skipped.items()]
