"""The metrics by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from sharpness._checks import nearest
from sharpness.errors import ArgumentError
from sharpness.metrics.eigenvalues import top_eigenvalues
from sharpness.metrics.epsilon import epsilon_sharpness

METRICS: dict[str, Callable[..., Any]] = {
    "top_eigenvalues": top_eigenvalues,
    "epsilon_sharpness": epsilon_sharpness,
}


def find_metric(metric: Any) -> tuple[str, Callable[..., Any]]:
    """Return the name and the function of a metric that is given by either.

    Raises:
        ArgumentError: If there is no such metric.
    """
    for name, function in METRICS.items():
        if metric == name or metric is function:
            return name, function
    raise ArgumentError(
        f"`metric` must be one of {', '.join(METRICS)}, by name or as the function, got {metric!r}."
        f"{nearest(str(metric), METRICS)}"
    )
