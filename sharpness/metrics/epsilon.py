"""Epsilon-sharpness, Metric 2.1 of Keskar et al. (2017)."""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from scipy.optimize import Bounds, minimize
from torch import Tensor, nn

from sharpness._checks import check_choice, check_count, check_positive
from sharpness._progress import progress_bar
from sharpness._warn import warn
from sharpness.errors import ConvergenceError, ConvergenceWarning, ModelError
from sharpness.linalg.answer import OnFailure, check_on_failure
from sharpness.metrics.door import open_objective, provenance
from sharpness.objective import Objective
from sharpness.objective.guard import derived_seed
from sharpness.objective.losses import BatchLoss
from sharpness.objective.parameters import ParameterChoice
from sharpness.objective.reduction import LossFn
from sharpness.results import EpsilonSharpnessResult

# The first step reaches the side of the box in every coordinate whose share in the slope is above this.
_NEGLIGIBLE_SHARE = 1e-6


def epsilon_sharpness(
    model: nn.Module | Objective,
    loader: Iterable[Any] | None = None,
    loss_fn: LossFn | None = None,
    *,
    epsilon: float = 1e-3,
    max_iter: int = 10,
    num_starts: int = 2,
    solver: str = "l-bfgs-b",
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
) -> EpsilonSharpnessResult:
    r"""Compute the epsilon-sharpness of Keskar et al. (2017): how far the loss can rise in a small box.

    .. math::
        \phi = 100 \, \frac{\max_{y \in C_\epsilon} f(x + y) - f(x)}{1 + f(x)}, \qquad
        C_\epsilon = \{ y : |y_i| \le \epsilon (|x_i| + 1) \}

    in percent, with the loss ``f`` over the *whole* loader and exact gradients. The maximum is sought by L-BFGS-B with
    ``max_iter`` iterations from each of ``num_starts`` points drawn uniformly in the box (a start at ``y = 0`` would
    stay there at an exact minimum); iterations left over by a climb that ended in a corner go to another point. The
    largest loss evaluated anywhere is kept, so the value is a *lower bound* of the maximum; for a convex quadratic the
    maximum itself sits at a corner and is a hard combinatorial problem.

    Use it to compare models at equal loss on the same data. It is not the largest eigenvalue in disguise: at a
    minimum with diagonal Hessian it grows with the *sum* of the eigenvalues. It changes when layers are rescaled, and
    tenfold with the BatchNorm mode: ``mode="train"`` uses batch statistics as the authors' code does.

    Args:
        model: The trained model, or an `Objective` that replaces ``model, loader, loss_fn`` and the common options.
        loader: Any re-iterable of batches.
        loss_fn: A criterion ``(outputs, targets) -> scalar``, or ``None`` to infer it (see `Objective`).
        epsilon: Size of the box; the paper uses 1e-3 and 5e-4.
        max_iter: Iterations of the solver from each start; the paper uses 10.
        num_starts: Starting points.
        solver: ``"l-bfgs-b"``.
        batch_loss: ``callable(model, batch) -> (loss, weight)`` in place of ``loss_fn``.
        params: Names, globs, a compiled regular expression, or a predicate that choose parameters.
        mode: ``"eval"``, ``"train"`` or ``"as_is"``.
        max_batches: Use only the first so many batches; the answer is then about this subset.
        seed: Same call, same bits; models with the same seed get the same starting points.
        progress: Show a progress bar; ``None`` shows one on a terminal after two seconds.
        on_failure: What to do if no start found a loss above the model's own: ``"warn"``, ``"raise"`` or ``"ignore"``.
        memory: Bytes (or ``"2GiB"``) of batches that may be kept between evaluations.
        microbatch_size: Cut each batch into pieces of at most so many samples.
        precision: ``"exact"``, ``"tf32"``, ``"bfloat16"`` or ``"float16"`` (see `Objective`).

    Returns:
        The percentage, the two losses, and what each start reached.

    Raises:
        ArgumentError: If an option cannot be accepted.
        ModelError: If the loss is -1 or less, where ``1 + f`` has no meaning, or cannot be differentiated.
        DataError: If the loader or a batch cannot be used.
        NonFiniteError: If the loss or gradient is NaN or infinite; names the batch.
        ConvergenceError: If no start rose above the model's own loss and ``on_failure="raise"``.

    Cost: one gradient over the data per evaluation, of which there are between ``num_starts * max_iter`` and about
    twice as many; about 25 float64 vectors for the solver.

    References:
        Keskar et al. (2017), arXiv 1609.04836, Metric 2.1; Byrd et al. (1995), doi:10.1137/0916069.

    Example:
        >>> import torch, sharpness
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> _ = model.weight.data.zero_()
        >>> data = [(torch.eye(2), torch.zeros(2, 1))]
        >>> round(sharpness.epsilon_sharpness(model, data, epsilon=0.1).value, 4)  # 50 epsilon^2 tr(H), tr(H) = 2
        1.0
    """
    epsilon = check_positive("epsilon", epsilon)
    max_iter = check_count("max_iter", max_iter)
    num_starts = check_count("num_starts", num_starts)
    check_choice("solver", solver, ("l-bfgs-b",))
    check_on_failure(on_failure)
    options = {
        "batch_loss": batch_loss,
        "params": params,
        "mode": mode,
        "max_batches": max_batches,
        "seed": seed,
        "progress": progress,
        "memory": memory,
        "microbatch_size": microbatch_size,
        "precision": precision,
    }
    objective = open_objective(model, loader, loss_fn, options)

    started, passes = time.perf_counter(), objective.num_passes
    with objective.session():
        search = _Search(objective, epsilon)
        loss = search.loss_at_zero
        if loss <= -1:
            raise ModelError(
                f"the loss is {loss:.6g}; epsilon-sharpness divides by 1 + loss, which must be positive. "
                "Add a constant to the loss."
            )
        starts = []
        with progress_bar(objective.progress, total=None, title="epsilon-sharpness", unit="evaluation") as bar:
            for i in range(num_starts):
                starts.append(search.ascend(i, max_iter, bar))
        objective.check()
        highest = max(start["max_loss"] for start in starts)
        result = EpsilonSharpnessResult(
            value=100 * (max(highest, loss) - loss) / (1 + loss),
            loss=loss,
            max_loss=max(highest, loss),
            starts=tuple({**start, "value": 100 * (start["max_loss"] - loss) / (1 + loss)} for start in starts),
            num_evaluations=search.num_evaluations,
            num_passes=objective.num_passes - passes,
            seconds=time.perf_counter() - started,
            settings=provenance(
                objective,
                {"epsilon": epsilon, "max_iter": max_iter, "num_starts": num_starts, "solver": solver},
            ),
        )
    if highest <= loss and on_failure != "ignore":
        message = (
            f"no loss above the model's own, {loss:.6g}, was found in the box: {len(starts)} starts reached "
            f"{highest:.6g}. The loss may be constant there; else raise num_starts or max_iter."
        )
        if on_failure == "raise":
            raise ConvergenceError(message, result)
        warn(message, ConvergenceWarning)
    return result


class _Search:
    """The loss in the box, as SciPy wants it: minus the loss, over the unit box, scaled.

    The box is mapped to ``[-1, 1]^n`` and the loss divided by a small number, so that the first step of L-BFGS-B, which
    follows the gradient at its own length, reaches the sides of the box instead of creeping from its start. For a
    loss that is convex in the box each further step is one from corner to better corner.
    """

    def __init__(self, objective: Objective, epsilon: float) -> None:
        self.objective = objective
        self.num_evaluations = 1  # the model as it is
        self.center = objective.vector().double().cpu()
        self.half_width = epsilon * (self.center.abs() + 1)
        self.loss_at_zero, _ = objective.value_and_gradient()

    def ascend(self, i: int, max_iter: int, bar: Any) -> dict[str, Any]:
        """Spend ``max_iter`` iterations from start ``i``; return what was reached.

        A climb that ends in a corner early leaves its remaining iterations to another one from a new random point.
        """
        # The same however many starts there are.
        generator = torch.Generator().manual_seed(derived_seed(self.objective.seed, i))
        spent, best, climbs, left, message = self.num_evaluations, -np.inf, 0, max_iter, ""
        while left > 0:
            start = 2 * torch.rand(len(self.center), generator=generator, dtype=torch.float64, device="cpu") - 1
            reached, iterations, message = self._climb(start, left, bar)
            best, climbs, left = max(best, reached), climbs + 1, left - max(iterations, 1)
        return {
            "max_loss": best,
            "iterations": max_iter - left,
            "climbs": climbs,
            "evaluations": self.num_evaluations - spent,
            "message": message,
        }

    def _climb(self, start: Tensor, max_iter: int, bar: Any) -> tuple[float, int, str]:
        """Run L-BFGS-B once; return the largest loss met, the iterations, and the solver's last word."""
        best = -np.inf
        first = self._loss_and_slope(start)
        scale = _NEGLIGIBLE_SHARE * first[1].abs().mean().item() or 1.0

        def function(z: np.ndarray[Any, Any]) -> tuple[float, np.ndarray[Any, Any]]:
            nonlocal best
            at_start = np.array_equal(z, start.numpy())
            loss, slope = first if at_start else self._loss_and_slope(torch.from_numpy(z))
            bar.update()
            best = max(best, loss)
            return (self.loss_at_zero - loss) / scale, (slope / -scale).numpy()

        found = minimize(
            function,
            start.numpy(),
            jac=True,
            method="L-BFGS-B",
            bounds=Bounds(-1.0, 1.0),
            options={"maxiter": max_iter, "ftol": 0.0, "gtol": 0.0, "maxfun": 100 * max_iter},
        )
        return best, int(found.nit), str(found.message)

    def _loss_and_slope(self, z: Tensor) -> tuple[float, Tensor]:
        """Return the loss at the point ``z`` of the unit box and its derivative with respect to ``z``."""
        self.num_evaluations += 1
        loss, gradient = self.objective.value_and_gradient(self.center + self.half_width * z)
        return loss, gradient.double().cpu() * self.half_width
