"""Top-5 eigenvalues of a trained network's Hessian: this library beside its peers, in one run, on the same data.

    python -m benchmarks.top_eigenvalues [--model mlp|resnet20] [--repeat N] [--patience SECONDS] [--json FILE]

All methods take turns within each repeat, in an order that rotates; ratios are taken repeat by repeat.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from curvlinops import HessianLinearOperator
from tabulate import tabulate
from torch import nn

import sharpness
from benchmarks.judge import Accuracy, Judge
from benchmarks.machine import Clock, Timing, environment
from benchmarks.methods import TOL, K, Method, methods
from benchmarks.models import PROBLEMS, Problem


@dataclass
class Record:
    """All runs of a method."""

    method: Method
    timings: list[Timing] = field(default_factory=list)
    accuracies: list[Accuracy] = field(default_factory=list)
    products: list[int] = field(default_factory=list)

    def summary(self, reference: Record) -> dict[str, Any]:
        """Return the record beside that of the ``reference``, ready for JSON."""
        seconds = [timing.seconds for timing in self.timings]
        pairs = zip(seconds, reference.timings, strict=True)
        ratios = [own / other.seconds for own, other in pairs]
        return {
            "method": self.method.name,
            "settings": self.method.told,
            "seconds": statistics.median(seconds),
            "ratio": statistics.median(ratios),
            "ratios": ratios,
            "products": self.products,
            "worst_relative_error": max(accuracy.error for accuracy in self.accuracies),
            "worst_relative_residual": max(accuracy.residual for accuracy in self.accuracies),
            "values_reached": all(accuracy.values_reached for accuracy in self.accuracies),
            "pairs_reached": all(accuracy.pairs_reached for accuracy in self.accuracies),
            "disturbed_runs": sum(timing.disturbed for timing in self.timings),
            "timings": [asdict(timing) for timing in self.timings],
        }


def run(name: str, repeat: int, patience: float) -> dict[str, Any]:
    """Train the network ``name``, run all methods ``repeat`` times, print the table and return the numbers."""
    problem = PROBLEMS[name]()
    print(problem, flush=True)
    judge = Judge(problem)
    print(f"truth: {_listed(judge.truth.tolist())}, relative residuals at most {judge.doubt:.0e}", flush=True)
    warm_up(problem)
    clock, records = Clock(patience), [Record(method) for method in methods(name)]
    for i in range(repeat):
        shift = i % len(records)
        for record in records[shift:] + records[:shift]:
            _once(record, problem, i, judge, clock)
    rows = [record.summary(records[0]) for record in records]
    print(_table(rows))
    return {
        "model": name,
        "parameters": problem.num_parameters,
        "images": problem.num_samples,
        "batches": [len(targets) for _, targets in problem.loader],
        "training_loss": problem.loss,
        "training_accuracy": problem.accuracy,
        "k": K,
        "tol": TOL,
        "seeds": list(range(repeat)),
        "truth": judge.truth.tolist(),
        "truth_relative_residual": judge.doubt,
        "methods": rows,
    }


def warm_up(problem: Problem) -> None:
    """Pay for what is only paid once, with a few images: lazy imports and the first call of each kind of kernel."""
    inputs, targets = problem.loader[0]
    few = [(inputs[:8], targets[:8])]
    sharpness.top_eigenvalues(problem.model, few, num_matvecs=5, on_failure="ignore", progress=False)
    model = copy.deepcopy(problem.model)
    peer = HessianLinearOperator(
        model, nn.CrossEntropyLoss(), list(model.parameters()), few, check_deterministic=False
    ).to_scipy(dtype=np.float32)
    peer.matvec(np.ones(peer.shape[0], dtype=np.float32))


def _once(record: Record, problem: Problem, seed: int, judge: Judge, clock: Clock) -> None:
    model = copy.deepcopy(problem.model)
    pairs, timing = clock.time(lambda: record.method.run(model, problem, seed))
    record.timings.append(timing)
    record.products.append(pairs.products)
    record.accuracies.append(judge(pairs))
    note = f" (others took {timing.others:.0%} of the processors)" if timing.disturbed else ""
    print(f"  {record.method.name}: {timing.seconds:.1f} s, {pairs.products} products{note}", flush=True)


def _table(rows: list[dict[str, Any]]) -> str:
    headers = ["method", "settings", "seconds", "ratio", "products", "values off by", "residual", "values", "pairs"]
    lines = [
        [
            row["method"],
            row["settings"],
            f"{row['seconds']:.1f}" + ("*" if row["disturbed_runs"] else ""),
            f"{row['ratio']:.2f}",
            " ".join(map(str, row["products"])),
            f"{row['worst_relative_error']:.0e}",
            f"{row['worst_relative_residual']:.0e}",
            "reached" if row["values_reached"] else "MISSED",
            "reached" if row["pairs_reached"] else "MISSED",
        ]
        for row in rows
    ]
    legend = (
        f"values, pairs: whether all {K} eigenvalues are within {TOL:g} of the truth, and all residuals within {TOL:g} "
        "of their eigenvalues"
    )
    star = "\n*: other processes disturbed a run" if any(row["disturbed_runs"] for row in rows) else ""
    return f"{tabulate(lines, headers=headers, disable_numparse=True)}\n{legend}{star}"


def _listed(values: list[float]) -> str:
    return ", ".join(f"{value:.5g}" for value in values)


def main() -> None:
    parser = argparse.ArgumentParser(description="Top-5 Hessian eigenvalues: sharpness beside its peers.")
    parser.add_argument("--model", choices=sorted(PROBLEMS), help="one network instead of both")
    parser.add_argument("--repeat", type=int, default=1, help="how often each method runs (default 1)")
    parser.add_argument(
        "--patience", type=float, default=0.0, help="seconds to spend on waiting for a quiet machine (default 0)"
    )
    parser.add_argument("--json", type=Path, help="write the numbers and the environment to this file")
    options = parser.parse_args()
    found = {"environment": environment(), "results": []}
    print(", ".join(f"{key} {value}" for key, value in found["environment"].items()))
    for name in [options.model] if options.model else sorted(PROBLEMS):
        found["results"].append(run(name, options.repeat, options.patience))
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n")
        print(f"numbers: {options.json}")


if __name__ == "__main__":
    main()
