"""Loss along a path between two models: is there a barrier, and which minimum is wider?"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Iterable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from sharpness._checks import check_choice
from sharpness._progress import progress_bar
from sharpness.errors import ArgumentError
from sharpness.metrics.door import provenance
from sharpness.objective import Evaluation, Objective
from sharpness.objective.losses import BatchLoss
from sharpness.objective.reduction import LossFn
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
) -> InterpolationResult:
    r"""Evaluate loss and accuracy along a path from ``model_a`` (alpha = 0) to ``model_b`` (alpha = 1).

    .. math::
        \theta(\alpha) = (1 - \alpha)\, a + \alpha\, b \quad\text{or}\quad
        \theta(\alpha) = \cos(\tfrac{\alpha \pi}{2})\, a + \sin(\tfrac{\alpha \pi}{2})\, b.

    Both models are left untouched, and the ends of the path are the models themselves, exactly.

    Args:
        model_a: The model at alpha = 0.
        model_b: The model at alpha = 1, of the same architecture.
        loader: Training data.
        loss_fn: A criterion ``(outputs, targets) -> scalar``, or ``None`` to infer it (see `Objective`).
        test_loader: Data for test loss and accuracy.
        alphas: Positions; ``None`` means 25 from -1 to 2, as Keskar et al. draw them.
        path: ``"linear"`` or ``"curved"``.
        batch_norm: Running statistics between the models: estimated anew on ``loader`` (``"recompute"``), on the same
            path as the weights (``"interpolate"``), or those of ``model_a`` (``"keep"``).
        batch_loss: ``callable(model, batch) -> (loss, weight)`` in place of ``loss_fn``.
        mode: ``"eval"``, ``"train"`` or ``"as_is"``.
        max_batches: Use only the first so many batches.
        seed: Seed of everything random.
        progress: Show a progress bar; ``None`` shows one on a terminal after two seconds.
        memory: Bytes (or ``"2GiB"``) of batches that may be kept between evaluations.

    Returns:
        Losses and accuracies at each position, and the height of the barrier.

    Raises:
        ArgumentError: If the models differ in architecture, or an option cannot be accepted.
        DataError: If a loader or batch cannot be used.
        NonFiniteError: If a loss on the path is NaN or infinite.

    Cost: one forward pass over each loader per position, twice as many where running statistics are recomputed.

    References:
        Goodfellow et al. (2015), arXiv 1412.6544; Keskar et al. (2017), arXiv 1609.04836, section 2.2.1 and appendix D.
    """
    check_choice("path", path, ("linear", "curved"))
    check_choice("batch_norm", batch_norm, BATCH_NORM)
    positions = _positions(alphas)
    options: dict[str, Any] = {"batch_loss": batch_loss, "mode": mode, "max_batches": max_batches, "seed": seed}
    train = Objective(model_a, loader, loss_fn, memory=memory, progress=progress, **options)
    test = None
    if test_loader is not None:
        test = Objective(model_a, test_loader, loss_fn, memory=memory, **{**options, "max_batches": None})
    start, end = _tensors(model_a), _tensors(model_b)
    kinds_a, kinds_b = ({name: (t.shape, t.dtype) for name, t in tensors.items()} for tensors in (start, end))
    if kinds_a != kinds_b:
        different = sorted(set(start) ^ set(end)) or [name for name in start if kinds_a[name] != kinds_b[name]]
        raise ArgumentError(
            f"the two models differ in architecture, at {different[0]!r} first; they must be alike in names, shapes "
            "and dtypes."
        )

    started = time.perf_counter()
    moving = {name for name, _ in train.model.named_parameters()}
    recomputed = batch_norm == "recompute" and bool(_batch_norms(train.model)) and mode == "eval"

    def at(alpha: float) -> dict[str, Tensor]:
        weight_a, weight_b = 1 - alpha, alpha
        if path == "curved":
            # cos(pi / 2) is not quite zero in floating point; the ends are exact.
            exact = {0.0: (1.0, 0.0), 1.0: (0.0, 1.0)}
            weight_a, weight_b = exact.get(alpha, (math.cos(alpha * math.pi / 2), math.sin(alpha * math.pi / 2)))
        if alpha == 1.0:
            return dict(end)
        point = dict(start)
        for name, a in start.items():
            if alpha and a.is_floating_point() and (name in moving or batch_norm == "interpolate"):
                point[name] = weight_a * a + weight_b * end[name].to(a.device)
        return _with_statistics(train, point) if recomputed and alpha else point

    def measure(objective: Objective, point: dict[str, Tensor]) -> Evaluation:
        return objective.evaluate(tensors=point)

    on_train, on_test = [], []
    with train.session(), progress_bar(train.progress, total=len(positions), title="interpolate", unit="point") as bar:
        for alpha in positions:
            point = at(alpha)
            on_train.append(measure(train, point))
            if test is not None:
                on_test.append(measure(test, point))
            bar.update()
        ends = [measure(train, at(alpha)).loss if alpha not in positions else None for alpha in (0.0, 1.0)]
    losses = [evaluation.loss for evaluation in on_train]
    at_a, at_b = (
        loss if loss is not None else losses[positions.index(a)] for a, loss in zip((0.0, 1.0), ends, strict=True)
    )
    excess = [
        loss - ((1 - alpha) * at_a + alpha * at_b)
        for alpha, loss in zip(positions, losses, strict=True)
        if 0 <= alpha <= 1
    ]
    return InterpolationResult(
        alphas=as_float64(positions),
        train_loss=as_float64(losses),
        train_accuracy=_accuracies(on_train),
        test_loss=as_float64([evaluation.loss for evaluation in on_test]) if test is not None else None,
        test_accuracy=_accuracies(on_test),
        barrier=max([0.0, *excess]),
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


def _tensors(model: Any) -> dict[str, Tensor]:
    if not isinstance(model, nn.Module):
        raise ArgumentError(f"`model_b` must be a torch.nn.Module, got {type(model).__name__}.")
    inner = unwrap(model)
    return {name: t.detach() for name, t in [*inner.named_parameters(), *inner.named_buffers()]}


def _accuracies(evaluations: Sequence[Evaluation]) -> Tensor | None:
    found = [evaluation.accuracy for evaluation in evaluations if evaluation.accuracy is not None]
    return as_float64(found) if found and len(found) == len(evaluations) else None


def _batch_norms(model: nn.Module) -> list[nn.modules.batchnorm._BatchNorm]:
    kinds = nn.modules.batchnorm._BatchNorm
    return [m for m in model.modules() if isinstance(m, kinds) and m.track_running_stats]


def _with_statistics(objective: Objective, point: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return ``point`` with the running statistics of its own activations, averaged over the whole loader."""
    model = copy.deepcopy(objective.model).eval()
    model.load_state_dict(point, strict=False)
    if any(p.dtype in (torch.float16, torch.bfloat16) for p in model.parameters()):
        model.float()  # as all half-precision models are measured
    for norm in _batch_norms(model):
        norm.reset_running_stats()
        norm.momentum = None  # the plain average over all batches
        norm.train()
    with torch.no_grad():
        for _, batch in objective.batches.walk():
            objective.criterion(model, batch)
    objective.passes.count += 1
    return {**point, **{name: b for name, b in model.named_buffers() if name in point}}
