"""Options that several commands share."""

from __future__ import annotations

import argparse
import ast
from typing import Any

import torch
from torch import nn

from sharpness.comparison.presets import PRESETS
from sharpness.errors import ArgumentError


class Help(argparse.HelpFormatter):
    """Help whose paragraphs fill the terminal, and whose examples stay as they are."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        parts = text.split("\n\n")
        filled = [part if "\n  " in part else super(Help, self)._fill_text(part, width, indent) for part in parts]
        return "\n\n".join(filled)


def add_common(parser: argparse.ArgumentParser, *, measured: bool = True) -> None:
    """Add how to measure, and how to run; ``measured`` leaves out what a command that trains decides itself."""
    group = parser.add_argument_group("measuring")
    group.add_argument(
        "--metrics",
        metavar="LIST",
        action="append",
        help="default, scale-free (but for report), or names with options in brackets: "
        "'top_eigenvalues(k=3),epsilon_sharpness(epsilon=5e-4)'; may be given several times",
    )
    group.add_argument(
        "--loss",
        metavar="MODULE:OBJECT",
        help="a criterion or function (outputs, targets) -> scalar, such as torch.nn:CrossEntropyLoss (default: what "
        "fits the targets)",
    )
    if measured:
        group.add_argument("--mode", choices=["eval", "train", "as_is"], default="eval", help="default: %(default)s")
        group.add_argument("--max-batches", type=int, metavar="N", help="measure on the first N batches only")
    group.add_argument("--device", help="where to measure, such as cuda (default: where MAKE_MODEL puts the model)")
    group.add_argument("--memory", default="auto", metavar="SIZE", help="what may be kept between products: 2GiB, say")
    group.add_argument("--seed", type=int, default=0, metavar="N", help="of all random numbers (default: 0)")


def add_running(parser: argparse.ArgumentParser) -> None:
    """Add what every command knows."""
    group = parser.add_argument_group("running")
    group.add_argument("--quiet", action="store_true", help="no progress bars")
    group.add_argument("--strict", action="store_true", help="exit code 3 if there are warnings")
    group.add_argument("--debug", action="store_true", help="show the whole traceback of an error")


def parse_metrics(given: list[str] | None) -> Any:
    """Return the metrics in lists such as ``name,name(option=value)``, as the functions take them.

    Raises:
        ArgumentError: If it cannot be understood.
    """
    text = ",".join(given or ["default"])
    if text.strip() in PRESETS:
        return text.strip()
    try:
        tree = ast.parse(f"[{text}]", mode="eval").body
        if not isinstance(tree, ast.List) or not tree.elts:
            raise ValueError("no list of names")
        return [_metric(entry) for entry in tree.elts]
    except (SyntaxError, ValueError) as error:
        raise ArgumentError(
            f"--metrics: {text!r} cannot be understood. "
            "Write names, with options in brackets: 'top_eigenvalues(k=3),fisher_rao_norm'."
        ) from error


def _metric(entry: ast.expr) -> Any:
    if isinstance(entry, ast.Name):
        return entry.id
    if isinstance(entry, ast.Call) and isinstance(entry.func, ast.Name) and not entry.args:
        return entry.func.id, {str(option.arg): ast.literal_eval(option.value) for option in entry.keywords}
    raise ValueError("neither a name nor a name with options")


def parse_sizes(text: str) -> list[int]:
    """Return the whole numbers in ``16,64,256``."""
    try:
        return [int(part) for part in text.split(",")]
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is no list of whole numbers such as 16,64,256") from error


def check_device(text: str | None) -> torch.device | None:
    """Return a device that is there.

    Raises:
        ArgumentError: If there is no such device.
    """
    if text is None:
        return None
    try:
        device = torch.device(text)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ArgumentError(
            f"--device: {text!r} is not there ({' '.join(str(error).split())[:120]}). "
            "Use cpu, or a device of this machine."
        ) from error
    return device


def place(model: nn.Module, device: torch.device | None) -> nn.Module:
    """Return the model on a device, if one is asked for."""
    return model if device is None else model.to(device)
