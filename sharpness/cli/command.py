"""The parser, and what becomes of errors, warnings and interruptions."""

from __future__ import annotations

import argparse
import importlib.util
import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import torch

from sharpness import demo
from sharpness._version import __version__
from sharpness.cli.measure import add_compare, add_report
from sharpness.cli.objects import users_place
from sharpness.cli.options import Help, add_running
from sharpness.cli.sweep import add_sweep
from sharpness.errors import SharpnessError, SharpnessWarning

_CODES = """exit codes:
  0    done, perhaps with warnings
  1    what was given cannot be used, or an error in it; the reason is on standard error
  2    a command line that cannot be understood
  3    done, but with warnings, under --strict
  130  interrupted
  141  whoever read the output went away

sharpness COMMAND --help shows the options of a command and an example."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code, as ``sharpness --help`` lists them."""
    try:
        try:
            return _run(arguments)
        finally:
            sys.stdout.flush()
    except BrokenPipeError:
        with suppress(OSError, ValueError):  # else Python would complain once more while it ends
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141


def _run(arguments: Sequence[str] | None) -> int:
    options = _parser().parse_args(arguments)
    try:
        with _own_path(), _spoken_warnings() as spoken:
            found = options.run(options)
            return 3 if options.strict and (found or spoken) else 0
    except KeyboardInterrupt:
        if options.debug:
            raise
        print("sharpness: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        raise
    except Exception as error:
        if options.debug:
            raise
        print(f"sharpness: {_reason(error)}", file=sys.stderr)
        return 1


def _reason(error: Exception) -> str:
    """Return an error in one line: ours as it is, others with their kind and their place in the user's files."""
    text = " ".join(str(error).split())
    if isinstance(error, SharpnessError):
        return text
    place = users_place(error)
    return f"{type(error).__name__}: {text}{f' ({place})' if place else ''}. --debug shows the whole traceback."


@contextmanager
def _own_path() -> Iterator[None]:
    """Let modules be found from the current folder, and put the path back."""
    before = list(sys.path)
    sys.path.insert(0, os.getcwd())
    try:
        yield
    finally:
        sys.path[:] = before


@contextmanager
def _spoken_warnings() -> Iterator[list[str]]:
    """Print the library's warnings in one line each, and collect them."""
    spoken: list[str] = []

    def speak(message: Warning | str, category: type[Warning], *rest: Any, **more: Any) -> None:
        if not issubclass(category, SharpnessWarning):
            usual(message, category, *rest, **more)
            return
        spoken.append(str(message))
        print(f"warning: {message}", file=sys.stderr)

    with warnings.catch_warnings():
        warnings.simplefilter("always", SharpnessWarning)
        usual = warnings.showwarning
        warnings.showwarning = speak
        yield spoken


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="sharpness",
        description="Measure how sharp or flat the minimum of a trained PyTorch model is.",
        epilog=_CODES,
        formatter_class=Help,
    )
    parser.add_argument("--version", action="version", version=f"sharpness {__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    add_compare(commands)
    add_report(commands)
    add_sweep(commands)
    _add_demo(commands)
    return parser


def _add_demo(commands: Any) -> None:
    show = commands.add_parser(
        "demo",
        help="small batch against large batch on handwritten digits, in under a minute",
        formatter_class=Help,
        description="Train a network on 1000 handwritten digits with batch size 16 and with batch size 1000, to the "
        "same training loss, and compare the two minima.",
        epilog="example:\n  sharpness demo --seeds 5 --html demo.html",
    )
    show.add_argument("--seeds", type=int, default=3, metavar="N", help="repetitions (default: 3)")
    show.add_argument("--json", default="sharpness-demo.json", metavar="FILE", help="numbers (default: %(default)s)")
    show.add_argument("--plot", default="sharpness-demo.png", metavar="FILE", help="figure (default: %(default)s)")
    show.add_argument("--html", metavar="FILE", help="one self-contained page")
    add_running(show)
    show.set_defaults(run=_demo)


def _demo(options: argparse.Namespace) -> list[str]:
    plot = options.plot
    if importlib.util.find_spec("matplotlib") is None:
        print('no figure: matplotlib is missing (pip install "sharpness[plot]")', file=sys.stderr)
        plot = None
    progress = False if options.quiet else None
    torch.set_num_threads(1)  # the networks are so small that threads would mostly wait for each other
    comparison, _ = demo.run(
        seeds=options.seeds, json_path=options.json, plot_path=plot, html_path=options.html, progress=progress
    )
    return list(comparison.warnings)
