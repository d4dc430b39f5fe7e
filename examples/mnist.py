"""MNIST from idx files in the layout of torchvision, zipped or not; nothing is downloaded."""

from __future__ import annotations

import gzip
from pathlib import Path

import numpy as np
import torch
from torch import Tensor


def read(folder: Path, part: str, device: str = "cpu") -> tuple[Tensor, Tensor]:  # -> (images, 784), (images,)
    """Return the images of ``part`` ("train" or "t10k"), in [0, 1], and their labels."""
    pixels = torch.from_numpy(_entries(folder, f"{part}-images-idx3-ubyte", 16))
    labels = torch.from_numpy(_entries(folder, f"{part}-labels-idx1-ubyte", 8))
    return (pixels.view(-1, 784).float() / 255).to(device), labels.long().to(device)


def _entries(folder: Path, name: str, header: int) -> np.ndarray:
    """Return the bytes after the header of an idx file in ``folder``, its ``raw`` or its ``MNIST/raw``."""
    for place in (folder, folder / "raw", folder / "MNIST" / "raw"):
        if (place / name).is_file():
            return np.frombuffer((place / name).read_bytes()[header:], np.uint8).copy()
        if (place / f"{name}.gz").is_file():
            return np.frombuffer(gzip.decompress((place / f"{name}.gz").read_bytes())[header:], np.uint8).copy()
    raise SystemExit(
        f"{name}[.gz] is not in {folder}, its raw/ or its MNIST/raw/. "
        "Pass the folder that torchvision.datasets.MNIST(root) was given, or the one that holds the idx files."
    )
