"""Critical sharpness: curvature along an update, from forward passes alone (Kalra et al. 2026)."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeAlias, final

import torch
from torch import Tensor, nn

from sharpness._checks import check_flag, check_positive
from sharpness._progress import progress_bar
from sharpness._warn import warn
from sharpness.errors import ArgumentError, ConvergenceError, ConvergenceWarning
from sharpness.linalg.answer import OnFailure, check_on_failure
from sharpness.metrics.door import open_objective, provenance
from sharpness.objective import Objective
from sharpness.objective.losses import BatchLoss
from sharpness.objective.parameters import ParameterChoice
from sharpness.objective.reduction import LossFn
from sharpness.objective.surface import Line, as_direction
from sharpness.results import ScalarResult
from sharpness.results.eigen import as_float64

Direction: TypeAlias = "str | Tensor | Sequence[Tensor] | Mapping[str, Tensor]"
_MAX_PASSES = 60
_LEAP = 8.0  # how far a fit may reach beyond the steps tried
_FARTHEST = 1e6  # in lengths of the vector of the parameters
_SIDE = 3.0  # a bracket is narrowed to 2 / 3 of the tolerance around the fit


def critical_sharpness(
    model: nn.Module | Objective,
    loader: Iterable[Any] | None = None,
    loss_fn: LossFn | None = None,
    *,
    direction: Direction = "gradient",
    tol: float = 0.01,
    directional_curvature: bool = False,
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
) -> ScalarResult:
    r"""Find the step along an update from which on the loss is above its present value.

    .. math:: \lambda_c = \frac{2}{\eta_c}, \qquad
        \eta_c = \min \{ \eta > 0 : f(\theta - \eta d) > f(\theta) \}

    On a quadratic :math:`\lambda_c = d^\top H d / g^\top d`, which for ``d`` the gradient is a Rayleigh quotient of the
    Hessian and at most its largest eigenvalue; in training it follows :math:`\lambda_1`, and the step that is used
    exceeds :math:`\eta_c` at the edge of stability. It takes no second derivative, so it works for models of any size,
    and where an operation has none. (Attention is computed by matrix products here as for all metrics, which takes more
    memory than a fused kernel.)

    The step is bracketed by doubling or halving, and the bracket narrowed around the root of the mean slope
    :math:`(f(\theta - \eta d) - f(\theta)) / \eta`, which is linear in :math:`\eta` where the loss is quadratic; where
    that does not halve it, it is bisected. Only the steps in the result were looked at: a rise that lies between two of
    them, and has passed at the second, is not seen.

    Invariant to: the split of the data into batches, and, for a ``d`` that is given, the scale of the loss. Multiplied
    by ``c`` with ``d``, and so with the loss for ``d`` the gradient.

    Args:
        model: The trained model, or an `Objective` that replaces ``model, loader, loss_fn`` and the common options.
        loader: Any re-iterable of batches.
        loss_fn: A criterion ``(outputs, targets) -> scalar``, or ``None`` to infer it (see `Objective`).
        direction: ``"gradient"``, or the ``d`` that is *subtracted*, such as the update of an optimizer before it is
            multiplied by the learning rate: a list of tensors in the order of the parameters that are measured, a
            mapping from their names, or one vector. Then no gradient is computed either.
        tol: Relative width of the bracket of the critical step.
        directional_curvature: Also compute :math:`d^\top H d / g^\top d`, from one Hessian-vector product.
        batch_loss: ``callable(model, batch) -> (loss, weight)`` in place of ``loss_fn``.
        params: Names, globs, a compiled regular expression, or a predicate that choose parameters.
        mode: ``"eval"``, ``"train"`` or ``"as_is"``.
        max_batches: Use only the first so many batches; the answer is then about this subset.
        seed: Seed of everything random.
        progress: Show a progress bar; ``None`` shows one on a terminal after two seconds.
        on_failure: ``"warn"``, ``"raise"`` or ``"ignore"`` when there is no such step, or rounding hides it.
        memory: Bytes (or ``"2GiB"``) of batches that may be kept between evaluations.
        microbatch_size: Cut each batch into pieces of at most so many samples.
        precision: ``"exact"``, ``"tf32"``, ``"bfloat16"`` or ``"float16"`` (see `Objective`).
        compile: ``"auto"``, ``True`` or ``False``: whether products are compiled (see `Objective`).

    Returns:
        The critical sharpness with the bracket it lies in, the critical step, the losses along the way, and how many
        forward passes that took. Zero where the loss does not rise, infinite where it rises at once, NaN where there is
        no gradient or rounding hides it; ``converged`` is false then.

    Raises:
        ArgumentError: If an option cannot be accepted.
        DataError: If the loader or a batch cannot be used.
        NonFiniteError: If the loss or gradient of the model as it is is NaN or infinite.
        ModelError: If the loss does not depend on the parameters.
        ConvergenceError: If there is no critical step and ``on_failure="raise"``.

    Cost: 4 to 10 forward passes over the data where the loss is smooth, more where it is not or there is no such step,
    60 at most; and one gradient for ``direction="gradient"``; 3 vectors.

    References:
        Kalra et al. (2026), arXiv 2601.16979; Cohen et al. (2021), arXiv 2103.00065.

    Example:
        >>> import torch, sharpness
        >>> model = torch.nn.Linear(1, 1, bias=False)
        >>> _ = torch.nn.init.ones_(model.weight)
        >>> data = [(torch.tensor([[3.0]]), torch.zeros(1, 1))]  # f = 9 w^2, with curvature 18
        >>> round(sharpness.critical_sharpness(model, data).value, 3)
        18.0
    """
    tol = check_positive("tol", tol)
    if isinstance(direction, str) and direction != "gradient":
        raise ArgumentError(f'`direction` must be "gradient" or hold tensors, got {direction!r}.')
    check_flag("directional_curvature", directional_curvature)
    check_on_failure(on_failure)
    objective = open_objective(model, loader, loss_fn, locals())
    along = None if isinstance(direction, str) else as_direction(objective, direction, "direction")

    started, passes = time.perf_counter(), objective.num_passes
    with objective.session():
        slope = curvature = None
        if along is None:
            loss, along = objective.value_and_gradient()
            slope = torch.dot(along.cpu().double(), along.cpu().double()).item()
        else:
            loss = objective.value()
        with progress_bar(objective.progress, total=None, title="critical sharpness", unit="evaluation") as bar:
            search = _Search(objective, along, loss, slope, tol, bar)
            step, bracket, trouble = search.run()
        if directional_curvature:
            curvature = _curvature(objective, along, slope)
        objective.check()
        steps, losses = search.line.points() if search.line else (as_float64([0.0]), as_float64([loss]))
        result = ScalarResult(
            value=_over(2.0, step),
            interval=(_over(2.0, bracket[1]), _over(2.0, bracket[0])),
            critical_step=step,
            directional_curvature=curvature,
            steps=steps,
            losses=losses,
            converged=trouble is None,
            num_forward_passes=len(steps),
            num_evaluations=len(steps),
            num_passes=objective.num_passes - passes,
            seconds=time.perf_counter() - started,
            settings=provenance(
                objective,
                {
                    "metric": "critical_sharpness",
                    "direction": direction if isinstance(direction, str) else "given",
                    "tol": tol,
                },
            ),
        )
    if trouble is not None and on_failure != "ignore":
        if on_failure == "raise":
            raise ConvergenceError(trouble, result)
        warn(trouble, ConvergenceWarning)
    return result


def _over(one: float, other: float) -> float:
    """Return a quotient of numbers that are not negative, with the limits at zero and infinity."""
    return math.inf if other == 0 else one / other


def _curvature(objective: Objective, along: Tensor, slope: float | None) -> float:
    """Return ``d'Hd / g'd`` from one product."""
    form = torch.dot(along.cpu().double(), objective.hvp(along).cpu().double()).item()
    if slope is None:
        slope = torch.dot(along.cpu().double(), objective.gradient().cpu().double()).item()
    return form / slope if slope else math.nan


@final
class _Search:
    """The root of the mean slope of the loss along a line."""

    def __init__(
        self, objective: Objective, direction: Tensor, loss: float, slope: float | None, tol: float, bar: Any
    ) -> None:
        self.line = Line(objective, direction, loss, bar) if bool(direction.any()) else None
        self._slope = slope
        self._tol = tol

    def run(self) -> tuple[float, tuple[float, float], str | None]:
        """Return the critical step, the bracket it lies in, and why it is none, if it is none."""
        if self.line is None:
            return math.nan, (0.0, math.inf), "the gradient is zero, so there is no direction. Pass direction=..."
        low, high = self._bracket(self.line)
        if high == math.inf:
            trouble = (
                f"the loss does not rise along the direction, up to a step of {low:.3g}: it falls without end, or is "
                "constant. Look at the losses of the result, and at the direction."
            )
            return math.inf, (low, high), trouble
        if low == 0 and not _rises_at_once(self.line):
            seen = _clear_rises(self.line)
            trouble = (
                f"rounding hides how the loss begins along the direction: it moves a loss of {self.line.start:.3g} by "
                f"{self.line.rounding:.2g}. Measure in float64, with model.double(), or further from the minimum."
            )
            return math.nan, (0.0, seen[0][0] if seen else math.inf), trouble
        if low == 0:
            trouble = (
                f"the loss rises along the direction at once, at the smallest step of {high:.3g}. The direction is "
                "subtracted: pass one along which the loss falls, the gradient and not its negative. (If it is the "
                "gradient, look for operations whose backward is not their derivative.)"
            )
            return 0.0, (low, high), trouble
        low, high = self._narrow(self.line, low, high)
        step = _root((low, self.line.slope(low)), (high, self.line.slope(high)))
        step = min(max(step, low), high) if math.isfinite(step) else (low + high) / 2
        return step, (low, high), self._doubt(self.line, step, low, high)

    def _doubt(self, line: Line, step: float, low: float, high: float) -> str | None:
        """Return why the critical step is not known to the tolerance, if it is not."""
        if high - low > self._tol * high:
            return (
                f"the critical step is known to be between {low:.3g} and {high:.3g} only, after {len(line.losses)} "
                "forward passes. Pass a larger tol."
            )
        rise = (line.slope(high) - line.slope(low)) / (high - low)
        slope = self._slope if self._slope is not None else rise * low - line.slope(low)
        if math.isfinite(slope) and not line.rounding <= self._tol * slope * step:
            return (
                f"the loss changes by about {abs(slope) * step / 4:.2g} along the direction, which rounding hides "
                f"({line.rounding:.2g}). Measure in float64, with model.double(), or further from the minimum."
            )
        return None

    def _bracket(self, line: Line) -> tuple[float, float]:
        """Return a step at which the loss is no higher than at the start, and a longer one at which it is."""
        step = line.scale / 4
        if self._slope is not None and line.start > 0:
            step = min(4 * step, line.start / self._slope)  # where the loss would be zero if it fell as it begins
        low, high, farthest = 0.0, math.inf, _FARTHEST * line.scale
        if self._slope is not None and line.start > 0:
            farthest = max(farthest, 100 * line.start / self._slope)
        before = None if self._slope is None else (0.0, -self._slope)  # a step and the mean slope there
        fitted = False
        while len(line.losses) < _MAX_PASSES:
            slope = line.slope(step)
            root = math.nan if before is None else _root(before, (step, slope))
            before = step, slope
            if slope > 0 or (high < math.inf and line.start - line.loss(step) <= line.rounding):
                high = step
                if low or step < line.shortest:
                    break
                fitted = not fitted and 1e-3 * high < root < high
                step = root * (1 - self._tol / _SIDE) if fitted else high / 2
            else:
                low = step
                if high < math.inf or step > farthest:
                    break
                fitted = not fitted and root > low  # a fit that falls short creeps: then double
                step = min(root * (1 + self._tol / _SIDE), _LEAP * low) if fitted else 2 * low
        return low, high

    def _narrow(self, line: Line, low: float, high: float) -> tuple[float, float]:
        """Narrow the bracket to the tolerance: false position that aims just beside the root, else bisection."""
        below, above = line.slope(low), line.slope(high)  # of the line that is drawn; the loss itself stays as it is
        widths = [math.inf] * 3
        lift = True  # whether to aim below the root, to lift the lower end
        while high - low > self._tol * high and len(line.losses) < _MAX_PASSES:
            widths.append(high - low)
            root = _root((low, below), (high, above))
            side = self._tol / _SIDE * root
            lift = (lift and root - low > side) or not high - root > side  # an end that is near enough stays
            step = root - side if lift else root + side
            if not low < step < high or widths[-1] > widths[-4] / 2:
                step = (low + high) / 2
            if step in line.losses:  # there is no number in between
                break
            if line.slope(step) > 0:
                above, below = line.slope(step), below / 2 if lift else line.slope(low)  # Illinois: aim lower next
                high = step
            else:
                below, above = line.slope(step), line.slope(high) if lift else above / 2
                low = step
            lift = low != step
        return low, high


def _clear_rises(line: Line) -> list[tuple[float, float]]:
    """Return the steps at which the loss is clearly above its start, and by how much."""
    rises = ((step, line.losses[step] - line.start) for step in sorted(line.losses) if step)
    return [(step, rise) for step, rise in rises if rise > 10 * line.rounding]


def _rises_at_once(line: Line) -> bool:
    """Return whether a loss that is below its start nowhere has a positive slope at it, beyond what rounding may do.

    That is the value at zero of the straight line through the mean slopes up to the two shortest steps that tell.
    """
    clear = _clear_rises(line)
    if len(clear) < 2 or not math.isfinite(clear[1][1]):
        return bool(clear) and clear[0][0] == min(step for step in line.losses if step)
    (x, a), (y, b) = clear[:2]
    return (a / x * y - b / y * x) / (y - x) > line.rounding * (y / x + x / y) / (y - x)


def _root(one: tuple[float, float], other: tuple[float, float]) -> float:
    """Return where the straight line through two points is zero; NaN if nowhere."""
    (x, a), (y, b) = one, other
    return x - a * (y - x) / (b - a) if math.isfinite(a) and math.isfinite(b) and a != b else math.nan
