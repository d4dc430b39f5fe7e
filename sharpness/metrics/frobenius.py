"""Frobenius norm of the curvature of a trained model."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

from sharpness._checks import check_count, check_positive
from sharpness.linalg import LinearOperator
from sharpness.linalg import frobenius_norm as estimated
from sharpness.linalg.answer import OnFailure, check_on_failure
from sharpness.metrics.door import open_objective
from sharpness.metrics.estimating import measure, plan_vectors
from sharpness.objective import Objective
from sharpness.objective.curvature import Curvature, CurvatureName
from sharpness.objective.losses import BatchLoss
from sharpness.objective.parameters import ParameterChoice
from sharpness.objective.reduction import LossFn
from sharpness.results import ScalarResult

_LIKELY = 64  # vectors kept


def frobenius_norm(
    model: nn.Module | Objective,
    loader: Iterable[Any] | None = None,
    loss_fn: LossFn | None = None,
    *,
    tol: float = 0.02,
    num_matvecs: int | None = None,
    curvature: CurvatureName = "hessian",
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
    r"""Estimate the Frobenius norm of the Hessian of a model's loss: the root of the sum of all squared eigenvalues.

    It is dominated by the largest eigenvalues, and does not cancel where some are negative, as the trace does.

    Args:
        model: The trained model, or an `Objective` that replaces ``model, loader, loss_fn`` and the common options.
        loader: Any re-iterable of batches.
        loss_fn: A criterion ``(outputs, targets) -> scalar``, or ``None`` to infer it (see `Objective`).
        tol: Half the 95 % interval, relative to the norm.
        num_matvecs: Products to spend, exactly (an odd one is left over); ``None`` stops once ``tol`` holds, after 1000
            at most.
        curvature: ``"hessian"``; ``"ggn"``, the generalised Gauss-Newton matrix; ``"fisher"``; ``"empirical_fisher"``
            (see `GGNOperator`, `FisherOperator`, `EmpiricalFisherOperator`).
        batch_loss: ``callable(model, batch) -> (loss, weight)`` in place of ``loss_fn``.
        params: Names, globs, a compiled regular expression, or a predicate that choose parameters.
        mode: ``"eval"``, ``"train"`` or ``"as_is"``.
        max_batches: Use only the first so many batches; the answer is then about this subset.
        seed: Same call, same bits; the global random state is left alone.
        progress: Show a progress bar; ``None`` shows one on a terminal after two seconds.
        on_failure: ``"warn"``, ``"raise"`` or ``"ignore"`` when the tolerance is not met.
        memory: Bytes (or ``"2GiB"``) that may be kept between products: data, first-order graphs, and the vectors of
            the method; ``0`` keeps nothing but these.
        microbatch_size: Cut each batch into pieces of at most so many samples, which bounds the memory of a product.
        precision: ``"exact"``, ``"tf32"``, ``"bfloat16"`` or ``"float16"`` (see `Objective`).
        compile: ``"auto"``, ``True`` or ``False``: whether products are compiled (see `Objective`).

    Returns:
        The norm with its standard error and interval; the samples are those of the squared norm.

    Raises:
        ArgumentError: If an option cannot be accepted.
        ModelError: If the model or the loss cannot be differentiated twice.
        DataError: If the loader or a batch cannot be used.
        NonFiniteError: If a loss, gradient or product is NaN or infinite; names the batch.
        ConvergenceError: If the tolerance is not met and ``on_failure="raise"``.

    Cost: one product with the matrix for each of ``num_matvecs``, up to 16 of them in one pass over the data; memory
    for as many vectors.

    References:
        Epperly, Tropp & Webber (2024), arXiv 2301.07825.

    Example:
        >>> import torch, sharpness
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> data = [(torch.tensor([[1.0, 0.0], [0.0, 3.0]]), torch.zeros(2, 1))]
        >>> round(sharpness.frobenius_norm(model, data).value ** 2, 4)  # of 2/2 X'X
        82.0
    """
    tol = check_positive("tol", tol)
    num_matvecs = None if num_matvecs is None else check_count("num_matvecs", num_matvecs)
    kind = Curvature(curvature)
    check_on_failure(on_failure)
    objective = open_objective(model, loader, loss_fn, locals())
    objective.require(kind)
    room = plan_vectors(objective, min(num_matvecs or _LIKELY, objective.n))

    def run(operator: LinearOperator) -> ScalarResult:
        return estimated(
            operator,
            tol=tol,
            num_matvecs=num_matvecs,
            memory=room,
            seed=objective.seed,
            progress=objective.progress,
            on_failure=on_failure,
        )

    return measure(objective, kind, run, {"metric": "frobenius_norm"}, expected=num_matvecs or _LIKELY)
