"""PAC-Bayes sharpness (Jiang et al. 2020): how much noise the weights bear."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable
from typing import Any, Literal, TypeAlias, final

import torch
from torch import Tensor, nn

from sharpness._checks import check_choice, check_count, check_flag, check_positive
from sharpness._progress import progress_bar
from sharpness._warn import warn
from sharpness.errors import ArgumentError, ConvergenceError, ConvergenceWarning, NonFiniteError
from sharpness.linalg.answer import OnFailure, check_on_failure
from sharpness.metrics.door import open_objective, provenance
from sharpness.metrics.perturbation import Adaptive, Noise, check_adaptive, scales, standard_error
from sharpness.objective import Objective
from sharpness.objective.evaluation import Evaluation
from sharpness.objective.losses import BatchLoss
from sharpness.objective.parameters import ParameterChoice
from sharpness.objective.reduction import LossFn
from sharpness.objective.variants import normalised
from sharpness.results import PerturbationResult

Target: TypeAlias = Literal["accuracy", "loss"]
TARGETS = ("accuracy", "loss")
_LOWEST, _START, _HIGHEST = 2.0**-30, 2.0**-5, 2.0**10  # of sigma
_ASIDE = 1.2  # how far from the answer the slope is taken


def pac_bayes_sharpness(
    model: nn.Module | Objective,
    loader: Iterable[Any] | None = None,
    loss_fn: LossFn | None = None,
    *,
    target: Target = "accuracy",
    deviation: float = 0.1,
    adaptive: Adaptive | None = None,
    eps: float = 0.0,
    num_samples: int = 16,
    tol: float = 0.01,
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
    r"""Find the noise in the weights that moves the accuracy by a tenth; the measure is one over its variance.

    .. math:: 1 / \sigma^2, \qquad \big| \mathbb{E}_{u \sim N(0, \sigma^2 T^2 + \epsilon^2)} \,
        a(\theta + u) - a(\theta) \big| = \text{deviation}

    with ``a`` the accuracy or, for ``target="loss"``, the loss. ``adaptive="elementwise"`` is the magnitude-aware form;
    Jiang et al. take ``eps=1e-3`` with it. ``sigma`` is found by bisection on its logarithm and interpolated, with the
    same directions (each with both signs) at every ``sigma`` and for every model; bisection assumes that the deviation
    grows with ``sigma``. The standard error is that of the deviation over its slope, both measured near the answer;
    with few directions it is itself uncertain (Student's t).

    Invariant to: with ``adaptive="elementwise"`` and ``eps=0``, rescaling of layers and of neurons that leaves the
    function as it is, and the scale of weights before a normalisation; with ``"filter"``, rescaling of whole layers;
    with ``None``, nothing of these. For accuracy it does not change with the scale of the loss, nor of the logits; for
    ``target="loss"`` it does.

    Args:
        model: The trained model, or an `Objective` that replaces ``model, loader, loss_fn`` and the common options.
        loader: Any re-iterable of batches.
        loss_fn: A criterion ``(outputs, targets) -> scalar``, or ``None`` to infer it (see `Objective`).
        target: ``"accuracy"`` or ``"loss"``.
        deviation: How far the target is to move.
        adaptive: ``None``, ``"elementwise"`` or ``"filter"``: what a perturbation is relative to.
        eps: Standard deviation that is added to every weight's, in square.
        num_samples: Directions, each evaluated with both signs.
        tol: Relative width at which the bisection ends.
        normalize_logits: Centre the logits of each sample and scale them to unit length before the loss.
        batch_loss: ``callable(model, batch) -> (loss, weight)`` in place of ``loss_fn``.
        params: Names, globs, a compiled regular expression, or a predicate that choose parameters.
        mode: ``"eval"``, ``"train"`` or ``"as_is"``.
        max_batches: Use only the first so many batches; the answer is then about this subset.
        seed: Same call, same bits; models with the same seed get the same random numbers.
        progress: Show a progress bar; ``None`` shows one on a terminal after two seconds.
        on_failure: ``"warn"``, ``"raise"`` or ``"ignore"`` when no sigma moves the target so far.
        memory: Bytes (or ``"2GiB"``) of batches that may be kept between evaluations.
        microbatch_size: Cut each batch into pieces of at most so many samples.
        precision: ``"exact"``, ``"tf32"``, ``"bfloat16"`` or ``"float16"`` (see `Objective`).
        compile: ``"auto"``, ``True`` or ``False``: whether products are compiled (see `Objective`).

    Returns:
        ``1 / sigma^2`` with its standard error, and ``sigma``.

    Raises:
        ArgumentError: If an option cannot be accepted.
        DataError: If the loader or a batch cannot be used.
        NonFiniteError: If a loss or gradient is NaN or infinite; names the batch.
        ConvergenceError: If no sigma moves the target so far and ``on_failure="raise"``.

    Cost: ``2 num_samples`` forward passes over the data for each sigma tried, about 15; about 8 vectors.

    References:
        Jiang et al. (2020), arXiv 1912.02178.

    Example:
        >>> import torch, sharpness
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> _ = model.weight.data.zero_()
        >>> data = [(torch.eye(2), torch.zeros(2, 1))]
        >>> result = sharpness.pac_bayes_sharpness(model, data, target="loss")
        >>> abs(result.value - 2 / (2 * 0.1)) < 4 * result.stderr  # tr(H) / (2 deviation)
        True
    """
    check_choice("target", target, TARGETS)
    deviation = check_positive("deviation", deviation)
    if target == "accuracy" and deviation >= 1:
        raise ArgumentError(
            f"`deviation` must be below 1 for an accuracy, which moves by no more, got {deviation:g}. Pass a fraction, "
            '0.1 say, or target="loss".'
        )
    check_adaptive(adaptive)
    eps = check_positive("eps", eps, allow_zero=True)
    num_samples = check_count("num_samples", num_samples, low=2)
    tol = check_positive("tol", tol)
    check_flag("normalize_logits", normalize_logits)
    check_on_failure(on_failure)
    objective = open_objective(model, loader, loss_fn, locals())
    objective = normalised(objective) if normalize_logits else objective

    started, passes = time.perf_counter(), objective.num_passes
    with objective.session():
        base = objective.evaluate()
        if target == "accuracy" and base.accuracy is None:
            raise ArgumentError(
                '`target`: "accuracy" needs a classification whose classes are seen, got a loss without them '
                f'({objective.criterion.name}). Pass target="loss".'
            )
        with progress_bar(objective.progress, total=None, title="PAC-Bayes sharpness", unit="evaluation") as bar:
            noise = Noise(objective, num_samples, "gaussian", bar)
            search = _Search(noise, scales(objective, adaptive), eps, target, base, deviation)
            sigma, converged = search.bisect(tol)
            stderr = search.stderr(sigma) if converged else math.nan
            moves = search.moves(sigma)
        objective.check()
        result = PerturbationResult(
            value=1 / sigma**2,
            loss=base.loss,
            accuracy=base.accuracy,
            stderr=stderr,
            sigma=sigma,
            samples=moves,
            converged=converged,
            num_evaluations=1 + noise.num_evaluations,
            num_passes=objective.num_passes - passes,
            seconds=time.perf_counter() - started,
            settings=provenance(
                objective,
                {
                    "metric": "pac_bayes_sharpness",
                    "target": target,
                    "deviation": deviation,
                    "adaptive": adaptive,
                    "eps": eps,
                    "num_samples": num_samples,
                    "tol": tol,
                    "normalize_logits": normalize_logits,
                },
            ),
        )
    if not converged and on_failure != "ignore":
        moved = abs(moves.mean().item())
        message = (
            f"no sigma was found at which the {target} moves by the deviation asked for, {deviation:g}: at "
            f"sigma={sigma:.3g} it moves by {moved:.3g}{', and beyond the loss overflows' * search.overflows}. "
            f"Pass another deviation{', or a smaller eps' * (eps > 0)}."
        )
        if on_failure == "raise":
            raise ConvergenceError(message, result)
        warn(message, ConvergenceWarning)
    return result


@final
class _Search:
    """How far the target moves at a sigma; every sigma is tried once."""

    def __init__(
        self, noise: Noise, scale: Tensor, eps: float, target: str, base: Evaluation, deviation: float
    ) -> None:
        self._noise = noise
        self._scale = scale
        self._eps = eps
        self._target = target
        self._base = base
        self._deviation = deviation
        self._known: dict[float, Tensor] = {}
        self.overflows = False  # before the target has moved so far

    def moves(self, sigma: float) -> Tensor:  # -> (num_samples,)
        """Return how far the target moves in each direction; infinitely far where the loss overflows."""
        if sigma not in self._known:
            size = sigma * self._scale
            try:
                pairs = self._noise.evaluate(torch.hypot(size, size.new_tensor(self._eps)) if self._eps else size)
            except NonFiniteError:
                self._known[sigma] = torch.full((2,), math.inf, dtype=torch.float64)
                return self._known[sigma]
            moved = [sum(self._seen(at) - self._seen(self._base) for at in pair) / 2 for pair in pairs]
            self._known[sigma] = torch.tensor(moved, dtype=torch.float64)
        return self._known[sigma]

    def bisect(self, tol: float) -> tuple[float, bool]:
        """Return the sigma, and whether the target moves as far as asked there."""
        low = high = _START
        if self._too_far(_START):
            while self._too_far(low):
                if low <= _LOWEST:
                    return low, False
                low, high = low / 4, low
        else:
            while not self._too_far(high):
                if high >= _HIGHEST:
                    return high, False
                low, high = high, high * 4
        while high > (1 + tol) * low:
            middle = math.sqrt(low * high)
            low, high = (low, middle) if self._too_far(middle) else (middle, high)
        below, above = self._moved(low), self._moved(high)
        if not math.isfinite(above):
            self.overflows = True
            return low, False
        # Between the two the target moves nearly as a power of sigma.
        share = math.log(self._deviation / below) / math.log(above / below) if below > 0 else 0.5
        return low * (high / low) ** min(max(share, 0.0), 1.0), True

    def stderr(self, sigma: float) -> float:
        """Return the standard error of ``1 / sigma^2`` (infinite where the target does not move around sigma)."""
        below, above = self._moved(sigma / _ASIDE), self._moved(sigma * _ASIDE)
        sides = 2
        if not math.isfinite(above):
            above, sides = self._moved(sigma), 1
        slope = (above - below) / (sides * math.log(_ASIDE))  # by the logarithm of sigma
        error = standard_error(self.moves(sigma))
        return 2 / sigma**2 * error / slope if slope > 0 else math.inf

    def _moved(self, sigma: float) -> float:
        return self.moves(sigma).mean().abs().item()

    def _too_far(self, sigma: float) -> bool:
        return self._moved(sigma) > self._deviation

    def _seen(self, at: Evaluation) -> float:
        return at.loss if self._target == "loss" else at.accuracy or 0.0
