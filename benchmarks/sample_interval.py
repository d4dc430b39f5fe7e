"""Does the bracket from a subset hold the eigenvalue over all data, and what does it cost?

    python -m benchmarks.sample_interval [--model mlp|resnet20] [--share 0.25] [--shuffles 20] [--json FILE]

For each of several shuffles of a trained network's data, `top_eigenvalues` with ``max_batches`` and
``sample_interval=True`` brackets the top eigenvalue over all data, which is computed as well. Passes are counted in
passes over all the data.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

import sharpness
from benchmarks.machine import environment
from benchmarks.models import PROBLEMS, Problem


def measure(problem: Problem, share: float, shuffles: int, batch_size: int) -> dict[str, Any]:
    """Return the eigenvalue over all data, and what each shuffle's bracket was."""
    inputs, targets = problem.whole
    full = sharpness.top_eigenvalues(problem.model, problem.loader)
    subset = max(2, round(share * len(targets) / batch_size))
    rows = []
    for seed in range(shuffles):
        order = torch.randperm(len(targets), generator=torch.Generator().manual_seed(seed))
        loader = list(zip(inputs[order].split(batch_size), targets[order].split(batch_size), strict=True))
        result = sharpness.top_eigenvalues(problem.model, loader, max_batches=subset, sample_interval=True)
        bracket = result.sample_interval
        rows.append(
            {
                "low": bracket.low,
                "high": bracket.high,
                "inner": bracket.inner,
                "outer": bracket.outer,
                "holds": bracket.low <= full.headline <= bracket.high,
                "passes": result.num_passes * subset * batch_size / len(targets),
            }
        )
    return {
        "model": str(problem),
        "full": full.headline,
        "full_passes": full.num_passes,
        "images": len(targets),
        "subset": subset * batch_size,
        "rows": rows,
    }


def main() -> None:
    """Print one line per shuffle and what they have in common."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=PROBLEMS, default="mlp")
    parser.add_argument("--share", type=float, default=0.25, help="of the data in the subset")
    parser.add_argument("--shuffles", type=int, default=20)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    found = measure(PROBLEMS[options.model](), options.share, options.shuffles, options.batch_size)
    print(found["model"])
    print(f"all {found['images']} images: {found['full']:.4g} in {found['full_passes']} passes")
    for row in found["rows"]:
        print(
            f"  {found['subset']} images: {row['low']:.4g} to {row['high']:.4g} (held out {row['inner']:.4g}, subset "
            f"{row['outer']:.4g}) {'holds' if row['holds'] else 'MISSES'}; {row['passes']:.1f} passes over all"
        )
    rows = found["rows"]
    mean = {key: float(np.mean([row[key] for row in rows])) for key in ("inner", "outer", "holds", "passes")}
    print(
        f"holds in {100 * mean['holds']:.0f} %; on average held out {mean['inner']:.4g}, all {found['full']:.4g}, "
        f"subset {mean['outer']:.4g}; {mean['passes'] / found['full_passes']:.2f} of the passes"
    )
    if options.json:
        options.json.write_text(json.dumps({"environment": environment(), **found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
