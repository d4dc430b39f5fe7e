"""The metrics by name."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, final

from sharpness._checks import nearest
from sharpness.errors import ArgumentError
from sharpness.metrics.average_case import average_case_sharpness
from sharpness.metrics.critical import critical_sharpness
from sharpness.metrics.density import spectral_density
from sharpness.metrics.diagonal import diagonal
from sharpness.metrics.eigenvalues import top_eigenvalues
from sharpness.metrics.epsilon import epsilon_sharpness
from sharpness.metrics.fisher_rao import fisher_rao_norm
from sharpness.metrics.frobenius import frobenius_norm
from sharpness.metrics.learning_rate import learning_rate_limit
from sharpness.metrics.low_pass import low_pass_sharpness
from sharpness.metrics.noise import gradient_noise_scale
from sharpness.metrics.pac_bayes import pac_bayes_sharpness
from sharpness.metrics.relative_flatness import relative_flatness
from sharpness.metrics.trace import trace
from sharpness.metrics.worst_case import worst_case_sharpness
from sharpness.objective import Objective
from sharpness.results import Record

METRICS: dict[str, Callable[..., Any]] = {
    "top_eigenvalues": top_eigenvalues,
    "trace": trace,
    "diagonal": diagonal,
    "frobenius_norm": frobenius_norm,
    "spectral_density": spectral_density,
    "epsilon_sharpness": epsilon_sharpness,
    "worst_case_sharpness": worst_case_sharpness,
    "average_case_sharpness": average_case_sharpness,
    "low_pass_sharpness": low_pass_sharpness,
    "pac_bayes_sharpness": pac_bayes_sharpness,
    "relative_flatness": relative_flatness,
    "fisher_rao_norm": fisher_rao_norm,
    "gradient_noise_scale": gradient_noise_scale,
    "learning_rate_limit": learning_rate_limit,
    "critical_sharpness": critical_sharpness,
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


@final
@dataclass(frozen=True)
class Call:
    """A metric with its options, to be measured of any objective."""

    function: Callable[..., Record]
    options: Mapping[str, Any]

    def __call__(self, objective: Objective, on_failure: str, **more: Any) -> Record:
        """Measure, with ``more`` options than were asked for."""
        return self.function(objective, **{"on_failure": on_failure, **self.options, **more})


def metric_calls(metrics: Any, default: Sequence[Any]) -> dict[str, Call]:
    """Return the metrics by the names they get in an answer: with their options where one is asked for twice.

    Args:
        metrics: ``"default"``, or a list of names and ``(name, options)`` pairs.
        default: What ``"default"`` stands for.

    Raises:
        ArgumentError: If a metric or an option is unknown, or asked for twice.
    """
    entries = default if isinstance(metrics, str) and metrics == "default" else metrics
    if isinstance(entries, str) or not isinstance(entries, Sequence) or not entries:
        raise ArgumentError(
            f'`metrics` must be "default" or a list of names and (name, options) pairs, got {metrics!r}. '
            f"The names are {', '.join(METRICS)}."
        )
    pairs = [(entry, {}) if isinstance(entry, str) else entry for entry in entries]
    for pair in pairs:
        if not (isinstance(pair, tuple) and len(pair) == 2 and isinstance(pair[1], Mapping)):
            raise ArgumentError(f"`metrics` holds {pair!r}; a name, or a pair (name, options), is needed.")
        if not isinstance(pair[0], str) or pair[0] not in METRICS:
            raise ArgumentError(
                f"`metrics` holds {pair[0]!r}; the names are {', '.join(METRICS)}.{nearest(str(pair[0]), METRICS)}"
            )
    for name, given in pairs:
        known = [p for p in inspect.signature(METRICS[name]).parameters if p not in ("model", "loader", "loss_fn")]
        for option in given:
            if option not in known:
                raise ArgumentError(
                    f"`metrics` asks {name} for {option!r}, which is not an option of it.{nearest(str(option), known)}"
                )
    names = [name for name, _ in pairs]

    calls: dict[str, Call] = {}
    for name, given in pairs:
        chosen = ", ".join(f"{key}={value!r}" for key, value in given.items())
        key = f"{name}({chosen})" if names.count(name) > 1 and chosen else name
        if key in calls:
            raise ArgumentError(f"`metrics` asks for {key} twice. Give the two different options, or leave one out.")
        calls[key] = Call(METRICS[name], given)
    return calls
