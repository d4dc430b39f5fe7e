"""How much memory may be kept between products, and how much an autograd graph holds."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, final

import torch
from torch import Tensor

_SHARE = 0.5  # of what is free may be kept between products when the user sets no limit
_FALLBACK = 2 * 1024**3


@final
class Budget:
    """Bytes that may be kept between products on ``device``; ``None`` means a share of what is free.

    A storage counts once, however many tensors share it; those of ``free_of_charge`` are there anyway.
    ``reserved`` bytes are left alone.
    """

    def __init__(
        self, memory: int | None, device: torch.device, free_of_charge: Iterable[Tensor] = (), *, reserved: int = 0
    ) -> None:
        self.left = max((int(_SHARE * free_bytes(device)) if memory is None else memory) - reserved, 0)
        self._free = {tensor.untyped_storage().data_ptr() for tensor in free_of_charge}
        self._holders: dict[int, int] = {}  # how many have taken each storage

    def take(self, tensors: Iterable[Tensor]) -> bool:
        """Charge for the tensors' storages if all of them fit; return whether they did."""
        wanted = {pointer: size for pointer, size in storages(tensors).items() if pointer not in self._free}
        new = sum(size for pointer, size in wanted.items() if pointer not in self._holders)
        if new >= self.left:
            return False
        for pointer in wanted:
            self._holders[pointer] = self._holders.get(pointer, 0) + 1
        self.left -= new
        return True

    def release(self, tensors: Iterable[Tensor]) -> None:
        """Give back what `take` has charged for these tensors, as far as nobody else has taken it."""
        for pointer, size in storages(tensors).items():
            if pointer in self._holders:
                self._holders[pointer] -= 1
                if not self._holders[pointer]:
                    del self._holders[pointer]
                    self.left += size


def storages(tensors: Iterable[Tensor]) -> dict[int, int]:
    """Return address and size of every storage of the tensors, those of sparse tensors' parts included."""
    dense = (part.untyped_storage() for tensor in tensors for part in _parts(tensor))
    return {storage.data_ptr(): storage.nbytes() for storage in dense}


def _parts(tensor: Tensor) -> tuple[Tensor, ...]:
    if tensor.layout == torch.strided:
        return (tensor,)
    if tensor.layout == torch.sparse_coo:
        return (tensor._indices(), tensor._values())
    if tensor.layout == torch.sparse_csr:
        return (tensor.crow_indices(), tensor.col_indices(), tensor.values())
    return ()


def free_bytes(device: torch.device) -> int:
    """Return the bytes that are free on ``device``, as far as the system tells."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else _free_host_memory()


def _free_host_memory() -> int:
    """Return the bytes that this process may still take, as far as the system tells."""
    found = []
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        found += [int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")]
    except (OSError, ValueError, IndexError):
        pass
    try:
        used, limit = (Path(f"/sys/fs/cgroup/memory.{name}").read_text().strip() for name in ("current", "max"))
        found += [] if limit == "max" else [max(int(limit) - int(used), 0)]
    except (OSError, ValueError):
        pass
    if not found and hasattr(os, "sysconf") and "SC_AVPHYS_PAGES" in os.sysconf_names:
        found.append(os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    return min(found, default=_FALLBACK)


def graph_nodes(roots: Iterable[Any]) -> Iterator[Any]:
    """Yield every node of the autograd graph of ``roots``, tensors or edges of a graph."""
    found = (root.grad_fn if isinstance(root, Tensor) else root.node for root in roots)
    todo = [node for node in found if node is not None]
    met: set[Any] = set(todo)
    while todo:
        node: Any = todo.pop()
        yield node
        for parent, _ in node.next_functions:
            if parent is not None and parent not in met:
                met.add(parent)
                todo.append(parent)


def graph_tensors(roots: Iterable[Any]) -> Iterator[Tensor]:
    """Yield every tensor that the autograd graph of ``roots`` keeps alive, as far as its nodes tell."""
    for node in graph_nodes(roots):
        for name in _saved_names(type(node)):
            value = getattr(node, name)
            yield from (item for item in (value if isinstance(value, (tuple, list)) else (value,)) if _is_tensor(item))


_NAMES: dict[type, tuple[str, ...]] = {}


def _saved_names(kind: type) -> tuple[str, ...]:
    """Return the attributes under which nodes of this kind save tensors."""
    if kind not in _NAMES:
        own = tuple(name for name in dir(kind) if name.startswith("_saved_"))
        _NAMES[kind] = (*own, "saved_tensors") if hasattr(kind, "saved_tensors") and not own else own
    return _NAMES[kind]


def _is_tensor(value: Any) -> bool:
    return isinstance(value, Tensor)
