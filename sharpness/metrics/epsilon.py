"""Epsilon-sharpness, Metric 2.1 of Keskar et al. (2017)."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from sharpness._checks import check_choice, check_count, check_positive
from sharpness._progress import progress_bar
from sharpness._warn import warn
from sharpness.errors import ArgumentError, ConvergenceError, ConvergenceWarning, ModelError
from sharpness.linalg.answer import OnFailure, check_on_failure
from sharpness.metrics.box import Box
from sharpness.metrics.box_search import SOLVERS, ascend
from sharpness.metrics.door import open_objective, provenance
from sharpness.metrics.perturbation import perturbed, warn_of_rounding
from sharpness.metrics.subspace import COLUMNS, Subspace, check_matrix, check_rows, given_subspace, random_subspace
from sharpness.objective import Objective
from sharpness.objective.guard import derived_seed
from sharpness.objective.losses import BatchLoss
from sharpness.objective.memory import Budget
from sharpness.objective.parameters import ParameterChoice
from sharpness.objective.reduction import LossFn
from sharpness.results import EpsilonSharpnessResult


def epsilon_sharpness(
    model: nn.Module | Objective,
    loader: Iterable[Any] | None = None,
    loss_fn: LossFn | None = None,
    *,
    epsilon: float = 1e-3,
    subspace_dim: int | None = None,
    subspace: Tensor | None = None,
    subspace_columns: str = "gaussian",
    num_draws: int = 1,
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
    compile: bool | str = "auto",
) -> EpsilonSharpnessResult:
    r"""Compute the epsilon-sharpness of Keskar et al. (2017): how far the loss can rise in a small box.

    .. math::
        \phi = 100 \, \frac{\max_{y \in C_\epsilon} f(x + A y) - f(x)}{1 + f(x)}, \qquad
        C_\epsilon = \{ y : |y_i| \le \epsilon (|(A^+ x)_i| + 1) \}

    in percent, with the loss ``f`` over the *whole* loader and exact gradients. ``A`` is the identity, the full space,
    unless ``subspace_dim`` or ``subspace`` says otherwise. The maximum is sought with exactly ``max_iter`` iterations
    from each of ``num_starts`` points drawn uniformly in the box (a start at ``y = 0`` would stay there at an exact
    minimum); iterations left over by a climb that ended in a corner go to another point. The largest loss evaluated
    anywhere is kept, so the value is a *lower bound* of the maximum; for a convex quadratic the maximum itself sits at
    a corner and is a hard combinatorial problem.

    Use it to compare models at equal loss on the same data. It is not the largest eigenvalue in disguise: at a
    minimum with diagonal Hessian it grows with the *sum* of the eigenvalues. The BatchNorm mode may change it
    several-fold: ``mode="train"`` uses batch statistics as the authors' code does. Where the loss rises by little more
    than its rounding, a `PrecisionWarning` says so.

    Invariant to: nothing; it changes when layers or neurons are rescaled, with the scale of weights before a
    normalisation, and through ``1 + f`` with the scale of the loss.

    With ``subspace_dim=p`` the columns of ``A`` are random, with independent N(0, 1) entries that are *not*
    normalised, as the paper's values ask for: with columns of length 1 they would be smaller by a factor of the order
    of the number of parameters. ``A`` is drawn tile by tile from seeds, on the CPU, and held only while it fits in
    ``memory`` (half of what is free with ``"auto"``); the answer is the same bits either way.

    Args:
        model: The trained model, or an `Objective` that replaces ``model, loader, loss_fn`` and the common options.
        loader: Any re-iterable of batches.
        loss_fn: A criterion ``(outputs, targets) -> scalar``, or ``None`` to infer it (see `Objective`).
        epsilon: Size of the box; the paper uses 1e-3 and 5e-4.
        subspace_dim: Number of random directions to search in; the paper uses 100. ``None`` is the full space.
        subspace: Your own matrix ``A``, ``(n, p)``, of full column rank, in place of a random one.
        subspace_columns: ``"gaussian"``, or ``"orthonormal"`` for an orthonormal basis of the same random subspace.
        num_draws: Random subspaces; the value is their mean, with its standard error.
        max_iter: Iterations of the solver from each start; the paper uses 10.
        num_starts: Starting points.
        solver: ``"l-bfgs-b"`` (SciPy, the paper's; float64 vectors on the CPU) or ``"projected-gradient"`` (steps to
            the corner that the gradient points to, or part of the way; vectors in the model's dtype on its device,
            for large models).
        batch_loss: ``callable(model, batch) -> (loss, weight)`` in place of ``loss_fn``.
        params: Names, globs, a compiled regular expression, or a predicate that choose parameters.
        mode: ``"eval"``, ``"train"`` or ``"as_is"``.
        max_batches: Use only the first so many batches; the answer is then about this subset.
        seed: Same call, same bits; models with the same seed get the same starting points.
        progress: Show a progress bar; ``None`` shows one on a terminal after two seconds.
        on_failure: What to do if no start found a loss above the model's own: ``"warn"``, ``"raise"`` or ``"ignore"``.
        memory: Bytes (or ``"2GiB"``) of batches, and of a random ``A``, that may be kept between evaluations.
        microbatch_size: Cut each batch into pieces of at most so many samples.
        precision: ``"exact"``, ``"tf32"``, ``"bfloat16"`` or ``"float16"`` (see `Objective`).
        compile: ``"auto"``, ``True`` or ``False``: whether products are compiled (see `Objective`).

    Returns:
        The percentage, the two losses, and what each start of each draw reached.

    Raises:
        ArgumentError: If an option cannot be accepted, or two of them contradict each other.
        ModelError: If the loss is -1 or less, where ``1 + f`` has no meaning, or cannot be differentiated.
        DataError: If the loader or a batch cannot be used.
        NonFiniteError: If the loss or gradient is NaN or infinite; names the batch, and the perturbation.
        ConvergenceError: If no start rose above the model's own loss and ``on_failure="raise"``.

    Cost: one gradient over the data per evaluation; about 26 float64 vectors for L-BFGS-B in the full space, beside
    SciPy's lists of bounds, and 12 in the model's dtype for projected gradients. The latter evaluate ``max_iter`` times
    per start and once per climb; L-BFGS-B mostly as often, and up to 20 times in an iteration whose line search fails.
    A random subspace adds ``2 n p`` operations to each evaluation, and where ``A`` is not held the drawing of ``2 n p``
    numbers.

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
    space = _checked_space(subspace_dim, subspace, subspace_columns, num_draws)
    max_iter = check_count("max_iter", max_iter)
    num_starts = check_count("num_starts", num_starts)
    climb = SOLVERS[check_choice("solver", solver, SOLVERS)]
    check_on_failure(on_failure)
    objective = open_objective(model, loader, loss_fn, locals())
    if subspace_dim is not None:
        check_count("subspace_dim", subspace_dim, high=objective.n, of="the number of parameters measured")
    if subspace is not None:
        check_rows(subspace, objective.n)

    started, passes = time.perf_counter(), objective.num_passes
    on_host = solver == "l-bfgs-b"
    dtype, device = (torch.float64, torch.device("cpu")) if on_host else (objective.dtype, objective.device)
    starts: list[dict[str, Any]] = []
    highest: list[float] = []  # of each draw
    with _room(objective, space["subspace_dim"] or 0) as keep, objective.session():
        loss = objective.value()
        if loss <= -1:
            raise ModelError(
                f"the loss is {loss:.6g}; epsilon-sharpness divides by 1 + loss, which must be positive. "
                "Add a constant to the loss."
            )
        with progress_bar(objective.progress, total=None, title="epsilon-sharpness", unit="evaluation") as bar:
            for draw in range(space["num_draws"]):
                where = _subspace(objective, subspace, space, draw, keep)
                box = Box(objective, epsilon, where, dtype, device)
                for i in range(num_starts):
                    generator = torch.Generator().manual_seed(derived_seed(objective.seed, i, draw))
                    with perturbed(f"epsilon={epsilon:g}"):
                        reached = ascend(box, climb, generator, max_iter, bar.update)
                    starts.append({"draw": draw, **reached, "value": 100 * (reached["max_loss"] - loss) / (1 + loss)})
                highest.append(max(start["max_loss"] for start in starts[-num_starts:]))
                del where, box  # before the next matrix is drawn
        objective.check()
        warn_of_rounding(objective, loss, max(highest))
        values = tuple(100 * (max(one, loss) - loss) / (1 + loss) for one in highest)
        result = EpsilonSharpnessResult(
            value=statistics.fmean(values),
            loss=loss,
            max_loss=max(*highest, loss),
            stderr=statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None,
            draws=values if space["subspace"] == "random" else (),
            starts=tuple(starts),
            num_evaluations=1 + sum(start["evaluations"] for start in starts),
            num_passes=objective.num_passes - passes,
            seconds=time.perf_counter() - started,
            settings=provenance(
                objective,
                {"epsilon": epsilon, **space, "max_iter": max_iter, "num_starts": num_starts, "solver": solver},
            ),
        )
    if min(highest) <= loss and on_failure != "ignore":
        message = (
            f"no loss above the model's own, {loss:.6g}, was found in the box: {num_starts} starts reached "
            f"{min(highest):.6g}. The loss may be constant there; else raise num_starts or max_iter."
        )
        if on_failure == "raise":
            raise ConvergenceError(message, result)
        warn(message, ConvergenceWarning)
    return result


def _checked_space(p: Any, matrix: Any, columns: Any, num_draws: Any) -> dict[str, Any]:
    """Return the settings that say where to search, checked against each other."""
    num_draws = check_count("num_draws", num_draws)
    check_choice("subspace_columns", columns, COLUMNS)
    if matrix is not None:
        check_matrix(matrix)
    if p is not None:
        p = check_count("subspace_dim", p)
    if p is not None and matrix is not None:
        raise ArgumentError(
            "`subspace` and `subspace_dim` are both given, and each says where to search. Pass your own matrix as "
            "subspace, or the number of random directions as subspace_dim."
        )
    if p is None and (num_draws > 1 or columns != "gaussian"):
        option = f"num_draws={num_draws}" if num_draws > 1 else f"subspace_columns={columns!r}"
        there = "the full space" if matrix is None else "a subspace of your own"
        raise ArgumentError(
            f"{option} is about random subspaces, and {there} is searched. Pass subspace_dim=100, say, or leave "
            f"{option} out."
        )
    if matrix is not None:
        return {"subspace": "given", "subspace_dim": matrix.shape[1], "subspace_columns": None, "num_draws": 1}
    if p is not None:
        return {"subspace": "random", "subspace_dim": p, "subspace_columns": columns, "num_draws": num_draws}
    return {"subspace": "full", "subspace_dim": None, "subspace_columns": None, "num_draws": 1}


@contextmanager
def _room(objective: Objective, p: int) -> Iterator[bool]:
    """Set memory aside for ``p`` columns, of what batches may take; yield whether they fit."""
    size = objective.n * p * objective.dtype.itemsize
    fits = size <= Budget(objective.memory, objective.device).left
    objective.reserve(size if fits else 0)
    try:
        yield fits
    finally:
        objective.reserve(0)


def _subspace(
    objective: Objective, matrix: Tensor | None, space: dict[str, Any], draw: int, keep: bool
) -> Subspace | None:
    """Return the subspace of a draw; ``None`` is the full space."""
    if matrix is not None:
        return given_subspace(matrix, objective.dtype, objective.device)
    if space["subspace"] == "full":
        return None
    return random_subspace(
        objective.n,
        space["subspace_dim"],
        seed=objective.seed,
        draw=draw,
        columns=space["subspace_columns"],
        dtype=objective.dtype,
        device=objective.device,
        keep=keep,
    )
