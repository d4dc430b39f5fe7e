"""The search for the ends of a spectrum by Lanczos: when to stop, what to keep, what is still missing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from sharpness.linalg.basis import Floats
from sharpness.linalg.bounds import accurate
from sharpness.linalg.krylov import KrylovSpace
from sharpness.linalg.steps import Domain, Steps
from sharpness.linalg.which import select

Indices: TypeAlias = "np.ndarray[tuple[int], np.dtype[np.intp]]"
Bools: TypeAlias = "np.ndarray[Any, np.dtype[np.bool_]]"
Report: TypeAlias = Callable[[float], object]

_SPARE = 2  # products past convergence on small problems


@dataclass(frozen=True, kw_only=True)
class Goal:
    """What is wanted: ``k`` eigenvalues at the end(s) named by ``which``, ``wanted`` in all, to ``tol``."""

    which: str
    k: int
    wanted: int
    tol: float

    def select(self, theta: Floats) -> Indices:
        """Return the positions of the wanted of the ascending Ritz values, in the order to report."""
        chosen: Indices = select(theta, self.which, self.k)
        return chosen


@dataclass(frozen=True, kw_only=True)
class Storage:
    """How many rows a basis may have (``None``: any number), in which dtype and on which device it is kept."""

    rows: int | None = None
    dtype: torch.dtype | None = None
    device: torch.device | None = None

    def space(self, domain: Domain, generator: torch.Generator, goal: Goal, **options: Any) -> KrylovSpace:
        """Return an empty Krylov space that is kept so."""
        return KrylovSpace(
            domain,
            generator,
            rows=self.rows,
            keep=lambda theta: kept_at_restart(theta, goal, self.rows or len(theta)),
            stored_dtype=self.dtype,
            stored_device=self.device,
            **options,
        )


@dataclass(frozen=True, kw_only=True)
class Found:
    """Ritz pairs of an operator and what is known of their errors."""

    theta: Floats  # (m,) ascending, all that is known of the spectrum
    residuals: Floats  # (m,) rounding included
    chosen: Indices  # (k,) positions in the order to report
    rows: Tensor  # (k, n) the unit vectors of the chosen
    floor: float  # rounding that no product can avoid
    rounding: float  # what the residuals allow for
    scale: float  # a lower bound of |A|
    spent: int
    gaps: bool = True  # whether theta also holds the neighbours of the chosen
    unfinished: str = ""  # what is missing, in words

    def accurate(self, tol: float) -> bool:
        """Return whether all chosen pairs meet the tolerance."""
        good = accurate(self.theta, self.residuals, tol=tol, floor=self.floor)
        return bool(good[self.chosen].all()) and not self.unfinished


def search(
    domain: Domain,
    goal: Goal,
    storage: Storage,
    generator: torch.Generator,
    budget: int,
    report: Report,
    start: Tensor | None = None,
) -> Steps[Found]:
    """Search the ends of the spectrum until the wanted pairs are accurate, or the products are spent.

        The first vector is drawn, unless a ``start`` is given, a part of which must be. With a basis that rounds, the
    residuals are estimates: how far the basis is from orthonormal is left out.
    """
    n = domain.n
    space = storage.space(domain, generator, goal, start=start)
    spare, everything = _SPARE, True
    for step in range(1, budget + 1):
        space.absorb((yield space.request()))
        if step < goal.wanted:
            continue
        theta, s, residuals = space.ritz()
        rounding = space.floor if space.basis.rounds else space.rounding
        residuals = residuals + rounding
        good = accurate(theta, residuals, tol=goal.tol, floor=space.floor)
        chosen = goal.select(theta)
        report(float(np.max(residuals[chosen])))
        if hopeless(theta, residuals, rounding, goal.tol, chosen):
            break
        everything = complete(space, theta, s, residuals, good, goal)
        if good[chosen].all() and everything:
            # Where few dimensions are left, look a little further: the space may be about to be exhausted, and
            # that shows multiplicities. On a network this never holds, and not a product is spent past convergence.
            if spare == 0 or space.size == n or space.num_starts > 1 or n > 4 * step:
                break
            spare -= 1
    return Found(
        theta=theta,
        residuals=residuals,
        chosen=chosen,
        rows=space.vectors(s[:, chosen]),
        floor=space.floor,
        rounding=rounding,
        scale=space.scale,
        spent=space.num_products,
        unfinished="" if everything else "the products ended before all of the spectrum's end was searched",
    )


def hopeless(theta: Floats, residuals: Floats, rounding: float, tol: float, chosen: Indices) -> bool:
    """Return whether all wanted pairs have converged but for rounding, which no further product makes smaller."""
    limit = tol * np.abs(theta[chosen])
    return bool(np.all(residuals[chosen] - rounding <= 0.1 * limit) and np.any(rounding > limit))


def complete(space: KrylovSpace, theta: Floats, s: Floats, residuals: Floats, good: Bools, goal: Goal) -> bool:
    """Return whether no wanted eigenvalue can hide in the complement of an exhausted space.

    A block started at random meets every distinct eigenvalue of the complement it started in, so the complement that
    remains after it has none beyond the block's own extremes. The wanted values are complete once they reach those.
    Before the first exhaustion nothing is known about the complement, and nothing is claimed.
    """
    which, k = goal.which, goal.k
    if space.size == space.n:
        return True
    if space.num_starts == 1 and not space.exhausted:
        return which != "magnitude" or _ends_agree(theta, residuals, good, goal)
    share = space.latest_share(s)  # of each pair in the latest block
    latest = np.flatnonzero(share >= min(0.5, share.max()))
    low, high = latest[0], latest[-1]
    chosen = np.sort(theta[goal.select(theta)])
    slack = 2 * space.rounding
    if which == "magnitude":
        return bool(good[low] and good[high] and max(-theta[low], theta[high]) <= np.abs(chosen).min() + slack)
    top = bool(good[high] and theta[high] <= chosen[-k] + slack)
    bottom = bool(good[low] and theta[low] >= chosen[k - 1] - slack)
    return {"largest": top, "smallest": bottom, "both": top and bottom}[which]


def _ends_agree(theta: Floats, residuals: Floats, good: Bools, goal: Goal) -> bool:
    """Return whether neither end can still grow beyond the ``k`` largest in magnitude.

    A Ritz value that has not converged may be on its way to an eigenvalue of larger magnitude than those that have.
    """
    chosen = goal.select(theta)
    rest = np.setdiff1d(np.arange(len(theta)), chosen)
    if not len(rest):
        return True
    last = theta[chosen[-1]]
    rival = rest[0] if last > 0 else rest[-1]  # the first one left at the other end
    return bool(good[rival] or abs(theta[rival]) + residuals[rival] <= abs(last))


def kept_at_restart(theta: Floats, goal: Goal, rows: int) -> Indices:
    """Return the positions of the Ritz values that a basis of ``rows`` rows keeps when it is full.

    The wanted ones, and as spare half of the rows that are left, those nearest to the wanted end, or to both.
    """
    m = len(theta)
    number = min(goal.wanted + max((rows - goal.wanted) // 2, 1), rows - 2)
    if goal.which == "largest":
        return np.arange(m - number, m)
    if goal.which == "smallest":
        return np.arange(number)
    first = goal.select(theta)
    rest = np.setdiff1d(np.arange(m), first)
    ends = np.ravel(np.column_stack([rest[::-1], rest]))  # from the outside inwards, each twice
    order = np.r_[first, ends]
    _, seen = np.unique(order, return_index=True)
    kept: Indices = order[np.sort(seen)][:number]
    return kept
