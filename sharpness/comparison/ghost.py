"""Ghost batch normalisation (Hoffer et al. 2017): statistics of small batches inside of a large one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from sharpness.errors import ArgumentError, ModelError

_ABSENT = object()


def batch_norms(model: nn.Module) -> dict[str, _BatchNorm]:
    """Return the layers that normalise by the batch, by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, _BatchNorm)}


def check_ghosts(model: nn.Module, ghost_batch_size: int | None) -> None:
    """Refuse ghost batches for a model that would not notice them.

    Raises:
        ArgumentError: If the model has no BatchNorm layer.
    """
    if ghost_batch_size is not None and not batch_norms(model):
        raise ArgumentError(
            f"`ghost_batch_size` is {ghost_batch_size}, and the model has no BatchNorm layer whose statistics could be "
            "taken over ghost batches. Leave it out."
        )


def ghost_sizes(num_samples: int, ghost_batch_size: int) -> list[int]:
    """Return how a batch is cut: a rest is a ghost batch of its own, but a single sample joins the one before it."""
    sizes = [ghost_batch_size] * (num_samples // ghost_batch_size)
    rest = num_samples % ghost_batch_size
    if rest == 1 and sizes:
        sizes[-1] += 1
    elif rest:
        sizes.append(rest)
    return sizes


@contextmanager
def ghost_batches(model: nn.Module, ghost_batch_size: int | None, num_samples: int) -> Iterator[None]:
    """Let each BatchNorm layer see one ghost batch after the other, for one batch of ``num_samples`` samples.

    The layer itself does the work: in training mode it normalises each ghost batch by that one's mean and variance, and
    moves its running statistics once per ghost batch, in their order. The architecture stays what it is.

    Args:
        model: Its BatchNorm layers get a ``forward`` of their own, and lose it on leaving.
        ghost_batch_size: Samples per ghost batch; ``None`` changes nothing.
        num_samples: Samples in the batch. A layer may see several rows per sample, one after the other.
    """
    if ghost_batch_size is None or num_samples <= ghost_batch_size:
        yield
        return
    before = [
        (module, name, module.forward, vars(module).get("forward", _ABSENT))
        for name, module in batch_norms(model).items()
    ]
    try:
        for module, name, forward, _ in before:
            vars(module)["forward"] = _in_turn(module, name, forward, num_samples, ghost_batch_size)
        yield
    finally:
        for module, _, _, own in before:
            if own is _ABSENT:
                vars(module).pop("forward", None)
            else:
                vars(module)["forward"] = own


def _in_turn(
    module: nn.Module, name: str, forward: Callable[[Tensor], Tensor], num_samples: int, ghost_batch_size: int
) -> Any:
    def run(input: Tensor) -> Tensor:
        if not module.training:
            return forward(input)
        rows, rest = divmod(len(input), num_samples)
        if rest:
            raise ModelError(
                f"BatchNorm layer {name!r} gets {len(input)} rows for a batch of {num_samples} samples, which cannot "
                "be told apart into ghost batches. Leave ghost_batch_size out for this model."
            )
        sizes = [rows * size for size in ghost_sizes(num_samples, ghost_batch_size)]
        return torch.cat([forward(piece) for piece in torch.split(input, sizes)])

    return run
