"""Density of all eigenvalues of the curvature of a trained model."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

from sharpness._checks import check_count, check_positive
from sharpness.linalg import LinearOperator, stochastic_lanczos_quadrature
from sharpness.linalg.answer import OnFailure, check_on_failure
from sharpness.metrics.door import open_objective
from sharpness.metrics.estimating import measure, plan_vectors
from sharpness.objective import Objective
from sharpness.objective.curvature import Curvature, CurvatureName
from sharpness.objective.losses import BatchLoss
from sharpness.objective.parameters import ParameterChoice
from sharpness.objective.reduction import LossFn
from sharpness.results import DensityResult


def spectral_density(
    model: nn.Module | Objective,
    loader: Iterable[Any] | None = None,
    loss_fn: LossFn | None = None,
    *,
    num_draws: int = 4,
    num_steps: int = 90,
    sigma: float | None = None,
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
) -> DensityResult:
    r"""Estimate the density of all eigenvalues of the Hessian of a model's loss, and count its outliers.

    By stochastic Lanczos quadrature with full reorthogonalisation. Networks that separate classes have a bulk around
    zero and about as many outliers as classes (Papyan 2019): ``num_outliers`` counts them, and ``certified`` says which
    of them are eigenvalues for certain. For the exact rule see `linalg.stochastic_lanczos_quadrature`.

    The draws advance together: one pass over the data multiplies all of them.

    Args:
        model: The trained model, or an `Objective` that replaces ``model, loader, loss_fn`` and the common options.
        loader: Any re-iterable of batches.
        loss_fn: A criterion ``(outputs, targets) -> scalar``, or ``None`` to infer it (see `Objective`).
        num_draws: Random vectors; their spread is the error of ``mass_above`` and of the moments.
        num_steps: Steps of Lanczos for each, at most the number of parameters; more are reduced to that, and the result
            says so. Twice the steps resolve half the width.
        sigma: Standard deviation of the kernel that turns nodes into a density; ``None`` takes the rule of Ghorbani et
            al. (2019). It is at least 2e-5 of the width of the spectrum, the finest that the grid shows.
        curvature: ``"hessian"``; ``"ggn"``, the generalised Gauss-Newton matrix; ``"fisher"``; ``"empirical_fisher"``
            (see `GGNOperator`, `FisherOperator`, `EmpiricalFisherOperator`).
        batch_loss: ``callable(model, batch) -> (loss, weight)`` in place of ``loss_fn``.
        params: Names, globs, a compiled regular expression, or a predicate that choose parameters.
        mode: ``"eval"``, ``"train"`` or ``"as_is"``.
        max_batches: Use only the first so many batches; the answer is then about this subset.
        seed: Same call, same bits; the global random state is left alone.
        progress: Show a progress bar; ``None`` shows one on a terminal after two seconds.
        on_failure: ``"warn"``, ``"raise"`` or ``"ignore"`` has no part here, since there always is an answer.
        memory: Bytes (or ``"2GiB"``) that may be kept between products: data, first-order graphs, and the bases of the
            draws, fewer of which run together where their share is full; ``0`` keeps nothing but these.
        microbatch_size: Cut each batch into pieces of at most so many samples, which bounds the memory of a product.
        precision: ``"exact"``, ``"tf32"``, ``"bfloat16"`` or ``"float16"`` (see `Objective`).
        compile: ``"auto"``, ``True`` or ``False``: whether products are compiled (see `Objective`).

    Returns:
        Density, nodes and weights, outliers, and what they cost.

    Raises:
        ArgumentError: If an option cannot be accepted.
        ModelError: If the model or the loss cannot be differentiated twice.
        DataError: If the loader or a batch cannot be used.
        NonFiniteError: If a loss, gradient or product is NaN or infinite; names the batch.

    Cost: ``num_draws num_steps`` products with the matrix in ``num_steps`` passes over the data; memory for as many
    vectors.

    References:
        Ghorbani, Krishnan & Xiao (2019), arXiv 1901.10159; Papyan (2019), arXiv 1901.08244.

    Example:
        >>> import torch, sharpness
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> data = [(torch.tensor([[1.0, 0.0], [0.0, 3.0]]), torch.zeros(2, 1))]
        >>> density = sharpness.spectral_density(model, data)
        >>> [round(node, 3) for node in density.nodes[0].tolist()], density.mass_above(10.0)
        ([1.0, 9.0], 0.0)
    """
    num_draws = check_count("num_draws", num_draws)
    num_steps = check_count("num_steps", num_steps)
    sigma = None if sigma is None else check_positive("sigma", sigma)
    kind = Curvature(curvature)
    check_on_failure(on_failure)
    objective = open_objective(model, loader, loss_fn, locals())
    objective.require(kind)
    room = plan_vectors(objective, num_draws * min(num_steps, objective.n))

    def run(operator: LinearOperator) -> DensityResult:
        return stochastic_lanczos_quadrature(
            operator,
            num_draws=num_draws,
            num_steps=num_steps,
            sigma=sigma,
            memory=room,
            seed=objective.seed,
            progress=objective.progress,
        )

    return measure(
        objective, kind, run, {"metric": "spectral_density"}, expected=num_draws * min(num_steps, objective.n)
    )
