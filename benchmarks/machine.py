"""What the numbers were measured on, a clock that notices other processes, and the peak of live bytes."""

from __future__ import annotations

import gc
import os
import platform
import time
import tracemalloc
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch._C._profiler import RecordScope, _ExperimentalConfig
from torch.autograd import (
    ProfilerActivity,
    ProfilerConfig,
    ProfilerState,
    _disable_profiler,
    _enable_profiler,
    _prepare_profiler,
)

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
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        **{name: _version(name) for name in _LIBRARIES},
    }


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


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
    _synchronize()
    busy, own, started = _busy_seconds(), time.process_time(), time.perf_counter()
    answer = function()
    _synchronize()
    seconds = time.perf_counter() - started
    others = (_busy_seconds() - busy) - (time.process_time() - own)
    return answer, Timing(seconds, max(others, 0.0) / (seconds * cpus()))


def peak_bytes(function: Callable[[], Any]) -> int:
    """Return the largest number of bytes that were live at once while ``function`` ran, beyond those before.

    On the CPU the allocator's own events are added up (PyTorch's profiler), on a GPU it counts by itself. The peak of
    what NumPy, SciPy and Python hold is added: too much only if they hold it at another time, unlike ARPACK its basis.
    """
    gc.collect()
    tracemalloc.start()
    try:
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            answer = function()
            return torch.cuda.max_memory_allocated() - before + tracemalloc.get_traced_memory()[1]
        _listen()
        try:
            answer = function()  # noqa: F841 - alive to the end, as for a user
            arrays = tracemalloc.get_traced_memory()[1]
        finally:
            events = _disable_profiler().events()
    finally:
        tracemalloc.stop()
    live = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        if event.name() == "[memory]":
            live += event.nbytes()
            peak = max(peak, live)
    return peak + arrays


def _listen() -> None:
    """Record what the allocator does and no operations, which would be many times as much."""
    only_memory = ProfilerConfig(ProfilerState.KINETO, False, True, False, False, False, _ExperimentalConfig())
    _prepare_profiler(only_memory, {ProfilerActivity.CPU})
    _enable_profiler(only_memory, {ProfilerActivity.CPU}, {RecordScope.USER_SCOPE})


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _busy_seconds() -> float:
    """Return the processor time that all processes have taken since the machine was started, as far as it tells."""
    try:
        fields = Path("/proc/stat").read_text().splitlines()[0].split()[1:]
    except (OSError, IndexError):
        return time.process_time()
    user, nice, system, _, _, irq, softirq = map(int, fields[:7])
    return (user + nice + system + irq + softirq) / os.sysconf("SC_CLK_TCK")
