"""Several trained models, measured the same way on the same data."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeAlias

from torch import nn

from sharpness._checks import check_flag
from sharpness._progress import check_progress, progress_bar
from sharpness.comparison.facts import Facts, find_facts
from sharpness.comparison.fairness import find_notes, find_warnings
from sharpness.comparison.geometry import Weights, distances, initial_weights
from sharpness.comparison.intervals import ratio_interval
from sharpness.comparison.presets import check_options, metric_list
from sharpness.errors import ArgumentError, ModelError, NonFiniteError
from sharpness.metrics.door import provenance
from sharpness.metrics.registry import metric_calls
from sharpness.objective import Objective
from sharpness.objective.losses import BatchLoss
from sharpness.objective.parameters import ParameterChoice
from sharpness.objective.reduction import LossFn
from sharpness.results import Comparison, ComparisonRow, Record, Spread

Metric: TypeAlias = "str | tuple[str, Mapping[str, Any]]"
Initial: TypeAlias = "Weights | Sequence[Weights] | Mapping[str, Weights | Sequence[Weights]]"


def compare(
    models: Mapping[str, nn.Module | Sequence[nn.Module]],
    loader: Iterable[Any],
    loss_fn: LossFn | None = None,
    *,
    test_loader: Iterable[Any] | None = None,
    metrics: str | Sequence[Metric] = "default",
    initial: Initial | None = None,
    check_minimum: bool = True,
    batch_loss: BatchLoss | None = None,
    params: ParameterChoice | None = None,
    mode: str = "eval",
    max_batches: int | None = None,
    seed: int = 0,
    progress: bool | None = None,
    memory: int | str = "auto",
    microbatch_size: int | None = None,
    precision: str = "exact",
    compile: bool | str = "auto",
) -> Comparison:
    """Measure trained models side by side: losses, accuracies, where they lie, and every metric, with ratios.

    The ratios are to the first model, with 95 % intervals; all random numbers are the same for every model. Sharpness
    means little where the models differ in more than the question asks about, and the answer says so where training
    losses, logits or weights are of different scales, where a model is at no minimum, where a metric did not converge,
    and where the models were not measured alike. What does not need the same shape works for models of different
    architectures too.

    Whether a model is at a minimum is seen from what a Newton step would gain, in the space of the gradient's first ten
    Krylov vectors: a lower bound of ``g' H^-1 g / 2``, half of the squared Newton decrement.

    Args:
        models: Name -> trained model, or name -> several models trained with different seeds.
        loader: Training data; every metric is measured on all of it.
        loss_fn: A criterion ``(outputs, targets) -> scalar``, or ``None`` to infer it (see `Objective`).
        test_loader: Data for test loss and accuracy.
        metrics: ``"default"`` (the top eigenvalue, epsilon-sharpness at 1e-3 and at 5e-4, and average-case sharpness
            relative to the weights), ``"scale-free"`` (worst and average case relative to the weights, on the logits as
            they are and normalised, relative flatness, Fisher-Rao norm), or a list of names and ``(name, options)``
            pairs. What does not apply to a model is left out, and named, if the list is one of these two, and is an
            error if you ask for it by name.
        initial: Where the training started, for the distance from there: a module or state dict for all models, a list
            with one for each seed, or a mapping from names to either.
        check_minimum: Whether to see if the models are at a minimum.
        batch_loss: ``callable(model, batch) -> (loss, weight)`` in place of ``loss_fn``.
        params: Names, globs, a compiled regular expression, or a predicate that choose parameters.
        mode: ``"eval"``, ``"train"`` or ``"as_is"``.
        max_batches: Use only the first so many batches of ``loader``; test data are used whole.
        seed: The same random numbers for every model, so that the comparison is paired.
        progress: Show progress bars; ``None`` shows them on a terminal after two seconds.
        memory: Bytes (or ``"2GiB"``) that may be kept between products.
        microbatch_size: Cut each batch into pieces of at most so many samples.
        precision: ``"exact"``, ``"tf32"``, ``"bfloat16"`` or ``"float16"`` (see `Objective`).
        compile: ``"auto"``, ``True`` or ``False``: whether products are compiled (see `Objective`).

    Returns:
        One row per name, the ratios to the first row with their intervals, distances, warnings and notes.

    Raises:
        ArgumentError: If there is no model, or a metric or an option of one is unknown; before anything is measured.
        ModelError: If a model cannot be measured.
        DataError: If a loader or batch cannot be used.
        NonFiniteError: If a loss is NaN or infinite; names the model and the batch.

    Cost: that of the metrics for each model, a forward pass over each loader, and with ``check_minimum`` a gradient and
    ten Hessian-vector products. The default metrics take about 200 passes, most of them forward only.

    References:
        Dinh et al. (2017), arXiv 1703.04933 (scales); Andriushchenko et al. (2023), arXiv 2302.07011 (what scale-free
        measures tell).

    Example:
        >>> import torch, sharpness
        >>> flat, sharp = torch.nn.Linear(2, 1, bias=False), torch.nn.Linear(2, 1, bias=False)
        >>> data = [(torch.eye(2), torch.zeros(2, 1))]
        >>> sharpness.compare({"a": flat, "b": sharp}, data, metrics=["top_eigenvalues"])["b"].metrics
        {'top_eigenvalues': 1}
    """
    groups = _groups(models)
    calls = metric_calls(metric_list(metrics), ())
    check_flag("check_minimum", check_minimum)
    check_progress(progress)
    starts = initial_weights(initial, list(groups), [len(group) for group in groups.values()])
    options: dict[str, Any] = {
        "batch_loss": batch_loss,
        "params": params,
        "mode": mode,
        "max_batches": max_batches,
        "seed": seed,
        "progress": False,
        "memory": memory,
        "microbatch_size": microbatch_size,
        "precision": precision,
        "compile": compile,
    }

    def objective_of(model: nn.Module, data: Iterable[Any] = loader, **changes: Any) -> Objective:
        return Objective(model, data, loss_fn, **{**options, **changes})

    whole = {"max_batches": None}
    for place, model in _each(groups):  # every model is checked before any is measured
        with _named(place):
            objective_of(model)
            if test_loader is not None:
                objective_of(model, test_loader, **whole)
            if not isinstance(metrics, str):
                check_options(calls, lambda data, model=model: objective_of(model, data))  # type: ignore[misc]

    started = time.perf_counter()
    facts: dict[str, list[Facts]] = {name: [] for name in groups}
    records: dict[str, dict[str, list[Record]]] = {name: {key: [] for key in calls} for name in groups}
    skipped: dict[str, dict[str, str]] = {key: {} for key in calls}
    settings: dict[str, Any] = {}
    total = sum(map(len, groups.values())) * len(calls)
    with progress_bar(progress, total=total, title="compare", unit="metric") as bar:
        for (name, i, count), model in _each(groups):
            objective = objective_of(model)
            with _named((name, i, count)):
                test = None if test_loader is None else objective_of(model, test_loader, **whole)
                facts[name].append(find_facts(objective, test, check_minimum=check_minimum))
                for key, call in calls.items():
                    bar.set_postfix_str(f"{name}: {key}", refresh=False)
                    try:
                        if name not in skipped[key]:
                            records[name][key].append(call(objective, "ignore"))
                    except (ArgumentError, ModelError, NonFiniteError) as error:
                        if not isinstance(metrics, str):
                            raise
                        skipped[key][name] = str(error)
                    bar.update()
            settings = settings or provenance(objective, {"test_data": test_loader is not None})
            objective.release()
    for key, names in skipped.items():
        for name in names:
            del records[name][key]
    found = list(filter(lambda key: len(skipped[key]) < len(groups), calls))
    rows = tuple(_row(name, facts[name], records[name], starts.get(name)) for name in groups)
    return Comparison(
        rows=rows,
        ratios={key: tuple(_ratio(row, rows[0], key) for row in rows) for key in found},
        ratio_intervals={key: tuple(_interval(row, rows[0], key, facts) for row in rows) for key in found},
        distances=distances([[fact.place for fact in group] for group in facts.values()]),
        warnings=(*find_warnings(rows, facts, mode), *_lacking(skipped, found)),
        notes=(*find_notes(rows, facts, mode), *_left_out(skipped, found, rows, starts)),
        seconds=time.perf_counter() - started,
        settings={**settings, "check_minimum": check_minimum},
    )


def check_metrics(metrics: Any, make: Callable[[Any], Objective]) -> None:
    """Refuse metrics that are unknown, and options of them that they refuse, before anything is trained.

    Args:
        metrics: As in `compare`.
        make: Returns the objective of a model such as those to be trained, on a loader.
    """
    calls = metric_calls(metric_list(metrics), ())
    if not isinstance(metrics, str):
        check_options(calls, make)


def _groups(models: Any) -> dict[str, Sequence[nn.Module]]:
    if not isinstance(models, Mapping) or not models:
        raise ArgumentError(
            f'`models` must map names to trained models, got {type(models).__name__}. Pass {{"small": model, ...}}.'
        )
    groups: dict[str, Sequence[nn.Module]] = {
        str(name): group if isinstance(group, (list, tuple)) else [group] for name, group in models.items()
    }
    if len(groups) < len(models):
        raise ArgumentError(f"`models` has two names that read the same: {list(models)}. Give each a name of its own.")
    for name, group in groups.items():
        if not group or not all(isinstance(model, nn.Module) for model in group):
            raise ArgumentError(f"`models`: {name!r} must be a torch.nn.Module or a list of them.")
        if len({id(model) for model in group}) < len(group):
            raise ArgumentError(
                f"`models`: the list {name!r} holds the same object twice, and the spread over it would mean nothing. "
                "Pass a model of its own for each seed."
            )
    return groups


def _each(groups: Mapping[str, Sequence[nn.Module]]) -> Iterator[tuple[tuple[str, int, int], nn.Module]]:
    """Yield every model with its name, its number and how many there are of this name."""
    for name, group in groups.items():
        for i, model in enumerate(group):
            yield (name, i, len(group)), model


@contextmanager
def _named(place: tuple[str, int, int]) -> Iterator[None]:
    """Name the model where it cannot be measured."""
    name, i, count = place
    try:
        yield
    except (ModelError, NonFiniteError) as error:
        raise type(error)(f"model {name!r}{f' ({i + 1} of {count})' * (count > 1)}: {error}") from error


def _row(
    name: str, facts: Sequence[Facts], records: Mapping[str, Sequence[Any]], starts: Sequence[Mapping[str, Any]] | None
) -> ComparisonRow:
    def spread(of: Callable[[Facts], float | None]) -> Spread | None:
        values = [of(fact) for fact in facts]
        known = [value for value in values if value is not None]
        return Spread.of(known) if len(known) == len(values) else None

    moved = None if starts is None else [f.place.distance_from(w) for f, w in zip(facts, starts, strict=True)]
    return ComparisonRow(
        name=name,
        train_loss=Spread.of(fact.train.loss for fact in facts),
        test_loss=spread(lambda fact: fact.test and fact.test.loss),
        train_accuracy=spread(lambda fact: fact.train.accuracy),
        test_accuracy=spread(lambda fact: fact.test and fact.test.accuracy),
        loss_gap=spread(lambda fact: fact.test and fact.test.loss - fact.train.loss),
        accuracy_gap=spread(lambda fact: fact.accuracy_gap),
        weight_norm=spread(lambda fact: fact.place.norm()),
        logit_norm=spread(lambda fact: fact.logit_norm),
        distance_from_initial=None if moved is None or None in moved else Spread.of(d for d in moved if d is not None),
        gradient_norm=spread(lambda fact: fact.newton and fact.newton.gradient_norm),
        newton_decrease=spread(lambda fact: fact.newton and fact.newton.decrease),
        least_curvature=spread(lambda fact: fact.newton and fact.newton.least),
        metrics={key: Spread.of(record.headline for record in found) for key, found in records.items()},
        records={key: tuple(found) for key, found in records.items()},
    )


def _ratio(row: ComparisonRow, first: ComparisonRow, metric: str) -> Spread:
    """Return a metric over the first row's: seed by seed where there are equally many, else of the means."""

    def ratio(a: float, b: float) -> float:
        return a / b if b else math.nan

    if metric not in row.metrics or metric not in first.metrics:
        return Spread.of([math.nan])
    mine, its = row.metrics[metric], first.metrics[metric]
    if len(mine.values) != len(its.values):
        return Spread.of([ratio(mine.mean, its.mean)])
    return Spread.of(map(ratio, mine.values, its.values))


def _interval(
    row: ComparisonRow, first: ComparisonRow, metric: str, facts: Mapping[str, Sequence[Facts]]
) -> tuple[float, float] | None:
    if metric not in row.records or metric not in first.records:
        return None
    if row is first:
        return (1.0, 1.0) if all(first.metrics[metric].values) else None
    layouts = {fact.place.layout for name in (row.name, first.name) for fact in facts[name]}
    return ratio_interval(row.records[metric], first.records[metric], same_draws=len(layouts) == 1)


def _lacking(skipped: Mapping[str, Mapping[str, str]], found: Sequence[str]) -> list[str]:
    """Return the metrics that only some of the models have."""
    return [
        f"{metric} is left out for {name}: {reason}"
        for metric, reasons in skipped.items()
        for name, reason in reasons.items()
        if metric in found
    ]


def _left_out(
    skipped: Mapping[str, Mapping[str, str]],
    found: Sequence[str],
    rows: Sequence[ComparisonRow],
    starts: Mapping[str, Any],
) -> list[str]:
    """Return the metrics of the list that none of the models has, and the distances that do not exist."""
    lacking = [
        f"{metric} is left out: {next(iter(skipped[metric].values()))}" for metric in skipped if metric not in found
    ]
    shapes = [row.name for row in rows if row.name in starts and row.distance_from_initial is None]
    return lacking + [f"the initial weights have other shapes than {name}: no distance from there." for name in shapes]
