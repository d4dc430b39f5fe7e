"""1797 handwritten digits of 8x8 pixels (Alpaydin and Kaynak 1998, CC BY 4.0; see LICENSE-digits.txt)."""

from __future__ import annotations

from importlib.resources import files

import numpy as np
import torch
from torch.utils.data import TensorDataset

from sharpness._checks import check_count

_TOTAL = 1797


def digits(*, num_train: int = 1000) -> tuple[TensorDataset, TensorDataset]:
    """Return the handwritten digits as a training and a test set of ``(image, label)``.

    Images are ``(64,)`` float32 in [0, 1], labels 0 to 9. The first ``num_train`` images train, the rest test; they
    come in the order of the original file, so other writers are met late.

    Args:
        num_train: Size of the training set.

    Raises:
        ArgumentError: If ``num_train`` leaves no image for one of the sets.

    Example:
        >>> train, test = digits()
        >>> len(train), len(test), train[0][0].shape
        (1000, 797, torch.Size([64]))
    """
    check_count("num_train", num_train, high=_TOTAL - 1, of="all images but one")
    with files("sharpness.datasets").joinpath("digits.npz").open("rb") as file, np.load(file) as archive:
        images = torch.from_numpy(archive["images"]).reshape(-1, 64).float() / 16
        labels = torch.from_numpy(archive["labels"]).long()
    return (
        TensorDataset(images[:num_train], labels[:num_train]),
        TensorDataset(images[num_train:], labels[num_train:]),
    )
