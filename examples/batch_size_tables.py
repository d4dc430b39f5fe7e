"""Small batch against large batch on three data sets: the tables of the documentation, by one command each.

Run ``python examples/batch_size_tables.py digits``, or ``mnist`` or ``cifar`` with ``--data DIR``. ``DIR`` is what
``torchvision.datasets.MNIST`` was given, or holds ``cifar10_subset.npz`` (arrays ``x_train, y_train, x_test, y_test``,
images uint8 NHWC). With ``--checkpoints DIR`` a finished training is kept and not repeated.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import mnist
import numpy as np
import torch
from reproduce_keskar import f1
from torch import Tensor, nn

import sharpness

Data = tuple[Tensor, Tensor]
MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)  # of the channels of CIFAR-10


class Study(NamedTuple):
    """What is trained, on what, and how."""

    make_model: Callable[[], nn.Module]
    read: Callable[[Path | None], tuple[Data, Data]]
    training: dict[str, Any]


def mlp() -> nn.Module:
    """Return the network of the demo: 64-64-64-10 with ReLU."""
    return nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))


def conv() -> nn.Module:
    """Return three convolutions and a linear layer, without normalisation."""
    layers: list[nn.Module] = []
    for channels, more in ((3, 16), (16, 32), (32, 64)):
        layers += [nn.Conv2d(channels, more, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(1024, 10))


def digits(_: Path | None) -> tuple[Data, Data]:
    """Return the digits that come with the library."""
    train_set, test_set = sharpness.datasets.digits()
    return train_set.tensors, test_set.tensors


def mnist_images(folder: Path | None, count: int = 10_000) -> tuple[Data, Data]:
    """Return the first training images of MNIST, and all test images."""
    images, labels = mnist.read(_needed(folder), "train")
    return (images[:count], labels[:count]), mnist.read(_needed(folder), "t10k")


def cifar_images(folder: Path | None, count: int = 4000) -> tuple[Data, Data]:
    """Return the first training images of CIFAR-10, and the test images of the subset."""
    path = _needed(folder) / "cifar10_subset.npz"
    if not path.is_file():
        raise SystemExit(f"there is no {path.name} in {folder}. Pass the folder that holds it.")
    with np.load(path) as arrays:
        train, test = (
            (_normalised(arrays[f"x_{part}"]), torch.from_numpy(arrays[f"y_{part}"]).long().flatten())
            for part in ("train", "test")
        )
    return (train[0][:count], train[1][:count]), test


def _normalised(pixels: np.ndarray) -> Tensor:  # (images, 32, 32, 3) -> (images, 3, 32, 32)
    images = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (MEAN, STD))
    return ((images - mean) / std).contiguous()


def _needed(folder: Path | None) -> Path:
    if folder is None:
        raise SystemExit("these data do not come with the library. Pass their folder with --data.")
    return folder


# The search for epsilon-sharpness takes most of the time, and is measured on MNIST in reproduce_keskar.py.
QUICK = ("top_eigenvalues", ("average_case_sharpness", {"adaptive": "elementwise", "sigma": 0.1}))
STUDIES = {
    "digits": Study(mlp, digits, {"batch_sizes": (16, 64, 256, 1000)}),
    "mnist": Study(f1, mnist_images, {"batch_sizes": (64, 2000), "metrics": QUICK}),
    "cifar": Study(
        conv,
        cifar_images,
        {
            "batch_sizes": (32, 500),
            "optimizer": "adam",
            "lr": 1e-3,
            "lr_scaling": "sqrt",
            "stop_loss": 0.05,
            "metrics": QUICK,
        },
    ),
}


def main() -> None:
    """Train, measure, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", choices=list(STUDIES))
    parser.add_argument("--data", type=Path, help="folder of the data")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--checkpoints", type=Path, help="folder that keeps finished trainings")
    parser.add_argument("--json", type=Path, help="write the numbers here")
    parser.add_argument("--html", type=Path, help="write a page here")
    options = parser.parse_args()

    study = STUDIES[options.study]
    train_set, test_set = study.read(options.data)
    comparison = sharpness.compare_batch_sizes(
        study.make_model,
        train_set,
        test_set,
        nn.CrossEntropyLoss(),
        seeds=options.seeds,
        checkpoint_dir=options.checkpoints,
        **study.training,
    )
    print(comparison.table(tablefmt="github"))
    for warning in comparison.warnings:
        print(f"\nwarning: {warning}")
    for note in comparison.notes:
        print(f"\nnote: {note}")
    if options.json is not None:
        options.json.write_text(json.dumps(comparison.to_dict(), indent=1, allow_nan=False) + "\n")
    if options.html is not None:
        comparison.to_html(options.html)


if __name__ == "__main__":
    main()
