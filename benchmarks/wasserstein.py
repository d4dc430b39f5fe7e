"""Distance of the estimated density from the exact one, on nets small enough for all eigenvalues.

    python -m benchmarks.wasserstein [--draws N] [--json FILE]

The Wasserstein distance between the nodes with their weights and all eigenvalues, relative to the root mean square of
the eigenvalues; the mean over as many disjoint sets of draws as there are in one run.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from scipy.stats import wasserstein_distance
from tabulate import tabulate
from torch import nn
from torch.nn import functional

import sharpness
from sharpness.datasets import digits

_STEPS = (5, 10, 20, 40, 80)


def nets() -> dict[str, nn.Module]:
    """Return untrained nets with at most a few thousand parameters."""
    return {
        "MLP 64-16-10, tanh": nn.Sequential(nn.Linear(64, 16), nn.Tanh(), nn.Linear(16, 10)),
        "MLP 64-32-10, ReLU": nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10)),
    }


def trained(model: nn.Module) -> sharpness.Objective:
    """Train on 500 digits, and return the model with them as one function."""
    data, _ = digits(num_train=500)
    inputs, targets = data.tensors
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    for _ in range(15):
        for chosen in torch.randperm(len(inputs)).split(50):
            optimizer.zero_grad()
            functional.cross_entropy(model(inputs[chosen]), targets[chosen]).backward()
            optimizer.step()
    return sharpness.Objective(model.double(), [(inputs.double(), targets)])


def distances(objective: sharpness.Objective, draws: int) -> list[list[float]]:
    """Return the mean distance for each number of steps, a row, and of draws, a power of four."""
    exact = torch.linalg.eigvalsh(sharpness.HessianOperator(objective).to_dense())
    scale = exact.square().mean().sqrt().item()
    found = []
    for steps in _STEPS:
        rule = sharpness.spectral_density(objective, num_draws=draws, num_steps=steps)
        row, size = [], 1
        while size <= draws:
            sets = zip(rule.nodes.split(size), rule.weights.split(size), strict=True)
            each = [wasserstein_distance(nodes.ravel(), exact, weights.ravel()) for nodes, weights in sets]
            row.append(sum(each) / len(each) / scale)
            size *= 4
        found.append(row)
    return found


def main() -> None:
    """Print one table per net."""
    parser = argparse.ArgumentParser(description="Estimated and exact density: Wasserstein distances.")
    parser.add_argument("--draws", type=int, default=64, help="random vectors in all, a power of four (default 64)")
    parser.add_argument("--json", type=Path, help="write the numbers to this file")
    options = parser.parse_args()
    torch.manual_seed(0)
    results = {}
    for name, model in nets().items():
        objective = trained(model)
        results[name] = distances(objective, options.draws)
        print(f"{name}: {objective.n} parameters, {objective.evaluate()}")
        sizes = [4**i for i in range(len(results[name][0]))]
        rows = [[steps, *(f"{d:.4f}" for d in row)] for steps, row in zip(_STEPS, results[name], strict=True)]
        print(tabulate(rows, headers=["steps", *(f"{size} draws" for size in sizes)], disable_numparse=True))
    if options.json:
        options.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
