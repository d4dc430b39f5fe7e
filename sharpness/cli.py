"""The command line: ``sharpness demo``."""

from __future__ import annotations

import argparse
import importlib.util
import sys
from collections.abc import Sequence

import torch

from sharpness import demo
from sharpness._version import __version__
from sharpness.errors import SharpnessError


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code: 0, or 1 with the reason on standard error."""
    options = _parser().parse_args(arguments)
    try:
        return int(options.run(options))
    except SharpnessError as error:
        print(f"sharpness: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("sharpness: interrupted", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="sharpness", description="Measure how sharp or flat the minimum of a trained PyTorch model is."
    )
    parser.add_argument("--version", action="version", version=f"sharpness {__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    show = commands.add_parser(
        "demo",
        help="small batch against large batch on handwritten digits, in under a minute",
        description="Train a network on 1000 handwritten digits with batch size 16 and with batch size 1000, to the "
        "same training loss, and compare the two minima.",
    )
    show.add_argument("--seeds", type=int, default=3, metavar="N", help="repetitions (default: 3)")
    show.add_argument("--json", default="sharpness-demo.json", metavar="FILE", help="numbers (default: %(default)s)")
    show.add_argument("--plot", default="sharpness-demo.png", metavar="FILE", help="figure (default: %(default)s)")
    show.add_argument("--quiet", action="store_true", help="no progress bars")
    show.set_defaults(run=_demo)
    return parser


def _demo(options: argparse.Namespace) -> int:
    plot = options.plot
    if importlib.util.find_spec("matplotlib") is None:
        print('no figure: matplotlib is missing (pip install "sharpness[plot]")', file=sys.stderr)
        plot = None
    progress = False if options.quiet else None
    torch.set_num_threads(1)  # the networks are so small that threads would mostly wait for each other
    demo.run(seeds=options.seeds, json_path=options.json, plot_path=plot, progress=progress)
    return 0
