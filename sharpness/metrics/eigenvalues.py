"""Eigenvalues of the loss Hessian of a trained model."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterable
from typing import Any, Literal

from torch import nn

from sharpness._checks import check_choice, check_count, check_flag, check_positive
from sharpness.errors import ConvergenceError
from sharpness.linalg import dense, lanczos, power_iteration
from sharpness.linalg.answer import OnFailure, check_on_failure
from sharpness.linalg.which import WHICH, Which
from sharpness.metrics.door import open_objective, provenance
from sharpness.metrics.pyhessian import pyhessian_eigenvalues
from sharpness.objective import Objective
from sharpness.objective.losses import BatchLoss, LossFn
from sharpness.objective.parameters import ParameterChoice
from sharpness.operators import HessianOperator
from sharpness.results import EigenResult

METHODS = ("lanczos", "power", "dense", "pyhessian")


def top_eigenvalues(
    model: nn.Module | Objective,
    loader: Iterable[Any] | None = None,
    loss_fn: LossFn | None = None,
    *,
    k: int = 1,
    which: Which = "largest",
    tol: float = 1e-3,
    method: Literal["lanczos", "power", "dense", "pyhessian"] = "lanczos",
    curvature: Literal["hessian"] = "hessian",
    num_matvecs: int | None = None,
    vectors: bool = False,
    batch_loss: BatchLoss | None = None,
    params: ParameterChoice | None = None,
    mode: str = "eval",
    max_batches: int | None = None,
    seed: int = 0,
    progress: bool | None = None,
    on_failure: OnFailure = "warn",
    memory: int | str = "auto",
) -> EigenResult:
    r"""Compute the top eigenvalues of the Hessian of a model's loss over a whole loader.

    The Hessian is that of :math:`f(\theta) = \frac{1}{T} \sum_t \ell_t(\theta)`, the mean over all loss terms of the
    loader, with respect to the chosen parameters. *Top* means algebraically largest unless ``which`` says otherwise.

    What is certain: each ``interval`` contains an eigenvalue of this Hessian. What is overwhelmingly likely, but not
    certain, with ``method="lanczos"`` and ``"power"``: that these are the first ``k``. Two eigenvalues closer to each
    other than the tolerance may be seen as one; ``method="dense"`` misses nothing.

    The eigenvalues scale with the loss, and change when layers are rescaled although the function does not (Dinh et
    al. 2017): compare models at equal loss and similar weight norms.

    Args:
        model: The trained model, or an `Objective` that replaces ``model, loader, loss_fn`` and the common options.
        loader: Any re-iterable of batches: ``(inputs, targets)``, dicts, dataclasses ...
        loss_fn: A criterion ``(outputs, targets) -> scalar``, or ``None`` to infer it (see `Objective`).
        k: Number of wanted eigenvalues.
        which: ``"largest"`` (descending), ``"smallest"`` (ascending), ``"magnitude"`` (descending in magnitude) or
            ``"both"`` (``k`` from each end, descending).
        tol: A pair is accepted when its residual is at most ``tol * abs(eigenvalue)``.
        method: ``"lanczos"``; ``"power"``, its slow ancestor; ``"dense"``, exact, for small models; ``"pyhessian"``,
            what that package finds, with our residuals.
        curvature: ``"hessian"``.
        num_matvecs: Hessian-vector products that may be spent at most; ``None`` leaves it to the method.
        vectors: Also return the eigenvectors.
        batch_loss: ``callable(model, batch) -> (loss, weight)`` in place of ``loss_fn``.
        params: Names, globs, a compiled regular expression, or a predicate that choose parameters.
        mode: ``"eval"``, ``"train"`` or ``"as_is"``.
        max_batches: Use only the first so many batches; the answer is then about this subset.
        seed: Same call, same bits; the global random state is left alone.
        progress: Show a progress bar; ``None`` shows one on a terminal after two seconds.
        on_failure: ``"warn"``, ``"raise"`` or ``"ignore"`` when the tolerance is not met.
        memory: Bytes (or ``"2GiB"``) that may be kept between products; ``0`` keeps nothing.

    Returns:
        Eigenvalues with residuals and intervals, converged or not, and what they cost.

    Raises:
        ArgumentError: If an option cannot be accepted.
        ModelError: If the model or the loss cannot be differentiated twice.
        DataError: If the loader or a batch cannot be used.
        NonFiniteError: If a loss, gradient or product is NaN or infinite; names the batch.
        ConvergenceError: If the tolerance is not met and ``on_failure="raise"``.

    Cost: one pass over the data per product, about 10 products for ``k=1`` and 20 for ``k=5`` on trained networks, and
    in single precision one float64 product on the first samples, to measure rounding; memory for one vector per
    product and, where all batches fit into ``memory``, the first-order graphs of as many of them as fit beside.

    References:
        Lanczos (1950); Pearlmutter (1994), Fast exact multiplication by the Hessian; Parlett (1998), ch. 13.

    Example:
        >>> import torch, sharpness
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> data = [(torch.tensor([[1.0, 0.0], [0.0, 3.0]]), torch.zeros(2, 1))]
        >>> sharpness.top_eigenvalues(model, data, k=2).eigenvalues.round(decimals=3)  # of 2/2 X'X
        tensor([9., 1.], dtype=torch.float64)
    """
    check_choice("which", which, WHICH)
    check_choice("method", method, METHODS)
    check_choice("curvature", curvature, ("hessian",))
    tol = check_positive("tol", tol)
    check_flag("vectors", vectors)
    check_on_failure(on_failure)
    num_matvecs = None if num_matvecs is None else check_count("num_matvecs", num_matvecs)
    options = {
        "batch_loss": batch_loss,
        "params": params,
        "mode": mode,
        "max_batches": max_batches,
        "seed": seed,
        "progress": progress,
        "memory": memory,
    }
    objective = open_objective(model, loader, loss_fn, options)
    k = check_count("k", k, high=objective.n, of="the number of parameters")

    started, passes = time.perf_counter(), objective.num_passes
    wanted: dict[str, Any] = {
        "k": k,
        "which": which,
        "tol": tol,
        "num_matvecs": num_matvecs,
        "vectors": vectors,
        "on_failure": on_failure,
    }

    def completed(result: EigenResult) -> EigenResult:
        return dataclasses.replace(
            result,
            num_passes=objective.num_passes - passes,
            seconds=time.perf_counter() - started,
            layout=objective.parameters.layout,
            settings=provenance(objective, {**result.settings, "curvature": curvature}),
        )

    with objective.session():
        operator = HessianOperator(objective)
        try:
            if method == "pyhessian":
                result = pyhessian_eigenvalues(objective, **wanted)
            elif method == "dense":
                result = dense(operator, memory=objective.memory, **wanted)
            else:
                algorithm = lanczos if method == "lanczos" else power_iteration
                result = algorithm(operator, seed=objective.seed, progress=objective.progress, **wanted)
        except ConvergenceError as error:
            objective.check()
            raise ConvergenceError(str(error), completed(error.result)) from None
        objective.check()
    return completed(result)
