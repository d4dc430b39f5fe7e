"""Spectral density with all draws at once, beside as many runs of one draw each, and beside the peers.

    python -m benchmarks.density [--model digits|gpt|mlp|resnet20|cifar] [--draws N] [--steps N] [--samples N] [--peers]

With ``memory=0`` nothing is kept between products, so each pass redoes the first-order work of each batch: once for all
draws, or once for each. All are run in turns; what is printed is the median of the times, and of the ratios of the runs
of one turn. ``--peers`` compares the default memory with PyHessian and hessian-eigenthings, draws and steps alike.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate
from torch import nn
from torch.nn import functional

import sharpness
from benchmarks.machine import timed
from benchmarks.models import PROBLEMS, Problem
from benchmarks.real import REAL
from sharpness.datasets import digits


def small() -> Problem:
    """Return an MLP 64-128-128-10 trained on the digits as they are."""
    data, _ = digits(num_train=1700)
    inputs, targets = data.tensors
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(64, 128), nn.Tanh(), nn.Linear(128, 128), nn.Tanh(), nn.Linear(128, 10))
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
        for _ in range(20):
            for chosen in torch.randperm(len(inputs)).split(100):
                optimizer.zero_grad()
                functional.cross_entropy(model(inputs[chosen]), targets[chosen]).backward()
                optimizer.step()
    model.eval().zero_grad(set_to_none=True)
    loader = list(zip(inputs.split(500), targets.split(500), strict=True))
    return Problem(name="digits", model=model, loader=loader, loss=0.0, accuracy=0.0, seconds=0.0)


def together(problem: Problem, draws: int, steps: int, **options: Any) -> None:
    """Run all draws at once."""
    sharpness.spectral_density(problem.model, problem.loader, num_draws=draws, num_steps=steps, **options)


def apart(problem: Problem, draws: int, steps: int) -> None:
    """Run one draw after the other."""
    for seed in range(draws):
        sharpness.spectral_density(problem.model, problem.loader, num_draws=1, num_steps=steps, seed=seed, memory=0)


def pyhessian_density(problem: Problem, draws: int, steps: int) -> None:
    """Run PyHessian's density."""
    import pyhessian

    several = len(problem.loader) > 1
    data: dict[str, Any] = {"dataloader": problem.loader} if several else {"data": problem.loader[0]}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = copy.deepcopy(problem.model)
        hessian = pyhessian.hessian(model, nn.CrossEntropyLoss(), cuda=False, **data)
        with compatible():
            hessian.density(iter=steps, n_v=draws)


class compatible:  # noqa: N801
    """Give PyTorch back the ``torch.eig`` that PyHessian 0.1 calls."""

    def __enter__(self) -> None:
        self.before = torch.eig

        def eig(matrix: torch.Tensor, eigenvectors: bool = True) -> tuple[torch.Tensor, torch.Tensor]:
            values, vectors = torch.linalg.eigh(matrix)
            return torch.stack([values, torch.zeros_like(values)], dim=1), vectors

        torch.eig = eig

    def __exit__(self, *exc: object) -> None:
        torch.eig = self.before


def eigenthings_density(problem: Problem, draws: int, steps: int) -> None:
    """Run the density of hessian-eigenthings."""
    import hessian_eigenthings

    def loss(model: nn.Module, batch: Any) -> Any:
        return functional.cross_entropy(model(batch[0]), batch[1])

    operator = hessian_eigenthings.HessianOperator(copy.deepcopy(problem.model), problem.loader, loss)
    hessian_eigenthings.spectral_density(operator, num_runs=draws, lanczos_steps=steps, seed=0)


def in_turns(runs: dict[str, Callable[[], None]], repeat: int) -> dict[str, list[float]]:
    """Return the times of each, one for each turn."""
    found: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(repeat):
        for name, run in runs.items():
            found[name].append(timed(run)[1].seconds)
    return found


def main() -> None:
    """Measure and print the ratios."""
    models: dict[str, Callable[..., Problem]] = {"digits": small, **PROBLEMS, **REAL}
    parser = argparse.ArgumentParser(description="Density with draws at once, one after the other, and the peers.")
    parser.add_argument("--model", choices=sorted(models), default="digits")
    parser.add_argument("--draws", type=int, default=4)
    parser.add_argument("--steps", type=int, default=90)
    parser.add_argument("--weights", type=Path, help="of the GPT: read if the file is there, written if not")
    parser.add_argument("--samples", type=int, help="only the first so many images or sequences")
    parser.add_argument("--repeat", type=int, default=5, help="how often each runs, in turns (default 5)")
    parser.add_argument("--peers", action="store_true", help="the default memory beside the peers")
    options = parser.parse_args()
    chosen = {"weights": options.weights} if options.model == "gpt" else {}
    problem = models[options.model](**chosen)
    if options.samples:
        batch = tuple(torch.cat(parts)[: options.samples] for parts in zip(*problem.loader, strict=True))
        problem = Problem(**{**vars(problem), "loader": [batch]})
    size = (problem, options.draws, options.steps)
    runs = (
        {
            "sharpness": lambda: together(*size),
            "PyHessian": lambda: pyhessian_density(*size),
            "hessian-eigenthings": lambda: eigenthings_density(*size),
        }
        if options.peers
        else {"at once": lambda: together(*size, memory=0), "one after the other": lambda: apart(*size)}
    )
    times = in_turns(runs, options.repeat)
    first = next(iter(times.values()))
    print(f"{problem.name}: {problem.num_parameters:,} parameters, {problem.num_samples} samples; ", end="")
    print(f"{options.draws} draws x {options.steps} steps, {options.repeat} turns")
    rows = []
    for name, seconds in times.items():
        ratios = [mine / its for mine, its in zip(first, seconds, strict=True)]
        spread = f"{1 / max(ratios):.2f} to {1 / min(ratios):.2f}"
        ratio = statistics.median(ratios)
        rows.append([name, f"{statistics.median(seconds):.2f}", f"{1 / ratio:.2f}", spread, f"{ratio:.2f}"])
    headers = ["", "seconds", "times the first", "from, to", "first over this"]
    print(tabulate(rows, headers=headers, disable_numparse=True))


if __name__ == "__main__":
    main()
