"""Eigenvalues of the loss Hessian of a trained model."""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn

from sharpness._checks import check_choice, check_count, check_flag, check_positive, check_writable
from sharpness.errors import ArgumentError, ConvergenceError
from sharpness.linalg import LinearOperator, RecordedOperator, arpack, dense, lanczos, lobpcg, power_iteration
from sharpness.linalg.answer import OnFailure, check_on_failure
from sharpness.linalg.lanczos import check_storage, lanczos_steps
from sharpness.linalg.which import WHICH, Which, count
from sharpness.metrics.door import open_objective, provenance
from sharpness.metrics.memory import plan_basis, warn_of_memory
from sharpness.metrics.pyhessian import pyhessian_eigenvalues
from sharpness.metrics.sampling import check_sampling
from sharpness.metrics.sampling import sample_interval as bracketed
from sharpness.objective import Objective
from sharpness.objective.curvature import Curvature, CurvatureName
from sharpness.objective.losses import BatchLoss
from sharpness.objective.parameters import ParameterChoice
from sharpness.objective.reduction import LossFn
from sharpness.operators import CurvatureOperator
from sharpness.results import EigenResult

Method: TypeAlias = Literal["lanczos", "power", "lobpcg", "arpack", "dense", "pyhessian"]
METHODS = ("lanczos", "power", "lobpcg", "arpack", "dense", "pyhessian")
_USUAL, _USUAL_EACH = 8, 3  # products that a trained network takes, in all and for each eigenvalue
ITERATIVE: dict[str, Callable[..., EigenResult]] = {
    "lanczos": lanczos,
    "power": power_iteration,
    "lobpcg": lobpcg,
    "arpack": arpack,
}


def top_eigenvalues(
    model: nn.Module | Objective,
    loader: Iterable[Any] | None = None,
    loss_fn: LossFn | None = None,
    *,
    k: int = 1,
    which: Which = "largest",
    tol: float = 1e-3,
    method: Method = "lanczos",
    curvature: CurvatureName = "hessian",
    num_matvecs: int | None = None,
    vectors: bool = False,
    confirm: bool = False,
    sample_interval: bool = False,
    checkpoint: str | os.PathLike[str] | None = None,
    basis_dtype: torch.dtype | None = None,
    basis_device: torch.device | str | None = None,
    start: Tensor | None = None,
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
) -> EigenResult:
    r"""Compute the top eigenvalues of the Hessian of a model's loss over a whole loader.

    The Hessian is that of :math:`f(\theta) = \frac{1}{T} \sum_t \ell_t(\theta)`, the mean over all loss terms of the
    loader, with respect to the chosen parameters. *Top* means algebraically largest unless ``which`` says otherwise.

    What is certain: each ``interval`` contains an eigenvalue of this Hessian. What is overwhelmingly likely, but not
    certain, with all methods but ``"dense"``: that these are the first ``k``. A repeated eigenvalue, or two closer to
    each other than the tolerance, may be seen as one. ``confirm=True`` searches what is left from another random start,
    adds what was missed, and says what it excludes; ``method="dense"`` misses nothing.

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
        method: ``"lanczos"``; ``"power"``, its slow ancestor; ``"lobpcg"`` and ``"arpack"``, those of SciPy;
            ``"dense"``, exact, for small models; ``"pyhessian"``, what that package finds. All with our residuals.
        curvature: ``"hessian"``; ``"ggn"``, the generalised Gauss-Newton matrix; ``"fisher"``; ``"empirical_fisher"``
            (see `GGNOperator`, `FisherOperator`, `EmpiricalFisherOperator`).
        num_matvecs: Products that may be spent at most; ``None`` leaves it to the method.
        vectors: Also return the eigenvectors.
        confirm: Look for missed eigenvalues in the complement of what was found; Lanczos only. The result's
            ``confirmation`` says what that cost and excluded.
        sample_interval: With ``max_batches``, also bracket the first eigenvalue over *all* data, from the subset and as
            many other batches (see `SampleInterval`).
        checkpoint: A file that products are written to as they come. The same call continues a run that was killed and
            ends in the same bits; a file that belongs to other data, weights or options is refused.
        basis_dtype: Dtype that Lanczos keeps its basis in, such as ``torch.bfloat16``; what is reported is then checked
            by fresh products in full precision.
        basis_device: Where Lanczos keeps its basis, such as ``"cpu"`` beside a model on a GPU.
        start: ``(n,)`` or ``(m, n)`` vectors near the wanted eigenvectors, such as those of this model some steps of
            training ago: Lanczos takes fewer products, a quarter or so, and is likelier to overlook an eigenvalue that
            has become the largest since; ``confirm=True`` finds it.
        batch_loss: ``callable(model, batch) -> (loss, weight)`` in place of ``loss_fn``.
        params: Names, globs, a compiled regular expression, or a predicate that choose parameters.
        mode: ``"eval"``, ``"train"`` or ``"as_is"``.
        max_batches: Use only the first so many batches; the answer is then about this subset.
        seed: Same call, same bits; the global random state is left alone.
        progress: Show a progress bar; ``None`` shows one on a terminal after two seconds.
        on_failure: ``"warn"``, ``"raise"`` or ``"ignore"`` when the tolerance is not met.
        memory: Bytes (or ``"2GiB"``) that may be kept between products: data, first-order graphs, and the basis of
            Lanczos, which restarts when its share is full; ``0`` keeps no more than the least that works.
        microbatch_size: Cut each batch into pieces of at most so many samples, which bounds the memory of a product.
        precision: ``"exact"``, ``"tf32"``, ``"bfloat16"`` or ``"float16"`` (see `Objective`).
        compile: ``"auto"``, ``True`` or ``False``: whether products are compiled (see `Objective`).

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
    product and, where all batches fit into ``memory``, the first-order graphs of as many of them as fit beside. A
    warning says so beforehand where the memory will hardly do, and what would fit.

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
    kind = Curvature(curvature)
    tol = check_positive("tol", tol)
    for name, flag in (("vectors", vectors), ("confirm", confirm), ("sample_interval", sample_interval)):
        check_flag(name, flag)
    check_on_failure(on_failure)
    checkpoint = None if checkpoint is None else check_writable("checkpoint", checkpoint)
    num_matvecs = None if num_matvecs is None else check_count("num_matvecs", num_matvecs)
    for_lanczos = {"confirm": confirm, "basis_dtype": basis_dtype, "basis_device": basis_device, "start": start}
    for name, given in for_lanczos.items():
        if given is not None and given is not False and method != "lanczos":
            raise ArgumentError(f'`{name}` is for method="lanczos", got method={method!r}. Leave one of the two out.')
    if start is not None and checkpoint is not None:
        raise ArgumentError("`start` and `checkpoint` exclude each other: a file knows no vectors. Leave one out.")
    objective = open_objective(model, loader, loss_fn, locals())
    k = check_count("k", k, high=objective.n, of="the number of parameters")
    objective.require(kind)
    if sample_interval:
        check_sampling(objective, which)
    if method == "pyhessian" and (checkpoint is not None or kind.name != "hessian"):
        raise ArgumentError(
            'method="pyhessian" makes its products itself, those of the Hessian: `checkpoint` and `curvature` are not '
            'for it. Leave them out, or use method="lanczos".'
        )

    started, passes = time.perf_counter(), objective.num_passes
    asked: dict[str, Any] = {
        "k": k,
        "which": which,
        "tol": tol,
        "num_matvecs": num_matvecs,
        "vectors": vectors or sample_interval,
        "on_failure": on_failure,
    }
    plan = None
    if method == "lanczos":
        check_storage(objective, count(which, k, objective.n), None, basis_dtype, basis_device)
        plan = plan_basis(
            objective,
            count(which, k, objective.n),
            num_matvecs=num_matvecs,
            basis_dtype=basis_dtype,
            basis_device=basis_device,
            resumable=checkpoint is not None,
        )
        asked |= {"memory": plan.memory, **for_lanczos}

    def completed(result: EigenResult) -> EigenResult:
        bracket = None
        if sample_interval and result.eigenvectors is not None and result.converged:
            bracket = bracketed(objective, kind, which, result)
        elif not sample_interval:  # a subset that is drawn at random is meant to be another one each time
            objective.check()
        return dataclasses.replace(
            result,
            eigenvectors=result.eigenvectors if vectors else None,
            num_passes=objective.num_passes - passes,
            seconds=time.perf_counter() - started,
            layout=objective.parameters.layout,
            sample_interval=bracket,
            settings=provenance(objective, {**result.settings, "curvature": curvature}, kind),
        )

    with objective.session():
        usual = _USUAL + _USUAL_EACH * count(which, k, objective.n)
        operator: LinearOperator = CurvatureOperator(
            objective,
            kind,
            before=lambda: warn_of_memory(objective, kind, plan, basis_device),
            expected=min(num_matvecs or usual, usual),
        )
        if method == "lanczos":
            lanczos_steps(
                operator, seed=objective.seed, **asked
            )  # not run: refuses what it must before data are walked
        if checkpoint is not None:
            own = {name: value for name, value in asked.items() if name not in ("on_failure", "memory", "start")}
            identity = {**objective.fingerprint(), "curvature": curvature, "method": method, **_plain(own)}
            operator = RecordedOperator(operator, checkpoint, identity)
        try:
            if method == "pyhessian":
                result = pyhessian_eigenvalues(objective, **asked)
            elif method == "dense":
                result = dense(operator, memory=objective.memory, **asked)
            else:
                result = ITERATIVE[method](operator, seed=objective.seed, progress=objective.progress, **asked)
        except ConvergenceError as error:
            raise ConvergenceError(str(error), completed(error.result)) from None
        return completed(result)


def _plain(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return options as JSON knows them."""
    known = (str, int, float, bool, type(None))
    return {name: value if isinstance(value, known) else str(value) for name, value in options.items()}
