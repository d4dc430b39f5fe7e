"""Eigenvalues by power iteration with deflation: the classic, slow where the gaps are small."""

from __future__ import annotations

import time

import numpy as np
import torch
from torch import Tensor

from sharpness._checks import check_choice, check_count, check_flag, check_positive, check_seed
from sharpness._progress import check_progress, progress_bar
from sharpness.errors import ArgumentError, NonFiniteError
from sharpness.linalg.answer import OnFailure, answer, check_on_failure
from sharpness.linalg.bounds import rounding_level
from sharpness.linalg.operator import LinearOperator, check_operator
from sharpness.linalg.products import dot, norm
from sharpness.linalg.rayleigh_ritz import rayleigh_ritz
from sharpness.linalg.which import WHICH, Which, count, select
from sharpness.results import EigenResult

_PATIENCE = 20  # products without a halved residual before the spectrum is shifted


def power_iteration(
    operator: LinearOperator,
    k: int = 1,
    *,
    which: Which = "largest",
    tol: float = 1e-3,
    num_matvecs: int | None = None,
    vectors: bool = False,
    seed: int = 0,
    progress: bool | None = None,
    on_failure: OnFailure = "warn",
) -> EigenResult:
    r"""Compute ``k`` eigenvalues one after the other by power iteration.

    Repeats :math:`v \leftarrow (A - \sigma I) v / \|(A - \sigma I) v\|` in the complement of the vectors already
    found. Without a shift ``sigma`` it converges to the eigenvalue largest in *magnitude*; where an algebraic end is
    wanted and the other end dominates (or both are equally large), ``sigma`` moves the spectrum so that the wanted
    end dominates. A last Rayleigh-Ritz step in the span of all vectors found gives the pairs that are reported, with
    the residuals of their own products.

    Use it to compare with the literature that used it; :func:`lanczos` finds the same with far fewer products.

    Args:
        operator: Symmetric operator of size ``n``.
        k: Number of wanted eigenvalues, ``1 <= k <= n``.
        which: As in :func:`lanczos`.
        tol: Relative tolerance, as in :func:`lanczos`.
        num_matvecs: Products that may be spent in all; ``None`` allows 200 per eigenvalue.
        vectors: Also return the eigenvectors.
        seed: Seed of the random starting vectors.
        progress: Show a progress bar; ``None`` shows one on a terminal after two seconds.
        on_failure: ``"warn"``, ``"raise"`` or ``"ignore"``.

    Returns:
        Eigenvalues, residuals and intervals.

    Raises:
        ArgumentError: If an option cannot be accepted.
        NonFiniteError: If a product holds NaN or infinity.
        ConvergenceError: If the tolerance is not met and ``on_failure="raise"``.

    Cost: one product per step; about ``log(1/tol) / log(|lambda_1 / lambda_2|)`` steps per eigenvalue; memory
    ``2 k + 4`` vectors.

    References:
        Parlett, The Symmetric Eigenvalue Problem (1998), ch. 4.

    Example:
        >>> from sharpness.linalg import DenseOperator, power_iteration
        >>> power_iteration(DenseOperator([[2.0, 1.0], [1.0, 2.0]])).eigenvalues.round(decimals=4)
        tensor([3.], dtype=torch.float64)
    """
    n = check_operator(operator)
    k = check_count("k", k, high=n, of="the dimension of the operator")
    check_choice("which", which, WHICH)
    tol = check_positive("tol", tol)
    check_flag("vectors", vectors)
    check_on_failure(on_failure)
    wanted = count(which, k, n)
    budget = 200 * wanted if num_matvecs is None else check_count("num_matvecs", num_matvecs)
    if budget < wanted:
        raise ArgumentError(
            f"`num_matvecs` must be at least {wanted} to find {wanted} eigenvalues, got {budget}. "
            f"Pass num_matvecs={wanted} or more."
        )
    generator = torch.Generator().manual_seed(check_seed(seed))
    started = time.perf_counter()
    ends = ["largest"] * (wanted - wanted // 2) + ["smallest"] * (wanted // 2)
    sides = ends if which == "both" else [which] * wanted

    rows = torch.zeros(0, n, dtype=operator.dtype, device=operator.device)
    images: list[Tensor] = []  # the products of the rows
    spent, scale, sure = 0, 0.0, True
    with progress_bar(check_progress(progress), total=budget, title="power iteration") as bar:
        for i, side in enumerate(sides):
            share = (budget - spent) // (wanted - i)
            search = _Search(operator, rows, side, generator, scale)
            for _ in range(share):
                search.step()
                bar.update()
                if search.done(tol):
                    break
            spent, scale, sure = spent + search.spent, search.scale, sure and search.at_right_end
            rows = torch.cat([rows, search.vector[None]])
            images.append(search.image)

    # A vector found later is coupled to those before by their errors. Rayleigh-Ritz in the span of all removes that,
    # and needs no product.
    pairs = rayleigh_ritz(rows, torch.stack(images))
    theta = pairs.theta
    floor = rounding_level(operator.dtype, scale)
    bounds = pairs.residuals + floor
    chosen = select(theta, which, k)
    return answer(
        operator=operator,
        theta=theta,
        residuals=bounds,
        wanted=chosen,
        floor=floor,
        allowed=floor,
        tol=tol,
        num_matvecs=spent,
        rows=pairs.rows[torch.as_tensor(chosen.copy(), device=rows.device)],
        vectors=vectors,
        settings={"method": "power", "which": which, "k": k, "tol": tol, "seed": seed, "num_matvecs": num_matvecs},
        started=started,
        on_failure=on_failure,
        hint="Raise num_matvecs, or use lanczos, which needs far fewer products.",
        unfinished="" if sure else "the products ended before the wanted end of the spectrum was reached",
    )


class _Search:
    """The search for one eigenpair in the complement of the rows already found."""

    def __init__(
        self, operator: LinearOperator, rows: Tensor, side: str, generator: torch.Generator, scale: float
    ) -> None:
        self.operator, self.rows, self.side = operator, rows, side
        self.scale = scale  # largest norm of a product with a unit vector so far: at most |A|
        self.spent = 0
        self.value = self.residual = np.nan  # of the operator restricted to the complement
        self._shift = 0.0
        self._mark, self._marked_at = np.inf, 0
        self._generator = generator
        self._next = self.vector = self.image = self._random()

    def step(self) -> None:
        """Multiply once; the value and residual are those of the vector multiplied."""
        v = self._next
        self.vector, self.image = v, self.operator.matvec(v)
        self.spent += 1
        w = self._deflated(self.image)
        self.value = dot(v, w)
        self.residual = norm(w - self.value * v)
        if not np.isfinite(self.residual):
            raise NonFiniteError(
                f"product {self.spent} of the operator holds NaN or infinity. "
                "Check the loss and the weights for overflow, or use float64."
            )
        self.scale = max(self.scale, norm(self.image))
        moved = w - self._shift * v
        if self._wrong_end():
            # A start from the vector at hand, close to an eigenvector of the wrong end, would be accepted there.
            self._shift = -self._sign * 1.1 * self.scale
            self._next = self._random()
            self.residual = np.inf  # what was multiplied is not what is wanted
        elif norm(moved) > 0:
            self._next = self._unit(moved)

    def done(self, tol: float) -> bool:
        """Return whether the pair is accurate, and at the wanted end as far as the shift can tell."""
        floor = rounding_level(self.operator.dtype, self.scale)
        # Half the tolerance leaves room for the coupling to the other pairs.
        settled = self.residual + floor <= 0.5 * tol * abs(self.value) or self.residual <= floor
        return settled and self.at_right_end

    @property
    def at_right_end(self) -> bool:
        """Return whether the value is at the wanted end, as far as the shift can tell."""
        floor = rounding_level(self.operator.dtype, self.scale)
        return self.side == "magnitude" or self._shift != 0.0 or self._sign * self.value >= -floor

    @property
    def _sign(self) -> int:
        return -1 if self.side == "smallest" else 1

    def _wrong_end(self) -> bool:
        """Return whether to shift: the unwanted end dominates, or two ends of equal size stall the iteration."""
        if self.side == "magnitude" or not self.scale:
            return False
        if self._shift:  # found from too small an estimate of |A|?
            return self.scale > abs(self._shift)
        if self.residual <= 0.5 * self._mark:
            self._mark, self._marked_at = self.residual, self.spent
        return self._sign * self.value < -0.5 * self.scale or self.spent - self._marked_at >= _PATIENCE

    def _random(self) -> Tensor:
        v = torch.randn(self.operator.n, generator=self._generator, dtype=torch.float64, device="cpu")
        return self._unit(v.to(dtype=self.operator.dtype, device=self.operator.device))

    def _unit(self, v: Tensor) -> Tensor:
        """Return ``v`` in the complement of the rows found, with norm 1."""
        v = self._deflated(self._deflated(v))
        return v / norm(v)

    def _deflated(self, v: Tensor) -> Tensor:
        return v - self.rows.T @ (self.rows @ v)
