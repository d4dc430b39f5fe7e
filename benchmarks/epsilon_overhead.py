"""What epsilon-sharpness costs beyond its evaluations of loss and gradient, at ten million parameters.

``python -m benchmarks.epsilon_overhead [--width N] [--samples N] [--solver ...] [--subspace-dim P] [--json FILE]``

The overhead does not depend on the data, an evaluation is proportional to them: beside the share at ``--samples``
images the table says from how many images on it is under a tenth.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any
from unittest import mock

import scipy
import torch
from tabulate import tabulate
from torch import nn

import sharpness
from sharpness import Objective


def measure(objective: Objective, samples: int, solver: str, subspace_dim: int | None) -> dict[str, Any]:
    """Return the seconds of one call, of processor and wall, in evaluations and beside them."""
    spent = {"wall": 0.0, "cpu": 0.0}
    inner = Objective.value_and_gradient

    def timed(self: Objective, at: Any = None) -> Any:
        wall, cpu = time.perf_counter(), time.process_time()
        try:
            return inner(self, at)
        finally:
            spent["wall"] += time.perf_counter() - wall
            spent["cpu"] += time.process_time() - cpu

    with mock.patch.object(Objective, "value_and_gradient", timed), mock.patch.object(Objective, "check"):
        wall, cpu = time.perf_counter(), time.process_time()
        result = sharpness.epsilon_sharpness(
            objective, solver=solver, subspace_dim=subspace_dim, num_starts=1, on_failure="ignore"
        )
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    beside = cpu - spent["cpu"]
    evaluation = spent["cpu"] / result.num_evaluations
    return {
        "solver": solver,
        "space": "full" if subspace_dim is None else f"p={subspace_dim}",
        "evaluations": result.num_evaluations,
        "evaluation_cpu_s": evaluation,
        "overhead_cpu_s": beside / result.num_evaluations,
        "overhead": beside / spent["cpu"],
        "overhead_wall": (wall - spent["wall"]) / spent["wall"],
        "tenth_from": 10 * beside / spent["cpu"] * samples,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="What epsilon-sharpness costs beyond its evaluations.")
    parser.add_argument("--width", type=int, default=2740, help="of 784 - 2 x width - 10 (default 2740: 9.7 million)")
    parser.add_argument("--samples", type=int, default=1000, help="images (default 1000)")
    parser.add_argument("--solver", choices=["l-bfgs-b", "projected-gradient"], help="one solver instead of both")
    parser.add_argument("--subspace-dim", type=int, nargs="*", default=[], help="also measure in random subspaces")
    parser.add_argument("--json", type=Path, help="write the numbers and the environment to this file")
    options = parser.parse_args()
    torch.manual_seed(0)
    w = options.width
    model = nn.Sequential(nn.Linear(784, w), nn.ReLU(), nn.Linear(w, w), nn.ReLU(), nn.Linear(w, 10))
    data = [(torch.rand(options.samples, 784), torch.randint(10, (options.samples,)))]
    objective = Objective(model, data, progress=False)
    print(f"{objective.n:,} parameters, {options.samples} images, {torch.get_num_threads()} threads", flush=True)
    objective.value_and_gradient()
    rows = [
        measure(objective, options.samples, solver, dim)
        for solver in ([options.solver] if options.solver else ["projected-gradient", "l-bfgs-b"])
        for dim in (None, *options.subspace_dim)
    ]
    lines = [
        [
            row["solver"],
            row["space"],
            row["evaluations"],
            f"{row['evaluation_cpu_s']:.2f} s",
            f"{row['overhead_cpu_s']:.2f} s",
            f"{100 * row['overhead']:.1f} %",
            f"{row['tenth_from']:,.0f}",
        ]
        for row in rows
    ]
    headers = ["solver", "space", "evaluations", "each (processor)", "beside it", "overhead", "a tenth from (images)"]
    print(tabulate(lines, headers=headers, tablefmt="github", disable_numparse=True))
    if options.json:
        environment = {"torch": torch.__version__, "scipy": scipy.__version__, "threads": torch.get_num_threads()}
        options.json.write_text(json.dumps({"environment": environment, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
