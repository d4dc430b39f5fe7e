"""What is known of the one number that stands for a record: its error and its interval, as numbers."""

from __future__ import annotations

from typing import Any


def stderr_of(record: Any) -> float | None:
    """Return the standard error of a record's headline, ``None`` where it has none."""
    error = getattr(record, "headline_stderr", getattr(record, "stderr", None))
    return None if error is None else float(error)


def interval_of(record: Any) -> tuple[float, float] | None:
    """Return the interval of a record's headline, ``None`` where it has none."""
    found = getattr(record, "interval", None)
    if found is None:
        return None
    low, high = found[0].tolist() if hasattr(found, "tolist") else found
    return float(low), float(high)
