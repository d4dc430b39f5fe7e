"""What a walk between two models costs beyond the forward passes that it needs.

``python -m benchmarks.interpolate [--model mlp|convnet] [--images N] [--repeat N] [--json FILE]``

A walk of 25 points beside as many bare walks over the same batches by the same models, in turns in one run, by
processor time; the ratio is the median over the pairs. Re-estimating the running statistics needs another 23 walks in
train mode, which the bare side makes as well.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from tabulate import tabulate
from torch import Tensor, nn
from torch.nn import functional

import sharpness

_POINTS = 25


def mlp() -> nn.Module:
    """Return F1 of Keskar et al. (2017): 784 - 5 x 512 - 10 with BatchNorm and ReLU, 1.5 million parameters."""
    widths = [784, *[512] * 5]
    hidden = [layer for a, b in itertools.pairwise(widths) for layer in (nn.Linear(a, b), nn.BatchNorm1d(b), nn.ReLU())]
    return nn.Sequential(nn.Flatten(), *hidden, nn.Linear(512, 10))


def convnet() -> nn.Module:
    """Return three convolutions with BatchNorm and a linear layer, 24 thousand parameters."""
    widths = [1, 16, 32, 64]
    blocks = [
        layer
        for a, b in itertools.pairwise(widths)
        for layer in (nn.Conv2d(a, b, 3, padding=1), nn.BatchNorm2d(b), nn.ReLU(), nn.MaxPool2d(2))
    ]
    return nn.Sequential(*blocks, nn.Flatten(), nn.Linear(64 * 9, 10))


MODELS: dict[str, Callable[[], nn.Module]] = {"mlp": mlp, "convnet": convnet}


def bare(models: Sequence[nn.Module], loader: Sequence[tuple[Tensor, Tensor]], again: int) -> float:
    """Walk the data once per point, and ``again`` times in train mode; return the seconds of processor time."""
    started = time.process_time()
    with torch.no_grad():
        for i in range(_POINTS):
            model = models[i % 2].eval()
            for inputs, targets in loader:
                outputs = model(inputs)
                functional.cross_entropy(outputs, targets, reduction="sum").item()
                (outputs.argmax(1) == targets).sum().item()
        for i in range(again):
            model = models[i % 2].train()
            for inputs, _ in loader:
                model(inputs)
    for model in models:
        model.eval()
    return time.process_time() - started


def measure(name: str, images: int, batch_size: int, repeat: int, batch_norm: str) -> dict[str, float | str]:
    """Return the processor seconds of both sides and their ratio, as medians over the pairs."""
    torch.manual_seed(0)
    inputs, targets = torch.randn(images, 1, 28, 28), torch.randint(0, 10, (images,))
    loader = list(zip(inputs.split(batch_size), targets.split(batch_size), strict=True))
    models = [MODELS[name]().eval() for _ in range(2)]
    again = _POINTS - 2 if batch_norm == "recompute" else 0
    pairs = []
    for _ in range(repeat + 1):  # the first pair warms up
        floor = bare(models, loader, again)
        started = time.process_time()
        sharpness.interpolate(*models, loader, nn.CrossEntropyLoss(), batch_norm=batch_norm)
        pairs.append((time.process_time() - started, floor))
    ratios = [walk / floor for walk, floor in pairs[1:]]
    return {
        "model": name,
        "parameters": sum(p.numel() for p in models[0].parameters()),
        "batch_norm": batch_norm,
        "bare_s": statistics.median(floor for _, floor in pairs[1:]),
        "interpolate_s": statistics.median(walk for walk, _ in pairs[1:]),
        "ratio": statistics.median(ratios),
        "least": min(ratios),
        "most": max(ratios),
    }


def main() -> None:
    """Measure, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, action="append", help="default: all of them")
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--repeat", type=int, default=5, help="pairs of runs")
    parser.add_argument("--json", type=Path, help="also write the rows to this file")
    args = parser.parse_args()
    rows = [
        measure(name, args.images, args.batch_size, args.repeat, batch_norm)
        for name in args.model or MODELS
        for batch_norm in ("keep", "recompute")
    ]
    print(f"{args.images} images in batches of {args.batch_size}, {_POINTS} points, {args.repeat} pairs of runs")
    print(tabulate(rows, headers="keys", floatfmt=".3g"))
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
