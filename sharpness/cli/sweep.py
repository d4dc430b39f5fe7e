"""``sharpness sweep``: train with several batch sizes, and compare the minima."""

from __future__ import annotations

import argparse
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from sharpness import demo
from sharpness.cli.objects import load_object, make, make_loss, make_model
from sharpness.cli.options import Help, add_common, add_running, check_device, parse_metrics, parse_sizes, place
from sharpness.cli.outputs import add_outputs, check_outputs, write_outputs
from sharpness.comparison import compare_batch_sizes
from sharpness.datasets import digits
from sharpness.errors import ArgumentError
from sharpness.objective.guard import own_randomness
from sharpness.results.present import comparison_drawings

_KNOWN = inspect.signature(compare_batch_sizes).parameters
_TRAINING: tuple[tuple[str, Any, str, str], ...] = (
    ("batch_sizes", parse_sizes, "LIST", "samples per update, as in 16,64,256; the others are compared with the first"),
    ("seeds", int, "N", "repetitions of everything, with other initial weights"),
    ("optimizer", str, "NAME", "sgd, adam, or MODULE:FUNCTION from parameters to an optimizer"),
    ("lr", float, "X", "learning rate for the first batch size, 0.001 for adam if it is not given"),
    ("momentum", float, "X", "momentum of sgd"),
    (
        "lr_scaling",
        str,
        "HOW",
        "learning rate of the other batch sizes: none, linear or sqrt of the ratio of the sizes",
    ),
    ("warmup_epochs", float, "X", "epochs in which the learning rate rises to its value"),
    ("ghost_batch_size", int, "N", "samples over which batch normalisation takes its statistics"),
    ("stop_loss", float, "X", "training loss at which to stop"),
    ("max_epochs", int, "N", "where to stop at the latest"),
    ("epochs", int, "N", "train for so many epochs instead"),
    ("updates", int, "N", "train for so many updates instead"),
    ("checkpoint_dir", str, "DIR", "where to keep the trained models; what is there is not trained again"),
)


def add_sweep(commands: Any) -> None:
    """Add the command ``sweep``."""
    parser = commands.add_parser(
        "sweep",
        help="train with several batch sizes to the same loss, and compare the minima",
        formatter_class=Help,
        description="Train one architecture with several batch sizes to the same training loss, from the same initial "
        "weights, and compare the minima.\n\nMODULE is importable from the current folder, or the path of a file that "
        "ends in .py. MAKE_MODEL is a function or class that returns a new model when it is called without arguments; "
        "TRAIN_SET and TEST_SET are data sets of (input, target), pairs of tensors, or functions that return one. "
        "Without any of the three, handwritten digits are used.",
        epilog="example:\n  sharpness sweep train.py:make_model train.py:train_set train.py:test_set \\\n"
        "      --batch-sizes 16,64,256 --seeds 3 --lr 0.05 --html sweep.html --csv sweep.csv",
    )
    parser.add_argument("model", nargs="?", metavar="MODULE:MAKE_MODEL", help="what makes a new model")
    parser.add_argument("train_set", nargs="?", metavar="MODULE:TRAIN_SET", help="training data")
    parser.add_argument("test_set", nargs="?", metavar="MODULE:TEST_SET", help="test data")
    group = parser.add_argument_group("training")
    for name, kind, metavar, text in _TRAINING:
        default = _KNOWN[name].default  # of the function, which knows what was given and what was not
        shown = ",".join(map(str, default)) if isinstance(default, tuple) else default
        more = "" if default is None else f" (default: {shown})"
        flag = f"--{name.replace('_', '-')}"
        group.add_argument(flag, type=kind, metavar=metavar, default=argparse.SUPPRESS, help=text + more)
    add_common(parser, measured=False)
    add_outputs(parser)
    add_running(parser)
    parser.set_defaults(run=_sweep)


def _sweep(options: argparse.Namespace) -> list[str]:
    """Run the command; return the warnings of the comparison."""
    check_outputs(options)
    given = {name: getattr(options, name) for name, *_ in _TRAINING if hasattr(options, name)}
    with own_randomness(options.seed):
        if ":" in given.get("optimizer", ""):
            given["optimizer"] = load_object(given["optimizer"], "--optimizer")
        device = check_device(options.device)
        loss = None if options.loss is None else make_loss(options.loss)
        new, train_set, test_set = _task(options)
    comparison = compare_batch_sizes(
        lambda: place(new(), device),
        train_set,
        test_set,
        loss,
        metrics=parse_metrics(options.metrics),
        seed=options.seed,
        memory=options.memory,
        progress=False if options.quiet else None,
        **given,
    )
    write_outputs(options, comparison, comparison_drawings(comparison))
    return list(comparison.warnings)


def _task(options: argparse.Namespace) -> tuple[Callable[[], nn.Module], Any, Any]:
    """Return what makes a model, and the data: the user's, or the digits."""
    if options.model is None:
        torch.set_num_threads(1)  # the networks are so small that threads would mostly wait for each other
        return (demo.make_model, *digits())
    if options.test_set is None:
        raise ArgumentError("sweep needs MAKE_MODEL, TRAIN_SET and TEST_SET, or none of them. Pass all three.")
    return (
        make_model(options.model, fresh=True),
        make(options.train_set, "TRAIN_SET"),
        make(options.test_set, "TEST_SET"),
    )
