"""Does a larger batch find a sharper minimum? Train with several batch sizes and compare."""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Callable, Sequence
from typing import Any, Literal

from torch import nn
from torch.utils.data import DataLoader

from sharpness._checks import check_count, check_memory, check_seed
from sharpness._progress import check_progress
from sharpness.comparison.checkpoints import Store
from sharpness.comparison.compare import Metric, check_metrics, compare
from sharpness.comparison.grid import (
    Trainer,
    binding,
    check_test_set,
    missed,
    recipe_trainer,
    run_grid,
    spreads,
    user_trainer,
)
from sharpness.comparison.recipe import LR, MOMENTUM, STOP_LOSS, Default, Recipe, callable_name, check_batch_sizes
from sharpness.comparison.schedule import OptimizerFactory
from sharpness.comparison.starts import Starts
from sharpness.comparison.train import as_dataset, evaluation_batches
from sharpness.errors import ArgumentError
from sharpness.objective import Objective
from sharpness.objective.losses import Criterion
from sharpness.objective.reduction import LossFn
from sharpness.results import Comparison

_ALIKE = (
    "all seeds start from the same weights, since make_model returns them whatever the seed: the spread is that of the "
    "order of the samples alone. Let make_model draw its weights, and leave the seed to compare_batch_sizes."
)


def compare_batch_sizes(
    make_model: Callable[[], nn.Module],
    train_set: Any,
    test_set: Any,
    loss_fn: LossFn | None = None,
    *,
    batch_sizes: Sequence[int] = (32, 512),
    seeds: int = 3,
    optimizer: Literal["sgd", "adam"] | OptimizerFactory = "sgd",
    lr: float = LR,
    momentum: float = MOMENTUM,
    stop_loss: float | None = STOP_LOSS,
    epochs: int | None = None,
    updates: int | None = None,
    max_epochs: int | None = None,
    lr_scaling: Literal["none", "linear", "sqrt"] = "none",
    warmup_epochs: float = 0.0,
    ghost_batch_size: int | None = None,
    train: Callable[[nn.Module, DataLoader[Any]], Any] | None = None,
    metrics: str | Sequence[Metric] = "default",
    checkpoint_dir: str | os.PathLike[str] | None = None,
    seed: int = 0,
    progress: bool | None = None,
    memory: int | str = "auto",
    on_trained: Callable[[int, int, nn.Module], None] | None = None,
) -> Comparison:
    """Train one architecture with several batch sizes from the same weights to the same stop, and compare the minima.

    For each seed all batch sizes start from the same initial weights: those of the first model that ``make_model``
    returns are copied into the others if it does not return the same for the same seed (``settings`` says so). By
    default training stops when the loss over the whole training set, in eval mode, is at most ``stop_loss``, so that
    the minima are compared at (nearly) equal loss. With more than two batch sizes this is the sweep of Keskar et al.
    (Figure 4) and Radiuk: ``print(comparison)`` and ``comparison.figure()`` show accuracy, sharpness, epochs, updates,
    samples and wall time against the batch size.

    The last batch of an epoch is smaller where the batch size does not divide the data; it is left out where it would
    be a single sample and the model has BatchNorm layers. All random numbers of a run come from its seed; the global
    generators of PyTorch, NumPy and Python are left alone.

    Args:
        make_model: Returns a new model at each call, with random initial weights.
        train_set: Data set of ``(input, target)``, or a tuple of tensors ``(inputs, targets)``.
        test_set: Likewise, for test loss and accuracy.
        loss_fn: A criterion ``(outputs, targets) -> scalar``, or ``None`` to infer it (see `Objective`).
        batch_sizes: Samples per update; the first is what the others are compared with.
        seeds: How many times to repeat everything, with other initial weights and another order.
        optimizer: ``"sgd"``, ``"adam"``, or a callable from parameters to an optimizer, which brings its own learning
            rate and momentum.
        lr: Learning rate for the first batch size, 0.001 for ``"adam"`` if it is not given; not with a callable
            ``optimizer``.
        momentum: Momentum of ``"sgd"``; not with others.
        stop_loss: Training loss at which to stop; replaced by ``epochs`` or ``updates``, one of which may be given in
            its place.
        epochs: Stop after so many epochs.
        updates: Stop after so many updates.
        max_epochs: Where a training that misses ``stop_loss`` ends, 1000 if ``None``; it is kept, and marked in the
            warnings.
        lr_scaling: Learning rate of the other batch sizes: the same (``"none"``), times the ratio of the batch sizes
            (``"linear"``), or times its root (``"sqrt"``). That of a callable ``optimizer`` is scaled likewise.
        warmup_epochs: Linear warm-up: of the ``T`` updates in so many epochs (rounded up), update ``t`` is made at
            ``t / T`` of the learning rate. Goyal et al. start at the unscaled rate instead of near zero.
        ghost_batch_size: Ghost batch normalisation: in training, BatchNorm layers normalise each so many samples of a
            batch by their own mean and variance, and move their running statistics once for each, in turn, so that the
            ``i``-th last weighs :math:`m (1 - m)^{i - 1}` with the layer's momentum ``m``. A rest is a ghost batch of
            its own, but a single sample joins the one before. Batches up to this size are normalised as usual. What is
            measured is the model as ``make_model`` made it, in eval mode, with these running statistics.
        train: ``callable(model, loader)`` that trains ``model`` in place, instead of the training here; all options
            above from ``optimizer`` to ``ghost_batch_size`` are then refused. ``loader`` is a shuffled ``DataLoader``
            of the batch size, in an order of the seed's own. If it returns a mapping, its ``epochs``, ``updates``,
            ``samples`` and ``learning_rate`` go into the table; anything else that it returns is ignored.
        metrics: As in :func:`compare`.
        checkpoint_dir: Folder for finished runs: weights, and what the training took. A run that is there is not
            repeated, so that a call that was interrupted goes on, to the same bits; more seeds or batch sizes may be
            asked for. Trainings with another model, data, loss or options are refused. Of a user's function only the
            source text is compared, and of data that are no tensors 64 samples.
        seed: First of the seeds.
        progress: Show progress bars; ``None`` shows them on a terminal after two seconds.
        memory: Bytes (or ``"2GiB"``) that may be kept between products.
        on_trained: Called with batch size, seed and model for each trained model (also one read from
            ``checkpoint_dir``), to save it for instance.

    Returns:
        One row per batch size, with the spread over the seeds. The seconds of a training include its passes that look
        at the loss.

    Raises:
        ArgumentError: If an option cannot be accepted, before anything is trained; if ``train`` returns another model,
            or counts that are none.
        DataError: If a file in ``checkpoint_dir`` is damaged, or a batch cannot be used; the first 1024 samples of
            ``test_set`` are tried before anything is trained.
        NonFiniteError: If a training diverges; finished ones stay in ``checkpoint_dir``.

    Cost: ``len(batch_sizes) * seeds`` trainings, each with a forward pass over the training set after every epoch
    (up to fifteen times an epoch near ``stop_loss``; one in all with ``train``), and the metrics for each trained
    model. All models are held until the end.

    References:
        Keskar et al. (2017), arXiv 1609.04836; Goyal et al. (2017), arXiv 1706.02677 (linear scaling, warm-up); Hoffer
        et al. (2017), arXiv 1705.08741 (square root; Algorithm 1, ghost batches); Radiuk (2017), Information Technology
        and Management Science 20.

    Example:
        >>> import torch, sharpness
        >>> inputs = torch.randn(64, 3, generator=torch.Generator().manual_seed(0))
        >>> data = (inputs, (inputs[:, 0] > 0).long())
        >>> comparison = sharpness.compare_batch_sizes(
        ...     lambda: torch.nn.Linear(3, 2), data, data, batch_sizes=(4, 64), epochs=2, metrics=["top_eigenvalues"]
        ... )
        >>> [(row.name, row.updates, row.samples) for row in comparison.rows]
        [('4', 32, 128), ('64', 2, 128)]
    """
    starts = Starts(make_model)
    if on_trained is not None and not callable(on_trained):
        raise ArgumentError(f"`on_trained` must be callable, got {type(on_trained).__name__}.")
    Criterion(loss_fn, None)
    check_memory(memory)
    train_data, test_data = as_dataset("train_set", train_set), as_dataset("test_set", test_set)
    sizes = check_batch_sizes(batch_sizes, len(train_data))  # type: ignore[arg-type]
    seeds = check_count("seeds", seeds)
    check_seed(seed)
    check_progress(progress)
    options = {
        "optimizer": optimizer,
        "lr": lr,
        "momentum": momentum,
        "stop_loss": stop_loss,
        "epochs": epochs,
        "updates": updates,
        "max_epochs": max_epochs,
        "lr_scaling": lr_scaling,
        "warmup_epochs": warmup_epochs,
        "ghost_batch_size": ghost_batch_size,
    }
    recipe = Recipe.of(batch_sizes=sizes, **options) if train is None else None
    if train is not None:
        _check_alone(train, options)
    trainer: Trainer = (
        recipe_trainer(recipe, train_data, loss_fn) if recipe else user_trainer(train, train_data, loss_fn)  # type: ignore[arg-type]
    )
    started, runs = time.perf_counter(), range(seed, seed + seeds)
    store = None if checkpoint_dir is None else Store(checkpoint_dir)
    check_metrics(metrics, lambda data: Objective(starts.peek(seed), data, loss_fn, memory=memory))
    check_test_set(starts.peek(seed), test_data, loss_fn)
    if store is not None:
        store.bind(binding(train_data, loss_fn, starts, seed, recipe, train), starts, runs)
    trained = run_grid(starts, trainer, sizes, runs, store=store, progress=progress, on_trained=on_trained)

    comparison = compare(
        {str(size): [model for model, _ in trained[size]] for size in sizes},
        evaluation_batches(train_data),
        loss_fn,
        test_loader=evaluation_batches(test_data),
        metrics=metrics,
        initial={str(size): [starts.weights(run) for run in runs] for size in sizes},
        seed=seed,
        progress=progress,
        memory=memory,
    )
    took = {size: [run for _, run in trained[size]] for size in sizes}
    rows = (
        dataclasses.replace(row, **spreads(took[size]))  # type: ignore[arg-type]
        for row, size in zip(comparison.rows, sizes, strict=True)
    )
    return dataclasses.replace(
        comparison,
        rows=tuple(rows),
        warnings=(*missed(took, recipe, "batch size {}"), *comparison.warnings),
        notes=(*comparison.notes, *[_ALIKE] * starts.alike()),
        seconds=time.perf_counter() - started,
        settings={
            **comparison.settings,
            "batch_sizes": sizes,
            "seeds": seeds,
            **(recipe.settings() if recipe else {"train": callable_name(train)}),
            "initial_weights": "copied" if starts.copied else "as made",
        },
    )


def _check_alone(train: Any, options: dict[str, Any]) -> None:
    """Refuse options of a training that the user's own takes the place of."""
    if not callable(train):
        raise ArgumentError(f"`train` must be a callable (model, loader), got {type(train).__name__}.")
    idle = {"optimizer": "sgd", "lr_scaling": "none", "warmup_epochs": 0.0}
    given = [
        name
        for name, value in options.items()
        if not isinstance(value, Default) and value is not None and value != idle.get(name)
    ]
    if given:
        named = ", ".join(f"`{name}`" for name in given)
        raise ArgumentError(
            f"`train` is your own, and {named} would be ignored by it. Leave the options out, and do in `train` what "
            "they ask for."
        )
