"""How to train: the optimizer, its learning rate for each batch size, and where to stop; resolved and checked once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, final

from torch import nn
from torch.utils.data import Dataset

from sharpness._checks import check_choice, check_count, check_positive
from sharpness.comparison.schedule import LR_SCALING, OPTIMIZERS, OptimizerFactory, make_optimizer, scale_learning_rate
from sharpness.comparison.train import Training, train
from sharpness.errors import ArgumentError
from sharpness.objective.reduction import LossFn

_MAX_EPOCHS = 1000


@final
class Default(float):
    """The default of an option, told from the same number passed by a user: options are never ignored."""


STOP_LOSS, LR, MOMENTUM = Default(1e-2), Default(0.05), Default(0.9)
_ADAM_LR = Default(1e-3)  # PyTorch's own: Adam's steps are about as long as its learning rate


@final
@dataclass(frozen=True)
class Recipe:
    """How each batch size is trained.

    Attributes:
        optimizer: A name, or the user's factory.
        lr: Learning rate for the batch size ``reference``; ``None`` where it is the factory's own business.
        momentum: Momentum of ``"sgd"``; ``None`` for others.
        stop_loss: The one rule in force, or ``None``.
        epochs: Likewise.
        updates: Likewise.
        max_epochs: Ceiling for ``stop_loss``.
        lr_scaling: A key of ``LR_SCALING``.
        warmup_epochs: Epochs of linear warm-up.
        ghost_batch_size: Samples per ghost batch.
        reference: Batch size for which the learning rate is meant.
    """

    optimizer: str | OptimizerFactory
    lr: float | None
    momentum: float | None
    stop_loss: float | None
    epochs: int | None
    updates: int | None
    max_epochs: int | None
    lr_scaling: str
    warmup_epochs: float
    ghost_batch_size: int | None
    reference: int

    @classmethod
    def of(
        cls,
        *,
        batch_sizes: list[int],
        optimizer: Any,
        lr: Any,
        momentum: Any,
        stop_loss: Any,
        epochs: Any,
        updates: Any,
        max_epochs: Any,
        lr_scaling: Any,
        warmup_epochs: Any = 0.0,
        ghost_batch_size: Any = None,
    ) -> Recipe:
        """Check the options of a user.

        Raises:
            ArgumentError: If one cannot be accepted, or two contradict, or one would be ignored.
        """
        if not callable(optimizer):
            check_choice("optimizer", optimizer, OPTIMIZERS)
        lr = _ADAM_LR if optimizer == "adam" and isinstance(lr, Default) else lr
        check_positive("lr", lr)
        check_positive("momentum", momentum, allow_zero=True)
        if callable(optimizer) and not isinstance(lr, Default):
            raise ArgumentError(
                f"`lr` is {lr!r}, and `optimizer` is a factory, which sets the learning rate itself. Give it there, "
                "lambda parameters: torch.optim.SGD(parameters, lr=0.1), and leave `lr` out."
            )
        if optimizer != "sgd" and not isinstance(momentum, Default):
            raise ArgumentError(
                f'`momentum` is {momentum!r}, and only optimizer="sgd" has it. Leave it out, or pass a factory, '
                "lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9), say."
            )
        loss, epochs, updates, max_epochs = _stop(stop_loss, epochs, updates, max_epochs)
        if ghost_batch_size is not None:
            ghost_batch_size = check_count("ghost_batch_size", ghost_batch_size, low=2)
            if ghost_batch_size >= max(batch_sizes):
                raise ArgumentError(
                    f"`ghost_batch_size` must be smaller than the largest batch size, {max(batch_sizes)}, got "
                    f"{ghost_batch_size}: no batch would be cut. Lower it, or leave it out."
                )
        return cls(
            optimizer=optimizer,
            lr=None if callable(optimizer) else float(lr),
            momentum=float(momentum) if optimizer == "sgd" else None,
            stop_loss=loss,
            epochs=epochs,
            updates=updates,
            max_epochs=max_epochs,
            lr_scaling=check_choice("lr_scaling", lr_scaling, LR_SCALING),
            warmup_epochs=check_positive("warmup_epochs", warmup_epochs, allow_zero=True),
            ghost_batch_size=ghost_batch_size,
            reference=batch_sizes[0],
        )

    def settings(self) -> dict[str, Any]:
        """Return the options, JSON-ready."""
        return {
            "optimizer": self.optimizer if isinstance(self.optimizer, str) else callable_name(self.optimizer),
            "lr": self.lr,
            "momentum": self.momentum,
            "stop_loss": self.stop_loss,
            "epochs": self.epochs,
            "updates": self.updates,
            "max_epochs": self.max_epochs,
            "lr_scaling": self.lr_scaling,
            "warmup_epochs": self.warmup_epochs,
            "ghost_batch_size": self.ghost_batch_size,
        }

    def make_optimizer(self, model: nn.Module, batch_size: int) -> Any:
        """Return an optimizer of the model, at the learning rate for this batch size."""
        factor = LR_SCALING[self.lr_scaling](batch_size / self.reference)
        if self.lr is not None:
            rate, momentum = self.lr * factor, self.momentum or 0.0
            return make_optimizer(self.optimizer, model.parameters(), lr=rate, momentum=momentum)
        optimizer = make_optimizer(self.optimizer, model.parameters(), lr=LR, momentum=MOMENTUM)
        scale_learning_rate(optimizer, factor)
        return optimizer

    def train(
        self,
        model: nn.Module,
        dataset: Dataset[Any],
        loss_fn: LossFn | None,
        *,
        batch_size: int,
        seed: int,
        report: Callable[[int, float], None],
        optimizer: Any = None,
    ) -> Training:
        """Train ``model`` in place with one batch size, by an optimizer from `make_optimizer`, new if ``None``."""
        return train(
            model,
            dataset,
            loss_fn,
            batch_size=batch_size,
            optimizer=self.make_optimizer(model, batch_size) if optimizer is None else optimizer,
            stop_loss=self.stop_loss,
            max_epochs=self.epochs if self.stop_loss is None else self.max_epochs,
            max_updates=self.updates,
            seed=seed,
            report=report,
            warmup_epochs=self.warmup_epochs,
            ghost_batch_size=self.ghost_batch_size,
        )


def _stop(stop_loss: Any, epochs: Any, updates: Any, max_epochs: Any) -> tuple[Any, Any, Any, Any]:
    """Return the one rule in force, and the ceiling of the training loss."""
    if stop_loss is not None:
        check_positive("stop_loss", stop_loss)
    epochs, updates, max_epochs = (
        None if value is None else check_count(name, value)
        for name, value in (("epochs", epochs), ("updates", updates), ("max_epochs", max_epochs))
    )
    given = [name for name, value in (("epochs", epochs), ("updates", updates)) if value is not None]
    if given and isinstance(stop_loss, Default):
        stop_loss = None
    given += ["stop_loss"] * (stop_loss is not None)
    if len(given) != 1:
        raise ArgumentError(
            "one of `stop_loss`, `epochs` and `updates` says where the trainings stop, got "
            f"{' and '.join(f'`{name}`' for name in given) or 'none of them'}. Pass exactly one."
        )
    if stop_loss is None and max_epochs is not None:
        raise ArgumentError(
            f"`max_epochs` is the ceiling for `stop_loss`, and `{given[0]}` stops the trainings here. Leave it out."
        )
    if stop_loss is None:
        return None, epochs, updates, None
    return float(stop_loss), None, None, _MAX_EPOCHS if max_epochs is None else max_epochs


def callable_name(function: Any) -> str:
    """Return what a user's function is called, without its address."""
    function = getattr(function, "func", function)  # of a functools.partial
    return f"{getattr(function, '__module__', '')}.{getattr(function, '__qualname__', type(function).__qualname__)}"


def check_batch_sizes(batch_sizes: Any, num_samples: int) -> list[int]:
    """Return the batch sizes as a list.

    Raises:
        ArgumentError: If they are not different counts, none larger than the data.
    """
    try:
        sizes = list(batch_sizes)
        different = len(set(sizes)) == len(sizes) > 0
    except TypeError:
        sizes, different = [], False
    if not different:
        raise ArgumentError(f"`batch_sizes` must be a list of different batch sizes, got {batch_sizes!r}.")
    return [check_count("batch_sizes", size, high=num_samples, of="the size of the training set") for size in sizes]
