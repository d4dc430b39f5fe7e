"""Progress bars: shown on a terminal or in a notebook once the work has lasted two seconds."""

from __future__ import annotations

import sys
from typing import Any

from tqdm import tqdm

from sharpness._checks import check_flag


def progress_bar(progress: bool | None, *, total: int | None, title: str, unit: str = "product") -> Any:
    """Return a tqdm bar; ``None`` shows it where somebody is looking, after two seconds."""
    shown = (sys.stderr.isatty() or "ipykernel" in sys.modules) if progress is None else progress
    delay = 2.0 if progress is None else 0.0
    return tqdm(total=total, desc=title, unit=unit, leave=False, disable=not shown, delay=delay, miniters=0)


def check_progress(value: Any) -> bool | None:
    """Return ``value`` if it is None, True or False."""
    return None if value is None else check_flag("progress", value)
