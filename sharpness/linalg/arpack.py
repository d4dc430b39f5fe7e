"""Eigenvalues by ARPACK's implicitly restarted Lanczos method, through SciPy."""

from __future__ import annotations

import inspect
import time
from typing import Any, Literal

import numpy as np
from scipy.sparse.linalg import ArpackError, ArpackNoConvergence, eigsh

from sharpness._checks import check_choice, check_count, check_flag, check_positive, check_seed
from sharpness._progress import check_progress, progress_bar
from sharpness.errors import ArgumentError
from sharpness.linalg.answer import OnFailure, check_on_failure
from sharpness.linalg.counted import Array, CountedProducts, SpentError, answer_from, start
from sharpness.linalg.operator import LinearOperator, check_operator
from sharpness.linalg.search import Found, Goal
from sharpness.linalg.which import WHICH, Which, count
from sharpness.results import EigenResult

_NAMES: dict[str, Literal["LA", "SA", "LM", "BE"]] = {
    "largest": "LA",
    "smallest": "SA",
    "magnitude": "LM",
    "both": "BE",
}
_TAKES_RNG = "rng" in inspect.signature(eigsh).parameters  # SciPy 1.17: for restarts at random within ARPACK


def arpack(
    operator: LinearOperator,
    k: int = 1,
    *,
    which: Which = "largest",
    tol: float = 1e-3,
    num_matvecs: int | None = None,
    vectors: bool = False,
    seed: int = 0,
    progress: bool | None = None,
    on_failure: OnFailure = "warn",
) -> EigenResult:
    """Compute ``k`` eigenvalues by ARPACK, SciPy's ``eigsh``, and check each with a product of its own.

    A Lanczos method in bounded memory, restarted implicitly: the field's reference implementation. Use it to compare;
    :func:`lanczos` stops at the step at which the pairs are accurate, ARPACK only looks once per restart.

    Like every Krylov method of one vector it may miss copies of a repeated eigenvalue.

    Args:
        operator: Symmetric operator of size ``n``.
        k: Number of wanted eigenvalues; all that are wanted must be fewer than ``n``.
        which: As in :func:`lanczos`.
        tol: Relative tolerance, as in :func:`lanczos`.
        num_matvecs: Products that may be spent in all; ``None`` allows ``40 k + 400``.
        vectors: Also return the eigenvectors.
        seed: Seed of the random starting vector.
        progress: Show a progress bar; ``None`` shows one on a terminal after two seconds.
        on_failure: ``"warn"``, ``"raise"`` or ``"ignore"``.

    Returns:
        Eigenvalues, residuals and intervals. Pairs that ARPACK did not deliver are NaN with an infinite residual.

    Raises:
        ArgumentError: If an option cannot be accepted.
        NonFiniteError: If a product holds NaN or infinity.
        ConvergenceError: If the tolerance is not met and ``on_failure="raise"``.

    Cost: one product per step, one for the scale of the operator and one for each pair; memory of
    ``max(2 k + 1, 20)`` vectors on the CPU.

    References:
        Lehoucq, Sorensen & Yang, ARPACK Users' Guide (1998).

    Example:
        >>> import torch
        >>> from sharpness.linalg import DenseOperator, arpack
        >>> arpack(DenseOperator(torch.diag(torch.arange(1.0, 30.0)))).eigenvalues.round(decimals=2)
        tensor([29.], dtype=torch.float64)
    """
    n = check_operator(operator)
    k = check_count("k", k, high=n, of="the dimension of the operator")
    check_choice("which", which, WHICH)
    goal = Goal(which=which, k=k, wanted=count(which, k, n), tol=check_positive("tol", tol))
    check_flag("vectors", vectors)
    check_on_failure(on_failure)
    seed = check_seed(seed)
    wanted = goal.wanted
    budget = 40 * wanted + 400 if num_matvecs is None else check_count("num_matvecs", num_matvecs)
    if wanted >= n:
        raise ArgumentError(
            f'ARPACK finds fewer than n = {n} eigenvalues, {wanted} are wanted. Use method="dense", which finds all.'
        )
    rows, restarts = _plan(n, wanted, budget)
    if restarts < 1:
        least = 2 * wanted + 4 if wanted + 1 < n else 2 * wanted + 3
        raise ArgumentError(
            f"`num_matvecs` must be at least {least} for ARPACK to find {wanted} eigenvalues, got {budget}. "
            f"Pass num_matvecs={least} or more; {40 * wanted + 100} is often enough."
        )
    started = time.perf_counter()
    with progress_bar(check_progress(progress), total=None, title="ARPACK") as bar:
        products = CountedProducts(operator, budget - wanted, bar.update)
        found = _run(products, goal, rows, restarts, seed)
    return answer_from(
        found,
        operator,
        goal,
        spent=products.count,
        vectors=vectors,
        settings={"method": "arpack", "which": which, "k": k, "tol": tol, "seed": seed, "num_matvecs": num_matvecs},
        started=started,
        on_failure=on_failure,
        hint="Raise num_matvecs, loosen tol, or use lanczos, which stops sooner.",
    )


def _plan(n: int, wanted: int, budget: int) -> tuple[int, int]:
    """Return the size of the basis and the number of restarts that the budget allows."""
    left = budget - wanted - 2  # the check of each pair, the scale, and ARPACK's own start
    rows = min(n, max(2 * wanted + 1, 20))
    while rows > wanted + 1 and rows + (rows - wanted) > left:
        rows -= 1
    return rows, (left - rows) // (rows - wanted)


def _run(products: CountedProducts, goal: Goal, rows: int, restarts: int, seed: int) -> Found | None:
    """Return the pairs that ARPACK delivers, checked, or ``None``."""
    n = products.operator.n
    v0 = start(n, 1 + goal.wanted, seed, products.operator)
    products(np.ascontiguousarray(v0[:, 0]))
    # ARPACK takes absolute tolerances for eigenvalues below eps^(2/3), so it is given an operator of norm about 1.
    products.scale = products.norm
    if products.scale == 0:  # a random vector is mapped to zero: so are all, and all are eigenvectors
        return products.found(np.linalg.qr(v0[:, 1:])[0].T, goal)
    options: dict[str, Any] = {"rng": np.random.default_rng(seed)} if _TAKES_RNG else {}
    try:
        _, columns = eigsh(
            products.to_scipy(),
            goal.wanted,
            which=_NAMES[goal.which],
            v0=np.ascontiguousarray(v0[:, 0]),
            ncv=rows,
            maxiter=restarts,
            tol=0.4 * goal.tol,  # the residuals reported also allow for rounding
            **options,
        )
    except ArpackNoConvergence as error:
        columns = error.eigenvectors
    except (ArpackError, SpentError):
        return None
    found: Array = np.asarray(columns)
    return products.found(found.T, goal) if found.size else None
