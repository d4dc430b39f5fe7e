"""Products that are written to a file as they come, so that a run that was killed can go on where it stopped.

Every algorithm of this package is a function of the products that it is sent, and of its seed. Given the same products
again it takes the same steps, to the last bit; so the products are all that has to be kept.

A file is a header and records of equal length::

    magic, version, length of the text, text (JSON: n, dtype, fingerprint), checksum of the text
    digest of the vector multiplied, product, checksum of both            (once per product)

Each record is on the disk before the algorithm sees the product. What a killed process leaves of a last record is
dropped.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, final

import numpy as np
import torch
from torch import Tensor

from sharpness.errors import ArgumentError, DataError
from sharpness.linalg.operator import LinearOperator
from sharpness.linalg.products import norm

_MAGIC = b"sharpness-products\n"
_VERSION = 1
_LENGTHS = struct.Struct("<II")  # version, bytes of text
_CHECKSUM = struct.Struct("<I")
_DIGEST = 32
_SAME = {torch.float32: 1e-4, torch.float64: 1e-9}  # relative change of a product by another order of summation


@final
class RecordedOperator(LinearOperator):
    """An operator whose products are kept in a file, and read from it when they are asked for again.

    The ``i``-th product is taken from the file if the ``i``-th vector is bit for bit the one recorded; once the records
    are used up, products are computed and appended. The first one is made again and compared, since no fingerprint sees
    all that a product depends on.

    Args:
        operator: The operator.
        path: The file. Made if there is none, continued if there is one.
        fingerprint: Whatever must be the same for the products to be the same: name -> JSON-ready value, such as
            digests of the data and of the weights, and the options of the run.

    Raises:
        ArgumentError: If the file belongs to another run, or cannot be written, or the fingerprint is not JSON-ready.
        DataError: If the file is something else, or damaged.

    Cost: ``n`` numbers written and flushed to the disk per product.

    Example:
        >>> import os, tempfile
        >>> from sharpness.linalg import DenseOperator, lanczos
        >>> operator = DenseOperator([[2.0, 1.0], [1.0, 2.0]])
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = os.path.join(folder, "products")
        ...     first = lanczos(RecordedOperator(operator, path, {"seed": 0}))
        ...     again = RecordedOperator(operator, path, {"seed": 0})
        ...     second = lanczos(again)
        >>> again.num_replayed, bool(first.eigenvalues == second.eigenvalues)
        (2, True)
    """

    def __init__(self, operator: LinearOperator, path: str | os.PathLike[str], fingerprint: Mapping[str, Any]) -> None:
        super().__init__(operator.n, dtype=operator.dtype, device=operator.device)
        self.operator = operator
        self.path = Path(path)
        self.num_replayed = 0  # products taken from the file
        self._position = 0
        self._length = _DIGEST + self.n * self.dtype.itemsize + _CHECKSUM.size
        try:
            about = json.dumps(
                {"n": self.n, "dtype": str(self.dtype), "fingerprint": dict(fingerprint)}, sort_keys=True
            )
        except (TypeError, ValueError) as error:
            raise ArgumentError(
                f"`fingerprint` must be a mapping of names to numbers, strings, lists and mappings, got "
                f"{fingerprint!r} ({error}). Pass digests in place of arrays."
            ) from error
        text = about.encode()
        header = _MAGIC + _LENGTHS.pack(_VERSION, len(text)) + text + _CHECKSUM.pack(zlib.crc32(text))
        self._start = len(header)
        try:
            if self.path.exists() and self.path.stat().st_size:
                self._check_header(json.loads(about))
                self._recorded = self._mend()
            else:
                self._recorded = 0
                unfinished = self.path.with_name(self.path.name + ".part")  # a header is there as a whole or not at all
                _write(unfinished, header, "wb")
                unfinished.replace(self.path)
        except OSError as error:
            raise ArgumentError(
                f"the checkpoint {str(self.path)!r} must be a file that can be read and written: {error}. "
                "Pass a path in a folder that exists and that you may write to."
            ) from error

    def product_error(self, rows: Tensor) -> float | None:
        """Return the rounding error of products of the operator with the rows; not recorded."""
        return self.operator.product_error(rows)

    def _matvec(self, v: Tensor) -> Tensor:
        product = self._recalled(v)
        return self._kept(v, self.operator.matvec(v)) if product is None else product

    def _matmat(self, V: Tensor) -> Tensor:
        columns = list(V.unbind(1))
        products = [product for product in map(self._recalled, columns) if product is not None]
        left = columns[len(products) :]
        if left:
            block = self.operator.matmat(torch.stack(left, dim=1))
            products += [self._kept(v, product) for v, product in zip(left, block.unbind(1), strict=True)]
        return torch.stack(products, dim=1)

    def _recalled(self, v: Tensor) -> Tensor | None:
        """Return the product from the file, ``None`` when the records are used up."""
        if self._position >= self._recorded:
            return None
        product = self._read(self._position, _digest(v))
        if self._position == 0:
            self._verify(v, product)
        self._position += 1
        self.num_replayed += 1
        return product

    def _kept(self, v: Tensor, product: Tensor) -> Tensor:
        """Write a new product down."""
        body = _digest(v) + _bytes(product)
        _write(self.path, body + _CHECKSUM.pack(zlib.crc32(body)), "ab")
        self._position += 1
        return product

    def _verify(self, v: Tensor, recorded: Tensor) -> None:
        """Make the first product again: no fingerprint sees into a function, or into data that are no tensors."""
        fresh = self.operator.matvec(v)
        if not norm(fresh - recorded) <= _SAME[self.dtype] * norm(recorded):
            raise ArgumentError(
                f"the first product in the checkpoint {str(self.path)!r} is not what the operator gives now: the loss, "
                "the model's code or the data are others. Pass those of the run that was begun, or delete the file."
            )

    def _read(self, position: int, digest: bytes) -> Tensor:
        record = self._record(position)
        if record is None:
            raise DataError(
                f"record {position + 1} of the checkpoint {str(self.path)!r} is damaged. "
                "Delete the file and start again, or restore it from a copy."
            )
        if record[:_DIGEST] != digest:
            raise ArgumentError(
                f"product {position + 1} in the checkpoint {str(self.path)!r} is that of another vector than is "
                "multiplied now: the arithmetic of this machine, or of its number of threads or libraries, rounds "
                "differently, or the algorithm is another. Continue where the run was begun, or delete the file."
            )
        kind = {torch.float32: np.float32, torch.float64: np.float64}[self.dtype]
        array = np.frombuffer(record, dtype=kind, count=self.n, offset=_DIGEST).copy()
        return torch.from_numpy(array).to(self.device)

    def _record(self, position: int) -> bytes | None:
        """Return a record without its checksum, or ``None`` if it is not whole."""
        with self.path.open("rb") as file:
            file.seek(self._start + position * self._length)
            record = file.read(self._length)
        body, checksum = record[: -_CHECKSUM.size], record[-_CHECKSUM.size :]
        whole = len(record) == self._length and zlib.crc32(body) == _CHECKSUM.unpack(checksum)[0]
        return body if whole else None

    def _mend(self) -> int:
        """Cut off what is left of a last record that was not finished; return the number of whole records."""
        number = (self.path.stat().st_size - self._start) // self._length
        if number and self._record(number - 1) is None:
            number -= 1
        with self.path.open("r+b") as file:
            file.truncate(self._start + number * self._length)
            file.flush()
            os.fsync(file.fileno())
        return number

    def _check_header(self, expected: dict[str, Any]) -> None:
        """Refuse a file of another run, and say what differs."""
        with self.path.open("rb") as file:
            magic = file.read(len(_MAGIC))
            lengths = file.read(_LENGTHS.size)
            version, size = _LENGTHS.unpack(lengths) if len(lengths) == _LENGTHS.size else (0, 0)
            text = file.read(min(size, 2**26))
            checksum = file.read(_CHECKSUM.size)
        if magic != _MAGIC or len(text) != size or checksum != _CHECKSUM.pack(zlib.crc32(text)):
            raise DataError(
                f"{str(self.path)!r} is not a checkpoint of this library. Pass the path of one, or of a new file."
            )
        if version != _VERSION:
            raise DataError(
                f"the checkpoint {str(self.path)!r} has format {version}, this version of the library writes "
                f"{_VERSION}. Delete the file and start again, or continue with the version that wrote it."
            )
        found = json.loads(text)
        before, now = (
            {**about["fingerprint"], "n": about["n"], "dtype": about["dtype"]} for about in (found, expected)
        )
        differing = sorted(
            name for name in {*before, *now} if name not in before or name not in now or before[name] != now[name]
        )
        if differing:
            listed = "; ".join(f"{name} (was {_short(before, name)}, is {_short(now, name)})" for name in differing)
            raise ArgumentError(
                f"the checkpoint {str(self.path)!r} belongs to another run, these differ: {listed}. "
                "Make the same call to continue it, or pass another path or delete the file to start anew."
            )


def _short(about: Mapping[str, Any], name: str) -> str:
    text = repr(about[name]) if name in about else "absent"
    return text if len(text) <= 40 else text[:37] + "..."


def _bytes(v: Tensor) -> bytes:
    data: bytes = v.detach().cpu().contiguous().numpy().tobytes()
    return data


def _digest(v: Tensor) -> bytes:
    return hashlib.sha256(_bytes(v)).digest()


def _write(path: Path, data: bytes, mode: str) -> None:
    """Write, and return once it is on the disk."""
    with path.open(mode) as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
