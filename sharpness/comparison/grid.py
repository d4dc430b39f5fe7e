"""Trainings of a grid of batch sizes and seeds: each from the same start, none twice."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import inspect
import math
import numbers
import re
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, TypeAlias, final

import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, Subset, TensorDataset

from sharpness._progress import progress_bar
from sharpness.comparison.checkpoints import Store
from sharpness.comparison.ghost import check_ghosts
from sharpness.comparison.recipe import Recipe, callable_name
from sharpness.comparison.starts import Starts, copy_into
from sharpness.comparison.train import evaluation_batches, leaves_one_over
from sharpness.errors import ArgumentError, NonFiniteError
from sharpness.objective import Objective
from sharpness.objective.data import tensors_in
from sharpness.objective.fingerprint import of_loss, of_tensors
from sharpness.objective.guard import own_randomness
from sharpness.objective.reduction import LossFn
from sharpness.results import Spread

OnEpoch: TypeAlias = Callable[[int, float], None]  # its number and the loss
Trainer: TypeAlias = "Callable[[nn.Module, int, int, OnEpoch], Took]"
COUNTS = ("epochs", "updates", "samples", "learning_rate")  # what a user's training may tell
_ITEMS = 64  # of a data set that is no tensor


@final
@dataclass(frozen=True, kw_only=True)
class Took:
    """What one run took; ``None`` is what nobody counted."""

    epochs: float | None = None
    updates: float | None = None
    samples: float | None = None
    learning_rate: float | None = None
    seconds: float
    loss: float
    reached: bool = True


def run_grid(
    starts: Starts,
    trainer: Trainer,
    batch_sizes: list[int],
    seeds: range,
    *,
    store: Store | None,
    progress: bool | None,
    on_trained: Callable[[int, int, nn.Module], None] | None,
) -> dict[int, list[tuple[nn.Module, Took]]]:
    """Train every batch size with every seed, or take the run from the store; return model and cost of each."""
    grid = [(seed, size) for seed in seeds for size in batch_sizes]
    found = {(seed, size): store.read(size, seed, starts) if store else None for seed, size in grid}
    runs: dict[int, list[tuple[nn.Module, Took]]] = {size: [] for size in batch_sizes}
    with progress_bar(progress, total=len(grid), title="training", unit="run") as bar:
        bar.initial = bar.n = sum(finished is not None for finished in found.values())  # not part of the estimate
        for seed, size in grid:
            model, finished = starts.model(seed), found.pop((seed, size))
            if finished is not None:
                weights, about = finished
                copy_into(model, weights, "`checkpoint_dir` holds another architecture")
                for name, parameter in model.named_parameters():
                    parameter.requires_grad_(name in about["trainable"])
                model.eval()
                took = Took(**about["took"])
            else:
                with own_randomness(seed, 1):
                    took = trainer(model, size, seed, _reporter(bar, size, seed))
                if store is not None:
                    store.write(model, size, seed, starts, dataclasses.asdict(took))
                bar.update()
            runs[size].append((model, took))
            if on_trained is not None:
                on_trained(size, seed, model)
    return runs


def check_test_set(model: nn.Module, dataset: Dataset[Any], loss_fn: LossFn | None) -> None:
    """Look at the beginning of the test set, which is needed only when all is trained."""
    with suppress(NonFiniteError):  # nobody has trained the model as yet
        Objective(model, evaluation_batches(dataset), loss_fn, max_batches=1).value()


def recipe_trainer(recipe: Recipe, dataset: Dataset[Any], loss_fn: LossFn | None) -> Trainer:
    """Return a trainer that follows a recipe."""

    def run(model: nn.Module, size: int, seed: int, report: OnEpoch) -> Took:
        check_ghosts(model, recipe.ghost_batch_size)
        training = recipe.train(model, dataset, loss_fn, batch_size=size, seed=seed, report=report)
        return Took(**dataclasses.asdict(training))

    return run


def user_trainer(train: Callable[[nn.Module, DataLoader[Any]], Any], dataset: Dataset[Any], loss_fn: Any) -> Trainer:
    """Return a trainer that lets the user's own function do the work."""

    def run(model: nn.Module, size: int, seed: int, report: OnEpoch) -> Took:
        loader: DataLoader[Any] = DataLoader(
            dataset,
            batch_size=size,
            shuffle=True,
            generator=torch.Generator().manual_seed(seed),
            drop_last=leaves_one_over(model, len(dataset), size),  # type: ignore[arg-type]
        )
        started = time.perf_counter()
        answer = train(model, loader)
        seconds = time.perf_counter() - started
        if isinstance(answer, nn.Module) and answer is not model:
            raise ArgumentError(
                "`train` returned another model than the one that it was given, and that one is measured. Train it in "
                "place."
            )
        counts: dict[str, Any] = {}
        for name in COUNTS if isinstance(answer, Mapping) else ():
            value = answer.get(name)
            if value is not None:
                counts[name] = _counted(name, value)
        try:
            loss = Objective(model, evaluation_batches(dataset), loss_fn).value()
        except NonFiniteError as error:
            raise NonFiniteError(
                f"`train` diverged with batch size {size} and seed {seed}: {error} Lower its learning rate."
            ) from error
        return Took(seconds=seconds, loss=loss, **counts)

    return run


def binding(
    dataset: Dataset[Any],
    loss_fn: LossFn | None,
    starts: Starts,
    seed: int,
    recipe: Recipe | None,
    train: Callable[..., Any] | None,
) -> dict[str, Any]:
    """Return what all runs of a folder have in common, JSON-ready; a batch size and a seed make a run of it."""
    model = starts.peek(seed)
    found: dict[str, Any] = {
        "samples": len(dataset),  # type: ignore[arg-type]
        "data": _data_digest(dataset),
        "loss": of_loss(loss_fn),
        "loss_source": _source_digest(loss_fn) if inspect.isfunction(loss_fn) else None,
        "model": hashlib.blake2b(_stable(model).encode(), digest_size=16).hexdigest(),
    }
    if recipe is None:
        return {**found, "train": callable_name(train), "train_source": _source_digest(train)}
    found.update(recipe.settings())
    if recipe.lr_scaling != "none":
        found["lr_batch_size"] = recipe.reference
    if callable(recipe.optimizer):  # told by what it makes
        with own_randomness(seed):
            made = recipe.make_optimizer(model, recipe.reference)
        groups = [{name: _stable(value) for name, value in g.items() if name != "params"} for g in made.param_groups]
        found["optimizer"] = f"{type(made).__module__}.{type(made).__qualname__}"
        found["optimizer_groups"] = groups
    return found


def spreads(took: list[Took]) -> dict[str, Spread | None]:
    """Return epochs, updates, samples, learning rate and seconds over the seeds."""
    values = {name: [getattr(run, name) for run in took] for name in (*COUNTS, "seconds")}
    return {name: None if None in found else Spread.of(found) for name, found in values.items()}


def missed(took: dict[Any, list[Took]], recipe: Recipe | None, name: str) -> list[str]:
    """Return a warning for each group of runs of which some did not reach the stop loss."""
    if recipe is None or recipe.stop_loss is None:
        return []
    return [
        f"{name.format(key)} did not reach the loss {recipe.stop_loss:g} in {recipe.max_epochs} epochs for "
        f"{sum(not run.reached for run in group)} of {len(group)} seeds."
        for key, group in took.items()
        if not all(run.reached for run in group)
    ]


def _counted(name: str, value: Any) -> float:
    """Return a number that the user's training tells."""
    known = isinstance(value, numbers.Real) and not isinstance(value, bool)
    if not known or not 0 <= float(value) < math.inf:
        raise ArgumentError(f"`train` returned {name}={value!r}; a number of at least 0 is needed.")
    return float(value)


def _reporter(bar: Any, size: int, seed: int) -> OnEpoch:
    """Return what shows the state of one training beside the bar of the whole grid."""

    def report(epoch: int, loss: float) -> None:
        bar.set_postfix_str(f"batch {size}, seed {seed}, epoch {epoch}, loss {loss:.2e}", refresh=False)
        bar.update(0)

    return report


def _data_digest(dataset: Dataset[Any]) -> str | None:
    """Return a digest of all tensors, or of some samples of another data set; ``None`` if these change when read."""
    if isinstance(dataset, TensorDataset):
        return of_tensors(dataset.tensors)
    total = len(dataset)  # type: ignore[arg-type]
    chosen = Subset(dataset, sorted({i * (total - 1) // (_ITEMS - 1) for i in range(_ITEMS)}))
    digests = []
    for _ in range(2):
        with own_randomness(0):  # augmentation draws the same each time
            batches = DataLoader(chosen, batch_size=1)
            digests.append(of_tensors(tensor for batch in batches for tensor in tensors_in(batch)))
    return digests[0] if digests[0] == digests[1] else None


def _stable(value: Any) -> str:
    """Return the repr of a value without the addresses in it, which are others in each process."""
    return re.sub(r" at 0x[0-9a-fA-F]+", "", repr(value))


def _source_digest(function: Any) -> str | None:
    """Return a digest of the text of a user's function and of what a ``partial`` binds; ``None`` if there is none."""
    bound = ""
    while isinstance(function, functools.partial):
        bound += _stable((function.args, sorted(function.keywords.items())))
        function = function.func
    try:
        text = inspect.getsource(function) + bound
    except (OSError, TypeError):
        return None
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
