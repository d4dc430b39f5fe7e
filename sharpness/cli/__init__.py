"""The command line: ``sharpness compare``, ``report``, ``sweep`` and ``demo``."""

from sharpness.cli.command import main

__all__ = ["main"]
