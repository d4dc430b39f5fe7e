"""Batches: any nesting of tensors that a loader yields, moved to where the model is."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import islice
from typing import Any, final

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence
from torch.utils.data import Dataset

from sharpness.errors import DataError
from sharpness.objective.guard import reseed
from sharpness.objective.memory import Budget, storages

_SAMPLES = 4


@final
@dataclasses.dataclass(frozen=True)
class Sample:
    """The first few samples of a batch.

    Attributes:
        batch: The samples.
        count: How many the whole batch has.
        bytes: How much memory its tensors take.
    """

    batch: Any
    count: int
    bytes: int

    @classmethod
    def of(cls, batch: Any) -> Sample | None:
        """Take the first samples of a batch, if it has any."""
        count, size = num_samples(batch), sum(storages(tensors_in(batch)).values())
        few = map_tensors(torch.clone, samples(batch, 0, _SAMPLES))  # a view would hold the whole batch
        return cls(few, count, size) if count else None


@final
class Batches:
    """A re-iterable of batches on one device, the same ones in every walk with the same draw.

    Every walk of a draw starts from the same random state, so that a loader that shuffles or augments with the
    global generators (or with its own) yields the same batches each time; another draw yields others.

    Args:
        loader: Any iterable that can be walked again and again.
        device: Where the batches go.
        skip: Leave out so many at the beginning.
        max_batches: Use only the first so many of the rest.
        seed: Seed of the random states that walks start from.
        uniform: Refuse batches of another structure than the first one's.
        piece: Cut batches into pieces of at most so many samples, each a batch of its own.
    """

    def __init__(
        self,
        loader: Iterable[Any],
        *,
        device: torch.device,
        skip: int = 0,
        max_batches: int | None = None,
        seed: int = 0,
        uniform: bool = True,
        piece: int | None = None,
    ) -> None:
        check_loader(loader)
        self.loader = loader
        self.count: int | None = None  # how many there are, once walked to the end
        self.loaded: int | None = None  # how many the loader yielded for them
        self.device = device
        self._skip = skip
        self._max_batches = max_batches
        self._seed = seed
        self.sample: Sample | None = None  # of the first batch, once settled
        self._kept: list[Any] | None = None
        self._settled = False
        self._uniform = uniform
        self.piece = piece
        self._structure: str | None = None  # of the first batch

    @property
    def _stop(self) -> int | None:
        return None if self._max_batches is None else self._skip + self._max_batches

    @property
    def kept(self) -> bool:
        """Whether the batches of draw 0 are held on the device."""
        return self._kept is not None

    def settle(self, budget: Budget) -> None:
        """Load the batches of draw 0 and keep them if all fit the budget; done once."""
        if self._settled:
            return
        loaded: list[Any] | None = []
        for i, batch in self.walk():
            if i == 0:
                self.sample = Sample.of(batch)
            if loaded is None or not budget.take(tensors_in(batch)):
                loaded = None
                break
            loaded.append(batch)
        self._kept, self._settled = loaded, True

    def walk(self, *, draw: int = 0, cut: bool = True) -> Iterator[tuple[int, Any]]:
        """Walk the data once; without ``cut`` the batches are whole."""
        if draw == 0 and cut and self._kept is not None:
            for i, batch in enumerate(self._kept):
                yield i, map_tensors(lambda tensor: tensor, batch)  # a new container: the user's loss may pop from it
            return
        own = [(generator, generator.get_state()) for generator in self.generators()]
        reseed(self._seed, draw)
        if draw:
            for generator, _ in own:
                generator.manual_seed(self._seed + draw)
        count = loaded = 0
        try:
            for batch in islice(iter(self.loader), self._skip, self._stop):
                self._check_structure(loaded, batch)
                loaded += 1
                for piece in pieces(map_tensors(self._move, batch), self.piece if cut else None):
                    yield count, piece
                    count += 1
        finally:
            for generator, state in own:
                generator.set_state(state)
        if not count and self.count:
            raise DataError(
                f"the loader yielded {self.count} batches on the first walk and none on a later one: it can be walked "
                "only once. Build the iterator anew in __iter__, or pass list(loader)."
            )
        if not count:
            raise DataError(
                "the loader yields no batch; at least one is needed. Check the data set, drop_last and the batch size."
            )
        self.count, self.loaded = count, loaded

    def tensors(self) -> list[Tensor]:
        """Return the tensors of the batches that are kept."""
        return tensors_in(self._kept) if self._kept is not None else []

    def generators(self) -> list[torch.Generator]:
        """Return the user's own random generators that walking the loader would advance."""
        owners = [self.loader, *(getattr(self.loader, name, None) for name in ("sampler", "batch_sampler"))]
        owners.append(getattr(owners[-1], "sampler", None))
        found = {id(g): g for g in (getattr(owner, "generator", None) for owner in owners)}
        return [generator for generator in found.values() if isinstance(generator, torch.Generator)]

    def _check_structure(self, i: int, batch: Any) -> None:
        if not self._uniform:
            return
        found = structure(batch)
        self._structure = self._structure or found
        if found != self._structure:
            raise DataError(
                f"the batches disagree in structure: batch 0 is {self._structure}, batch {i} is {found} (counted from "
                "0). Yield the same container with the same entries each time, or pass batch_loss=callable(model, "
                "batch) -> (loss, weight) that handles each kind."
            )

    def _move(self, tensor: Tensor) -> Tensor:
        if tensor.dtype in (torch.float16, torch.bfloat16):
            tensor = tensor.float()  # half-precision models are measured in single precision
        if tensor.is_inference():
            tensor = tensor.clone()  # autograd cannot save tensors made under inference_mode
        return tensor.to(self.device, non_blocking=True)


def check_loader(loader: Any) -> None:
    """Refuse what cannot be walked again and again.

    Raises:
        DataError: For one-shot iterators, single tensors, and what is not iterable.
    """
    if isinstance(loader, Tensor):
        raise DataError(
            "the loader is a single tensor; a loader yields batches. Pass [(inputs, targets)] for one batch."
        )
    if isinstance(loader, Mapping):
        raise DataError("the loader is a mapping; a loader yields batches. Pass [batch] for one batch.")
    if isinstance(loader, tuple) and len(loader) > 1 and all(isinstance(item, Tensor) for item in loader):
        raise DataError("the loader is a tuple of tensors, which looks like one batch. Pass [(inputs, targets)].")
    if isinstance(loader, Dataset) and not isinstance(loader, Iterable):
        raise DataError(
            f"the loader is a data set ({type(loader).__name__}), which yields samples, not batches. "
            "Pass DataLoader(dataset, batch_size=256)."
        )
    if isinstance(loader, Iterator):
        raise DataError(
            f"the loader is a one-shot iterator ({type(loader).__name__}); every product walks the data again. "
            "Pass the DataLoader itself, or list(iterator) if the batches fit in memory."
        )
    if not isinstance(loader, Iterable) and not hasattr(loader, "__getitem__"):
        raise DataError(f"the loader must yield batches, got {type(loader).__name__}. Pass a DataLoader or a list.")


def map_tensors(function: Callable[[Tensor], Tensor], batch: Any) -> Any:
    """Return ``batch`` with ``function`` applied to every tensor, whatever the nesting; the rest as it is."""
    if isinstance(batch, Tensor):
        return function(batch)
    if isinstance(batch, PackedSequence):  # its batch sizes live on the CPU and are no data
        order = [None if index is None else function(index) for index in (batch.sorted_indices, batch.unsorted_indices)]
        return PackedSequence(function(batch.data), batch.batch_sizes, *order)
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):  # a namedtuple
        return type(batch)(*(map_tensors(function, item) for item in batch))
    if isinstance(batch, (list, tuple)):
        items = [map_tensors(function, item) for item in batch]
        return items if isinstance(batch, list) else tuple(items)
    if isinstance(batch, Mapping):
        mapped = {key: map_tensors(function, item) for key, item in batch.items()}
        return mapped if type(batch) is dict else _rebuild(batch, mapped)
    if dataclasses.is_dataclass(batch) and not isinstance(batch, type):
        names = [field.name for field in dataclasses.fields(batch) if field.init]
        return dataclasses.replace(batch, **{name: map_tensors(function, getattr(batch, name)) for name in names})
    return batch


def _rebuild(batch: Mapping[Any, Any], mapped: dict[Any, Any]) -> Any:
    """Return ``mapped`` as the user's own mapping type (a BatchEncoding, say) where that can be built from a dict."""
    try:
        return type(batch)(mapped)  # type: ignore[call-arg]
    except TypeError:
        return mapped


def tensors_in(batch: Any) -> list[Tensor]:
    """Return every tensor of a batch."""
    found: list[Tensor] = []

    def collect(tensor: Tensor) -> Tensor:
        found.append(tensor)
        return tensor

    map_tensors(collect, batch)
    return found


def samples(batch: Any, start: int, stop: int) -> Any:
    """Return some of the samples of a batch: rows of the tensors as long as the first one, the others whole."""
    total = num_samples(batch)

    def cut(tensor: Tensor) -> Tensor:
        whole = tensor.layout != torch.strided or not tensor.ndim or tensor.shape[0] != total
        return tensor if whole else tensor[start:stop]

    return map_tensors(cut, batch)


def pieces(batch: Any, size: int | None) -> Iterator[Any]:
    """Yield a batch in pieces of at most ``size`` samples."""
    total = num_samples(batch)
    if size is None or total is None or total <= size:
        yield batch
        return
    for start in range(0, total, size):
        yield samples(batch, start, start + size)


def num_samples(batch: Any) -> int | None:
    """Return the number of samples of a batch, the length of its first tensor that has one."""
    return next((tensor.shape[0] for tensor in tensors_in(batch) if tensor.ndim), None)


def structure(batch: Any) -> str:
    """Say what a batch is made of at the top level, whatever its shapes and the order of its keys."""
    if isinstance(batch, (Tensor, PackedSequence)):
        return _kind(batch)
    if dataclasses.is_dataclass(batch) and not isinstance(batch, type) and not isinstance(batch, Mapping):
        batch = {field.name: getattr(batch, field.name) for field in dataclasses.fields(batch)}
    if isinstance(batch, Mapping):
        return "{" + ", ".join(f"{key!r}: {_kind(batch[key])}" for key in sorted(batch, key=str)) + "}"
    if isinstance(batch, (list, tuple)):
        return f"{type(batch).__name__}({', '.join(map(_kind, batch))})"
    return _kind(batch)


def _kind(item: Any) -> str:
    if isinstance(item, Tensor):
        real = "floating" if item.is_floating_point() else "complex" if item.is_complex() else "integer"
        return f"{'bool' if item.dtype == torch.bool else real} tensor"
    known = ((PackedSequence, "packed sequence"), (Mapping, "mapping"), ((list, tuple), "sequence"))
    return next((name for kind, name in known if isinstance(item, kind)), "other")


def describe(batch: Any) -> str:
    """Say in a few words what a batch is made of."""
    if isinstance(batch, Tensor):
        return f"tensor{list(batch.shape)} {str(batch.dtype).removeprefix('torch.')}"
    if isinstance(batch, Mapping):
        return "{" + ", ".join(f"{key!r}: {describe(item)}" for key, item in list(batch.items())[:6]) + "}"
    if isinstance(batch, (list, tuple)):
        return f"{type(batch).__name__}({', '.join(describe(item) for item in batch[:6])})"
    return type(batch).__name__
