"""The search for the largest loss in a box: climbs from random points, and the best that any of them met."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import torch
from scipy.optimize import fmin_l_bfgs_b
from torch import Tensor

from sharpness.metrics.box import Box

# The first step reaches the side of the box in every coordinate whose share in the slope is above this.
_NEGLIGIBLE_SHARE = 1e-6
_SHORTEST = 1e-3  # of the way to a corner: a climb that finds nothing higher from here on is over


@dataclass(frozen=True)
class Climb:
    """One climb: the largest loss met, the iterations it took and how it ended."""

    max_loss: float
    iterations: int
    message: str


Solver: TypeAlias = "Callable[[Box, Tensor, int, Callable[[], object]], Climb]"


def ascend(
    box: Box, solver: Solver, generator: torch.Generator, max_iter: int, advance: Callable[[], object]
) -> dict[str, Any]:
    """Spend exactly ``max_iter`` iterations of ``solver``; return what was reached.

    A climb that ends in a corner early leaves its remaining iterations to another one from a new random point; one that
    cannot take a step, where the loss is constant say, counts for one. ``advance`` is called after each evaluation.
    """
    before, climbs = box.num_evaluations, list[Climb]()
    left = max_iter
    while left > 0:
        climbs.append(solver(box, box.random_point(generator), left, advance))
        left -= max(climbs[-1].iterations, 1)
    return {
        "max_loss": max(climb.max_loss for climb in climbs),
        "iterations": sum(climb.iterations for climb in climbs),
        "climbs": len(climbs),
        "evaluations": box.num_evaluations - before,
        "message": climbs[-1].message,
    }


def l_bfgs_b(box: Box, start: Tensor, max_iter: int, advance: Callable[[], object]) -> Climb:
    """Run SciPy's L-BFGS-B on minus the loss over the unit box, in float64 on the CPU.

    The loss is divided by a small number, so that the first step, which follows the slope at its own length, reaches
    the sides of the box instead of creeping from its start. For a loss that is convex in the box each further step is
    one from corner to better corner.
    """
    best = -np.inf
    start_loss, start_slope = box.evaluate(start)
    scale = _NEGLIGIBLE_SHARE * start_slope.abs().mean().item() or 1.0
    first: tuple[float, Tensor] | None = (start_loss, start_slope)
    del start_slope

    def function(z: np.ndarray[Any, Any]) -> tuple[float, np.ndarray[Any, Any]]:
        nonlocal best, first
        point = torch.from_numpy(z)
        # SciPy asks for its start first, which was evaluated already.
        loss, slope = first if first is not None and torch.equal(point, start) else box.evaluate(point)
        first = None
        advance()
        best = max(best, loss)
        return (start_loss - loss) / scale, slope.div_(-scale).numpy()

    # Bounds go through lists of Python floats here, in `scipy.optimize.minimize` twice.
    _, _, found = fmin_l_bfgs_b(
        function,
        start.numpy(),
        bounds=[(-1.0, 1.0)] * box.p,
        maxiter=max_iter,
        factr=0.0,
        pgtol=0.0,
        maxfun=100 * max_iter,
    )
    return Climb(best, int(found["nit"]), str(found["task"]))


def projected_gradient(box: Box, start: Tensor, max_iter: int, advance: Callable[[], object]) -> Climb:
    """Step to the corner that the slope points to, or part of the way, where the box is.

    A full step is the maximum of a linear loss, and never goes down for a convex one. Where it does go down, the way
    is cut to a quarter from the best point so far. Each iteration is one evaluation, beside that of the start.
    """
    z, share = start, 1.0
    best, slope = box.evaluate(z)
    advance()
    for iteration in range(max_iter):
        direction = torch.where(slope == 0, z, slope.sign()).sub_(z)
        if not bool(direction.any()):
            return Climb(best, iteration, "the slope points out of the box in every coordinate")
        if share < _SHORTEST:
            return Climb(best, iteration, "no higher point on the way to the corner")
        candidate = torch.add(z, direction, alpha=share) if share < 1 else direction.add_(z)
        loss, new_slope = box.evaluate(candidate)
        advance()
        if loss > best:
            z, best, slope, share = candidate, loss, new_slope, min(2 * share, 1.0)
        else:
            share /= 4
    return Climb(best, max_iter, "all iterations spent")


SOLVERS: dict[str, Solver] = {"l-bfgs-b": l_bfgs_b, "projected-gradient": projected_gradient}
