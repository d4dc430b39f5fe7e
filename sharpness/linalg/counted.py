"""Products handed to somebody else's algorithm: counted, scaled, and cut off when the budget is spent."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias, final

import numpy as np
import torch
from scipy.sparse.linalg import LinearOperator as ScipyOperator

from sharpness.errors import NonFiniteError
from sharpness.linalg.answer import answer
from sharpness.linalg.operator import LinearOperator
from sharpness.linalg.rayleigh_ritz import checked
from sharpness.linalg.search import Found, Goal, Indices
from sharpness.linalg.steps import drive
from sharpness.results import EigenResult

Array: TypeAlias = "np.ndarray[Any, Any]"


class SpentError(Exception):
    """The products are spent; never leaves this package."""


@final
class CountedProducts:
    """The products of ``operator / scale`` as SciPy asks for them, at most ``budget`` in all.

    Args:
        operator: Symmetric operator.
        budget: Products that may be spent.
        spent: Called with the number of products after each call.
    """

    def __init__(self, operator: LinearOperator, budget: int, spent: Callable[[int], object]) -> None:
        self.operator, self.budget = operator, budget
        self.count = 0
        self.scale = 1.0
        self.norm = 0.0  # the largest factor by which a product was longer than its vector: at most |A|
        self._report = spent
        self._inner = operator.to_scipy()

    @property
    def left(self) -> int:
        """Products that are left."""
        return self.budget - self.count

    def spend(self, number: int = 1) -> None:
        """Note that so many products were spent."""
        self.count += number
        self._report(number)

    def __call__(self, X: Array) -> Array:  # (n,) or (n, m)
        """Return the product of ``operator / scale`` with a vector, or with each column of a matrix.

        Raises:
            SpentError: If it would exceed the budget.
            NonFiniteError: If the product holds NaN or infinity.
        """
        columns = X.shape[1] if X.ndim == 2 else 1
        if columns > self.left:
            raise SpentError
        product: Array = np.asarray(self._inner.matmat(X) if X.ndim == 2 else self._inner.matvec(X))
        self.spend(columns)
        if not np.isfinite(product).all():
            raise NonFiniteError(
                "a product of the operator holds NaN or infinity. "
                "Check the loss and the weights for overflow, or use float64."
            )
        with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
            factors = np.linalg.norm(product.astype(np.float64), axis=0) / np.linalg.norm(X.astype(np.float64), axis=0)
        self.norm = max(self.norm, float(np.nanmax(factors, initial=0.0)))
        return product / self.scale if self.scale != 1.0 else product

    def to_scipy(self) -> ScipyOperator:
        """Return this as SciPy's ``LinearOperator``."""
        return ScipyOperator(self.operator.shape, matvec=self, rmatvec=self, matmat=self, dtype=self._inner.dtype)

    def found(self, rows: Array, goal: Goal) -> Found:  # (l, n)
        """Return the Ritz pairs in the span of ``rows``, with the residuals of a fresh product for each."""
        operator = self.operator
        block = torch.as_tensor(np.array(rows), dtype=operator.dtype, device=operator.device)
        pairs = drive(checked(block), operator, self.spend)
        return pairs.found(goal, operator.dtype, self.norm, self.count)


def start(n: int, columns: int, seed: int, operator: LinearOperator) -> Array:
    """Return ``(n, columns)`` random numbers in the operator's dtype; the global generators are left alone."""
    v = torch.randn(n, columns, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return v.to(operator.dtype).numpy()


def answer_from(
    found: Found | None,
    operator: LinearOperator,
    goal: Goal,
    *,
    spent: int,
    vectors: bool,
    settings: dict[str, Any],
    started: float,
    on_failure: str,
    hint: str,
) -> EigenResult:
    """Report what was found; pairs that were not found are NaN with an infinite residual."""
    have = 0 if found is None else len(found.chosen)
    theta = np.full(goal.wanted, np.nan)
    residuals = np.full(goal.wanted, np.inf)
    rows = torch.full((goal.wanted, operator.n), float("nan"), dtype=operator.dtype, device=operator.device)
    if found is not None:
        theta[:have] = found.theta[found.chosen]
        residuals[:have] = found.residuals[found.chosen]
        rows[:have] = found.rows
    wanted: Indices = np.arange(goal.wanted)
    lacking = goal.wanted - have
    return answer(
        operator=operator,
        theta=theta,
        residuals=residuals,
        wanted=wanted,
        rows=rows,
        floor=0.0 if found is None else found.floor,
        allowed=0.0 if found is None else found.rounding,
        unfinished=f"{lacking} of {goal.wanted} eigenvalues were not delivered: they are NaN" if lacking else "",
        tol=goal.tol,
        num_matvecs=spent,
        vectors=vectors,
        settings=settings,
        started=started,
        on_failure=on_failure,
        hint=hint,
        gaps=False,
    )
