"""The one way in which every eigenvalue method reports: an `EigenResult`, and a word when it did not converge."""

from __future__ import annotations

import time
from typing import Any, Literal, TypeAlias

import numpy as np
import torch
from torch import Tensor

from sharpness._checks import check_choice
from sharpness._warn import warn
from sharpness.errors import ConvergenceError, ConvergenceWarning
from sharpness.linalg.bounds import accurate, kato_temple, residual_interval
from sharpness.linalg.steps import Domain
from sharpness.results import EigenResult
from sharpness.results.eigen import as_float64

_UNMEASURED = 8.0  # times the usual rounding, where it could not be measured
_SAFETY = 4.0  # the rounding error is measured on some of the samples

OnFailure: TypeAlias = Literal["warn", "raise", "ignore"]


def check_on_failure(value: Any) -> str:
    """Return ``value`` if it is a known reaction."""
    return check_choice("on_failure", value, ("warn", "raise", "ignore"))


def answer(
    *,
    operator: Domain,
    theta: np.ndarray[Any, Any],  # (m,) ascending, all that is known of the spectrum
    residuals: np.ndarray[Any, Any],  # (m,) rounding included
    rows: Tensor,  # (k, n) the unit vectors found, in the order to report
    wanted: np.ndarray[Any, Any],  # (k,) positions in the order to report
    floor: float,  # rounding that no product can avoid
    allowed: float,  # what the residuals already allow for
    tol: float,
    num_matvecs: int,
    vectors: bool,  # whether the user wants the rows
    settings: dict[str, Any],
    started: float,
    on_failure: str,
    hint: str,
    unfinished: str = "",  # what else is missing, in words
    confirmation: dict[str, Any] | None = None,
    gaps: bool = True,  # whether theta also holds the neighbours of the wanted
) -> EigenResult:
    """Build the result; warn or raise if it is not converged."""
    delivered = np.isfinite(theta[wanted])
    error = operator.product_error(rows if delivered.all() else rows[torch.as_tensor(delivered, device=rows.device)])
    measured = _UNMEASURED * floor if error is None else _SAFETY * error
    # Convergence is a matter of the operator as it is computed; the intervals also allow for what rounding does to it.
    good = accurate(theta, residuals, tol=tol, floor=floor)
    bounds = residuals + max(measured - allowed, 0.0)
    rounding = max(floor, measured)
    converged = bool(good[wanted].all()) and not unfinished
    bracket = residual_interval(theta[wanted], bounds[wanted])
    bracket[~delivered] = -np.inf, np.inf
    tight = kato_temple(theta, bounds, wanted, rounding) if gaps else np.full((len(wanted), 2), np.nan)
    result = EigenResult(
        eigenvalues=as_float64(theta[wanted]),
        residuals=as_float64(residuals[wanted]),
        interval=as_float64(bracket),
        kato_temple=as_float64(tight),
        converged=converged,
        num_matvecs=num_matvecs,
        num_passes=0,
        seconds=time.perf_counter() - started,
        eigenvectors=rows if vectors else None,
        confirmation=confirmation,
        settings={
            **settings,
            "n": operator.n,
            "dtype": str(operator.dtype),
            "device": str(operator.device),
            "rounding": rounding,
        },
    )
    if not converged and on_failure != "ignore":
        missed = wanted[~good[wanted] & delivered]
        reason = unfinished
        if len(missed):
            worst = np.max(residuals[missed] / np.maximum(np.abs(theta[missed]), np.finfo(float).tiny))
            worst_of = (
                f"{len(missed)} of {len(wanted)} eigenvalues missed the tolerance: "
                f"worst relative residual {worst:.1e}, asked for {tol:.1e}"
            )
            reason = worst_of if delivered.all() else f"{unfinished}, and {worst_of}"
        message = f"{settings['method']} spent {num_matvecs} products, and {reason}. {hint}"
        if on_failure == "raise":
            raise ConvergenceError(message, result)
        warn(message, ConvergenceWarning)
    return result
