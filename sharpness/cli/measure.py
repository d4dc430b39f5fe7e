"""``sharpness compare`` and ``sharpness report``: models from checkpoints."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

from torch import nn

from sharpness.cli.checkpoints import load_weights
from sharpness.cli.objects import make, make_loss, make_model
from sharpness.cli.options import Help, add_common, add_running, check_device, parse_metrics, place
from sharpness.cli.outputs import add_outputs, check_outputs, write_outputs
from sharpness.comparison import compare
from sharpness.errors import ArgumentError
from sharpness.metrics import report
from sharpness.objective.guard import own_randomness
from sharpness.results.present import comparison_drawings

_OBJECTS = """MODULE is importable from the current folder, or the path of a file that ends in .py. MAKE_MODEL is a
function or class that returns the model when it is called without arguments; MAKE_LOADER is a function that returns
the training data in batches, or a DataLoader or list itself."""
_CHECKPOINTS = """A checkpoint is a state dict in a .safetensors file or in a file of torch.save, by itself or under
state_dict, model_state_dict or model. Nothing in it is ever run."""


def add_compare(commands: Any) -> None:
    """Add the command ``compare``."""
    parser = commands.add_parser(
        "compare",
        help="several checkpoints side by side, on the same data",
        formatter_class=Help,
        description="Measure trained models side by side: loss, accuracy and sharpness, with ratios to the first, and "
        f"warn of what makes the comparison unfair.\n\n{_OBJECTS}\n\n{_CHECKPOINTS}",
        epilog="example:\n  sharpness compare train.py:make_model train.py:make_loader \\\n"
        "      --checkpoint small.safetensors --checkpoint large.safetensors \\\n"
        "      --test-loader train.py:make_test_loader --html appendix.html",
    )
    _add_objects(parser)
    parser.add_argument(
        "--checkpoint", action="append", metavar="FILE", required=True, help="weights of a model; give it twice or more"
    )
    parser.add_argument(
        "--name",
        action="append",
        metavar="NAME",
        help="name of each checkpoint, in the same order (default: the file's); checkpoints of one name are seeds of "
        "one row",
    )
    parser.add_argument("--test-loader", metavar="MODULE:MAKE", help="test data, for test loss and accuracy")
    add_common(parser)
    add_outputs(parser)
    add_running(parser)
    parser.set_defaults(run=_compare)


def add_report(commands: Any) -> None:
    """Add the command ``report``."""
    parser = commands.add_parser(
        "report",
        help="every measure of one model, each with its doubt",
        formatter_class=Help,
        description=f"Measure one model in every way.\n\n{_OBJECTS}\n\n{_CHECKPOINTS}",
        epilog="example:\n  sharpness report train.py:make_model train.py:make_loader \\\n"
        "      --checkpoint last.pt --html report.html",
    )
    _add_objects(parser)
    parser.add_argument("--checkpoint", metavar="FILE", help="its weights (default: those that MAKE_MODEL gives it)")
    add_common(parser)
    add_outputs(parser)
    add_running(parser)
    parser.set_defaults(run=_report)


def _add_objects(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODULE:MAKE_MODEL", help="what makes the model")
    parser.add_argument("loader", metavar="MODULE:MAKE_LOADER", help="what makes the training data")


def _compare(options: argparse.Namespace) -> list[str]:
    """Run the command; return the warnings of the comparison."""
    check_outputs(options)
    names = _names(options.checkpoint, options.name)
    with own_randomness(options.seed):
        choices = _choices(options)
        new, loader = make_model(options.model), make(options.loader, "MAKE_LOADER")
        tests = None if options.test_loader is None else make(options.test_loader, "--test-loader")
        models: dict[str, list[nn.Module]] = {}
        for name, path in zip(names, options.checkpoint, strict=True):
            models.setdefault(name, []).append(_loaded(new(), path, options))
    comparison = compare(models, loader, choices.pop("loss_fn"), test_loader=tests, **choices)
    write_outputs(options, comparison, comparison_drawings(comparison))
    return list(comparison.warnings)


def _report(options: argparse.Namespace) -> list[str]:
    """Run the command; its warnings are issued by the metrics."""
    check_outputs(options)
    with own_randomness(options.seed):
        choices = _choices(options)
        model = _loaded(make_model(options.model)(), options.checkpoint, options)
        loader = make(options.loader, "MAKE_LOADER")
    found = report(model, loader, choices.pop("loss_fn"), **choices)
    write_outputs(options, found, [("value of each measure, in its own unit", found.plot)])
    return []


def _choices(options: argparse.Namespace) -> dict[str, Any]:
    return {
        "loss_fn": None if options.loss is None else make_loss(options.loss),
        "metrics": parse_metrics(options.metrics),
        "mode": options.mode,
        "max_batches": options.max_batches,
        "seed": options.seed,
        "memory": options.memory,
        "progress": False if options.quiet else None,
    }


def _loaded(model: nn.Module, path: str | None, options: argparse.Namespace) -> nn.Module:
    if path is not None:
        load_weights(model, path)
    return place(model, check_device(options.device))


def _names(paths: list[str], given: list[str] | None) -> list[str]:
    """Return a name for each checkpoint: as given, or the shortest end of its path that tells it from the others.

    Raises:
        ArgumentError: If there are not as many names as checkpoints, or a single checkpoint, or one comes twice.
    """
    if len(paths) < 2:
        raise ArgumentError("compare needs two checkpoints or more, got 1. Use sharpness report for a single model.")
    if given is not None:
        if len(given) != len(paths):
            raise ArgumentError(
                f"there are {len(paths)} checkpoints and {len(given)} names. Pass --name once for each --checkpoint."
            )
        return given
    parts = [Path(os.path.abspath(path)).with_suffix("").parts for path in paths]
    for length in range(1, max(map(len, parts)) + 1):
        names = ["/".join(part[-length:]) for part in parts]
        if len(set(names)) == len(names):
            return names
    raise ArgumentError(
        "a checkpoint comes twice, or two differ in their endings alone. Name them, with --name for each."
    )
