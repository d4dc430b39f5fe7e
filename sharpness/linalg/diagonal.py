"""The diagonal from products with random vectors, with a standard error for each entry."""

from __future__ import annotations

import math
import time
from typing import Any

import torch

from sharpness._checks import check_seed
from sharpness._progress import check_progress, progress_bar
from sharpness.linalg.budget import budget_of, entries, most_vectors
from sharpness.linalg.gram import multiply
from sharpness.linalg.leave_one_out import leave_one_out
from sharpness.linalg.leave_one_out_diagonal import DiagonalEstimates
from sharpness.linalg.moments import RunningMoments
from sharpness.linalg.operator import LinearOperator, check_operator
from sharpness.linalg.probes import Probes
from sharpness.linalg.sketch import Sketch
from sharpness.results import DiagonalResult

_BLOCK = 16  # vectors at a time
_INSTEAD = ', or method="hutchinson", which keeps none'


def hutchinson_diagonal(
    operator: LinearOperator,
    *,
    num_matvecs: int = 64,
    seed: int = 0,
    progress: bool | None = None,
) -> DiagonalResult:
    r"""Estimate the diagonal by the mean of random signs times their products (Bekas, Kokiopoulou & Saad).

    .. math:: \mathrm{diag} A \approx \frac{1}{m} \sum_i \omega_i \circ A \, \omega_i

    The variance of entry ``k`` of one term is :math:`\sum_{j \ne k} a_{kj}^2`: a diagonal matrix takes one vector.
    Use it where no block of vectors fits into memory; else :func:`xdiag`, which is better where eigenvalues stand out.

    Args:
        operator: Symmetric operator of size ``n``.
        num_matvecs: Products to spend, exactly.
        seed: Seed of the random signs.
        progress: Show a progress bar; ``None`` shows one on a terminal after two seconds.

    Returns:
        The entries and their standard errors.

    Raises:
        ArgumentError: If an option cannot be accepted.
        NonFiniteError: If a product holds NaN or infinity.

    Cost: ``num_matvecs`` products, 16 at a time; 36 vectors.

    References:
        Bekas, Kokiopoulou & Saad (2007), doi:10.1016/j.apnum.2007.01.003.

    Example:
        >>> from sharpness.linalg import DenseOperator, hutchinson_diagonal
        >>> hutchinson_diagonal(DenseOperator([[2.0, 0.0], [0.0, 1.0]])).value
        tensor([2., 1.])
    """
    check_operator(operator)
    budget = budget_of(num_matvecs, 2, "hutchinson_diagonal", "two random vectors")
    settings = _settings("hutchinson", num_matvecs, seed, progress)
    started = time.perf_counter()
    probes, found = Probes(operator, seed, "rademacher"), RunningMoments(operator)
    with progress_bar(progress, total=budget, title="Hutchinson's diagonal") as bar:
        for low in range(0, budget, _BLOCK):
            rows = probes.rows(low, min(low + _BLOCK, budget))
            products = multiply(operator, rows, bar.update)
            found.add(rows.mul_(products), slice(0, operator.n))
            found.close()
    return result_of(operator, found, found.variance_of_sum(), budget, settings, started)


def xdiag(
    operator: LinearOperator,
    *,
    num_matvecs: int = 64,
    memory: int | None = None,
    seed: int = 0,
    progress: bool | None = None,
) -> DiagonalResult:
    r"""Estimate the diagonal by XDiag: every random vector serves the basis of all others, and is estimated beyond it.

    .. math:: \mathrm{diag} A \approx \frac{1}{m} \sum_i \Big[ \mathrm{diag}(P_i A + A P_i - P_i A P_i)
        + \omega_i \circ (I - P_i) A (I - P_i) \omega_i \Big]

    with :math:`P_i` as in :func:`xtrace` and random signs :math:`\omega_i`. Taking what the basis knows from both sides
    of a symmetric matrix, where the published form takes it from one, leaves less to the random vectors.

    Args:
        operator: Symmetric operator of size ``n``.
        num_matvecs: Products to spend, two for each vector (an odd one is left over), at least 6; ``n`` or more are
            spent on the ``n`` entries, which are then exact. Fewer are spent where the operator is of low rank.
        memory: Bytes that the basis and its products may take; ``None`` or 0 sets no limit.
        seed: As for :func:`hutchinson_diagonal`, and likewise what follows.
        progress: See :func:`hutchinson_diagonal`.

    Returns:
        The entries and their standard errors, which are up to a fifth too large, and more where there are about as
        many vectors as eigenvalues that stand out; Student's t of them held 92 to 98 % of the entries.

    Raises:
        ArgumentError: If an option cannot be accepted.
        NonFiniteError: If a product holds NaN or infinity.

    Cost: ``num_matvecs`` products and ``O(n num_matvecs^2)`` operations; memory for ``num_matvecs`` vectors.

    References:
        Epperly, Tropp & Webber (2024), arXiv 2301.07825, section 2.4.

    Example:
        >>> from sharpness.linalg import DenseOperator, xdiag
        >>> xdiag(DenseOperator([[2.0, 1.0], [1.0, 1.0]])).value
        tensor([2., 1.])
    """
    n = check_operator(operator)
    budget = budget_of(num_matvecs, min(6, n), "xdiag", "two for each of three random vectors")
    settings = _settings("xdiag", num_matvecs, seed, progress)
    if budget < n:
        most_vectors(operator, memory, budget // 2, each=2, instead=_INSTEAD)
    started = time.perf_counter()
    with progress_bar(progress, total=min(budget, n), title="XDiag") as bar:
        if budget >= n:
            diagonal, _ = entries(operator, bar.update)
            found = RunningMoments(operator)
            found.add(diagonal.unsqueeze(0).to(operator.device), slice(0, n))
            found.close()
            return result_of(operator, found, 0.0, n, {**settings, "exact": True}, started)
        sketch = Sketch(operator, Probes(operator, seed, "rademacher"), keep_products=True, spent=bar.update)
        sketch.multiply(budget // 2, into_basis=True)
    found, variance = diagonal_of(sketch)
    return result_of(operator, found, variance, sketch.num_matvecs, {**settings, "rank": sketch.rank}, started)


def diagonal_of(sketch: Sketch) -> tuple[RunningMoments, float]:
    """Return the estimates of the diagonal, and the variance of their sum.

    The samples share their bases, and their mean is worth less than that of independent ones. Their covariance is the
    mean of what two of them owe to each other (see ``leave_one_out_diagonal.py``). It is taken over all entries and
    over pairs of neighbours, since a single entry tells it too badly, and its share of the variance is taken to be the
    same for all entries.
    """
    grams, found = sketch.grams(), RunningMoments(sketch.operator)
    estimates = DiagonalEstimates(grams, found.mean)
    shared, pairs = 0.0, 0
    for low in range(0, sketch.size, _BLOCK):
        i = torch.arange(low, min(low + _BLOCK, sketch.size))
        j = i.roll(1)
        probes = sketch.probes.rows(low, low + len(i))
        for where in sketch.pieces():
            signs, q, images = (t.to(found.mean) for t in (probes[:, where], *sketch.columns(where)))
            found.add(estimates.over(i, signs, q, images), where)
            if len(i) > 1:  # a single vector has no neighbour
                owed = estimates.owed(i, j, signs, q, images) * estimates.owed(j, i, signs.roll(1, 0), q, images)
                shared += owed.sum().item()
        pairs += len(i) * (len(i) > 1)
        found.close()
    found.inflate(shared / pairs)  # there are two vectors or more in the first block
    return found, leave_one_out(grams, sketch.n, sphere=False)[1].item()


def result_of(
    operator: LinearOperator,
    found: RunningMoments,
    variance: float,
    num_matvecs: int,
    settings: dict[str, Any],
    started: float,
) -> DiagonalResult:
    """Return the record of entries with their variances, and of the variance of their sum."""
    value, spread = found.mean, found.variance
    return DiagonalResult(
        value=value.to(operator.dtype),
        stderr=spread.sqrt().to(operator.dtype),
        trace=value.sum().item(),
        trace_stderr=math.sqrt(variance),
        sum_of_squares=((value**2).sum() - spread.sum()).item(),
        num_samples=found.count,
        num_matvecs=num_matvecs,
        num_passes=0,
        seconds=time.perf_counter() - started,
        settings={**settings, "n": operator.n, "dtype": str(operator.dtype), "device": str(operator.device)},
    )


def _settings(method: str, num_matvecs: int, seed: Any, progress: Any) -> dict[str, Any]:
    check_progress(progress)
    return {"method": method, "seed": check_seed(seed), "num_matvecs": num_matvecs}
