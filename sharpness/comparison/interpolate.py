"""Loss along a path between two models: is there a barrier, and which minimum is wider?"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from sharpness._checks import check_choice
from sharpness._progress import progress_bar
from sharpness.comparison.directions import all_tensors, require_alike
from sharpness.errors import ArgumentError
from sharpness.metrics.door import provenance
from sharpness.objective import Evaluation, Objective
from sharpness.objective.losses import BatchLoss
from sharpness.objective.reduction import LossFn
from sharpness.objective.running_statistics import RunningStatistics, fixed_norms
from sharpness.objective.surface import evaluate_anywhere
from sharpness.objective.wrappers import unwrap
from sharpness.results import InterpolationResult
from sharpness.results.eigen import as_float64

BATCH_NORM = ("recompute", "interpolate", "keep")


def interpolate(
    model_a: nn.Module,
    model_b: nn.Module,
    loader: Iterable[Any],
    loss_fn: LossFn | None = None,
    *,
    test_loader: Iterable[Any] | None = None,
    alphas: Sequence[float] | Tensor | None = None,
    path: Literal["linear", "curved"] = "linear",
    batch_norm: Literal["recompute", "interpolate", "keep"] = "recompute",
    batch_loss: BatchLoss | None = None,
    mode: str = "eval",
    max_batches: int | None = None,
    seed: int = 0,
    progress: bool | None = None,
    memory: int | str = "auto",
    microbatch_size: int | None = None,
    precision: str = "exact",
) -> InterpolationResult:
    r"""Evaluate loss and accuracy along a path from ``model_a`` (alpha = 0) to ``model_b`` (alpha = 1).

    .. math::
        \theta(\alpha) = (1 - \alpha)\, a + \alpha\, b \quad\text{or}\quad
        \theta(\alpha) = \cos(\tfrac{\alpha \pi}{2})\, a + \sin(\tfrac{\alpha \pi}{2})\, b.

    Both models are left untouched, and the ends of the path are the models themselves, exactly. A loss that is NaN or
    infinite on the way is in the result as such.

    Args:
        model_a: The model at alpha = 0.
        model_b: The model at alpha = 1, of the same architecture.
        loader: Training data.
        loss_fn: A criterion ``(outputs, targets) -> scalar``, or ``None`` to infer it (see `Objective`).
        test_loader: Data for test loss and accuracy.
        alphas: Positions; ``None`` means 25 from -1 to 2, as Keskar et al. draw them.
        path: ``"linear"`` or ``"curved"``.
        batch_norm: Running statistics between the models: estimated anew on ``loader`` (``"recompute"``, the mean over
            its batches by their numbers of samples), on the same path as the weights (``"interpolate"``), or those of
            ``model_a`` (``"keep"``). It makes no difference in a mode where batches normalise themselves. Other buffers
            move with ``"interpolate"`` only, and are those of ``model_a`` between the models otherwise.
        batch_loss: ``callable(model, batch) -> (loss, weight)`` in place of ``loss_fn``.
        mode: ``"eval"``, ``"train"`` or ``"as_is"``.
        max_batches: Use only the first so many batches of ``loader``; test data are used whole.
        seed: Seed of everything random.
        progress: Show a progress bar; ``None`` shows one on a terminal after two seconds.
        memory: Bytes (or ``"2GiB"``) of batches that may be kept between evaluations.
        microbatch_size: Cut each batch into pieces of at most so many samples; statistics are estimated on whole ones.
        precision: ``"exact"``, ``"tf32"``, ``"bfloat16"`` or ``"float16"`` (see `Objective`).

    Returns:
        Losses and accuracies at each position, and the height of the barrier.

    Raises:
        ArgumentError: If the models differ in architecture, or an option cannot be accepted.
        DataError: If a loader or batch cannot be used, or a batch has no variance to estimate statistics from.

    Cost: one forward pass over each loader per position, and one more over ``loader`` for each position between or
    beyond the models where running statistics are estimated anew.

    References:
        Goodfellow et al. (2015), arXiv 1412.6544; Keskar et al. (2017), arXiv 1609.04836, section 2.2.1 and appendix D.
    """
    check_choice("path", path, ("linear", "curved"))
    check_choice("batch_norm", batch_norm, BATCH_NORM)
    positions = _positions(alphas)
    options: dict[str, Any] = {
        "batch_loss": batch_loss,
        "mode": mode,
        "seed": seed,
        "memory": memory,
        "microbatch_size": microbatch_size,
        "precision": precision,
    }
    train = Objective(model_a, loader, loss_fn, max_batches=max_batches, progress=progress, **options)
    test = None
    if test_loader is not None:
        test = Objective(model_a, test_loader, loss_fn, **options)
    start, end = all_tensors(model_a, "model_a"), all_tensors(model_b, "model_b")
    require_alike(start, end)
    if mode == "as_is":
        _require_same_modes(train.model, unwrap(model_b))

    started = time.perf_counter()
    moving = {name for name, _ in train.model.named_parameters()}
    norms = fixed_norms(train.model, mode)
    estimate = RunningStatistics(train, norms) if batch_norm == "recompute" and norms else None

    own = {name: torch.empty_like(tensor) for name, tensor in start.items()}  # the same memory for each point

    def at(alpha: float) -> dict[str, Tensor]:
        if alpha in (0.0, 1.0):  # the models, to the bit
            whole = end if alpha else start
            return {name: tensor.copy_(whole[name]) for name, tensor in own.items()}
        share_a, share_b = 1 - alpha, alpha
        if path == "curved":
            share_a, share_b = math.cos(alpha * math.pi / 2), math.sin(alpha * math.pi / 2)
        for name, a in start.items():
            moves = a.is_floating_point() and (name in moving or batch_norm == "interpolate")
            if moves:
                torch.mul(a, share_a, out=own[name]).add_(end[name].to(a.device), alpha=share_b)
            else:
                own[name].copy_(a)
        return estimate.at(own) if estimate is not None else own

    on_train, on_test = {}, []
    wanted = [*positions, *(alpha for alpha in (0.0, 1.0) if alpha not in positions)]  # the barrier is above the ends
    with train.session(), progress_bar(train.progress, total=len(wanted), title="interpolate", unit="point") as bar:
        for i, alpha in enumerate(wanted):
            point = at(alpha)
            again = {name: t.clone() for name, t in point.items()} if test is not None else {}
            on_train[alpha] = evaluate_anywhere(train, tensors=point)
            if test is not None and i < len(positions):
                on_test.append(evaluate_anywhere(test, tensors=again))
            bar.update()
    along = [on_train[alpha] for alpha in positions]
    at_a, at_b = on_train[0.0].loss, on_train[1.0].loss
    excess = [on_train[a].loss - ((1 - a) * at_a + a * at_b) for a in positions if 0 <= a <= 1]
    return InterpolationResult(
        alphas=as_float64(positions),
        train_loss=as_float64([evaluation.loss for evaluation in along]),
        train_accuracy=_accuracies(along),
        test_loss=as_float64([evaluation.loss for evaluation in on_test]) if test is not None else None,
        test_accuracy=_accuracies(on_test),
        barrier=math.nan if any(map(math.isnan, excess)) else max([0.0, *excess]),
        num_passes=train.num_passes + (test.num_passes if test is not None else 0),
        seconds=time.perf_counter() - started,
        settings=provenance(train, {"path": path, "batch_norm": batch_norm}),
    )


def _positions(alphas: Any) -> list[float]:
    try:
        positions = [float(alpha) for alpha in (torch.linspace(-1, 2, 25) if alphas is None else alphas)]
    except (TypeError, ValueError):
        positions = []
    if not positions or not all(map(math.isfinite, positions)):
        raise ArgumentError(f"`alphas` must be a list of finite numbers, at least one, got {alphas!r}.")
    return positions


def _accuracies(evaluations: Sequence[Evaluation]) -> Tensor | None:
    found = [evaluation.accuracy for evaluation in evaluations if evaluation.accuracy is not None]
    return as_float64(found) if found and len(found) == len(evaluations) else None


def _require_same_modes(model_a: nn.Module, model_b: nn.Module) -> None:
    """Refuse two models of which a module of one is in train mode and that of the other is not.

    Raises:
        ArgumentError: If there is one.
    """
    both = zip(model_a.named_modules(), model_b.modules(), strict=False)
    different = [name for (name, a), b in both if a.training != b.training]
    if different:
        raise ArgumentError(
            f'mode="as_is" takes the models in the modes they are in, and these differ, at {different[0]!r} first. '
            "Call eval() or train() on both, or pass mode=..."
        )
