"""Worst-case sharpness: the largest rise of the loss in a ball around the weights."""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import Any, Literal, TypeAlias, final

import torch
from torch import Tensor, nn

from sharpness._checks import check_choice, check_count, check_flag, check_positive
from sharpness._progress import progress_bar
from sharpness._warn import warn
from sharpness.errors import ConvergenceError, ConvergenceWarning
from sharpness.linalg.answer import OnFailure, check_on_failure
from sharpness.metrics.door import open_objective, provenance
from sharpness.metrics.perturbation import Adaptive, check_adaptive, normal, perturbed, scales, warn_of_rounding
from sharpness.objective import Objective
from sharpness.objective.losses import BatchLoss
from sharpness.objective.microbatch import check_no_batch_statistics
from sharpness.objective.parameters import ParameterChoice
from sharpness.objective.reduction import LossFn
from sharpness.objective.variants import group_weights, grouped, normalised
from sharpness.results import PerturbationResult

Norm: TypeAlias = Literal["l2", "linf"]
NORMS = ("l2", "linf")


def worst_case_sharpness(
    model: nn.Module | Objective,
    loader: Iterable[Any] | None = None,
    loss_fn: LossFn | None = None,
    *,
    rho: float = 0.05,
    norm: Norm = "l2",
    adaptive: Adaptive | None = None,
    group_size: int | None = None,
    num_steps: int = 20,
    normalize_logits: bool = False,
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
) -> PerturbationResult:
    r"""Compute how far the loss can rise within a distance ``rho``: the sharpness that SAM minimises.

    .. math:: \max_{\|T^{-1} e\|_p \le \rho} f(\theta + e) - f(\theta), \qquad p \in \{2, \infty\}

    with ``T`` the identity, ``diag|w|`` (``adaptive="elementwise"``) or the norms of the filters. The maximum is sought
    by projected gradient ascent in the coordinates ``T^{-1} e``: each step goes towards the point of the ball that is
    furthest along the gradient, ``rho g / |g|`` or ``rho sign(g)``, and half as far after a step that failed. With
    ``num_steps=1`` this is the one-step form of SAM. The largest loss met is kept, so the value is a *lower bound*.
    With ``group_size=m`` the maximum is taken for each group of ``m`` samples and the rises are averaged (m-sharpness):
    it falls as ``m`` grows, from ``rho^2/2 tr(H)`` to ``rho^2/2 lambda_max`` for least squares at interpolation.

    Invariant to: with ``adaptive="elementwise"``, rescaling of layers and of neurons that leaves the function as it is,
    and the scale of weights before a normalisation; with ``"filter"``, rescaling of whole layers; with ``None``,
    nothing. It is multiplied by ``c`` with the loss, unless the logits are what is scaled and ``normalize_logits`` is
    on. Exactly-zero weights, or filters, do not move in the adaptive forms.

    Args:
        model: The trained model, or an `Objective` that replaces ``model, loader, loss_fn`` and the common options.
        loader: Any re-iterable of batches.
        loss_fn: A criterion ``(outputs, targets) -> scalar``, or ``None`` to infer it (see `Objective`).
        rho: Radius of the ball; SAM uses 0.05, adaptive forms about ten times as much.
        norm: ``"l2"`` or ``"linf"``.
        adaptive: ``None``, ``"elementwise"`` or ``"filter"``: what the radius is relative to.
        group_size: Samples per group, whatever the loader's batches; ``None`` takes the whole data as one group. Groups
            of which no target counts are left out.
        num_steps: Steps of the ascent.
        normalize_logits: Centre the logits of each sample and scale them to unit length before the loss.
        batch_loss: ``callable(model, batch) -> (loss, weight)`` in place of ``loss_fn``.
        params: Names, globs, a compiled regular expression, or a predicate that choose parameters.
        mode: ``"eval"``, ``"train"`` or ``"as_is"``.
        max_batches: Use only the first so many batches; the answer is then about this subset.
        seed: Same call, same bits; draws the start where the gradient is exactly zero.
        progress: Show a progress bar; ``None`` shows one on a terminal after two seconds.
        on_failure: ``"warn"``, ``"raise"`` or ``"ignore"`` when no rise was found.
        memory: Bytes (or ``"2GiB"``) of batches that may be kept between evaluations.
        microbatch_size: Cut each batch into pieces of at most so many samples.
        precision: ``"exact"``, ``"tf32"``, ``"bfloat16"`` or ``"float16"`` (see `Objective`).
        compile: ``"auto"``, ``True`` or ``False``: whether products are compiled (see `Objective`).

    Returns:
        The rise, the two losses, and with ``group_size`` the rise of each group.

    Raises:
        ArgumentError: If an option cannot be accepted.
        DataError: If the loader or a batch cannot be used.
        NonFiniteError: If a loss or gradient is NaN or infinite; names the batch, and the perturbation.
        ModelError: If the loss cannot be differentiated.
        ConvergenceError: If no rise was found and ``on_failure="raise"``.

    Cost: at most ``num_steps`` gradients over the data and three losses, one of them to see whether the loss stays the
    same, and with ``group_size`` one more; about 12 vectors.

    References:
        Foret et al. (2021), arXiv 2010.01412; Kwon et al. (2021), arXiv 2102.11600; Andriushchenko et al. (2023), arXiv
        2302.07011.

    Example:
        >>> import torch, sharpness
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> _ = model.weight.data.zero_()
        >>> data = [(torch.diag(torch.tensor([1.0, 3.0])), torch.zeros(2, 1))]
        >>> round(sharpness.worst_case_sharpness(model, data, rho=0.1).value, 5)  # rho^2/2 lambda_max = 0.005 x 9
        0.045
    """
    rho = check_positive("rho", rho)
    check_choice("norm", norm, NORMS)
    check_adaptive(adaptive)
    group_size = None if group_size is None else check_count("group_size", group_size)
    num_steps = check_count("num_steps", num_steps)
    check_flag("normalize_logits", normalize_logits)
    check_on_failure(on_failure)
    objective = open_objective(model, loader, loss_fn, locals())
    objective = normalised(objective) if normalize_logits else objective
    if group_size is not None:
        check_no_batch_statistics(objective.model, objective.mode, option="group_size")

    started, passes = time.perf_counter(), objective.num_passes
    with objective.session():
        loss, weights, groups = objective.value(), [1.0], iter([objective])
        if group_size is not None:
            objective.check()  # chance would look as if the samples saw each other
            weights, groups = group_weights(objective, group_size, loss), grouped(objective, group_size)
        scale = scales(objective, adaptive)
        rises = torch.zeros(len(weights), dtype=torch.float64)
        evaluations, shares = 1 if group_size is None else 1 + len(weights), 0.0
        with progress_bar(objective.progress, total=None, title="worst-case sharpness", unit="evaluation") as bar:
            for i, (group, weight) in enumerate(zip(groups, weights, strict=True)):
                if not weight:
                    continue
                ascent = _Ascent(group, scale, rho, norm, bar)
                place = "" if group is objective else f" on group {i} of {group_size} samples"
                with group.session(), perturbed(f"rho={rho:g}{place}"):
                    rises[i] = ascent.climb(num_steps)
                evaluations += ascent.num_evaluations
                shares += 0 if group is objective else group.num_passes * weight
        objective.check()
        warn_of_rounding(objective, loss, loss + rises.max().item())
        value = torch.tensor(weights, dtype=torch.float64).dot(rises).item() / sum(weights)
        result = PerturbationResult(
            value=value,
            loss=loss,
            max_loss=loss + value,
            samples=None if group_size is None else rises,
            converged=value > 0,
            num_evaluations=evaluations,
            num_passes=objective.num_passes - passes + round(shares / sum(weights)),
            seconds=time.perf_counter() - started,
            settings=provenance(
                objective,
                {
                    "metric": "worst_case_sharpness",
                    "rho": rho,
                    "norm": norm,
                    "adaptive": adaptive,
                    "group_size": group_size,
                    "num_steps": num_steps,
                    "normalize_logits": normalize_logits,
                },
            ),
        )
    if not result.converged and on_failure != "ignore":
        message = (
            f"no loss above the model's own, {loss:.6g}, was found within rho={rho:g}. The loss may be constant there, "
            "or all weights that may move are zero; else raise num_steps or rho."
        )
        if on_failure == "raise":
            raise ConvergenceError(message, result)
        warn(message, ConvergenceWarning)
    return result


@final
class _Ascent:
    """Ascent of one function in the unit-free coordinates of the ball: the weights are ``center + scale * u``."""

    def __init__(self, objective: Objective, scale: Tensor, rho: float, norm: str, bar: Any) -> None:
        self._objective = objective
        self._center = objective.vector()
        self._scale = scale
        self._rho = rho
        self._norm = norm
        self._bar = bar
        self.num_evaluations = 0

    def climb(self, num_steps: int) -> float:
        """Return the largest rise met within ``num_steps`` steps, at least 0."""
        start, slope = self._loss_and_slope(None)
        here, highest, step = torch.zeros_like(self._center), start, 1.0
        for left in range(num_steps, 0, -1):
            target = self._furthest(slope, here)
            if target is None:
                target = self._anywhere(left)
            if torch.equal(target, here):
                break  # a corner that the gradient points out of
            tried = here + step * (target - here)
            if left == 1:  # its gradient would not be used
                loss, next_slope = self._objective.value(self._center + self._scale * tried), slope
                self.num_evaluations += 1
                self._bar.update()
            else:
                loss, next_slope = self._loss_and_slope(tried)
            if loss > highest:
                here, highest, slope, step = tried, loss, next_slope, min(1.0, 2 * step)
            else:
                step /= 2
        return highest - start

    def _furthest(self, slope: Tensor, here: Tensor) -> Tensor | None:
        """Return the point of the ball that is furthest along ``slope``; ``None`` for no slope."""
        if self._norm == "linf":
            return torch.where(slope != 0, self._rho * slope.sign(), here) if slope.any() else None
        slope = slope / slope.abs().max().clamp(min=torch.finfo(slope.dtype).tiny)  # squares must not underflow
        length = torch.linalg.vector_norm(slope)
        return self._rho * slope / length if length > 0 else None

    def _anywhere(self, i: int) -> Tensor:
        """Return random point ``i`` of the sphere, or corner of the box."""
        direction = normal(self._objective, i)
        if self._norm == "linf":
            return self._rho * direction.sign()
        length: Tensor = torch.linalg.vector_norm(direction)
        return self._rho * direction / length

    def _loss_and_slope(self, u: Tensor | None) -> tuple[float, Tensor]:
        """Return the loss at ``u``, and its derivative with respect to ``u``."""
        self.num_evaluations += 1
        self._bar.update()
        loss, gradient = self._objective.value_and_gradient(None if u is None else self._center + self._scale * u)
        return loss, self._scale * gradient
