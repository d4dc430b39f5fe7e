"""What a command leaves behind: a table on the terminal, and files."""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import sys
from typing import Any

from sharpness._checks import check_writable
from sharpness._write import write_text
from sharpness.errors import ArgumentError
from sharpness.results.picture import Draw, check_picture, panels, save_figure

_TEXTS = ("json", "csv", "html")


def add_outputs(parser: argparse.ArgumentParser) -> None:
    """Add the options that name files."""
    group = parser.add_argument_group("output", "The table is printed in any case. FILE may be - for standard output, "
                                      "but for a figure; the table then goes to standard error.")  # fmt: skip
    group.add_argument("--json", metavar="FILE", help="all numbers, with their doubts, costs and settings")
    group.add_argument("--csv", metavar="FILE", help="the numbers, one a line")
    group.add_argument("--html", metavar="FILE", help="one self-contained page, for an appendix or a phone")
    group.add_argument("--plot", metavar="FILE", help="a figure, of the kind that the ending of FILE says")


def check_outputs(options: argparse.Namespace) -> None:
    """Refuse files that cannot be written, before any work is done.

    Raises:
        ArgumentError: If one cannot be written, or two would go to the same place.
    """
    chosen = {kind: getattr(options, kind) for kind in (*_TEXTS, "plot") if getattr(options, kind) is not None}
    places = {kind: path if path == "-" else os.path.realpath(path) for kind, path in chosen.items()}
    for kind, path in chosen.items():
        twins = [other for other in chosen if places[other] == places[kind]]
        if len(twins) > 1:
            raise ArgumentError(
                f"{' and '.join(f'--{twin}' for twin in twins)} would both be written to {path!r}. Name two files."
            )
        if path != "-" or kind == "plot":
            check_writable(f"--{kind}", path)
    if options.plot is not None:
        if importlib.util.find_spec("matplotlib") is None:
            raise ArgumentError('--plot needs matplotlib. Install it with: pip install "sharpness[plot]"')
        check_picture(options.plot)


def write_outputs(options: argparse.Namespace, result: Any, drawings: list[tuple[str, Draw]]) -> None:
    """Print the table, and write every file that was asked for, even if nobody takes the table."""
    piped = "-" in [getattr(options, kind) for kind in _TEXTS]
    try:
        print(result, file=sys.stderr if piped else sys.stdout)
    finally:
        _write_files(options, result, drawings)


def _write_files(options: argparse.Namespace, result: Any, drawings: list[tuple[str, Draw]]) -> None:
    for kind in _TEXTS:
        path = getattr(options, kind)
        if path is None:
            continue
        text = _text(kind, result)
        if path == "-":
            sys.stdout.write(text)
        else:
            write_text(path, text)
    if options.plot is not None:
        save_figure(panels(drawings), options.plot)


def _text(kind: str, result: Any) -> str:
    if kind == "json":
        return json.dumps(result.to_dict(), indent=1, allow_nan=False) + "\n"
    return str(result.to_csv() if kind == "csv" else result.to_html())
