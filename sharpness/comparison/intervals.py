r"""Intervals of ratios between models: 95 %, from several seeds, or from the doubt of single measurements.

Everything happens in logarithms. Sharpness varies by factors from seed to seed, so that its logarithm is nearer to a
normal distribution than itself; the interval of ``b / a`` is then exactly the inverse of that of ``a / b``, and it is
never unbounded, as Fieller's may be. A ratio of numbers that are not all of one sign has no logarithm, and no interval.

With the log-ratio :math:`l_i` of seed ``i``, the interval is that of the geometric mean of the ratios,

.. math:: \bar l \; \pm \; \sqrt{\left(t_{n-1} \, s_l / \sqrt n\right)^2 + \left(t_{m-1} \, s_d / \sqrt m\right)^2}

the first term over ``n`` seeds, Student's; the second over ``m`` random directions. Models of one shape and all seeds
see the *same* directions, so that neither the error of a model nor of a seed is independent of the others': with
:math:`x_{ij}` what direction ``j`` gave, :math:`d_j` is the mean over the seeds of
:math:`x_{ij} / \bar x_i - y_{ij} / \bar y_i`, the linear part of the log-ratio's error. Certified intervals are added
at the ends, by their mean over the seeds; those of estimates, at 95 %, are part of the second term.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray
from scipy.stats import norm, t

from sharpness.results.headline import interval_of, stderr_of

Interval: TypeAlias = tuple[float, float]
Values: TypeAlias = NDArray[np.float64]

_LEVEL = 0.975  # of each end
_NORMAL = float(norm.ppf(_LEVEL))  # standard errors to each side
_WIDEST = 700.0  # of a logarithm whose exponential is a finite number
_SAME = 1e-6  # relative difference of a value from the mean of its samples, as an effect of rounding


def ratio_interval(over: Sequence[Any], under: Sequence[Any], *, same_draws: bool = True) -> Interval | None:
    """Return the 95 % interval of the ratio of what two lists of records, one per seed, are about.

    Seeds are paired where there are equally many; this is right for independent seeds as well, only wider. Of one seed
    the interval is that of the measurements alone. ``None`` where nothing is known: signs differ, a record did not
    converge, the one record there is is only a bound, one side has several seeds and the other has one, or the interval
    would hold all numbers that there are.

    Args:
        over: Records of the row.
        under: Records of the row it is compared with.
        same_draws: Whether the random directions were the same for both.
    """
    a, b = _values(over), _values(under)
    if not _one_sign(np.concatenate([a, b])) or not all(getattr(r, "converged", True) for r in (*over, *under)):
        return None
    paired = len(a) == len(b)
    if not paired and min(len(a), len(b)) < 2:
        return None
    if len(a) == len(b) == 1 and None in (_relative_error(over[0]), _relative_error(under[0])):
        return None  # only a bound, and no seeds to see its scatter
    center, half = paired_log_ratio(a, b) if paired else unpaired_log_ratio(a, b)
    noise = _noise_of_draws(over, under, paired=paired and same_draws)
    half = math.hypot(half, noise)
    (a_low, a_high), (b_low, b_high) = _certified(over), _certified(under)
    low, high = a_low - b_high - half, a_high - b_low + half
    if abs(center) + max(-low, high) > _WIDEST:
        return None
    return math.exp(center + low), math.exp(center + high)


def paired_log_ratio(a: Values, b: Values) -> tuple[float, float]:
    """Return the mean of ``log |a / b|`` over pairs, and the half-width of its t-interval; 0 for one pair."""
    logs = np.log(np.abs(a)) - np.log(np.abs(b))
    if len(logs) < 2:
        return float(logs.mean()), 0.0
    return float(logs.mean()), float(t.ppf(_LEVEL, len(logs) - 1) * logs.std(ddof=1) / math.sqrt(len(logs)))


def unpaired_log_ratio(a: Values, b: Values) -> tuple[float, float]:
    """Return the difference of the mean logarithms, and the half-width of Welch's interval."""
    logs = np.log(np.abs(a)), np.log(np.abs(b))
    shares = [float(x.var(ddof=1)) / len(x) for x in logs]
    center, variance = float(logs[0].mean() - logs[1].mean()), sum(shares)
    if not variance:
        return center, 0.0
    freedom = variance**2 / sum(share**2 / (len(x) - 1) for share, x in zip(shares, logs, strict=True))
    return center, float(t.ppf(_LEVEL, freedom)) * math.sqrt(variance)


def paired_noise(x: Values, y: Values) -> float:  # (n, m), (n, m)
    """Return the half-width, from ``m`` shared directions, of the mean log-ratio over ``n`` pairs of sample means."""
    influence = (x / x.mean(1, keepdims=True) - y / y.mean(1, keepdims=True)).mean(0)
    m = len(influence)
    return float(t.ppf(_LEVEL, m - 1) * influence.std(ddof=1) / math.sqrt(m))


def _values(records: Sequence[Any]) -> Values:
    return np.array([record.headline for record in records], dtype=np.float64)


def _one_sign(values: Values) -> bool:
    return bool(np.isfinite(values).all() and len(values) and ((values > 0).all() or (values < 0).all()))


def _sampled(record: Any) -> bool:
    """Return whether a record's interval is that of an estimate, at 95 % and not for certain."""
    return interval_of(record) is not None and bool(stderr_of(record))


def _log_ends(record: Any) -> Interval:
    """Return how far a record's interval reaches down and up in logarithms; without end where it holds zero."""
    low, high = interval_of(record) or (record.headline, record.headline)
    if low * high <= 0 or not math.isfinite(low) or not math.isfinite(high):
        return -math.inf, math.inf
    low, high = sorted((abs(low), abs(high)))
    value = abs(record.headline)
    return math.log(low / value), math.log(high / value)


def _relative_error(record: Any) -> float | None:
    """Return the standard error of a record's logarithm, 0 if it is exact or certified, ``None`` if it is a bound."""
    error = stderr_of(record)
    if _sampled(record):
        return max(map(abs, _log_ends(record))) / _NORMAL
    if interval_of(record) is not None:
        return 0.0
    if error is None:
        return None if getattr(record, "max_loss", None) is not None else 0.0
    return error / abs(record.headline) if math.isfinite(error) else None


def _certified(records: Sequence[Any]) -> Interval:
    """Return how far, in the mean over the records, their certified intervals reach down and up in logarithms."""
    down, up = np.mean([(0.0, 0.0) if _sampled(record) else _log_ends(record) for record in records], axis=0)
    return float(down), float(up)


def _noise_of_draws(over: Sequence[Any], under: Sequence[Any], *, paired: bool) -> float:
    """Return the half-width that random directions give to the mean log-ratio."""
    shares = math.hypot(_mean_error(over), _mean_error(under))
    if math.isfinite(shares) and paired and all(_is_mean(record) for record in (*over, *under)):
        sizes = {len(record.samples) for record in (*over, *under)}
        if len(sizes) == 1:
            x, y = (np.array([record.samples.tolist() for record in rs]) for rs in (over, under))
            return math.hypot(paired_noise(x, y), _rest(over, x), _rest(under, y))
    return _NORMAL * shares


def _mean_error(records: Sequence[Any]) -> float:
    """Return the mean relative standard error: seeds share their directions, so that it does not average out."""
    return float(np.mean([_relative_error(record) or 0.0 for record in records]))


def _is_mean(record: Any) -> bool:
    """Return whether a record's value is the mean of its samples, so that these tell its error."""
    samples, value = getattr(record, "samples", None), record.headline
    if samples is None or getattr(record, "stderr", None) is None or len(samples) < 2:
        return False
    return abs(float(samples.mean()) - float(value)) <= _SAME * abs(float(value))


def _rest(records: Sequence[Any], samples: Values) -> float:
    """Return the half-width for what is in the standard errors beside the scatter of the samples: rounding."""
    own = samples.var(axis=1, ddof=1) / samples.shape[1]
    left = [max(record.stderr**2 - v, 0.0) for record, v in zip(records, own, strict=True)]
    relative = [math.sqrt(x) / abs(record.headline) for record, x in zip(records, left, strict=True)]
    return _NORMAL * float(np.mean(relative))
