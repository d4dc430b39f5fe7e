"""Ritz pairs from vectors and their products, with true residuals; and their correction until they are accurate."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from sharpness.errors import NonFiniteError
from sharpness.linalg.basis import Floats
from sharpness.linalg.bounds import rounding_level
from sharpness.linalg.products import accumulator, norm
from sharpness.linalg.search import Found, Goal, Report, Storage
from sharpness.linalg.steps import Domain, Steps

_PATIENCE = 2  # corrections in a row, beyond one per pair, that may leave the residuals as they are


@dataclass(frozen=True, kw_only=True)
class RitzPairs:
    """All Ritz pairs in the span of some vectors."""

    theta: Floats  # (l,) ascending
    rows: Tensor  # (l, n) orthonormal
    images: Tensor  # (l, n) their products
    residuals: Floats  # (l,) norms of images - theta rows, as they are

    @property
    def remainders(self) -> Tensor:
        """Return ``images - theta rows``, ``(l, n)``."""
        return self.images - torch.as_tensor(self.theta.copy()).to(self.rows)[:, None] * self.rows

    def found(self, goal: Goal, dtype: torch.dtype, scale: float, spent: int) -> Found:
        """Return the wanted of the pairs, rounding allowed for, with ``scale`` a lower bound of ``|A|``."""
        scale = max(scale, float(np.abs(self.theta).max()))
        floor = rounding_level(dtype, scale)
        chosen = goal.select(self.theta)
        return Found(
            theta=self.theta,
            residuals=self.residuals + floor,
            chosen=chosen,
            rows=self.rows[torch.as_tensor(chosen.copy(), device=self.rows.device)],
            floor=floor,
            rounding=floor,
            scale=scale,
            spent=spent,
            gaps=False,
        )


def rayleigh_ritz(rows: Tensor, images: Tensor) -> RitzPairs:
    """Return the Ritz pairs in the span of orthonormal ``rows``, ``(l, n)``, whose products are ``images``."""
    wide = accumulator(rows.device)
    projected = (rows.to(wide) @ images.to(wide).T).cpu().double()
    values, s = torch.linalg.eigh((projected + projected.T) / 2)
    mixing = s.T.to(rows)
    rows, images = mixing @ rows, mixing @ images
    theta = values.numpy()
    residuals = np.array([norm(w - t * v) for v, w, t in zip(rows, images, theta.tolist(), strict=True)])
    return RitzPairs(theta=theta, rows=rows, images=images, residuals=residuals)


def orthonormal(rows: Tensor) -> Tensor:  # (l, n)
    """Return an orthonormal basis of the span of the rows."""
    q: Tensor = torch.linalg.qr(rows.to(accumulator(rows.device)).T)[0]
    return q.T.to(rows).contiguous()


def checked(rows: Tensor) -> Steps[RitzPairs]:
    """Return the Ritz pairs in the span of ``rows``, ``(l, n)``, by one product for each.

    Raises:
        NonFiniteError: If a product holds NaN or infinity.
    """
    rows = orthonormal(rows)
    images = []
    for row in rows:
        image = yield row
        if not np.isfinite(norm(image)):
            raise NonFiniteError(
                "a product of the operator holds NaN or infinity. "
                "Check the loss and the weights for overflow, or use float64."
            )
        images.append(image)
    return rayleigh_ritz(rows, torch.stack(images))


def refined(
    domain: Domain,
    goal: Goal,
    storage: Storage,
    generator: torch.Generator,
    rows: Tensor,  # (l, n)
    budget: int,
    scale: float,
    report: Report,
) -> Steps[Found]:
    """Correct the vectors ``rows`` until the wanted pairs in their span are accurate, or the products are spent.

    Each correction is a Krylov space of its own in the complement of the vectors, begun with the remainder of the
    worst pair. Only the correction is rounded by the basis, so every round gains as many digits as the basis holds.
    """
    pairs = yield from checked(rows)
    spent, best, idle = len(rows), np.inf, 0
    while True:
        found = pairs.found(goal, domain.dtype, scale, spent)
        scale, chosen = found.scale, found.chosen
        report(float(found.residuals[chosen].max()))
        total = float(np.linalg.norm(pairs.residuals[chosen]))
        idle = idle + 1 if total > 0.9 * best else 0
        best = min(best, total)
        left = budget - spent - len(pairs.theta)
        if found.accurate(goal.tol) or left < 1 or len(pairs.theta) == domain.n or idle > goal.wanted + _PATIENCE:
            return found
        size = np.abs(pairs.theta[chosen])
        worst = int(chosen[np.argmax(pairs.residuals[chosen] / np.maximum(size, found.floor + np.finfo(float).tiny))])
        rows, used = yield from _corrected(domain, goal, storage, generator, pairs, worst, left, scale)
        pairs = yield from checked(rows)
        spent += used + len(rows)


def _corrected(
    domain: Domain,
    goal: Goal,
    storage: Storage,
    generator: torch.Generator,
    pairs: RitzPairs,
    worst: int,
    budget: int,
    scale: float,
) -> Steps[tuple[Tensor, int]]:
    """Return the vectors improved within the span of themselves and a Krylov space, and the products spent."""
    space = storage.space(domain, generator, goal, locked=pairs.rows, start=pairs.remainders[worst], scale=scale)
    kept = len(pairs.theta)
    for _ in range(min(budget, space.n)):
        space.absorb((yield space.request()))
        phi, s, _ = space.ritz()
        projected = np.diag(np.r_[pairs.theta, phi])
        projected[:kept, kept:] = space.leaks @ s
        projected[kept:, :kept] = projected[:kept, kept:].T
        theta, coefficients = np.linalg.eigh(projected)
        chosen = goal.select(theta)
        missing = space.outside(s @ coefficients[kept:, chosen])
        if np.all(missing <= np.maximum(0.3 * goal.tol * np.abs(theta[chosen]), space.floor)) or space.exhausted:
            break
    # As many vectors as before, so that those beyond the wanted go on improving too.
    rest = np.setdiff1d(np.argsort(-np.linalg.norm(coefficients[:kept], axis=0), kind="stable"), chosen, True)
    inner = np.r_[chosen, rest[: kept - len(chosen)]].astype(int)
    rows = coefficients[:kept, inner].T
    moved = torch.as_tensor(rows.copy()).to(pairs.rows) @ pairs.rows + space.vectors(s @ coefficients[kept:, inner])
    return moved, space.num_products
