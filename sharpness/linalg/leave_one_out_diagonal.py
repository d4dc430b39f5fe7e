r"""Leave-one-out estimates of a diagonal, and what they owe to each other's vectors.

In the notation of ``leave_one_out.py``, whose estimates of the trace these are entry by entry, estimate ``i`` is

.. math:: d_i = \mathrm{diag}(P_i A + A P_i - P_i A P_i) + \omega_i \circ (I - P_i) A (I - P_i) \omega_i

Where vector ``j`` is left out as well, its basis loses one more direction, the unit vector :math:`p`, and the projector
is :math:`P_i - p p^\top`. With :math:`u = (I - P_i) A p` the estimate owes to ``j``, then,

.. math:: \delta_{ij} = p \circ \big( 2 u + (p^\top A p) \, p \big)
    - \omega_i \circ \big( (p^\top \omega_i) \, u
    + (p^\top A (I - P_i) \omega_i + p^\top \omega_i \, p^\top A p) \, p \big)

and the covariance of ``i`` and ``j`` in each entry is the mean of :math:`\delta_{ij} \circ \delta_{ji}`.
"""

from __future__ import annotations

from typing import final

from torch import Tensor

from sharpness.linalg.leave_one_out import SAME, Grams, project


@final
class DiagonalEstimates:
    """The estimates over any range of coordinates, from the columns there of the basis and of its products.

    Args:
        grams: Inner products over all coordinates, see `Grams`.
        like: A tensor of the dtype and on the device to work with.
    """

    def __init__(self, grams: Grams, like: Tensor) -> None:
        self._h, self._s, self._w, r = (t.to(like) for t in (grams.h, grams.s, grams.w, grams.r))
        self._hs = self._h @ self._s
        self._x = project(self._s, self._w)  # Q P w
        self._v = r - self._h @ self._x  # Q A (I - P) w
        self._r = r - project(self._s, self._v)  # Q (A w - P A (I - P) w)

    def over(self, i: Tensor, probes: Tensor, q: Tensor, images: Tensor) -> Tensor:  # (p,), (p, c), 2 x (r, c)
        """Return the estimates ``i`` over the coordinates that ``probes``, ``q`` and ``images`` are given for."""
        s, hs = self._s[:, i], self._hs[:, i]
        sq = s.T @ q
        pa = (q * images).sum(0) - sq * (s.T @ images)
        pap = (q * (self._h @ q)).sum(0) - 2 * sq * (hs.T @ q) + (s * hs).sum(0).unsqueeze(1) * sq**2
        beyond = self._r[:, i].T @ q - self._x[:, i].T @ images
        return 2 * pa - pap + probes * beyond

    def owed(self, i: Tensor, j: Tensor, probes: Tensor, q: Tensor, images: Tensor) -> Tensor:  # as for `over`
        """Return what each of the estimates ``i`` owes to the vector at the same place of ``j``, which is another.

        Nothing to a vector that takes no direction from the basis.
        """
        s, w, v = self._s[:, i], self._w[:, i], self._v[:, i]
        c = (s * self._s[:, j]).sum(0)
        p = (self._s[:, j] - c * s) / (1 - c * c).clamp_min(SAME).sqrt()
        ap = self._h @ p
        pq, u = p.T @ q, p.T @ images - project(s, ap).T @ q
        pw, pv, pap = ((p * t).sum(0).unsqueeze(1) for t in (w, v, ap))
        return pq * (2 * u + pap * pq) - probes * (pw * u + (pv + pw * pap) * pq)
