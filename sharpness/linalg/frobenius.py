"""The Frobenius norm from products with random vectors."""

from __future__ import annotations

import math
import time
from typing import Any

import torch
from torch import Tensor

from sharpness._checks import check_positive, check_seed
from sharpness._progress import check_progress, progress_bar
from sharpness._warn import warn
from sharpness.errors import ConvergenceError, ConvergenceWarning
from sharpness.linalg.answer import OnFailure, check_on_failure
from sharpness.linalg.budget import budget_of, entries, is_small, limiting, most_vectors, sizes
from sharpness.linalg.confidence import half_width
from sharpness.linalg.leave_one_out import leave_one_out
from sharpness.linalg.operator import LinearOperator, check_operator
from sharpness.linalg.probes import Probes
from sharpness.linalg.sketch import Sketch
from sharpness.results import ScalarResult

_FIRST_VECTORS = 8  # before the first look at the tolerance
_NEGATIVE = 0.25  # half as much as for a trace: squares stand out more, and their products are skewed more


def frobenius_norm(
    operator: LinearOperator,
    *,
    tol: float = 0.02,
    num_matvecs: int | None = None,
    memory: int | None = None,
    seed: int = 0,
    progress: bool | None = None,
    on_failure: OnFailure = "warn",
) -> ScalarResult:
    r"""Estimate the Frobenius norm, the root of the sum of the squared eigenvalues, by XTrace of the squared operator.

    .. math:: \|A\|_F^2 = \mathrm{tr} A^2 \approx \frac{1}{m} \sum_i \Big[ \|A Q_i\|_F^2
        + c_i \|A (I - P_i) \omega_i\|^2 \Big]

    A product with the squared operator is the inner product of two with the operator, so it costs no more than
    :func:`xtrace`, and converges faster, since squares decay faster.

    Args:
        operator: Symmetric operator of size ``n``.
        tol: Half the 95 % interval, relative to the norm.
        num_matvecs: As for :func:`xtrace`, and likewise what follows.
        memory: Bytes that the basis and its products may take; ``None`` or 0 sets no limit.
        seed: See :func:`xtrace`.
        progress: See :func:`xtrace`.
        on_failure: See :func:`xtrace`.

    Returns:
        The norm, its standard error and interval; the samples are those of the squared norm.

    Raises:
        ArgumentError: If an option cannot be accepted.
        NonFiniteError: If a product holds NaN or infinity.
        ConvergenceError: If the tolerance is not met and ``on_failure="raise"``.

    Cost: ``num_matvecs`` products; memory for as many vectors.

    Example:
        >>> from sharpness.linalg import DenseOperator, frobenius_norm
        >>> round(frobenius_norm(DenseOperator([[3.0, 0.0], [0.0, 4.0]])).value, 4)
        5.0
    """
    n = check_operator(operator)
    tol = check_positive("tol", tol)
    check_progress(progress)
    check_on_failure(on_failure)
    settings = {"method": "xtrace", "seed": check_seed(seed), "num_matvecs": num_matvecs, "tol": tol}
    budget = budget_of(num_matvecs, min(6, n), "frobenius_norm", "two for each of three random vectors")
    most = most_vectors(operator, memory, None if num_matvecs is None or budget >= n else budget // 2, each=2)
    started = time.perf_counter()
    with progress_bar(progress, total=num_matvecs and min(num_matvecs, n), title="Frobenius norm") as bar:
        if is_small(n, num_matvecs):
            samples = entries(operator, bar.update)[1].sum().reshape(1)
            spent, variance, half = n, 0.0, 16 * torch.finfo(operator.dtype).eps * samples.item()
        else:
            sketch = Sketch(operator, Probes(operator, seed, "sphere"), keep_products=True, spent=bar.update)
            for size in sizes(min(budget // 2, most), _FIRST_VECTORS, adaptive=num_matvecs is None):
                sketch.multiply(size - sketch.size, into_basis=True)
                samples, spread = leave_one_out(sketch.square(), n, sphere=True, negative=_NEGATIVE)
                rounding = 16 * torch.finfo(operator.dtype).eps * sketch.lengths.max().item()
                variance, half = spread.item(), half_width(spread.item(), size - 1, rounding)
                if num_matvecs is None and _accurate(samples, half, tol):
                    break
            spent = sketch.num_matvecs
    stopped = num_matvecs is None and len(samples) > _FIRST_VECTORS
    return _result(operator, samples, variance, half, tol, spent, settings, started, on_failure, stopped)


def _ends(samples: Tensor, half: float) -> tuple[float, float, float]:
    """Return the norm and the ends of its interval."""
    squared = samples.mean().item()
    low, value, high = (math.sqrt(max(x, 0.0)) for x in (squared - half, squared, squared + half))
    return low, value, high


def _accurate(samples: Tensor, half: float, tol: float) -> bool:
    low, value, high = _ends(samples, half)
    return (high - low) / 2 <= tol * value


def _result(
    operator: LinearOperator,
    samples: Tensor,
    variance: float,
    half: float,
    tol: float,
    spent: int,
    settings: dict[str, Any],
    started: float,
    on_failure: str,
    stopped: bool,
) -> ScalarResult:
    low, value, high = _ends(samples, half)
    if stopped and _accurate(samples, half, tol):  # half way to what it has stopped at, as `estimate` says
        low, high = (low + (1 - tol) * value) / 2, (high + (1 + tol) * value) / 2
    result = ScalarResult(
        value=value,
        stderr=math.sqrt(variance) / (2 * value) if value else 0.0,
        interval=(low, high),
        samples=samples,
        converged=_accurate(samples, half, tol),
        num_evaluations=spent,
        num_passes=0,
        seconds=time.perf_counter() - started,
        settings={"metric": "frobenius_norm", **settings, "n": operator.n, "dtype": str(operator.dtype)},
    )
    if not result.converged and on_failure != "ignore":
        message = (
            f"frobenius_norm spent {spent} products on a norm of {value:.4g}, between {low:.4g} and {high:.4g} at "
            f"95 %; tol asks for {100 * tol:.2g} %. Raise {limiting(settings['num_matvecs'], spent)}, or loosen tol."
        )
        if on_failure == "raise":
            raise ConvergenceError(message, result)
        warn(message, ConvergenceWarning)
    return result
