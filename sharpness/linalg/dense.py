"""All eigenvalues by forming the matrix: exact, for small operators."""

from __future__ import annotations

import time

import torch

from sharpness._checks import check_choice, check_count, check_flag, check_positive, size_text
from sharpness.errors import ArgumentError, NonFiniteError
from sharpness.linalg.answer import OnFailure, answer, check_on_failure
from sharpness.linalg.bounds import rounding_level
from sharpness.linalg.operator import LinearOperator, check_operator
from sharpness.linalg.which import WHICH, Which, select
from sharpness.results import EigenResult

_LIMIT = 2 * 1024**3  # bytes of the matrix and its eigenvectors that are formed without being asked


def dense(
    operator: LinearOperator,
    k: int = 1,
    *,
    which: Which = "largest",
    tol: float = 1e-3,
    num_matvecs: int | None = None,
    vectors: bool = False,
    memory: int | None = None,
    on_failure: OnFailure = "warn",
) -> EigenResult:
    """Compute ``k`` eigenvalues from the whole matrix, formed by ``n`` products.

    Use it as the ground truth for small models: it misses nothing, multiplicities included.

    Args:
        operator: Symmetric operator of size ``n``.
        k: Number of wanted eigenvalues, ``1 <= k <= n``.
        which: As in :func:`lanczos`.
        tol: Relative tolerance, as in :func:`lanczos`; met unless rounding prevents it.
        num_matvecs: Products that may be spent; must allow ``n``.
        vectors: Also return the eigenvectors.
        memory: Bytes that may be used; ``None`` allows 2 GiB.
        on_failure: ``"warn"``, ``"raise"`` or ``"ignore"``.

    Returns:
        Eigenvalues, residuals and intervals.

    Raises:
        ArgumentError: If the matrix would not fit, or an option cannot be accepted.
        NonFiniteError: If a product holds NaN or infinity.
        ConvergenceError: If the tolerance is not met and ``on_failure="raise"``.

    Cost: ``n`` products, ``O(n^3)`` operations, ``40 n^2`` bytes.
    """
    n = check_operator(operator)
    k = check_count("k", k, high=n, of="the dimension of the operator")
    check_choice("which", which, WHICH)
    tol = check_positive("tol", tol)
    check_flag("vectors", vectors)
    check_on_failure(on_failure)
    needed, limit = 40 * n * n, memory or _LIMIT  # memory=0 says that nothing is kept, not that nothing is there
    if needed > limit:
        raise ArgumentError(
            f'method="dense" would need {size_text(needed)} for the {n} x {n} matrix, {size_text(limit)} '
            f'are allowed. Use method="lanczos", or pass memory={needed} if the machine has that much.'
        )
    if num_matvecs is not None and check_count("num_matvecs", num_matvecs) < n:
        raise ArgumentError(
            f'method="dense" spends {n} products, num_matvecs={num_matvecs} allows fewer. '
            f'Leave num_matvecs out, or use method="lanczos".'
        )
    started = time.perf_counter()
    matrix = operator.to_dense().double().cpu()
    if not bool(torch.isfinite(matrix).all()):
        raise NonFiniteError(
            "a product of the operator holds NaN or infinity. Check the loss and the weights for overflow."
        )
    symmetric = (matrix + matrix.T) / 2
    theta, rows = torch.linalg.eigh(symmetric)
    scale = theta.abs().max().item()
    floor = rounding_level(operator.dtype, scale)
    bounds = torch.linalg.vector_norm(matrix @ rows - rows * theta, dim=0).numpy() + floor
    values = theta.numpy()
    chosen = select(values, which, k)
    kept = rows.T[torch.as_tensor(chosen.copy())].to(dtype=operator.dtype, device=operator.device)
    return answer(
        operator=operator,
        theta=values,
        residuals=bounds,
        wanted=chosen,
        floor=floor,
        allowed=floor,
        tol=tol,
        num_matvecs=n,
        rows=kept,
        vectors=vectors,
        settings={"method": "dense", "which": which, "k": k, "tol": tol},
        started=started,
        on_failure=on_failure,
        hint="The operator is not symmetric, or rounding limits these eigenvalues: try a float64 model.",
    )
