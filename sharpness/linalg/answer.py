"""The one way in which every eigenvalue method reports: an `EigenResult`, and a word when it did not converge."""

from __future__ import annotations

import time
import warnings
from typing import Any, Literal, TypeAlias

import numpy as np
from torch import Tensor

from sharpness._checks import check_choice
from sharpness.errors import ConvergenceError, ConvergenceWarning
from sharpness.linalg.bounds import kato_temple, residual_interval
from sharpness.linalg.operator import LinearOperator
from sharpness.results import EigenResult, as_float64

OnFailure: TypeAlias = Literal["warn", "raise", "ignore"]


def check_on_failure(value: Any) -> str:
    """Return ``value`` if it is a known reaction."""
    return check_choice("on_failure", value, ("warn", "raise", "ignore"))


def answer(
    *,
    operator: LinearOperator,
    theta: np.ndarray[Any, Any],  # (m,) ascending, all that is known of the spectrum
    residuals: np.ndarray[Any, Any],  # (m,) rounding included
    wanted: np.ndarray[Any, Any],  # (k,) positions in the order to report
    rounding: float,
    converged: bool,
    tol: float,
    num_matvecs: int,
    eigenvectors: Tensor | None,
    settings: dict[str, Any],
    started: float,
    on_failure: str,
    hint: str = "Raise num_matvecs, loosen tol, or ask for fewer eigenvalues.",
) -> EigenResult:
    """Build the result; warn or raise if it is not converged."""
    result = EigenResult(
        eigenvalues=as_float64(theta[wanted]),
        residuals=as_float64(residuals[wanted]),
        interval=as_float64(residual_interval(theta[wanted], residuals[wanted])),
        kato_temple=as_float64(kato_temple(theta, residuals, wanted, rounding)),
        converged=converged,
        num_matvecs=num_matvecs,
        num_passes=0,
        seconds=time.perf_counter() - started,
        eigenvectors=eigenvectors,
        settings={**settings, "n": operator.n, "dtype": str(operator.dtype), "device": str(operator.device)},
    )
    if not converged and on_failure != "ignore":
        relative = residuals[wanted] / np.maximum(np.abs(theta[wanted]), np.finfo(float).tiny)
        missed = int(np.sum(relative > tol))
        message = (
            f"{settings['method']} spent {num_matvecs} products and {missed} of {len(wanted)} eigenvalues missed the "
            f"tolerance: worst relative residual {relative.max():.1e}, asked for {tol:.1e}. {hint}"
        )
        if on_failure == "raise":
            raise ConvergenceError(message, result)
        warnings.warn(message, ConvergenceWarning, stacklevel=4)
    return result
