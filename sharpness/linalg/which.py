"""Which eigenvalues of a spectrum are wanted, and in which order."""

from __future__ import annotations

from typing import Any, Literal, TypeAlias

import numpy as np

Which: TypeAlias = Literal["largest", "smallest", "magnitude", "both"]
WHICH = ("largest", "smallest", "magnitude", "both")


def select(theta: np.ndarray[Any, Any], which: str, k: int) -> np.ndarray[Any, Any]:
    """Return the positions of the wanted entries of ``theta``, ``(m,)`` ascending, in the order to report them.

    ``"largest"``: descending. ``"smallest"``: ascending. ``"magnitude"``: descending in magnitude. ``"both"``: ``k``
    from each end in descending order, all if there are at most ``2 k``. Fewer than asked if ``theta`` is shorter.
    """
    m = len(theta)
    if which == "largest":
        return np.arange(m - 1, max(m - k, 0) - 1, -1)
    if which == "smallest":
        return np.arange(min(k, m))
    if which == "magnitude":
        return np.argsort(-np.abs(theta), kind="stable")[:k]
    return np.arange(m - 1, -1, -1) if m <= 2 * k else np.r_[np.arange(m - 1, m - k - 1, -1), np.arange(k - 1, -1, -1)]


def count(which: str, k: int, n: int) -> int:
    """Return how many eigenvalues of an ``n x n`` operator are wanted."""
    return min(2 * k, n) if which == "both" else k
