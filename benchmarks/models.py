"""Three trained networks on the digits of the package, made anew in each run: nothing is downloaded.

The training is short and deterministic. What is measured is the training data, in batches of which the last is smaller.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from sharpness.datasets import digits
from tests.real.models import Block as ProjectionBlock

Batch = tuple[Tensor, Tensor]


@dataclass(frozen=True, kw_only=True)
class Problem:
    """A trained network in eval mode and the data that it was trained on.

    Attributes:
        name: Short name of the network.
        model: The network.
        loader: Batches ``(inputs, targets)``; the last is smaller than the others.
        loss: Cross-entropy on the data after training.
        accuracy: Share of the data that is classified correctly after training.
        seconds: Wall time of the training.
        separable: Whether the loss is a mean over samples, so that the data can be given as one batch too.
    """

    name: str
    model: nn.Module
    loader: list[Batch]
    loss: float
    accuracy: float
    seconds: float
    separable: bool = True

    @property
    def num_parameters(self) -> int:
        """Return the number of trainable parameters."""
        return sum(p.numel() for p in self.model.parameters() if p.requires_grad)

    @property
    def device(self) -> torch.device:
        """Return where the network is."""
        return next(self.model.parameters()).device

    @property
    def num_samples(self) -> int:
        """Return the number of images or sequences."""
        return sum(len(targets) for _, targets in self.loader)

    @property
    def whole(self) -> Batch:
        """Return all the data as one batch."""
        inputs, targets = zip(*self.loader, strict=True)
        return torch.cat(inputs), torch.cat(targets)

    def __str__(self) -> str:
        sizes = [len(targets) for _, targets in self.loader]
        return (
            f"{self.name}: {self.num_parameters:,} parameters, {self.num_samples} samples in {len(sizes)} batches "
            f"({sizes[0]}, the last {sizes[-1]}); training loss {self.loss:.1e}, accuracy {100 * self.accuracy:.1f} %, "
            f"trained in {self.seconds:.0f} s"
        )


def mlp(num_images: int = 1797, width: int = 512, batch_size: int = 250, epochs: int = 12) -> Problem:
    """Return F1 of Keskar et al. (2017) without its BatchNorm: 784 - 5 x 512 - 10, ReLU, on all 1797 digits.

    The 8x8 images are scaled to 28x28, for which the network was made.
    """
    inputs = images(num_images, size=28).flatten(1)
    return _trained("mlp", lambda: _make_mlp(width), inputs, batch_size=batch_size, epochs=epochs, train_batch_size=64)


def resnet20(num_images: int = 256, batch_size: int = 100, epochs: int = 20) -> Problem:
    """Return ResNet-20 for small images (He et al. 2016, section 4.2) on digits scaled to 32x32 with three channels."""
    inputs = images(num_images, size=32).expand(-1, 3, -1, -1).contiguous()
    return _trained("resnet20", ResNet20, inputs, batch_size=batch_size, epochs=epochs, train_batch_size=32)


def resnet18(num_images: int = 40, batch_size: int = 16, epochs: int = 15) -> Problem:
    """Return ResNet-18 as it is used on 32x32 images, without pooling in front, on few digits."""
    inputs = images(num_images, size=32).expand(-1, 3, -1, -1).contiguous()
    return _trained("resnet18", ResNet18, inputs, batch_size=batch_size, epochs=epochs, train_batch_size=8)


PROBLEMS: dict[str, Callable[[], Problem]] = {"mlp": mlp, "resnet20": resnet20}


def images(num_images: int, *, size: int) -> Tensor:  # -> (num_images, 1, size, size)
    """Return the first digits, scaled up bilinearly and normalised to mean 0 and variance 1."""
    pixels = torch.cat([part.tensors[0] for part in digits()])[:num_images].view(-1, 1, 8, 8)
    scaled = functional.interpolate(pixels, size=(size, size), mode="bilinear", align_corners=False)
    return (scaled - scaled.mean()) / scaled.std()


def labels(num_images: int) -> Tensor:  # -> (num_images,)
    """Return the labels of the first digits."""
    return torch.cat([part.tensors[1] for part in digits()])[:num_images]


class ResNet20(nn.Module):
    """ResNet-20: three stages of three blocks with 16, 32 and 64 channels, shortcuts without parameters (option A)."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU())
        widths = [16, 16, 16, 16, 32, 32, 32, 64, 64, 64]
        self.blocks = nn.Sequential(*(Block(a, b) for a, b in itertools.pairwise(widths)))
        self.head = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:  # (batch, 3, 32, 32) -> (batch, 10)
        """Return the logits."""
        return self.head(self.blocks(self.stem(x)).mean((2, 3)))


class Block(nn.Module):
    """Two 3x3 convolutions beside a shortcut; where the width grows, the image shrinks by two."""

    def __init__(self, fan_in: int, fan_out: int) -> None:
        super().__init__()
        self.stride = 1 if fan_in == fan_out else 2
        self.grown = fan_out - fan_in
        self.first = nn.Sequential(
            nn.Conv2d(fan_in, fan_out, 3, stride=self.stride, padding=1, bias=False), nn.BatchNorm2d(fan_out)
        )
        self.second = nn.Sequential(nn.Conv2d(fan_out, fan_out, 3, padding=1, bias=False), nn.BatchNorm2d(fan_out))

    def forward(self, x: Tensor) -> Tensor:
        """Return the block's output; new channels of the shortcut are zero."""
        shortcut = functional.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, 0, self.grown))
        return functional.relu(self.second(functional.relu(self.first(x))) + shortcut)


class ResNet18(nn.Module):
    """ResNet-18: four stages of two blocks with 64, 128, 256 and 512 channels, shortcuts that are projections."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 64, 3, padding=1, bias=False), nn.BatchNorm2d(64), nn.ReLU())
        widths = [64, 64, 64, 128, 128, 256, 256, 512, 512]
        self.blocks = nn.Sequential(*(ProjectionBlock(a, b) for a, b in itertools.pairwise(widths)))
        self.head = nn.Linear(512, 10)

    def forward(self, x: Tensor) -> Tensor:  # (batch, 3, 32, 32) -> (batch, 10)
        """Return the logits."""
        return self.head(self.blocks(self.stem(x)).mean((2, 3)))


def _make_mlp(width: int) -> nn.Module:
    widths = [784, *[width] * 5]
    hidden = [layer for a, b in itertools.pairwise(widths) for layer in (nn.Linear(a, b), nn.ReLU())]
    return nn.Sequential(*hidden, nn.Linear(width, 10))


def _trained(
    name: str, make: Callable[[], nn.Module], inputs: Tensor, *, batch_size: int, epochs: int, train_batch_size: int
) -> Problem:
    """Train with Adam, the learning rate falling to zero; the same weights in each run on the same machine."""
    targets = labels(len(inputs))
    train_batch_size = min(train_batch_size, len(inputs))
    started = time.perf_counter()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = make()
        steps = epochs * (len(inputs) // train_batch_size)
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        for _ in range(epochs):
            order = torch.randperm(len(inputs))
            for chosen in order[: len(order) // train_batch_size * train_batch_size].split(train_batch_size):
                optimizer.zero_grad()
                functional.cross_entropy(model(inputs[chosen]), targets[chosen]).backward()
                optimizer.step()
                schedule.step()
    seconds = time.perf_counter() - started
    model.eval().zero_grad(set_to_none=True)
    with torch.no_grad():
        outputs = model(inputs)
    return Problem(
        name=name,
        model=model,
        loader=list(zip(inputs.split(batch_size), targets.split(batch_size), strict=True)),
        loss=functional.cross_entropy(outputs, targets).item(),
        accuracy=(outputs.argmax(1) == targets).double().mean().item(),
        seconds=seconds,
    )
