"""Cost against samples, parameters and eigenvalues: slopes in log-log coordinates, by method.

    python -m benchmarks.scaling [--along samples parameters k] [--repeat N] [--quick] [--json FILE] [--markdown FILE]

Samples and parameters are those of the MLP, with batches of fixed size; timed is one product. Along ``k`` it is a whole
run of ours, and its products. The slope is that of a line fitted to the medians; 1 is proportional.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tabulate import tabulate
from torch.nn import functional

import sharpness
from benchmarks import ours, peers, plain
from benchmarks.machine import Clock, environment
from benchmarks.methods import CALLS, TOL, Method
from benchmarks.models import Problem, images, labels, mlp
from benchmarks.settings import Settings

_SAMPLES = (250, 500, 1000, 2000, 4000)
_WIDTHS = (256, 512, 1024, 2048)
_WANTED = (1, 2, 5, 10, 20)
_QUICK = {"samples": (50, 100, 200), "parameters": (16, 32, 64), "k": (1, 2, 4)}
_SIZES = {"samples": _SAMPLES, "parameters": _WIDTHS, "k": _WANTED}


def problems(along: str, sizes: tuple[int, ...], quick: bool) -> Iterator[tuple[int, Problem]]:
    """Yield what is on the axis, and the problem there; weights are random: a product costs the same."""
    if along == "samples":
        width, batch = (16, 25) if quick else (512, 250)
        base = mlp(50, width, batch, epochs=1)
        most = images(min(max(sizes), 1797), size=28).flatten(1)
        for size in sizes:
            rows = torch.arange(size) % len(most)
            inputs, targets = most[rows], labels(len(most))[rows]
            yield size, replace(base, loader=list(zip(inputs.split(batch), targets.split(batch), strict=True)))
    else:
        for size in sizes:
            problem = mlp(50 if quick else 500, size, 25 if quick else 250, epochs=1)
            yield problem.num_parameters, problem


def products(along: str, sizes: tuple[int, ...], repeat: int, clock: Clock, quick: bool) -> list[dict[str, Any]]:
    """Return the seconds of one product by method and size."""
    found: dict[str, dict[int, float]] = {}
    for size, problem in problems(along, sizes, quick):
        methods = ours.methods("product") + plain.methods("product") + peers.methods("product", problem, Settings())
        for method in methods:
            seconds = _seconds(method, problem, repeat, clock)
            found.setdefault(method.name, {})[size] = seconds / CALLS
        print(f"  {along} {size}: {', '.join(f'{m.name} {found[m.name][size]:.3g} s' for m in methods)}", flush=True)
    return [_row(name, along, times) for name, times in found.items()]


def _seconds(method: Method, problem: Problem, repeat: int, clock: Clock) -> float:
    run = method.prepare(problem if method.ours else replace(problem, model=copy.deepcopy(problem.model)), 0)
    run()
    return statistics.median(clock.time(run)[1].seconds for _ in range(repeat))


def wanted(sizes: tuple[int, ...], repeat: int, clock: Clock, quick: bool) -> list[dict[str, Any]]:
    """Return the seconds and the products of the top ``k``, by our methods."""
    problem, rows = (mlp(200, 32, 80, epochs=60) if quick else mlp()), []
    for name, options in ours.VARIANTS.items():
        if not options.keys() <= ours.known().keys():
            continue
        times, spent = {}, {}
        for k in sizes:

            def run(k: int = k, options: dict[str, Any] = options) -> sharpness.EigenResult:
                return sharpness.top_eigenvalues(
                    problem.model,
                    problem.loader,
                    functional.cross_entropy,
                    k=k,
                    tol=TOL,
                    vectors=True,
                    progress=False,
                    **options,
                )

            run()
            answers = [clock.time(run) for _ in range(repeat)]
            times[k] = statistics.median(timing.seconds for _, timing in answers)
            spent[k] = answers[0][0].num_matvecs
        rows += [_row(name, "k", times), _row(f"{name}, products", "k", spent)]
    return rows


def slope(values: dict[int, float]) -> float:
    """Return the slope of the line fitted to the logarithms."""
    return float(np.polyfit(np.log(list(values)), np.log(list(values.values())), 1)[0])


def _row(name: str, along: str, values: dict[int, float]) -> dict[str, Any]:
    return {"method": name, "along": along, "values": values, "slope": slope(values)}


def tables(rows: list[dict[str, Any]], style: str) -> str:
    """Return one table for each axis."""
    parts = []
    for along in dict.fromkeys(row["along"] for row in rows):
        own = [row for row in rows if row["along"] == along]
        lines = [[r["method"], *(f"{v:.3g}" for v in r["values"].values()), f"{r['slope']:.2f}"] for r in own]
        sizes = [f"{size:,}" for size in own[0]["values"]]
        parts.append(tabulate(lines, headers=[along, *sizes, "slope"], tablefmt=style, disable_numparse=True))
    return "\n\n".join(parts) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description="Cost against samples, parameters and k.")
    parser.add_argument("--along", choices=list(_SIZES), nargs="+", default=list(_SIZES), help="(default: all)")
    parser.add_argument("--repeat", type=int, default=3, help="how often each is timed (default 3)")
    parser.add_argument("--patience", type=float, default=0.0, help="seconds to wait for a quiet machine (default 0)")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, to see that everything runs")
    parser.add_argument("--json", type=Path, help="write the numbers and the environment to this file")
    parser.add_argument("--markdown", type=Path, help="write the tables to this file")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    clock, rows = Clock(options.patience), []
    for along in options.along:
        sizes = (_QUICK if options.quick else _SIZES)[along]
        if along == "k":
            rows += wanted(sizes, options.repeat, clock, options.quick)
        else:
            rows += products(along, sizes, options.repeat, clock, options.quick)
    print(tables(rows, "simple"))
    if options.json:
        options.json.write_text(json.dumps({"environment": environment(), "rows": rows}, indent=1) + "\n")
    if options.markdown:
        options.markdown.write_text(tables(rows, "github"))


if __name__ == "__main__":
    main()
