"""The largest step at which training stays stable, and how far the approximation behind it holds."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from sharpness._checks import check_count, check_flag, check_positive
from sharpness._progress import progress_bar
from sharpness.errors import ArgumentError
from sharpness.linalg.answer import OnFailure, check_on_failure
from sharpness.metrics.door import open_objective, provenance
from sharpness.metrics.eigenvalues import top_eigenvalues
from sharpness.objective import Objective
from sharpness.objective.losses import BatchLoss
from sharpness.objective.parameters import ParameterChoice
from sharpness.objective.reduction import LossFn
from sharpness.objective.surface import Line
from sharpness.results import LearningRateResult
from sharpness.results.eigen import as_float64

_OCTAVES = range(-6, 2)  # of the limit: the steps that are tried
_FURTHER = 10  # octaves beyond those, until half of the decrease is missed
_HALF = 0.5  # of the predicted decrease: there the approximation breaks down


def learning_rate_limit(
    model: nn.Module | Objective,
    loader: Iterable[Any] | None = None,
    loss_fn: LossFn | None = None,
    *,
    momentum: float = 0.0,
    nesterov: bool = False,
    tol: float = 1e-3,
    num_matvecs: int | None = None,
    steps: Sequence[float] | None = None,
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
) -> LearningRateResult:
    r"""Compute the largest learning rate at which full-batch training is stable at these weights.

    .. math:: \frac{2}{\lambda_1}, \qquad \frac{2 + 2\beta}{\lambda_1}, \qquad
        \frac{2 + 2\beta}{(1 + 2\beta) \lambda_1}

    for gradient descent, with momentum :math:`\beta`, and with Nesterov's momentum, as `torch.optim.SGD` does them
    (``dampening=0``). Above it the component along the top eigenvector grows from step to step, as far as the gradient
    is linear in the weights, that is the loss quadratic. Where no eigenvalue is positive there is no limit: infinity.

    That approximation is checked along the gradient step :math:`\theta - \eta g`: the actual decrease of the loss
    beside :math:`\eta |g|^2`, which the gradient predicts, and :math:`\eta |g|^2 - \frac{\eta^2}{2} g^\top H g`, which
    the curvature does. The gradient's prediction *breaks down* where the actual decrease falls below half of it (on a
    quadratic at :math:`|g|^2 / g^\top H g`, the best step along the gradient); the quadratic one where it is off by
    half of the gradient's. A limit beyond the latter is about a neighbourhood that a step leaves.

    Mini-batch noise lowers the limit, and training with a step ``eta`` tends to end where :math:`\lambda_1` is about
    the limit for it (the edge of stability), so this is a property of these weights, not of the training.

    Invariant to: the split of the data into batches. Divided by ``c`` with the loss; not invariant to rescaling of the
    weights.

    Args:
        model: The trained model, or an `Objective` that replaces ``model, loader, loss_fn`` and the common options.
        loader: Any re-iterable of batches.
        loss_fn: A criterion ``(outputs, targets) -> scalar``, or ``None`` to infer it (see `Objective`).
        momentum: ``beta``, at least 0 and below 1.
        nesterov: Nesterov's momentum in place of heavy-ball momentum.
        tol: Relative tolerance of the eigenvalue, as in `top_eigenvalues`.
        num_matvecs: Products that may be spent on it at most.
        steps: Steps along the gradient to try; ``None`` takes octaves around the limit, and further ones until the
            gradient's prediction has broken down.
        batch_loss: ``callable(model, batch) -> (loss, weight)`` in place of ``loss_fn``.
        params: Names, globs, a compiled regular expression, or a predicate that choose parameters.
        mode: ``"eval"``, ``"train"`` or ``"as_is"``.
        max_batches: Use only the first so many batches; the answer is then about this subset.
        seed: Same call, same bits; the global random state is left alone.
        progress: Show a progress bar; ``None`` shows one on a terminal after two seconds.
        on_failure: ``"warn"``, ``"raise"`` or ``"ignore"`` when the eigenvalue does not converge.
        memory: Bytes (or ``"2GiB"``) that may be kept between products.
        microbatch_size: Cut each batch into pieces of at most so many samples.
        precision: ``"exact"``, ``"tf32"``, ``"bfloat16"`` or ``"float16"`` (see `Objective`).
        compile: ``"auto"``, ``True`` or ``False``: whether products are compiled (see `Objective`).

    Returns:
        The limit with an interval (that of the eigenvalue, turned over), the eigenvalue, and the decrease of the loss
        along the gradient, actual and predicted.

    Raises:
        ArgumentError: If an option cannot be accepted.
        ModelError: If the model or the loss cannot be differentiated twice.
        DataError: If the loader or a batch cannot be used.
        NonFiniteError: If a loss, gradient or product at the weights as they are is NaN or infinite; names the batch.
        ConvergenceError: If the eigenvalue does not converge and ``on_failure="raise"``.

    Cost: that of `top_eigenvalues` with ``k=1``, one gradient, one more product and 8 to 20 forward passes.

    References:
        Polyak (1964); Cohen et al. (2021), arXiv 2103.00065, section 2 and appendix B; Goodfellow et al. (2016), Deep
        Learning, section 4.3.

    Example:
        >>> import torch, sharpness
        >>> model = torch.nn.Linear(1, 1, bias=False)
        >>> data = [(torch.tensor([[1.0]]), torch.zeros(1, 1))]  # f = w^2, with curvature 2
        >>> round(sharpness.learning_rate_limit(model, data).value, 3)
        1.0
        >>> round(sharpness.learning_rate_limit(model, data, momentum=0.9).value, 3)
        1.9
    """
    momentum = check_positive("momentum", momentum, allow_zero=True)
    if momentum >= 1:
        raise ArgumentError(f"`momentum` must be below 1, got {momentum:g}. Pass 0.9, say.")
    check_flag("nesterov", nesterov)
    tol = check_positive("tol", tol)
    num_matvecs = None if num_matvecs is None else check_count("num_matvecs", num_matvecs)
    chosen = None if steps is None else _steps(steps)
    check_on_failure(on_failure)
    objective = open_objective(model, loader, loss_fn, locals())

    started, passes = time.perf_counter(), objective.num_passes
    factor = (2 + 2 * momentum) / (1 + 2 * momentum if nesterov else 1)
    with objective.session():
        sharpness = top_eigenvalues(objective, tol=tol, num_matvecs=num_matvecs, on_failure=on_failure)
        low, high = sharpness.interval[0].tolist()
        limit = _limit(factor, sharpness.headline)
        loss, gradient = objective.value_and_gradient()
        squared = _dot(gradient, gradient)
        form = _dot(gradient, objective.hvp(gradient)) if squared else 0.0
        with progress_bar(objective.progress, total=None, title="learning-rate limit", unit="evaluation") as bar:
            line = Line(objective, gradient, loss, bar)
            tried = _decrease(line, squared, limit, chosen) if squared else []
        found = [step for step in tried if step * squared > 20 * line.rounding]  # the others are lost in rounding
        ratios = [-line.slope(step) / squared for step in found]
        off = [abs(ratio - (1 - step * form / squared / 2)) for step, ratio in zip(found, ratios, strict=True)]
        return LearningRateResult(
            value=limit,
            interval=(_limit(factor, high), _limit(factor, low)),
            sharpness=sharpness,
            loss=loss,
            gradient_norm_squared=squared,
            directional_curvature=form / squared if squared else math.nan,
            steps=as_float64(tried),
            decrease=as_float64([loss - line.loss(step) for step in tried]),
            linear_decrease=as_float64([step * squared for step in tried]),
            quadratic_decrease=as_float64([step * squared - step * (step * form) / 2 for step in tried]),
            breakdown=_crossing(found, [1 - ratio for ratio in ratios]),
            quadratic_breakdown=_crossing(found, off),
            num_evaluations=len(line.losses),
            num_passes=objective.num_passes - passes,
            seconds=time.perf_counter() - started,
            settings=provenance(
                objective, {"metric": "learning_rate_limit", "momentum": momentum, "nesterov": nesterov, "tol": tol}
            ),
        )


def _steps(steps: Any) -> list[float]:
    try:
        chosen = sorted({float(step) for step in steps})
    except (TypeError, ValueError):
        chosen = []
    if not chosen or not all(math.isfinite(step) and step > 0 for step in chosen):
        raise ArgumentError(f"`steps` must be a list of finite numbers above 0, at least one, got {steps!r}.")
    return chosen


def _limit(factor: float, eigenvalue: float) -> float:
    """Return the largest stable step for a curvature; there is no limit where it is not positive."""
    return factor / eigenvalue if eigenvalue > 0 else math.inf


def _dot(a: Tensor, b: Tensor) -> float:
    return torch.dot(a.cpu().double(), b.cpu().double()).item()


def _decrease(line: Line, squared: float, limit: float, chosen: Sequence[float] | None) -> list[float]:
    """Try the steps that were chosen, or octaves around the limit and on until half of the decrease is missed."""
    if chosen is not None:
        for step in chosen:
            line.loss(step)
        return list(chosen)

    def misses(step: float) -> bool:
        return -line.slope(step) < _HALF * squared

    first = limit if math.isfinite(limit) else line.start / squared if line.start > 0 else line.scale
    tried = [first * 2.0**octave for octave in _OCTAVES]
    for _ in range(_FURTHER):
        if misses(tried[-1]):
            break
        tried.append(2 * tried[-1])
    for _ in range(_FURTHER):
        if not misses(tried[0]):
            break
        tried.insert(0, tried[0] / 2)
    for step in tried:
        line.loss(step)
    return tried


def _crossing(steps: Sequence[float], missed: Sequence[float]) -> float:
    """Return the first step at which more than half is missed, by linear interpolation from nothing at step zero.

    That is exact where the loss is quadratic. Infinite if it is at none of the steps, NaN without any.
    """
    if not steps:
        return math.nan
    before = (0.0, 0.0)
    for step, share in zip(steps, missed, strict=True):
        if share > _HALF:
            x, y = before
            return x + (step - x) * (_HALF - y) / (share - y) if math.isfinite(share) else x
        before = (step, share)
    return math.inf
