"""Several trained models, measured the same way on the same data."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeAlias

from torch import nn

from sharpness._progress import progress_bar
from sharpness.errors import ArgumentError
from sharpness.metrics.door import provenance
from sharpness.metrics.registry import metric_calls
from sharpness.objective import Objective
from sharpness.objective.losses import BatchLoss
from sharpness.objective.parameters import ParameterChoice
from sharpness.objective.reduction import LossFn
from sharpness.results import Comparison, ComparisonRow, Spread

Metric: TypeAlias = "str | tuple[str, Mapping[str, Any]]"
_DEFAULT: tuple[Metric, ...] = (
    "top_eigenvalues",
    ("epsilon_sharpness", {"epsilon": 1e-3}),
    ("epsilon_sharpness", {"epsilon": 5e-4}),
)
_MATCHED = 1.5  # training losses within this factor of each other count as matched


def compare(
    models: Mapping[str, nn.Module | Sequence[nn.Module]],
    loader: Iterable[Any],
    loss_fn: LossFn | None = None,
    *,
    test_loader: Iterable[Any] | None = None,
    metrics: str | Sequence[Metric] = "default",
    batch_loss: BatchLoss | None = None,
    params: ParameterChoice | None = None,
    mode: str = "eval",
    max_batches: int | None = None,
    seed: int = 0,
    progress: bool | None = None,
    memory: int | str = "auto",
    microbatch_size: int | None = None,
    precision: str = "exact",
) -> Comparison:
    """Measure trained models side by side: loss, accuracy and every metric, with ratios to the first.

    Sharpness means little where the training losses differ: curvature falls with the loss. The comparison says so
    where they do, and where a metric did not converge.

    Args:
        models: Name -> trained model, or name -> several models trained with different seeds.
        loader: Training data; every metric is measured on all of it.
        loss_fn: A criterion ``(outputs, targets) -> scalar``, or ``None`` to infer it (see `Objective`).
        test_loader: Data for test loss and accuracy.
        metrics: ``"default"`` (the top eigenvalue, epsilon-sharpness at 1e-3 and at 5e-4), or a list of names and
            ``(name, options)`` pairs.
        batch_loss: ``callable(model, batch) -> (loss, weight)`` in place of ``loss_fn``.
        params: Names, globs, a compiled regular expression, or a predicate that choose parameters.
        mode: ``"eval"``, ``"train"`` or ``"as_is"``.
        max_batches: Use only the first so many batches.
        seed: The same random numbers for every model, so that the comparison is paired.
        progress: Show progress bars; ``None`` shows them on a terminal after two seconds.
        memory: Bytes (or ``"2GiB"``) that may be kept between products.
        microbatch_size: Cut each batch into pieces of at most so many samples.
        precision: ``"exact"``, ``"tf32"``, ``"bfloat16"`` or ``"float16"`` (see `Objective`).

    Returns:
        One row per name, the ratios to the first row, and warnings.

    Raises:
        ArgumentError: If there is no model, or a metric is unknown.
        ModelError: If a model cannot be measured.
        DataError: If a loader or batch cannot be used.

    Cost: that of the metrics for each model, and a forward pass over each loader.

    Example:
        >>> import torch, sharpness
        >>> flat, sharp = torch.nn.Linear(2, 1, bias=False), torch.nn.Linear(2, 1, bias=False)
        >>> data = [(torch.eye(2), torch.zeros(2, 1))]
        >>> sharpness.compare({"a": flat, "b": sharp}, data, metrics=["top_eigenvalues"])["b"].metrics
        {'top_eigenvalues': 1}
    """
    groups = _groups(models)
    calls = metric_calls(metrics, _DEFAULT)
    options: dict[str, Any] = {
        "batch_loss": batch_loss,
        "params": params,
        "mode": mode,
        "max_batches": max_batches,
        "seed": seed,
        "memory": memory,
        "microbatch_size": microbatch_size,
        "precision": precision,
    }
    for group in groups.values():  # every model is checked before any is measured
        for model in group:
            Objective(model, loader, loss_fn, **options)
    started = time.perf_counter()
    rows = []
    total = sum(map(len, groups.values())) * len(calls)
    settings: dict[str, Any] = {}
    with progress_bar(progress, total=total, title="compare", unit="metric") as bar:
        for name, group in groups.items():
            taken: dict[str, list[Any]] = {key: [] for key in ("train", "test", *calls)}
            for model in group:
                objective = Objective(model, loader, loss_fn, progress=False, **options)
                taken["train"].append(objective.evaluate())
                if test_loader is not None:
                    test = Objective(model, test_loader, loss_fn, **{**options, "max_batches": None})
                    taken["test"].append(test.evaluate())
                for key, call in calls.items():
                    bar.set_postfix_str(f"{name}: {key}", refresh=False)
                    taken[key].append(call(objective, "ignore"))
                    bar.update()
                settings = provenance(objective, {"test_data": test_loader is not None})
                objective.release()
            rows.append(_row(name, taken, list(calls)))
    return Comparison(
        rows=tuple(rows),
        ratios=_ratios(rows, list(calls)),
        warnings=tuple(_warnings(rows)),
        seconds=time.perf_counter() - started,
        settings=settings,
    )


def check_metrics(metrics: Any) -> None:
    """Refuse unknown metrics, before anything is trained or measured."""
    metric_calls(metrics, _DEFAULT)


def _groups(models: Any) -> dict[str, Sequence[nn.Module]]:
    if not isinstance(models, Mapping) or not models:
        raise ArgumentError(
            f'`models` must map names to trained models, got {type(models).__name__}. Pass {{"small": model, ...}}.'
        )
    groups: dict[str, Sequence[nn.Module]] = {
        str(name): group if isinstance(group, (list, tuple)) else [group] for name, group in models.items()
    }
    for name, group in groups.items():
        if not group or not all(isinstance(model, nn.Module) for model in group):
            raise ArgumentError(f"`models`: {name!r} must be a torch.nn.Module or a list of them.")
    return groups


def _row(name: str, taken: Mapping[str, list[Any]], metrics: Sequence[str]) -> ComparisonRow:
    def spread(values: list[Any]) -> Spread | None:
        return None if not values or None in values else Spread.of(values)

    return ComparisonRow(
        name=name,
        train_loss=Spread.of(evaluation.loss for evaluation in taken["train"]),
        test_loss=spread([evaluation.loss for evaluation in taken["test"]]),
        train_accuracy=spread([evaluation.accuracy for evaluation in taken["train"]]),
        test_accuracy=spread([evaluation.accuracy for evaluation in taken["test"]]),
        metrics={metric: Spread.of(record.headline for record in taken[metric]) for metric in metrics},
        records={metric: tuple(taken[metric]) for metric in metrics},
    )


def _ratios(rows: Sequence[ComparisonRow], metrics: Sequence[str]) -> dict[str, tuple[Spread, ...]]:
    """Return each row's metrics over the first row's: seed by seed where there are equally many, else of the means."""

    def ratio(a: float, b: float) -> float:
        return a / b if b else math.nan

    def over_first(row: ComparisonRow, metric: str) -> Spread:
        mine, first = row.metrics[metric], rows[0].metrics[metric]
        if len(mine.values) != len(first.values):
            return Spread.of([ratio(mine.mean, first.mean)])
        return Spread.of(map(ratio, mine.values, first.values))

    return {metric: tuple(over_first(row, metric) for row in rows) for metric in metrics}


def _warnings(rows: Sequence[ComparisonRow]) -> list[str]:
    """Return what makes the comparison unfair."""
    found = []
    low, high = (pick(rows, key=lambda row: row.train_loss.mean) for pick in (min, max))
    if high.train_loss.mean > _MATCHED * low.train_loss.mean:
        found.append(
            f"the training losses are not matched: {low.train_loss.mean:.3g} ({low.name}) against "
            f"{high.train_loss.mean:.3g} ({high.name}). Curvature falls with the loss; train to the same loss."
        )
    for row in rows:
        for metric, records in row.records.items():
            missed = sum(not getattr(record, "converged", True) for record in records)
            if missed:
                found.append(f"{metric} of {row.name} did not converge for {missed} of {len(records)} models.")
    return found
