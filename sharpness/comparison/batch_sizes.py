"""Does a larger batch find a sharper minimum? Train with several batch sizes and compare."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Sequence
from typing import Any, Literal

from torch import nn

from sharpness._checks import check_choice, check_count, check_memory, check_positive, check_seed
from sharpness._progress import check_progress, progress_bar
from sharpness.comparison.compare import Metric, check_metrics, compare
from sharpness.comparison.train import (
    OPTIMIZERS,
    OptimizerFactory,
    Training,
    as_dataset,
    evaluation_batches,
    make_optimizer,
    train,
)
from sharpness.errors import ArgumentError
from sharpness.objective.guard import own_randomness
from sharpness.objective.losses import Criterion
from sharpness.objective.reduction import LossFn
from sharpness.results import Comparison, Spread

LR_SCALING: dict[str, Callable[[float], float]] = {"none": lambda ratio: 1.0, "linear": float, "sqrt": math.sqrt}


def compare_batch_sizes(
    make_model: Callable[[], nn.Module],
    train_set: Any,
    test_set: Any,
    loss_fn: LossFn | None = None,
    *,
    batch_sizes: Sequence[int] = (32, 512),
    seeds: int = 3,
    optimizer: Literal["sgd", "adam"] | OptimizerFactory = "sgd",
    lr: float = 0.05,
    momentum: float = 0.9,
    stop_loss: float = 1e-2,
    max_epochs: int = 1000,
    lr_scaling: Literal["none", "linear", "sqrt"] = "none",
    metrics: str | Sequence[Metric] = "default",
    seed: int = 0,
    progress: bool | None = None,
    memory: int | str = "auto",
    on_trained: Callable[[int, int, nn.Module], None] | None = None,
) -> Comparison:
    """Train one architecture with several batch sizes to the same training loss, and compare the minima.

    For each seed all batch sizes start from the same initial weights and see the samples in the same order. Training
    stops when the loss over the whole training set, in eval mode, is at most ``stop_loss``, so that the minima are
    compared at (nearly) equal loss.

    Args:
        make_model: Returns a new model at each call, with random initial weights.
        train_set: Data set of ``(input, target)``, or a tuple of tensors ``(inputs, targets)``.
        test_set: Likewise, for test loss and accuracy.
        loss_fn: A criterion ``(outputs, targets) -> scalar``, or ``None`` to infer it (see `Objective`).
        batch_sizes: Samples per update; the first is what the others are compared with.
        seeds: How many times to repeat everything, with other initial weights and another order.
        optimizer: ``"sgd"``, ``"adam"``, or a callable from parameters to an optimizer (then ``lr``, ``momentum`` and
            ``lr_scaling`` are its own business).
        lr: Learning rate for the first batch size.
        momentum: Momentum of ``"sgd"``.
        stop_loss: Training loss at which to stop.
        max_epochs: Where to stop at the latest; runs that end here are marked in the warnings.
        lr_scaling: Learning rate of the other batch sizes: the same (``"none"``), times the ratio of the batch sizes
            (``"linear"``), or times its root (``"sqrt"``).
        metrics: As in :func:`compare`.
        seed: First of the seeds.
        progress: Show progress bars; ``None`` shows them on a terminal after two seconds.
        memory: Bytes (or ``"2GiB"``) that may be kept between products.
        on_trained: Called with batch size, seed and model after each training, to save the model for instance.

    Returns:
        One row per batch size, with the spread over the seeds.

    Raises:
        ArgumentError: If an option cannot be accepted, before anything is trained.
        NonFiniteError: If a training diverges.

    Cost: ``len(batch_sizes) * seeds`` trainings, each with a forward pass over the training set after every epoch
    (eight times an epoch near the stop), and the metrics for each trained model.

    References:
        Keskar et al. (2017), arXiv 1609.04836; Goyal et al. (2017), arXiv 1706.02677 (linear scaling); Hoffer et al.
        (2017), arXiv 1705.08741 (square root).
    """
    if isinstance(make_model, nn.Module) or not callable(make_model):
        raise ArgumentError(
            f"`make_model` must be a function that returns a new model, got {type(make_model).__name__}. "
            "Pass lambda: MyModel(), so that each training starts from a model of its own."
        )
    if on_trained is not None and not callable(on_trained):
        raise ArgumentError(f"`on_trained` must be callable, got {type(on_trained).__name__}.")
    Criterion(loss_fn, None)
    check_memory(memory)
    train_data, test_data = as_dataset("train_set", train_set), as_dataset("test_set", test_set)
    sizes = _check_batch_sizes(batch_sizes, len(train_data))  # type: ignore[arg-type]
    check_count("seeds", seeds)
    check_count("max_epochs", max_epochs)
    check_positive("lr", lr)
    check_positive("momentum", momentum, allow_zero=True)
    check_positive("stop_loss", stop_loss)
    check_choice("lr_scaling", lr_scaling, LR_SCALING)
    check_seed(seed)
    check_progress(progress)
    check_metrics(metrics)
    if not callable(optimizer):
        check_choice("optimizer", optimizer, OPTIMIZERS)

    started = time.perf_counter()
    models: dict[int, list[nn.Module]] = {size: [] for size in sizes}
    trainings: dict[int, list[Training]] = {size: [] for size in sizes}
    with progress_bar(progress, total=len(sizes) * seeds, title="training", unit="run") as bar:
        for run in range(seed, seed + seeds):
            for size in sizes:
                with own_randomness(run):
                    model = _fresh(make_model, [m for made in models.values() for m in made])
                    rate = lr * LR_SCALING[lr_scaling](size / sizes[0])
                    trainings[size].append(
                        train(
                            model,
                            train_data,
                            loss_fn,
                            batch_size=size,
                            optimizer=make_optimizer(optimizer, model.parameters(), lr=rate, momentum=momentum),
                            stop_loss=stop_loss,
                            max_epochs=max_epochs,
                            seed=run,
                            report=_reporter(bar, size, run),
                        )
                    )
                models[size].append(model)
                bar.update()
                if on_trained is not None:
                    on_trained(size, run, model)

    comparison = compare(
        {str(size): models[size] for size in sizes},
        evaluation_batches(train_data),
        loss_fn,
        test_loader=evaluation_batches(test_data),
        metrics=metrics,
        seed=seed,
        progress=progress,
        memory=memory,
    )
    rows = tuple(
        dataclasses.replace(
            row,
            epochs=Spread.of(t.epochs for t in trainings[size]),
            updates=Spread.of(t.updates for t in trainings[size]),
            seconds=Spread.of(t.seconds for t in trainings[size]),
        )
        for row, size in zip(comparison.rows, sizes, strict=True)
    )
    missed = [
        f"batch size {size} did not reach the loss {stop_loss:g} in {max_epochs} epochs for "
        f"{sum(not t.reached for t in trainings[size])} of {seeds} seeds."
        for size in sizes
        if not all(t.reached for t in trainings[size])
    ]
    return dataclasses.replace(
        comparison,
        rows=rows,
        warnings=(*missed, *comparison.warnings),
        seconds=time.perf_counter() - started,
        settings={
            **comparison.settings,
            "batch_sizes": list(sizes),
            "seeds": seeds,
            "optimizer": optimizer if isinstance(optimizer, str) else repr(optimizer),
            "lr": lr,
            "momentum": momentum,
            "stop_loss": stop_loss,
            "max_epochs": max_epochs,
            "lr_scaling": lr_scaling,
        },
    )


def _reporter(bar: Any, size: int, run: int) -> Callable[[int, float], None]:
    """Return what shows the state of one training beside the bar of the whole grid."""

    def report(epoch: int, loss: float) -> None:
        bar.set_postfix_str(f"batch {size}, seed {run}, epoch {epoch}, loss {loss:.2e}", refresh=False)
        bar.update(0)

    return report


def _check_batch_sizes(batch_sizes: Any, num_samples: int) -> list[int]:
    try:
        sizes = list(batch_sizes)
    except TypeError:
        sizes = []
    if not sizes or len(set(sizes)) != len(sizes):
        raise ArgumentError(f"`batch_sizes` must be a list of different batch sizes, got {batch_sizes!r}.")
    return [check_count("batch_sizes", size, high=num_samples, of="the size of the training set") for size in sizes]


def _fresh(make_model: Callable[[], nn.Module], made: Sequence[nn.Module]) -> nn.Module:
    model = make_model()
    if not isinstance(model, nn.Module):
        raise ArgumentError(f"`make_model` must return a torch.nn.Module, got {type(model).__name__}.")
    if any(model is other for other in made):
        raise ArgumentError("`make_model` returned the same object twice. Build a new model at each call.")
    return model
