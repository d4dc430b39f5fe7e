"""Warnings that point at the user's line, however deep in the library they arise."""

from __future__ import annotations

import sys
import warnings

from sharpness.errors import SharpnessWarning


def warn(message: str, category: type[SharpnessWarning]) -> None:
    """Issue a warning attributed to the first caller outside of this package."""
    level, frame = 2, sys._getframe(1)
    while frame.f_back is not None and frame.f_globals.get("__name__", "").split(".")[0] == "sharpness":
        frame = frame.f_back
        level += 1
    warnings.warn(message, category, stacklevel=level)
