"""Peak of live bytes: one product of this library with nothing kept, against a plain double backward.

    python -m benchmarks.peak_memory [--model mlp|resnet20] [--json FILE]

The allocator's own events are added up (PyTorch's profiler), so that what counts is every byte that is live at once
beyond the model, the data and the vector, which are there before. The plain double backward is the least that anybody
pays: the loss of the largest batch, its gradient with a graph, and one more differentiation.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional
from torch.profiler import ProfilerActivity, profile

from benchmarks.machine import environment
from benchmarks.models import PROBLEMS, Problem
from sharpness import GGNOperator, HessianOperator, Objective


def peak_bytes(function: Callable[[], Any]) -> int:
    """Return the largest number of bytes that were live at once while ``function`` ran, beyond those before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        answer = function()  # noqa: F841 - alive to the end, as for a user
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    live = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return peak


def plain(problem: Problem, v: torch.Tensor) -> torch.Tensor:
    """Differentiate the loss of the largest batch twice."""
    parameters = list(problem.model.parameters())
    inputs, targets = max(problem.loader, key=lambda batch: len(batch[1]))
    loss = functional.cross_entropy(problem.model(inputs), targets)
    gradients = torch.autograd.grad(loss, parameters, create_graph=True)
    pieces = [piece.view_as(p) for piece, p in zip(v.split([p.numel() for p in parameters]), parameters, strict=True)]
    product = torch.autograd.grad(gradients, parameters, pieces)
    return torch.cat([piece.reshape(-1) for piece in product])


def measure(problem: Problem) -> dict[str, Any]:
    """Return peak bytes of the ways to multiply, and the bytes of one vector."""
    n = problem.num_parameters
    v = torch.randn(n, generator=torch.Generator().manual_seed(0))
    v /= v.norm()
    found = {"plain double backward": peak_bytes(lambda: plain(problem, v))}
    for name, kind in (("sharpness, hessian", HessianOperator), ("sharpness, ggn", GGNOperator)):
        operator = kind(Objective(problem.model, problem.loader, memory=0))
        operator.matvec(v)  # what happens once, as finding the reduction of the loss, is no part of a product
        found[name] = peak_bytes(lambda operator=operator: operator.matvec(v))
    return {"model": str(problem), "vector": 4 * n, "peak": found}


def main() -> None:
    """Print a table for each model."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=PROBLEMS, action="append")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    results = []
    for name in options.model or PROBLEMS:
        result = measure(PROBLEMS[name]())
        results.append(result)
        print(result["model"])
        base = result["peak"]["plain double backward"]
        for way, peak in result["peak"].items():
            extra = (peak - base) / result["vector"]
            print(f"  {way:24} {peak / 2**20:9.1f} MiB   {peak / base:5.2f} x   {extra:+6.2f} vectors")
    if options.json:
        options.json.write_text(json.dumps({"environment": environment(), "results": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
