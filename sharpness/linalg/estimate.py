"""The one way in which every estimate of a trace reports: a `TraceResult`, and a word when it missed the tolerance."""

from __future__ import annotations

import math
import time
from typing import Any

import torch
from torch import Tensor

from sharpness._warn import warn
from sharpness.errors import ConvergenceError, ConvergenceWarning
from sharpness.linalg.budget import limiting
from sharpness.linalg.confidence import half_width
from sharpness.linalg.operator import LinearOperator
from sharpness.results import TraceResult


def accurate(value: float, half: float, frobenius: float, tol: float) -> bool:
    """Return whether an interval is as narrow as asked for.

    The trace of a semi-definite matrix is never less than its Frobenius norm; where a trace is, by cancellation, the
    tolerance is relative to that norm.
    """
    return half <= tol * max(abs(value), frobenius)


def estimate(
    operator: LinearOperator,
    samples: Tensor,
    variance: float,
    *,
    freedom: float,
    rounding: float,
    frobenius: float,
    tol: float,
    num_matvecs: int,
    settings: dict[str, Any],
    started: float,
    on_failure: str,
    stopped: bool = False,
) -> TraceResult:
    """Build the result from samples and the variance of their mean; warn or raise if the interval is too wide.

    A run that looks at its own interval stops the sooner the smaller this happens to be. What holds at 95 % is then the
    tolerance that it stopped at (Chow & Robbins 1965) rather than the interval, and a little more than 95 % where the
    last samples made it much narrower. The interval of such a run is half way between the two.

    Args:
        operator: The operator.
        samples: ``(m,)`` with the estimate as their mean.
        variance: Of the mean.
        freedom: Degrees of freedom of that variance.
        rounding: Allowance for rounding.
        frobenius: An estimate of the Frobenius norm.
        tol: Relative tolerance.
        num_matvecs: Products spent.
        settings: What the call resolved to.
        started: When.
        on_failure: What to do when the interval is too wide.
        stopped: Whether the run has stopped by itself, and not at its first look.
    """
    value = samples.mean().item()
    half = half_width(variance, freedom, rounding) if variance else rounding
    converged = accurate(value, half, frobenius, tol)
    if stopped and converged:
        half = (half + tol * max(abs(value), frobenius)) / 2
    result = TraceResult(
        value=value,
        stderr=math.sqrt(variance),
        interval=(value - half, value + half),
        samples=samples,
        converged=converged,
        num_matvecs=num_matvecs,
        num_passes=0,
        seconds=time.perf_counter() - started,
        settings={
            **settings,
            "tol": tol,
            "frobenius_norm": frobenius,
            "rounding": rounding,
            "n": operator.n,
            "dtype": str(operator.dtype),
            "device": str(operator.device),
        },
    )
    if not converged and on_failure != "ignore":
        scale = max(abs(value), frobenius)
        of = "of the Frobenius norm, since the trace is smaller than that" if frobenius > abs(value) else "of the trace"
        limit = limiting(settings["num_matvecs"], num_matvecs)
        message = (
            f"{settings['method']} spent {num_matvecs} products on a trace of {value:.4g} ± {half:.2g} at 95 %, "
            f"{100 * half / scale:.2g} % {of}; tol asks for {100 * tol:.2g} %. Raise {limit}, or loosen tol."
        )
        if on_failure == "raise":
            raise ConvergenceError(message, result)
        warn(message, ConvergenceWarning)
    return result


def exact(operator: LinearOperator, diagonal: Tensor, frobenius: float, **rest: Any) -> TraceResult:
    """Report a trace that was summed up entry by entry."""
    rounding = 16 * torch.finfo(operator.dtype).eps * diagonal.abs().sum().item()
    samples = diagonal.sum().reshape(1)
    return estimate(operator, samples, 0.0, freedom=1.0, rounding=rounding, frobenius=frobenius, **rest)
