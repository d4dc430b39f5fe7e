"""This library's ways to each quantity: the default, and what its engine can be told."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from torch.nn import functional

import sharpness
from benchmarks.methods import (
    DRAWS,
    ITERATIONS,
    STEPS,
    TOL,
    TRACE_TOL,
    WANTED,
    Method,
    Outcome,
    Pairs,
    Rules,
    Run,
    direction,
    several,
)
from benchmarks.models import Problem
from sharpness import GGNOperator, HessianOperator, Objective

DEFAULT = "sharpness"
Options = dict[str, Any]

VARIANTS: dict[str, Options] = {
    DEFAULT: {},
    "sharpness, eager": {"compile": False},
    "sharpness, compiled": {"compile": True},
}
STREAMING: dict[str, Options] = {
    "sharpness, memory=0": {"memory": 0},
    "sharpness, memory=0, eager": {"memory": 0, "compile": False},
    "sharpness, memory=0, compiled": {"memory": 0, "compile": True},
}
_STREAMED = ("product", "ggn", "top5")  # quantities for which nothing kept is measured too


def methods(quantity: str) -> list[Method]:
    """Return this library's methods, the default first; those with options that it does not have are left out."""
    variants = {**VARIANTS, **(STREAMING if quantity in _STREAMED else {})}
    return [
        Method(name, _told(quantity, options), lambda p, s, o=options: _RUNS[quantity](p, s, o), ours=True)
        for name, options in variants.items()
        if options.keys() <= known().keys()
    ]


def known() -> dict[str, inspect.Parameter]:
    """Return the options that an objective takes."""
    return dict(inspect.signature(Objective).parameters)


def missing() -> list[str]:
    """Return the variants that this version of the library cannot be told."""
    return [name for name, options in {**VARIANTS, **STREAMING}.items() if not options.keys() <= known().keys()]


def _told(quantity: str, options: Options) -> str:
    wanted = {"trace": f"tol={TRACE_TOL:g}", "density": f"{DRAWS} x {STEPS}", "epsilon": f"max_iter={ITERATIONS}"}
    own = wanted.get(quantity, f"tol={TOL:g}" if quantity in WANTED else "")
    return ", ".join(filter(None, [own, *(f"{name}={value}" for name, value in options.items())]))


def product(problem: Problem, seed: int, options: Options, kind: Callable[[Objective], Any] = HessianOperator) -> Run:
    """Return a run of products; the first, with which everything is recorded, is made before."""
    objective = Objective(problem.model, problem.loader, functional.cross_entropy, progress=False, **options)
    operator, v = kind(objective), direction(problem, seed)
    for _ in range(2):
        operator.matvec(v)

    def run() -> Outcome:
        with objective.session():
            return several(lambda: operator.matvec(v), objective.provenance().get("engine"))

    return run


def _ggn(problem: Problem, seed: int, options: Options) -> Run:
    return product(problem, seed, options, GGNOperator)


def _top(k: int) -> Callable[[Problem, int, Options], Run]:
    def prepare(problem: Problem, seed: int, options: Options) -> Run:
        def run() -> Outcome:
            result = sharpness.top_eigenvalues(
                problem.model, *_data(problem), k=k, tol=TOL, vectors=True, seed=seed, progress=False, **options
            )
            assert result.eigenvectors is not None
            return _outcome(result, Pairs(result.eigenvalues, result.eigenvectors), result.num_matvecs)

        return run

    return prepare


def _trace(problem: Problem, seed: int, options: Options) -> Run:
    def run() -> Outcome:
        result = sharpness.trace(problem.model, *_data(problem), tol=TRACE_TOL, seed=seed, progress=False, **options)
        return _outcome(result, result.value, result.num_matvecs)

    return run


def _density(problem: Problem, seed: int, options: Options) -> Run:
    steps = min(STEPS, problem.num_parameters)

    def run() -> Outcome:
        result = sharpness.spectral_density(
            problem.model,
            *_data(problem),
            num_draws=DRAWS,
            num_steps=steps,
            seed=seed,
            progress=False,
            **options,
        )
        return _outcome(result, Rules(result.nodes, result.weights), result.num_matvecs)

    return run


def _epsilon(problem: Problem, seed: int, options: Options) -> Run:
    def run() -> Outcome:
        result = sharpness.epsilon_sharpness(
            problem.model,
            *_data(problem),
            max_iter=ITERATIONS,
            num_starts=1,
            seed=seed,
            progress=False,
            on_failure="ignore",
            **options,
        )
        return _outcome(result, result.value, result.num_evaluations)

    return run


def _data(problem: Problem) -> tuple[Any, Any]:
    return problem.loader, functional.cross_entropy


def _outcome(result: Any, answer: Any, products: int) -> Outcome:
    return Outcome(answer, products, result.num_passes, engine=result.settings.get("engine"))


_RUNS: dict[str, Callable[[Problem, int, Options], Run]] = {
    "product": product,
    "ggn": _ggn,
    **{name: _top(k) for name, k in WANTED.items()},
    "trace": _trace,
    "density": _density,
    "epsilon": _epsilon,
}
