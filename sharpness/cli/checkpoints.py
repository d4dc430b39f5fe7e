"""Weights from files, without ever running what is in them."""

from __future__ import annotations

import os
import pickle
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sharpness.errors import ArgumentError
from sharpness.objective.wrappers import STATE_PREFIXES

_KEYS = ("state_dict", "model_state_dict", "model")  # what trainers save the weights under
_SHOWN = 5
_SAVE = "Save the weights alone: torch.save(model.state_dict(), FILE), or safetensors.torch.save_file."


def load_weights(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Load a checkpoint into ``model``, completely.

    Raises:
        ArgumentError: If the file cannot be read safely, or does not fit the model.
    """
    state = read_weights(path)
    expected = model.state_dict()
    while not set(state) <= set(expected):
        prefix = next((p for p in STATE_PREFIXES if all(key.startswith(p) for key in state)), None)
        if prefix is None:
            break
        state = {key.removeprefix(prefix): value for key, value in state.items()}
    try:
        missing, unexpected = model.load_state_dict(state, strict=False)
    except RuntimeError as error:  # shapes that differ
        sizes = re.findall(r"size mismatch for (\S+): .*?Size\((.*?)\).*?Size\((.*?)\)", str(error))
        reasons = [f"{key} is {saved} in the file and {own} in the model" for key, saved, own in sizes]
        reasons = reasons or [" ".join(str(error).split())]
        raise ArgumentError(
            f"checkpoint {os.fspath(path)!r} does not fit the model: {_listed(reasons, '; ')}. "
            "Let MAKE_MODEL build the model that was saved."
        ) from error
    there = {_storage(expected[key]) for key in expected if key not in missing}
    missing = [key for key in missing if _storage(expected[key]) not in there]  # tied weights are saved once
    if missing or unexpected:
        wrong = [f"missing {_listed(missing)}"] if missing else []
        wrong += [f"unexpected {_listed(unexpected)}"] if unexpected else []
        raise ArgumentError(
            f"checkpoint {os.fspath(path)!r} does not fit the model: {'; '.join(wrong)}. "
            f"Let MAKE_MODEL build the model that was saved, or rename the keys.{_prefix_hint(state, expected)}"
        )


def read_weights(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Return the state dict in a file of safetensors or of PyTorch.

    Raises:
        ArgumentError: If there is no such file, it cannot be read safely, or holds no weights.
    """
    name = os.fspath(path)
    if not Path(path).is_file():
        raise ArgumentError(f"checkpoint {name!r}: there is no such file. Pass --checkpoint FILE.")
    content = _read_safetensors(name) if name.endswith(".safetensors") else _read_torch(name)
    for key in _KEYS:
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
            break
    if not isinstance(content, Mapping) or not any(isinstance(value, Tensor) for value in content.values()):
        found = f"the keys {_listed(list(content))}" if isinstance(content, Mapping) else type(content).__name__
        raise ArgumentError(
            f"checkpoint {name!r} holds no weights but {found}. A state dict is needed, or a dict that has one under "
            f"{', '.join(_KEYS)}. {_SAVE}"
        )
    return {str(key): value for key, value in content.items()}


def _read_safetensors(name: str) -> Any:
    try:
        from safetensors import SafetensorError
        from safetensors.torch import load_file
    except ImportError as error:
        raise ArgumentError(
            f'checkpoint {name!r} needs the package safetensors. Install it with: pip install "sharpness[safetensors]"'
        ) from error
    try:
        return load_file(name)
    except (SafetensorError, OSError) as error:
        raise ArgumentError(f"checkpoint {name!r} is no file of safetensors ({error}). Save it once more.") from error


def _read_torch(name: str) -> Any:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about kinds of files that are then refused
            return torch.load(name, weights_only=True, map_location="cpu")
    except pickle.UnpicklingError as error:
        unsafe = re.search(r"GLOBAL ([\w.]+)", str(error))
        if unsafe:
            raise ArgumentError(
                f"checkpoint {name!r} was refused: it holds objects of Python ({unsafe[1]}) beside weights, and "
                f"loading them would run code from the file. {_SAVE}"
            ) from error
        raise _unreadable(name, "more than weights and plain containers, or not from torch.save") from error
    except (RuntimeError, EOFError, OSError, ValueError, KeyError) as error:
        reason = str(error).partition(". ")[0].strip() or "it ends too early"
        raise _unreadable(name, " ".join(reason.split())) from error


def _unreadable(name: str, reason: str) -> ArgumentError:
    return ArgumentError(f"checkpoint {name!r} is no file that torch.load can read safely ({reason}). {_SAVE}")


def _storage(tensor: Tensor) -> tuple[Any, ...]:
    """Return what two names of one tensor have in common."""
    return (tensor.data_ptr(), tuple(tensor.shape), tensor.stride()) if tensor.numel() else (id(tensor),)


def _prefix_hint(state: Mapping[str, Any], expected: Mapping[str, Any]) -> str:
    """Return what to do where the keys differ by a prefix alone."""
    heads = {key.partition(".")[0] for key in state}
    if len(heads) == 1:
        (head,) = heads
        if {key.removeprefix(f"{head}.") for key in state} == set(expected):
            return f" Without {head + '.'!r} at the beginning of each key it would fit."
    return ""


def _listed(names: list[str], separator: str = ", ") -> str:
    shown = separator.join(map(str, names[:_SHOWN]))
    return shown if len(names) <= _SHOWN else f"{shown} and {len(names) - _SHOWN} more"
