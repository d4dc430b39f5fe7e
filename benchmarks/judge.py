"""How far answers are from the truth, measured the same way for every method."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from functools import cached_property

import torch
from scipy.stats import wasserstein_distance
from torch import Tensor
from torch.nn import functional

from benchmarks.methods import TOL, TRACE_TOL, WANTED, Outcome, Pairs, Rules, direction
from benchmarks.models import Problem
from sharpness import GGNOperator, HessianOperator, Objective
from sharpness.linalg import lanczos, xtrace

_ROUNDING = 1e-4  # of a product in float32
_TRUTH_PRODUCTS = 400  # for the trace


@dataclass(frozen=True)
class Accuracy:
    """How far an answer is from the truth.

    Attributes:
        error: Relative: worst of the eigenvalues, norm of a product, of the trace; for a density the Wasserstein
            distance over the root mean square of the eigenvalues; for epsilon-sharpness how much less was found.
        residual: Worst relative residual of the eigenpairs.
        reached: Whether that is what was asked for; ``None`` where nothing is.
    """

    error: float
    residual: float | None = None
    reached: bool | None = None


class Judge:
    """The truth about a problem, computed when it is first needed, and what residuals are measured with.

    Args:
        problem: Model and data.
        k: The most eigenvalues that will be asked for.
    """

    def __init__(self, problem: Problem, k: int) -> None:
        self.problem = problem
        self.objective = Objective(problem.model, problem.loader, functional.cross_entropy, progress=False)
        self.operator = HessianOperator(self.objective)
        self.k = k
        self._rules: Rules | None = None
        self._products: dict[str, Tensor] = {}
        self._best = -math.inf

    @cached_property
    def eigenvalues(self) -> Tensor:
        """The first ``k``, by Lanczos with a tolerance that only rounding or the number of products stops."""
        with self.objective.session():
            found = lanczos(
                self.operator,
                k=self.k,
                tol=1e-7,
                num_matvecs=6 * self.k + 40,
                seed=1,
                progress=False,
                on_failure="ignore",
            )
        self.doubt = float((found.residuals / found.eigenvalues.abs()).max())
        return found.eigenvalues

    @cached_property
    def trace(self) -> float:
        """The trace, with many more products than are needed for the tolerance."""
        with self.objective.session():
            found = xtrace(
                self.operator,
                tol=TRACE_TOL / 8,
                num_matvecs=_TRUTH_PRODUCTS,
                seed=999,
                progress=False,
                on_failure="ignore",
            )
        self.trace_doubt = found.stderr
        return found.value

    def __call__(self, quantity: str, outcome: Outcome, seed: int, *, values_only: bool = False) -> Accuracy:
        """Return how good an answer is; eigenpairs take one product each, unless only their values matter."""
        answer = outcome.answer
        if isinstance(answer, Pairs):
            return self._pairs(answer, WANTED[quantity], values_only)
        if isinstance(answer, Rules):
            return self._density(answer)
        if quantity in ("product", "ggn"):
            truth = self._product(quantity, seed)
            error = float((answer.double().cpu() - truth).norm() / truth.norm())
            return Accuracy(error, reached=error <= _ROUNDING)
        if quantity == "trace":
            error = abs(answer - self.trace) / abs(self.trace)
            return Accuracy(error, reached=None if outcome.scale != 1 else error <= TRACE_TOL)
        self._best = max(self._best, answer)
        return Accuracy((self._best - answer) / abs(self._best) if self._best else 0.0)

    def _pairs(self, pairs: Pairs, k: int, values_only: bool) -> Accuracy:
        order, truth = pairs.values.argsort(descending=True), self.eigenvalues[:k]
        values, vectors = pairs.values[order].double().cpu(), pairs.vectors[order.to(pairs.vectors.device)]
        error = ((values - truth) / truth).abs().max().item()
        if values_only or not error <= TOL:
            return Accuracy(error, reached=error <= TOL)
        with self.objective.session():
            residual = max(self._residual(t, v) for t, v in zip(values.tolist(), vectors, strict=True))
        return Accuracy(error, residual, reached=error <= TOL and residual <= TOL)

    def _residual(self, value: float, vector: Tensor) -> float:
        vector = vector.to(self.problem.device)
        unit = (vector.double() / torch.linalg.vector_norm(vector, dtype=torch.float64)).to(self.objective.dtype)
        product = self.operator.matvec(unit).double()
        return float(torch.linalg.vector_norm(product - value * unit.double())) / abs(value)

    def _density(self, rules: Rules) -> Accuracy:
        """Compare with the first density that was asked about: draws are random, so none of them is the truth."""
        nodes, weights = (t.double().cpu().ravel() for t in (rules.nodes, rules.weights))
        if self._rules is None:
            self._rules = Rules(nodes, weights)
        own = self._rules
        scale = float(((own.nodes**2 * own.weights).sum() / own.weights.sum()).sqrt())
        return Accuracy(float(wasserstein_distance(nodes, own.nodes, weights, own.weights)) / scale)

    def _product(self, quantity: str, seed: int) -> Tensor:
        """Return the product in float64."""
        if quantity not in self._products:
            model = copy.deepcopy(self.problem.model).double()
            loader = [(x.double() if x.is_floating_point() else x, y) for x, y in self.problem.loader]
            kind = HessianOperator if quantity == "product" else GGNOperator
            operator = kind(Objective(model, loader, functional.cross_entropy, progress=False))
            self._products[quantity] = operator.matvec(direction(self.problem, seed).double()).cpu()
        return self._products[quantity]
