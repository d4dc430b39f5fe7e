"""Lists of metrics by name, and options that are refused before anything is measured."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeAlias, final

from sharpness._checks import nearest
from sharpness.errors import ArgumentError
from sharpness.metrics.registry import METRICS
from sharpness.objective import Objective
from sharpness.results import Record

Call: TypeAlias = Callable[[Objective, str], Record]

_RELATIVE: dict[str, Any] = {"adaptive": "elementwise", "rho": 0.5}
_RELATIVE_NOISE: dict[str, Any] = {"adaptive": "elementwise", "sigma": 0.1}
PRESETS: dict[str, tuple[Any, ...]] = {
    "default": (
        "top_eigenvalues",
        ("epsilon_sharpness", {"epsilon": 1e-3}),
        ("epsilon_sharpness", {"epsilon": 5e-4}),
        ("average_case_sharpness", _RELATIVE_NOISE),
    ),
    "scale-free": (
        ("worst_case_sharpness", _RELATIVE),
        ("average_case_sharpness", _RELATIVE_NOISE),
        ("worst_case_sharpness", {**_RELATIVE, "normalize_logits": True}),
        ("average_case_sharpness", {**_RELATIVE_NOISE, "normalize_logits": True}),
        "relative_flatness",
        "fisher_rao_norm",
    ),
}


def metric_list(metrics: Any) -> Sequence[Any]:
    """Return the list that ``metrics`` names, or is.

    Raises:
        ArgumentError: If there is no list of this name.
    """
    if not isinstance(metrics, str):
        return metrics  # type: ignore[no-any-return]
    if metrics not in PRESETS:
        hint = f' Pass ["{metrics}"].' if metrics in METRICS else nearest(metrics, PRESETS)
        raise ArgumentError(
            f"`metrics` must be {', '.join(map(repr, PRESETS))}, or a list of names and (name, options) pairs, got "
            f"{metrics!r}.{hint}"
        )
    return PRESETS[metrics]


def check_options(calls: Mapping[str, Call], make: Callable[[Any], Objective]) -> None:
    """Refuse options of metrics: every metric checks its own before it touches the data, so here there are none.

    Args:
        calls: The metrics.
        make: Returns the objective of a model on a loader.

    Raises:
        ArgumentError: If a metric refuses an option.
        ModelError: If a metric refuses the model.
    """
    for call in calls.values():
        try:
            call(make(_NoData()), "ignore")
        except _TouchedSignal:
            continue


class _TouchedSignal(BaseException):
    """The data were asked for; never leaves this file, and no handler of ours or the user's takes it for an error."""


@final
class _NoData:
    """A loader that says when it is walked."""

    def __iter__(self) -> Iterator[Any]:
        raise _TouchedSignal
