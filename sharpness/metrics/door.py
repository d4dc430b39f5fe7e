"""The public door: from what a user passes to an `Objective`, checked before any data is touched."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from sharpness._version import __version__
from sharpness.errors import ArgumentError
from sharpness.objective import Objective
from sharpness.objective.curvature import Curvature

DEFAULTS = {name: option.default for name, option in inspect.signature(Objective).parameters.items()}
# The options that every metric takes.
COMMON = tuple(name for name in DEFAULTS if name not in ("model", "loader", "loss_fn", "skip_batches"))


def open_objective(model: Any, loader: Any, loss_fn: Any, options: Mapping[str, Any]) -> Objective:
    """Return the objective to measure: the one passed in place of a model, or a new one.

    Args:
        model: A model, or an `Objective`, which then stands alone.
        loader: The user's loader, or ``None`` with an `Objective`.
        loss_fn: The user's loss.
        options: The common options as the user passed them, by name, and anything else: a metric passes its `locals()`.

    Raises:
        ArgumentError: If an `Objective` comes with options that are already part of it, or a loader is missing.
    """
    given = {name: options[name] for name in COMMON}
    if not isinstance(model, Objective):
        if loader is None:
            raise ArgumentError("`loader` is missing. Pass (model, loader), or a single Objective(model, loader).")
        return Objective(model, loader, loss_fn, **given)
    extra = [name for name, value in given.items() if value != DEFAULTS[name]]
    extra += [name for name, value in (("loader", loader), ("loss_fn", loss_fn)) if value is not None]
    if extra:
        raise ArgumentError(
            f"an Objective brings its own data and options, got {', '.join(sorted(extra))} as well. "
            "Pass them to Objective(...) instead."
        )
    return model


def provenance(objective: Objective, settings: Mapping[str, Any], curvature: Curvature | None = None) -> dict[str, Any]:
    """Return the settings of a result: the metric's own, the objective's, and how products were made."""
    return {**settings, **objective.provenance(curvature), "sharpness": __version__}
