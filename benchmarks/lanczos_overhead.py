"""Products that Lanczos spends past the first step at which a dense check of the Ritz pairs would have accepted them.

    python -m benchmarks.lanczos_overhead [--json FILE]

On matrices with known spectra; where the time of a run on a network goes is told by `benchmarks.profile`.
"""

from __future__ import annotations

import argparse
import itertools
import json
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tabulate import tabulate
from torch import Tensor

from benchmarks.machine import environment
from sharpness.linalg import DenseOperator, lanczos
from sharpness.linalg.krylov import KrylovSpace
from sharpness.linalg.which import select

_SEEDS = range(3)
_SIZES = (200, 500, 1000)
_WANTED = (1, 5, 10)
_TOLS = (1e-3, 1e-6)

Floats = np.ndarray[Any, np.dtype[np.float64]]


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
    parser = argparse.ArgumentParser(description="Products that Lanczos spends past the first step that would do.")
    parser.add_argument("--json", type=Path, help="write the numbers and the environment to this file")
    options = parser.parse_args()
    rows = excess_table()
    _print_excess(rows)
    if options.json:
        document = {"environment": environment(), "excess": rows}
        options.json.write_text(json.dumps(document, indent=1) + "\n")
        print(f"numbers: {options.json}")


if __name__ == "__main__":
    main()
