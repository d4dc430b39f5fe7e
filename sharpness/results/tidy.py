"""From records to CSV, one number a line.

Only the fields that a record has are looked at, whichever they are: one that is added shows up by itself.
"""

from __future__ import annotations

import csv
import dataclasses
import io
import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from sharpness._record import Record
from sharpness.results.headline import interval_of, stderr_of

_DOUBT = ("stderr", "low", "high", "converged", "doubt", "passes", "seconds")


def comparison_csv(comparison: Any) -> str:
    """Return one line per row, seed and quantity."""
    lines = []
    for row in comparison.rows:
        for name, value in quantities(row):
            records = row.records.get(name, ())
            for i, number in enumerate(value.values if is_spread(value) else [value]):
                line = {"row": row.name, "seed": i if is_spread(value) else "", "quantity": name, "value": number}
                lines.append(line | (_doubts(records[i]) if i < len(records) else {}))
    return _csv(["row", "seed", "quantity", "value", *_DOUBT], lines)


def mapping_csv(record: Any, key: str) -> str:
    """Return one line per entry of a record that maps names to records."""
    lines = [{key: name, "value": one.headline} | _doubts(one) for name, one in record.items()]
    return _csv([key, "value", *_DOUBT], lines)


def quantities(row: Any) -> Iterator[tuple[str, Any]]:
    """Yield the numbers of a row by name: its fields, and the entries of those that are mappings, such as metrics."""
    for spec in dataclasses.fields(row):
        value = getattr(row, spec.name)
        if _is_number(value):
            yield spec.name, value
        elif isinstance(value, Mapping):
            for key, entry in value.items():
                if _is_number(entry):
                    yield key if spec.name == "metrics" else f"{spec.name} {key}", entry


def is_spread(value: Any) -> bool:
    """Return whether ``value`` is a `Spread`."""
    return isinstance(value, Record) and hasattr(value, "mean") and hasattr(value, "values")


def _is_number(value: Any) -> bool:
    return is_spread(value) or (isinstance(value, (int, float)) and not isinstance(value, bool))


def _doubts(record: Any) -> dict[str, Any]:
    """Return the doubt and the price of a record, as numbers and in words."""
    low, high = interval_of(record) or (None, None)
    return {
        "stderr": stderr_of(record),
        "low": low,
        "high": high,
        "converged": getattr(record, "converged", None),
        "doubt": record.doubt,
        "passes": record.num_passes,
        "seconds": record.seconds,
    }


def _csv(columns: list[str], lines: Iterable[Mapping[str, Any]]) -> str:
    """Return lines of CSV; what is not known, or not a number, is empty."""
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, restval="", lineterminator="\n")
    writer.writeheader()
    for line in lines:
        writer.writerow({name: "" if _unknown(value) else value for name, value in line.items()})
    return text.getvalue()


def _unknown(value: Any) -> bool:
    return value is None or (isinstance(value, float) and math.isnan(value))
