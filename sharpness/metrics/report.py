"""All measures of one model in one call."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeAlias

from torch import nn

from sharpness._progress import progress_bar
from sharpness.errors import ArgumentError, ModelError, NonFiniteError
from sharpness.linalg.answer import OnFailure, check_on_failure
from sharpness.metrics.door import open_objective, provenance
from sharpness.metrics.registry import metric_calls
from sharpness.objective import Objective
from sharpness.objective.losses import BatchLoss
from sharpness.objective.parameters import ParameterChoice
from sharpness.objective.reduction import LossFn
from sharpness.results import Report

Metric: TypeAlias = "str | tuple[str, Mapping[str, Any]]"
DEFAULT: tuple[Metric, ...] = (
    "top_eigenvalues",
    "epsilon_sharpness",
    "worst_case_sharpness",
    ("worst_case_sharpness", {"adaptive": "elementwise", "rho": 0.5}),
    "average_case_sharpness",
    ("average_case_sharpness", {"adaptive": "elementwise", "sigma": 0.1}),
    "low_pass_sharpness",
    "pac_bayes_sharpness",
    "relative_flatness",
    "fisher_rao_norm",
)


def report(
    model: nn.Module | Objective,
    loader: Iterable[Any] | None = None,
    loss_fn: LossFn | None = None,
    *,
    metrics: str | Sequence[Metric] = "default",
    batch_loss: BatchLoss | None = None,
    params: ParameterChoice | None = None,
    mode: str = "eval",
    max_batches: int | None = None,
    seed: int = 0,
    progress: bool | None = None,
    on_failure: OnFailure = "warn",
    memory: int | str = "auto",
    microbatch_size: int | None = None,
    precision: str = "exact",
    compile: bool | str = "auto",
) -> Report:
    """Measure one model in every way, each measure with its doubt.

    The metrics share one `Objective`, so that the data are loaded and kept once. Those of the default list that do not
    apply (no classes, a ``batch_loss`` that hides the outputs, no second derivative, an overflow) are listed as
    skipped, with the reason; one that you ask for by name is refused instead.

    Args:
        model: The trained model, or an `Objective` that replaces ``model, loader, loss_fn`` and the common options.
        loader: Any re-iterable of batches.
        loss_fn: A criterion ``(outputs, targets) -> scalar``, or ``None`` to infer it (see `Objective`).
        metrics: ``"default"``, or a list of names and ``(name, options)`` pairs.
        batch_loss: ``callable(model, batch) -> (loss, weight)`` in place of ``loss_fn``.
        params: Names, globs, a compiled regular expression, or a predicate that choose parameters.
        mode: ``"eval"``, ``"train"`` or ``"as_is"``.
        max_batches: Use only the first so many batches; the answer is then about this subset.
        seed: The same random numbers for every metric and every model.
        progress: Show a progress bar; ``None`` shows one on a terminal after two seconds.
        on_failure: ``"warn"``, ``"raise"`` or ``"ignore"`` when a metric does not reach what it seeks.
        memory: Bytes (or ``"2GiB"``) of batches that may be kept between evaluations.
        microbatch_size: Cut each batch into pieces of at most so many samples.
        precision: ``"exact"``, ``"tf32"``, ``"bfloat16"`` or ``"float16"`` (see `Objective`).
        compile: ``"auto"``, ``True`` or ``False``: whether products are compiled (see `Objective`).

    Returns:
        A mapping from names to records; its ``repr`` is a table, ``to_html`` writes a page.

    Raises:
        ArgumentError: If an option cannot be accepted, or a metric is unknown.
        ModelError: If the model cannot be measured by a metric that you ask for.
        DataError: If the loader or a batch cannot be used.
        NonFiniteError: If a loss or gradient is NaN or infinite; names the batch.
        ConvergenceError: If a metric does not reach what it seeks and ``on_failure="raise"``.

    Cost: that of the metrics; for the default list about 750 passes over the data, most of them forward only and more
    than half for `pac_bayes_sharpness`. With ``max_batches`` all metrics are those of a subset.

    Example:
        >>> import torch, sharpness
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> data = [(torch.eye(2), torch.zeros(2, 1))]
        >>> found = sharpness.report(model, data, metrics=["top_eigenvalues", "fisher_rao_norm"])
        >>> list(found)
        ['top_eigenvalues', 'fisher_rao_norm']
    """
    default = isinstance(metrics, str) and metrics == "default"
    calls = metric_calls(metrics, DEFAULT)
    check_on_failure(on_failure)
    objective = open_objective(model, loader, loss_fn, locals())

    started = time.perf_counter()
    records, skipped = dict[str, Any](), dict[str, str]()
    with (
        objective.session(),
        progress_bar(objective.progress, total=len(calls), title="report", unit="metric") as bar,
    ):
        evaluation = objective.evaluate()
        for name, call in calls.items():
            bar.set_postfix_str(name, refresh=False)
            try:
                records[name] = call(objective, on_failure)
            except (ArgumentError, ModelError, NonFiniteError) as error:
                if not default:
                    raise
                skipped[name] = str(error)
            bar.update()
    return Report(
        records=records,
        skipped=skipped,
        loss=evaluation.loss,
        accuracy=evaluation.accuracy,
        num_passes=1 + sum(record.num_passes for record in records.values()),
        seconds=time.perf_counter() - started,
        settings=provenance(objective, {}),
    )
