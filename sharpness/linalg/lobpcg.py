"""Eigenvalues by the locally optimal block preconditioned conjugate gradient method, through SciPy."""

from __future__ import annotations

import time
import warnings

import numpy as np
from scipy.sparse.linalg import lobpcg as scipy_lobpcg

from sharpness._checks import check_choice, check_count, check_flag, check_positive, check_seed
from sharpness._progress import check_progress, progress_bar
from sharpness.errors import ArgumentError
from sharpness.linalg.answer import OnFailure, check_on_failure
from sharpness.linalg.bounds import rounding_level
from sharpness.linalg.counted import Array, CountedProducts, SpentError, answer_from, start
from sharpness.linalg.operator import LinearOperator, check_operator
from sharpness.linalg.search import Found, Goal
from sharpness.linalg.which import WHICH, Which, count
from sharpness.results import EigenResult

_FIRST = 4  # iterations after which the eigenvalues are known well enough to scale the tolerance
_OWN = 4  # products per column that SciPy spends at the start, at the end, and at a restart of its own


def lobpcg(
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
    """Compute ``k`` eigenvalues by LOBPCG, SciPy's, and check each with a product of its own.

    Improves a block of ``k`` vectors in the span of the block, its residuals and its last steps; the products come in
    blocks. Use it where a block of products costs little more than one, or where few vectors fit; :func:`lanczos`
    needs fewer products. A block of ``k`` random vectors sees eigenvalues repeated up to ``k`` times.

    ``which="both"`` and ``"magnitude"`` run it once for each end.

    Args:
        operator: Symmetric operator of size ``n``.
        k: Number of wanted eigenvalues, ``5 k <= n``.
        which: As in :func:`lanczos`.
        tol: Relative tolerance, as in :func:`lanczos`.
        num_matvecs: Products that may be spent in all; ``None`` allows 200 per eigenvalue and end.
        vectors: Also return the eigenvectors.
        seed: Seed of the random starting block.
        progress: Show a progress bar; ``None`` shows one on a terminal after two seconds.
        on_failure: ``"warn"``, ``"raise"`` or ``"ignore"``.

    Returns:
        Eigenvalues, residuals and intervals.

    Raises:
        ArgumentError: If an option cannot be accepted.
        NonFiniteError: If a product holds NaN or infinity.
        ConvergenceError: If the tolerance is not met and ``on_failure="raise"``.

    Cost: up to ``k`` products per iteration, and one for each pair to check it; memory of about ``9 k`` vectors on the
    CPU.

    References:
        Knyazev (2001), Toward the optimal preconditioned eigensolver, doi:10.1137/S1064827500366124.

    Example:
        >>> import torch
        >>> from sharpness.linalg import DenseOperator, lobpcg
        >>> lobpcg(DenseOperator(torch.diag(torch.arange(1.0, 30.0)))).eigenvalues.round(decimals=2)
        tensor([29.], dtype=torch.float64)
    """
    n = check_operator(operator)
    k = check_count("k", k, high=n, of="the dimension of the operator")
    check_choice("which", which, WHICH)
    goal = Goal(which=which, k=k, wanted=count(which, k, n), tol=check_positive("tol", tol))
    check_flag("vectors", vectors)
    check_on_failure(on_failure)
    seed = check_seed(seed)
    ends = [which == "largest"] if which in ("largest", "smallest") else [True, False]
    width = k * len(ends)
    budget = 200 * width if num_matvecs is None else check_count("num_matvecs", num_matvecs)
    if n < 5 * width:
        raise ArgumentError(
            f"LOBPCG needs 5 dimensions for each vector of its blocks, {5 * width} in all, the operator has {n}. "
            'Use method="dense", which is exact, or "lanczos".'
        )
    least = (_OWN + 2) * width
    if budget < least:
        raise ArgumentError(
            f"`num_matvecs` must be at least {least} for LOBPCG to find {goal.wanted} eigenvalues, got {budget}. "
            f"Pass num_matvecs={least} or more; {40 * width} is often enough."
        )
    started = time.perf_counter()
    with progress_bar(check_progress(progress), total=None, title="LOBPCG") as bar:
        products = CountedProducts(operator, budget, bar.update)
        found = _run(products, goal, ends, seed)
    return answer_from(
        found,
        operator,
        goal,
        spent=products.count,
        vectors=vectors,
        settings={"method": "lobpcg", "which": which, "k": k, "tol": tol, "seed": seed, "num_matvecs": num_matvecs},
        started=started,
        on_failure=on_failure,
        hint="Raise num_matvecs, loosen tol, or use lanczos, which needs fewer products.",
    )


def _run(products: CountedProducts, goal: Goal, ends: list[bool], seed: int) -> Found:
    """Return the checked pairs after as many legs as it takes, or as the products allow."""
    n, k, width = products.operator.n, goal.k, goal.k * len(ends)
    block = start(n, width, seed, products.operator)
    blocks = [block[:, k * i : k * (i + 1)] for i in range(len(ends))]
    values = np.zeros(width)
    limit = products.budget
    tolerances, first, worst = [0.0] * len(ends), True, np.inf
    while True:
        for i, largest in enumerate(ends):
            # What is left, but for the check, is shared by the ends that are still to come.
            products.budget = products.count + (limit - width - products.count) // (len(ends) - i)
            iterations = products.left // k - _OWN
            if iterations >= 0:
                values[k * i : k * (i + 1)], blocks[i] = _leg(
                    products, blocks[i], largest, tolerances[i], min(iterations, _FIRST) if first else iterations
                )
        products.budget = limit
        floor = rounding_level(products.operator.dtype, products.norm)
        wanted = [np.abs(values[k * i : k * (i + 1)]).min() for i in range(len(ends))]
        if goal.which == "magnitude":
            wanted = [float(np.sort(np.abs(values))[-k])] * len(ends)
        tolerances = [max(0.4 * goal.tol * float(value), 0.5 * floor) for value in wanted]
        enough = limit - products.count >= (_OWN + 3) * width
        if first and enough:
            first = False
            continue
        found = products.found(np.concatenate(blocks, axis=1).T, goal)
        residual = float(found.residuals[found.chosen].max())
        if found.accurate(goal.tol) or limit - products.count < (_OWN + 3) * width or residual > 0.7 * worst:
            return found  # accurate, spent, or at the level that rounding allows
        worst = residual
        tolerances = [tolerance / 4 for tolerance in tolerances]
        blocks = [np.array(b) for b in blocks]


def _leg(products: CountedProducts, block: Array, largest: bool, tol: float, iterations: int) -> tuple[Array, Array]:
    """Return the values and the block that SciPy makes of ``block`` within so many iterations."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it warns of what is checked here anyway
        try:
            values, better = scipy_lobpcg(products.to_scipy(), block, largest=largest, tol=tol, maxiter=iterations)
        except SpentError:
            return np.zeros(block.shape[1]), block
    return np.asarray(values), np.asarray(better)
