"""How far eigenpairs are from the truth, measured the same way for every method."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.methods import TOL, K, Pairs
from benchmarks.models import Problem
from sharpness import HessianOperator, Objective
from sharpness.linalg import lanczos


@dataclass(frozen=True)
class Accuracy:
    """Worst relative error of the values against the truth, worst relative residual of the pairs."""

    error: float
    residual: float

    @property
    def values_reached(self) -> bool:
        """Whether every eigenvalue is within the tolerance of the truth."""
        return self.error <= TOL

    @property
    def pairs_reached(self) -> bool:
        """Whether every pair's residual is within the tolerance of its eigenvalue."""
        return self.residual <= TOL


class Judge:
    """The truth about a problem, and the operator that residuals are measured with.

    The truth is Lanczos with a tolerance that only rounding stops, in the precision of the model.
    """

    def __init__(self, problem: Problem) -> None:
        self.objective = Objective(problem.model, problem.loader, progress=False)
        self.operator = HessianOperator(self.objective)
        with self.objective.session():
            found = lanczos(
                self.operator, k=K, tol=1e-8, num_matvecs=8 * K, seed=1, progress=False, on_failure="ignore"
            )
        self.truth = found.eigenvalues
        self.doubt = float((found.residuals / found.eigenvalues).max())

    def __call__(self, pairs: Pairs) -> Accuracy:
        """Return how good ``pairs`` are, best first; wants one product per pair."""
        order = pairs.values.argsort(descending=True)
        values, vectors = pairs.values[order].double(), pairs.vectors[order]
        error = ((values - self.truth) / self.truth).abs().max()
        with self.objective.session():
            residuals = [self._residual(t, v) for t, v in zip(values.tolist(), vectors, strict=True)]
        return Accuracy(float(error), max(residuals))

    def _residual(self, value: float, vector: Tensor) -> float:
        unit = (vector.double() / torch.linalg.vector_norm(vector, dtype=torch.float64)).to(vector.dtype)
        product = self.operator.matvec(unit).double()
        return float(torch.linalg.vector_norm(product - value * unit.double())) / abs(value)
