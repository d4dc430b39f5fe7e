"""Pieces of a batch in its place: the same loss in less memory, where the samples do not see each other."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from sharpness.errors import ArgumentError
from sharpness.objective.data import Batches, pieces
from sharpness.objective.functional import Functional
from sharpness.objective.guard import reseed

_SLACK = 1e-4  # relative change of the loss that rounding may make


def check_no_batch_statistics(model: nn.Module, mode: str, option: str = "microbatch_size") -> None:
    """Refuse to cut batches whose statistics the model uses.

    Raises:
        ArgumentError: If a BatchNorm layer normalises by the batch in this mode.
    """
    found = batch_statistics(model, mode)
    if found is not None:
        raise ArgumentError(
            f"`{option}` would change the loss: {found} normalises by the statistics of the batch in this mode. Use "
            'mode="eval", or a loader with smaller batches.'
        )


def batch_statistics(model: nn.Module, mode: str) -> str | None:
    """Return the name and kind of the first layer that normalises by the statistics of the batch in this mode."""
    for name, module in model.named_modules():
        if not isinstance(module, _BatchNorm):
            continue
        training = module.training if mode == "as_is" else mode == "train"
        if training or module.running_mean is None:
            return f"{name!r} ({type(module).__name__})"
    return None


def check_pieces(functional: Functional, batches: Batches, seed: int) -> None:
    """Refuse pieces whose losses do not add up to that of the first batch that is cut.

    Raises:
        ArgumentError: If they do not, or a piece cannot be evaluated.
    """
    for _, batch in batches.walk(cut=False):
        cut = list(pieces(batch, batches.piece))
        if len(cut) > 1:
            break
    else:
        return
    total, weight = _total(functional, batch, seed)
    try:
        parts = [_total(functional, piece, seed) for piece in cut]
    except Exception as error:  # whatever a model raises that has a batch size written into it
        raise ArgumentError(
            f"`microbatch_size` cuts a batch into pieces that the model cannot take ({error}). Leave it out, "
            "and use a loader with smaller batches."
        ) from error
    count = sum(part[1] for part in parts)
    found, whole = sum(part[0] for part in parts) / (count or 1.0), total / (weight or 1.0)
    if adds_up(found, whole):
        return
    raise ArgumentError(
        f"`microbatch_size` changes the loss of a batch from {whole:.6g} to {found:.6g}: its samples see "
        "each other, or chance has a part in it. Leave it out, and use a loader with smaller batches."
    )


def adds_up(found: float, whole: float) -> bool:
    """Return whether a loss put together from pieces is that of the whole."""
    return abs(found - whole) <= _SLACK * max(abs(whole), 1e-3)


def _total(functional: Functional, batch: Any, seed: int) -> tuple[float, float]:
    """Return the sum of the loss terms of a batch, and their number."""
    reseed(seed, 0, 0)
    leaves = functional.leaves(differentiable=False)
    terms = functional.terms(batch, functional.places(leaves))
    return (terms.total.item(), terms.weight) if terms.weight else (0.0, 0.0)
