"""Objects of the user's: ``MODULE:NAME`` on the command line becomes a model, a loader, a data set or a loss."""

from __future__ import annotations

import copy
import importlib
import importlib.util
import inspect
import os
import sys
import sysconfig
import traceback
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import nn

from sharpness._checks import nearest
from sharpness.errors import ArgumentError, SharpnessError

_HOW = "Write MODULE:NAME, such as train:make_model or path/to/train.py:make_model."


def load_object(text: str, role: str) -> Any:
    """Return the object that ``MODULE:NAME`` names; ``role`` is what it is for.

    A module is found from the current folder, or is the path of a file that ends in ``.py``.

    Raises:
        ArgumentError: If there is no such module or object, or the module fails when it is imported.
    """
    place, _, name = text.rpartition(":")
    if not place or not name:
        raise ArgumentError(f"{role}: {text!r} does not say which object of which module. {_HOW}")
    module = _import(place, role)
    found: Any = module
    for part in name.split("."):
        if not hasattr(found, part):
            known = [key for key in dir(found) if not key.startswith("_")]
            raise ArgumentError(f"{role}: {place!r} has no {name!r}. {_HOW}{nearest(part, known)}")
        found = getattr(found, part)
    return found


def make(text: str, role: str) -> Any:
    """Return what the object gives when it is called without arguments, or the object itself if it is no function.

    Raises:
        ArgumentError: If it cannot be loaded, needs arguments, or fails.
    """
    found = load_object(text, role)
    holds_data = hasattr(found, "__iter__") or hasattr(found, "__getitem__")
    if isinstance(found, type) or (callable(found) and not holds_data):
        return _call(found, text, role)
    return found


def make_model(text: str, *, fresh: bool = False) -> Callable[[], nn.Module]:
    """Return what makes a new model at each call: the user's function or class, or copies of his model.

    Args:
        text: Its name.
        fresh: Whether each model is to have initial weights of its own, which copies have not.

    Raises:
        ArgumentError: If it cannot be loaded, needs arguments, or (when it is called) fails or makes no model.
    """
    role = "MAKE_MODEL"
    found = load_object(text, role)
    if isinstance(found, nn.Module):
        if fresh:
            raise ArgumentError(
                f"{role}: {text!r} is a model; each training needs initial weights of its own. "
                "Name the function or class that makes it."
            )
        return lambda: copy.deepcopy(found)

    def new() -> nn.Module:
        model = _call(found, text, role)
        if not isinstance(model, nn.Module):
            raise ArgumentError(
                f"{role}: {text!r} returned {type(model).__name__}; a torch.nn.Module is needed. "
                "Return the model alone."
            )
        return model

    return new


def make_loss(text: str) -> Any:
    """Return a loss: a function ``(outputs, targets) -> scalar`` as it is, a criterion's class as an instance.

    Raises:
        ArgumentError: If it cannot be loaded, or a class needs arguments.
    """
    found = load_object(text, "--loss")
    return _call(found, text, "--loss") if isinstance(found, type) else found


def users_place(error: BaseException) -> str | None:
    """Return where in the user's own files an error arose; ``None`` if it was in none of them."""
    if isinstance(error, SyntaxError) and error.filename:
        return f"{error.filename}, line {error.lineno}"
    paths = sysconfig.get_paths()
    ours = [str(Path(__file__).parents[1]), *(paths[key] for key in ("stdlib", "platstdlib", "purelib", "platlib"))]
    roots = tuple(os.path.join(os.path.realpath(root), "") for root in ours)
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        if not frame.filename.startswith("<") and not os.path.realpath(frame.filename).startswith(roots):
            return f"{frame.filename}, line {frame.lineno}, in {frame.name}"
    return None


def _call(function: Any, text: str, role: str) -> Any:
    """Call without arguments."""
    if not callable(function):
        raise ArgumentError(f"{role}: {text!r} is {type(function).__name__}, not a function. {_HOW}")
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):  # some builtins do not tell
        parameters = {}.values()
    free = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    needed = [p.name for p in parameters if p.default is p.empty and p.kind not in free]
    if needed:
        raise ArgumentError(
            f"{role}: {text!r} needs the arguments {', '.join(needed)}; it is called without any. "
            "Name a function that takes none and passes them on."
        )
    try:
        return function()
    except SharpnessError:
        raise
    except Exception as error:
        raise _failed(error, f"{role}: {text!r} failed") from error


def _import(place: str, role: str) -> ModuleType:
    """Import a module by its dotted name or by the path of its file."""
    path = Path(place)
    by_path = path.suffix == ".py"
    if by_path and not path.is_file():
        near = nearest(path.name, (entry.name for entry in path.parent.glob("*.py")))
        raise ArgumentError(f"{role}: there is no file {place!r}. {_HOW}{near}")
    try:
        return _import_file(path.resolve()) if by_path else importlib.import_module(place)
    except ModuleNotFoundError as error:
        if not by_path and error.name is not None and f"{place}.".startswith(f"{error.name}."):
            near = nearest(place, (entry.stem for entry in Path().glob("*.py")))
            raise ArgumentError(
                f"{role}: no module {place!r} is found from the folder {os.getcwd()!r}. {_HOW}{near}"
            ) from error
        raise _failed(error, f"{role}: {place!r} cannot be imported") from error
    except SystemExit as error:
        raise ArgumentError(
            f"{role}: {place!r} ends the program when it is imported. "
            'Put what it does as a script under: if __name__ == "__main__":'
        ) from error
    except Exception as error:
        raise _failed(error, f"{role}: {place!r} cannot be imported") from error


def _import_file(path: Path) -> ModuleType:
    """Import a file as a module, once."""
    for module in list(sys.modules.values()):
        if getattr(module, "__dict__", {}).get("__file__") == str(path):
            return module
    name = path.stem
    while name in sys.modules:
        name += "_"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ImportError(f"{path} is no Python file")
    module = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(path.parent))  # it finds its neighbours, as it does when it is run
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def _failed(error: Exception, what: str) -> ArgumentError:
    """Return the error of the user's own code, with its place, as one of ours."""
    place = users_place(error)
    reason = " ".join(str(error).split()) or "no message"
    return ArgumentError(
        f"{what} with {type(error).__name__}: {reason}{f' ({place})' if place else ''}. "
        "Mend it there; --debug shows the whole traceback."
    )
