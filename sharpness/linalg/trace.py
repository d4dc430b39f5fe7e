"""Traces from products with random vectors, each with a calibrated interval."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from sharpness._checks import check_choice, check_positive, check_seed
from sharpness._progress import check_progress, progress_bar
from sharpness.linalg.answer import OnFailure, check_on_failure
from sharpness.linalg.budget import LIMIT, budget_of, entries, is_small, most_vectors, sizes
from sharpness.linalg.confidence import freedom_of, half_width
from sharpness.linalg.estimate import accurate, estimate, exact
from sharpness.linalg.gram import multiply, row_dots
from sharpness.linalg.leave_one_out import leave_one_out
from sharpness.linalg.moments import RunningMoments
from sharpness.linalg.operator import LinearOperator, check_operator
from sharpness.linalg.probes import DISTRIBUTIONS, ProbeDistribution, Probes
from sharpness.linalg.sketch import Sketch
from sharpness.results import TraceResult

_FIRST_VECTORS, _FIRST_PRODUCTS = 8, 24  # before the first look at the tolerance, of XTrace and Hutch++
_BLOCK = 16
_MARGIN = 0.8  # by how much fewer products another way must need to be taken
_INSTEAD = ', or method="hutchinson", which keeps none'


def hutchinson(
    operator: LinearOperator,
    *,
    distribution: ProbeDistribution = "rademacher",
    tol: float = 0.02,
    num_matvecs: int | None = None,
    seed: int = 0,
    progress: bool | None = None,
    on_failure: OnFailure = "warn",
) -> TraceResult:
    r"""Estimate the trace by the mean of quadratic forms of random vectors.

    .. math:: \mathrm{tr} A \approx \frac{1}{m} \sum_i \omega_i^\top A \, \omega_i

    The variance of a form is :math:`2 (\|A\|_F^2 - \sum_i a_{ii}^2)` for signs, :math:`2 \|A\|_F^2` for normal entries
    and :math:`\frac{2 n}{n + 2} (\|A\|_F^2 - \mathrm{tr}(A)^2 / n)` on the sphere. The standard error is taken from
    this, with the norm and the squares estimated from the same products, rather than from the spread of the forms: few
    of them tell little about their spread where one eigenvalue dominates, and the interval would hold too seldom. It
    holds in 92 to 98 % of the runs, but in up to 99.5 % with 3 or 4 vectors on a few large eigenvalues of both signs.

    Use it where the eigenvalues are about equal, or no block of vectors fits into memory; :func:`xtrace` needs far
    fewer products where some eigenvalues stand out.

    Args:
        operator: Symmetric operator of size ``n``.
        distribution: ``"rademacher"``, ``"gaussian"`` or ``"sphere"``.
        tol: Half the 95 % interval, relative to the trace, or to the Frobenius norm where the trace is less than that.
        num_matvecs: Products to spend, exactly, at least 3. ``None`` stops once ``tol`` holds, after 1000 at most.
        seed: Seed of the random vectors.
        progress: Show a progress bar; ``None`` shows one on a terminal after two seconds.
        on_failure: ``"warn"``, ``"raise"`` or ``"ignore"`` when ``tol`` does not hold in the end.

    Returns:
        The mean, its standard error and interval (Student's t), and the single forms.

    Raises:
        ArgumentError: If an option cannot be accepted.
        NonFiniteError: If a product holds NaN or infinity.
        ConvergenceError: If the tolerance is not met and ``on_failure="raise"``.

    Cost: one product per vector, 16 of them at a time; 32 vectors.

    References:
        Hutchinson (1990), doi:10.1080/03610919008812866.

    Example:
        >>> from sharpness.linalg import DenseOperator, hutchinson
        >>> hutchinson(DenseOperator([[2.0, 0.0], [0.0, 1.0]])).value  # signs are exact for a diagonal matrix
        3.0
    """
    check_operator(operator)
    check_choice("distribution", distribution, DISTRIBUTIONS)
    settings = _settings("hutchinson", tol, num_matvecs, seed, progress, on_failure)
    budget = budget_of(num_matvecs, 3, "hutchinson", "three random vectors")
    started = time.perf_counter()
    probes = Probes(operator, seed, distribution)
    forms, lengths = torch.zeros(0, dtype=torch.float64), torch.zeros(0, dtype=torch.float64)
    single = RunningMoments(operator)  # of w * (A w)
    with progress_bar(progress, total=num_matvecs, title="Hutchinson") as bar:
        for size in sizes(budget, _BLOCK, adaptive=num_matvecs is None):
            while len(forms) < size:
                rows = probes.rows(len(forms), min(len(forms) + _BLOCK, size))
                products = multiply(operator, rows, bar.update)
                forms = torch.cat([forms, row_dots(rows, products)])
                lengths = torch.cat([lengths, row_dots(products, products)])
                single.add(rows.mul_(products), slice(0, operator.n))
                single.close()
            freedom = freedom_of(lengths)
            variance = {
                "rademacher": 2 * single.variance.sum().item(),
                "gaussian": 2 * lengths.mean().item() / size,
                "sphere": _sphere(forms, lengths, operator.n),
            }[distribution]
            rounding = 16 * torch.finfo(operator.dtype).eps * forms.abs().max().item()
            frobenius = math.sqrt(lengths.mean().item())
            if num_matvecs is None and accurate(
                forms.mean().item(), half_width(variance, freedom, rounding), frobenius, tol
            ):
                break
    return estimate(
        operator,
        forms,
        variance,
        freedom=freedom,
        rounding=rounding,
        frobenius=frobenius,
        tol=tol,
        num_matvecs=len(forms),
        settings={**settings, "distribution": distribution},
        started=started,
        on_failure=on_failure,
        stopped=num_matvecs is None and size > _BLOCK,
    )


def hutchpp(
    operator: LinearOperator,
    *,
    tol: float = 0.02,
    num_matvecs: int | None = None,
    memory: int | None = None,
    seed: int = 0,
    progress: bool | None = None,
    on_failure: OnFailure = "warn",
) -> TraceResult:
    r"""Estimate the trace by Hutch++: exactly on a basis of the range, by random vectors in the rest.

    .. math:: \mathrm{tr} A \approx \mathrm{tr}(Q^\top A Q)
        + \frac{1}{g} \sum_i \omega_i^\top (I - Q Q^\top) A (I - Q Q^\top) \omega_i

    A third of the products finds ``Q``, a third multiplies it, a third goes into the rest, whose vectors are
    independent of each other and of ``Q`` and uniform on the sphere in the complement; their standard error is that of
    :func:`hutchinson` there.

    Args:
        operator: Symmetric operator of size ``n``.
        tol: As for :func:`hutchinson`.
        num_matvecs: Products to spend, exactly, at least 9; ``n`` or more are spent on the ``n`` entries of the
            diagonal, which is exact. ``None`` stops once ``tol`` holds, after 1000 at most.
        memory: Bytes that the basis may take; ``None`` or 0 sets no limit.
        seed: As for :func:`hutchinson`, and likewise what follows.
        progress: See :func:`hutchinson`.
        on_failure: See :func:`hutchinson`.

    Returns:
        The estimate, its standard error and interval (Student's t), and one estimate per vector of the last third.

    Raises:
        ArgumentError: If an option cannot be accepted.
        NonFiniteError: If a product holds NaN or infinity.
        ConvergenceError: If the tolerance is not met and ``on_failure="raise"``.

    Cost: one product per ``num_matvecs``; memory for as many vectors, and 80 more.

    References:
        Meyer, Musco, Musco & Woodruff (2021), arXiv 2010.09649.

    Example:
        >>> from sharpness.linalg import DenseOperator, hutchpp
        >>> round(hutchpp(DenseOperator([[2.0, 1.0], [1.0, 1.0]])).value, 4)
        3.0
    """
    n = check_operator(operator)
    settings = _settings("hutchpp", tol, num_matvecs, seed, progress, on_failure)
    budget = budget_of(num_matvecs, min(9, n), "hutchpp", "three each for the basis, its products, and the rest")
    wanted = None if num_matvecs is None or budget >= n else budget // 3
    most = most_vectors(operator, memory, wanted, each=3, instead=_INSTEAD)
    started = time.perf_counter()
    with progress_bar(progress, total=num_matvecs and min(num_matvecs, n), title="Hutch++") as bar:
        if is_small(n, num_matvecs):
            return _entry_by_entry(operator, tol, settings, started, on_failure, bar.update)
        sketch = Sketch(operator, Probes(operator, seed, "sphere"), keep_products=True, spent=bar.update)
        limit = min(budget, 3 * most + 2) if memory else budget
        for size in sizes(limit, _FIRST_PRODUCTS, adaptive=num_matvecs is None):
            rows = min(size // 3, most)
            grown = rows - len(sketch.in_basis)
            if grown:
                sketch.multiply(grown, into_basis=True)
            more = size - sketch.num_matvecs  # where the operator is of low rank, the basis has taken fewer products
            sketch.multiply(more, into_basis=False)
            forms, lengths = sketch.outside()
            samples, freedom = sketch.h.trace() + forms, freedom_of(lengths)
            variance = _sphere(forms, lengths, n - sketch.rank) if n > sketch.rank else 0.0
            half = half_width(variance, freedom, sketch.rounding)
            if num_matvecs is None and accurate(samples.mean().item(), half, sketch.frobenius, tol):
                break
    stopped = num_matvecs is None and size > _FIRST_PRODUCTS
    return _estimate(operator, sketch, samples, variance, freedom, tol, settings, started, on_failure, stopped)


def xtrace(
    operator: LinearOperator,
    *,
    tol: float = 0.02,
    num_matvecs: int | None = None,
    memory: int | None = None,
    seed: int = 0,
    progress: bool | None = None,
    on_failure: OnFailure = "warn",
) -> TraceResult:
    r"""Estimate the trace by XTrace: every random vector serves the basis of all others, and is estimated beyond it.

    .. math:: \mathrm{tr} A \approx \frac{1}{m} \sum_i \Big[ \mathrm{tr}(P_i A)
        + c_i \, \omega_i^\top (I - P_i) A (I - P_i) \omega_i \Big]

    with :math:`P_i` the projector onto the range of the products with all vectors but ``i``, and :math:`c_i` scaling
    what is left of the vector to the length :math:`\sqrt{n - \mathrm{rank} P_i}`. Unbiased for any symmetric matrix
    and a fixed ``num_matvecs``; a run that stops by itself stops the sooner the less it has seen, and may miss some of
    the trace, within its interval. The best of the three where some eigenvalues stand out, definite or not.

    Where the spectrum levels off beyond the basis, or there is no room for a larger one, a run that looks for ``tol``
    goes on with vectors in the complement of the basis, as :func:`hutchpp` does, which cost one product each, or with
    the entries of the diagonal where these are fewer.

    The published standard error, that of ``m`` independent samples, is too small by up to a third, since the samples
    share their bases. This one adds their covariance, estimated without bias from the effect that each vector has on
    the estimate of each other (see ``sharpness/linalg/leave_one_out.py``), and leaves half or more of the negative
    contributions out. On flat, decaying, stepped, indefinite and cancelling spectra the intervals held in 92 to 98 % of
    the runs, mostly 95 to 97 %; in up to 99.5 % with three vectors, or about as many as eigenvalues that stand out.

    Args:
        operator: Symmetric operator of size ``n``.
        tol: As for :func:`hutchinson`.
        num_matvecs: Products to spend, two for each vector (an odd one is left over), at least 6; ``n`` or more are
            spent on the ``n`` entries of the diagonal, which is exact. ``None`` stops once ``tol`` holds, after 1000 at
            most. Fewer are spent where the operator is of low rank.
        memory: Bytes that the basis may take; ``None`` or 0 sets no limit.
        seed: As for :func:`hutchinson`, and likewise what follows.
        progress: See :func:`hutchinson`.
        on_failure: See :func:`hutchinson`.

    Returns:
        The estimate, its standard error and interval, and one estimate per vector, or per vector of the complement
        where the run went on there (``settings["beyond"]`` of them).

    Raises:
        ArgumentError: If an option cannot be accepted.
        NonFiniteError: If a product holds NaN or infinity.
        ConvergenceError: If the tolerance is not met and ``on_failure="raise"``.

    Cost: ``num_matvecs`` products and ``O(n num_matvecs^2)`` operations; memory for ``num_matvecs / 2`` vectors,
    and 80 more.

    References:
        Epperly, Tropp & Webber (2024), XTrace: making the most of every sample in stochastic trace estimation,
        arXiv 2301.07825.

    Example:
        >>> from sharpness.linalg import DenseOperator, xtrace
        >>> round(xtrace(DenseOperator([[2.0, 1.0], [1.0, 1.0]])).value, 4)
        3.0
    """
    n = check_operator(operator)
    settings = _settings("xtrace", tol, num_matvecs, seed, progress, on_failure)
    budget = budget_of(num_matvecs, min(6, n), "xtrace", "two for each of three random vectors")
    wanted = None if num_matvecs is None or budget >= n else budget // 2
    most = most_vectors(operator, memory, wanted, instead=_INSTEAD)
    started = time.perf_counter()
    with progress_bar(progress, total=num_matvecs and min(num_matvecs, n), title="XTrace") as bar:
        if is_small(n, num_matvecs):
            return _entry_by_entry(operator, tol, settings, started, on_failure, bar.update)
        sketch = Sketch(operator, Probes(operator, seed, "sphere"), spent=bar.update)
        for size in sizes(min(budget // 2, most), _FIRST_VECTORS, adaptive=num_matvecs is None):
            sketch.multiply(size - sketch.size, into_basis=True)
            samples, spread = leave_one_out(sketch.grams(), n, sphere=True)
            variance = spread.item()
            half = half_width(variance, size - 1, sketch.rounding)
            accepted = tol * max(abs(samples.mean().item()), sketch.frobenius)
            if num_matvecs is not None or half <= accepted:
                break
            excess, room = half / accepted, budget - sketch.num_matvecs
            if room >= _BLOCK and (size == most or _levels_off(sketch, variance, excess)):
                if n <= min(size * excess**2, room):  # there are fewer entries than vectors that it would take
                    spent = sketch.num_matvecs
                    return _entry_by_entry(operator, tol, settings, started, on_failure, bar.update, spent=spent)
                return _beyond(operator, sketch, tol, settings, started, on_failure)
    stopped = num_matvecs is None and size > _FIRST_VECTORS
    return _estimate(operator, sketch, samples, variance, size - 1, tol, settings, started, on_failure, stopped)


def _levels_off(sketch: Sketch, variance: float, excess: float) -> bool:
    """Return whether random vectors beyond the basis are likely to need fewer products than a larger basis.

    With ``F^2`` the squared Frobenius norm beyond a basis of ``m`` vectors, the variance of XTrace is ``2 F^2 / m``. If
    ``F^2`` falls as ``m^-p``, an error that is ``excess`` times too large takes ``m excess^(2 / (1 + p))`` vectors of
    two products each, or ``m excess^2`` single ones in the complement. What the later half of the basis has captured
    tells ``p``.
    """
    m = sketch.size
    values = torch.linalg.eigvalsh(sketch.h).square().sort(descending=True).values
    p = math.log2(1 + values[m // 2 :].sum().item() / max(variance * m / 2, torch.finfo(torch.float64).tiny))
    return bool(m * excess**2 < _MARGIN * 2 * m * (excess ** (2 / (1 + p)) - 1))


def _beyond(
    operator: LinearOperator, sketch: Sketch, tol: float, settings: dict[str, Any], started: float, on_failure: str
) -> TraceResult:
    """Estimate the rest of a trace by random vectors in the complement of the basis, until ``tol`` holds."""
    forms, lengths = torch.zeros(0, dtype=torch.float64), torch.zeros(0, dtype=torch.float64)
    free = operator.n - sketch.rank
    for size in sizes(LIMIT - sketch.num_matvecs, _BLOCK, adaptive=True):
        while len(forms) < size:
            more, far = sketch.beyond(min(_BLOCK, size - len(forms)))
            forms, lengths = torch.cat([forms, more]), torch.cat([lengths, far])
        samples, freedom = sketch.h.trace() + forms, freedom_of(lengths)
        variance = _sphere(forms, lengths, free)
        half = half_width(variance, freedom, sketch.rounding)
        if accurate(samples.mean().item(), half, sketch.frobenius, tol):
            break
    settings = {**settings, "beyond": size}
    return _estimate(operator, sketch, samples, variance, freedom, tol, settings, started, on_failure, size > _BLOCK)


def _sphere(forms: Tensor, lengths: Tensor, n: int) -> float:
    """Return the variance of the mean of quadratic forms of vectors on the sphere of radius ``sqrt(n)``."""
    one = 2 * n / (n + 2) * (lengths.mean() - forms.mean() ** 2 / n)
    return max(one.item(), 0.0) / len(forms)


def _estimate(
    operator: LinearOperator,
    sketch: Sketch,
    samples: Tensor,
    variance: float,
    freedom: float,
    tol: float,
    settings: dict[str, Any],
    started: float,
    on_failure: str,
    stopped: bool,
) -> TraceResult:
    return estimate(
        operator,
        samples,
        variance,
        freedom=freedom,
        rounding=sketch.rounding,
        frobenius=sketch.frobenius,
        tol=tol,
        num_matvecs=sketch.num_matvecs,
        settings={**settings, "rank": sketch.rank},
        started=started,
        on_failure=on_failure,
        stopped=stopped,
    )


def _entry_by_entry(
    operator: LinearOperator,
    tol: float,
    settings: dict[str, Any],
    started: float,
    on_failure: str,
    report: Callable[[int], object],
    *,
    spent: int = 0,
) -> TraceResult:
    diagonal, lengths = entries(operator, report)
    return exact(
        operator,
        diagonal,
        math.sqrt(lengths.sum().item()),
        tol=tol,
        num_matvecs=spent + operator.n,
        settings={**settings, "exact": True},
        started=started,
        on_failure=on_failure,
    )


def _settings(
    method: str, tol: Any, num_matvecs: int | None, seed: Any, progress: Any, on_failure: Any
) -> dict[str, Any]:
    check_positive("tol", tol)
    check_progress(progress)
    check_on_failure(on_failure)
    return {"method": method, "seed": check_seed(seed), "num_matvecs": num_matvecs}
