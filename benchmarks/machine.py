"""What the numbers were measured on, and a clock that notices when other processes had the processors."""

from __future__ import annotations

import gc
import os
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

import torch

_LIBRARIES = ("sharpness", "torch", "numpy", "scipy", "pyhessian", "hessian-eigenthings", "curvlinops-for-pytorch")
_QUIET = 0.1  # share of the processors that other processes may take from a run that counts as undisturbed

T = TypeVar("T")


def environment() -> dict[str, Any]:
    """Return versions and the size of the machine, and nothing that tells whose it is."""
    return {
        "python": platform.python_version(),
        "architecture": platform.machine(),
        "cpus": cpus(),
        "torch_threads": torch.get_num_threads(),
        **{name: version(name) for name in _LIBRARIES},
    }


def cpus() -> int:
    """Return how many processors this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@dataclass(frozen=True)
class Timing:
    """Wall time of a run, and the share of the processors that others took meanwhile; 0 where that is not told."""

    seconds: float
    others: float

    @property
    def disturbed(self) -> bool:
        """Whether others took enough to matter: threads that wait for each other lose many times that share."""
        return self.others > _QUIET


class Clock:
    """Times runs; waits for a quiet machine and repeats disturbed runs while its patience lasts.

    Args:
        patience: Seconds that may be spent in all on waiting and on runs that did not count.
    """

    def __init__(self, patience: float = 0.0) -> None:
        self.patience = patience

    def time(self, function: Callable[[], T]) -> tuple[T, Timing]:
        """Call ``function`` once, or again after a disturbance; return its answer and the quietest timing."""
        self._settle()
        answer, best = timed(function)
        while best.disturbed and self.patience > 0:
            self.patience -= best.seconds
            self._settle()
            answer, again = timed(function)
            best = min(best, again, key=lambda timing: timing.others)
        return answer, best

    def _settle(self) -> None:
        """Wait until others leave the machine alone, or until patience ends."""
        while self.patience > 0:
            _, idle = timed(lambda: time.sleep(2))
            if not idle.disturbed:
                return
            self.patience -= idle.seconds


def timed(function: Callable[[], T]) -> tuple[T, Timing]:
    """Call ``function`` and return its answer and its timing."""
    gc.collect()
    busy, own, started = _busy_seconds(), time.process_time(), time.perf_counter()
    answer = function()
    seconds = time.perf_counter() - started
    others = (_busy_seconds() - busy) - (time.process_time() - own)
    return answer, Timing(seconds, max(others, 0.0) / (seconds * cpus()))


def _busy_seconds() -> float:
    """Return the processor time that all processes have taken since the machine was started, as far as it tells."""
    try:
        fields = Path("/proc/stat").read_text().splitlines()[0].split()[1:]
    except (OSError, IndexError):
        return time.process_time()
    user, nice, system, _, _, irq, softirq = map(int, fields[:7])
    return (user + nice + system + irq + softirq) / os.sysconf("SC_CLK_TCK")
