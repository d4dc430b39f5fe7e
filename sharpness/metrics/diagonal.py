"""Diagonal of the curvature of a trained model."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal, TypeAlias

from torch import nn

from sharpness._checks import check_choice, check_count
from sharpness.linalg import LinearOperator, hutchinson_diagonal, xdiag
from sharpness.linalg.answer import OnFailure, check_on_failure
from sharpness.metrics.door import open_objective
from sharpness.metrics.estimating import measure, plan_vectors
from sharpness.objective import Objective
from sharpness.objective.curvature import Curvature, CurvatureName
from sharpness.objective.losses import BatchLoss
from sharpness.objective.parameters import ParameterChoice
from sharpness.objective.reduction import LossFn
from sharpness.results import DiagonalResult

DiagonalMethod: TypeAlias = Literal["xdiag", "hutchinson"]
METHODS = ("xdiag", "hutchinson")


def diagonal(
    model: nn.Module | Objective,
    loader: Iterable[Any] | None = None,
    loss_fn: LossFn | None = None,
    *,
    method: DiagonalMethod = "xdiag",
    num_matvecs: int = 64,
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
) -> DiagonalResult:
    r"""Estimate the diagonal of the Hessian of a model's loss, each entry with its standard error.

    ``named_value()`` and ``named_stderr()`` give it parameter by parameter; `per_layer` splits one run over the layers,
    with the sums over each.

    Args:
        model: The trained model, or an `Objective` that replaces ``model, loader, loss_fn`` and the common options.
        loader: Any re-iterable of batches.
        loss_fn: A criterion ``(outputs, targets) -> scalar``, or ``None`` to infer it (see `Objective`).
        method: ``"xdiag"``, best where some eigenvalues stand out; ``"hutchinson"``, the estimator of Bekas et al.,
            which keeps no basis.
        num_matvecs: Products to spend, exactly (XDiag leaves an odd one over). XDiag computes the entries one by one
            where these are no more.
        curvature: ``"hessian"``; ``"ggn"``, the generalised Gauss-Newton matrix; ``"fisher"``; ``"empirical_fisher"``
            (see `GGNOperator`, `FisherOperator`, `EmpiricalFisherOperator`).
        batch_loss: ``callable(model, batch) -> (loss, weight)`` in place of ``loss_fn``.
        params: Names, globs, a compiled regular expression, or a predicate that choose parameters.
        mode: ``"eval"``, ``"train"`` or ``"as_is"``.
        max_batches: Use only the first so many batches; the answer is then about this subset.
        seed: Same call, same bits; the global random state is left alone.
        progress: Show a progress bar; ``None`` shows one on a terminal after two seconds.
        on_failure: ``"warn"``, ``"raise"`` or ``"ignore"`` has no part here, since there always is an answer.
        memory: Bytes (or ``"2GiB"``) that may be kept between products: data, first-order graphs, and the vectors of
            the method; ``0`` keeps nothing but these.
        microbatch_size: Cut each batch into pieces of at most so many samples, which bounds the memory of a product.
        precision: ``"exact"``, ``"tf32"``, ``"bfloat16"`` or ``"float16"`` (see `Objective`).
        compile: ``"auto"``, ``True`` or ``False``: whether products are compiled (see `Objective`).

    Returns:
        The diagonal and its standard errors, its sum and the sum of its squares, and what they cost.

    Raises:
        ArgumentError: If an option cannot be accepted.
        ModelError: If the model or the loss cannot be differentiated twice.
        DataError: If the loader or a batch cannot be used.
        NonFiniteError: If a loss, gradient or product is NaN or infinite; names the batch.

    Cost: ``num_matvecs`` products with the matrix, up to 16 of them in one pass over the data; memory for as many
    vectors (``"xdiag"``), or 36 (``"hutchinson"``).

    References:
        Bekas, Kokiopoulou & Saad (2007), doi:10.1016/j.apnum.2007.01.003; Epperly, Tropp & Webber (2024), arXiv
        2301.07825.

    Example:
        >>> import torch, sharpness
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> data = [(torch.tensor([[1.0, 0.0], [0.0, 3.0]]), torch.zeros(2, 1))]
        >>> sharpness.diagonal(model, data).named_value()["weight"]  # of 2/2 X'X
        tensor([[1., 9.]])
    """
    check_choice("method", method, METHODS)
    num_matvecs = check_count("num_matvecs", num_matvecs)
    kind = Curvature(curvature)
    check_on_failure(on_failure)
    objective = open_objective(model, loader, loss_fn, locals())
    objective.require(kind)
    room = 0 if method == "hutchinson" else plan_vectors(objective, min(num_matvecs, objective.n))

    def run(operator: LinearOperator) -> DiagonalResult:
        asked: dict[str, Any] = {
            "num_matvecs": num_matvecs,
            "seed": objective.seed,
            "progress": objective.progress,
        }
        if method == "hutchinson":
            return hutchinson_diagonal(operator, **asked)
        return xdiag(operator, memory=room, **asked)

    return measure(objective, kind, run, {"metric": "diagonal"}, expected=num_matvecs)
