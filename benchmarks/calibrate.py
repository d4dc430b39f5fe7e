"""The loosest setting with which each peer reaches the accuracy, for several seeds.

    python -m benchmarks.calibrate [--model NAME ...] [--k N ...] [--no-trace] [--seeds N] [--write]

Lanczos and ARPACK have to reach it in the residuals, PyHessian, which does not look at residuals, in the values only.
The peers' own algorithms run over this library's products, which are the same numbers and cheaper; so this counts
products and measures accuracy, and no time. What it finds is written to `settings.json`, where the suite reads it.
"""

from __future__ import annotations

import argparse
import math
import statistics
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pyhessian
import torch
from curvlinops import xtrace
from hessian_eigenthings import LambdaOperator
from hessian_eigenthings import lanczos as eigenthings_lanczos
from hessian_eigenthings import trace as eigenthings_trace
from scipy.sparse.linalg import ArpackNoConvergence, eigsh
from scipy.sparse.linalg import LinearOperator as ScipyOperator
from torch import Tensor

from benchmarks.judge import Judge
from benchmarks.methods import TRACE_TOL, WANTED, Outcome, Pairs
from benchmarks.models import Problem
from benchmarks.problems import FULL, UnavailableError, load
from benchmarks.settings import Settings, Top, Trace, read, write

_EIGSH_TOL = 0.1  # looser than it sounds: ARPACK goes on until the basis is full
_PYHESSIAN_TOLS = (1e-3, 3e-4, 1e-4, 3e-5, 1e-5, 3e-6, 1e-6)
_PYHESSIAN_STEPS = 300
_BUDGETS = (12, 18, 24, 30, 36, 48, 60, 78, 102, 126, 162, 204, 252, 318, 402)
_FORMS = 40  # of PyHessian's trace, to know their spread
_Z = 1.96


class Products:
    """The products of the judge's operator, none of which is computed twice.

    A longer run of a deterministic algorithm repeats the steps of a shorter one.
    """

    def __init__(self, judge: Judge) -> None:
        self.judge, self.n = judge, judge.operator.n
        self._known: list[tuple[Tensor, Tensor]] = []

    def __call__(self, v: Tensor) -> Tensor:
        """Return the product, from memory where the same bits were multiplied before."""
        for known, image in self._known:
            if torch.equal(known, v):
                return image.clone()
        image = self.judge.operator.matvec(v)
        self._known.append((v.clone(), image.clone()))
        return image

    def forget(self) -> None:
        """Forget all products."""
        self._known = []


def calibrated(problem: Problem, judge: Judge, wanted: list[int], *, trace: bool, known: Settings | None) -> Settings:
    """Return settings for the peers, those that are known or those that are found now with one seed."""
    found = Settings() if known is None else known
    missing = [k for k in wanted if k not in found.top]
    if missing or (trace and found.trace is None):
        print(
            f"  {problem.name} has no settings for {missing or 'the trace'} yet: found now, with one seed", flush=True
        )
    return calibrate(problem, judge, missing, trace=trace and found.trace is None, seeds=1, known=found)


def calibrate(
    problem: Problem, judge: Judge, wanted: list[int], *, trace: bool, seeds: int, known: Settings
) -> Settings:
    """Return the settings that suffice for every seed, PyHessian's for most."""
    with judge.objective.session():
        top = {k: _top(judge, k, seeds) for k in wanted}
        budgets = _trace(problem, judge, seeds) if trace else known.trace
    judge.objective.release()
    return Settings(top={**known.top, **top}, trace=budgets)


def _top(judge: Judge, k: int, seeds: int) -> Top:
    found: dict[str, list[float]] = {"eigenthings": [], "ncv": [], "pyhessian": []}
    for seed in range(seeds):
        products, most = Products(judge), 8 * k + 40
        steps = range(k + 2, most)
        found["eigenthings"].append(_first(judge, k, seed, steps, lambda s: _eigenthings(products, k, s, seed)))  # noqa: B023
        found["ncv"].append(_first(judge, k, seed, steps, lambda s: _eigsh(products, k, s, seed)))  # noqa: B023
        products.forget()
        tols = _PYHESSIAN_TOLS
        found["pyhessian"].append(_first(judge, k, seed, tols, lambda t: _pyhessian(products, k, t, seed), True))  # noqa: B023
    return Top(
        pyhessian_tol=statistics.median_high(found["pyhessian"]),
        pyhessian_steps=_PYHESSIAN_STEPS,
        eigenthings_steps=int(max(found["eigenthings"])),
        eigsh_tol=_EIGSH_TOL,
        eigsh_ncv=int(max(found["ncv"])),
    )


def _first(
    judge: Judge, k: int, seed: int, tries: Any, run: Callable[[Any], Pairs], values_only: bool = False
) -> float:
    """Return the first setting that reaches the accuracy, or the last one tried."""
    [quantity] = [name for name, number in WANTED.items() if number == k]
    for setting in tries:
        accuracy = judge(quantity, Outcome(run(setting), 0, 0), seed, values_only=values_only)
        if accuracy.reached:
            break
    word = "reached with" if accuracy.reached else "MISSED even with"
    residual = "" if accuracy.residual is None else f", residual {accuracy.residual:.0e}"
    print(f"    k={k}, seed {seed}: {word} {setting:g}, error {accuracy.error:.0e}{residual}", flush=True)
    return setting


def _eigenthings(products: Products, k: int, steps: int, seed: int) -> Pairs:
    found = eigenthings_lanczos(LambdaOperator(products, products.n), k=k, max_iter=steps, which="LA", seed=seed)
    return Pairs(found.eigenvalues, found.eigenvectors)


def _eigsh(products: Products, k: int, ncv: int, seed: int) -> Pairs:
    def matvec(v: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        return products(torch.from_numpy(v.ravel().copy())).numpy()

    start = np.random.default_rng(seed).standard_normal(products.n, dtype=np.float32)
    operator = ScipyOperator((products.n, products.n), matvec=matvec, dtype=np.float32)
    try:
        values, vectors = eigsh(operator, k=k, which="LA", tol=_EIGSH_TOL, ncv=ncv, v0=start, maxiter=1)
    except ArpackNoConvergence:  # it would restart: a larger basis is cheaper
        return Pairs(torch.full((k,), math.nan), torch.eye(k, products.n))
    return Pairs(torch.from_numpy(values), torch.from_numpy(vectors.T.copy()))


def _pyhessian(products: Products, k: int, tol: float, seed: int) -> Pairs:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        values, rows = Guest(products.judge).eigenvalues(maxIter=_PYHESSIAN_STEPS, tol=tol, top_n=k)
    parameters = products.judge.objective.parameters
    return Pairs(torch.tensor(values), torch.stack([parameters.flatten(row) for row in rows]))


class Guest(pyhessian.hessian):
    """PyHessian with our products."""

    def __init__(self, judge: Judge) -> None:
        self.judge = judge
        self.model = judge.objective.model
        self.params = [p for p in self.model.parameters() if p.requires_grad]
        self.device, self.full_dataset = judge.problem.device, True

    def dataloader_hv_product(self, v: list[Tensor]) -> tuple[float, list[Tensor]]:
        """Return the Rayleigh quotient and the product."""
        parameters = self.judge.objective.parameters
        flat = parameters.flatten(v)
        image = self.judge.operator.matvec(flat)
        return torch.dot(image, flat).item(), parameters.split(image)


def _trace(problem: Problem, judge: Judge, seeds: int) -> Trace:
    """Return the budgets with which 1.96 root-mean-square errors are within the tolerance; at least four seeds."""
    seeds = max(seeds, 4)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        forms = Guest(judge).trace(maxIter=_FORMS, tol=-math.inf)
    spread = _Z * statistics.stdev(forms) / (TRACE_TOL * abs(judge.trace))
    n = problem.num_parameters

    def hutchpp(budget: int, seed: int) -> float:
        operator = LambdaOperator(judge.operator.matvec, n)
        return eigenthings_trace(operator, num_matvecs=budget, method="hutch++", seed=seed).estimate

    def curvlinops(budget: int, seed: int) -> float:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return float(xtrace(_Matrix(judge), budget))

    return Trace(
        pyhessian=max(2, math.ceil(spread**2)),
        eigenthings=_budget("Hutch++", judge.trace, hutchpp, seeds, n),
        curvlinops=_budget("XTrace", judge.trace, curvlinops, seeds, n),
    )


class _Matrix:
    """The judge's operator, as curvlinops wants to see one."""

    def __init__(self, judge: Judge) -> None:
        self.operator = judge.operator
        self.shape = (judge.operator.n, judge.operator.n)
        self.device, self.dtype = judge.problem.device, judge.objective.dtype

    def __matmul__(self, v: Tensor) -> Tensor:
        return self.operator.matvec(v) if v.ndim == 1 else self.operator.matmat(v)


def _budget(name: str, truth: float, run: Callable[[int, int], float], seeds: int, n: int) -> int:
    for budget in [b for b in _BUDGETS if b < n]:
        errors = [(run(budget, seed) - truth) / truth for seed in range(seeds)]
        error = _Z * math.sqrt(statistics.fmean(e * e for e in errors))
        print(f"    trace by {name}, {budget} products: ± {100 * error:.2g} %", flush=True)
        if error <= TRACE_TOL:
            break
    return budget


def main() -> None:
    parser = argparse.ArgumentParser(description="What each peer has to be told to be as accurate as sharpness.")
    parser.add_argument("--model", choices=list(FULL), nargs="+", default=list(FULL), help="(default: all)")
    parser.add_argument("--k", type=int, choices=WANTED.values(), nargs="*", default=list(WANTED.values()))
    parser.add_argument("--no-trace", dest="trace", action="store_false", help="eigenvalues only")
    parser.add_argument("--seeds", type=int, default=3, help="how many starting vectors (default 3)")
    parser.add_argument("--write", action="store_true", help="write what is found to settings.json")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    for name in options.model:
        try:
            problem = load(name)
        except UnavailableError as error:
            print(error)
            continue
        print(problem, flush=True)
        settings = read()
        judge, known = Judge(problem, max(options.k, default=1)), settings.get(name, Settings())
        settings[name] = calibrate(problem, judge, options.k, trace=options.trace, seeds=options.seeds, known=known)
        print(settings[name])
        if options.write:
            write(settings)


if __name__ == "__main__":
    main()
