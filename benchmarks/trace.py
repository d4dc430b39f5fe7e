"""Trace of a trained network's Hessian to 2 % at 95 %: this library beside PyHessian and hessian-eigenthings.

    python -m benchmarks.trace [--model gpt|cifar|mlp|resnet20] [--samples N] [--text FILE] [--weights FILE] [--seeds N]

The truth is this library's answer with far more products. Each method is given the smallest number of products, on
a grid, with which 1.96 root-mean-square errors over the seeds are within the tolerance; then all are timed with these
numbers, in turns. A number is given up as soon as the seeds so far exclude it.
The forms that PyHessian averages are independent of each other, so the number it needs follows from their spread, and
its time from that of one product: it would be out of reach otherwise. What it returns by its own rule is shown too.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import itertools
import json
import math
import statistics
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyhessian
import torch
from hessian_eigenthings import HessianOperator as EigenthingsOperator
from hessian_eigenthings import trace as eigenthings_trace
from tabulate import tabulate
from torch import nn
from torch.nn import functional

import sharpness
from benchmarks.machine import environment, timed
from benchmarks.models import PROBLEMS, Problem
from benchmarks.real import REAL, cifar, gpt

_GRID = (12, 18, 24, 30, 36, 48, 60, 78, 99, 126, 159, 201, 252, 318, 399, 504, 636, 801)
_TIMED = 10  # forms of PyHessian in each turn
_Z = 1.96

Run = Callable[[Problem, int, int], tuple[float, float]]  # (problem, products, seed) -> estimate and standard error


@dataclass(frozen=True)
class Need:
    """What a method needs to be within the tolerance at 95 %: products, measured or extrapolated."""

    method: str
    products: float
    note: str
    seconds: float = math.nan


def eigenthings(problem: Problem, budget: int, seed: int) -> tuple[float, float]:
    """Return the trace by the peer's Hutch++; its mean over batches is corrected for their sizes."""
    share = len(problem.loader) / sum(targets.numel() for _, targets in problem.loader)

    def loss(model: nn.Module, batch: Any) -> Any:
        inputs, targets = batch
        return functional.cross_entropy(model(inputs), targets) * (share * targets.numel())

    operator = EigenthingsOperator(copy.deepcopy(problem.model), problem.loader, loss)
    result = eigenthings_trace(operator, num_matvecs=budget, method="hutch++", seed=seed)
    return result.estimate, result.stderr


def ours(method: str) -> Run:
    """Return a function that spends so many products on the trace."""

    def run(problem: Problem, budget: int, seed: int) -> tuple[float, float]:
        result = sharpness.trace(
            problem.model, problem.loader, method=method, num_matvecs=budget, seed=seed, on_failure="ignore"
        )
        return result.value, result.stderr

    return run


def least(name: str, run: Run, problem: Problem, truth: float, options: Any) -> Need:
    """Return the first number of products on the grid that is enough."""
    most = options.seeds * (options.tol * truth / _Z) ** 2  # that the squared errors may add up to
    for budget in [b for b in _GRID if b >= options.start]:
        errors, doubts = [], []
        for seed in range(options.seeds):
            value, stderr = run(problem, budget, seed)
            errors.append(value - truth)
            doubts.append(stderr)
            if sum(e * e for e in errors) > most:
                break
        error, doubt = (100 * _Z * _root_mean_square(x) / truth for x in (errors, doubts))
        enough = len(errors) == options.seeds and error <= 100 * options.tol
        print(
            f"  {name}, {budget} products, {len(errors)} seeds: {error:.2g} %, by its errors {doubt:.2g} %", flush=True
        )
        if enough:
            return Need(name, budget, f"± {error:.2g} %, by its own errors {doubt:.2g} %")
    return Need(name, budget, f"still ± {error:.2g} %")


def stopped(problem: Problem, truth: float, options: Any) -> str:
    """Return what this library spends and says when it is only told the tolerance."""
    results = [
        sharpness.trace(problem.model, problem.loader, tol=options.tol, seed=seed) for seed in range(options.seeds)
    ]
    within = sum(abs(r.value - truth) <= options.tol * truth for r in results)
    covered = sum(r.interval[0] <= truth <= r.interval[1] for r in results)
    products = statistics.fmean(r.num_matvecs for r in results)
    return (
        f"sharpness by its own rule: {products:.0f} products on average; within {100 * options.tol:g} % in {within}, "
        f"its interval holds the truth in {covered} of {len(results)}"
    )


def pyhessian_forms(problem: Problem, seed: int, **options: Any) -> list[float]:
    """Return the forms whose mean is PyHessian's trace, as many as its options make it draw."""
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(seed)
        model = copy.deepcopy(problem.model)
        several = len(problem.loader) > 1
        data: dict[str, Any] = {"dataloader": problem.loader} if several else {"data": problem.loader[0]}
        return pyhessian.hessian(model, nn.CrossEntropyLoss(), cuda=False, **data).trace(**options)


def pyhessian_needs(problem: Problem, truth: float, options: Any) -> tuple[Need, str]:
    """Return how many of PyHessian's forms have a mean within the tolerance at 95 %, and what its own rule returns."""
    runs = [pyhessian_forms(problem, seed) for seed in range(options.seeds)]
    forms = pyhessian_forms(problem, options.seeds, maxIter=options.forms, tol=0.0)
    needed = (_Z * statistics.stdev(forms) / (options.tol * truth)) ** 2
    errors = [statistics.fmean(run) / truth - 1 for run in runs]
    said = (
        f"PyHessian by its own rule: {min(map(len, runs))} to {max(map(len, runs))} products; off by "
        + ", ".join(f"{100 * e:+.0f}" for e in errors)
        + f" %; within {100 * options.tol:g} % in {sum(abs(e) <= options.tol for e in errors)} of {len(runs)}"
    )
    return Need("PyHessian", needed, f"from the spread of {len(forms)} forms"), said


def measured(needs: list[Need], runs: dict[str, Run], problem: Problem, repeat: int) -> list[Need]:
    """Return the needs with their times: medians of runs in turns, so that a busy machine is busy for all."""
    found: dict[str, list[float]] = {need.method: [] for need in needs}
    for seed, need in itertools.product(range(repeat), needs):
        if need.method in runs:
            seconds = timed(lambda n=need, s=seed: runs[n.method](problem, int(n.products), s))[1].seconds
        else:
            start, more = (
                timed(lambda k=k, s=seed: pyhessian_forms(problem, s, maxIter=k, tol=0.0))[1].seconds
                for k in (1, 1 + _TIMED)
            )
            seconds = start + (more - start) / _TIMED * (need.products - 1)
        found[need.method].append(seconds)
    return [dataclasses.replace(need, seconds=statistics.median(found[need.method])) for need in needs]


def _root_mean_square(values: list[float]) -> float:
    return math.sqrt(statistics.fmean(value * value for value in values))


def load(name: str, options: Any) -> Problem:
    """Return a trained network, on fewer samples if asked for."""
    if name == "gpt":
        chosen = {"sequences": options.samples, "steps": options.steps, "weights": options.weights}
        return gpt(options.text, **{key: value for key, value in chosen.items() if value is not None})
    if name == "cifar":
        return cifar(options.samples or 128)
    problem = PROBLEMS[name]()
    if options.samples:
        inputs, targets = (torch.cat(parts)[: options.samples] for parts in zip(*problem.loader, strict=True))
        problem = Problem(**{**vars(problem), "loader": list(zip(inputs.split(100), targets.split(100), strict=True))})
    return problem


def run(name: str, options: Any) -> dict[str, Any]:
    """Train a network, measure all methods, print the table and return the numbers."""
    problem = load(name, options)
    print(problem, flush=True)
    exact = sharpness.trace(
        problem.model, problem.loader, num_matvecs=options.truth_products, seed=999, on_failure="ignore"
    )
    truth = exact.value
    print(f"truth: {exact}", flush=True)
    runs = {"sharpness, XTrace": ours("xtrace"), "hessian-eigenthings, Hutch++": eigenthings}
    if not options.brief:
        runs["sharpness, Hutch++"] = ours("hutchpp")
    needs: list[Need] = []
    for method, run_it in runs.items():
        needs.append(least(method, run_it, problem, truth, options))
    peer, said = pyhessian_needs(problem, truth, options)
    needs = measured([*needs, peer], runs, problem, options.repeat)
    first = needs[0]
    rows = [
        [
            n.method,
            f"{n.products:.0f}",
            f"{n.products / first.products:.1f}",
            f"{n.seconds:.1f}",
            f"{n.seconds / first.seconds:.1f}",
            n.note,
        ]
        for n in needs
    ]
    headers = ["method", "products", "ratio", "seconds", "ratio", ""]
    print(tabulate(rows, headers=headers, disable_numparse=True))
    print(said)
    if not options.brief:
        print(stopped(problem, truth, options))
    return {
        "model": name,
        "samples": problem.num_samples,
        "loss": problem.loss,
        "truth": truth,
        "needs": [vars(n) for n in needs],
        "PyHessian": said,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="Trace to 2 % at 95 %: sharpness beside its peers.")
    parser.add_argument("--model", choices=sorted({**PROBLEMS, **REAL}), help="one network instead of gpt and cifar")
    parser.add_argument("--samples", type=int, help="only the first so many images or sequences")
    parser.add_argument("--text", type=Path, help="what the GPT learns (plain or gzip; default: Python's help)")
    parser.add_argument("--steps", type=int, help="how long the GPT is trained")
    parser.add_argument("--weights", type=Path, help="of the GPT: read if the file is there, written if not")
    parser.add_argument("--start", type=int, default=0, help="the fewest products to try")
    parser.add_argument("--brief", action="store_true", help="XTrace and the peers only")
    parser.add_argument("--seeds", type=int, default=8, help="how often each method runs (default 8)")
    parser.add_argument("--tol", type=float, default=0.02, help="relative tolerance (default 0.02)")
    parser.add_argument("--forms", type=int, default=40, help="of PyHessian, for their spread (default 40)")
    parser.add_argument("--repeat", type=int, default=3, help="how often each method is timed (default 3)")
    parser.add_argument("--truth-products", type=int, default=600, help="products spent on the truth (default 600)")
    parser.add_argument("--json", type=Path, help="write the numbers and the environment to this file")
    options = parser.parse_args()
    results = [run(name, options) for name in ([options.model] if options.model else sorted(REAL))]
    if options.json:
        found = {"environment": environment(), "results": results}
        options.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
