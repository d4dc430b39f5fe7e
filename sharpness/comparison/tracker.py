"""Sharpness while a model is trained, measured from within the training loop."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Sequence
from typing import Any, Literal, final

import torch
from torch import Tensor, nn

from sharpness._checks import check_choice, check_count, check_flag
from sharpness._warn import warn
from sharpness.comparison.limit import limit_of, widest_group
from sharpness.errors import ArgumentError, ConvergenceWarning, ModelError, NonFiniteError, StateWarning
from sharpness.metrics.door import provenance
from sharpness.metrics.eigenvalues import top_eigenvalues
from sharpness.metrics.registry import metric_calls
from sharpness.metrics.report import Metric
from sharpness.objective import Objective
from sharpness.objective.losses import BatchLoss
from sharpness.objective.parameters import ParameterChoice
from sharpness.objective.reduction import LossFn
from sharpness.objective.wrappers import unwrap
from sharpness.results import TrajectoryResult
from sharpness.results.eigen import as_float64
from sharpness.results.headline import interval_of, stderr_of

ON_FAILURE = ("warn", "raise", "ignore")
DEFAULT: tuple[Metric, ...] = ("top_eigenvalues",)
_UNMEASURED = (NonFiniteError, ModelError, torch.cuda.OutOfMemoryError)  # what a training must survive
_NUMBERS = ("loss", "gradient_norm", "test_loss", "test_accuracy", "learning_rate", "limit")


@final
class SharpnessTracker:
    r"""Measure sharpness every so many steps of a training loop of your own.

    .. code-block:: python

        tracker = SharpnessTracker(loader, loss_fn, every=100)
        tracker.measure(model, optimizer)          # before the first step, if you like
        for inputs, targets in training_loader:
            ...
            optimizer.step()
            tracker.step(model, optimizer)
        tracker.result.plot()

    Each measurement is of the model in the mode ``mode``, over the whole loader: loss, length of the gradient, the
    metrics, the learning rate, and the largest eigenvalue at which full-batch training with that rate is stable.
    Training with large batches is known to end up hovering about that value (Cohen et al. 2021).

    Nothing of the training is touched: weights, gradients, statistics, flags, optimizer and random states are as they
    were, also within ``torch.no_grad()``, ``torch.inference_mode()`` and autocast, none of which the measurement sees.
    A step that is not measured counts up, and that is all. Nothing is kept between measurements but numbers.

    Every measurement starts afresh. With ``warm_start`` Lanczos starts near the eigenvectors found before, which are
    kept: that saves about a quarter of the products for one eigenvalue, a tenth for five, and may miss the moment at
    which another eigenvalue becomes the largest, so that the curve follows the old one for a while.

    Args:
        loader: Any re-iterable of batches, walked at each measurement. Not the training loader itself if that has
            ``persistent_workers``, since those serve one walk at a time.
        loss_fn: A criterion ``(outputs, targets) -> scalar``, or ``None`` to infer it (see `Objective`).
        every: Measure at each step whose number is a multiple of it.
        metrics: ``"default"``, the largest eigenvalue, or a list of names and ``(name, options)`` pairs.
        test_loader: Also record loss, and accuracy where there are classes, over these batches.
        batch_loss: ``callable(model, batch) -> (loss, weight)`` in place of ``loss_fn``.
        params: Names, globs, a compiled regular expression, or a predicate that choose parameters, at the first
            measurement and for all.
        mode: ``"eval"``, ``"train"`` or ``"as_is"``.
        max_batches: Use only the first so many batches; shuffling must then be off.
        seed: The same random numbers at every measurement; the global random state is left alone.
        progress: Show a progress bar; ``None`` shows one on a terminal after two seconds.
        on_failure: What to do where something cannot be measured, because training has diverged, a second derivative
            is missing or memory ran out, or a metric does not converge: ``"warn"`` once for each metric, ``"ignore"``
            or ``"raise"``. Unless it is raised, NaN is recorded, or what was found, and training goes on.
        memory: Bytes (or ``"2GiB"``) that may be kept between the products of a measurement.
        microbatch_size: Cut each batch into pieces of at most so many samples.
        precision: ``"exact"``, ``"tf32"``, ``"bfloat16"`` or ``"float16"`` (see `Objective`).
        warm_start: Start Lanczos near the eigenvectors of the measurement before; see above for what it may miss.
        compile: ``"auto"``, ``True`` or ``False``: whether products are compiled (see `Objective`).

    Raises:
        ArgumentError: If an option cannot be accepted.
        DataError: If a loader cannot be walked again and again.

    Cost: at each measurement one gradient, a forward pass over the test loader if there is one, and the metrics; for
    the largest eigenvalue about 10 passes. ``num_passes`` and ``seconds`` of the result say what it came to.

    References:
        Cohen et al. (2021), arXiv 2103.00065; Keskar et al. (2017), arXiv 1609.04836, figure 6.

    Example:
        >>> import torch, sharpness
        >>> model = torch.nn.Linear(1, 1, bias=False)
        >>> data = [(torch.tensor([[1.0]]), torch.zeros(1, 1))]  # f = w^2, with curvature 2
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
        >>> tracker = sharpness.SharpnessTracker(data)
        >>> for _ in range(3):
        ...     model(data[0][0]).square().sum().backward()
        ...     optimizer.step()
        ...     tracker.step(model, optimizer)
        >>> tracker.result.metrics["top_eigenvalues"].round(decimals=3)
        tensor([2., 2., 2.], dtype=torch.float64)
        >>> tracker.result.limits
        tensor([4., 4., 4.], dtype=torch.float64)
    """

    def __init__(
        self,
        loader: Iterable[Any],
        loss_fn: LossFn | None = None,
        *,
        every: int = 1,
        metrics: str | Sequence[Metric] = "default",
        test_loader: Iterable[Any] | None = None,
        batch_loss: BatchLoss | None = None,
        params: ParameterChoice | None = None,
        mode: str = "eval",
        max_batches: int | None = None,
        seed: int = 0,
        progress: bool | None = None,
        on_failure: Literal["warn", "raise", "ignore"] = "warn",
        memory: int | str = "auto",
        microbatch_size: int | None = None,
        precision: str = "exact",
        warm_start: bool = False,
        compile: bool | str = "auto",
    ) -> None:
        self.every = check_count("every", every)
        self.on_failure = check_choice("on_failure", on_failure, ON_FAILURE)
        self.warm_start = check_flag("warm_start", warm_start)
        self._calls = metric_calls(metrics, DEFAULT)
        self._near: dict[str, Tensor] = {}  # eigenvectors of the latest measurement
        self._loader, self._loss_fn, self._test_loader = loader, loss_fn, test_loader
        self._options: dict[str, Any] = {
            "batch_loss": batch_loss,
            "mode": mode,
            "max_batches": max_batches,
            "seed": seed,
            "progress": progress,
            "memory": memory,
            "microbatch_size": microbatch_size,
            "precision": precision,
            "compile": compile,
        }
        self._params: Any = params
        self._layout: tuple[tuple[str, tuple[int, ...]], ...] | None = None
        stand_in = nn.ParameterList([torch.zeros(1)])  # to refuse now what no model can change
        Objective(stand_in, loader, loss_fn, **self._options)
        if test_loader is not None:
            Objective(stand_in, test_loader, loss_fn, **{**self._options, "max_batches": None})
        self._step = 0
        self._rows: dict[int, dict[str, Any]] = {}
        self._settings: dict[str, Any] = {}
        self._passes, self._seconds = 0, 0.0
        self._warned: set[str] = set()

    @property
    def num_steps(self) -> int:
        """Return the number of steps counted so far."""
        return self._step

    @property
    def latest(self) -> dict[str, float]:
        """Return the numbers of the last measurement by name, for a logger; empty before the first."""
        if not self._rows:
            return {}
        row = self._rows[max(self._rows)]
        return {**{name: row[name] for name in _NUMBERS if row[name] is not None}, **row["metrics"]}

    def step(self, model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> None:
        """Count a step, and measure if it is one of those to measure; call it after ``optimizer.step()``.

        Args:
            model: The model that is trained.
            optimizer: Its optimizer, for learning rate and limit as they are at this moment.

        Raises:
            ArgumentError: If this is not the model of the steps before, or not an optimizer.
        """
        self._step += 1
        if self._step % self.every == 0:
            self.measure(model, optimizer)

    def measure(
        self, model: nn.Module, optimizer: torch.optim.Optimizer | None = None, *, step: int | None = None
    ) -> None:
        """Measure now, whatever ``every`` says.

        Args:
            model: The model that is trained.
            optimizer: Its optimizer, for learning rate and limit.
            step: Number to record the measurement under and to go on counting from, if you count yourself; the number
                of steps so far if ``None``. An earlier measurement under the same number is replaced.

        Raises:
            ArgumentError: If this is not the model of the steps before, or not an optimizer, or the steps go back.
        """
        if step is not None:
            step = check_count("step", step, low=0)
            if step < self._step:
                raise ArgumentError(
                    f"`step` must not go back, got {step} after {self._step}. Make a new SharpnessTracker per run."
                )
            self._step = step
        group = None if optimizer is None else widest_group(optimizer)
        objective = self._objective(model)
        started = time.perf_counter()
        row: dict[str, Any] = {
            **dict.fromkeys(("loss", "gradient_norm"), math.nan),
            **dict.fromkeys(("test_loss", "test_accuracy")),
            "learning_rate": math.nan if group is None else float(group["lr"]),
            "limit": math.nan if optimizer is None or group is None else limit_of(optimizer, group),
            **{kind: {} for kind in ("metrics", "intervals", "converged")},
        }
        try:
            with objective.session():
                self._fill(row, objective)
        finally:
            self._passes += objective.num_passes
        if self._test_loader is not None:
            self._test(row, model, self._test_loader)
        self._seconds += time.perf_counter() - started
        self._settings = provenance(objective, {})
        self._rows[self._step] = row

    @property
    def result(self) -> TrajectoryResult:
        """Return what was measured so far."""
        rows = [self._rows[step] for step in sorted(self._rows)]

        def column(name: str) -> Tensor:
            return as_float64([row[name] for row in rows])

        def optional(name: str) -> Tensor | None:
            known = any(row[name] is not None for row in rows)
            return as_float64([math.nan if row[name] is None else row[name] for row in rows]) if known else None

        def columns(kind: str, shape: tuple[int, ...], dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
            return {
                name: torch.tensor([row[kind][name] for row in rows], dtype=dtype).reshape(len(rows), *shape)
                for name in self._calls
            }

        return TrajectoryResult(
            steps=torch.tensor(sorted(self._rows), dtype=torch.int64),
            loss=column("loss"),
            gradient_norms=column("gradient_norm"),
            metrics=columns("metrics", ()),
            intervals=columns("intervals", (2,)),
            converged=columns("converged", (), torch.bool),
            test_loss=optional("test_loss"),
            test_accuracy=optional("test_accuracy"),
            learning_rates=column("learning_rate"),
            limits=column("limit"),
            num_passes=self._passes,
            seconds=self._seconds,
            settings={
                **self._settings,
                "every": self.every,
                "on_failure": self.on_failure,
                "warm_start": self.warm_start,
            },
        )

    def _objective(self, model: nn.Module) -> Objective:
        """Return a new objective, which keeps nothing from one measurement to the next.

        Its parameters are those chosen at first, also where others have been unfrozen since.
        """
        if not isinstance(model, nn.Module):
            raise ArgumentError(f"`model` must be a torch.nn.Module, got {type(model).__name__}.")
        if self._layout is not None:
            there = {name: tuple(p.shape) for name, p in unwrap(model).named_parameters() if p.requires_grad}
            for name, shape in self._layout:
                if there.get(name) != shape:
                    found = f"of shape {there[name]}" if name in there else "missing, or frozen"
                    raise ArgumentError(
                        f"`model` is not the one that was tracked so far: parameter {name!r} was of shape {shape} and "
                        f"is {found}. Make a SharpnessTracker for each model."
                    )
        objective = Objective(model, self._loader, self._loss_fn, params=self._params, **self._options)
        self._layout, self._params = objective.parameters.layout, list(objective.parameters.names)
        return objective

    def _fill(self, row: dict[str, Any], objective: Objective) -> None:
        """Measure loss, gradient and metrics; what cannot be measured is NaN, and so is all after a loss that is."""
        lost = False
        try:
            row["loss"], gradient = objective.value_and_gradient()
            row["gradient_norm"] = torch.linalg.vector_norm(gradient.double().cpu()).item()
        except _UNMEASURED as error:
            lost = True
            self._failed("loss and gradient", error)
        for name, call in self._calls.items():
            row["metrics"][name], row["intervals"][name] = math.nan, (math.nan, math.nan)
            row["converged"][name] = False
            if lost:
                continue
            try:
                record: Any = call(objective, "raise" if self.on_failure == "raise" else "ignore", **self._warm(name))
            except _UNMEASURED as error:
                self._failed(name, error)
                continue
            if self.warm_start and getattr(record, "eigenvectors", None) is not None:
                self._near[name] = record.eigenvectors
            row["metrics"][name], row["intervals"][name] = record.headline, _interval(record)
            row["converged"][name] = bool(getattr(record, "converged", True))
            if not row["converged"][name] and self.on_failure == "warn" and name not in self._warned:
                self._warned.add(name)
                warn(
                    f"{name} has not converged at step {self._step}: {record.headline:.4g}, {record.doubt}. "
                    "`converged` of the result says where; this is said once.",
                    ConvergenceWarning,
                )

    def _warm(self, name: str) -> dict[str, Any]:
        """Return the options with which a metric starts from the measurement before, where it can."""
        call = self._calls[name]
        if not self.warm_start or call.function is not top_eigenvalues:
            return {}
        if call.options.get("method", "lanczos") != "lanczos" or call.options.get("start") is not None:
            return {}
        return {"vectors": True, "start": self._near.get(name)}

    def _test(self, row: dict[str, Any], model: nn.Module, loader: Iterable[Any]) -> None:
        options = {**self._options, "max_batches": None}
        objective = Objective(model, loader, self._loss_fn, params=self._params, **options)
        row["test_loss"] = math.nan
        try:
            found = objective.evaluate()
            row["test_loss"], row["test_accuracy"] = found.loss, found.accuracy
        except _UNMEASURED as error:
            self._failed("test loss", error)
        finally:
            self._passes += objective.num_passes

    def _failed(self, what: str, error: Exception) -> None:
        """Raise, or warn once for each thing that cannot be measured, or go on."""
        if self.on_failure == "raise":
            raise error
        if self.on_failure == "warn" and what not in self._warned:
            self._warned.add(what)
            warn(
                f"{what} could not be measured at step {self._step} and is recorded as NaN: {error} Training goes on, "
                "and this is said once.",
                StateWarning,
            )


def _interval(record: Any) -> tuple[float, float]:
    """Return the interval of a metric's value, or the value and a standard error to each side, or NaN."""
    interval, stderr = interval_of(record), stderr_of(record)
    if interval is not None:
        return interval
    return (math.nan, math.nan) if stderr is None else (record.headline - stderr, record.headline + stderr)
