"""Where the time of a run goes: products, the basis, sums in float64, checks, recording, loading compiled code.

    python -m benchmarks.profile [--model NAME ...] [--quantity NAME ...] [--repeat N] [--json FILE] [--markdown FILE]

Functions of the library are timed while it runs; what one of them spends in another counts for the inner one only, so
the shares add up to one. A function that this version does not have is named, and its part is missing.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import json
import statistics
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from tabulate import tabulate
from torch.nn import functional

from benchmarks import ours
from benchmarks.machine import Clock, environment
from benchmarks.methods import QUANTITIES, Method, Outcome
from benchmarks.models import Problem
from benchmarks.problems import FULL, UnavailableError, load
from sharpness import Objective

_PARTS = {
    "products": ["sharpness.objective.objective:Objective.products"],
    "reorthogonalisation": [
        "sharpness.linalg.krylov:KrylovSpace.request",
        "sharpness.linalg.krylov:KrylovSpace.absorb",
    ],
    "Ritz values and vectors": [
        "sharpness.linalg.krylov:KrylovSpace.ritz",
        "sharpness.linalg.krylov:KrylovSpace.vectors",
    ],
    "sums in float64": [
        "sharpness.objective.batch_sum:BatchSum.add",
        "sharpness.objective.batch_sum:BatchSum.divided_by",
    ],
    "state of the model": ["sharpness.objective.functional:Functional.state"],
    "same loss twice": ["sharpness.objective.objective:Objective.check"],
    "rounding": ["sharpness.objective.objective:Objective.product_error"],
    "forward passes": ["sharpness.objective.functional:Functional.terms"],
    "graphs": ["sharpness.objective.products:Products.linearise"],
    "recording": [
        "sharpness.objective.replay:Replays.record",
        "sharpness.objective.stream:Stream.prepare",
    ],
    "tapes and compiled code": ["sharpness.objective.replay:Replay.product"],
    "residuals of batches that are not kept": ["sharpness.objective.stream:Stream.linear"],
    "loss and gradient": ["sharpness.objective.objective:Objective.value_and_gradient"],
    "compiling and loading": ["sharpness.objective.compiler:Compiler.run"],
}


class Stopwatch:
    """Seconds by part; while a part runs within another, only the inner one counts."""

    def __init__(self) -> None:
        self.spent: Counter[str] = Counter()
        self.absent: list[str] = []
        self._running: list[str] = []
        self._since = 0.0

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Time the functions of all parts."""
        with ExitStack() as stack:
            for part, places in _PARTS.items():
                for place in places:
                    found = _found(place)
                    if found is None:
                        self.absent.append(place)
                    else:
                        stack.enter_context(mock.patch.object(*found, self._timed(getattr(*found), part)))
            yield

    def _timed(self, inner: Callable[..., Any], part: str) -> Callable[..., Any]:
        @functools.wraps(inner)
        def timed(*args: Any, **options: Any) -> Any:
            self._turn()
            self._running.append(part)
            try:
                return inner(*args, **options)
            finally:
                self._turn()
                self._running.pop()

        return timed

    def _turn(self) -> None:
        now = time.perf_counter()
        if self._running:
            self.spent[self._running[-1]] += now - self._since
        self._since = now


def _found(place: str) -> tuple[Any, str] | None:
    """Return the owner of a function and its name there, if there is one."""
    module, _, path = place.partition(":")
    *owners, name = path.split(".")
    try:
        owner: Any = importlib.import_module(module)
    except ImportError:
        return None
    for step in owners:
        owner = getattr(owner, step, None)
    return (owner, name) if hasattr(owner, name) else None


def shares(problem: Problem, quantity: str, method: Method, repeat: int, clock: Clock) -> dict[str, Any]:
    """Return which parts of a run take which share of its time; medians over ``repeat`` runs after a first."""
    runs, absent = [], []
    for i in range(repeat + 1):
        watch = Stopwatch()
        run = method.prepare(problem, 0)
        with watch.watching():
            outcome, timing = clock.time(functools.partial(_counted, run, watch))
        if i:  # the first pays for what is only paid once
            known = {part: watch.spent[part] / timing.seconds for part in _PARTS}
            runs.append({**known, "rest": 1 - sum(known.values()), "seconds": timing.seconds})
        absent = watch.absent
    median = {part: statistics.median(run[part] for run in runs) for part in runs[0]}
    return {
        "model": problem.name,
        "quantity": quantity,
        "method": method.name,
        "products": outcome.products,
        "shares": {part: share for part, share in median.items() if part != "seconds"},
        "seconds": median["seconds"],
        "absent": absent,
        "runs": runs,
    }


def _counted(run: Callable[[], Outcome], watch: Stopwatch) -> Outcome:
    watch.spent.clear()  # a disturbed run is run again
    return run()


def bare_product(problem: Problem, repeat: int = 3) -> float:
    """Return the time of the library's product over that of its calls of autograd alone; median of paired runs."""
    objective = Objective(problem.model, problem.loader, functional.cross_entropy, progress=False)
    v = torch.randn(objective.n, generator=torch.Generator().manual_seed(0))
    parameters = [p for p in problem.model.parameters() if p.requires_grad]
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


def table(rows: list[dict[str, Any]], style: str) -> str:
    """Return the shares, parts that never take a hundredth left out."""
    parts = [part for part in rows[0]["shares"] if any(row["shares"][part] >= 0.01 for row in rows)]
    lines = [
        [
            row["model"],
            row["quantity"],
            row["method"],
            row["products"],
            f"{row['seconds']:.3g}",
            *(f"{100 * row['shares'][part]:.1f} %" for part in parts),
        ]
        for row in rows
    ]
    headers = ["network", "quantity", "method", "products", "seconds", *parts]
    return tabulate(lines, headers=headers, tablefmt=style, disable_numparse=True)


def main() -> None:
    parser = argparse.ArgumentParser(description="Where the time of a run goes.")
    parser.add_argument("--model", choices=list(FULL), nargs="+", default=["mlp", "resnet20", "gpt"])
    parser.add_argument("--quantity", choices=QUANTITIES, nargs="+", default=["top5", "trace"])
    parser.add_argument("--repeat", type=int, default=3, help="how often each is measured (default 3)")
    parser.add_argument("--patience", type=float, default=0.0, help="seconds to wait for a quiet machine (default 0)")
    parser.add_argument("--quick", action="store_true", help="tiny networks, to see that everything runs")
    parser.add_argument("--json", type=Path, help="write the numbers and the environment to this file")
    parser.add_argument("--markdown", type=Path, help="write the table to this file")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    clock, rows, bare = Clock(options.patience), [], {}
    for name in options.model:
        try:
            problem = load(name, quick=options.quick)
        except UnavailableError as error:
            print(error)
            continue
        print(problem, flush=True)
        bare[problem.name] = bare_product(problem)
        for quantity in options.quantity:
            for method in ours.methods(quantity):
                rows.append(shares(problem, quantity, method, options.repeat, clock))
    absent = sorted({place for row in rows for place in row["absent"]})
    if absent:
        print(f"this version has no {', '.join(absent)}: their time counts for what calls them")
    print(table(rows, "simple"))
    for name, ratio in bare.items():
        print(f"{name}: a product takes {ratio:.2f} times as long as its calls of autograd alone, graphs kept")
    if options.json:
        document = {"environment": environment(), "rows": rows, "product_over_autograd": bare}
        options.json.write_text(json.dumps(document, indent=1) + "\n")
    if options.markdown:
        options.markdown.write_text(table(rows, "github") + "\n")


if __name__ == "__main__":
    main()
