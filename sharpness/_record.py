"""What all results share: a one-line repr, a JSON-ready dict, a file that round-trips.

A saved record is a NumPy ``.npz`` archive: one ``.npy`` entry per tensor, bit for bit, and one JSON
text for everything else. Nothing in it is ever unpickled.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import numpy as np
import torch
from torch import Tensor

from sharpness.errors import ArgumentError, DataError

R = TypeVar("R", bound="Record")
_ENTRY = "record.json"


class Record:
    """Base of the frozen dataclasses that every function returns."""

    kinds: ClassVar[dict[str, type[Record]]] = {}
    bulky: ClassVar[frozenset[str]] = frozenset()  # fields that `to_dict` leaves out unless asked

    def __init_subclass__(cls) -> None:
        """Register the class, so that `load` can find it by its name."""
        Record.kinds[cls.__name__] = cls

    def to_dict(self, *, vectors: bool = False) -> dict[str, Any]:
        """Return the record as JSON-ready Python: numbers, strings, lists and dicts.

        NaN and infinities become ``None``, since JSON has no word for them.

        Args:
            vectors: Also include the fields as long as the parameter vector.
        """
        names = (field.name for field in dataclasses.fields(self))  # type: ignore[arg-type]
        return {name: _plain(getattr(self, name)) for name in names if vectors or name not in self.bulky}

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the record to ``path``, tensors bit for bit; `load` reads it back."""
        arrays: dict[str, np.ndarray[Any, Any]] = {}
        text = json.dumps(_pack(self, arrays))
        unfinished = Path(f"{os.fspath(path)}.part")  # an older file is replaced only by a whole one
        with zipfile.ZipFile(unfinished, "w") as archive:
            archive.writestr(_ENTRY, text)
            for name, array in arrays.items():
                with archive.open(name, "w", force_zip64=True) as entry:
                    np.lib.format.write_array(entry, array, allow_pickle=False)
        unfinished.replace(path)

    @classmethod
    def load(cls: type[R], path: str | os.PathLike[str]) -> R:
        """Read a record written by `save`.

        Raises:
            DataError: If the file is not a saved record.
            ArgumentError: If it holds a record of another class.
        """
        try:
            with zipfile.ZipFile(path) as archive:
                tree = json.loads(archive.read(_ENTRY))
                arrays = {name: _read(archive, name) for name in archive.namelist() if name != _ENTRY}
            record = _unpack(tree, arrays)
        except (zipfile.BadZipFile, KeyError, ValueError, TypeError) as error:
            raise DataError(
                f"{os.fspath(path)!r} is not a record saved by this library ({error}). "
                "Pass a file written by a result's save(path)."
            ) from error
        if not isinstance(record, cls):
            raise ArgumentError(
                f"{os.fspath(path)!r} holds a {type(record).__name__}, not a {cls.__name__}. "
                f"Read it with {type(record).__name__}.load(path)."
            )
        return record


def _plain(value: Any) -> Any:
    """Turn a field into JSON-ready Python."""
    if isinstance(value, Record):
        return value.to_dict()
    if isinstance(value, Tensor):
        return _plain(value.detach().cpu().tolist())
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def _pack(value: Any, arrays: dict[str, np.ndarray[Any, Any]]) -> Any:
    """Turn a value into JSON with tags, moving tensors to ``arrays``."""
    if isinstance(value, Record):
        fields = {f.name: _pack(getattr(value, f.name), arrays) for f in dataclasses.fields(value)}  # type: ignore[arg-type]
        return {"record": type(value).__name__, "fields": fields}
    if isinstance(value, Tensor):
        name = f"{len(arrays)}.npy"
        arrays[name] = value.detach().cpu().numpy()
        return {"tensor": name}
    if isinstance(value, Mapping):
        return {"mapping": [[key, _pack(item, arrays)] for key, item in value.items()]}
    if isinstance(value, tuple):
        return {"tuple": [_pack(item, arrays) for item in value]}
    if isinstance(value, list):
        return [_pack(item, arrays) for item in value]
    return value


def _unpack(tree: Any, arrays: dict[str, Tensor]) -> Any:
    """Invert `_pack`."""
    if isinstance(tree, list):
        return [_unpack(item, arrays) for item in tree]
    if not isinstance(tree, dict):
        return tree
    ((tag, body), *rest) = tree.items()
    if tag == "record":
        fields = {name: _unpack(item, arrays) for name, item in dict(rest)["fields"].items()}
        return Record.kinds[body](**fields)
    if tag == "tensor":
        return arrays[body]
    items = [_unpack(item, arrays) for item in body]
    return tuple(items) if tag == "tuple" else dict(items)


def _read(archive: zipfile.ZipFile, name: str) -> Tensor:
    with archive.open(name) as entry:
        return torch.from_numpy(np.lib.format.read_array(entry, allow_pickle=False))
