"""From records to pages."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

from sharpness.results.comparison_lines import comparison_lines
from sharpness.results.meanings import meanings
from sharpness.results.page import Page, Table
from sharpness.results.picture import Draw, pictures, shown_names
from sharpness.results.tidy import quantities

_DRAWN = ("test_accuracy", "epochs", "updates", "samples", "seconds")  # of the fields of a row
_NOTE = "Mean ± sample standard deviation over the seeds, where there are several."
_BELOW = "Below each metric: how far its least certain measurement can be trusted."
_RATIOS = (
    "Ratios to the first row, with 95 % intervals: of the ratio of geometric means over several seeds, or of one "
    "seed's measurements; none where nothing is known."
)


def comparison_page(comparison: Any, *, figures: bool = True) -> Page:
    """Return the page of a `Comparison`: quantities as lines, which fits a phone, and models as columns."""
    rows, settings = comparison.rows, comparison.settings
    names = [row.name for row in rows]
    measured = list(dict.fromkeys(name for row in rows for name, _ in quantities(row)))
    several = any(len(row.train_loss.values) > 1 for row in rows)
    notes = [_NOTE] * several + [_BELOW] * bool(comparison.ratios) + [_RATIOS] * (len(rows) > 1)
    return Page(
        title="Comparison of sharpness",
        lead=f"{', '.join(names)}: {_about(settings)}.",
        warnings=comparison.warnings,
        notes=comparison.notes,
        table=Table(
            title="Results", headers=["quantity", *names], lines=comparison_lines(comparison), note=" ".join(notes)
        ),
        pictures=pictures(comparison_drawings(comparison)) if figures else (),
        tables=[_measurements(rows)],
        meanings=meanings([*measured, "doubt", "passes"], type(rows[0]) if rows else None),
        settings=settings,
        footer=_footer(comparison),
    )


def comparison_drawings(comparison: Any) -> list[tuple[str, Draw]]:
    """Return what draws each metric, accuracy and cost that all rows of a `Comparison` have, with its label."""

    def drawing(name: str) -> Draw:
        def draw(axes: Any) -> None:
            comparison.plot(axes, metric=name)
            shown_names(axes, [row.name for row in comparison.rows])
            axes.set_ylabel("")

        return draw

    rows = comparison.rows
    shared = [name for name in comparison.ratios if all(name in row.metrics for row in rows)]
    shared += [name for name in _DRAWN if rows and all(getattr(row, name) is not None for row in rows)]
    return [(name if name in comparison.ratios else name.replace("_", " "), drawing(name)) for name in shared]


def report_page(report: Any, *, figures: bool = True) -> Page:
    """Return the page of a `Report`: its measures as lines."""
    accuracy = "" if report.accuracy is None else f", accuracy {100 * report.accuracy:.4g} %"
    return dataclasses.replace(
        _mapping_page(report, "measure"),
        title="Sharpness report",
        lead=f"Value of the loss {report.loss:.6g}{accuracy}; {_about(report.settings)}.",
        warnings=[*_unconverged(report), *(f"{name} was skipped: {why}" for name, why in report.skipped.items())],
        pictures=pictures(_drawings(report)) if figures else (),
    )


def layerwise_page(result: Any, *, figures: bool = True) -> Page:
    """Return the page of a `LayerwiseResult`: its layers as lines."""

    def draw(axes: Any) -> None:
        result.plot(axes)
        shown_names(axes, list(result), vertical=True)

    metric = str(result.settings.get("metric"))
    page = _mapping_page(result, "layer")
    counts = [f"{result.num_parameters[name]}" for name in result]
    table = dataclasses.replace(
        page.table,
        headers=[*page.table.headers, "parameters"],
        lines=[[*line, count] for line, count in zip(page.table.lines, counts, strict=True)],
    )
    return dataclasses.replace(
        page,
        title=f"{metric} of each layer",
        lead=f"{len(result)} layers, the worst first; {_about(result.settings)}.",
        table=table,
        pictures=pictures([(metric, draw)]) if figures else (),
        meanings=meanings([metric, "doubt", "passes", "time"]),
    )


def _drawings(report: Any) -> list[tuple[str, Draw]]:
    """Return what draws the records that hold more than one number, with their names."""
    many = ("samples", "starts", "losses", "steps", "eigenvalues", "errors", "nodes")
    several = {name: [getattr(one, field, None) for field in many] for name, one in report.items()}
    return [
        (name, one.plot)
        for name, one in report.items()
        if any(value is not None and len(value) > 1 for value in several[name])
    ]


def _mapping_page(record: Any, key: str) -> Page:
    """Return what the pages of all mappings from names to records have in common."""
    lines = [
        [name, f"{one.headline:.4g}", one.doubt, f"{one.num_passes}", f"{one.seconds:.1f} s"]
        for name, one in record.items()
    ]
    headers = [key, "value", "doubt", "passes", "time"]
    return Page(
        title="",
        lead="",
        warnings=_unconverged(record),
        table=Table(title="Results", headers=headers, lines=lines),
        meanings=meanings([*record, *headers]),
        settings=record.settings,
        footer=_footer(record),
    )


def _unconverged(record: Any) -> list[str]:
    return [f"{name} did not converge." for name, one in record.items() if not getattr(one, "converged", True)]


def _measurements(rows: Iterable[Any]) -> Table:
    """Return every single measurement with its doubt and its price."""
    lines = [
        [metric, row.name, str(i), f"{one.headline:.5g}", one.doubt, f"{one.num_passes}", f"{one.seconds:.1f} s"]
        for row in rows
        for metric, records in row.records.items()
        for i, one in enumerate(records)
    ]
    headers = ["measure", "of", "seed", "value", "doubt", "passes", "time"]
    return Table(title="Every measurement", headers=headers, lines=lines)


def _about(settings: Mapping[str, Any]) -> str:
    """Return what was measured, as far as the settings tell."""
    known = [
        ("loss", "loss {}"),
        ("n", "{} parameters"),
        ("num_terms", "{:g} loss terms"),
        ("mode", "{} mode"),
        ("dtype", "{}"),
    ]
    return ", ".join(text.format(settings[name]) for name, text in known if settings.get(name) is not None)


def _footer(record: Any) -> str:
    versions = [f"{name} {record.settings[name]}" for name in ("sharpness", "torch") if name in record.settings]
    return f"{' with '.join(versions) or 'sharpness'}; {record.seconds:.3g} s in all."
