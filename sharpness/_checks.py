"""Argument checks with one grammar: what was given, what is needed, what to do.

They run at the public door, before any data is touched.
"""

from __future__ import annotations

import difflib
import math
import numbers
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from sharpness.errors import ArgumentError


def check_count(name: str, value: Any, *, low: int = 1, high: int | None = None, of: str = "") -> int:
    """Return ``value`` as an int in ``[low, high]``; ``of`` says what ``high`` is."""
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise ArgumentError(f"`{name}` must be an integer, got {value!r}. Pass a whole number of at least {low}.")
    number = int(value)
    if number < low or (high is not None and number > high):
        span = f"at least {low}" if high is None else f"between {low} and {high}{f' ({of})' if of else ''}"
        fix = f"{name}={low} or more" if high is None or number < low else f"{name}={high} or fewer"
        raise ArgumentError(f"`{name}` must be {span}, got {value}. Pass {fix}.")
    return number


def check_positive(name: str, value: Any, *, allow_zero: bool = False) -> float:
    """Return ``value`` as a finite float above zero (or at least zero)."""
    need = "a finite number of at least 0" if allow_zero else "a finite number above 0"
    if isinstance(value, bool) or not isinstance(value, numbers.Real) or not math.isfinite(value):
        raise ArgumentError(f"`{name}` must be {need}, got {value!r}.")
    if value < 0 or (value == 0 and not allow_zero):
        raise ArgumentError(f"`{name}` must be {need}, got {value!r}.")
    return float(value)


def check_choice(name: str, value: Any, choices: Iterable[str]) -> str:
    """Return ``value`` if it is one of ``choices``; else name the right ones."""
    options = list(choices)
    if value not in options:
        listed = ", ".join(repr(option) for option in options)
        raise ArgumentError(f"`{name}` must be one of {listed}, got {value!r}.{nearest(str(value), options)}")
    return str(value)


def check_flag(name: str, value: Any) -> bool:
    """Return ``value`` if it is True or False."""
    if not isinstance(value, bool):
        raise ArgumentError(f"`{name}` must be True or False, got {value!r}.")
    return value


def check_compile(value: Any) -> bool | str:
    """Return ``value`` if it is ``"auto"``, True or False."""
    if isinstance(value, bool) or (isinstance(value, str) and value == "auto"):
        return value
    raise ArgumentError(f'`compile` must be "auto", True or False, got {value!r}.')


def check_seed(value: Any) -> int:
    """Return a seed that PyTorch accepts."""
    return check_count("seed", value, low=0, high=2**63 - 1)


_UNITS = {"": 1, "B": 1}
_UNITS |= {f"{prefix}B": 1000**power for power, prefix in enumerate("KMGT", start=1)}
_UNITS |= {f"{prefix}IB": 1024**power for power, prefix in enumerate("KMGT", start=1)}


def check_memory(value: Any) -> int | None:
    """Return a byte budget: ``None`` for ``"auto"``, else the number of bytes."""
    if value == "auto":
        return None
    if isinstance(value, str):
        match = re.fullmatch(r"\s*([0-9.]+)\s*([A-Za-z]*)\s*", value)
        if match and match[2].upper() in _UNITS and match[1].count(".") <= 1 and match[1] != ".":
            return int(float(match[1]) * _UNITS[match[2].upper()])
    elif isinstance(value, numbers.Integral) and not isinstance(value, bool) and int(value) >= 0:
        return int(value)
    raise ArgumentError(
        f'`memory` must be "auto", a number of bytes, or a size such as "2GiB" or "500MB", got {value!r}. '
        "Pass memory=0 to keep nothing between products."
    )


def check_writable(name: str, value: Any) -> str:
    """Return the path of a file that can be written."""
    if not isinstance(value, (str, os.PathLike)):
        raise ArgumentError(f"`{name}` must be the path of a file, got {value!r}.")
    target = Path(value)
    there = target if target.exists() else target.parent
    if target.is_dir() or not target.parent.is_dir() or not os.access(there, os.W_OK):
        raise ArgumentError(
            f"`{name}`: {os.fspath(value)!r} cannot be written. Choose a file in a folder that exists and is yours."
        )
    return os.fspath(value)


def size_text(count: float) -> str:
    """Return a number of bytes in a unit that fits."""
    for unit in ("bytes", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "bytes" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} GiB"


def nearest(word: str, options: Iterable[str]) -> str:
    """Return a hint that names the options spelled like ``word``, or nothing."""
    near = difflib.get_close_matches(word, list(options), n=3, cutoff=0.5)
    return f" Did you mean {' or '.join(repr(name) for name in near)}?" if near else ""
