"""Top Hessian eigenvalue of LeNet-5 on MNIST against the batch size, beside the table of Yao et al. (2018).

Run ``python examples/reproduce_yao.py --data DIR [--images N] [--seeds N] [--json FILE]``, where ``DIR`` is what
``torchvision.datasets.MNIST`` was given. Each network is trained by SGD until the loss over its training images is at
most 1e-3; the eigenvalue is that of the loss over all these images. The file keeps every finished run, and a run that
is in it already is not repeated.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import mnist
import torch
from tabulate import tabulate
from torch import Tensor, nn
from torch.nn import functional

import sharpness

# arXiv 1802.08241, M1: batch size -> training and test accuracy, top eigenvalue on training and on test images.
PAPER = {
    64: (100, 99.21, 0.49, 2.96),
    128: (100, 99.18, 1.44, 8.10),
    256: (100, 99.04, 2.71, 13.54),
    512: (100, 99.04, 5.84, 26.35),
    1024: (100, 99.05, 21.24, 36.96),
    2048: (100, 98.99, 44.30, 49.36),
}
Data = tuple[Tensor, Tensor]


def lenet() -> nn.Module:
    """Return M1 of the paper: Conv5x5x20, Conv5x5x50, FC500, softmax; 2x2 max-pooling after each convolution."""
    return nn.Sequential(
        nn.Unflatten(1, (1, 28, 28)),
        *(nn.Conv2d(1, 20, 5), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(20, 50, 5), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Flatten(), nn.Linear(800, 500), nn.ReLU(), nn.Linear(500, 10)),
    )


def batches(data: Data, size: int = 1000) -> list[Data]:
    return list(zip(data[0].split(size), data[1].split(size), strict=True))


def train(
    model: nn.Module, data: Data, *, batch_size: int, lr: float, stop_loss: float, max_epochs: int, seed: int
) -> dict[str, Any]:
    """Train by SGD with momentum 0.9 until the loss over ``data``, looked at after each epoch, is low enough."""
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)
    generator = torch.Generator().manual_seed(seed)
    objective = sharpness.Objective(model, batches(data), progress=False)
    started, loss, epoch = time.perf_counter(), float("inf"), 0
    while loss > stop_loss and epoch < max_epochs:
        epoch, running = epoch + 1, 0.0
        for chosen in torch.randperm(len(data[0]), generator=generator).to(data[0].device).split(batch_size):
            optimizer.zero_grad()
            terms = functional.cross_entropy(model(data[0][chosen]), data[1][chosen])
            terms.backward()
            optimizer.step()
            running += terms.item() * len(chosen) / len(data[0])
        # While the mean over the epoch is far above the stop, the loss at its end cannot be below.
        loss = objective.value() if running < 10 * stop_loss or epoch == max_epochs else running
    return {"epochs": epoch, "seconds": time.perf_counter() - started, "reached": loss <= stop_loss}


def run(train_set: Data, test_set: Data, *, batch_size: int, seed: int, options: argparse.Namespace) -> dict[str, Any]:
    """Train one network and measure it."""
    torch.manual_seed(seed)
    model = lenet().to(options.device, memory_format=torch.channels_last)  # faster on a CPU; the same numbers
    training = train(
        model,
        train_set,
        batch_size=batch_size,
        lr=options.lr,
        stop_loss=options.stop_loss,
        max_epochs=options.max_epochs,
        seed=seed,
    )
    row: dict[str, Any] = {"batch_size": batch_size, "seed": seed, **training}
    for name, data in (("train", train_set), ("test", test_set)):
        objective = sharpness.Objective(model, batches(data), progress=False)
        found = objective.evaluate()
        result = sharpness.top_eigenvalues(objective, tol=1e-3)
        row[name] = {
            "loss": found.loss,
            "accuracy": found.accuracy,
            "eigenvalue": result.eigenvalues[0].item(),
            "half_width": (result.interval[0, 1] - result.interval[0, 0]).item() / 2,
            "matvecs": result.num_matvecs,
            "converged": result.converged,
            "seconds": result.seconds,
        }
    return row


def table(rows: list[dict[str, Any]]) -> str:
    """Return what was measured beside the paper: means over seeds."""
    headers = ["batch", "seeds", "epochs", "train loss", "train (test) acc. %", "top eigenvalue, train (test)"]
    headers += ["paper: acc. %", "paper: eigenvalue"]
    lines = []
    for size in sorted({row["batch_size"] for row in rows}):
        mine = [row for row in rows if row["batch_size"] == size]

        def mean(part: str, key: str, mine: list[dict[str, Any]] = mine) -> float:
            return statistics.mean(row[part][key] for row in mine)

        paper = PAPER.get(size)
        lines.append(
            [
                size,
                len(mine),
                " ".join(str(row["epochs"]) for row in mine),
                f"{mean('train', 'loss'):.1e}" + ("" if all(row["reached"] for row in mine) else " (not reached)"),
                f"{100 * mean('train', 'accuracy'):.2f} ({100 * mean('test', 'accuracy'):.2f})",
                f"{mean('train', 'eigenvalue'):.3g} ({mean('test', 'eigenvalue'):.3g})",
                "-" if paper is None else f"{paper[0]} ({paper[1]})",
                "-" if paper is None else f"{paper[2]} ({paper[3]})",
            ]
        )
    return tabulate(lines, headers=headers, tablefmt="github", disable_numparse=True)


def main() -> None:
    parser = argparse.ArgumentParser(description="Top Hessian eigenvalue of LeNet-5 against the batch size.")
    parser.add_argument("--data", type=Path, required=True, help="folder with MNIST")
    parser.add_argument("--images", type=int, default=60000, help="training images, the first so many (default all)")
    parser.add_argument("--test-images", type=int, default=10000, help="test images, the first so many (default all)")
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=list(PAPER), help="default: those of the paper")
    parser.add_argument("--device", default="cpu", help="where to train and measure (default cpu)")
    parser.add_argument("--seeds", type=int, default=1, help="trainings per batch size (default 1)")
    parser.add_argument("--lr", type=float, default=0.01, help="learning rate (default 0.01)")
    parser.add_argument("--stop-loss", type=float, default=1e-3, help="training loss to stop at (default 1e-3)")
    parser.add_argument("--max-epochs", type=int, default=400, help="where to stop at the latest (default 400)")
    parser.add_argument("--json", type=Path, default=Path("reproduce_yao.json"), help="what is done, kept and resumed")
    options = parser.parse_args()
    images, labels = mnist.read(options.data, "train", options.device)
    train_set = images[: options.images], labels[: options.images]
    images, labels = mnist.read(options.data, "t10k", options.device)
    test_set = images[: options.test_images], labels[: options.test_images]
    rows = json.loads(options.json.read_text()) if options.json.is_file() else []
    names = ("images", "test_images", "lr", "stop_loss", "max_epochs")
    settings = {name: getattr(options, name) for name in names}

    def measured(**key: int) -> list[dict[str, Any]]:
        wanted = {**settings, **key}
        return [row for row in rows if all(row[name] == value for name, value in wanted.items())]

    for seed in range(options.seeds):
        for size in options.batch_sizes:
            if not measured(batch_size=size, seed=seed):
                rows.append(settings | run(train_set, test_set, batch_size=size, seed=seed, options=options))
                options.json.write_text(json.dumps(rows, indent=1) + "\n")
                print(json.dumps(rows[-1]), flush=True)
    print(table(measured()))


if __name__ == "__main__":
    main()
