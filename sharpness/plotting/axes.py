"""What the drawings share: axes to draw on, and points with bars."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from sharpness.errors import SharpnessError
from sharpness.results import Spread

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def pyplot() -> Any:
    """Return ``matplotlib.pyplot``.

    Raises:
        SharpnessError: If matplotlib is not installed.
    """
    try:
        import matplotlib.pyplot as plt
    except ImportError as error:
        raise SharpnessError('plots need matplotlib. Install it with: pip install "sharpness[plot]"') from error
    return plt


def given_or_new(ax: Axes | None) -> Axes:
    """Return ``ax``, or the axes of a new figure."""
    if ax is not None:
        return ax
    new: Axes = pyplot().subplots(layout="constrained")[1]
    return new


def draw_spreads(ax: Axes, places: Iterable[float], spreads: Iterable[Spread | None], **style: Any) -> None:
    """Draw means with their standard deviations as bars, in the order of their places.

    A single seed has no bar; what is not known or not finite has no point.
    """
    shown = sorted(
        (place, spread.mean, spread.std if math.isfinite(spread.std) else 0.0)
        for place, spread in zip(places, spreads, strict=True)
        if spread is not None and math.isfinite(spread.mean)
    )
    x, y, bars = zip(*shown, strict=True) if shown else ((), (), ())
    ax.errorbar(x, y, yerr=bars, **{"capsize": 3, **style})
