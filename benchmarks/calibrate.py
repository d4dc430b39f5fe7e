"""The loosest setting with which each guest reaches the accuracy, for several seeds.

    python -m benchmarks.calibrate [--model mlp|resnet20] [--seeds N]

Lanczos and ARPACK have to reach it in the residuals, PyHessian, which does not look at residuals, in the values only.
The guests' own algorithms run over this library's products, which are the same numbers and cheaper; so this counts
products and measures accuracy, and no time. What it finds is written down in `benchmarks.methods.SETTINGS`.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from typing import Any

import numpy as np
import pyhessian
import torch
from hessian_eigenthings import LambdaOperator
from hessian_eigenthings import lanczos as eigenthings_lanczos
from scipy.sparse.linalg import LinearOperator as ScipyOperator
from scipy.sparse.linalg import eigsh
from tabulate import tabulate
from torch import Tensor

from benchmarks.judge import Accuracy, Judge
from benchmarks.methods import TOL, K, Pairs
from benchmarks.models import PROBLEMS
from sharpness.linalg import lanczos

_STEPS = range(8, 31)
_NCV = range(8, 31)
_EIGSH_TOLS = (1e-1, 1e-2, 1e-3)
_PYHESSIAN_TOLS = (1e-3, 3e-4, 1e-4, 3e-5, 1e-5, 3e-6, 1e-6)
_PYHESSIAN_STEPS = 300

Try = tuple[str, Pairs]  # the setting, and what came of it


class Products:
    """The products of the judge's operator, counted."""

    def __init__(self, judge: Judge) -> None:
        self.operator = judge.operator
        self.parameters = judge.objective.parameters
        self.spent = 0

    def __call__(self, v: Tensor) -> Tensor:
        """Return the product."""
        self.spent += 1
        return self.operator.matvec(v)


def searches(products: Products, seed: int) -> Iterator[tuple[str, Iterator[Try]]]:
    """Yield each method with its settings to try, the loosest first."""
    known = Remembered(products)
    yield "sharpness", ((f"tol={TOL:g}", _ours(products, seed)) for _ in range(1))
    yield "hessian-eigenthings", ((f"max_iter={steps}", _eigenthings(known, steps, seed)) for steps in _STEPS)
    yield "eigsh", ((f"tol={tol:g}", _eigsh(products, tol, None, seed)) for tol in _EIGSH_TOLS)
    yield "eigsh, told ncv", ((f"ncv={ncv}", _eigsh(products, _EIGSH_TOLS[0], ncv, seed)) for ncv in _NCV)
    yield "PyHessian", ((f"tol={tol:g}", _pyhessian(products, tol, seed)) for tol in _PYHESSIAN_TOLS)


def _ours(products: Products, seed: int) -> Pairs:
    result = lanczos(products.operator, K, tol=TOL, seed=seed, vectors=True, progress=False)
    assert result.eigenvectors is not None
    return Pairs(result.eigenvalues, result.eigenvectors, result.num_matvecs)


def _eigenthings(known: Remembered, steps: int, seed: int) -> Pairs:
    operator = LambdaOperator(known, known.product.operator.n)
    found = eigenthings_lanczos(operator, k=K, max_iter=steps, which="LA", seed=seed)
    return Pairs(found.eigenvalues, found.eigenvectors, steps)


def _eigsh(products: Products, tol: float, ncv: int | None, seed: int) -> Pairs:
    n, before = products.operator.n, products.spent

    def matvec(v: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        return products(torch.from_numpy(v.ravel().copy())).numpy()

    start = np.random.default_rng(seed).standard_normal(n, dtype=np.float32)
    operator = ScipyOperator((n, n), matvec=matvec, dtype=np.float32)
    values, vectors = eigsh(operator, k=K, which="LA", tol=tol, ncv=ncv, v0=start)
    return Pairs(torch.from_numpy(values), torch.from_numpy(vectors.T.copy()), products.spent - before)


def _pyhessian(products: Products, tol: float, seed: int) -> Pairs:
    before = products.spent
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        values, vectors = Guest(products).eigenvalues(maxIter=_PYHESSIAN_STEPS, tol=tol, top_n=K)
    rows = torch.stack([products.parameters.flatten(vector) for vector in vectors])
    return Pairs(torch.tensor(values), rows, products.spent - before)


class Guest(pyhessian.hessian):
    """PyHessian with our products."""

    def __init__(self, products: Products) -> None:
        self.products = products
        self.model = products.operator.objective.model
        self.params = list(self.model.parameters())
        self.device, self.full_dataset = "cpu", True

    def dataloader_hv_product(self, v: list[Tensor]) -> tuple[float, list[Tensor]]:
        """Return the Rayleigh quotient and the product."""
        flat = self.products.parameters.flatten(v)
        image = self.products(flat)
        return torch.dot(image, flat).item(), self.products.parameters.split(image)


class Remembered:
    """Products that are not computed twice for the same vector: a longer run repeats the steps of a shorter one."""

    def __init__(self, product: Products) -> None:
        self.product = product
        self._known: list[tuple[Tensor, Tensor]] = []

    def __call__(self, v: Tensor) -> Tensor:
        """Return the product, from memory where the same bits were multiplied before."""
        for known, image in self._known:
            if torch.equal(known, v):
                return image.clone()
        image = self.product(v)
        self._known.append((v.clone(), image.clone()))
        return image


def run(name: str, seeds: int) -> None:
    """Train the network ``name`` and print what suffices for each method and seed."""
    problem = PROBLEMS[name]()
    print(problem, flush=True)
    judge = Judge(problem)
    products = Products(judge)
    table = []
    with judge.objective.session():
        for seed in range(seeds):
            for method, tries in searches(products, seed):
                setting, pairs, accuracy = _first_sufficient(judge, tries, values_only=method == "PyHessian")
                errors = [f"{accuracy.error:.0e}", f"{accuracy.residual:.0e}"]
                reached = ["reached" if ok else "MISSED" for ok in (accuracy.values_reached, accuracy.pairs_reached)]
                table.append([method, seed, setting, pairs.products, *errors, *reached])
                print("  " + ", ".join(map(str, table[-1])), flush=True)
    table.sort(key=lambda row: row[0])
    headers = ["method", "seed", "loosest setting", "products", "values off by", "residual", "values", "pairs"]
    print(tabulate(table, headers=headers, disable_numparse=True))


def _first_sufficient(judge: Judge, tries: Iterator[Try], *, values_only: bool) -> tuple[str, Pairs, Accuracy]:
    """Return the first setting that reaches the accuracy, or the last one tried."""
    judged = []
    for setting, pairs in tries:
        accuracy = judge(pairs)
        judged.append((setting, pairs, accuracy))
        if accuracy.values_reached and (values_only or accuracy.pairs_reached):
            break
    return judged[-1]


def main() -> None:
    parser = argparse.ArgumentParser(description="What each peer has to be told to be as accurate as sharpness.")
    parser.add_argument("--model", choices=sorted(PROBLEMS), help="one network instead of both")
    parser.add_argument("--seeds", type=int, default=3, help="how many starting vectors (default 3)")
    options = parser.parse_args()
    for name in [options.model] if options.model else sorted(PROBLEMS):
        run(name, options.seeds)


if __name__ == "__main__":
    main()
