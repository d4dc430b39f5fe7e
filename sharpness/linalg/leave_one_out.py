r"""Leave-one-out estimates of traces, and the variance of their mean.

With test vectors :math:`\omega_1 \dots \omega_m` and an orthonormal basis ``Q`` of the range of :math:`A \Omega`, let
:math:`P_i` project onto the range of :math:`A \Omega` without its column ``i``. Each

.. math:: x_i = \mathrm{tr}(P_i A) + c_i \, \omega_i^\top (I - P_i) A (I - P_i) \omega_i

is unbiased, since :math:`\omega_i` is independent of :math:`P_i`; XTrace is their mean (Epperly, Tropp & Webber 2024).
:math:`P_i = Q (I - s_i s_i^\top) Q^\top`, where :math:`s_i` is orthogonal to the coordinates of all other columns: a
normalised column of the transposed inverse of ``R`` in :math:`A \Omega = Q R`. Everything is then small matrices.

*Variance.* The sample variance over ``m``, as published, leaves out that the :math:`x_i` are correlated. Let
:math:`\delta_{ij}` be what :math:`x_i` owes to :math:`\omega_j`: the difference to the estimate whose basis leaves out
``j`` as well. Both estimates are unbiased given all vectors but ``i``, so
:math:`\mathrm{Cov}(x_i, x_j) = \mathrm{E}[\delta_{ij} \delta_{ji}]`, and

.. math:: \mathrm{Var}(\bar x) = \mathrm{E} \Big[ \frac{s^2}{m} + \frac{1}{m (m - 1)} \sum_{i \ne j}
    \delta_{ij} \delta_{ji} \Big]

exactly, for every matrix and every ``m``. Where a basis is about to hold all that stands out the products are skewed,
and their mean is most often too small: with all of them the intervals held in as few as 85 % of the runs. Half of the
negative ones is therefore left out, and more where there are fewer than 9 vectors, down to seven eighths with 3. The
estimate is then too large in the mean, by nothing where no eigenvalue stands out, and by much where a few runs hold
most of the error; how often the intervals hold is in ``docs/spectrum.md``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

_FEW = 9  # vectors from which on the stated share of the negative products counts
_TINY = 1e-12  # of the squared length of a test vector: less of it is not divided by
SAME = 1e-14  # least squared sine between the directions that two vectors take from the basis


@final
@dataclass(frozen=True)
class Grams:
    """Inner products of blocks, over all coordinates or those of one group ``g``; batches may come first.

    ``basis`` and what follows belong to the group, the rest to all coordinates.
    """

    h: Tensor  # (r, r) Q A Q'
    w: Tensor  # (r, m) Q w
    r: Tensor  # (r, m) Q A w
    s: Tensor  # (r, m) unit columns that removing a test vector takes from the basis, zero where it takes nothing
    norms: Tensor  # (m,) |w|^2
    forms: Tensor  # (m,) w_g . (A w)_g
    basis: Tensor  # (r, r) Q_g Q_g'
    cross: Tensor  # (r, r) Q_g (A Q)_g', symmetric part
    probe_products: Tensor  # (m, r) w_g (A Q)_g'
    probe_basis: Tensor  # (m, r) w_g Q_g'


@dataclass(frozen=True)
class _Parts:
    """What estimates are made of, each with its own projector ``P``; products are over the group."""

    captured: Tensor  # tr(P A + A P - P A P)
    left: Tensor  # w . (I - P) A (I - P) w
    rest: Tensor  # |(I - P) w|^2, over all coordinates
    rank: Tensor  # of P

    def estimates(self, n: int, sphere: bool) -> Tensor:
        """Return them, with what is left of a test vector scaled to the length that it has in the mean, or not."""
        if not sphere:
            return self.captured + self.left
        return self.captured + (n - self.rank).clamp_min(0) / self.rest.clamp_min(_TINY * n) * self.left


def leave_one_out(grams: Grams, n: int, *, sphere: bool, negative: float = 0.5) -> tuple[Tensor, Tensor]:
    """Return the estimates, ``(m,)``, and the variance of their mean, ``()``.

    Args:
        grams: Inner products.
        n: Dimension.
        sphere: Whether the part of a test vector outside of the basis is scaled to the length that it has in the mean.
            Only for test vectors whose directions are uniform.
        negative: Share of the negative products that counts in the variance, less of it with few vectors.
    """
    x = project(grams.s, grams.w)  # Q P w
    v = grams.r - grams.h @ x  # Q A (I - P) w
    one = _without_one(grams, x, v)
    estimates, m = one.estimates(n, sphere), grams.s.shape[-1]
    delta = estimates.unsqueeze(-1) - _without_two(grams, one, v).estimates(n, sphere)
    delta = delta.masked_fill(torch.eye(m, dtype=torch.bool), 0.0)
    products = delta * delta.mT
    kept = negative * min(1.0, (m - 1) / (_FEW - 1))
    shared = (products.clamp_min(0) + kept * products.clamp_max(0)).sum((-1, -2)) / (m * (m - 1))
    return estimates, estimates.var(-1) / m + shared.clamp_min(0)


def project(s: Tensor, y: Tensor) -> Tensor:  # (r, p), (r, p) -> (r, p)
    """Return coordinates ``y`` in the basis less their part along ``s``, those of their projection by ``P``."""
    return y - s * (s * y).sum(-2, keepdim=True)


def _taken(s: Tensor) -> Tensor:  # (r, m) -> (m,)
    """Return 1 for each test vector that takes a direction from the basis, and 0 for the others."""
    return (s * s).sum(-2).round()


def _without_one(grams: Grams, x: Tensor, v: Tensor) -> _Parts:  # (m,)
    """Return the parts of the estimates whose bases leave out their own vector."""
    h, s, g, cross = grams.h, grams.s, grams.basis, grams.cross
    hs, gs = h @ s, g @ s
    pa = _trace(cross) - (s * (cross @ s)).sum(-2)
    pap = _trace(h @ g) - 2 * (hs * gs).sum(-2) + (s * hs).sum(-2) * (s * gs).sum(-2)
    left = grams.forms - (grams.probe_products * x.mT).sum(-1) - (grams.probe_basis * project(s, v).mT).sum(-1)
    return _Parts(2 * pa - pap, left, grams.norms - (x * x).sum(-2), h.shape[-1] - _taken(s))


def _without_two(grams: Grams, one: _Parts, v: Tensor) -> _Parts:  # (m, m)
    r"""Return the same where the bases leave out vector ``j`` as well, in row ``i`` and column ``j``.

    With :math:`P` the projector without ``i``, leaving out ``j`` too takes a unit vector ``p`` from the basis: what is
    left of :math:`s_j` orthogonal to :math:`s_i`, or nothing where :math:`s_j` is zero. The new projector is
    :math:`P - p p^\top`, and with :math:`u = (I - P) A p` the parts are, all products over the group,

    .. math:: \mathrm{captured} - 2 \, u^\top p - (p^\top A p) \, p^\top p,
        \qquad \mathrm{left} + (p^\top w) \, w^\top u
        + \big( p^\top A (I - P) w + (p^\top w) \, p^\top A p \big) \, w^\top p

    but for :math:`p^\top w`, :math:`p^\top A p` and :math:`p^\top A (I - P) w`, which are over all coordinates.
    """
    h, s, g = grams.h, grams.s, grams.basis
    c = s.mT @ s
    itself = torch.eye(s.shape[-1], dtype=torch.bool)
    squared_sine = (1 - c * c).masked_fill(itself, 1.0).clamp_min(SAME)  # there is no p for i = j

    def quadratic(matrix: Tensor) -> Tensor:
        """Return ``p' M p`` for all ``i`` and ``j``; ``M`` is symmetric."""
        between = s.mT @ matrix @ s
        own = between.diagonal(dim1=-2, dim2=-1)
        return (own.unsqueeze(-2) - 2 * c * between + c * c * own.unsqueeze(-1)) / squared_sine

    def linear(rows: Tensor) -> Tensor:
        """Return ``y_i' p`` for all ``i`` and ``j``; the rows are the ``y_i``."""
        along = rows @ s
        own = along.diagonal(dim1=-2, dim2=-1).unsqueeze(-1)
        return (along - c * own) / squared_sine.sqrt()

    pap, pw, pv = quadratic(h), linear(grams.w.mT), linear(v.mT)
    pp, wp = quadratic(g), linear(grams.probe_basis)
    # A p lies partly in the basis, where P takes it away but for its part along s_i.
    sap, gh = linear((h @ s).mT), g @ h
    up = quadratic(grams.cross) - quadratic((gh + gh.mT) / 2) + linear((g @ s).mT) * sap
    ws = (grams.probe_basis * s.mT).sum(-1, keepdim=True)
    wu = linear(grams.probe_products) - linear(grams.probe_basis @ h) + ws * sap
    return _Parts(
        captured=one.captured.unsqueeze(-1) - 2 * up - pap * pp,
        left=one.left.unsqueeze(-1) + pw * wu + (pv + pw * pap) * wp,
        rest=one.rest.unsqueeze(-1) + pw * pw,
        rank=one.rank.unsqueeze(-1) - _taken(s).unsqueeze(-2),
    )


def _trace(matrix: Tensor) -> Tensor:  # (..., r, r) -> (..., 1)
    return matrix.diagonal(dim1=-2, dim2=-1).sum(-1, keepdim=True)
