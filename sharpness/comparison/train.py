"""Training of one model with one batch size, until the training loss is low enough."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, TypeAlias, final

import torch
from torch import Tensor, nn
from torch.utils.data import BatchSampler, DataLoader, Dataset, RandomSampler, SequentialSampler, TensorDataset

from sharpness.errors import ArgumentError, NonFiniteError
from sharpness.objective import Objective
from sharpness.objective.data import map_tensors
from sharpness.objective.reduction import LossFn

OptimizerFactory: TypeAlias = Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]
OPTIMIZERS = ("sgd", "adam")
_EVALUATION_BATCH = 1024
_NEAR = 5.0  # times the stop loss: from here on the loss is looked at
_LOOKS = 8  # times an epoch instead of once


@final
@dataclass(frozen=True)
class Training:
    """What a training took and where it ended."""

    epochs: int
    updates: int
    seconds: float
    loss: float
    reached: bool  # the stop loss


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
    if hasattr(data, "__getitem__") and hasattr(data, "__len__") and not isinstance(data, (DataLoader, list, tuple)):
        if not len(data):
            raise ArgumentError(f"`{name}` is empty; at least one sample is needed.")
        return data  # type: ignore[no-any-return]
    raise ArgumentError(
        f"`{name}` must be a data set of (input, target), or a tuple of tensors (inputs, targets), got "
        f"{type(data).__name__}. Pass loader.dataset for a DataLoader."
    )


def batches_of(dataset: Dataset[Any], batch_size: int, *, generator: torch.Generator | None = None) -> DataLoader[Any]:
    """Return a loader over ``dataset``, shuffled if there is a ``generator``; tensors are indexed by whole batches."""
    size = min(batch_size, len(dataset))  # type: ignore[arg-type]
    if not isinstance(dataset, TensorDataset):
        return DataLoader(dataset, batch_size=size, shuffle=generator is not None, generator=generator)
    order = SequentialSampler(dataset) if generator is None else RandomSampler(dataset, generator=generator)
    return DataLoader(dataset, sampler=BatchSampler(order, size, drop_last=False), batch_size=None)


def evaluation_batches(dataset: Dataset[Any]) -> DataLoader[Any]:
    """Return a loader over ``dataset`` for measuring, in order."""
    return batches_of(dataset, _EVALUATION_BATCH)


def make_optimizer(
    kind: str | OptimizerFactory, parameters: Iterable[nn.Parameter], *, lr: float, momentum: float
) -> torch.optim.Optimizer:
    """Return an optimizer by name, or by the user's factory."""
    if callable(kind):
        made = kind(parameters)
        if not isinstance(made, torch.optim.Optimizer):
            raise ArgumentError(
                f"`optimizer` must return a torch.optim.Optimizer, got {type(made).__name__}. "
                "Pass lambda parameters: torch.optim.SGD(parameters, lr=0.1), say."
            )
        return made
    if kind == "adam":
        return torch.optim.Adam(parameters, lr=lr)
    return torch.optim.SGD(parameters, lr=lr, momentum=momentum)


def train(
    model: nn.Module,
    dataset: Dataset[Any],
    loss_fn: LossFn | None,
    *,
    batch_size: int,
    optimizer: torch.optim.Optimizer,
    stop_loss: float,
    max_epochs: int,
    seed: int,
    report: Callable[[int, float], None],
) -> Training:
    """Train ``model`` in place until its loss over the whole of ``dataset``, in eval mode, is at most ``stop_loss``.

    Args:
        model: Trained in place.
        dataset: Training set.
        loss_fn: As in `Objective`.
        batch_size: Samples per update.
        optimizer: Of the model's parameters.
        stop_loss: Where to stop; looked at after every epoch, and eight times an epoch near it.
        max_epochs: Where to stop at the latest.
        seed: Seed of the order of the samples.
        report: Called after each epoch with its number and the loss.

    Raises:
        NonFiniteError: If the training diverges.
    """
    loader = batches_of(dataset, batch_size, generator=torch.Generator().manual_seed(seed))
    objective = Objective(model, evaluation_batches(dataset), loss_fn)
    started, updates, loss, epoch = time.perf_counter(), 0, float("inf"), 0
    last = len(loader)
    for epoch in range(1, max_epochs + 1):
        # Near the stop a small batch gets far below it within one epoch, and the minima would not compare.
        every = max(last // _LOOKS, 1) if loss <= _NEAR * stop_loss else last
        for i, batch in enumerate(loader, start=1):
            _update(model, objective, optimizer, batch)
            updates += 1
            if i % every == 0 or i == last:
                loss = _loss(objective, batch_size, epoch)
                if loss <= stop_loss:
                    break
        report(epoch, loss)
        if loss <= stop_loss:
            break
    model.eval()
    return Training(
        epochs=epoch, updates=updates, seconds=time.perf_counter() - started, loss=loss, reached=loss <= stop_loss
    )


def _update(model: nn.Module, objective: Objective, optimizer: torch.optim.Optimizer, batch: Any) -> None:
    """Take one step on one batch."""
    model.train()
    optimizer.zero_grad()
    terms = objective.criterion(model, map_tensors(lambda tensor: tensor.to(objective.device), batch))
    (terms.total / terms.weight).backward()  # type: ignore[no-untyped-call]
    optimizer.step()


def _loss(objective: Objective, batch_size: int, epoch: int) -> float:
    """Return the loss over the whole training set."""
    try:
        return objective.value()
    except NonFiniteError as error:
        raise NonFiniteError(
            f"training with batch size {batch_size} diverged in epoch {epoch}: {error} Lower lr."
        ) from error
