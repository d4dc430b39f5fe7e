"""Training of one model with one batch size, until the training loss is low enough, or for so long."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    TensorDataset,
)

from sharpness.comparison.ghost import batch_norms, ghost_batches
from sharpness.comparison.schedule import Warmup, learning_rate
from sharpness.errors import ArgumentError, NonFiniteError
from sharpness.objective import Objective
from sharpness.objective.data import map_tensors
from sharpness.objective.reduction import LossFn

_EVALUATION_BATCH = 1024
_NEAR = 5.0  # times the stop loss: from here on the loss is looked at
_LOOKS = 8  # times an epoch at least, instead of once


@final
@dataclass(frozen=True)
class Training:
    """What a training took and where it ended."""

    epochs: int
    updates: int
    seconds: float
    loss: float
    reached: bool  # the stop loss; true where there is none
    samples: int  # processed, as often as they were
    learning_rate: float | None  # of the first group of parameters, after a warm-up; None where the optimizer has none


def as_dataset(name: str, data: Any) -> Dataset[Any]:
    """Return ``data`` as a data set: itself, or the pairs of a tuple of tensors.

    Raises:
        ArgumentError: If it is neither.
    """
    if isinstance(data, (tuple, list)) and len(data) == 2 and all(isinstance(item, Tensor) for item in data):
        if data[0].shape[:1] != data[1].shape[:1]:
            raise ArgumentError(
                f"`{name}` has {len(data[0])} inputs and {len(data[1])} targets; there must be as many of both."
            )
        data = TensorDataset(*data)
    unfit = (DataLoader, IterableDataset, list, tuple)
    if hasattr(data, "__getitem__") and hasattr(data, "__len__") and not isinstance(data, unfit):
        if not len(data):
            raise ArgumentError(f"`{name}` is empty; at least one sample is needed.")
        return data  # type: ignore[no-any-return]
    raise ArgumentError(
        f"`{name}` must be a data set of (input, target) with a length and an item for each index, or a tuple of "
        f"tensors (inputs, targets), got {type(data).__name__}. Pass loader.dataset for a DataLoader."
    )


def batches_of(
    dataset: Dataset[Any], batch_size: int, *, generator: torch.Generator | None = None, drop_last: bool = False
) -> DataLoader[Any]:
    """Return a loader over ``dataset``, shuffled if there is a ``generator``; tensors are indexed by whole batches."""
    size = min(batch_size, len(dataset))  # type: ignore[arg-type]
    if not isinstance(dataset, TensorDataset):
        shuffle = generator is not None
        return DataLoader(dataset, batch_size=size, shuffle=shuffle, generator=generator, drop_last=drop_last)
    order = SequentialSampler(dataset) if generator is None else RandomSampler(dataset, generator=generator)
    return DataLoader(dataset, sampler=BatchSampler(order, size, drop_last=drop_last), batch_size=None)


def leaves_one_over(model: nn.Module, num_samples: int, batch_size: int) -> bool:
    """Return whether the last batch of an epoch is a single sample that BatchNorm cannot normalise by."""
    return batch_size > 1 and num_samples > batch_size and num_samples % batch_size == 1 and bool(batch_norms(model))


def evaluation_batches(dataset: Dataset[Any]) -> DataLoader[Any]:
    """Return a loader over ``dataset`` for measuring, in order."""
    return batches_of(dataset, _EVALUATION_BATCH)


def train(
    model: nn.Module,
    dataset: Dataset[Any],
    loss_fn: LossFn | None,
    *,
    batch_size: int,
    optimizer: torch.optim.Optimizer,
    stop_loss: float | None,
    max_epochs: int | None,
    seed: int,
    report: Callable[[int, float], None],
    max_updates: int | None = None,
    warmup_epochs: float = 0.0,
    ghost_batch_size: int | None = None,
) -> Training:
    """Train ``model`` in place until the first of its limits is met.

    A last batch of one sample is left out where the model has BatchNorm layers.

    Args:
        model: Trained in place, and in eval mode in the end.
        dataset: Training set.
        loss_fn: As in `Objective`.
        batch_size: Samples per update.
        optimizer: Of the model's parameters.
        stop_loss: Loss over the whole of ``dataset``, in eval mode, at which to stop; looked at after every epoch, and
            eight to fifteen times an epoch near it.
        max_epochs: Where to stop at the latest.
        seed: Seed of the order of the samples.
        report: Called after each epoch with its number and the loss.
        max_updates: Where to stop at the latest.
        warmup_epochs: Epochs over which the learning rate rises, linearly with each update.
        ghost_batch_size: Samples that BatchNorm takes its statistics of; ``None`` takes the whole batch.

    Raises:
        NonFiniteError: If the training diverges.
    """
    total = len(dataset)  # type: ignore[arg-type]
    loader = batches_of(
        dataset,
        batch_size,
        generator=torch.Generator().manual_seed(seed),
        drop_last=leaves_one_over(model, total, batch_size),
    )
    objective = Objective(model, evaluation_batches(dataset), loss_fn)
    started, updates, samples, loss, epoch = time.perf_counter(), 0, 0, math.inf, 0
    last, target = len(loader), -math.inf if stop_loss is None else stop_loss
    rate = learning_rate(optimizer)
    warmup = Warmup(optimizer, math.ceil(warmup_epochs * last))
    done = False
    for epoch in itertools.count(1) if max_epochs is None else range(1, max_epochs + 1):
        # Near the stop a small batch gets far below it within one epoch, and the minima would not compare.
        every = max(last // _LOOKS, 1) if loss <= _NEAR * target else last
        for i, batch in enumerate(loader, start=1):
            count = min(batch_size, total - (i - 1) * batch_size)
            updates, samples = updates + 1, samples + count
            warmup.before(updates)
            with ghost_batches(model, ghost_batch_size, count):
                _update(model, objective, optimizer, batch)
            done = updates == max_updates
            if done or i % every == 0 or i == last:
                loss = _loss(objective, batch_size, seed, epoch)
                done = done or loss <= target
            if done:
                break
        report(epoch, loss)
        if done:
            break
    model.eval()
    return Training(
        epochs=epoch,
        updates=updates,
        seconds=time.perf_counter() - started,
        loss=loss,
        reached=stop_loss is None or loss <= stop_loss,
        samples=samples,
        learning_rate=rate,
    )


def _update(model: nn.Module, objective: Objective, optimizer: torch.optim.Optimizer, batch: Any) -> None:
    """Take one step on one batch."""
    model.train()
    optimizer.zero_grad()
    terms = objective.criterion(model, map_tensors(lambda tensor: tensor.to(objective.device), batch))
    (terms.total / terms.weight).backward()  # type: ignore[no-untyped-call]
    optimizer.step()


def _loss(objective: Objective, batch_size: int, seed: int, epoch: int) -> float:
    """Return the loss over the whole training set."""
    try:
        return objective.value()
    except NonFiniteError as error:
        raise NonFiniteError(
            f"training with batch size {batch_size} and seed {seed} diverged in epoch {epoch}: {error} Lower lr."
        ) from error
