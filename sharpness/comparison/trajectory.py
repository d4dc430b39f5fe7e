"""Sharpness against loss while small and large batches train (Keskar et al. 2017, figure 6)."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any, Literal

from torch import nn
from torch.optim import Optimizer

from sharpness._checks import check_choice, check_count, check_seed
from sharpness._progress import check_progress, progress_bar
from sharpness.comparison.recipe import LR, MOMENTUM, STOP_LOSS, Recipe, check_batch_sizes
from sharpness.comparison.schedule import OptimizerFactory
from sharpness.comparison.starts import Starts
from sharpness.comparison.tracker import SharpnessTracker
from sharpness.comparison.train import Training, as_dataset, evaluation_batches
from sharpness.metrics.report import Metric
from sharpness.objective.guard import own_randomness
from sharpness.objective.reduction import LossFn
from sharpness.results import TrajectoryComparison, TrajectoryResult


def trajectory(
    make_model: Callable[[], nn.Module],
    train_set: Any,
    test_set: Any = None,
    loss_fn: LossFn | None = None,
    *,
    batch_sizes: Sequence[int] = (32, 512),
    seeds: int = 1,
    optimizer: Literal["sgd", "adam"] | OptimizerFactory = "sgd",
    lr: float = LR,
    momentum: float = MOMENTUM,
    stop_loss: float | None = STOP_LOSS,
    epochs: int | None = None,
    updates: int | None = None,
    max_epochs: int | None = None,
    lr_scaling: Literal["none", "linear", "sqrt"] = "none",
    every: int = 1,
    metrics: str | Sequence[Metric] = "default",
    mode: str = "eval",
    max_batches: int | None = None,
    seed: int = 0,
    progress: bool | None = None,
    on_failure: Literal["warn", "raise", "ignore"] = "warn",
    memory: int | str = "auto",
) -> TrajectoryComparison:
    """Track sharpness against the training loss while one architecture is trained with several batch sizes.

    Figure 6 of Keskar et al. (2017): at a high loss the batch sizes are alike, and they part as the loss falls. For
    each seed all batch sizes start from the same initial weights and see the samples in the same order, as in
    `compare_batch_sizes`; each model is measured before training, after every ``every``-th epoch, and at its end.

    Args:
        make_model: Returns a new model at each call, with random initial weights.
        train_set: Data set of ``(input, target)``, or a tuple of tensors ``(inputs, targets)``.
        test_set: Likewise, to record test loss and accuracy too.
        loss_fn: A criterion ``(outputs, targets) -> scalar``, or ``None`` to infer it (see `Objective`).
        batch_sizes: Samples per update.
        seeds: How many times to repeat everything, with other initial weights and another order.
        optimizer: As in `compare_batch_sizes`, like all down to ``lr_scaling``.
        lr: Learning rate for the first batch size, 0.001 for ``"adam"`` if it is not given.
        momentum: Momentum of ``"sgd"``.
        stop_loss: Training loss at which to stop.
        epochs: Stop after so many epochs instead.
        updates: Stop after so many updates instead.
        max_epochs: Where a training that misses ``stop_loss`` ends, 1000 if ``None``.
        lr_scaling: Learning rate of the other batch sizes: the same (``"none"``), times the ratio of the batch sizes
            (``"linear"``), or times its root (``"sqrt"``).
        every: Epochs from one measurement to the next.
        metrics: As in `SharpnessTracker`; ``[("epsilon_sharpness", {"epsilon": 1e-3})]`` is that of the figure.
        mode: Mode in which the models are measured, ``"eval"`` or ``"train"``; they are stopped by the loss in eval
            mode.
        max_batches: Measure on the first so many batches of 1024 training samples; all if ``None``.
        seed: First of the seeds.
        progress: Show progress bars; ``None`` shows them on a terminal after two seconds.
        on_failure: As in `SharpnessTracker`.
        memory: Bytes (or ``"2GiB"``) that may be kept between products.

    Returns:
        A mapping from batch sizes to trajectories, one per seed, whose steps are the updates of the optimizer; its
        ``plot`` shows sharpness against loss, its ``table`` sharpness at equal losses.

    Raises:
        ArgumentError: If an option cannot be accepted, before anything is trained.
        NonFiniteError: If a training diverges.

    Cost: ``len(batch_sizes) * seeds`` trainings, each with a forward pass over the training set after every epoch, and
    for each measurement about 12 passes with the default metric.

    References:
        Keskar et al. (2017), arXiv 1609.04836, figure 6.
    """
    starts = Starts(make_model)
    data = as_dataset("train_set", train_set)
    sizes = check_batch_sizes(batch_sizes, len(data))  # type: ignore[arg-type]
    seeds = check_count("seeds", seeds)
    check_count("every", every)
    check_choice("mode", mode, ("eval", "train"))
    check_seed(seed)
    check_progress(progress)
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

    def tracker() -> SharpnessTracker:
        return SharpnessTracker(
            evaluation_batches(data),
            loss_fn,
            metrics=metrics,
            test_loader=None if test_set is None else evaluation_batches(as_dataset("test_set", test_set)),
            mode=mode,
            max_batches=max_batches,
            seed=seed,
            progress=progress,
            on_failure=on_failure,
            memory=memory,
        )

    tracker()  # refuses what it must before anything is trained
    started = time.perf_counter()
    curves: dict[int, list[TrajectoryResult]] = {size: [] for size in sizes}
    reached: dict[int, list[bool]] = {size: [] for size in sizes}
    with progress_bar(progress, total=len(sizes) * seeds, title="trajectory", unit="run") as bar:
        for run in range(seed, seed + seeds):
            for size in sizes:
                model = starts.model(run)
                with own_randomness(run, 1):
                    recorder = _Recorder(
                        tracker(),
                        model,
                        recipe.make_optimizer(model, size),
                        every=every,
                        bar=bar,
                        title=f"batch {size}, seed {run}",
                    )
                    training = recipe.train(
                        model,
                        data,
                        loss_fn,
                        batch_size=size,
                        seed=run,
                        report=recorder.report,
                        optimizer=recorder.optimizer,
                    )
                    curves[size].append(recorder.finish(training))
                reached[size].append(training.reached)
                bar.update()
    return TrajectoryComparison(
        curves={size: tuple(runs) for size, runs in curves.items()},
        reached={size: tuple(flags) for size, flags in reached.items()},
        num_passes=sum(run.num_passes for runs in curves.values() for run in runs),
        seconds=time.perf_counter() - started,
        settings={
            **curves[sizes[0]][0].settings,
            "batch_sizes": list(sizes),
            "seeds": seeds,
            **recipe.settings(),
            "every": every,
            "initial_weights": "copied" if starts.copied else "as made",
        },
    )


class _Recorder:
    """Measures a model before its training, after some of the epochs, and at the end; counts the updates."""

    def __init__(
        self, tracker: SharpnessTracker, model: nn.Module, optimizer: Optimizer, *, every: int, bar: Any, title: str
    ) -> None:
        self._tracker, self._model, self.optimizer = tracker, model, optimizer
        self._every, self._bar, self._title = every, bar, title
        self._updates = 0
        self._hook = optimizer.register_step_post_hook(self._count)
        tracker.measure(model, optimizer, step=0)

    def _count(self, *_: Any) -> None:
        self._updates += 1

    def report(self, epoch: int, loss: float) -> None:
        """Take note of an epoch that has ended."""
        self._bar.set_postfix_str(f"{self._title}, epoch {epoch}, loss {loss:.2e}", refresh=False)
        self._bar.update(0)
        if epoch % self._every == 0:
            self._tracker.measure(self._model, self.optimizer, step=self._updates)

    def finish(self, training: Training) -> TrajectoryResult:
        """Measure the end, unless the last epoch was, and return the trajectory."""
        self._hook.remove()
        if training.epochs % self._every:
            self._tracker.measure(self._model, self.optimizer, step=self._updates)
        return self._tracker.result
