"""Does a large batch find a flat minimum if a small batch shows it the way? Keskar et al. (2017), Section 4.2."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

from torch import Tensor, nn
from torch.utils.data import Dataset

from sharpness._checks import check_count, check_memory, check_seed
from sharpness._progress import check_progress, progress_bar
from sharpness.comparison.compare import Metric, check_metrics, compare
from sharpness.comparison.fairness import unconverged
from sharpness.comparison.grid import Took, check_test_set, missed, recipe_trainer, spreads
from sharpness.comparison.recipe import LR, MOMENTUM, STOP_LOSS, Recipe, check_batch_sizes
from sharpness.comparison.schedule import OptimizerFactory
from sharpness.comparison.starts import Starts, copy_into, tensors_of
from sharpness.comparison.train import as_dataset, evaluation_batches
from sharpness.errors import ArgumentError
from sharpness.metrics.registry import find_metric
from sharpness.objective import Objective
from sharpness.objective.guard import own_randomness
from sharpness.objective.losses import Criterion
from sharpness.objective.reduction import LossFn
from sharpness.results import ComparisonRow, PiggybackResult


def piggyback(
    make_model: Callable[[], nn.Module],
    train_set: Any,
    test_set: Any,
    loss_fn: LossFn | None = None,
    *,
    batch_sizes: Sequence[int] = (32, 512),
    switch_epochs: Sequence[int] = (0, 1, 2, 4, 8, 16),
    seeds: int = 3,
    optimizer: Literal["sgd", "adam"] | OptimizerFactory = "sgd",
    lr: float = LR,
    momentum: float = MOMENTUM,
    stop_loss: float | None = STOP_LOSS,
    epochs: int | None = None,
    updates: int | None = None,
    max_epochs: int | None = None,
    lr_scaling: Literal["none", "linear", "sqrt"] = "none",
    metric: Metric = "epsilon_sharpness",
    seed: int = 0,
    progress: bool | None = None,
    memory: int | str = "auto",
) -> PiggybackResult:
    """Start large-batch trainings from the iterates of a small-batch training, and measure what they find.

    For each seed the small batch trains once, for as many epochs as the last switch, whatever its loss. From its
    weights (and running statistics) after each of ``switch_epochs`` a large-batch training starts, with a new
    optimizer, and all of these end at the same stop. An iterate whose loss is at most ``stop_loss`` already is its own
    solution, after no update. Keskar et al. saw no gain after few epochs of the small batch, and flatter minima that
    generalise better after more.

    Args:
        make_model: Returns a new model at each call, with random initial weights.
        train_set: Data set of ``(input, target)``, or a tuple of tensors ``(inputs, targets)``.
        test_set: Likewise, for test loss and accuracy.
        loss_fn: A criterion ``(outputs, targets) -> scalar``, or ``None`` to infer it (see `Objective`).
        batch_sizes: The small batch size, and the large one.
        switch_epochs: Epochs of the small batch after which the large one takes over; 0 is the initial model.
        seeds: How many times to repeat everything, with other initial weights and another order.
        optimizer: ``"sgd"``, ``"adam"``, or a callable from parameters to an optimizer, which brings its own learning
            rate and momentum.
        lr: Learning rate for the small batch size, 0.001 for ``"adam"`` if it is not given; not with a callable
            ``optimizer``.
        momentum: Momentum of ``"sgd"``; not with others.
        stop_loss: Training loss at which the large-batch trainings stop; replaced by ``epochs`` or ``updates``, one of
            which may be given in its place.
        epochs: Stop them after so many epochs of their own.
        updates: Stop them after so many updates of their own.
        max_epochs: Where one that misses ``stop_loss`` ends, 1000 if ``None``; it is kept, and marked in the warnings.
        lr_scaling: Learning rate of the large batch: the same (``"none"``), times the ratio of the batch sizes
            (``"linear"``), or times its root (``"sqrt"``).
        metric: Name of the sharpness, or a pair ``(name, options)``.
        seed: First of the seeds.
        progress: Show progress bars; ``None`` shows them on a terminal after two seconds.
        memory: Bytes (or ``"2GiB"``) that may be kept between products.

    Returns:
        For each switch, the row of the small-batch iterate and that of the large-batch solution, with the spread over
        the seeds.

    Raises:
        ArgumentError: If an option cannot be accepted, before anything is trained.
        DataError: If a batch cannot be used; the first 1024 samples of ``test_set`` are tried before anything is
            trained.
        NonFiniteError: If a training diverges.

    Cost: per seed, ``max(switch_epochs)`` epochs of the small batch and ``len(switch_epochs)`` large-batch trainings,
    each with a forward pass over the training set after every epoch (up to fifteen times an epoch near ``stop_loss``),
    and the metric for ``2 * len(switch_epochs)`` models, which are all held until the end.

    References:
        Keskar et al. (2017), arXiv 1609.04836, Section 4.2 and Figure 5.

    Example:
        >>> import torch, sharpness
        >>> inputs = torch.randn(64, 3, generator=torch.Generator().manual_seed(0))
        >>> data = (inputs, (inputs[:, 0] > 0).long())
        >>> result = sharpness.piggyback(
        ...     lambda: torch.nn.Linear(3, 2), data, data, batch_sizes=(4, 64), switch_epochs=(0, 2), epochs=3, seeds=1
        ... )
        >>> [(small.updates, large.updates) for small, large in zip(result.small, result.large)]
        [(0, 3), (32, 3)]
    """
    starts = Starts(make_model)
    Criterion(loss_fn, None)
    check_memory(memory)
    data, test_data = as_dataset("train_set", train_set), as_dataset("test_set", test_set)
    sizes = check_batch_sizes(batch_sizes, len(data))  # type: ignore[arg-type]
    if len(sizes) != 2 or sizes[0] >= sizes[1]:
        raise ArgumentError(
            f"`batch_sizes` must be a small one and a large one, got {batch_sizes!r}. Pass (32, 512), say."
        )
    switches = _check_switches(switch_epochs)
    seeds = check_count("seeds", seeds)
    check_seed(seed)
    check_progress(progress)
    name, measured = _named_metric(metric)
    recipe = Recipe.of(
        batch_sizes=sizes,
        optimizer=optimizer,
        lr=lr,
        momentum=momentum,
        stop_loss=stop_loss,
        epochs=epochs,
        updates=updates,
        max_epochs=max_epochs,
        lr_scaling=lr_scaling,
    )
    check_metrics([measured], lambda data: Objective(starts.peek(seed), data, loss_fn, memory=memory))
    check_test_set(starts.peek(seed), test_data, loss_fn)
    started = time.perf_counter()
    ends: dict[str, dict[int, list[tuple[nn.Module, Took]]]] = {
        kind: {switch: [] for switch in switches} for kind in ("small", "large")
    }
    with progress_bar(progress, total=seeds * (1 + len(switches)), title="training", unit="run") as bar:

        def report(epoch: int, loss: float) -> None:
            bar.set_postfix_str(f"{doing}, epoch {epoch}, loss {loss:.2e}", refresh=False)
            bar.update(0)

        for run in range(seed, seed + seeds):
            doing = f"batch {sizes[0]}, seed {run}"
            reached = _small(starts, recipe, data, loss_fn, sizes[0], run, switches, report)
            bar.update()
            for switch, (weights, took) in reached.items():
                ends["small"][switch].append((_model(starts, run, weights), took))
                doing = f"batch {sizes[1]} from epoch {switch}, seed {run}"
                model = _model(starts, run, weights)
                ends["large"][switch].append((model, _large(model, recipe, data, loss_fn, sizes[1], run, report)))
                bar.update()

    rows: dict[str, list[ComparisonRow]] = {"small": [], "large": []}
    for switch in switches:
        comparison = compare(
            {kind: [model for model, _ in ends[kind][switch]] for kind in ends},
            evaluation_batches(data),
            loss_fn,
            test_loader=evaluation_batches(test_data),
            metrics=[measured],
            check_minimum=False,  # iterates of a training are at none
            seed=seed,
            progress=progress,
            memory=memory,
        )
        for kind, row in zip(ends, comparison.rows, strict=True):
            costs = spreads([run for _, run in ends[kind][switch]])
            rows[kind].append(dataclasses.replace(row, name=str(switch), **costs))  # type: ignore[arg-type]
    late = missed(
        {k: [run for _, run in group] for k, group in ends["large"].items()}, recipe, "large batch from epoch {}"
    )
    return PiggybackResult(
        switch_epochs=tuple(switches),
        small=tuple(rows["small"]),
        large=tuple(rows["large"]),
        metric=name,
        warnings=(*late, *_missed_metrics(rows)),
        seconds=time.perf_counter() - started,
        settings={
            **comparison.settings,
            "batch_sizes": sizes,
            "seeds": seeds,
            **recipe.settings(),
            "metric_options": dict(measured[1]),
            "initial_weights": "copied" if starts.copied else "as made",
        },
    )


def _small(
    starts: Starts,
    recipe: Recipe,
    data: Dataset[Any],
    loss_fn: LossFn | None,
    batch_size: int,
    seed: int,
    switches: Sequence[int],
    report: Callable[[int, float], None],
) -> dict[int, tuple[dict[str, Tensor], Took]]:
    """Train once with the small batch; return the weights at each switch, and what it took to get there."""
    model, kept = starts.model(seed), {}
    started = time.perf_counter()

    def keep(epoch: int, loss: float) -> None:
        if epoch in switches:
            kept[epoch] = _copied(model), time.perf_counter() - started, loss
        if epoch:
            report(epoch, loss)

    if 0 in switches:
        keep(0, Objective(model, evaluation_batches(data), loss_fn).value())
    whole = dataclasses.replace(recipe, stop_loss=None, epochs=max(switches), updates=None, max_epochs=None)
    optimizer_rate, updates, samples = None, 0, 0
    if max(switches):
        with own_randomness(seed, 1):
            training = whole.train(model, data, loss_fn, batch_size=batch_size, seed=seed, report=keep)
        optimizer_rate = training.learning_rate
        updates, samples = training.updates // training.epochs, training.samples // training.epochs
    return {
        epoch: (
            weights,
            Took(
                epochs=epoch,
                updates=epoch * updates,
                samples=epoch * samples,
                seconds=seconds,
                loss=loss,
                learning_rate=optimizer_rate,
            ),
        )
        for epoch, (weights, seconds, loss) in kept.items()
    }


def _large(
    model: nn.Module,
    recipe: Recipe,
    data: Dataset[Any],
    loss_fn: LossFn | None,
    batch_size: int,
    seed: int,
    report: Callable[[int, float], None],
) -> Took:
    """Train on with the large batch; not at all where the stop is reached already."""
    if recipe.stop_loss is not None:
        loss = Objective(model, evaluation_batches(data), loss_fn).value()
        if loss <= recipe.stop_loss:
            return Took(epochs=0, updates=0, samples=0, seconds=0.0, loss=loss)
    with own_randomness(seed, 1):
        return recipe_trainer(recipe, data, loss_fn)(model, batch_size, seed, report)


def _model(starts: Starts, seed: int, weights: Mapping[str, Tensor]) -> nn.Module:
    """Return a new model with these weights."""
    model = starts.model(seed)
    copy_into(model, weights, "`make_model` returned another architecture than before")
    return model.eval()


def _copied(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in tensors_of(model).items()}


def _missed_metrics(rows: Mapping[str, Sequence[ComparisonRow]]) -> list[str]:
    """Return a warning for each row whose metric did not converge."""
    named = (
        dataclasses.replace(row, name=f"the {kind} batch at epoch {row.name}")
        for kind, group in rows.items()
        for row in group
    )
    return list(unconverged(named))


def _check_switches(switch_epochs: Any) -> list[int]:
    try:
        switches = list(switch_epochs)
        different = len(set(switches)) == len(switches) > 0
    except TypeError:
        switches, different = [], False
    if not different:
        raise ArgumentError(f"`switch_epochs` must be a list of different epochs, got {switch_epochs!r}.")
    return sorted(check_count("switch_epochs", switch, low=0) for switch in switches)


def _named_metric(metric: Any) -> tuple[str, tuple[str, Mapping[str, Any]]]:
    """Return the name of the metric, and a pair of name and options."""
    given, options = metric if isinstance(metric, tuple) and len(metric) == 2 else (metric, {})
    name, _ = find_metric(given)
    return name, (name, options)
