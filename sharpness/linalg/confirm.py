r"""Was an eigenvalue missed? A search in the complement of what was found, and what it excludes.

A Krylov space of one vector sees one vector of each eigenspace: copies of a repeated eigenvalue are invisible to it.
In the complement of the vectors found they are ordinary eigenvalues, and a new random start meets them.

*What a search excludes.* After ``s`` steps from the unit vector ``v``, the next Lanczos vector is :math:`p_s(B) v`
with :math:`p_s(t) = \prod_j (t - \theta_j) / \prod_j \beta_j`, and has norm 1. If the largest eigenvalue
:math:`\lambda` of ``B`` has a unit eigenvector ``x``, then :math:`|p_s(\lambda)|\, |\langle x, v \rangle| \le 1`. For
a random ``v`` in ``N`` dimensions, :math:`\langle x, v \rangle^2` has the distribution Beta(1/2, (N-1)/2), so it is
below its quantile :math:`\delta^2` with known probability only; otherwise :math:`\lambda` is at most the ``t`` beyond
all Ritz values at which :math:`p_s(t) = 1 / \delta` (van Dorsselaer, Hochstenbach & van der Vorst 2000). The event is
about the start alone, so the bound holds at every step at once, and the search may stop when it likes. It needs no
estimate of the other end of the spectrum, and is much sharper than the bound of Kuczynski & Wozniakowski (1992),
which holds for the worst spectrum. With a thick restart the Ritz values left out stay zeros of the polynomial.

``B`` is the operator in the complement of the rows ``Y`` found. The eigenvalues of ``A`` are those of ``B`` and the
values found, moved by no more than :math:`\|A Y^T - Y^T \Theta\|` (Parlett 1998, section 11.5).
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from scipy.optimize import brentq
from scipy.special import betaincinv

from sharpness.linalg.basis import Floats
from sharpness.linalg.bounds import accurate
from sharpness.linalg.krylov import KrylovSpace
from sharpness.linalg.rayleigh_ritz import refined
from sharpness.linalg.search import Bools, Found, Goal, Report, Storage
from sharpness.linalg.steps import Domain, Steps

PROBABILITY = 0.999


def extreme_bound(theta: Floats, roots: Floats, log_norm: float, n: int, risk: float, sign: int = 1) -> float:
    """Return the value beyond which no eigenvalue lies, except with probability ``risk`` over the random start.

    Args:
        theta: ``(m,)`` Ritz values.
        roots: ``(s,)`` all zeros of the Lanczos polynomial: ``theta``, and the values left out at restarts.
        log_norm: Sum of the logarithms of all couplings beta.
        n: Dimension of the space that the start is drawn from.
        risk: Probability that the bound is wrong.
        sign: 1 for an upper bound of the largest, -1 for a lower bound of the smallest.
    """
    delta = 1.0 if n == 1 else float(np.sqrt(betaincinv(0.5, (n - 1) / 2, risk)))
    zeros, edge = sign * roots, float((sign * theta).max())
    level = log_norm - np.log(delta)

    def excess(t: float) -> float:  # log p(t) - log(1 / delta), increasing in t
        return float(np.sum(np.log(np.maximum(t - zeros, np.finfo(float).tiny))) - level)

    width = max(float(np.ptp(zeros)), abs(edge), float(np.finfo(float).tiny))
    step = 1e-14 * width
    while excess(edge + step) < 0:
        step *= 2
    low = edge + (step / 2 if step > 1e-14 * width else 0.0)
    if excess(low) >= 0:
        return sign * (edge + step)
    root: float = brentq(excess, low, edge + step, rtol=1e-12)
    return sign * (root + 1e-12 * width)


def confirm(
    domain: Domain,
    goal: Goal,
    storage: Storage,
    generator: torch.Generator,
    found: Found,
    budget: int,
    report: Report,
) -> Steps[tuple[Found, dict[str, Any] | None]]:
    """Search the complement of what was found, add what had been missed, and search again until nothing is added.

    Returns:
        The pairs, and what was excluded; ``None`` in its place where ``budget`` products did not suffice.
    """
    spent = added = rounds = 0
    ends = {"largest": (1,), "smallest": (-1,)}.get(goal.which, (1, -1))
    inner = Goal(which=goal.which if len(ends) == 1 else "both", k=1, wanted=len(ends), tol=goal.tol)
    excluded: tuple[float | None, ...] = (None,) * len(ends)
    while len(found.chosen) < domain.n:
        rounds += 1
        risk = (1 - PROBABILITY) / len(ends) / 2**rounds  # over all rounds no more than 1 - PROBABILITY
        space = storage.space(domain, generator, inner, locked=found.rows, scale=found.scale)
        verdict = None
        while verdict is None:
            if spent == budget:
                return dataclasses.replace(found, spent=found.spent + spent), None
            space.absorb((yield space.request()))
            spent += 1
            verdict = _verdict(space, found, goal, ends, risk)
        excluded = verdict.excluded
        if not verdict.missed.any():
            break
        more, fresh = yield from _with_missed(
            domain, goal, storage, generator, found, space, verdict, budget - spent, report
        )
        if more is None:
            return dataclasses.replace(found, spent=found.spent + spent), None
        found, spent, added = (
            dataclasses.replace(more, spent=found.spent),
            spent + fresh,
            added + int(verdict.missed.sum()),
        )
        if not found.accurate(goal.tol):
            return dataclasses.replace(found, spent=found.spent + spent), None
    else:
        excluded = (None,) * len(ends)  # nothing is left to search
    beyond = dict(zip(ends, excluded, strict=True))
    return dataclasses.replace(found, spent=found.spent + spent), {
        "num_matvecs": spent,
        "added": added,
        "probability": PROBABILITY,
        "excluded_above": beyond.get(1),
        "excluded_below": beyond.get(-1),
    }


@dataclass(frozen=True, kw_only=True)
class _Verdict:
    """What a search in the complement has shown, one entry of ``excluded`` per end."""

    theta: Floats  # (m,) Ritz values in the complement
    s: Floats  # (m, m)
    residuals: Floats  # (m,) of A, rounding included
    missed: Bools  # (m,) which of them belong among the wanted
    excluded: tuple[float | None, ...]


def _verdict(space: KrylovSpace, found: Found, goal: Goal, ends: tuple[int, ...], risk: float) -> _Verdict | None:
    """Return what the search has shown, or ``None`` if it must go on to tell."""
    theta, s, residuals = space.ritz()
    rounding = space.floor if space.basis.rounds else space.rounding
    good = accurate(theta, residuals + rounding, tol=goal.tol / 2, floor=space.floor)
    reach = float(np.linalg.norm(found.residuals[found.chosen])) + space.rounding
    missed = np.zeros(len(theta), dtype=bool)
    excluded: list[float | None] = []
    for sign in ends:
        limit, doubt = _limit(found, goal, sign)
        outermost = int(np.argmax(sign * theta))
        beyond = sign * theta > limit + doubt + 2 * space.rounding
        if beyond.any():
            if not good[outermost] and not space.exhausted:
                return None
            missed |= beyond & good
            missed[outermost] = True
            excluded.append(None)
            continue
        bound = extreme_bound(theta, np.r_[theta, space.discarded], space.log_norm, space.n, risk, sign)
        if sign * bound > limit + max(goal.tol * abs(limit), doubt + 2 * space.rounding) and not space.exhausted:
            return None
        excluded.append(bound + sign * reach)
    full = np.hypot(residuals, np.linalg.norm(space.leaks @ s, axis=0)) + rounding
    return _Verdict(theta=theta, s=s, residuals=full, missed=missed, excluded=tuple(excluded))


def _limit(found: Found, goal: Goal, sign: int) -> tuple[float, float]:
    """Return the innermost of the wanted values at one end, counted outwards, and its residual."""
    chosen = found.chosen
    if goal.which == "magnitude":
        inner = chosen[np.argmin(np.abs(found.theta[chosen]))]
        return float(abs(found.theta[inner])), float(found.residuals[inner])
    ordered = chosen[np.argsort(-sign * found.theta[chosen], kind="stable")]
    inner = ordered[goal.k - 1]
    return float(sign * found.theta[inner]), float(found.residuals[inner])


def _with_missed(
    domain: Domain,
    goal: Goal,
    storage: Storage,
    generator: torch.Generator,
    found: Found,
    space: KrylovSpace,
    verdict: _Verdict,
    budget: int,
    report: Report,
) -> Steps[tuple[Found | None, int]]:
    """Return the wanted of the values found and missed, and the products that it took to make them accurate.

    ``None`` in their place where the products left cannot tell.
    """
    old, missed = found.chosen, verdict.missed
    rows = torch.cat([found.rows, space.vectors(verdict.s[:, missed])])
    theta = np.r_[found.theta[old], verdict.theta[missed], verdict.theta[~missed]]
    residuals = np.r_[found.residuals[old], verdict.residuals[missed], verdict.residuals[~missed]]
    candidates = np.argsort(theta[: len(rows)], kind="stable")
    picked = candidates[goal.select(theta[candidates])]
    order = np.argsort(theta, kind="stable")
    more = Found(
        theta=theta[order],
        residuals=residuals[order],
        chosen=np.argsort(order, kind="stable")[picked],
        rows=rows[torch.as_tensor(picked.copy(), device=rows.device)],
        floor=space.floor,
        rounding=space.rounding,
        scale=space.scale,
        spent=0,
    )
    if budget < len(rows) and space.basis.rounds:  # what is reported from a rounded basis rests on fresh products
        return None, 0
    if (more.accurate(goal.tol) and not space.basis.rounds) or budget < len(rows):
        return more, 0
    more = yield from refined(domain, goal, storage, generator, rows, budget, space.scale, report)
    return more, more.spent
