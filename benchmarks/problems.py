"""The trained networks of the suite by name, each in the size that is measured and in one to try the suite with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch

from benchmarks.language import Size, minilm, trained
from benchmarks.models import Problem, mlp, resnet18, resnet20

_SMALL = Size(name="gpt", width=128, layers=4, heads=4, context=64, sequences=32, batch_size=12, steps=400)
_LARGE = Size(name="gpt-10m", width=384, layers=6, heads=6, context=64, sequences=16, batch_size=6, steps=150)
_TINY = Size(name="gpt", width=16, layers=1, heads=2, context=16, sequences=5, batch_size=3, steps=20)
_GPT2 = Size(name="gpt2", width=768, layers=12, heads=12, context=256, sequences=10, batch_size=4, steps=100)

FULL: dict[str, Callable[[], Problem]] = {
    "mlp": mlp,
    "resnet20": resnet20,
    "resnet18": resnet18,
    "gpt": lambda: trained(_SMALL),
    "gpt-10m": lambda: trained(_LARGE),
    "minilm": minilm,
}
LARGE: dict[str, Callable[[], Problem]] = {"gpt2": lambda: trained(_GPT2)}  # for a GPU, and only if asked for
QUICK: dict[str, Callable[[], Problem]] = {
    "mlp": lambda: mlp(num_images=200, width=32, batch_size=80, epochs=60),
    "resnet20": lambda: resnet20(num_images=10, batch_size=4, epochs=1),
    "resnet18": lambda: resnet18(num_images=3, batch_size=2, epochs=1),
    "gpt": lambda: trained(_TINY),
    "gpt-10m": lambda: trained(replace(_TINY, name="gpt-10m", layers=2)),
    "minilm": lambda: minilm(pairs=5, batch_size=3),
}


class UnavailableError(Exception):
    """A network whose weights are not installed, and which package has them."""


def load(name: str, *, quick: bool = False, device: str = "cpu") -> Problem:
    """Return the network ``name``, trained, on ``device``.

    Raises:
        UnavailableError: If its weights are not there.
    """
    import pytest  # the loaders of real models say with a skip what is missing

    try:
        problem = (QUICK if quick else {**FULL, **LARGE})[name]()
    except (pytest.skip.Exception, ImportError) as error:
        raise UnavailableError(f"{name} is left out: {error}") from error
    return moved(replace(problem, name=f"quick-{name}") if quick else problem, device)


def moved(problem: Problem, device: str) -> Problem:
    """Return the problem on ``device``."""
    target = torch.device(device)
    loader = [(inputs.to(target), labels.to(target)) for inputs, labels in problem.loader]
    return replace(problem, model=problem.model.to(target), loader=loader)
