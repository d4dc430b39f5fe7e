"""A folder of finished trainings, bound to what they depend on; nothing in it is ever unpickled.

::

    settings.json            what all runs have in common: data, loss, model, optimizer, stop
    seed-0_initial.pt        the weights that all batch sizes of a seed start from
    seed-0_initial.json      their digest
    seed-0_batch-32.pt       the weights of a finished run
    seed-0_batch-32.json     what it took, and the digest of the file above; written last: a run is there or not
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import pickle
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, final

import torch
from torch import Tensor, nn

from sharpness.comparison.starts import Starts, signature, tensors_of
from sharpness.errors import ArgumentError, DataError
from sharpness.objective.fingerprint import of_tensors

_SETTINGS = "settings.json"
_FORMAT = "sharpness trainings, version 1"


@final
class Store:
    """Finished runs in a folder.

    Args:
        path: The folder; made if there is none.

    Raises:
        ArgumentError: If it cannot be used.
    """

    def __init__(self, path: Any) -> None:
        if not isinstance(path, (str, os.PathLike)):
            raise ArgumentError(f"`checkpoint_dir` must be the path of a folder, got {path!r}.")
        self.path = Path(path)
        probe = self.path / "writable.part"
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            probe.write_bytes(b"")
            probe.unlink(missing_ok=True)  # another process may look as well
        except OSError as error:
            raise ArgumentError(
                f"`checkpoint_dir`: {str(self.path)!r} must be a folder that can be written: {error}. Choose another."
            ) from error

    def bind(self, settings: Mapping[str, Any], starts: Starts, seeds: range) -> None:
        """Refuse the folder of other trainings; make sure that all models start from the weights in it.

        Raises:
            ArgumentError: If the folder belongs to other settings, or holds something else.
            DataError: If a file is damaged.
        """
        now = json.loads(json.dumps({"format": _FORMAT, **settings}))
        target = self.path / _SETTINGS
        if target.exists():
            there = self._json(target)
            differing = [name for name in {**now, **there} if there.get(name) != now.get(name)]
            if differing:
                listed = "; ".join(f"{name}: {there.get(name)!r} there, {now.get(name)!r} now" for name in differing)
                raise ArgumentError(
                    f"`checkpoint_dir`: {str(self.path)!r} holds trainings with other settings ({listed}). Choose an "
                    "empty folder, or go back to these settings."
                )
        elif any(entry.suffix != ".part" for entry in self.path.iterdir()):
            raise ArgumentError(
                f"`checkpoint_dir`: {str(self.path)!r} is not empty, and holds no {_SETTINGS}. Choose an empty folder."
            )
        else:
            self._replace(target, json.dumps(now, indent=1).encode())
        for seed in seeds:
            self._bind_start(starts, seed)

    def read(self, batch_size: int, seed: int, starts: Starts) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """Return the weights of a finished run and what is known of it; ``None`` if there is none.

        Raises:
            DataError: If it is damaged, or does not belong to the initial weights.
        """
        name = _run(batch_size, seed)
        if not (self.path / f"{name}.json").exists():
            return None
        weights, about = self._read(name)
        if about.get("initial") != of_tensors(starts.weights(seed).values()):
            raise self._damaged(self.path / f"{name}.json", "it is of a run from other initial weights")
        return weights, about

    def write(self, model: nn.Module, batch_size: int, seed: int, starts: Starts, took: Mapping[str, Any]) -> None:
        """Keep a finished run.

        Raises:
            ArgumentError: If training changed what the model is made of.
        """
        weights, initial = tensors_of(model), starts.weights(seed)
        if signature(weights) != signature(initial):
            raise ArgumentError(
                "`train` changed the names, shapes or types of the model's parameters or buffers, so that "
                "`checkpoint_dir` could not put the weights back into a new model. Leave `checkpoint_dir` out."
            )
        about = {
            "batch_size": batch_size,
            "seed": seed,
            "took": dict(took),
            "trainable": [name for name, parameter in model.named_parameters() if parameter.requires_grad],
            "initial": of_tensors(initial.values()),
            "torch": torch.__version__,
        }
        self._write(_run(batch_size, seed), weights, about)

    def _bind_start(self, starts: Starts, seed: int) -> None:
        """Take the initial weights of a seed from the folder, or put them there."""
        name = f"seed-{seed}_initial"
        now = starts.weights(seed)
        if not (self.path / f"{name}.json").exists():
            self._write(name, now, {})
            return
        there, _ = self._read(name)
        if signature(there) == signature(now) and of_tensors(there.values()) == of_tensors(now.values()):
            return
        again = tensors_of(starts.make(seed))
        if signature(there) != signature(now) or of_tensors(again.values()) == of_tensors(now.values()):
            raise ArgumentError(
                f"`checkpoint_dir`: {str(self.path)!r} holds trainings that start from other weights than `make_model` "
                f"makes now for seed {seed}. Choose an empty folder, or go back to that model."
            )
        starts.replace(seed, there)  # the factory never makes the same weights twice: what was made first counts

    def _write(self, name: str, weights: Mapping[str, Tensor], about: Mapping[str, Any]) -> None:
        buffer = io.BytesIO()
        torch.save({key: tensor.detach().cpu().clone() for key, tensor in weights.items()}, buffer)
        data = buffer.getvalue()
        self._replace(self.path / f"{name}.pt", data)
        text = json.dumps(_sealed({**about, "weights": _digest(data)}), indent=1, allow_nan=False)
        self._replace(self.path / f"{name}.json", text.encode())

    def _read(self, name: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
        about, target = self._json(self.path / f"{name}.json"), self.path / f"{name}.pt"
        try:
            data = target.read_bytes()
        except OSError as error:
            raise self._damaged(target, str(error)) from error
        if about != _sealed(about):
            raise self._damaged(target.with_suffix(".json"), "its content is not what was written")
        if _digest(data) != about["weights"]:
            raise self._damaged(target, "its content is not what was written")
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of pickles that PyTorch did not write: they are refused
                weights = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
        except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError, AttributeError) as error:
            reason = str(error).partition(". ")[0] or type(error).__name__  # what follows is advice to unpickle it
            raise self._damaged(target, f"it is no file of weights, and nothing else is unpickled: {reason}") from error
        if not isinstance(weights, dict) or not all(isinstance(tensor, Tensor) for tensor in weights.values()):
            raise self._damaged(target, "it is no file of weights")
        return weights, about

    def _json(self, target: Path) -> dict[str, Any]:
        try:
            found = json.loads(target.read_bytes())
        except (OSError, ValueError) as error:
            raise self._damaged(target, str(error)) from error
        if not isinstance(found, dict):
            raise self._damaged(target, "it holds no JSON object")
        return found

    def _damaged(self, target: Path, reason: str) -> DataError:
        advice = (
            "Choose an empty folder."
            if target.name == _SETTINGS or "_initial" in target.name
            else f"Delete {target.with_suffix('.json').name!r} to train this run again."
        )
        return DataError(f"`checkpoint_dir`: {str(target)!r} cannot be used: {reason}. {advice}")

    def _replace(self, target: Path, data: bytes) -> None:
        """Write a file as a whole or not at all."""
        unfinished = target.with_name(f"{target.name}.part")
        with unfinished.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        unfinished.replace(target)


def _run(batch_size: int, seed: int) -> str:
    return f"seed-{seed}_batch-{batch_size}"


def _sealed(about: Mapping[str, Any]) -> dict[str, Any]:
    """Return ``about`` with a digest of itself."""
    plain = {name: value for name, value in about.items() if name != "checksum"}
    return {**plain, "checksum": _digest(json.dumps(plain, sort_keys=True).encode())}


def _digest(data: bytes) -> str:
    return hashlib.blake2b(data, digest_size=16).hexdigest()
