"""What Lanczos costs beyond the products it cannot do without.

    python -m benchmarks.lanczos_overhead [--model mlp|resnet20] [--repeat N] [--patience SECONDS] [--json FILE]

First, the share of the time of a top-5 run on a network that is not spent in products. Second, the products spent past
the first step at which a dense check of the Ritz pairs would have accepted them, on matrices with known spectra.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from tabulate import tabulate
from torch import Tensor
from torch.nn import functional

import sharpness
from benchmarks.machine import Clock, environment
from benchmarks.methods import TOL, K
from benchmarks.models import PROBLEMS, Problem
from sharpness import HessianOperator, Objective
from sharpness.linalg import DenseOperator, lanczos
from sharpness.linalg.krylov import KrylovSpace
from sharpness.linalg.which import select

_SEEDS = range(3)
_SIZES = (200, 500, 1000)
_WANTED = (1, 5, 10)
_TOLS = (1e-3, 1e-6)
_PARTS = ("basis", "tridiagonal", "vectors", "check", "rounding")  # of a run, beside its products

Floats = np.ndarray[Any, np.dtype[np.float64]]


def shares(problem: Problem, repeat: int, clock: Clock) -> dict[str, Any]:
    """Return which parts of a top-5 run take which share of its time; medians over ``repeat`` runs."""
    runs = []
    for _ in range(repeat):
        (result, spent), timing = clock.time(lambda: _instrumented(problem))
        total, products = timing.seconds, spent["products"]
        runs.append(
            {
                "seconds": total,
                "num_matvecs": result.num_matvecs,
                "products": products / total,
                "basis": spent["basis"] / total,
                "tridiagonal": spent["ritz"] / total,
                "vectors": spent["vectors"] / total,
                "check": spent["check"] / total,
                "rounding": spent["rounding"] / total,
                "overhead": 1 - products / total,
                "others": timing.others,
            }
        )
    median = {key: statistics.median(run[key] for run in runs) for key in runs[0]}
    median["rest"] = median["overhead"] - sum(median[key] for key in _PARTS)
    return {"model": problem.name, "images": problem.num_samples, **median, "runs": runs}


def _instrumented(problem: Problem) -> tuple[sharpness.EigenResult, Counter[str]]:
    """Return the result of a top-5 run and the seconds spent in its parts."""
    spent: Counter[str] = Counter()
    with (
        _stopwatch(HessianOperator, "_matvec", "products", spent),
        _stopwatch(KrylovSpace, "request", "basis", spent),
        _stopwatch(KrylovSpace, "absorb", "basis", spent),
        _stopwatch(KrylovSpace, "ritz", "ritz", spent),
        _stopwatch(KrylovSpace, "vectors", "vectors", spent),
        _stopwatch(Objective, "check", "check", spent),
        _stopwatch(HessianOperator, "product_error", "rounding", spent),
    ):
        result = sharpness.top_eigenvalues(
            problem.model, problem.loader, functional.cross_entropy, k=K, tol=TOL, vectors=True, progress=False
        )
    return result, spent


@contextmanager
def _stopwatch(owner: type, name: str, part: str, spent: Counter[str]) -> Iterator[None]:
    """Add the seconds that the method ``name`` of ``owner`` takes to ``spent[part]``."""
    inner: Callable[..., Any] = getattr(owner, name)

    @functools.wraps(inner)
    def timed(*args: Any, **options: Any) -> Any:
        started = time.perf_counter()
        try:
            return inner(*args, **options)
        finally:
            spent[part] += time.perf_counter() - started

    with mock.patch.object(owner, name, timed):
        yield


def bare_product(problem: Problem, repeat: int = 3) -> float:
    """Return the time of the library's product over that of its calls of autograd alone; median of paired runs."""
    objective = Objective(problem.model, problem.loader, functional.cross_entropy, progress=False)
    v = torch.randn(objective.n, generator=torch.Generator().manual_seed(0))
    parameters = list(problem.model.parameters())
    gradients = []
    for inputs, targets in problem.loader:
        loss = functional.cross_entropy(problem.model(inputs), targets)
        gradients.append(torch.autograd.grad(loss, parameters, create_graph=True))
    pieces = objective.parameters.split(v)
    ratios = []
    with objective.session():
        objective.hvp(v)
        for _ in range(repeat + 1):
            started = time.perf_counter()
            for gradient in gradients:
                torch.autograd.grad(gradient, parameters, pieces, retain_graph=True)
            between = time.perf_counter()
            objective.hvp(v)
            ratios.append((time.perf_counter() - between) / (between - started))
    return statistics.median(ratios[1:])


def spectra(n: int, rng: np.random.Generator) -> dict[str, Floats]:
    """Return eigenvalues by the name of their distribution."""
    symmetric = rng.standard_normal((n, n))
    bulk = 0.02 * rng.standard_normal(n - 10) ** 2
    bulk[: n // 10] *= -0.2
    i = np.arange(n)
    return {
        "random matrix": np.linalg.eigvalsh(symmetric + symmetric.T),
        "uniform": rng.uniform(0, 1, n),
        "geometric, ratio 0.9": 0.9**i,
        "geometric, ratio 0.99": 0.99**i,
        "network: 10 outliers and a bulk": np.concatenate([np.geomspace(60, 0.8, 10), bulk]),
        "indefinite: +-1/i": np.where(i % 2, -1.0, 1.0) / (1 + i // 2),
        "close: ten within 2 % above a bulk": np.concatenate([np.linspace(1.0, 0.98, 10), 5 * bulk]),
    }


@dataclass(frozen=True, kw_only=True)
class Excess:
    """One run of `lanczos` on a matrix beside a dense check of each step.

    Attributes:
        first: First acceptable step: each of the top ``k`` Ritz pairs, formed and multiplied by the matrix itself, has
            a residual of at most ``tol`` of its value.
        first_error: How far the values are off at that step from the eigenvalues of their rank, in units of ``tol``.
        spent: Products that `lanczos` spends.
        error: How far its values are off.
    """

    first: int
    first_error: float
    spent: int
    error: float


def excess(eigenvalues: Floats, k: int, tol: float, seed: int) -> Excess:
    """Run `lanczos` for the top ``k``, and the same steps with a dense check."""
    operator = DenseOperator(_rotated(eigenvalues, seed))
    true = np.sort(eigenvalues)[::-1][:k]
    space = KrylovSpace(operator, torch.Generator().manual_seed(seed))
    accepted = False
    while not accepted:
        space.absorb(operator.matvec(space.request()))
        theta, s, _ = space.ritz()
        chosen = select(theta, "largest", k)
        accepted = space.size >= k and _acceptable(operator, theta[chosen], space.vectors(s[:, chosen]), tol)
    result = lanczos(operator, k, tol=tol, seed=seed, num_matvecs=operator.n, progress=False, on_failure="raise")
    return Excess(
        first=space.size,
        first_error=float(np.max(np.abs(theta[chosen] - true) / (tol * np.abs(true)))),
        spent=result.num_matvecs,
        error=float(np.max(np.abs(result.eigenvalues.numpy() - true) / (tol * np.abs(true)))),
    )


def _acceptable(operator: DenseOperator, theta: Floats, vectors: Tensor, tol: float) -> bool:
    """Return whether the pairs have small residuals by the matrix itself."""
    values = torch.from_numpy(theta.copy())
    unit = vectors / torch.linalg.vector_norm(vectors, dim=1, keepdim=True)
    residuals = torch.linalg.vector_norm(unit @ operator.matrix - values[:, None] * unit, dim=1).numpy()
    return bool(np.all(residuals <= tol * np.abs(theta)))


def _rotated(eigenvalues: Floats, seed: int) -> Tensor:
    """Return a matrix with the given eigenvalues and random eigenvectors."""
    rng = np.random.default_rng(1000 + seed)
    q, _ = np.linalg.qr(rng.standard_normal((len(eigenvalues), len(eigenvalues))))
    matrix = torch.from_numpy((q * eigenvalues) @ q.T)
    return (matrix + matrix.T) / 2


def excess_table() -> list[dict[str, Any]]:
    """Return one row per spectrum, size, ``k`` and tolerance, with one entry per seed."""
    rows = []
    for n in _SIZES:
        for name, eigenvalues in spectra(n, np.random.default_rng(n)).items():
            for k, tol in itertools.product(_WANTED, _TOLS):
                found = [asdict(excess(eigenvalues, k, tol, seed)) for seed in _SEEDS]
                columns = {key: [run[key] for run in found] for key in found[0]}
                rows.append({"spectrum": name, "n": n, "k": k, "tol": tol, **columns})
    return rows


def _print_shares(found: list[dict[str, Any]]) -> None:
    headers = [
        "network",
        "images",
        "products",
        "not in products",
        "basis",
        "tridiagonal",
        "Ritz vectors",
        "same loss twice",
        "rounding",
    ]
    headers += ["rest", "product / autograd alone"]
    lines = [
        [
            row["model"],
            row["images"],
            row["num_matvecs"],
            *(f"{100 * row[part]:.1f} %" for part in ("overhead", *_PARTS, "rest")),
            f"{row['product_over_autograd']:.2f}",
        ]
        for row in found
    ]
    print(tabulate(lines, headers=headers, disable_numparse=True))


def _print_excess(rows: list[dict[str, Any]]) -> None:
    headers = ["spectrum", "n", "k", "tol", "first acceptable step", "products spent", "value error / tol"]
    lines = [
        [row["spectrum"], row["n"], row["k"], f"{row['tol']:g}", *_per_seed(row), f"{max(row['error']):.1g}"]
        for row in rows
    ]
    print(tabulate(lines, headers=headers, disable_numparse=True))
    runs = [
        run for row in rows for run in zip(row["first"], row["first_error"], row["spent"], row["error"], strict=True)
    ]
    honest = Counter(spent - first for first, first_error, spent, _ in runs if first_error <= 1)
    missed = Counter(spent - first for first, first_error, spent, _ in runs if first_error > 1)
    print(f"{len(runs)} runs; products past the first acceptable step, and in how many runs: {_counts(honest)}")
    print(f"where that step had missed a value (!), closer to its neighbour than a few tol: {_counts(missed)}")
    print(f"runs in which a value was still missed at the end: {sum(error > 1 for *_, error in runs)}")


def _per_seed(row: dict[str, Any]) -> tuple[str, str]:
    """Return the first acceptable steps, with a mark where the values were not right yet, and the products spent."""
    steps = zip(row["first"], row["first_error"], strict=True)
    return " ".join(f"{step}{'!' if error > 1 else ''}" for step, error in steps), " ".join(map(str, row["spent"]))


def _counts(counter: Counter[int]) -> str:
    return ", ".join(f"{key} in {counter[key]}" for key in sorted(counter)) or "none"


def main() -> None:
    parser = argparse.ArgumentParser(description="What Lanczos costs beyond its products.")
    parser.add_argument("--model", choices=sorted(PROBLEMS), help="one network instead of both")
    parser.add_argument("--repeat", type=int, default=3, help="how often each network is measured (default 3)")
    parser.add_argument(
        "--patience", type=float, default=0.0, help="seconds to spend on waiting for a quiet machine (default 0)"
    )
    parser.add_argument("--json", type=Path, help="write the numbers and the environment to this file")
    options = parser.parse_args()
    clock, found = Clock(options.patience), []
    for name in [options.model] if options.model else sorted(PROBLEMS):
        problem = PROBLEMS[name]()
        print(problem, flush=True)
        _instrumented(problem)  # pays for what is only paid once
        found.append({**shares(problem, options.repeat, clock), "product_over_autograd": bare_product(problem)})
    _print_shares(found)
    rows = excess_table()
    _print_excess(rows)
    if options.json:
        document = {"environment": environment(), "shares": found, "excess": rows}
        options.json.write_text(json.dumps(document, indent=1) + "\n")
        print(f"numbers: {options.json}")


if __name__ == "__main__":
    main()
