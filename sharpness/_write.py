"""Files that are there whole, or not at all."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from sharpness._checks import check_writable
from sharpness.errors import ArgumentError


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write ``text`` to ``path`` in UTF-8, with its line ends as they are.

    Raises:
        ArgumentError: If the file cannot be written.
    """
    write_whole(path, lambda target: target.write_bytes(text.encode("utf-8")))


def write_whole(path: str | os.PathLike[str], write: Callable[[Path], object]) -> None:
    """Let ``write`` fill a file beside ``path``, which then takes its place: an older file outlives a failure.

    In a folder that takes no new files, an older file is written over.

    Raises:
        ArgumentError: If the file cannot be written.
    """
    target = Path(os.path.realpath(check_writable("path", path)))  # a link keeps pointing to it
    alone = target.is_file() and not os.access(target.parent, os.W_OK)  # nothing can be put beside it
    if alone or (target.exists() and not target.is_file()):  # a pipe or a terminal has no older content to lose
        unfinished = target
    else:
        unfinished = target.with_name(f".{target.stem}.{os.getpid()}{target.suffix}")
    try:
        write(unfinished)
        unfinished.replace(target)
    except OSError as error:
        raise ArgumentError(
            f"`path`: {os.fspath(path)!r} cannot be written ({error.strerror or error}). "
            "Choose a file in a folder that exists, is yours and has room."
        ) from error
    finally:
        if unfinished != target:
            unfinished.unlink(missing_ok=True)
