"""The same model and loss on other terms: on normalised logits, and on groups of the samples."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from sharpness.errors import ArgumentError, NoTermsError
from sharpness.objective.data import num_samples, samples
from sharpness.objective.microbatch import adds_up
from sharpness.objective.objective import Objective


def normalised(objective: Objective) -> Objective:
    """Return the objective with the logits of each sample centred and scaled to unit length before the loss.

    Raises:
        ArgumentError: If a ``batch_loss`` hides the logits.
    """
    if objective.criterion.hides_outputs:
        raise ArgumentError(
            "`normalize_logits` acts on the outputs of the model, and a batch_loss hides them. Pass "
            "loss_fn=callable(outputs, targets) in its place, or normalise the logits in your batch_loss."
        )
    other = objective._again()
    other.criterion.normalise()
    return other


def grouped(objective: Objective, size: int) -> Iterator[Objective]:
    """Yield the objective on each group of ``size`` samples, in the order of the data; the last one may be smaller.

    A group is made of slices of the loader's batches, so the groups are the same however the data are split.

    Raises:
        ArgumentError: If a batch holds nothing to cut.
    """
    objective.passes.count += 1
    group: list[Any] = []
    left = size
    for _, batch in objective.batches.walk():
        total = num_samples(batch)
        if total is None:
            raise ArgumentError(
                "`group_size` cuts batches into samples, and this one holds no tensor with a dimension. Leave it out."
            )
        start = 0
        while start < total:
            stop = min(start + left, total)
            group.append(samples(batch, start, stop))
            left, start = left - (stop - start), stop
            if not left:
                yield _on(objective, group)
                group, left = [], size
    if group:
        yield _on(objective, group)


def group_weights(objective: Objective, size: int, whole: float) -> list[float]:
    """Return the number of loss terms of each group of an objective whose loss is ``whole``; one forward pass.

    Raises:
        ArgumentError: If the losses of the groups do not add up to the loss of the whole.
    """
    total, weights = 0.0, list[float]()
    for group in grouped(objective, size):
        try:
            total += group.value() * (group.num_terms or 0.0)
            weights.append(group.num_terms or 0.0)
        except NoTermsError:  # all of its targets are ignored
            weights.append(0.0)
        except Exception as error:  # whatever a model raises that takes the whole but not this part of it
            raise ArgumentError(
                f"`group_size` cuts the data into groups that the model cannot take ({error}). Leave it out."
            ) from error
    found = total / (sum(weights) or 1.0)
    if not adds_up(found, whole):
        raise ArgumentError(
            f"`group_size` changes the loss from {whole:.6g} to {found:.6g}: the samples see each other, the first "
            "dimension does not count them, or chance has a part in it. Leave it out."
        )
    return weights


def _on(objective: Objective, batches: list[Any]) -> Objective:
    """Return the objective on other batches, with what was found out about the loss."""
    return objective._again(loader=batches, max_batches=None, skip_batches=0, microbatch_size=None)
