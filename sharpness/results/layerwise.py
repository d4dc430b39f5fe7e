"""One record per layer."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, final

from tabulate import tabulate

from sharpness._record import Record
from sharpness._write import write_text
from sharpness.results.present import layerwise_page
from sharpness.results.tidy import mapping_csv

if TYPE_CHECKING:
    from matplotlib.axes import Axes


@final
@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class LayerwiseResult(Record, Mapping[str, Any]):
    """A metric of each layer on its own, the worst layer first: a mapping from the layer's name to its record.

    Attributes:
        records: Name of each layer -> its record, in descending order of the metric.
        num_parameters: Name of each layer -> how many parameters it has.
        num_passes: Passes over the data for all layers together.
        seconds: Wall time.
        settings: What the call resolved to.
    """

    records: dict[str, Any]
    num_parameters: dict[str, int]
    num_passes: int
    seconds: float
    settings: dict[str, Any] = field(default_factory=dict)

    __eq__, __hash__ = object.__eq__, object.__hash__  # a record, not compared by what it holds

    def __getitem__(self, layer: str) -> Any:
        """Return the record of this layer."""
        return self.records[layer]

    def __iter__(self) -> Iterator[str]:
        """Iterate over the names of the layers, the worst first."""
        return iter(self.records)

    def __len__(self) -> int:
        """Return the number of layers."""
        return len(self.records)

    @property
    def converged(self) -> bool:
        """Return whether every layer's record is converged, as far as records of this kind tell."""
        return all(getattr(record, "converged", True) for record in self.records.values())

    def __repr__(self) -> str:
        shown = [f"{name}: {record.headline:.4g}" for name, record in list(self.records.items())[:3]]
        rest = [f"... {len(self)} in all"] if len(self) > 3 else []
        state = "" if self.converged else "NOT all converged, "
        values = ", ".join(shown + rest)
        return f"LayerwiseResult({self.settings.get('metric')}: {values}; {state}{self.num_passes} passes)"

    def __str__(self) -> str:
        body = [[name, self.num_parameters[name], repr(record)] for name, record in self.records.items()]
        return tabulate(body, headers=["layer", "parameters", str(self.settings.get("metric"))], disable_numparse=True)

    def _repr_html_(self) -> str:
        """Return the table for a notebook."""
        return layerwise_page(self, figures=False).fragment()

    def to_html(self, path: str | os.PathLike[str] | None = None) -> str:
        """Return the layers as one self-contained page, and write it to ``path`` if there is one.

        Raises:
            ArgumentError: If the file cannot be written; an older one is then left as it was.
        """
        page = layerwise_page(self).html()
        if path is not None:
            write_text(path, page)
        return page

    def to_csv(self, path: str | os.PathLike[str] | None = None) -> str:
        """Return one line per layer as CSV, and write it to ``path`` if there is one.

        The columns are ``layer``, ``value``, ``stderr``, ``low`` and ``high`` (the interval), ``converged``, ``doubt``
        (in words), ``passes`` and ``seconds``. What is NaN or not known is empty.

        Raises:
            ArgumentError: If the file cannot be written; an older one is then left as it was.
        """
        text = mapping_csv(self, "layer")
        if path is not None:
            write_text(path, text)
        return text

    def plot(self, ax: Axes | None = None, **style: Any) -> Axes:
        """Draw the metric of each layer as a bar on ``ax`` (a new one if ``None``) and return the axes."""
        from sharpness.plotting import plot_layerwise

        return plot_layerwise(self, ax=ax, **style)
