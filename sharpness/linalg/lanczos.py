"""Eigenvalues at the ends of the spectrum by the Lanczos method, each with a certified residual."""

from __future__ import annotations

import math
import time
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from sharpness._checks import check_choice, check_count, check_flag, check_positive, check_seed
from sharpness._progress import check_progress, progress_bar
from sharpness._warn import warn
from sharpness.errors import ArgumentError, ConvergenceError, ConvergenceWarning
from sharpness.linalg.answer import OnFailure, answer, check_on_failure
from sharpness.linalg.confirm import confirm as confirmed
from sharpness.linalg.operator import LinearOperator, check_operator
from sharpness.linalg.products import norm
from sharpness.linalg.rayleigh_ritz import refined
from sharpness.linalg.search import Found, Goal, Report, Storage, search
from sharpness.linalg.steps import Domain, Steps, drive
from sharpness.linalg.which import WHICH, Which, count
from sharpness.results import EigenResult

_DRAWN = 0.1  # length of the random part of a warm start
_BASIS_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def lanczos(
    operator: LinearOperator,
    k: int = 1,
    *,
    which: Which = "largest",
    tol: float = 1e-3,
    num_matvecs: int | None = None,
    vectors: bool = False,
    confirm: bool = False,
    memory: int | None = None,
    basis_dtype: torch.dtype | None = None,
    basis_device: torch.device | str | None = None,
    start: Tensor | None = None,
    seed: int = 0,
    progress: bool | None = None,
    on_failure: OnFailure = "warn",
) -> EigenResult:
    r"""Compute ``k`` eigenvalues at the ends of the spectrum by Lanczos with full reorthogonalisation.

    Builds an orthonormal basis ``Q`` of the Krylov space of a random vector, one product per step, and takes the
    eigenvalues of the projected matrix :math:`T = Q A Q^\top`. The residual of each pair follows from the recurrence,
    without a product, so the run stops at the first step at which all wanted residuals are small enough.

    Use it for any symmetric operator, definite or not.

    *Certain*: each interval holds an eigenvalue. *Overwhelmingly likely*, but not certain: that the values found are
    the *first* ``k``. It sees an eigenvalue's multiplicity only where the Krylov space is exhausted (the run then goes
    on in its complement); elsewhere a repeated eigenvalue is found once. With ``confirm`` the complement of what was
    found is searched from a new random start, what was missed is added, and the result's ``confirmation`` says beyond
    which value no further eigenvalue lies, with a probability that holds for every operator.

    Args:
        operator: Symmetric operator of size ``n``.
        k: Number of wanted eigenvalues, ``1 <= k <= n``.
        which: ``"largest"`` (algebraic, descending), ``"smallest"`` (algebraic, ascending), ``"magnitude"``
            (descending in magnitude, with sign) or ``"both"`` (``k`` from each end, descending).
        tol: Relative tolerance: a pair is accepted when its residual is at most ``tol * abs(eigenvalue)``,
            or at the level of rounding.
        num_matvecs: Products that may be spent, on everything together; ``None`` allows ``20 k + 200``, no more than
            ``n`` where no other option needs more, and as many again to confirm.
        vectors: Also return the eigenvectors.
        confirm: Search the complement of what was found for eigenvalues that were missed.
        memory: Bytes that the basis may take; when it would take more, it is compressed to the wanted Ritz vectors and
            some spare (thick restart). ``None`` sets no limit. ``0`` asks for the least that works, a basis of
            ``max(2 k + 10, 20)`` rows (``k`` from both ends count twice). The vectors returned, the one that is
            multiplied and its product come on top, and while confirming the vectors found.
        basis_dtype: Dtype in which the basis is kept, no wider than the operator's, which is the default. With a
            narrower one the vectors found are corrected in the operator's dtype until fresh products confirm them.
        basis_device: Where the basis is kept; ``None`` keeps it with the operator.
        start: ``(n,)`` or ``(m, n)`` vectors near the wanted ones, such as the eigenvectors of an operator like this
            one. Their sum, with a tenth of its length in a random direction, takes the place of the random vector.
            That saves products where it is near, and makes it likelier that another eigenvector, of which it holds
            little, is overlooked; with ``confirm`` it is not.
        seed: Seed of the random starting vectors.
        progress: Show a progress bar; ``None`` shows one on a terminal after two seconds.
        on_failure: What to do when the tolerance is not met, or nothing could be confirmed: ``"warn"``, ``"raise"`` or
            ``"ignore"``.

    Returns:
        Eigenvalues, residuals and intervals.

    Raises:
        ArgumentError: If an option cannot be accepted.
        NonFiniteError: If a product holds NaN or infinity.
        ConvergenceError: If the tolerance is not met and ``on_failure="raise"``.

    Cost: one product per step and ``4 m n`` operations with a basis of ``m`` rows; memory ``m n`` numbers, with ``m``
    the number of steps or what ``memory`` allows. With ``memory=0``, runs on six spectra of 600 eigenvalues took 1.0 to
    1.1 times as many products as with all the memory for ``"largest"``, up to 1.7 times for ``"both"``. To confirm
    took half as many again where a few eigenvalues stand out, and up to as many again where they are close.

    References:
        Lanczos (1950), doi:10.6028/jres.045.026; Paige (1971); Parlett, The Symmetric Eigenvalue Problem (1998),
        ch. 13; Wu & Simon (2000), Thick-restart Lanczos; van Dorsselaer, Hochstenbach & van der Vorst (2000),
        Computing probabilistic bounds for extreme eigenvalues of symmetric matrices with the Lanczos method.

    Example:
        >>> from sharpness.linalg import DenseOperator, lanczos
        >>> lanczos(DenseOperator([[2.0, 1.0], [1.0, 2.0]])).eigenvalues.round(decimals=4)
        tensor([3.], dtype=torch.float64)
    """
    check_progress(progress)
    with progress_bar(progress, total=None, title="Lanczos") as bar:

        def report(residual: float) -> None:
            bar.set_postfix_str(f"worst residual {residual:.1e}", refresh=False)

        steps = lanczos_steps(
            operator,
            k,
            which=which,
            tol=tol,
            num_matvecs=num_matvecs,
            vectors=vectors,
            confirm=confirm,
            memory=memory,
            basis_dtype=basis_dtype,
            basis_device=basis_device,
            start=start,
            seed=seed,
            on_failure=on_failure,
            report=report,
        )
        return drive(steps, operator, bar.update)


def lanczos_steps(
    domain: Domain,
    k: int = 1,
    *,
    which: str = "largest",
    tol: float = 1e-3,
    num_matvecs: int | None = None,
    vectors: bool = False,
    confirm: bool = False,
    memory: int | None = None,
    basis_dtype: torch.dtype | None = None,
    basis_device: torch.device | str | None = None,
    start: Tensor | None = None,
    seed: int = 0,
    on_failure: str = "warn",
    report: Report = lambda residual: None,
) -> Steps[EigenResult]:
    """Return `lanczos` as a generator: it yields vectors, ``(n,)``, is sent their products, and returns the result.

    Args:
        domain: Size, dtype, device and rounding of the operator; it is never asked for a product.
        k: As in `lanczos`, and likewise what follows.
        which: See `lanczos`.
        tol: See `lanczos`.
        num_matvecs: See `lanczos`.
        vectors: See `lanczos`.
        confirm: See `lanczos`.
        memory: See `lanczos`.
        basis_dtype: See `lanczos`.
        basis_device: See `lanczos`.
        start: See `lanczos`.
        seed: See `lanczos`.
        on_failure: See `lanczos`.
        report: Called with the worst residual after each step.

    Raises:
        ArgumentError: If an option cannot be accepted, at once.
    """
    n = check_operator(domain)
    k = check_count("k", k, high=n, of="the dimension of the operator")
    check_choice("which", which, WHICH)
    goal = Goal(which=which, k=k, wanted=count(which, k, n), tol=check_positive("tol", tol))
    check_flag("vectors", vectors)
    check_flag("confirm", confirm)
    check_on_failure(on_failure)
    storage = check_storage(domain, goal.wanted, memory, basis_dtype, basis_device)
    near = None if start is None else _near(domain, start)
    rounds = storage.dtype is not None
    settings = {
        "method": "lanczos",
        "which": which,
        "k": k,
        "tol": goal.tol,
        "seed": check_seed(seed),
        "warm_start": start is not None,
        "num_matvecs": num_matvecs,
        "confirm": confirm,
        "basis_rows": storage.rows,
        "basis_dtype": str(storage.dtype or domain.dtype),
        "basis_device": str(storage.device or domain.device),
    }
    generous = 20 * goal.wanted + 200
    if num_matvecs is None:
        first = generous if storage.rows is not None or rounds else min(n, generous)
        total = first + (generous if confirm else 0)
    else:
        first = total = check_count("num_matvecs", num_matvecs)
        least = goal.wanted * (2 if rounds else 1)  # a product for each of the pairs, if only to know their residuals
        if total < least:
            raise ArgumentError(
                f"`num_matvecs` must be at least {least} to find {goal.wanted} eigenvalues, got {total}. "
                f"Pass num_matvecs={least} or more; {20 * goal.wanted} is often enough."
            )
    return _steps(domain, goal, storage, first, total, confirm, vectors, settings, on_failure, report, near)


def _near(domain: Domain, start: Any) -> Tensor:  # -> (n,)
    """Return the sum of the vectors to start near, of length one."""
    if not isinstance(start, Tensor) or start.ndim not in (1, 2) or start.shape[-1] != domain.n:
        given = f"shape {tuple(start.shape)}" if isinstance(start, Tensor) else type(start).__name__
        raise ArgumentError(
            f"`start` must be a tensor of shape ({domain.n},) or (m, {domain.n}), got {given}. "
            "Pass the eigenvectors of a result with vectors=True for the same parameters, or leave it out."
        )
    total = start.detach().to(dtype=domain.dtype, device=domain.device).reshape(-1, domain.n).sum(dim=0)
    length = norm(total)
    if not (math.isfinite(length) and length > 0):
        raise ArgumentError(
            f"`start` must have a finite sum other than zero, got one of length {length}. Leave it out."
        )
    return total / length


def least_rows(wanted: int) -> int:
    """Return how many vectors of a basis are the least that a restarted run converges well with."""
    return max(2 * wanted + 10, 20)


def check_storage(
    domain: Domain,
    wanted: int,
    memory: Any,
    basis_dtype: Any,
    basis_device: Any,
) -> Storage:
    """Return where a basis is kept, for ``wanted`` eigenvalues in all."""
    if basis_dtype is not None and basis_dtype not in _BASIS_DTYPES:
        raise ArgumentError(
            f"`basis_dtype` must be a floating dtype, got {basis_dtype!r}. "
            "Pass torch.float32, torch.float16 or torch.bfloat16, or leave it out."
        )
    if basis_dtype is not None and basis_dtype.itemsize > domain.dtype.itemsize:
        raise ArgumentError(
            f"`basis_dtype` must be no wider than the operator's {domain.dtype}, got {basis_dtype}. "
            "A wider basis would hold no more digits: leave it out."
        )
    try:
        device = None if basis_device is None else torch.empty(0, device=basis_device).device
    except (RuntimeError, TypeError, AssertionError) as error:
        raise ArgumentError(
            f'`basis_device` must be a device that is there, such as "cpu" or "cuda", got {basis_device!r}.'
        ) from error
    kept = None if basis_dtype == domain.dtype else basis_dtype
    if memory is None:
        return Storage(dtype=kept, device=device)
    least = least_rows(wanted)
    row = domain.n * (kept or domain.dtype).itemsize
    rows = check_count("memory", memory, low=0) // row or (0 if memory else least)
    if rows < min(least, domain.n):
        raise ArgumentError(
            f"`memory` must be at least {min(least, domain.n) * row} bytes, a basis of {min(least, domain.n)} vectors, "
            f"for {wanted} eigenvalues, got {memory}. Pass memory={min(least, domain.n) * row} or more, ask for fewer "
            "eigenvalues, keep the basis in a narrower basis_dtype, or pass memory=0 for the least that works."
        )
    return Storage(rows=rows if rows < domain.n else None, dtype=kept, device=device)


def _steps(
    domain: Domain,
    goal: Goal,
    storage: Storage,
    first: int,
    total: int,
    confirm: bool,
    vectors: bool,
    settings: dict[str, Any],
    on_failure: str,
    report: Report,
    near: Tensor | None,
) -> Steps[EigenResult]:
    """Search, correct, confirm, and report."""
    started = time.perf_counter()
    generator = torch.Generator().manual_seed(settings["seed"])
    start = None
    if near is not None:  # what is drawn keeps everything within reach
        drawn = torch.randn(domain.n, generator=generator, dtype=torch.float64).to(near)
        start = near + _DRAWN * drawn / norm(drawn)
    found = yield from _found(domain, goal, storage, generator, first, report, start)
    confirmation, asked = None, confirm and found.accurate(goal.tol)
    spent = found.spent
    if asked:
        found, confirmation = yield from confirmed(domain, goal, storage, generator, found, total - found.spent, report)
    result = answer(
        operator=domain,
        theta=found.theta,
        residuals=found.residuals,
        wanted=found.chosen,
        floor=found.floor,
        allowed=found.rounding,
        tol=goal.tol,
        num_matvecs=found.spent,
        rows=found.rows,
        vectors=vectors,
        settings=settings,
        started=started,
        on_failure=on_failure,
        hint="Raise num_matvecs, loosen tol, or ask for fewer eigenvalues.",
        unfinished=found.unfinished,
        confirmation=confirmation,
        gaps=found.gaps,
    )
    if asked and confirmation is None and result.converged and on_failure != "ignore":
        more = total + max(found.spent - spent, spent)
        message = (
            f"the eigenvalues have converged after {spent} products, but the {found.spent - spent} that were left did "
            f"not suffice to confirm that none was missed. About {more} are needed in all: pass num_matvecs={more}."
        )
        if on_failure == "raise":
            raise ConvergenceError(message, result)
        warn(message, ConvergenceWarning)
    return result


def _found(
    domain: Domain,
    goal: Goal,
    storage: Storage,
    generator: torch.Generator,
    budget: int,
    report: Report,
    start: Tensor | None,
) -> Steps[Found]:
    """Return what a search with at most ``budget`` products finds."""
    limit = domain.n if storage.rows is None else budget  # a whole basis leaves nothing to search
    if storage.dtype is None:
        return (yield from search(domain, goal, storage, generator, min(budget, limit), report, start))
    # The rounded basis shows the way; what is reported rests on fresh products of what was found.
    rough = yield from search(domain, goal, storage, generator, min(budget - goal.wanted, limit), report, start)
    left = budget - rough.spent
    found = yield from refined(domain, goal, storage, generator, rough.rows, left, rough.scale, report)
    return replace(found, spent=rough.spent + found.spent)
