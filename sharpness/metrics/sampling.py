"""How far the eigenvalue of a subset of the data can be from that of all data."""

from __future__ import annotations

import math

from scipy.stats import t as student_t
from torch import Tensor

from sharpness.errors import ArgumentError, DataError
from sharpness.objective import Objective
from sharpness.objective.curvature import Curvature
from sharpness.results import EigenResult, SampleInterval

_CONFIDENCE = 0.975  # of each end


def check_sampling(objective: Objective, which: str) -> None:
    """Refuse what has no bracket, before any data is touched.

    Raises:
        ArgumentError: If no subset is measured, or not one end of the spectrum.
    """
    if which not in ("largest", "smallest"):
        raise ArgumentError(
            f'`sample_interval` brackets one end of the spectrum, got which={which!r}. Pass "largest" or "smallest".'
        )
    if objective.max_batches is None or objective.max_batches < 2:
        raise ArgumentError(
            f"`sample_interval` needs a subset of at least 2 batches, got max_batches={objective.max_batches}. Pass "
            "max_batches=10, say, of a loader that shuffles and has at least twice as many."
        )


def sample_interval(objective: Objective, curvature: Curvature, which: str, result: EigenResult) -> SampleInterval:
    r"""Bracket the eigenvalue over all data, given that over the objective's subset ``A`` and its eigenvector.

    With :math:`v_A` the top eigenvector of :math:`H_A`, and ``B`` as many other batches,

    .. math:: \mathbb{E}[v_A^\top H_B v_A] \le \lambda_1(H) \le \mathbb{E}[\lambda_1(H_A)]:

    the first since no Rayleigh quotient exceeds the eigenvalue and ``B`` had no part in choosing :math:`v_A`, the
    second since :math:`\lambda_1` is convex (Jensen).

    Args:
        objective: Measures ``A``, the first ``max_batches`` batches of the loader.
        curvature: Which matrix.
        which: Which end, ``"largest"`` or ``"smallest"``.
        result: Eigenvalue, its interval and its eigenvector over ``A``.

    Raises:
        DataError: If the loader holds fewer than two batches beyond ``A``.

    Cost: one pass over ``A``, one over ``B``.
    """
    if result.eigenvectors is None:
        raise ArgumentError("a result with eigenvectors is needed. Pass vectors=True.")
    vector, (lowest, highest) = result.eigenvectors[0], result.interval[0].tolist()
    inside, weights = objective.quadratic_forms(vector, curvature=curvature)
    other = objective.held_out()
    try:
        outside, other_weights = other.quadratic_forms(vector, curvature=curvature)
    except DataError as error:
        raise DataError(
            f"`sample_interval` needs batches beyond the first {objective.max_batches}, and the loader has none "
            f"({error}). Pass a smaller max_batches."
        ) from error
    objective.passes.count += other.passes.count
    if len(outside) < 2:
        raise DataError(
            f"`sample_interval` needs at least 2 batches beyond the first {objective.max_batches}, the loader has one. "
            "Pass a smaller max_batches."
        )
    inner = _mean(outside, other_weights)
    inner_error, outer_error = _standard_error(outside, other_weights), _standard_error(inside, weights)
    inwards, outwards = inner_error * _quantile(len(outside)), outer_error * _quantile(len(inside))
    if which == "largest":
        low, high = inner - inwards, highest + outwards
    else:
        low, high = lowest - outwards, inner + inwards
    return SampleInterval(
        low=low,
        high=high,
        outer=result.headline,
        outer_stderr=outer_error,
        inner=inner,
        inner_stderr=inner_error,
        confidence=_CONFIDENCE,
        num_batches=objective.batches.loaded or 0,
        num_held_out=other.batches.loaded or 0,
    )


def _quantile(count: int) -> float:
    """Return how many standard errors of a mean over so many batches one end allows for (Student)."""
    return float(student_t.ppf(_CONFIDENCE, count - 1))


def _mean(values: Tensor, weights: Tensor) -> float:
    return float((values * weights).sum() / weights.sum())


def _standard_error(values: Tensor, weights: Tensor) -> float:
    """Return the standard error of the weighted mean of independent batches."""
    share = weights / weights.sum()
    count = len(values)
    spread = (share.square() * (values - _mean(values, weights)).square()).sum().item()
    return math.sqrt(count / (count - 1) * spread)
