"""Eigenvalues at the ends of the spectrum by the Lanczos method, each with a certified residual."""

from __future__ import annotations

import time
from typing import Any, TypeAlias

import numpy as np
import torch

from sharpness._checks import check_choice, check_count, check_flag, check_positive, check_seed
from sharpness._progress import check_progress, progress_bar
from sharpness.errors import ArgumentError
from sharpness.linalg.answer import OnFailure, answer, check_on_failure
from sharpness.linalg.bounds import accurate
from sharpness.linalg.krylov import Floats, KrylovSpace
from sharpness.linalg.operator import LinearOperator
from sharpness.linalg.which import WHICH, Which, count, select
from sharpness.results import EigenResult

Indices: TypeAlias = "np.ndarray[Any, np.dtype[np.intp]]"
Bools: TypeAlias = "np.ndarray[Any, np.dtype[np.bool_]]"

_SPARE = 2  # products past convergence on small problems


def lanczos(
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
    r"""Compute ``k`` eigenvalues at the ends of the spectrum by Lanczos with full reorthogonalisation.

    Builds an orthonormal basis ``Q`` of the Krylov space of a random vector, one product per step, and takes the
    eigenvalues of the tridiagonal :math:`T = Q A Q^\top`. The residual of each pair follows from the recurrence,
    without a product, so the run stops at the first step at which all wanted residuals are small enough.

    Use it for any symmetric operator, definite or not. It sees an eigenvalue's multiplicity only where the Krylov
    space is exhausted (the run then goes on in its complement); elsewhere each interval is certain to hold an
    eigenvalue, and that the values found are the *first* ``k`` is overwhelmingly likely, not certain.

    Args:
        operator: Symmetric operator of size ``n``.
        k: Number of wanted eigenvalues, ``1 <= k <= n``.
        which: ``"largest"`` (algebraic, descending), ``"smallest"`` (algebraic, ascending), ``"magnitude"``
            (descending in magnitude, with sign) or ``"both"`` (``k`` from each end, descending).
        tol: Relative tolerance: a pair is accepted when its residual is at most ``tol * abs(eigenvalue)``,
            or at the level of rounding.
        num_matvecs: Products that may be spent; ``None`` allows ``min(n, 20 k + 200)``.
        vectors: Also return the eigenvectors.
        seed: Seed of the random starting vector.
        progress: Show a progress bar; ``None`` shows one on a terminal after two seconds.
        on_failure: What to do when the tolerance is not met: ``"warn"``, ``"raise"`` or ``"ignore"``.

    Returns:
        Eigenvalues, residuals and intervals.

    Raises:
        ArgumentError: If an option cannot be accepted.
        NonFiniteError: If a product holds NaN or infinity.
        ConvergenceError: If the tolerance is not met and ``on_failure="raise"``.

    Cost: one product per step and ``4 m n`` operations at step ``m``; memory ``m n`` numbers after ``m`` steps.

    References:
        Lanczos (1950), doi:10.6028/jres.045.026; Paige (1971); Parlett, The Symmetric Eigenvalue Problem (1998),
        ch. 13.

    Example:
        >>> from sharpness.linalg import DenseOperator, lanczos
        >>> lanczos(DenseOperator([[2.0, 1.0], [1.0, 2.0]])).eigenvalues.round(decimals=4)
        tensor([3.], dtype=torch.float64)
    """
    n = operator.n
    k = check_count("k", k, high=n, of="the dimension of the operator")
    check_choice("which", which, WHICH)
    tol = check_positive("tol", tol)
    check_flag("vectors", vectors)
    check_on_failure(on_failure)
    wanted = count(which, k, n)
    budget = min(n, 20 * wanted + 200) if num_matvecs is None else check_count("num_matvecs", num_matvecs)
    if budget < wanted:
        raise ArgumentError(
            f"`num_matvecs` must be at least {wanted} to find {wanted} eigenvalues, got {budget}. "
            f"Pass num_matvecs={wanted} or more; {20 * wanted} is often enough."
        )
    budget = min(budget, n)
    spare, everything = _SPARE, True
    started = time.perf_counter()
    space = KrylovSpace(operator, torch.Generator().manual_seed(check_seed(seed)))
    with progress_bar(check_progress(progress), total=None, title="Lanczos") as bar:
        for step in range(1, budget + 1):
            space.extend()
            bar.update()
            if step < wanted:
                continue
            theta, s, residuals = space.ritz()
            residuals = residuals + space.rounding
            good = accurate(theta, residuals, tol=tol, floor=space.floor)
            chosen = select(theta, which, k)
            bar.set_postfix_str(f"worst residual {np.max(residuals[chosen]):.1e}", refresh=False)
            if hopeless(theta, residuals, space.rounding, tol, chosen):
                break
            everything = complete(space, theta, s, residuals, good, which, k)
            if good[chosen].all() and everything:
                # Where few dimensions are left, look a little further: the space may be about to be exhausted, and
                # that shows multiplicities. On a network this never holds, and not a product is spent past convergence.
                if spare == 0 or space.size == n or len(space.starts) > 1 or n > 4 * step:
                    break
                spare -= 1
    return answer(
        operator=operator,
        theta=theta,
        residuals=residuals,
        wanted=chosen,
        floor=space.floor,
        allowed=space.rounding,
        tol=tol,
        num_matvecs=space.size,
        rows=space.vectors(s[:, chosen]),
        vectors=vectors,
        settings={"method": "lanczos", "which": which, "k": k, "tol": tol, "seed": seed, "num_matvecs": num_matvecs},
        started=started,
        on_failure=on_failure,
        hint="Raise num_matvecs, loosen tol, or ask for fewer eigenvalues.",
        unfinished="" if everything else "the products ended before all of the spectrum's end was searched",
    )


def hopeless(theta: Floats, residuals: Floats, rounding: float, tol: float, chosen: Indices) -> bool:
    """Return whether all wanted pairs have converged but for rounding, which no further product makes smaller."""
    limit = tol * np.abs(theta[chosen])
    return bool(np.all(residuals[chosen] - rounding <= 0.1 * limit) and np.any(rounding > limit))


def complete(space: KrylovSpace, theta: Floats, s: Floats, residuals: Floats, good: Bools, which: str, k: int) -> bool:
    """Return whether no wanted eigenvalue can hide in the complement of an exhausted space.

    A block started at random meets every distinct eigenvalue of the complement it started in, so the complement that
    remains after it has none beyond the block's own extremes. The wanted values are complete once they reach those.
    Before the first exhaustion nothing is known about the complement, and nothing is claimed.
    """
    if space.size == space.operator.n:
        return True
    if len(space.starts) == 1 and not space.exhausted:
        return which != "magnitude" or _ends_agree(theta, residuals, good, k)
    share = np.linalg.norm(s[space.starts[-1] :], axis=0)  # of each pair in the latest block
    latest = np.flatnonzero(share >= min(0.5, share.max()))
    low, high = latest[0], latest[-1]
    chosen = np.sort(theta[select(theta, which, k)])
    slack = 2 * space.rounding
    if which == "magnitude":
        return bool(good[low] and good[high] and max(-theta[low], theta[high]) <= np.abs(chosen).min() + slack)
    top = bool(good[high] and theta[high] <= chosen[-k] + slack)
    bottom = bool(good[low] and theta[low] >= chosen[k - 1] - slack)
    return {"largest": top, "smallest": bottom, "both": top and bottom}[which]


def _ends_agree(theta: Floats, residuals: Floats, good: Bools, k: int) -> bool:
    """Return whether neither end can still grow beyond the ``k`` largest in magnitude.

    A Ritz value that has not converged may be on its way to an eigenvalue of larger magnitude than those that have.
    """
    chosen = select(theta, "magnitude", k)
    rest = np.setdiff1d(np.arange(len(theta)), chosen)
    if not len(rest):
        return True
    last = theta[chosen[-1]]
    rival = rest[0] if last > 0 else rest[-1]  # the first one left at the other end
    return bool(good[rival] or abs(theta[rival]) + residuals[rival] <= abs(last))
