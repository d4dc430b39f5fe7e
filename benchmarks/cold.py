"""What a run takes in a fresh process: with an empty compile cache, and with the cache that such a run has left.

`benchmarks.suite --cold` calls this; the process itself is ``python -m benchmarks.cold PROBLEM QUANTITY METHOD SEED``.
Importing and loading are not timed. The network is saved once, so that it is the same bits everywhere.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch

from benchmarks import ours
from benchmarks.machine import timed
from benchmarks.models import Problem

# Where PyTorch, Triton, and what follows the custom of the system keep what they have compiled.
_CACHES = ("SHARPNESS_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR", "XDG_CACHE_HOME")


def cold(problem: Problem, quantity: str, names: list[str], repeat: int) -> dict[str, dict[str, Any]]:
    """Return for each of our methods the seconds of a first run, medians over ``repeat``, all taken in turns."""
    found: dict[str, dict[str, list[float]]] = {name: {"empty": [], "full": []} for name in names}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "problem.pt"
        torch.save(problem, path)
        for i in range(repeat):
            for name in names:
                with tempfile.TemporaryDirectory() as cache:
                    for state in ("empty", "full"):
                        found[name][state].append(_process(path, quantity, name, i, Path(cache)))
    return {
        name: {
            "empty_cache": statistics.median(times["empty"]),
            "full_cache": statistics.median(times["full"]),
            "runs": times,
        }
        for name, times in found.items()
    }


def _process(path: Path, quantity: str, name: str, seed: int, cache: Path) -> float:
    command = [sys.executable, "-m", "benchmarks.cold", str(path), quantity, name, str(seed)]
    environment = {**os.environ, **{variable: str(cache / variable) for variable in _CACHES}}
    done = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True)  # noqa: S603
    return float(json.loads(done.stdout.splitlines()[-1]))


def main() -> None:
    warnings.simplefilter("ignore")
    path, quantity, name, seed = sys.argv[1:]
    problem = torch.load(path, weights_only=False)
    [method] = [method for method in ours.methods(quantity) if method.name == name]
    problem.model(problem.loader[-1][0][:1])  # the first call of a kernel is nobody's engine
    print(json.dumps(timed(method.prepare(problem, int(seed)))[1].seconds))


if __name__ == "__main__":
    main()
